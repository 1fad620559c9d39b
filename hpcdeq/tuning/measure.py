"""Time solvers against each other: every setting in turn, again and again, and the median of each."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from hpcdeq.deq import Solution, solve_fixed_point
from hpcdeq.errors import ConvergenceError
from hpcdeq.tuning.cases import Case

# Forward iteration needs log(tolerance) / log(radius) evaluations, 1,375 for 1e-6 at a spectral radius of 0.99; a window
# that needs 500 is not worth waiting for.
FORWARD_ITERATIONS = 2000
ANDERSON_ITERATIONS = 500
SCANS = 2  # solves of every setting: a single one may have been disturbed
MARGIN = 0.3  # a setting that took so much longer than the best is not measured again
FINALISTS = 8  # no more of them than this: where so many are near to each other, any is a good choice
WAITING = 0.1  # of the time; beyond, wall time measures the other programs on these cores


@dataclass(frozen=True, order=True)
class Setting:
    """Anderson's window m (0: forward iteration) and mixing β."""

    window: int
    mixing: float

    def __str__(self) -> str:
        if self.window == 0:
            return "forward iteration" if self.mixing == 1.0 else f"forward iteration, mixing {self.mixing:g}"
        return f"window {self.window}, mixing {self.mixing:g}"


FORWARD = Setting(0, 1.0)


@dataclass(frozen=True)
class Solve:
    """One solve.

    Attributes
    ----------
    seconds
        Wall time of the whole call, set-up and the last check of the residual included.
    cpu_seconds
        Time that this process computed meanwhile, on all its threads; NaN where a device computes.
    evaluations
        Evaluations of the cell, a sample in the mean.
    iterations
        Of the slowest sample.
    converged, reason
        Whether all samples did, and PETSc's name of the reason.
    history
        Per iteration: evaluations a sample, seconds, largest relative residual of a sample.
    """

    seconds: float
    cpu_seconds: float
    evaluations: float
    iterations: int
    converged: bool
    reason: str
    history: tuple[tuple[float, float, float], ...] = field(default=(), repr=False)

    def on_cpu_clock(self) -> Solve:
        """Return the solve with its CPU seconds in place of wall time, its history shrunk accordingly."""
        factor = self.cpu_seconds / self.seconds
        history = tuple((evaluations, factor * seconds, residual) for evaluations, seconds, residual in self.history)
        return replace(self, seconds=self.cpu_seconds, history=history)

    @property
    def residual(self) -> float:
        """The last of the largest relative residuals; NaN where there is none."""
        return self.history[-1][2] if self.history else float("nan")


