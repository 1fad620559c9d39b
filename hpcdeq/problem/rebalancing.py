"""Shares of samples that are moved while a problem is minimised, where ranks turn out slower than their costs say.

Shares are cut by what samples cost beforehand (`hpcdeq.data.shares`). What they take is known later: fixed points of some
samples need more iterations than those of others, a node may be slow. Every so many iterations the ranks compare the time
that they were busy with their own samples; where the slowest holds up the others, boundaries are cut again by the time that was
taken. A slow node keeps samples that a fast one would be through with sooner than is foretold, so that further looks may
follow.

A sample's global number stays, and every sum over all samples is the same to rounding. A run then follows the clock: it
repeats itself to rounding, and not to the last bit. What ranks draw or average for themselves (dropout, running statistics of
batches) is of the samples that they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcdeq import parallel
from hpcdeq.data import Dataset
from hpcdeq.data.shares import Boundaries
from hpcdeq.errors import OptionError
from hpcdeq.problem.auxiliary import AuxiliarySource
from hpcdeq.problem.phases import SHARES
from hpcdeq.problem.training import TrainingProblem
from hpcdeq.state import Known

TOLERATED = 1.1  # largest time of a rank over the mean that is left as it is
WORTH = 0.02  # less than this off the imbalance is not worth reading samples for: one sample may be all that a rank has


@dataclass(frozen=True)
class Move:
    """Shares were moved.

    Attributes
    ----------
    before
        The largest busy time of a rank over their mean, as measured.
    foretold
        What it is to become.
    """

    before: float
    foretold: float

    def __str__(self) -> str:
        return f"shares moved: imbalance {self.before:.2f} before, about {self.foretold:.2f} foretold"


def rebalance(problem: TrainingProblem, seconds: float) -> Move | None:
    """Cut the shares of a problem's samples again by the time that they took, and move them.

    Collective on the problem's comm. Nothing is done where no rank was busy for more than 1.1 times the mean, or where no
    other boundaries are better: a single sample may hold up the others.

    Parameters
    ----------
    problem
        Between two evaluations; its samples are those of a `Dataset`.
    seconds
        How long this rank was busy with its present share.

    Returns
    -------
    move
        None where shares stay.

    Raises
    ------
    OptionError
        Its samples cannot be moved.
    DataError
        They cannot be read; on all ranks.
    """
    dataset = movable(problem)
    busy = np.array(parallel.of_all_ranks(problem.comm, seconds))
    if not busy.max() > TOLERATED * busy.mean():
        return None
    before = float(busy.max() / busy.mean())
    found = dataset.recut(busy)
    if found.foretold > before - WORTH:
        return None
    move_shares(problem, found.boundaries)
    return Move(before, found.foretold)


def movable(problem: TrainingProblem) -> Dataset:
    """Return the dataset that a problem's samples come from.

    Not collective.

    Raises
    ------
    OptionError
        They do not come from a file that other ranks could read them from.
    """
    dataset = _dataset(problem)
    if dataset is None:
        raise OptionError(
            "shares of samples cannot be moved where each rank was given its own as tensors: write a file, and give its Dataset,"
            " or leave the rebalancing out"
        )
    return dataset


def move_shares(problem: TrainingProblem, boundaries: Boundaries) -> None:
    """Let each rank work on its share of other boundaries.

    Collective on the problem's comm. Fixed points of samples that stay on their rank go on from the last ones, those of others
    begin cold; linearised chunks are forgotten.

    Raises
    ------
    DataError
        The samples cannot be read; on all ranks, and all keep those that they had.
    """
    dataset, before = movable(problem), problem.dataset.offset
    problem.forget()  # makes room
    dataset.move(boundaries)
    if isinstance(problem.dataset, AuxiliarySource):
        problem.dataset.follow()
    problem.local.network.offset = dataset.offset
    problem.guidance.move(dataset.offset - before, len(dataset))


def moved_boundaries(problem: TrainingProblem) -> np.ndarray | None:
    """Return where shares begin, ``(ranks + 1,)``; None where they are those by cost. Not collective."""
    dataset = _dataset(problem)
    return dataset.boundaries.numbers if dataset is not None and dataset.moved else None


def _dataset(problem: TrainingProblem) -> Dataset | None:
    source = problem.dataset
    if isinstance(source, AuxiliarySource) and source.again is not None:
        source = source.source
    return source if isinstance(source, Dataset) else None


class Rebalancing:
    """Looks at a minimisation every so many iterations, and moves shares where that helps.

    Collective on the problem's comm, every method.

    Parameters
    ----------
    problem
        What is minimised; its samples are those of a `Dataset`.
    every
        Iterations (of minibatch methods, epochs) between two looks.
    told
        Is given every move; default: it is told to nobody.
    bounded
        Whether the chunk size was chosen to bound the memory. Then it becomes smaller where shares come together whose
        costliest samples take more than those of the first shares.

    Attributes
    ----------
    moves
        All so far.

    Raises
    ------
    OptionError
        The samples cannot be moved, or the number is out of range.
    """

    def __init__(
        self,
        problem: TrainingProblem,
        every: int,
        told: Callable[[Move], None] | None = None,
        *,
        bounded: bool = False,
    ) -> None:
        with parallel.agreement(problem.comm):
            if every < 1:
                raise OptionError(f"shares are looked at every {every} iterations: give 1 or more")
            self.dataset = movable(problem)
        self.problem = problem
        self.every = every
        self.told = told
        self.moves: list[Move] = []
        self._most: float | None = None
        if bounded:
            self._most = parallel.max_over_ranks(problem.comm, float(self._heaviest().sum()))
        self._looked, self._busy = 0, 0.0

    def restore(self, known: Known) -> None:
        """Go on with the shares of a state, as `hpcdeq.problem.resuming.problem_state` has made it, on as many ranks.

        On more or fewer shares stay.

        Raises
        ------
        DataError
            The state is of other samples, or they cannot be read.
        """
        if "boundaries" in known and known["ranks"] == self.problem.comm.size:
            move_shares(self.problem, self.dataset.boundaries_at(known["boundaries"]))
            self._bound()

    def begin(self, iteration: int) -> None:
        """Begin to take the time at an iteration."""
        self._looked, self._busy = iteration, self.problem.phases.busy()

    def look(self, iteration: int) -> None:
        """Move shares where it is time to look, and where it helps; between two iterations.

        Raises
        ------
        DataError
            The samples cannot be read; on all ranks.
        """
        if iteration == self._looked or iteration % self.every:
            return
        phases = self.problem.phases
        with phases.of(SHARES):
            move = rebalance(self.problem, phases.busy() - self._busy)
            if move is not None:
                self._bound()
                self.moves.append(move)
                if self.told is not None:
                    self.told(move)
        self.begin(iteration)

    def _heaviest(self) -> np.ndarray:
        """Return the costs of the costliest samples of this rank, as many as a chunk holds, the largest first."""
        return np.sort(self.dataset.costs)[::-1][: self.problem.visits.chunk_size]

    def _bound(self) -> None:
        if self._most is None:
            return
        costs = self._heaviest()
        fits = int((np.cumsum(costs) <= self._most).sum())
        size = self.problem.visits.chunk_size if fits == len(costs) else fits
        self.problem.visits.chunk_size = -int(parallel.max_over_ranks(self.problem.comm, -size))
