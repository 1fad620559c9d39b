"""What commands know of the optimisation methods before anything heavy is imported: names, learning rates, schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpcdeq.errors import OptionError

MINIBATCH = ("adam", "adamw", "rmsprop")
TORCH_LBFGS = "torch-lbfgs"
GROWING = ("trgn", "lbfgs")  # those whose objective may grow from some samples to all
METHODS = ("trgn", "lbfgs", "newton", *MINIBATCH, TORCH_LBFGS)

# What a comparison tries for a minibatch method: two values a decade around Adam's customary 1e-3, with one beyond what is
# best in our measurements on both sides, so that the winner is bracketed. A DeepONet on 1,600 solutions of Burgers'
# equation, 60 epochs with a cosine: relative errors 0.14, 0.11, 0.09 and 0.5 at 1e-3, 3e-3, 1e-2 and 3e-2.
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

# Defaults of the minibatch methods: Kingma and Ba's rate, a usual batch, torch's decay.
LEARNING_RATE, BATCH_SIZE, ADAMW_DECAY = 1e-3, 64, 0.01

CONSTANT, COSINE = SCHEDULES = ("constant", "cosine")
# Adam's second moments are averages over 1 / (1 - beta2) = 1000 steps; a twentieth of a run lets them settle.
WARMUP = 0.05


@dataclass(frozen=True)
class Schedule:
    """The factor of the learning rate at a step.

    Attributes
    ----------
    kind
        ``constant``, or ``cosine``: half a period from one to the floor over the run (Loshchilov and Hutter 2017,
        arXiv 1608.03983, without restarts).
    warmup
        Length of the linear rise at the beginning: below 1 a fraction of the run, from 1 on a number of steps. None: a
        twentieth of the run with ``cosine``, none with ``constant``.
    floor
        Fraction of the learning rate that is left at the end.

    Raises
    ------
    OptionError
        There is no such schedule, or a number is out of range.
    """

    kind: str = COSINE
    warmup: float | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise OptionError(f"schedule is {self.kind!r}: choose {' or '.join(SCHEDULES)}")
        if self.warmup is not None and not 0 <= self.warmup < math.inf:
            raise OptionError(
                f"warmup is {self.warmup}: give a fraction of the run (0 to 1) or a number of steps (1 and more)"
            )
        if not 0 <= self.floor <= 1:
            raise OptionError(f"floor is {self.floor}: give the fraction of the learning rate to end with, 0 to 1")

    @property
    def warming(self) -> float:
        """The warm-up, that of the kind where none is given."""
        return self.warmup if self.warmup is not None else WARMUP if self.kind == COSINE else 0.0

    def factor(self, step: int, steps: int, spent: float = 0.0) -> float:
        """Return the factor of a step; the product of warm-up and fall.

        Not collective.

        Parameters
        ----------
        step, steps
            Its number from 0, and the number of steps that the iterations allow.
        spent
            Fraction of the time allowed that is used; 0 without a bound on time. The run is as far along as the further of
            time and steps says.
        """
        warmup, rise = self.warming, 1.0
        if warmup >= 1:
            rise = (step + 1) / warmup
        elif warmup > 0:
            rise = max((step + 1) / steps, spent) / warmup
        fall = 1.0
        if self.kind != CONSTANT:
            along = min(1.0, max(step / steps, spent))
            fall = self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * along))
        return min(1.0, rise) * fall


def learning_rate_grid() -> tuple[float, ...]:
    """Return the learning rates that a comparison tries for a minibatch method, in increasing order. Not collective."""
    return LEARNING_RATES
