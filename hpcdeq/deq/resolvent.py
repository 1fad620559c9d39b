"""The operator I - J of a linearised cell: products, and the dense blocks of its samples."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcdeq.deq.history import History
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.samples import Samples
from hpcdeq.deq.work import Work
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.operators import ProductMatrix
from hpcdeq.petsc.vectors import copy_to_vector, shaped_read

# Rows of the Jacobian that one vectorised product computes: as many as fit into so much memory.
ASSEMBLY_BYTES = 2**26


class ResolventMatrix(ProductMatrix):
    """Context of the PETSc matrix I - J. Not collective, every method.

    Parameters
    ----------
    at
        The cell at the state.
    samples
        Which rows belong together.
    work
        Counters to add to.
    history
        What the forward solve learned of the matrix near the fixed point.
    """

    def __init__(self, at: Linearisation, samples: Samples, work: Work, history: History | None = None) -> None:
        super().__init__(self._product, self._transpose_product)
        self.at = at
        self.samples = samples
        self.work = work
        self.history = history

    def apply(self, v: Tensor, *, transpose: bool) -> Tensor:
        """Return (I - J) v, or (I - J)ᵀ v, in the shape of the state."""
        if transpose:
            self.work.cell_vjps += self.samples.count
            return v - self.at.vjp(v)
        self.work.cell_jvps += self.samples.count
        return v - self.at.jvp(v)

    def dense(self) -> Tensor:
        """Return the blocks I - J_i, ``(B, d, d)``; every sample has one row of the state."""
        at, count = self.at, self.samples.count
        size = at.z.numel() // max(count, 1)
        rows = max(1, ASSEMBLY_BYTES // max(1, at.z.numel() * at.z.element_size()))
        blocks = torch.empty(count, size, size, dtype=at.z.dtype, device=at.z.device)
        for start in range(0, size, rows):
            stop = min(start + rows, size)
            basis = torch.zeros(stop - start, count, size, dtype=at.z.dtype, device=at.z.device)
            basis[torch.arange(stop - start), :, torch.arange(start, stop)] = 1.0
            part = at.vjps(basis.reshape(stop - start, *at.z.shape))
            torch.neg(part.reshape(stop - start, count, size).transpose(0, 1), out=blocks[:, start:stop])
        self.work.cell_vjps += size * count
        blocks.diagonal(dim1=1, dim2=2).add_(1.0)
        return blocks

    def _product(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        with shaped_read(x, self.at.z) as v:
            copy_to_vector(self.apply(v, transpose=False), y)

    def _transpose_product(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        with shaped_read(x, self.at.z) as v:
            copy_to_vector(self.apply(v, transpose=True), y)


def resolvent_matrix(context: ResolventMatrix) -> PETSc.Mat:
    """Return I - J as a PETSc matrix of python type on this process. Not collective."""
    n = context.at.z.numel()
    matrix = PETSc.Mat().createPython(((n, n), (n, n)), comm=PETSc.COMM_SELF)
    matrix.setPythonContext(context)
    matrix.setUp()
    return matrix
