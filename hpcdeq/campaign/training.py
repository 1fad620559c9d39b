"""A training run that is to be compared: evaluated along the way, and with a summary however it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpcdeq.config import TrainConfig
from hpcdeq.errors import HpcdeqError
from hpcdeq.training import Keeping, Training

if TYPE_CHECKING:
    from hpcdeq.optim import Iterate, Result
    from hpcdeq.record import Signals
    from hpcdeq.state import Known, State


class ComparedTraining(Training):
    """A `Training` that also writes evaluations.csv. Every method is collective on MPI.COMM_WORLD.

    Training and test data are evaluated at every iterate with the best validation metric so far, at others with enough time
    between, and at the last one. As the callback of the optimiser, that is not on its clock.
    """

    def __init__(
        self, config: TrainConfig, out: str, signals: Signals, *, quiet: bool, keeping: Keeping | None = None
    ) -> None:
        from hpcdeq.record import EvaluationWriter, Spacing

        super().__init__(config, out, signals, quiet=quiet, keeping=keeping)
        self.writer: EvaluationWriter | None = None
        self.spacing = Spacing()
        self.row = -1
        self.evaluated = 0
        self.last: Iterate | None = None
        self.pending = False

    def _record(self, iterate: Iterate) -> None:
        best = self.best
        super()._record(iterate)
        self.row += 1
        self.last = iterate
        self.pending = True
        if self.spacing.due(iterate.seconds, self.best is not best):
            self._evaluate(iterate.x)

    def _evaluate(self, x: Any) -> None:
        from hpcdeq import parallel
        from hpcdeq.record import EvaluationWriter

        train = self.problem.evaluate(x, self.sets["train"])
        test = self.problem.evaluate(x, self.sets["test"]) if self.sets["test"].count else None
        self.pending = False
        with parallel.agreement(self.comm):
            if self.directory.writes:
                if self.writer is None:
                    self.writer = EvaluationWriter(self.directory.path / "evaluations.csv")
                self.writer.write(self.row, train, test)
        self.evaluated += 1

    def _finish(self, result: Result) -> None:
        if self.pending and result.status != "interrupted":
            self._evaluate(result.x)
        super()._finish(result)

    def _state(self) -> State:
        evaluations = {
            "row": self.row,
            "evaluated": self.evaluated,
            "pending": self.pending,
            "next": self.spacing.next,
        }
        return {**super()._state(), "evaluations": evaluations}

    def _restore(self, known: Known) -> None:
        from hpcdeq import parallel
        from hpcdeq.record import EvaluationWriter, Spacing

        super()._restore(known)
        own = known["evaluations"]
        self.row, self.evaluated, self.pending = int(own["row"]), int(own["evaluated"]), bool(own["pending"])
        self.spacing = Spacing(own["next"])
        with parallel.agreement(self.comm):
            if self.directory.writes and self.evaluated:
                self.writer = EvaluationWriter(self.directory.path / "evaluations.csv", self.evaluated)

    def leave_failed(self, error: HpcdeqError) -> None:
        """Leave a summary of a run that ended with an error, as one that diverged."""
        from hpcdeq.optim import Result
        from hpcdeq.optim.base import DIVERGED

        last = self.last
        nothing = float("nan")
        told = str(error).splitlines()[0]
        self._finish(
            Result(
                x=self.problem.initial() if last is None else last.x,
                status=DIVERGED,
                reason=type(error).__name__,
                message=told,
                loss=nothing if last is None else last.loss,
                gradient_norm=nothing if last is None else last.gradient_norm,
                iterations=0 if last is None else last.iteration,
                counts=self.problem.accounts.totals() if last is None else last.counts,
                history=[(0, nothing, nothing, nothing)]
                if last is None
                else [(last.iteration, last.seconds, last.loss, last.gradient_norm)],
            )
        )
