"""Methods on minibatches: Adam, AdamW, RMSprop, each rank with its block of the weights and of the moments.

The updates are torch's, applied to a rank's block of the weight vector: each is element by element, so that the blocks
together are the update of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop

from hpcdeq.errors import ConvergenceError, OptionError
from hpcdeq.methods import ADAMW_DECAY, BATCH_SIZE, LEARNING_RATE, MINIBATCH, Schedule
from hpcdeq.optim.base import BUDGET, DIVERGED, Recorder, Result
from hpcdeq.optim.beginning import initial_gradient_error, initial_loss_error
from hpcdeq.problem.culprit import culprit
from hpcdeq.problem.randomness import random_layer
from hpcdeq.state import Block, Known, State, whole


@dataclass(frozen=True)
class MinibatchSettings:
    """Settings of the methods on minibatches.

    Attributes
    ----------
    learning_rate
        The largest step length of the run; the schedule says how much of it a step takes.
    batch_size
        Samples of one step, over all ranks; None, or more than there are: all of them.
    seed
        Seed of the order in which samples are drawn; it does not depend on the number of ranks.
    schedule
        How the learning rate changes. A cosine with warm-up by default, for plain runs and comparisons alike: with a tuned
        rate it ended a fifth to a quarter lower in loss than the best constant rate (Burgers' equation, DeepONet, 60
        epochs, two seeds). At a rate that is too small, and in runs that are cut short, a constant one gets further.
    weight_decay
        Of adamw alone, and apart from the loss (Loshchilov and Hutter 2019, arXiv 1711.05101); None: 0.01. The penalty
        of the other methods is the problem's.
    beta1, beta2
        Memory of the first and second moments of adam and adamw (Kingma and Ba 2015, arXiv 1412.6980).
    alpha
        Memory of the second moment of rmsprop (Hinton's lecture 6e, 2012).
    epsilon
        Added to the root of the second moment.
    average
        Memory β of an exponential average of the weights, x̄ ← β x̄ + (1 - β) x after each step (Polyak and Juditsky 1992, with
        the weights of Tarvainen and Valpola 2017, arXiv 1703.01780), shorter in the first steps; None: there is none. With
        it the iterates, and so the result, are the average: it lies nearer to a minimum than steps on minibatches go.
    """

    learning_rate: float = LEARNING_RATE
    batch_size: int | None = BATCH_SIZE
    seed: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    weight_decay: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    alpha: float = 0.99
    epsilon: float = 1e-8
    average: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"learning rate {self.learning_rate}: give a finite number above 0")
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"batch size {self.batch_size}: give 1 or more samples")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise OptionError(f"weight decay {self.weight_decay}: give a finite number that is not negative")
        for name in ("beta1", "beta2", "alpha"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}: give a number from 0 to below 1")
        if not 0 < self.epsilon < math.inf:
            raise OptionError(f"epsilon is {self.epsilon}: give a finite number above 0")
        if self.average is not None and not 0 < self.average < 1:
            raise OptionError(f"average is {self.average}: give a number between 0 and 1, such as 0.998")


class _Update(Protocol):
    """Takes steps with a block of the weights, in place; ``steps`` counts them."""

    steps: Tensor

    def __init__(self, method: str, block: Tensor, given: MinibatchSettings) -> None: ...

    def step(self, gradient: Tensor, rate: float) -> None:
        """Take a step along a gradient's block at a learning rate. Not collective."""

    def memory(self) -> dict[str, Tensor]:
        """Return what it remembers of steps, each ``(b,)`` like the block; shares memory. Not collective."""
        ...


class _Moments:
    """Adam's and AdamW's update."""

    def __init__(self, method: str, block: Tensor, given: MinibatchSettings) -> None:
        self._block = block
        self._first, self._second = torch.zeros_like(block), torch.zeros_like(block)
        self.steps = torch.zeros(())
        self._function = adamw if method == "adamw" else adam
        self._given = given
        self._decay = 0.0
        if method == "adamw":
            self._decay = ADAMW_DECAY if given.weight_decay is None else given.weight_decay

    def step(self, gradient: Tensor, rate: float) -> None:
        """Take a step; see `_Update`. Not collective."""
        self._function(
            [self._block],
            [gradient],
            [self._first],
            [self._second],
            [],
            [self.steps],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=rate,
            beta1=self._given.beta1,
            beta2=self._given.beta2,
            eps=self._given.epsilon,
            weight_decay=self._decay,
        )

    def memory(self) -> dict[str, Tensor]:
        """Return both moments; see `_Update`. Not collective."""
        return {"first": self._first, "second": self._second}


class _RootMeanSquare:
    """RMSprop's update."""

    def __init__(self, method: str, block: Tensor, given: MinibatchSettings) -> None:
        self._block = block
        self._second = torch.zeros_like(block)
        self.steps = torch.zeros(())
        self._given = given

    def step(self, gradient: Tensor, rate: float) -> None:
        """Take a step; see `_Update`. Not collective."""
        rmsprop(
            [self._block],
            [gradient],
            [self._second],
            [],
            [],
            [self.steps],
            foreach=False,
            lr=rate,
            alpha=self._given.alpha,
            eps=self._given.epsilon,
            weight_decay=0.0,
            momentum=0.0,
            centered=False,
        )

    def memory(self) -> dict[str, Tensor]:
        """Return the second moment; see `_Update`. Not collective."""
        return {"second": self._second}


class _Average:
    """An exponential average of a block of the weights; see `MinibatchSettings.average`."""

    def __init__(self, block: Tensor, memory: float) -> None:
        self.block = block.clone()
        self._memory = memory

    def follow(self, block: Tensor, steps: int) -> None:
        """Take the weights after so many steps into the average. Not collective."""
        self.block.lerp_(block, 1.0 - min(self._memory, steps / (steps + 9.0)))


# torch's functions and not its classes: what `torch.optim.Optimizer` does around them takes longer than an update of the
# weights of a small network, and the first one of a process imports torch's compiler, which takes seconds.
_UPDATES: dict[str, type[_Update]] = dict(zip(MINIBATCH, (_Moments, _Moments, _RootMeanSquare), strict=True))


class MinibatchRun:
    """One minimisation on minibatches. Collective on the problem's comm, every method.

    The samples of an epoch are a permutation of all samples, the same for any number of ranks; each rank works on those of
    a batch that it holds.

    Parameters
    ----------
    recorder
        Takes an iterate an epoch, watches the clock.
    method
        ``adam``, ``adamw`` or ``rmsprop``.
    settings
        Its settings.
    """

    def __init__(self, recorder: Recorder, method: str, settings: MinibatchSettings) -> None:
        self.recorder = recorder
        self.problem = recorder.problem
        self.method = method
        self.settings = settings
        count = self.problem.dataset.count
        self.batch_size = count if settings.batch_size is None else min(settings.batch_size, count)
        self._steps = 0
        self._rate = 0.0
        # Where in the data the run is: the epoch, its samples that were taken, and their losses and squared gradients.
        self._epoch, self._start = 1, 0
        self._losses: list[float] = []
        self._squares = 0.0
        self._average: _Average | None = None
        self._random = random_layer(self.problem.model) is not None

    def minimize(self, x0: Tensor, max_iterations: int, resume: Known | None = None) -> Result:
        """Run epochs from x0 ``(n,)``, or on from a state, until the budget is used up, or the loss is not finite.

        The result is then at the end of the last epoch whose loss over all samples is finite.
        """
        problem = self.problem
        self._total = max_iterations * math.ceil(problem.dataset.count / self.batch_size)
        self._x = self._x0 = x0
        if resume is None:
            self._begin(x0)
        else:
            self._restore(resume)
        while True:
            ends = self._epoch > max_iterations
            out_of_time = not ends and self._epoch > 1 and self._spent() >= 1
            if self.recorder.safe_point(self._state, last=ends or out_of_time):
                return self.recorder.interrupted()
            if out_of_time:
                return self._out_of_time()
            if ends:
                words = "the epochs are used up; --max-iterations allows more"
                return self.recorder.result(BUDGET, "DIVERGED_MAXITS", words)
            with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are answers here
                ended = self._take_epoch()
            if ended is not None:
                return ended

    def _begin(self, x0: Tensor) -> None:
        problem = self.problem
        if self._random:
            self._seed(0)
        # A pass over all samples takes as long as an epoch: what is told of the beginning is what the first batch says.
        batch = self._order(1)[: self.batch_size]
        loss, gradient = problem.loss_and_gradient(x0, batch)
        if not np.isfinite(loss):
            raise initial_loss_error(problem, loss, x0, batch)
        if problem.spoilt:
            raise initial_gradient_error(problem, x0, batch)
        self.recorder.emit(0, x0, loss, float(gradient.norm()), None)
        del gradient  # a whole vector, for all of the run
        self._block = x0[problem.layout.owned].detach().to("cpu", copy=True)
        self._update: _Update = _UPDATES[self.method](self.method, self._block, self.settings)
        self._average = self._new_average()

    def _new_average(self) -> _Average | None:
        return None if self.settings.average is None else _Average(self._block, self.settings.average)

    def _seed(self, steps: int) -> None:
        """Let layers draw other numbers on each rank, and the same ones in every run."""
        seeds = np.random.SeedSequence([self.settings.seed, self.problem.comm.rank, steps])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def _state(self) -> State:
        """Return all that the next step depends on. Collective."""
        return {
            "method": self.method,
            "epoch": self._epoch,
            "start": self._start,
            "steps": self._steps,
            "rate": self._rate,
            "losses": np.array(self._losses),
            "squares": Block(np.array([self._squares])),  # each rank's own sum: they are added at the end of the epoch
            **{name: Block(vector.numpy()) for name, vector in self._vectors().items()},
        }

    def _vectors(self) -> dict[str, Tensor]:
        """Return this rank's blocks of all vectors that go on from step to step."""
        vectors = {"weights": self._block, **self._update.memory()}
        return vectors if self._average is None else vectors | {"average": self._average.block}

    def _restore(self, known: Known) -> None:
        """Go on from a state."""
        layout, comm = self.problem.layout, self.problem.comm
        self._block = torch.zeros(layout.block_sizes[comm.rank], dtype=self._x.dtype)
        self._update = _UPDATES[self.method](self.method, self._block, self.settings)
        self._average = self._new_average()
        self._epoch, self._start = int(known["epoch"]), int(known["start"])
        self._steps, self._rate = int(known["steps"]), known["rate"]
        self._update.steps.fill_(self._steps)
        self._losses = known["losses"].tolist()
        squares = whole(known["squares"])
        own = squares[comm.rank :: comm.size]  # as many ranks: this rank's; otherwise the sum is the same
        self._squares = float(own.sum())
        for name, vector in self._vectors().items():
            vector.copy_(torch.from_numpy(known[name][layout.owned]))
        self._x = self._whole(self._block)
        if (
            self._random and len(squares) != comm.size
        ):  # there were more or fewer ranks, whose random numbers are not these
            self._seed(self._steps)

    def _take_epoch(self) -> Result | None:
        """Take the steps of an epoch and record where they end; return a result if the run ends with them."""
        epoch, count = self._epoch, self.problem.dataset.count
        order = self._order(epoch)
        spent = self._spent()
        while self._start < count:
            try:
                batch = order[self._start : self._start + self.batch_size]
                loss, own = self.problem.owned_loss_and_gradient(self._x, batch)
            except ConvergenceError as error:
                if not self._steps:
                    raise
                return self._diverged(epoch, f"could not be computed ({str(error).splitlines()[0]})")
            if self.problem.spoilt:
                became = "has a gradient that is not finite" if math.isfinite(loss) else f"became {loss}"
                return self._diverged(epoch, became, batch)
            self._losses.append(loss)
            self._squares += float(own @ own)
            self._step(own, spent)
            self._start += self.batch_size
            spent = self._spent()
            if self._start < count and self.recorder.safe_point(self._state, last=spent >= 1):
                return self.recorder.interrupted()
            if spent >= 1:
                break
        unfinished = self._start < count  # the checkpoint goes on within the epoch
        losses = self._losses
        norm = (self.problem.sum_of_blocks(np.array([self._squares])) / len(losses)) ** 0.5
        if not math.isfinite(norm):
            return self._diverged(epoch, f"has a gradient of norm {norm}")
        self.recorder.emit(epoch, self._iterate(), sum(losses) / len(losses), norm, None)
        self._epoch, self._start, self._losses, self._squares = epoch + 1, 0, [], 0.0
        return self._out_of_time() if unfinished else None

    def _order(self, epoch: int) -> np.ndarray:
        """Return the samples in the order that an epoch takes them in, the same on all ranks."""
        return np.random.default_rng([self.settings.seed, epoch]).permutation(self.problem.dataset.count)

    def _step(self, gradient: np.ndarray, spent: float) -> None:
        self._rate = self.settings.learning_rate * self.settings.schedule.factor(self._steps, self._total, spent)
        self._update.step(torch.from_numpy(gradient).to(self._block.dtype), self._rate)
        self._steps += 1
        if self._average is not None:
            self._average.follow(self._block, self._steps)
        self._x = self._whole(self._block)

    def _whole(self, block: Tensor) -> Tensor:
        """Return the weights that the ranks hold a block of each."""
        if self.problem.comm.size > 1 or self._x.device != block.device:
            return self.problem.layout.gather(block.numpy()).to(self._x)
        return block  # a copy a step takes as long as the update

    def _iterate(self) -> Tensor:
        return self._x if self._average is None else self._whole(self._average.block)

    def _spent(self) -> float:
        """Return the fraction of the time allowed that is used, the same on all ranks; 0 without a bound."""
        allowed = self.recorder.max_seconds
        return 0.0 if allowed is None else min(1.0, self.recorder.seconds() / allowed)

    def _out_of_time(self) -> Result:
        return self.recorder.result(BUDGET, "DIVERGED_USER", "the time is up; --max-seconds allows more")

    def _diverged(self, epoch: int, happened: str, batch: np.ndarray | None = None) -> Result:
        """Return to the last iterate whose loss over all samples is finite, and say what happened."""
        words = (
            f"the loss {happened} in epoch {epoch}, after {self._steps} steps, at a learning rate of {self._rate:.3g}:"
            f" give a smaller --learning-rate, such as {self.settings.learning_rate / 10:.3g}"
        )
        if batch is not None:
            words = ". ".join(filter(None, [words, culprit(self.problem, self._x, batch)]))
        assert self.recorder.last is not None
        for x in (self.recorder.last.x, self._x0):
            try:
                loss, gradient = self.problem.loss_and_gradient(x)
            except ConvergenceError:
                continue
            if math.isfinite(loss):
                self.recorder.emit(epoch, x, loss, float(gradient.double().norm()), None)
                break
        return self.recorder.result(DIVERGED, "DIVERGED_NAN", words)
