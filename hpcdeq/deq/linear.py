"""The tangent and adjoint systems of one fixed point, A = I - J: which method solves them, and whether it did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcdeq.deq.forward import SLACK, TOLERANCES
from hpcdeq.deq.history import History
from hpcdeq.deq.inexact import INEXACT, refuse_inexact
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.resolvent import ResolventMatrix, resolvent_matrix
from hpcdeq.deq.samples import Samples
from hpcdeq.deq.systems import LinearProblem, TensorSolver
from hpcdeq.deq.work import Work
from hpcdeq.errors import ConvergenceError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import Options
from hpcdeq.petsc.solves import SolveRecord, reraise, run_ksp, set_type
from hpcdeq.petsc.vectors import copy_from_vector, copy_to_vector

MAX_ITERATIONS = 1000
GMRES_RESTART = 50
ITERATIVE, DIRECT = "batched_anderson", "batched_lu"
# Dense blocks and their factors may take so much memory.
DENSE_BYTES = 2**30
# The least that is expected of the iterations of one solve, to the usual tolerance.
ITERATIONS, USUAL = 15, 1e-6
# A product with J or Jᵀ costs about so many evaluations of the cell.
PRODUCT = 1.5


def assembly_cost(size: int) -> float:
    """Return the cost of a batch's dense blocks and their factors, in evaluations of a fully connected cell on the batch.

    Not collective. Fitted to 80 + 52 evaluations at 64 numbers a sample and 146 + 124 at 128 (float64, 1,000 samples, one
    core): d products, and d³ against d² operations for the factors. Cells that do more than d² operations a sample make
    the factors cheaper than this in comparison.
    """
    return 1.15 * size + size**2 / 128


def substitution_cost(size: int) -> float:
    """Return the cost of one solve with the factors, in the same unit: 10 at 64 numbers, 15 at 128. Not collective."""
    return 5 + size / 13


@dataclass(frozen=True)
class LinearSolution:
    """How a tangent or adjoint solve ended.

    Attributes
    ----------
    reason
        PETSc's name of the reason; INEXACT_... for an approximation that solves nothing.
    iterations
        Iterations of the solver.
    residual
        ``(B,)`` true residual norms of each sample, computed afresh at the answer; NaN for an inexact adjoint.
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


