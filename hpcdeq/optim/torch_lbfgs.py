"""torch's own L-BFGS on the same problem: a reference from outside, with the counters and the history of the other methods."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcdeq.errors import ConvergenceError
from hpcdeq.optim.base import Recorder, Result
from hpcdeq.optim.beginning import initial_gradient_error, initial_loss_error
from hpcdeq.optim.stopping import ending_of, status_of, words
from hpcdeq.optim.tao import WALL
from hpcdeq.state import Block, Known, State, whole

HISTORY = 20  # as in the preset lbfgs
SEARCH = 25  # evaluations of a line search at most, torch's default
# TAO's defaults of -tao_gatol and -tao_grtol, so that both stop at the same point.
GATOL = GRTOL = 1e-8


@dataclass(frozen=True)
class _Point:
    """Loss and gradient at x, and whether a step may end there."""

    x: Tensor
    loss: float
    gradient: Tensor
    accepted: bool = True


class TorchLbfgs:
    """One minimisation by `torch.optim.LBFGS` with its strong-Wolfe line search.

    Collective on the problem's comm, every method. The state is replicated: every rank computes the same steps from the
    same gradient. One call of torch's ``step`` is one iteration; what it evaluates again at the point that its last line
    search ended at is remembered, as it would be within one long call.

    Parameters
    ----------
    recorder
        Takes the iterates, watches the clock.
    history
        Number of steps remembered.
    """

    def __init__(self, recorder: Recorder, history: int = HISTORY) -> None:
        self.recorder = recorder
        self.problem = recorder.problem
        self.history = history
        self.rejected = 0
        self.infinite = 0
        self._worst = 0.0
        self._seen: list[_Point] = []

    def minimize(self, x0: Tensor, max_iterations: int, resume: Known | None = None) -> Result:
        """Minimise from x0 ``(n,)``, or on from a state, and return the result; reports failure in its status."""
        x = x0.detach().clone()
        began = time.perf_counter()
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=1,
            max_eval=SEARCH + 1,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=self.history,
            line_search_fn="strong_wolfe",
        )
        # The first optimiser of a process imports torch's compiler: seconds that are no part of a minimisation.
        self.recorder.paused += time.perf_counter() - began

        def closure() -> float:
            point = self._evaluate(x)
            x.grad = point.gradient.clone()
            return point.loss

        reason, first = "", 0
        if resume is not None and self.recorder.last is not None:
            first = self.recorder.last.iteration
            self._restore(resume, x, optimizer)
        for iteration in range(first, max(first, max_iterations) + 1):
            point = self._evaluate(x)
            loss, norm = point.loss, float(point.gradient.double().norm())
            if resume is None or iteration > first:
                self.recorder.emit(iteration, x, loss, norm, None)
            out_of_time = self.recorder.out_of_time()
            last = out_of_time or iteration >= max_iterations
            if self.recorder.safe_point(lambda: self._state(x, optimizer), last=last):
                return self.recorder.interrupted()
            if norm <= GATOL:
                reason = "CONVERGED_GATOL"
            elif norm <= GRTOL * abs(loss):
                reason = "CONVERGED_GRTOL"
            elif out_of_time:
                reason = "DIVERGED_USER"
            elif iteration >= max_iterations:
                reason = "DIVERGED_MAXITS"
            if reason:
                break
            before = x.clone()
            optimizer.step(closure)
            ended = self._evaluate(x)
            if torch.equal(x, before) or not ended.accepted:
                reason = "DIVERGED_LS_FAILURE"
                break
            self._seen = [ended]
        ending = ending_of(self.recorder, reason, unreached=self.rejected - self.infinite, infinite=self.infinite)
        return self.recorder.result(status_of(ending), reason, words(ending), self.rejected)

    def _state(self, x: Tensor, optimizer: torch.optim.LBFGS) -> State:
        """Return all that the next iteration depends on: of the vectors, each rank its block."""
        owned = self.problem.layout.owned

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor):
                return Block(value.detach().cpu().numpy()[owned]) if value.ndim else float(value)
            if isinstance(value, list):
                return {str(i): kept(item) for i, item in enumerate(value) if item is not None} | {"length": len(value)}
            return value

        point = self._evaluate(x)
        memory = {name: kept(value) for name, value in optimizer.state[x].items()}
        return {
            "x": kept(x),
            "loss": point.loss,
            "gradient": kept(point.gradient),
            "worst": self._worst,
            "rejected": self.rejected,
            "infinite": self.infinite,
            "memory": memory,
        }

    def _restore(self, known: Known, x: Tensor, optimizer: torch.optim.LBFGS) -> None:
        """Go on from a state."""

        def found(value: Any) -> Any:
            if isinstance(value, dict):
                return [found(value.get(str(i))) for i in range(int(value["length"]))]
            if isinstance(value, float):
                return torch.tensor(value, dtype=torch.float64).to(x)
            return torch.from_numpy(whole(value).copy()).to(x.device) if hasattr(value, "shape") else value

        with torch.no_grad():
            x.copy_(found(known["x"]))
        optimizer.state[x].update({name: found(value) for name, value in known.get("memory", {}).items()})
        self._worst, self.rejected, self.infinite = known["worst"], int(known["rejected"]), int(known["infinite"])
        self._seen = [_Point(x.clone(), known["loss"], found(known["gradient"]))]

    def _evaluate(self, x: Tensor) -> _Point:
        """Return loss and gradient at a point, from memory where this iteration has been there."""
        for point in self._seen:
            if torch.equal(point.x, x):
                return point
        try:
            loss, gradient = self.problem.loss_and_gradient(x)
        except ConvergenceError:
            if not self._seen:
                raise
            self._seen.append(self._rejected(x))
            return self._seen[-1]
        if math.isfinite(loss) and bool(torch.isfinite(gradient).all()):
            self._worst = max(self._worst, loss)
            self._seen.append(_Point(x.clone(), loss, gradient))
        elif not self._seen:
            if math.isfinite(loss):
                raise initial_gradient_error(self.problem, x)
            raise initial_loss_error(self.problem, loss, x)
        else:
            self.infinite += 1
            self._seen.append(self._rejected(x))
        return self._seen[-1]

    def _rejected(self, x: Tensor) -> _Point:
        """Return what a trial point counts as that no step may end at: a large loss, as for TAO."""
        self.rejected += 1
        return _Point(x.clone(), WALL * max(self._worst, 1e-300), torch.zeros_like(x), accepted=False)
