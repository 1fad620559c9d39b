"""What every optimiser emits and returns, and when it stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.errors import OptionError
from hpcdeq.problem import TrainingProblem
from hpcdeq.problem.counts import Counts, FixedPointStatistics
from hpcdeq.problem.phases import RECORD
from hpcdeq.problem.rebalancing import Rebalancing
from hpcdeq.problem.resuming import problem_state, restore_problem
from hpcdeq.state import Block, Known, State, whole

CONVERGED, BUDGET, DIVERGED, INTERRUPTED = "converged", "budget", "diverged", "interrupted"


@dataclass(frozen=True)
class Iterate:
    """One iterate, as the optimiser sees it.

    Attributes
    ----------
    iteration
        Number of steps taken; for a minibatch method, of epochs.
    x
        ``(n,)`` weights, the same on all ranks.
    loss, gradient_norm
        F(x) and the 2-norm of its gradient; for a minibatch method their means over the epoch's batches.
    step_norm
        2-norm of the change since the last iterate; None at the first.
    trust_radius
        The method's trust radius (of the next step), or None where it has none.
    seconds
        Wall time since `minimize` was called.
    counts
        Global work so far.
    fixed_point
        Fixed-point statistics since the last iterate, or None.
    """

    iteration: int
    x: Tensor
    loss: float
    gradient_norm: float
    step_norm: float | None
    trust_radius: float | None
    seconds: float
    counts: Counts
    fixed_point: FixedPointStatistics | None


Callback = Callable[[Iterate], None]


class Keeper(Protocol):
    """Is asked at every safe point, where a run could go on from its state: may keep the state, and may end the run.

    Attributes
    ----------
    why
        Why the run was ended, for a person to read.
    warm_bytes
        As in `hpcdeq.problem.resuming.problem_state`.
    """

    why: str
    warm_bytes: int

    def __call__(self, iteration: int, state: Callable[[], State], *, last: bool) -> bool:
        """Keep the state if it is time to; return whether the run has to end, the same on all ranks.

        Collective on the problem's comm.

        Parameters
        ----------
        iteration
            Of the last iterate.
        state
            Collects the complete state; collective.
        last
            Whether the run ends here in any case, because a budget is used up that a later one may extend.
        """
        ...


@dataclass(frozen=True)
class Result:
    """How an optimisation ended.

    Attributes
    ----------
    x
        ``(n,)`` weights of the last iterate.
    status
        ``converged``, ``budget`` (iterations or time ran out), ``diverged`` or ``interrupted``.
    reason
        PETSc's own name of the reason, also for methods that are not PETSc's.
    message
        The reason in words, and what to try next where it is a failure.
    loss, gradient_norm, iterations, counts
        Of the last iterate.
    history
        (iteration, seconds, loss, gradient norm) of every iterate.
    rejected
        Trial points without a fixed point, or with a loss or gradient that is not finite: no step ends there.
    """

    x: Tensor
    status: str
    reason: str
    message: str
    loss: float
    gradient_norm: float
    iterations: int
    counts: Counts
    history: list[tuple[int, float, float, float]]
    rejected: int = 0


@dataclass
class Recorder:
    """Collects iterates of one run, hands them on, and watches the clock. Its calls are collective on the problem's comm."""

    problem: TrainingProblem
    callback: Callback | None
    max_seconds: float | None
    start: float = field(default_factory=time.perf_counter)
    history: list[tuple[int, float, float, float]] = field(default_factory=list)
    last: Iterate | None = None
    paused: float = 0.0
    offset: int = 0  # iterations of a solver before the present one
    keeper: Keeper | None = None
    method: str = ""
    notes: list[str] = field(default_factory=list)  # what a run that was resumed could not take over
    rebalancing: Rebalancing | None = None

    def seconds(self) -> float:
        """Return rank 0's wall time of the optimisation itself: what callbacks take is left out.

        Collective on the problem's comm.
        """
        return parallel.from_root(self.problem.comm, time.perf_counter() - self.start - self.paused)

    def out_of_time(self) -> bool:
        """Say whether the time is up, the same on all ranks. Collective on the problem's comm."""
        return self.max_seconds is not None and self.seconds() >= self.max_seconds

    def emit(self, iteration: int, x: Tensor, loss: float, gradient_norm: float, trust_radius: float | None) -> Iterate:
        """Record an iterate and hand it to the callback. Collective on the problem's comm."""
        step = None if self.last is None else float(torch.linalg.vector_norm((x - self.last.x).double()))
        accounts = self.problem.accounts
        self.last = Iterate(
            iteration,
            x.clone(),
            loss,
            gradient_norm,
            step,
            trust_radius,
            self.seconds(),
            accounts.totals(),
            accounts.statistics(),
        )
        self.history.append((iteration, self.last.seconds, loss, gradient_norm))
        if self.callback is not None:
            since = time.perf_counter()
            with self.problem.phases.of(RECORD):
                self.callback(self.last)
            self.paused += time.perf_counter() - since
        self.problem.progress(self.last.x, loss, gradient_norm)
        return self.last

    def safe_point(self, own: Callable[[], State], *, last: bool = False) -> bool:
        """Let shares be moved and the state be kept where it is time to; return whether the run has to end.

        Collective on the problem's comm.

        Parameters
        ----------
        own
            Returns the method's own state; collective.
        last
            See `Keeper`.
        """
        if self.rebalancing is not None and self.last is not None and not last:
            self.rebalancing.look(self.last.iteration)
        if self.keeper is None or self.last is None:
            return False
        keeper, since = self.keeper, time.perf_counter()

        def complete() -> State:
            problem = problem_state(self.problem, keeper.warm_bytes)
            return {"run": self._state(), "problem": problem, "method": own()}

        with self.problem.phases.of(RECORD):
            stop = keeper(self.last.iteration, complete, last=last)
        self.paused += time.perf_counter() - since
        return stop

    def interrupted(self) -> Result:
        """Return the result of a run that the keeper ended. Not collective."""
        why = "" if self.keeper is None else self.keeper.why
        return self.result(INTERRUPTED, "DIVERGED_USER", f"{why}; --resume goes on from the checkpoint")

    def _state(self) -> State:
        at = self.last
        assert at is not None
        return {
            "optimizer": self.method,
            "seconds": self.seconds(),
            "offset": self.offset,
            "iteration": at.iteration,
            "loss": at.loss,
            "gradient_norm": at.gradient_norm,
            "at": at.seconds,
            "counts": asdict(at.counts),
            "history": np.array(self.history, dtype=float).reshape(-1, 4),
            "x": Block(at.x[self.problem.layout.owned].cpu().numpy()),
            "notes": "\n".join(self.notes),
        }

    def restore(self, known: Known, x0: Tensor) -> None:
        """Go on from a state, that of the problem included. Not collective.

        Parameters
        ----------
        x0
            ``(n,)`` weights, of whose type and on whose device iterates are.

        Raises
        ------
        OptionError
            It is of another method, or of another number of weights.
        """
        run = known["run"]
        there = (run["optimizer"], len(run["x"]))
        if there != (self.method, self.problem.layout.count):
            raise OptionError(
                f"the state is of {there[0]} with {there[1]} weights, and this is {self.method} with"
                f" {self.problem.layout.count}: go on with the same method and model"
            )
        self.start = time.perf_counter() - run["seconds"]
        self.paused = 0.0
        self.offset = int(run["offset"])
        self.history = [(int(row[0]), *row[1:]) for row in run["history"].tolist()]
        x = torch.from_numpy(whole(run["x"]).copy()).to(x0.device)
        counts = Counts(**{name: int(value) for name, value in run["counts"].items()})
        iteration, loss, norm, at = int(run["iteration"]), run["loss"], run["gradient_norm"], run["at"]
        self.last = Iterate(iteration, x, loss, norm, None, None, at, counts, None)
        self.notes = [note for note in run["notes"].split("\n") if note]
        self.notes += restore_problem(self.problem, known["problem"])

    def result(self, status: str, reason: str, message: str, rejected: int = 0) -> Result:
        """Return the result at the last iterate. Not collective."""
        assert self.last is not None
        at = self.last
        message = ". ".join([message, *self.notes])
        return Result(
            at.x, status, reason, message, at.loss, at.gradient_norm, at.iteration, at.counts, self.history, rejected
        )
