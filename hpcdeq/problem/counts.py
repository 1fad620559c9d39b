"""The work of a training problem, in units of one sample, for all methods alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from torch import nn

from hpcdeq import parallel
from hpcdeq.deq import FixedPoint
from hpcdeq.deq.work import Work
from hpcdeq.state import Known, State


@dataclass
class Counts:
    """Samples evaluated for each kind of quantity, and what the fixed-point layers spent on them."""

    losses: int = 0
    gradients: int = 0
    gauss_newton_products: int = 0
    hessian_products: int = 0
    cell_evaluations: int = 0
    cell_jvps: int = 0
    cell_vjps: int = 0


@dataclass(frozen=True)
class FixedPointStatistics:
    """Forward solves of samples since the last look: their number, iterations (mean, largest), how many did not converge."""

    solves: int
    mean_iterations: float
    max_iterations: int
    unconverged: int


class Accounts:
    """This rank's counters, summed over the ranks when looked at.

    Parameters
    ----------
    model
        Its `FixedPoint` layers are counted too.
    comm
        The ranks to sum over.
    """

    def __init__(self, model: nn.Module, comm: parallel.Comm) -> None:
        self.own = Counts()
        self.comm = comm
        self._works = [module.work for module in model.modules() if isinstance(module, FixedPoint)]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside a ``with`` block: looking at a model is not training it. Not collective."""
        before = [vars(work).copy() for work in self._works]
        try:
            yield
        finally:
            for work, state in zip(self._works, before, strict=True):
                vars(work).update(state)

    def totals(self) -> Counts:
        """Return the global totals. Collective on comm."""
        local = asdict(self.own)
        for name in ("cell_evaluations", "cell_jvps", "cell_vjps"):
            local[name] = sum(getattr(work, name) for work in self._works)
        values = parallel.sum_over_ranks(self.comm, np.array(list(local.values()), dtype=np.int64))
        return Counts(*(int(v) for v in values))

    def state(self) -> State:
        """Return the global totals, and the statistics since the last look. Collective on comm."""
        pending = np.array([work.statistics for work in self._works], dtype=np.int64).reshape(-1, 4)
        sums = parallel.sum_over_ranks(self.comm, pending.sum(axis=0))
        sums[2] = parallel.max_over_ranks(self.comm, int(pending[:, 2].max(initial=0)))
        return {**asdict(self.totals()), "statistics": sums}

    def restore(self, known: Known) -> None:
        """Go on from the totals of a state: rank 0 takes them over, in its first layer. Not collective."""
        first = self.comm.rank == 0
        for name in asdict(self.own):
            setattr(self.own, name, int(known[name]) if first and not name.startswith("cell_") else 0)
        for number, work in enumerate(self._works):
            told = known["statistics"].tolist() if first and number == 0 else [0] * 4
            vars(work).update(vars(Work(*(0,) * 3, *told)))
            for name in ("cell_evaluations", "cell_jvps", "cell_vjps"):
                setattr(work, name, int(known[name]) if first and number == 0 else 0)

    def statistics(self) -> FixedPointStatistics | None:
        """Return the fixed-point statistics since the last look; None for a model without fixed points.

        Collective on comm.
        """
        if not self._works:
            return None
        taken = [work.take_statistics() for work in self._works]
        solves, iterations, unconverged = (sum(t[i] for t in taken) for i in (0, 1, 3))
        sums = parallel.sum_over_ranks(self.comm, np.array([solves, iterations, unconverged], dtype=np.int64))
        largest = parallel.max_over_ranks(self.comm, max(t[2] for t in taken))
        return FixedPointStatistics(int(sums[0]), float(sums[1] / max(sums[0], 1)), int(largest), int(sums[2]))
