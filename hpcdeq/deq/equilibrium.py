"""One fixed point and the linear systems that its derivatives need: A = I - J, or its transpose, solved by a KSP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcdeq.deq.arguments import StateFunction
from hpcdeq.deq.forward import SLACK, TOLERANCES, ForwardSolver, Samples, Solution, bind, resolvent_product
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.work import Work
from hpcdeq.errors import ConvergenceError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.operators import matrix_from_products
from hpcdeq.petsc.options import Options
from hpcdeq.petsc.solves import SolveRecord, run_ksp
from hpcdeq.petsc.vectors import copy_from_vector, copy_to_vector

MAX_ITERATIONS = 1000
GMRES_RESTART = 50


@dataclass(frozen=True)
class LinearSolution:
    """How a tangent or adjoint solve ended.

    Attributes
    ----------
    reason
        PETSc's name of the reason.
    iterations
        Krylov iterations.
    residual
        ``(B,)`` true residual norms of each sample, computed afresh at the answer.
    right_hand_side
        ``(B,)`` norms of the right-hand side, which the residuals are to be compared with.
    record
        PETSc's record of the solve.
    """

    reason: str
    iterations: int
    residual: Tensor
    right_hand_side: Tensor
    record: SolveRecord


@dataclass
class Log:
    """The last forward, adjoint and tangent solve of a layer, and what all of them cost."""

    work: Work
    solution: Solution | None = None
    adjoint: LinearSolution | None = None
    tangent: LinearSolution | None = None


class Equilibrium:
    """One fixed point with what its derivatives share: the linearised cell and the Krylov solver.

    Parameters
    ----------
    function
        ``function(z, *tensors)``.
    sample_index
        As in `Samples.of`.
    options
        PETSc's options, with their prefix.
    log
        Where the outcome of each solve is kept.
    differentiated
        Whether a derivative will be asked for: the last evaluation of the forward solve then is the linearisation.
    """

    def __init__(
        self,
        function: StateFunction,
        sample_index: Tensor | None,
        options: Options,
        log: Log,
        *,
        differentiated: bool,
    ) -> None:
        self.function = function
        self.sample_index = sample_index
        self.options = options
        self.log = log
        self.differentiated = differentiated
        self._at: Linearisation | None = None
        self._ksp: PETSc.KSP | None = None

    def solve(self, z0: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the fixed point. Not collective."""
        self.samples = Samples.of(z0, self.sample_index)
        self._point: tuple[Tensor, list[Tensor]] | None = None
        evaluate = None
        if self.differentiated:

            def evaluate(z: Tensor) -> Tensor:
                self._at = Linearisation(self.function, z, tensors)
                return self._at.value

        solver = ForwardSolver(bind(self.function, tensors), self.samples, self.options, self.log.work)
        try:
            self.log.solution = solver.solve(z0.detach(), evaluate)
        except ConvergenceError as error:
            self.log.solution = error.record if isinstance(error.record, Solution) else None
            raise
        self._point = (self.log.solution.value, list(tensors))
        return self.log.solution.value.clone()

    def linearisation(self) -> Linearisation:
        """Return the cell linearised at the fixed point. Not collective."""
        if self._at is None:
            assert self._point is not None
            self._at = Linearisation(self.function, *self._point)
            self.log.work.cell_evaluations += self.samples.count
        return self._at

    def resolvent(self, g: Tensor, *, transpose: bool) -> Tensor:
        """Return (I - J)⁻¹ g, or (I - J)⁻ᵀ g.

        Not collective.

        Raises
        ------
        ConvergenceError
            The linear solve failed, or its true residual says that it did.
        """
        norm = self.samples.norms(g)
        if not bool(norm.any()):
            done = SolveRecord("KSP", "none", self.options.prefix, "CONVERGED_ATOL", True, 0, 0.0)
            self._keep(LinearSolution(done.reason, 0, norm.cpu(), norm.cpu(), done), transpose=transpose)
            return torch.zeros_like(g)
        at = self.linearisation()
        ksp = self._solver(at)
        b = PETSc.Vec().createSeq(g.numel(), comm=PETSc.COMM_SELF)
        x = b.duplicate()
        try:
            copy_to_vector(g, b)
            with self.options.inserted():
                record = run_ksp(ksp, b, x, transpose=transpose)
            rtol, atol = ksp.getTolerances()[:2]
            answer = copy_from_vector(x, g)
        finally:
            b.destroy()
            x.destroy()
        if transpose:
            self.log.work.cell_vjps += self.samples.count
            error = g - answer + at.vjp(answer)
        else:
            self.log.work.cell_jvps += self.samples.count
            error = g - answer + at.jvp(answer)
        residual = self.samples.norms(error)
        outcome = LinearSolution(record.reason, record.iterations, residual.cpu(), norm.cpu(), record)
        self._keep(outcome, transpose=transpose)
        total, bound = float(residual.norm()), SLACK * max(rtol * float(norm.norm()), atol)
        if not record.converged or not total <= bound:
            name = "adjoint" if transpose else "tangent"
            raise ConvergenceError(
                f"{name} system of the fixed point not solved by {record.solver}: {record.reason} after"
                f" {record.iterations} iterations, true residual {total:.3g}"
                f" where the right-hand side has {float(norm.norm()):.3g}.\n"
                f"Likely fix: {record.remedy()}.\n"
                f"History: add -{record.prefix}ksp_monitor_true_residual -{record.prefix}ksp_converged_reason.",
                record=outcome,
            )
        return answer

    def _keep(self, outcome: LinearSolution, *, transpose: bool) -> None:
        if transpose:
            self.log.adjoint = outcome
        else:
            self.log.tangent = outcome

    def _solver(self, at: Linearisation) -> PETSc.KSP:
        if self._ksp is None:
            n = at.z.numel()
            work, count = self.log.work, self.samples.count
            # The products hold the linearisation, not this object: PETSc's references are invisible to Python's
            # garbage collector, and a cycle through them would never be freed.
            matrix = matrix_from_products(
                PETSc.COMM_SELF,
                (n, n),
                (n, n),
                resolvent_product(at, work, count, transpose=False),
                resolvent_product(at, work, count, transpose=True),
            )
            ksp = PETSc.KSP().create(comm=PETSc.COMM_SELF)
            ksp.setOptionsPrefix(self.options.prefix)
            ksp.setOperators(matrix)
            ksp.setType(PETSc.KSP.Type.GMRES)
            ksp.setGMRESRestart(GMRES_RESTART)
            ksp.getPC().setType(PETSc.PC.Type.NONE)
            rtol = TOLERANCES.get(at.z.dtype, TOLERANCES[torch.float32])[0]
            ksp.setTolerances(rtol=rtol, atol=1e-50, max_it=MAX_ITERATIONS)
            with self.options.inserted():
                ksp.setFromOptions()
            self._ksp = ksp
        return self._ksp
