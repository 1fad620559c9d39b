"""Which samples of a split each rank works on: contiguous shares of equal cost, not of equal number.

Crystals have from one to hundreds of atoms, and a gradient takes as long as the rank with the most edges. The cost of a
sample is known from the offsets of its graph, 16 bytes a sample, which rank 0 alone reads, a block of rows at a time: it
tells the others where shares begin, and each looks up its own rows in the blocks that they lie in. Nobody holds
anything of the size of the data set.

Shares are contiguous, so that a sample's number among all does not depend on the number of ranks, and that a rank reads
few stretches of a file.

What a sample is thought to cost may be wrong: fixed points of some take more iterations, a node is slower than the others. Once
ranks know how long they were busy, shares are cut again (`Shares.recut`).
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
from hpcdeq.errors import DataError

BLOCK = 1 << 18  # rows looked at together
# What the gradient of a graph costs, in units of one edge: measured for the default graph DEQ on graphs of 8 and 32 atoms
# with 4 to 24 neighbours, to within 6 % (`scripts/bench_shares.py --costs`).
SAMPLE_COST, NODE_COST, EDGE_COST = 32, 6, 1
# Of shares that are cut again: seconds become whole numbers of this sum, large beside the number of samples, small beside 2**63
# over the number of ranks; and a rank that was busy for less than this part of the mean counts as if it was for so long.
WHOLE, LEAST = 1 << 44, 1e-3

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
    return Boundaries(numbers, share_costs(numbers, counts, totals, costs_of))


def share_costs(numbers: np.ndarray, counts: np.ndarray, totals: np.ndarray, costs_of: CostsOf) -> np.ndarray:
    """Return the cost of each share, ``(ranks,)`` int64. Not collective.

    Parameters
    ----------
    numbers
        As in `Boundaries`.
    counts, totals, costs_of
        As for `boundaries`.
    """
    starts, before = (np.concatenate([[0], np.cumsum(values)]) for values in (counts, totals))
    reached = np.zeros(len(numbers), np.int64)
    homes = np.searchsorted(starts[1:], numbers)
    for block in np.unique(homes[numbers > 0]):
        here = np.flatnonzero((homes == block) & (numbers > 0))
        sums = np.concatenate([[0], np.cumsum(costs_of(int(block)))])
        reached[here] = before[block] + sums[numbers[here] - starts[block]]
    return np.diff(reached)


@dataclass(frozen=True)
class Recut:
    """Shares that were cut again.

    Attributes
    ----------
    boundaries
        Where they begin; their costs are those of `sample_costs`, as before.
    foretold
        The largest time of a rank over their mean, if every sample goes on to take as long as it took.
    """

    boundaries: Boundaries
    foretold: float


def recut(now: Boundaries, seconds: np.ndarray, counts: np.ndarray, totals: np.ndarray, costs_of: CostsOf) -> Recut:
    """Cut samples anew, into contiguous shares that take nearly equal time.

    Not collective. Within a share time is taken to follow the cost, so that a sample takes its cost times its rank's seconds
    over the cost of that rank's share.

    Parameters
    ----------
    now
        The present shares.
    seconds
        ``(ranks,)`` time that each rank was busy with its share; not all zero.
    counts, totals, costs_of
        As for `boundaries`; here every block is asked for.
    """
    spent = np.maximum(seconds, LEAST * seconds.mean())
    rates = np.divide(spent * (WHOLE / spent.sum()), now.costs, out=np.ones(len(spent)), where=now.costs > 0)
    starts = np.concatenate([[0], np.cumsum(counts)])

    def times_of(block: int) -> np.ndarray:
        costs = costs_of(block)
        share = np.searchsorted(now.numbers, starts[block] + np.arange(len(costs)), side="right") - 1
        return np.maximum(np.rint(costs * rates[share]), 1).astype(np.int64)

    times = np.array([times_of(block).sum() for block in range(len(counts))], np.int64)
    cut = boundaries(counts, times, times_of, len(spent))
    return Recut(Boundaries(cut.numbers, share_costs(cut.numbers, counts, totals, costs_of)), cut.imbalance)


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
        `Boundaries` by the number of the split, by cost alone.

    Raises
    ------
    DataError
        The files are missing, damaged or unfit; on all ranks.
    """

    def __init__(self, path: Path, comm: parallel.Comm) -> None:
        def census() -> tuple[Shards, np.ndarray, np.ndarray, np.ndarray, list[Boundaries]]:
            shards = Shards(path)
            firsts = first_rows(shards)
            look = _looking(shards, firsts)
            counts = np.zeros((len(SPLITS), len(firsts) - 1), np.int64)
            totals = np.zeros_like(counts)
            for block in range(len(firsts) - 1):
                splits, costs = look(block)
                for split in range(len(SPLITS)):
                    own = splits == split
                    counts[split, block], totals[split, block] = own.sum(), costs[own].sum()

            def of(split: int) -> Boundaries:
                return boundaries(counts[split], totals[split], _costs_in(look, split), comm.size)

            return shards, firsts, counts, totals, [of(split) for split in range(len(SPLITS))]

        self.shards, self._firsts, self._counts, self._totals, self.of = parallel.only_root(comm, census)
        self.path = path
        self._comm = comm

    def recut(self, split: int, now: Boundaries, seconds: np.ndarray) -> Recut:
        """Return shares of a split that take nearly equal time; see `recut`.

        Collective on comm: rank 0 looks at all offsets again, and tells the others.

        Parameters
        ----------
        split
            Its number.
        now
            Its present shares.
        seconds
            ``(ranks,)`` time that each rank was busy with its own.
        """
        counts, totals = self._counts[split], self._totals[split]
        return parallel.only_root(self._comm, lambda: recut(now, seconds, counts, totals, self._costs_of(split)))

    def at(self, split: int, numbers: np.ndarray) -> Boundaries:
        """Return the shares of a split that begin at given samples.

        Collective on comm.

        Parameters
        ----------
        numbers
            As in `Boundaries`.

        Raises
        ------
        DataError
            They are no shares of as many samples over as many ranks.
        """
        counts, totals = self._counts[split], self._totals[split]
        count, ranks = int(counts.sum()), self._comm.size
        whole = len(numbers) == ranks + 1 and numbers[0] == 0 and numbers[-1] == count
        if not (whole and bool((np.diff(numbers) >= 0).all())):
            raise DataError(
                f"{self.path}: {count} samples over {ranks} ranks have no shares that begin at {numbers.tolist()}",
                agreed=True,
            )
        costs = parallel.only_root(self._comm, lambda: share_costs(numbers, counts, totals, self._costs_of(split)))
        return Boundaries(numbers, costs)

    def own(self, boundaries: Boundaries) -> slice:
        """Return the numbers of this rank's samples among those of a split. Not collective."""
        rank = self._comm.rank
        return slice(int(boundaries.numbers[rank]), int(boundaries.numbers[rank + 1]))

    def rows(self, split: int, boundaries: Boundaries) -> np.ndarray:
        """Return the rows of this rank's samples of a split, increasing.

        Not collective. Reads the splits of the blocks that they lie in.
        """
        own = self.own(boundaries)
        starts = np.concatenate([[0], np.cumsum(self._counts[split])])
        found = [np.zeros(0, np.int64)]
        for block in np.flatnonzero((starts[:-1] < own.stop) & (starts[1:] > own.start)):
            first, last = self._firsts[block : block + 2]
            rows = first + np.flatnonzero(self.shards.splits_of(first, last) == split)
            found.append(rows[max(own.start - starts[block], 0) : own.stop - starts[block]])
        return np.concatenate(found)

    def _costs_of(self, split: int) -> CostsOf:
        return _costs_in(_looking(self.shards, self._firsts), split)


def first_rows(shards: Shards) -> np.ndarray:
    """Return the first row of every block, and the number of rows: blocks end with their file. Not collective."""
    edges = [np.arange(start, stop, BLOCK) for start, stop in zip(shards.starts, shards.starts[1:], strict=False)]
    return np.concatenate([*edges, shards.starts[-1:]])


Look = Callable[[int], tuple[np.ndarray, np.ndarray]]


def _looking(shards: Shards, firsts: np.ndarray) -> Look:
    """Return what gives splits and costs of a block; it remembers the last."""
    return lru_cache(maxsize=1)(lambda block: _look(shards, int(firsts[block]), int(firsts[block + 1])))


def _costs_in(look: Look, split: int) -> CostsOf:
    def costs_of(block: int) -> np.ndarray:
        splits, costs = look(block)
        return costs[splits == split]

    return costs_of


def _look(shards: Shards, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return splits and costs of the rows ``first`` to ``last - 1``, which are in one file."""
    splits = shards.splits_of(first, last)
    if shards.schema.representation == "array":
        return splits, np.ones(len(splits), np.int64)
    return splits, sample_costs(*shards.sizes_of(first, last))
