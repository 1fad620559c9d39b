"""Which numbers of a state belong to which sample, and the cell on the samples that are still at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcdeq.deq.work import Work
from hpcdeq.errors import ShapeError


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

    def rows(self, z: Tensor) -> Tensor:
        """Return a state as a matrix ``(rows, d)``; without an index there is one row a sample. Not collective."""
        if z.dim() > 1:
            return z.flatten(1)
        return z.reshape(1, -1) if self.index is None else z[:, None]

    def total(self, values: Tensor) -> Tensor:
        """Return the sums over each sample of values ``(rows, ...)`` given by row, ``(B, ...)``. Not collective."""
        if self.index is None:
            return values
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.index, values)

    def spread(self, values: Tensor) -> Tensor:
        """Return values ``(B, ...)`` given by sample as values by row, ``(rows, ...)``. Not collective."""
        return values if self.index is None else values.index_select(0, self.index)

    def norms(self, z: Tensor) -> Tensor:
        """Return the 2-norm of each sample, ``(B,)`` in the precision of the state. Not collective."""
        norms = torch.linalg.vector_norm(self.rows(z), dim=1)
        return norms if self.index is None else self.total(norms.square_()).sqrt_()

    def rows_of(self, keep: Tensor) -> tuple[Tensor, Samples]:
        """Return the numbers of the rows that belong to some samples, and those samples on their own.

        Not collective.

        Parameters
        ----------
        keep
            ``(k,)`` increasing sample numbers; sample keep[i] becomes sample i.
        """
        if self.index is None:
            return keep, Samples(len(keep))
        place = torch.full((self.count,), -1, dtype=torch.int64, device=keep.device)
        place[keep] = torch.arange(len(keep), device=keep.device)
        new = place.index_select(0, self.index)
        rows = (new >= 0).nonzero().squeeze(1)
        return rows, Samples(len(keep), new.index_select(0, rows))


class SampleMap:
    """The cell as a map of the state of some samples, counting how many it evaluates.

    Parameters
    ----------
    function
        ``function(z) -> f(z)`` on a state of these samples; it may have a method
        ``restrict(keep, rows, count, z)`` that returns the same function for fewer samples, or None.
    samples
        Which rows belong together.
    work
        Counters of products, for solvers that differentiate the function.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], samples: Samples, work: Work | None = None) -> None:
        self.function = function
        self.samples = samples
        self.work = Work() if work is None else work
        self.evaluated = 0

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z) in the shape of z. Not collective."""
        with torch.no_grad():
            image = self.function(z)
        if image.shape != z.shape:
            raise ShapeError(f"the cell maps a state of shape {tuple(z.shape)} to shape {tuple(image.shape)}")
        self.evaluated += self.samples.count
        return image

    def restrict(self, keep: Tensor, rows: Tensor, samples: Samples, z: Tensor) -> bool:
        """Go on with some of the samples only, and say whether that was possible.

        Not collective. It is not where the cell cannot tell what of its input belongs to whom; and whether its restriction
        is right is seen by evaluating both.

        Parameters
        ----------
        keep
            ``(k,)`` increasing sample numbers.
        rows, samples
            From `Samples.rows_of`.
        z
            The state of all samples so far.
        """
        restrict = getattr(self.function, "restrict", None)
        if restrict is None:
            return False
        with torch.no_grad():
            fewer = restrict(keep, rows, self.samples.count, z)
        if fewer is None:
            return False
        self.evaluated += getattr(fewer, "checked", 0)
        self.function, self.samples = fewer, samples
        return True
