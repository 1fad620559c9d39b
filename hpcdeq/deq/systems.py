"""What a KSP of this package's own is told of a tangent or adjoint system, and how it answers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hpcdeq.deq.history import History
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.samples import Samples
from hpcdeq.deq.work import Work
from hpcdeq.errors import OptionError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.vectors import copy_from_vector, copy_to_vector


class LinearProblem:
    """What a per-sample KSP is told through its application context.

    Parameters
    ----------
    at
        The cell at the fixed point.
    cell
        The cell as a function of the state, which may know how to restrict itself; see `BoundCell`.
    samples
        Which rows belong together.
    work
        Counters to add to.
    history
        What the forward solve learned, if it was kept.

    Attributes
    ----------
    right, answer
        Of the present solve, where the vectors do not hold them: both stay on their device then.
    guess
        Where the next solve begins.
    residual
        ``(B,)`` true residual norms, after a solve by a per-sample type.
    kept
        Histories by transposition, for right-hand sides to come.
    """

    def __init__(
        self,
        at: Linearisation,
        cell: Callable[[Tensor], Tensor],
        samples: Samples,
        work: Work,
        history: History | None = None,
    ) -> None:
        self.history = history
        self.at = at
        self.cell = cell
        self.samples = samples
        self.work = work
        self.right: Tensor | None = None
        self.answer: Tensor | None = None
        self.residual: Tensor | None = None
        self.guess: Tensor | None = None
        self.kept: dict[bool, History] = {}


class TensorSolver:
    """Context of a KSP of python type that works on the tensors of a `LinearProblem`, its application context.

    Not collective, every method.
    """

    def setFromOptions(self, ksp: PETSc.KSP) -> None:  # noqa: N802 (petsc4py's name)
        """Read what can be set."""

    def solve(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """Solve with I - J."""
        self._solve(ksp, b, x, transpose=False)

    def solveTranspose(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:  # noqa: N802 (petsc4py's name)
        """Solve with the transpose."""
        self._solve(ksp, b, x, transpose=True)

    def answer(self, ksp: PETSc.KSP, problem: LinearProblem, right: Tensor, *, transpose: bool) -> Tensor:
        """Return the answer in any shape, and set the KSP's reason."""
        raise NotImplementedError

    def _solve(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec, *, transpose: bool) -> None:
        problem = ksp.getAppCtx()
        if not isinstance(problem, LinearProblem):
            raise OptionError(
                f"-{ksp.getOptionsPrefix() or ''}ksp_type {ksp.getPythonType()} is for the tangent and adjoint systems of a"
                " fixed point; inside other solvers choose gmres"
            )
        right = copy_from_vector(b, problem.at.z) if problem.right is None else problem.right
        answer = self.answer(ksp, problem, right, transpose=transpose)
        if problem.right is None:
            copy_to_vector(answer, x)
        else:
            problem.answer = answer.reshape(right.shape)