class LinearSolver:
    """Solves with I - J and its transpose at one fixed point.

    What ``-deq_ksp_type`` or ``-deq_pc_type`` name is used. Without them, small states are solved directly where that is
    expected to cost less than iterating, from the number of solves that are to come and the iterations that the forward
    solve took. The choice is made once for a fixed point, so that a derivative taken twice is the same, and from counts,
    not from clocks, so that a run repeats itself. Not collective, every method.

    Parameters
    ----------
    at
        The cell at the fixed point.
    cell
        The cell as a function of the state, which may know how to restrict itself.
    samples
        Which rows belong together.
    options, work
        PETSc's options, with their prefix; counters.
    history
        What the forward solve learned, if it was kept.
    solves
        How many solves are to be expected.
    iterations
        How many iterations each would take.

    Attributes
    ----------
    loosened
        A relative tolerance that suffices, where it is above that of the options.
    """

    def __init__(
        self,
        at: Linearisation,
        cell: Callable[[Tensor], Tensor],
        samples: Samples,
        options: Options,
        work: Work,
        history: History | None = None,
        *,
        solves: int = 1,
        iterations: float = 0.0,
    ) -> None:
        self.at = at
        self.samples = samples
        self.options = options
        self.work = work
        self.outcome: LinearSolution | None = None
        self.method = ""
        self.solves, self._iterations = max(solves, 1), iterations
        self._solver: tuple[str, PETSc.KSP] | None = None
        self._problem = LinearProblem(at, cell, samples, work, history)
        self.loosened = 0.0
        self._kind, self._pc = options.chosen("ksp_type"), options.chosen("pc_type")

    def solve(self, g: Tensor, *, transpose: bool, guess: Tensor | None = None) -> Tensor:
        """Return A⁻¹ g, or A⁻ᵀ g, in the shape of the state.

        Parameters
        ----------
        g
            Right-hand side.
        transpose
            Which of the two.
        guess
            Initial guess, for the types that take one.

        Raises
        ------
        ConvergenceError
            The solve failed, or its true residual says that it did.
        """
        if not transpose:
            refuse_inexact(self._kind, "a tangent")
        norm = self.samples.norms(g).double()
        if not bool(norm.any()):
            done = SolveRecord("KSP", "none", self.options.prefix, "CONVERGED_ATOL", True, 0, 0.0)
            self.outcome = LinearSolution(done.reason, 0, norm.cpu(), norm.cpu(), done)
            return torch.zeros_like(g)
        if self._solver is None:
            self._solver = self._choose()
        kind, ksp = self._solver
        self._problem.residual, self._problem.guess = None, guess
        b = PETSc.Vec().createSeq(g.numel(), comm=PETSc.COMM_SELF)
        x = b.duplicate()
        tensors = ksp.getType() == PETSc.KSP.Type.PYTHON and isinstance(ksp.getPythonContext(), TensorSolver)
        self._problem.right = g if tensors else None
        try:
            if not tensors:
                copy_to_vector(g, b)
            elif bool(norm.isfinite().all()):
                b.set(1.0)  # PETSc looks at it before it hands over
            with self.options.inserted():
                record = run_ksp(ksp, b, x, transpose=transpose)
            answer = self._problem.answer if tensors else copy_from_vector(x, g)
        finally:
            b.destroy()
            x.destroy()
        assert answer is not None
        if kind in INEXACT:
            unknown = torch.full_like(norm, float("nan")).cpu()
            self.outcome = LinearSolution(f"INEXACT_{kind.upper()}", record.iterations, unknown, norm.cpu(), record)
            return answer
        try:
            self._judge(ksp, record, answer, g, norm, transpose=transpose)
        except ConvergenceError:
            if kind != DIRECT or self._kind is not None:
                raise
            # Not blocks after all, where samples depend on each other.
            self._solver = "gmres", self._make("gmres", None)
            self.method = "gmres: the dense blocks of the samples do not solve the system"
            return self.solve(g, transpose=transpose, guess=guess)
        return answer

    def _judge(
        self, ksp: PETSc.KSP, record: SolveRecord, answer: Tensor, g: Tensor, norm: Tensor, *, transpose: bool
    ) -> None:
        rtol, atol = ksp.getTolerances()[:2]
        residual = self._problem.residual  # a per-sample type has it from a product at its answer
        if residual is None:
            context = ResolventMatrix(self.at, self.samples, self.work)
            residual = self.samples.norms(g - context.apply(answer, transpose=transpose)).double()
        self.outcome = LinearSolution(record.reason, record.iterations, residual.cpu(), norm.cpu(), record)
        total, bound = float(residual.norm()), SLACK * max(rtol * float(norm.norm()), atol)
        if not record.converged or not total <= bound:
            name = "adjoint" if transpose else "tangent"
            raise ConvergenceError(
                f"{name} system of the fixed point not solved by {record.solver}: {record.reason} after"
                f" {record.iterations} iterations, true residual {total:.3g}"
                f" where the right-hand side has {float(norm.norm()):.3g}.\n"
                f"Likely fix: {record.remedy()}.\n"
                f"History: add -{record.prefix}ksp_monitor_true_residual -{record.prefix}ksp_converged_reason.",
                record=self.outcome,
            )

    def _choose(self) -> tuple[str, PETSc.KSP]:
        if self._kind is not None or self._pc is not None:
            kind = self._kind or ("preonly" if self._pc == DIRECT else "gmres")
            self.method = f"{kind} with preconditioner {self._pc or 'none'}, as the options say"
            return kind, self._make(kind, self._pc)
        count = self.samples.count
        size = self.at.z.numel() // max(count, 1)
        needed = 2 * count * size**2 * self.at.z.element_size()
        direct = assembly_cost(size) + self.solves * substitution_cost(size)
        # Digits cost iterations: a loosened tolerance takes as much fewer as it asks for fewer digits.
        digits = math.log(max(self.loosened, 1e-16)) / math.log(USUAL) if self.loosened else 1.0
        iterations = max(self._iterations, ITERATIONS * min(1.0, digits))
        iterative = self.solves * iterations * PRODUCT
        expected = f"{self.solves} solves of {iterations:.0f} iterations"
        if self.samples.index is None and needed <= DENSE_BYTES and direct <= iterative:
            self.method = (
                f"dense LU factors: {size} numbers a sample, {expected} expected; -deq_ksp_type {ITERATIVE} iterates"
            )
            return DIRECT, self._make(DIRECT, None)
        why = f"{expected} expected" if needed <= DENSE_BYTES else f"factors would take {needed / 2**30:.1f} GiB"
        if self.samples.index is not None:
            why = "samples of several rows"
        self.method = f"per-sample Anderson mixing: {size} numbers a sample, {why}"
        return ITERATIVE, self._make(ITERATIVE, None)

    def _make(self, kind: str, pc: str | None) -> PETSc.KSP:
        # The matrix holds the linearisation, not this object: PETSc's references are invisible to Python's garbage
        # collector, and a cycle through them would never be freed.
        matrix = resolvent_matrix(ResolventMatrix(self.at, self.samples, self.work, self._problem.history))
        ksp = PETSc.KSP().create(comm=PETSc.COMM_SELF)
        ksp.setOptionsPrefix(self.options.prefix)
        ksp.setOperators(matrix)
        set_type(ksp, "ksp_type", kind)
        if kind == PETSc.KSP.Type.GMRES:
            ksp.setGMRESRestart(GMRES_RESTART)
        set_type(ksp.getPC(), "pc_type", pc or PETSc.PC.Type.NONE)
        rtol = TOLERANCES.get(self.at.z.dtype, TOLERANCES[torch.float32])[0]
        ksp.setTolerances(rtol=rtol, atol=1e-50, max_it=MAX_ITERATIONS)
        ksp.setAppCtx(self._problem)
        with self.options.inserted():
            reraise(ksp.setFromOptions)
        ksp.setTolerances(rtol=max(ksp.getTolerances()[0], self.loosened))
        return ksp
