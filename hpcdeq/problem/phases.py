"""Where the time of a run goes: forward, adjoint, tangent, reductions, and the optimiser itself.

Clocks stand around whole calls of hpcdeq, never inside tensor operations: a phase costs about a microsecond. Times are
wall times of a rank, waiting included. On an accelerator work is launched and waited for later: it counts where its result
is first needed, which for fixed points is the iteration that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcdeq import parallel
from hpcdeq.problem.counts import Counts

FORWARD, ADJOINT, TANGENT, TRANSPOSED = "forward", "adjoint", "tangent", "transposed"
HESSIAN, REDUCTION, FACTORS, OPTIMISER, RECORD = "hessian", "reduction", "factors", "optimiser", "record"
SHARES = "shares"
# What each is: batches read, outputs and fixed points found; reverse derivatives of the loss; products J v; products Jᵀ u;
# products with the true Hessian; MPI, with waiting for other ranks; set-up of preconditioners; the rest of a minimisation;
# samples that move to other ranks; and what is no part of it: callbacks, validation, files.
PHASES = (FORWARD, ADJOINT, TANGENT, TRANSPOSED, HESSIAN, REDUCTION, FACTORS, OPTIMISER, SHARES, RECORD)
# Work on a rank's own samples, in which it waits for no other. (Factors are set up from samples, too, and then shared out in
# another way.)
BUSY = (FORWARD, ADJOINT, TANGENT, TRANSPOSED, HESSIAN)


@dataclass(frozen=True)
class PhaseTime:
    """Seconds in a phase: the mean over the ranks, and the rank that spent most."""

    mean: float
    largest: float


class Phase:
    """A ``with`` block of `Phases.of`. A class, since a generator takes longer than what small phases last.

    Not collective, every method.
    """

    __slots__ = ("_depth", "_name", "_phases")

    def __init__(self, phases: Phases, name: str) -> None:
        self._phases, self._name, self._depth = phases, name, 0

    def __enter__(self) -> None:
        """Open the phase."""
        phases = self._phases
        if phases.opened and phases.opened[-1] == RECORD:
            return
        phases.settle()
        phases.opened.append(self._name)
        self._depth = len(phases.opened)

    def __exit__(self, *_: object) -> None:
        """Close the phase."""
        phases = self._phases
        if 0 < self._depth <= len(phases.opened):  # not where a run began or ended in between
            phases.settle()
            del phases.opened[self._depth - 1 :]


class Phases:
    """Clocks of one rank: time belongs to the innermost phase that is open.

    Parameters
    ----------
    clock
        Returns seconds.

    Attributes
    ----------
    seconds
        This rank's time in each phase so far.
    opened
        The open phases, the innermost last.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.opened: list[str] = []
        self._since = 0.0
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def of(self, name: str) -> Phase:
        """Count the time inside a ``with`` block to a phase, less that of phases inside it.

        Not collective. Inside ``record`` no other phase is counted: looking at a model is not training it.

        Parameters
        ----------
        name
            One of `PHASES`.
        """
        if name not in self.seconds:
            raise ValueError(f"unknown phase {name!r}: choose one of {', '.join(PHASES)}")
        return Phase(self, name)

    def begin(self) -> None:
        """Begin a run: forget earlier times; from here on the time of no other phase is the optimiser's. Not collective."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.opened = [OPTIMISER]
        self._since = self._clock()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count time of before, on every rank alike. Not collective."""
        for name, spent in seconds.items():
            self.seconds[name] += spent

    def end(self) -> None:
        """End a run. Not collective."""
        self.settle()
        self.opened = []

    def busy(self) -> float:
        """Return the seconds that this rank has worked on its own samples. Not collective."""
        self.settle()
        return sum(self.seconds[name] for name in BUSY)

    def over_ranks(self, comm: parallel.Comm) -> dict[str, PhaseTime]:
        """Return the times of all phases that took any, ``record`` left out; they sum to the time of the run.

        Collective on comm.
        """
        self.settle()
        names = [name for name in PHASES if name != RECORD]
        sums = parallel.sum_over_ranks(comm, np.array([self.seconds[name] for name in names]))
        largest = [parallel.max_over_ranks(comm, self.seconds[name]) for name in names]
        return {
            name: PhaseTime(float(total) / comm.size, most)
            for name, total, most in zip(names, sums, largest, strict=True)
            if most > 0
        }

    def settle(self) -> None:
        """Count the time since the last change of phase to the one that is open. Not collective."""
        now = self._clock()
        if self.opened:
            self.seconds[self.opened[-1]] += now - self._since
        self._since = now


def summarise_phases(times: dict[str, PhaseTime], counts: Counts, iterations: int, samples: int) -> dict[str, Any]:
    """Return what summary.json tells of the time of a run.

    Not collective.

    Parameters
    ----------
    times
        From `Phases.over_ranks`.
    counts, iterations
        Work of the run, and its iterations.
    samples
        Number of training samples.

    Returns
    -------
    told
        ``phases``: seconds of each, the mean over the ranks; ``phases_largest``: of the rank that spent most;
        ``products_per_iteration``: curvature products, in units of products with all samples; None without an iteration.
    """
    products = counts.gauss_newton_products + counts.hessian_products
    return {
        "phases": {name: spent.mean for name, spent in times.items()},
        "phases_largest": {name: spent.largest for name, spent in times.items()},
        "products_per_iteration": products / (samples * iterations) if iterations else None,
    }


def describe_phases(times: dict[str, PhaseTime]) -> str:
    """Say in a line where the time of a run went, the largest part first. Not collective."""
    whole = sum(spent.mean for spent in times.values())
    parts = []
    for name, spent in sorted(times.items(), key=lambda item: -item[1].mean):
        uneven = f" (most {spent.largest:.1f} s)" if spent.largest > 1.2 * spent.mean + 0.1 else ""
        parts.append(f"{name} {100 * spent.mean / whole:.0f} %{uneven}")
    return f"  time        {whole:.1f} s: " + ", ".join(parts)
