"""A preconditioner for large states out of what the forward solve learned: ``-pc_type secant``."""

from __future__ import annotations

from hpcdeq.deq.resolvent import ResolventMatrix
from hpcdeq.errors import OptionError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.vectors import copy_to_vector, shaped_read


class SecantPreconditioner:
    """Context of a PC of python type: ``-pc_type secant``, y = H x of `History.inverse_product`. Not collective.

    It costs two passes over the history of the forward solve (``-snes_anderson_m`` differences) and no product.
    """

    _context: ResolventMatrix | None = None

    def setUp(self, pc: PETSc.PC) -> None:  # noqa: N802 (petsc4py's name)
        """Take the history from the matrix."""
        context = pc.getOperators()[1].getPythonContext()
        if not isinstance(context, ResolventMatrix) or context.history is None:
            raise OptionError(
                f"-{pc.getOptionsPrefix() or ''}pc_type secant needs the history of a forward solve by batched_anderson with"
                " a window: leave -deq_snes_type and -deq_snes_anderson_m as they are, or choose another -deq_pc_type"
            )
        self._context = context

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y = H x."""
        self._product(x, y, transpose=False)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:  # noqa: N802 (petsc4py's name)
        """Set y = Hᵀ x."""
        self._product(x, y, transpose=True)

    def _product(self, x: PETSc.Vec, y: PETSc.Vec, *, transpose: bool) -> None:
        context = self._context
        assert context is not None and context.history is not None
        with shaped_read(x, context.at.z) as v:
            copy_to_vector(context.history.inverse_product(context.samples.rows(v), transpose=transpose), y)
