"""When a run's state is kept, and when the run has to stop: asked at every safe point, agreed on by all ranks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpcdeq import parallel
from hpcdeq.problem.resuming import WARM_BYTES
from hpcdeq.record.checkpoint import write_checkpoint
from hpcdeq.record.interruption import Signals
from hpcdeq.record.space import check_space
from hpcdeq.state import State

# Without a word from the user a state is kept so often that hours are never lost, and so seldom that it costs nothing to
# speak of: a hundred times what it takes passes before the next.
SELDOMEST, OFTENEST, SHARE = 600.0, 10.0, 0.01
# Before the wall-time limit a run needs the time of one more step between safe points, of a checkpoint, and of ending.
LONGEST_STEPS, CHECKPOINTS = 1.5, 2.0
WORK = ("losses", "gradients", "gauss_newton_products", "hessian_products")  # counters of samples
ENDING, ENDING_SHARE = 30.0, 0.1


class CheckpointKeeper:
    """Keeps checkpoints in a run's folder; a `Keeper` of `hpcdeq.optim`. Every method is collective on comm.

    Parameters
    ----------
    folder
        Of the run.
    more
        Returns what else a checkpoint holds; collective.
    signals
        What has been caught on this rank.
    every
        Iterations after which a state is kept; None: by the clock alone, which always counts as well.
    first
        Whether to keep one at the first safe point.
    left
        Seconds that the job may go on, from now; None: no limit. Rank 0's counts.
    warm_bytes
        As in `hpcdeq.problem.resuming.problem_state`.

    Attributes
    ----------
    why
        Why the run was ended.
    written
        How many checkpoints were written.
    """

    def __init__(
        self,
        comm: parallel.Comm,
        folder: Path,
        more: Callable[[], State],
        signals: Signals,
        *,
        every: int | None = None,
        first: bool = False,
        left: float | None = None,
        warm_bytes: int = WARM_BYTES,
    ) -> None:
        self.comm = comm
        self.folder = folder
        self.more = more
        self.signals = signals
        self.every = every
        self.warm_bytes = warm_bytes
        self.why = ""
        self.written = 0
        now = time.monotonic()
        self._first, self._fits = first, False
        self._deadline = None if left is None else now + left - min(ENDING, ENDING_SHARE * left)
        self._kept_at, self._kept_iteration = now, -1
        self._asked: float | None = None
        self._longest_step = self._longest_checkpoint = 0.0

    def __call__(self, iteration: int, state: Callable[[], State], *, last: bool) -> bool:
        """Keep the state where it is time to; return whether the run has to end. See `hpcdeq.optim.base.Keeper`.

        Raises
        ------
        CheckpointError
            It cannot be written; at the first safe point also where the disk has no room.
        """
        if not self._fits:
            check_space(self.folder, state(), self.comm)
            self._fits = True
        now = time.monotonic()
        if self._asked is not None:
            self._longest_step = max(self._longest_step, now - self._asked)
        # The clock is rank 0's, a signal may be anyone's: one reduction for both.
        root = self.comm.rank == 0
        flags = np.array(
            [self.signals.caught, root and self._is_time(now), root and self._is_late(now)], dtype=np.int64
        )
        caught, due, late = (int(flag) for flag in parallel.largest_over_ranks(self.comm, flags))
        stop = bool(caught or late)
        if iteration != self._kept_iteration and self.every is not None and iteration and iteration % self.every == 0:
            due = 1
        if caught:
            self.why = f"stopped by {signal.Signals(caught).name}"
        elif late:
            self.why = "stopped before the job's wall-time limit"
        if stop or due or last or self._first:
            self._keep(iteration, state)
        self._asked = time.monotonic()
        return stop

    def _is_time(self, now: float) -> bool:
        pause = min(SELDOMEST, max(OFTENEST, self._longest_checkpoint / SHARE))
        return now - self._kept_at >= pause

    def _is_late(self, now: float) -> bool:
        needed = LONGEST_STEPS * self._longest_step + CHECKPOINTS * self._longest_checkpoint
        return self._deadline is not None and now + needed >= self._deadline

    def _keep(self, iteration: int, state: Callable[[], State]) -> None:
        began = time.monotonic()
        whole = {**state(), **self.more()}
        counts = whole.get("problem", {}).get("counts", {})
        # What it takes to come from one step to the next, whatever the method: an epoch may be longer than a job.
        work = sum(counts.get(name, 0) for name in WORK)
        write_checkpoint(self.folder, whole, self.comm, work)
        self._first = False
        self.written += 1
        self._kept_at, self._kept_iteration = time.monotonic(), iteration
        self._longest_checkpoint = max(self._longest_checkpoint, self._kept_at - began)
