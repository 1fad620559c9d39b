"""Direct solves where a sample's state is small: batched LU factors of I - J, as a PETSc preconditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcdeq.deq.resolvent import ResolventMatrix
from hpcdeq.deq.systems import LinearProblem, TensorSolver
from hpcdeq.errors import OptionError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.vectors import copy_to_vector, shaped_read


class Factors:
    """LU factors of square blocks.

    Not collective, every method.

    Parameters
    ----------
    blocks
        ``(B, d, d)``. A block without an inverse gives solutions that are not finite.
    """

    def __init__(self, blocks: Tensor) -> None:
        self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(blocks)

    def keep(self, keep: Tensor) -> None:
        """Go on with some of the blocks."""
        self._lu, self._pivots = self._lu.index_select(0, keep), self._pivots.index_select(0, keep)

    def solve(self, right: Tensor, *, transpose: bool) -> Tensor:
        """Return A⁻¹ b, or A⁻ᵀ b, for ``(B, d)`` right-hand sides."""
        return torch.linalg.lu_solve(self._lu, self._pivots, right[:, :, None], adjoint=transpose)[:, :, 0]


def refuse_ragged(context: object, option: str) -> None:
    """Refuse a matrix without blocks of one size.

    Not collective.

    Raises
    ------
    OptionError
        The matrix is none of a fixed point, or its samples have several rows each.
    """
    if not isinstance(context, ResolventMatrix) or context.samples.index is not None:
        raise OptionError(
            f"{option} needs a state with one row a sample: samples of several rows, such as graphs, have no dense blocks of"
            " one size; use -deq_ksp_type batched_anderson or gmres"
        )


class BatchedLU:
    """Context of a PC of python type: ``-pc_type batched_lu``. Not collective, every method.

    The matrix that the preconditioner is built from has to be a `ResolventMatrix` of samples of one row each.
    """

    factors: Factors | None = None
    _context: ResolventMatrix | None = None

    def setUp(self, pc: PETSc.PC) -> None:  # noqa: N802 (petsc4py's name)
        """Assemble and factor the blocks. PETSc calls it where the matrix has changed, less often if it lags."""
        context = pc.getOperators()[1].getPythonContext()
        refuse_ragged(context, f"-{pc.getOptionsPrefix() or ''}pc_type batched_lu")
        self._context = context
        self.factors = Factors(context.dense())

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y = A⁻¹ x."""
        self._solve(x, y, transpose=False)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:  # noqa: N802 (petsc4py's name)
        """Set y = A⁻ᵀ x."""
        self._solve(x, y, transpose=True)

    def _solve(self, x: PETSc.Vec, y: PETSc.Vec, *, transpose: bool) -> None:
        assert self.factors is not None and self._context is not None
        with shaped_read(x, self._context.at.z) as right:
            copy_to_vector(self.factors.solve(self._context.samples.rows(right), transpose=transpose), y)


class PerSampleLU(TensorSolver):
    """Context of a KSP of python type: ``-ksp_type batched_lu``, solves with the factors of I - J_i.

    Not collective, every method.
    """

    factors: Factors | None = None

    def answer(self, ksp: PETSc.KSP, problem: LinearProblem, right: Tensor, *, transpose: bool) -> Tensor:
        """Return the solution; the first solve assembles and factors the blocks."""
        if self.factors is None:
            context = ksp.getOperators()[0].getPythonContext()
            refuse_ragged(context, f"-{ksp.getOptionsPrefix() or ''}ksp_type batched_lu")
            self.factors = Factors(context.dense())
        ksp.setConvergedReason(PETSc.KSP.ConvergedReason.CONVERGED_ITS)
        return self.factors.solve(problem.samples.rows(right), transpose=transpose)