@dataclass
class Measured:
    """A setting and its solves.

    Attributes
    ----------
    finalist
        Whether it was measured to the end, and can be chosen.
    """

    setting: Setting
    solves: list[Solve] = field(default_factory=list)
    finalist: bool = False

    @property
    def converged(self) -> bool:
        """Whether every solve did."""
        return all(solve.converged for solve in self.solves)

    @property
    def seconds(self) -> float:
        """The median of the solves."""
        return statistics.median(solve.seconds for solve in self.solves)

    @property
    def fastest(self) -> float:
        """The least of the solves' seconds: what disturbs a solve makes it longer, never shorter."""
        return min(solve.seconds for solve in self.solves)

    @property
    def evaluations(self) -> float:
        """Evaluations of the cell, a sample in the mean: the same in every solve."""
        return self.solves[0].evaluations

    @property
    def seconds_per_evaluation(self) -> float:
        """Seconds of the batch over evaluations a sample."""
        return self.seconds / max(self.evaluations, 1.0)

    @property
    def typical(self) -> Solve:
        """The solve whose seconds are (next to) the median."""
        return sorted(self.solves, key=lambda solve: solve.seconds)[(len(self.solves) - 1) // 2]


Solver = Callable[[Setting], Solve]


def solver_of(case: Case, tolerance: float) -> Solver:
    """Return what solves a case with a setting, from the start, to a relative tolerance for each sample.

    Not collective. Options of the command line win over all others, as everywhere.
    """

    def solve(setting: Setting) -> Solve:
        options = {
            **case.options,
            "snes_type": "batched_anderson",
            "snes_fallback": "none",  # what fails is to be seen to fail
            "snes_anderson_m": setting.window,
            "snes_anderson_beta": setting.mixing,
            "snes_rtol": tolerance,
            "snes_atol": 0.0,
            "snes_max_it": ANDERSON_ITERATIONS if setting.window else FORWARD_ITERATIONS,
        }
        began, computed = _now(), time.process_time()
        try:
            solution = solve_fixed_point(case.cell, case.given, None, case.prefix, options, case.sample_index)
            converged = True
        except ConvergenceError as error:
            if not isinstance(error.record, Solution):
                raise
            solution, converged = error.record, False
        seconds, computed = _now() - began, time.process_time() - computed
        computed = float("nan") if torch.cuda.is_initialized() else computed
        longest = int(solution.iterations.max()) if solution.iterations.numel() else 0
        return Solve(
            seconds,
            computed,
            float(solution.evaluations),
            longest,
            converged,
            solution.reason,
            tuple(solution.history),
        )

    return solve


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Measurement:
    """Settings measured against each other.

    Attributes
    ----------
    entries
        Every setting that was tried: the finalists first, then the others that converge, each by their median.
    clock
        ``wall``, or ``cpu``: what seconds are of.
    """

    entries: list[Measured]
    clock: str


class Contest:
    """Solves of many settings, taking turns. Not collective, every method.

    Parameters
    ----------
    solve
        Solves with a setting.
    threads
        Of this process: the CPU time of one thread is what its wall time would be on a machine of its own.
    seed
        Of the order.
    progress
        Told what is being done.
    """

    def __init__(self, solve: Solver, threads: int, seed: int, progress: Callable[[str], None]) -> None:
        self.solve = solve
        self.threads = threads
        self.order = random.Random(seed)
        self.progress = progress
        self.measured: dict[Setting, Measured] = {}
        self.clock = "wall"

    def rounds(self, settings: Iterable[Setting], count: int, what: str) -> None:
        """Solve with each setting ``count`` times, in another order each round; one that has failed is left out."""
        entries = [self.measured.setdefault(s, Measured(s)) for s in dict.fromkeys(settings)]
        for number in range(count):
            self.progress(f"{what}: {len(entries)} settings, solve {number + 1} of {count}")
            self.order.shuffle(entries)
            for entry in entries:
                if entry.converged:
                    solve = self.solve(entry.setting)
                    entry.solves.append(solve if self.clock == "wall" else solve.on_cpu_clock())

    def choose_clock(self) -> None:
        """Go over to CPU time, for what was measured too, where other programs keep this process waiting."""
        solves = [solve for entry in self.measured.values() for solve in entry.solves]
        waiting = sum(solve.seconds for solve in solves) / sum(solve.cpu_seconds for solve in solves)
        if self.clock == "wall" and self.threads == 1 and waiting > 1.0 + WAITING:
            self.clock = "cpu"
            for entry in self.measured.values():
                entry.solves = [solve.on_cpu_clock() for solve in entry.solves]
            self.progress(
                f"other programs use these cores: solves take {waiting:.1f} times their CPU time, which is compared"
            )

    def between(self) -> list[Setting]:
        """Return the windows halfway from the best setting's to its neighbours among those tried, with its mixing."""
        converged = [entry for entry in self.measured.values() if entry.converged]
        best = min(converged, key=lambda entry: entry.fastest).setting
        windows = sorted({setting.window for setting in self.measured})
        place = windows.index(best.window)
        near = windows[max(place - 1, 0) : place + 2]
        pairs = zip(near, near[1:], strict=False)
        return [Setting((low + high) // 2, best.mixing) for low, high in pairs if high > low + 1]

    def finalists(self) -> list[Setting]:
        """Return the settings whose fastest solve is not slower than the fastest of all by more than `MARGIN`."""
        converged = [entry for entry in self.measured.values() if entry.converged]
        ranked = sorted(converged, key=lambda entry: entry.fastest)
        bound = (1.0 + MARGIN) * ranked[0].fastest
        return [entry.setting for entry in ranked[:FINALISTS] if entry.fastest <= bound]


def measure_settings(
    solve: Solver,
    windows: Sequence[int],
    mixings: Sequence[float],
    repeats: int,
    *,
    exhaustive: bool = False,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda told: None,
) -> Measurement:
    """Measure forward iteration and every window with every mixing.

    Not collective. Settings take turns, in another random order each round, so that what else the machine does meets all
    of them alike. After two rounds, windows between the best and its neighbours are tried with the best mixing, and only
    those settings go on that may still turn out best; forward iteration goes on as what the others are compared with. A
    setting that does not converge is not tried again.

    Parameters
    ----------
    windows, mixings
        The settings to begin with.
    repeats
        Solves of a setting that may be the best.
    exhaustive
        Measure every given setting so often, and no other.
    threads, seed, progress
        As in `Contest`.
    """
    contest = Contest(solve, threads, seed, progress)
    settings = [FORWARD, *(Setting(window, mixing) for window in windows for mixing in mixings)]
    solve(max(settings))  # the first solve of a process pays for what all others find ready
    scans = repeats if exhaustive else min(SCANS, repeats)
    contest.rounds(settings, scans, "scan")
    contest.choose_clock()
    measured = contest.measured
    if any(entry.converged for entry in measured.values()):
        finalists = list(measured)
        if not exhaustive:
            contest.rounds([s for s in contest.between() if s not in measured], scans, "between")
            finalists = contest.finalists()
            contest.rounds([FORWARD, *finalists], repeats - scans, "finalists")
            contest.choose_clock()
        for setting in finalists:
            measured[setting].finalist = measured[setting].converged
    ranked = sorted(measured.values(), key=lambda entry: (not entry.converged, not entry.finalist, entry.seconds))
    return Measurement(ranked, contest.clock)
