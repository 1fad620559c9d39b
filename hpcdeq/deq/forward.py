"""Find a fixed point z = f(z) with a SNES: residual z - f(z), convergence judged sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcdeq.deq.arguments import StateFunction
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.work import Work
from hpcdeq.errors import ConvergenceError, ShapeError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.operators import ProductMatrix
from hpcdeq.petsc.options import Options
from hpcdeq.petsc.solves import SolveRecord, run_snes
from hpcdeq.petsc.vectors import copy_from_vector, copy_to_vector, shaped_read

# (relative, absolute) tolerances of a sample's residual, and the relative one of the derivative systems, by precision.
# Every option of PETSc's stays in reach: -deq_snes_rtol, -deq_snes_atol, -deq_ksp_rtol.
TOLERANCES = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-6)}
MAX_ITERATIONS = 500
# PETSc's window is 30. Ten costs about a tenth more iterations on small cells and a third of the memory.
DEFAULTS = {"snes_anderson_m": 10}
# A solver's last residual and the one computed afresh differ by rounding; more than this factor means a wrong answer.
SLACK = 10.0

PETSC_ERR_FP = 72
PETSC_ERR_LIB = 76


@dataclass(frozen=True)
class Samples:
    """Which rows of a state belong to which sample.

    Attributes
    ----------
    count
        Number of samples B.
    index
        ``(rows,)`` sample of each leading row of the state; None: each row is a sample (or, in a state of at most one
        dimension, all of it is one).
    """

    count: int
    index: Tensor | None = None

    @staticmethod
    def of(z: Tensor, index: Tensor | None) -> Samples:
        """Return the samples of a state. Not collective."""
        if index is not None:
            if index.shape != z.shape[:1]:
                raise ShapeError(f"sample_index has shape {tuple(index.shape)}, the state {z.shape[0]} rows")
            return Samples(int(index.max()) + 1 if index.numel() else 0, index)
        return Samples(z.shape[0] if z.dim() > 1 else 1)

    def norms(self, z: Tensor) -> Tensor:
        """Return the 2-norm of each sample, ``(B,)`` in float64. Not collective."""
        if z.dim() > 1:
            rows = z.flatten(1)
        else:
            rows = z.reshape(1, -1) if self.index is None else z[:, None]
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        if self.index is None:
            return norms
        squares = norms.square_()
        return torch.zeros(self.count, dtype=torch.float64, device=z.device).index_add_(0, self.index, squares).sqrt_()


@dataclass(frozen=True)
class Solution:
    """A fixed point and how it was found.

    Attributes
    ----------
    value
        z, in the shape of the state.
    reason
        PETSc's name of the reason why the solver stopped.
    iterations
        ``(B,)`` iterations after which each sample had converged for good.
    residual
        ``(B,)`` true residual norms ‖f(z_i) - z_i‖, computed afresh at ``value``.
    evaluations
        Evaluations of the cell on the whole batch.
    record
        PETSc's record of the solve.
    """

    value: Tensor
    reason: str
    iterations: Tensor
    residual: Tensor
    evaluations: int
    record: SolveRecord


class ForwardSolver:
    """One forward solve: its callbacks and its counters.

    Parameters
    ----------
    function
        ``function(z) -> f(z)``, all other arguments bound.
    samples
        Which rows belong together.
    options
        PETSc's options, with their prefix.
    work
        Counters to add to.
    """

    def __init__(self, function: StateFunction, samples: Samples, options: Options, work: Work) -> None:
        self.function = function
        self.samples = samples
        self.options = options
        self.work = work
        self.evaluations = 0

    def solve(self, z0: Tensor, evaluate_last: Callable[[Tensor], Tensor] | None = None) -> Solution:
        """Return the fixed point found from z0.

        Not collective (the solver lives on this rank alone).

        Parameters
        ----------
        z0
            Initial guess.
        evaluate_last
            The evaluation of f at the answer that its true residual is computed from; a caller that differentiates
            keeps this evaluation's graph. None: a plain evaluation.

        Raises
        ------
        ConvergenceError
            Names the samples that did not converge; its ``record`` is the Solution found.
        """
        if z0.numel() == 0:
            nothing = SolveRecord("SNES", "none", self.options.prefix, "CONVERGED_FNORM_ABS", True, 0, 0.0)
            empty = torch.zeros(self.samples.count, dtype=torch.float64)
            return Solution(z0.detach().clone(), nothing.reason, empty.to(torch.int64), empty, 0, nothing)
        self.like = z0
        self.since = torch.full((self.samples.count,), -1, dtype=torch.int64, device=z0.device)
        rtol, atol = TOLERANCES.get(z0.dtype, TOLERANCES[torch.float32])
        vector = PETSc.Vec().createSeq(z0.numel(), comm=PETSc.COMM_SELF)
        snes = PETSc.SNES().create(comm=PETSc.COMM_SELF)
        jacobian = self._jacobian_matrix(z0)
        try:
            copy_to_vector(z0, vector)
            snes.setOptionsPrefix(self.options.prefix)
            snes.setType(PETSc.SNES.Type.ANDERSON)
            snes.setFunction(self._residual, vector.duplicate())
            snes.setJacobian(self._update_jacobian, jacobian)
            snes.setTolerances(rtol=rtol, atol=atol, stol=0.0, max_it=MAX_ITERATIONS)
            # Newton's inner solves need few digits; what is typed as -deq_ksp_rtol replaces this one too.
            snes.getKSP().setTolerances(rtol=1e-4)
            snes.getKSP().getPC().setType(PETSc.PC.Type.NONE)
            with self.options.inserted():
                snes.setFromOptions()
                snes.setConvergenceTest(self._converged)
                record = self._run(snes, vector)
            self.rtol, self.atol = snes.getTolerances()[:2]
            z = copy_from_vector(vector, z0)
        finally:
            snes.destroy()
            jacobian.destroy()
            vector.destroy()
        if evaluate_last is None:
            with torch.no_grad():
                last = self.function(z)
        else:
            last = evaluate_last(z)
        self.evaluations += 1
        residual = self.samples.norms(last - z)
        within = residual <= SLACK * (self.rtol * self.samples.norms(last) + self.atol)
        iterations = torch.where(self.since >= 0, self.since, record.iterations)
        solution = Solution(z, record.reason, iterations.cpu(), residual.cpu(), self.evaluations, record)
        self._count(iterations, int((~within).sum()))
        if not record.converged or not bool(within.all()):
            raise ConvergenceError(self._explain(solution, within.cpu()), record=solution)
        return solution

    def _count(self, iterations: Tensor, unconverged: int) -> None:
        self.work.cell_evaluations += self.evaluations * self.samples.count
        self.work.solves += self.samples.count
        self.work.iterations_sum += int(iterations.sum())
        self.work.iterations_max = max(self.work.iterations_max, int(iterations.max()))
        self.work.unconverged += unconverged

    def _run(self, snes: PETSc.SNES, vector: PETSc.Vec) -> SolveRecord:
        try:
            return run_snes(snes, None, vector)
        except PETSc.Error as error:
            # Some types (ngmres) raise on NaN where the others end with a reason.
            if error.ierr not in (PETSC_ERR_FP, PETSC_ERR_LIB):
                raise
            iterations = snes.getIterationNumber()
            return SolveRecord(
                "SNES",
                snes.getType(),
                self.options.prefix,
                "DIVERGED_FUNCTION_NANORINF",
                False,
                iterations,
                float("nan"),
            )

    def _residual(self, snes: PETSc.SNES, x: PETSc.Vec, residual: PETSc.Vec) -> None:
        with torch.no_grad(), shaped_read(x, self.like) as z:
            image = self.function(z)
            if image.shape != z.shape:
                raise ShapeError(f"the cell maps a state of shape {tuple(z.shape)} to shape {tuple(image.shape)}")
            self.evaluations += 1
            copy_to_vector(z - image, residual)

    def _converged(self, snes: PETSc.SNES, iteration: int, norms: tuple[float, float, float]) -> int:
        reasons = PETSc.SNES.ConvergedReason
        rtol, atol, _, _ = snes.getTolerances()
        with torch.no_grad(), shaped_read(snes.getSolution(), self.like) as z:
            with shaped_read(snes.getFunction()[0], self.like) as residual:
                size = self.samples.norms(residual)
                done = size <= rtol * self.samples.norms(z - residual) + atol
        self.since = torch.where(done, torch.where(self.since < 0, iteration, self.since), -1)
        total = float(size.square().sum().sqrt())
        if iteration == 0:
            self.first = total
        if done.all():
            return reasons.CONVERGED_FNORM_RELATIVE
        if total != total or total == float("inf"):
            return getattr(reasons, "DIVERGED_FUNCTION_NANORINF", -4)
        if total > snes.getDivergenceTolerance() * self.first > 0:
            return reasons.DIVERGED_DTOL
        return reasons.CONVERGED_ITERATING

    def _jacobian_matrix(self, z0: Tensor) -> PETSc.Mat:
        n = z0.numel()
        matrix = PETSc.Mat().createPython(((n, n), (n, n)), comm=PETSc.COMM_SELF)
        matrix.setPythonContext(ProductMatrix(_unset, _unset))
        matrix.setUp()
        return matrix

    def _update_jacobian(self, snes: PETSc.SNES, x: PETSc.Vec, jacobian: PETSc.Mat, _: PETSc.Mat) -> None:
        with shaped_read(x, self.like) as z:
            at = Linearisation(self.function, z.clone(), ())
        self.evaluations += 1
        jacobian.setPythonContext(
            ProductMatrix(
                resolvent_product(at, self.work, self.samples.count, transpose=False),
                resolvent_product(at, self.work, self.samples.count, transpose=True),
            )
        )

    def _explain(self, solution: Solution, within: Tensor) -> str:
        bad = (~within).nonzero().flatten().tolist() or list(range(self.samples.count))
        worst = max(bad, key=lambda i: float(solution.residual[i].nan_to_num(float("inf"), float("inf"))))
        record = solution.record
        named = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        reason = record.reason if not record.converged else f"{record.reason}, but the residual says otherwise"
        return (
            f"fixed point of {len(bad)} of {self.samples.count} samples (sample {named}) not reached by {record.solver}: {reason}"
            f" after {record.iterations} iterations, ||f(z) - z|| = {float(solution.residual[worst]):.3g} in sample {worst}.\n"
            f"Likely fix: {record.remedy()}.\n"
            f"History: add -{record.prefix}snes_monitor -{record.prefix}snes_converged_reason."
        )


def _unset(x: PETSc.Vec, y: PETSc.Vec) -> None:
    raise RuntimeError("the Jacobian is used before it is computed")


def resolvent_product(
    at: Linearisation, work: Work, count: int, *, transpose: bool
) -> Callable[[PETSc.Vec, PETSc.Vec], None]:
    """Return the product y = (I - J) x, or with its transpose, on PETSc vectors. Not collective."""

    def product(x: PETSc.Vec, y: PETSc.Vec) -> None:
        with shaped_read(x, at.z) as v:
            if transpose:
                work.cell_vjps += count
                copy_to_vector(v - at.vjp(v), y)
            else:
                work.cell_jvps += count
                copy_to_vector(v - at.jvp(v), y)

    return product


def bind(function: StateFunction, tensors: Sequence[Tensor]) -> StateFunction:
    """Return ``z -> function(z, *tensors)`` with the tensors detached. Not collective."""
    fixed = [t.detach() for t in tensors]
    return lambda z: function(z, *fixed)
