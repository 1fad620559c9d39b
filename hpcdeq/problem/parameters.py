"""The weights of a model as one flat vector, of which every rank owns a block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.errors import ShapeError, UsageError
from hpcdeq.problem.phases import REDUCTION, Phases


class ParameterLayout:
    """How named parameters, the flat vector and the ranks' blocks of it correspond.

    Collective on comm.

    Parameters
    ----------
    model
        Its trainable floating-point parameters, in the order of ``named_parameters()``.
    comm
        The communicator that the vector is distributed over.
    phases
        Where the time of gathering and scattering is counted.

    Attributes
    ----------
    count
        n, the number of weights.
    block_sizes
        Number of weights that each rank owns; they differ by one at most.
    owned
        This rank's block as a slice.
    """

    def __init__(self, model: nn.Module, comm: parallel.Comm, phases: Phases | None = None) -> None:
        self.comm = comm
        self.phases = phases or Phases()
        chosen = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
        if not chosen:
            raise UsageError("the model has no trainable parameters")
        self.names = [name for name, _ in chosen]
        self.shapes = [p.shape for _, p in chosen]
        self.dtype = chosen[0][1].dtype
        self.device = chosen[0][1].device
        self.lengths = [p.numel() for _, p in chosen]
        self.count = sum(self.lengths)
        slices = [parallel.own_slice(self.count, rank, comm.size) for rank in range(comm.size)]
        self.block_sizes = [s.stop - s.start for s in slices]
        self.owned = slices[comm.rank]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return parameter-shaped tensors as one ``(n,)`` vector; None counts as zeros. Not collective."""
        return torch.cat(
            [
                torch.zeros(n, dtype=self.dtype, device=self.device) if t is None else t.detach().reshape(-1)
                for t, n in zip(tensors, self.lengths, strict=True)
            ]
        )

    def unflatten(self, p: Tensor) -> list[Tensor]:
        """Return the ``(n,)`` vector in pieces of the parameters' shapes, dtype and device. Not collective.

        Raises
        ------
        ShapeError
            p does not have n numbers.
        """
        if p.shape != (self.count,):
            raise ShapeError(f"the parameter vector has shape {tuple(p.shape)}, the model has ({self.count},) weights")
        p = p.detach().to(dtype=self.dtype, device=self.device)
        return [piece.reshape(shape) for piece, shape in zip(p.split(self.lengths), self.shapes, strict=True)]

    def initial(self, model: nn.Module) -> Tensor:
        """Return the model's present weights, rank 0's on every rank. Collective on comm."""
        own = self.flatten([p for name, p in model.named_parameters() if name in set(self.names)])
        return torch.from_numpy(parallel.from_root(self.comm, own.cpu().numpy())).to(self.device)

    def load(self, model: nn.Module, p: Tensor) -> None:
        """Set the model's weights to p. Not collective."""
        pieces = dict(zip(self.names, self.unflatten(p), strict=True))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in pieces:
                    parameter.copy_(pieces[name])

    def block(self, p: Tensor) -> np.ndarray:
        """Return this rank's block of a vector that all ranks have, float64. Not collective."""
        return p[self.owned].double().cpu().numpy()

    def gather(self, block: np.ndarray) -> Tensor:
        """Return the whole vector from every rank's block, ``(n,)`` of the blocks' type on every rank. Collective on comm."""
        with self.phases.of(REDUCTION):
            whole = np.empty(self.count, block.dtype)
            return torch.from_numpy(parallel.gather_blocks(self.comm, block, self.block_sizes, whole))

    def scatter_mean(self, contribution: Tensor, count: int) -> np.ndarray:
        """Return this rank's block of the sum of every rank's contribution over a number. Collective on comm."""
        with self.phases.of(REDUCTION):
            own = contribution.double().cpu().numpy()
            if self.comm.size > 1:
                own = parallel.sum_and_scatter(self.comm, own, self.block_sizes)
            return own / count

    def scatter_sum(self, contribution: Tensor) -> np.ndarray:
        """Return this rank's block of the sum of every rank's ``(n,)`` contribution. Collective on comm."""
        with self.phases.of(REDUCTION):
            return parallel.sum_and_scatter(self.comm, contribution.double().cpu().numpy(), self.block_sizes)
