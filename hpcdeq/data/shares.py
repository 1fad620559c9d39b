"""Which samples of a split each rank works on: contiguous shares of equal cost, not of equal number.

Crystals have from one to hundreds of atoms, and a gradient takes as long as the rank with the most edges. The cost of a
sample is known from the offsets of its graph, 16 bytes a sample, which rank 0 alone reads, a block of rows at a time: it
tells the others where shares begin, and each looks up its own rows in the blocks that they lie in. Nobody holds
anything of the size of the data set.

Shares are contiguous, so that a sample's number among all does not depend on the number of ranks, and that a rank reads
few stretches of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from hpcdeq import parallel
from hpcdeq.data.schema import SPLITS
from hpcdeq.data.shards import Shards

BLOCK = 1 << 18  # rows looked at together
# What the gradient of a graph costs, in units of one edge: measured for the default graph DEQ on graphs of 8 and 32 atoms
# with 4 to 24 neighbours, to within 6 % (`scripts/bench_shares.py --costs`).
SAMPLE_COST, NODE_COST, EDGE_COST = 32, 6, 1

CostsOf = Callable[[int], np.ndarray]  # of the samples in a block, by its number


def sample_costs(nodes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return what each graph costs, in units of one edge, ``(b,)`` int64. Not collective."""
    return SAMPLE_COST + NODE_COST * nodes.astype(np.int64) + EDGE_COST * edges.astype(np.int64)


@dataclass(frozen=True)
class Boundaries:
    """Where the shares of a split begin.

    Attributes
    ----------
    numbers
        ``(ranks + 1,)``: rank ``r`` has the samples ``numbers[r]`` to ``numbers[r + 1] - 1`` of the split.
    costs
        ``(ranks,)`` cost of each share.
    """

    numbers: np.ndarray
    costs: np.ndarray

    @property
    def imbalance(self) -> float:
        """The largest cost of a share over their mean; 1 where there is nothing to do."""
        mean = float(self.costs.mean())
        return float(self.costs.max()) / mean if mean else 1.0


def boundaries(counts: np.ndarray, totals: np.ndarray, costs_of: CostsOf, ranks: int) -> Boundaries:
    """Cut samples into contiguous shares of nearly equal cost.

    Not collective. Each boundary is the one nearest to its part of the whole cost: no share is farther from the mean than
    the cost of the samples at its ends. Where there are enough samples, every rank has one at least.

    Parameters
    ----------
    counts, totals
        ``(blocks,)`` number of the samples in each block, and their cost, both int64.
    costs_of
        Gives ``(counts[k],)`` costs of the samples in block ``k``. It is asked for blocks that shares begin in alone.
    ranks
        Number of shares.
    """
    starts, before = (np.concatenate([[0], np.cumsum(values)]) for values in (counts, totals))
    count, order = int(starts[-1]), np.arange(ranks + 1)
    if count < ranks:
        numbers = count * order // ranks
    else:
        wanted = int(before[-1]) * order[1:-1] // ranks
        numbers = np.concatenate([[0], np.zeros(ranks - 1, np.int64), [count]])
        homes = np.searchsorted(before[1:], wanted)
        for block in np.unique(homes):
            here = np.flatnonzero(homes == block)
            reached = before[block] + np.concatenate([[0], np.cumsum(costs_of(int(block)))])
            after = np.searchsorted(reached, wanted[here]).clip(1)
            nearer = reached[after] - wanted[here] < wanted[here] - reached[after - 1]
            numbers[here + 1] = starts[block] + after - 1 + nearer
        numbers = np.maximum.accumulate(numbers - order) + order
        numbers = np.minimum(numbers, count - ranks + order)
        numbers[0] = 0
    reached = np.zeros(ranks + 1, np.int64)
    homes = np.searchsorted(starts[1:], numbers)
    for block in np.unique(homes[numbers > 0]):
        here = np.flatnonzero((homes == block) & (numbers > 0))
        sums = np.concatenate([[0], np.cumsum(costs_of(int(block)))])
        reached[here] = before[block] + sums[numbers[here] - starts[block]]
    return Boundaries(numbers, np.diff(reached))


class Shares:
    """The shares of all ranks in the splits of a dataset.

    Collective on comm: rank 0 reads headers, splits and offsets, and tells the others.

    Parameters
    ----------
    path
        A dataset file, or a folder of parts.
    comm
        Whose ranks share the samples.

    Attributes
    ----------
    path, shards
        Where they are, and the files.
    of
        `Boundaries` by the number of the split.

    Raises
    ------
    DataError
        The files are missing, damaged or unfit; on all ranks.
    """

    def __init__(self, path: Path, comm: parallel.Comm) -> None:
        def census() -> tuple[Shards, np.ndarray, np.ndarray, list[Boundaries]]:
            shards = Shards(path)
            firsts = first_rows(shards)
            look = lru_cache(maxsize=1)(lambda block: _look(shards, int(firsts[block]), int(firsts[block + 1])))
            counts = np.zeros((len(SPLITS), len(firsts) - 1), np.int64)
            totals = np.zeros_like(counts)
            for block in range(len(firsts) - 1):
                splits, costs = look(block)
                for split in range(len(SPLITS)):
                    own = splits == split
                    counts[split, block], totals[split, block] = own.sum(), costs[own].sum()

            def of(split: int) -> Boundaries:
                def costs_of(block: int) -> np.ndarray:
                    splits, costs = look(block)
                    return costs[splits == split]

                return boundaries(counts[split], totals[split], costs_of, comm.size)

            return shards, firsts, counts, [of(split) for split in range(len(SPLITS))]

        self.shards, self._firsts, self._counts, self.of = parallel.only_root(comm, census)
        self.path = path
        self._rank = comm.rank

    def own(self, split: int) -> slice:
        """Return the numbers of this rank's samples among those of a split. Not collective."""
        numbers = self.of[split].numbers
        return slice(int(numbers[self._rank]), int(numbers[self._rank + 1]))

    def rows(self, split: int) -> np.ndarray:
        """Return the rows of this rank's samples of a split, increasing.

        Not collective. Reads the splits of the blocks that they lie in.
        """
        own = self.own(split)
        starts = np.concatenate([[0], np.cumsum(self._counts[split])])
        found = [np.zeros(0, np.int64)]
        for block in np.flatnonzero((starts[:-1] < own.stop) & (starts[1:] > own.start)):
            first, last = self._firsts[block : block + 2]
            rows = first + np.flatnonzero(self.shards.splits_of(first, last) == split)
            found.append(rows[max(own.start - starts[block], 0) : own.stop - starts[block]])
        return np.concatenate(found)


def first_rows(shards: Shards) -> np.ndarray:
    """Return the first row of every block, and the number of rows: blocks end with their file. Not collective."""
    edges = [np.arange(start, stop, BLOCK) for start, stop in zip(shards.starts, shards.starts[1:], strict=False)]
    return np.concatenate([*edges, shards.starts[-1:]])


def _look(shards: Shards, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return splits and costs of the rows ``first`` to ``last - 1``, which are in one file."""
    splits = shards.splits_of(first, last)
    if shards.schema.representation == "array":
        return splits, np.ones(len(splits), np.int64)
    return splits, sample_costs(*shards.sizes_of(first, last))
