"""Vectors that look random and depend on a seed and on positions inside a sample alone.

Neither the rest of the batch, nor the device, nor what was drawn before changes them: what is estimated with them is a
function of the sample, as everything in hpcdeq, and the same on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcdeq.deq.samples import Samples

LOW_32 = 0xFFFFFFFF


def entry_counts(z: Tensor, samples: Samples) -> Tensor:
    """Return the numbers of entries of each sample of a state, ``(B,)``. Not collective."""
    rows = samples.rows(z)
    ones = torch.ones(len(rows), dtype=torch.int64, device=z.device)
    return samples.total(ones) * rows.shape[1]


def positions(z: Tensor, samples: Samples) -> Tensor:
    """Return the position of each entry of a state within its sample, ``(rows, d)`` whole numbers. Not collective."""
    rows = samples.rows(z)
    columns = torch.arange(rows.shape[1], device=z.device)
    if samples.index is None:
        return columns.expand(rows.shape)
    # The rank of each row among the rows of its sample, which need not lie next to each other.
    order = torch.argsort(samples.index, stable=True)
    lengths = torch.bincount(samples.index, minlength=samples.count)
    first = torch.cumsum(lengths, 0) - lengths
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(rows), device=z.device) - first.index_select(0, samples.index[order])
    return rank[:, None] * rows.shape[1] + columns


def uniform(at: Tensor, seed: int, number: int = 0) -> Tensor:
    """Return a number between -1 and 1 for each position, in float64; arguments as in `signs`. Not collective."""
    return (_hashes(at, seed, number).double() + 0.5) / 2.0**31 - 1.0


def signs(at: Tensor, seed: int, number: int = 0) -> Tensor:
    """Return +1 or -1 for each position, in float64.

    Not collective.

    Parameters
    ----------
    at
        Positions, of any shape.
    seed, number
        Name the vector; those of other seeds or other numbers are as good as independent.
    """
    return 1.0 - 2.0 * (_hashes(at, seed, number) >> 31).double()


def _hashes(at: Tensor, seed: int, number: int) -> Tensor:
    key = _mixed(torch.tensor(seed & LOW_32, device=at.device))
    key = _mixed((key + number) & LOW_32)
    return _mixed((at + key) & LOW_32)


def _mixed(x: Tensor) -> Tensor:
    """Return 32 well-mixed bits of each of 32 bits (``lowbias32`` of C. Wellons' hash prospector).

    The products wrap around at 64 bits, which leaves their lower halves as they should be.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW_32
    return x ^ (x >> 16)
