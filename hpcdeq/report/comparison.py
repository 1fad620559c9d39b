"""What runs say side by side: values at equal time and at equal work, and when a method is as good as the reference.

A run is worth, at a time, what its last iterate finished by then is worth: nothing is interpolated, and a method gets no
credit for an iteration that it has not finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hpcdeq.errors import DataError
from hpcdeq.problem.losses import LOSSES
from hpcdeq.report.plots import work
from hpcdeq.report.runs import Run
from hpcdeq.report.tables import Spread

SECONDS, WORK, ITERATIONS = "seconds", "work", "iterations"
TRAIN_LOSS, TRAIN, VALIDATION, BEST_VALIDATION, TEST = "train_loss", "train", "validation", "best_validation", "test"
# An end this close below the budget is the budget's end: the clock is looked at after an iteration.
CLOSE = 0.99


@dataclass(frozen=True)
class Method:
    """The runs of one method, a seed each."""

    name: str
    runs: Sequence[Run]


@dataclass(frozen=True)
class Trial:
    """A run of a scan of learning rates."""

    method: str
    learning_rate: float
    run: Run
    chosen: bool


@dataclass(frozen=True)
class Comparison:
    """Methods side by side.

    Attributes
    ----------
    methods
        In the order in which they are shown.
    reference
        Name of the method that the others are measured against.
    trials
        Runs of scans of learning rates.
    missing
        Number of runs that are still to come.
    """

    methods: Sequence[Method]
    reference: str
    trials: Sequence[Trial] = ()
    missing: int = 0
    _cache: dict[tuple[int, str], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = {run.summary["metric"]["name"]: run for run in self.runs}
        if len(names) > 1:
            told = ", ".join(f"{name} in {run.path}" for name, run in names.items())
            raise DataError(f"runs of different tasks cannot be compared: the metric is {told}")

    @property
    def runs(self) -> list[Run]:
        """All runs of the methods."""
        return [run for method in self.methods for run in method.runs]

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return str(self.runs[0].summary["metric"]["name"])

    @property
    def larger_is_better(self) -> bool:
        """Whether a larger metric is a better model."""
        known = {loss.metric: loss.larger_is_better for loss in LOSSES.values()}
        if self.metric not in known:
            raise DataError(f"unknown metric {self.metric!r} in {self.runs[0].path}: known are {', '.join(known)}")
        return known[self.metric]

    def larger(self, quantity: str) -> bool:
        """Say whether larger values of a quantity are better. Not collective."""
        return quantity != TRAIN_LOSS and self.larger_is_better

    @property
    def budget(self) -> float | None:
        """The bound on the seconds, where all runs have the same; else None."""
        bounds = {run.settings.get("max_seconds") for run in self.runs}
        bound = bounds.pop() if len(bounds) == 1 else None
        return float(bound) if bound is not None and math.isfinite(bound) else None

    # ------------------------------------------------------------------------------------------------- curves

    def values(self, run: Run, quantity: str) -> np.ndarray:
        """Return a quantity at each iterate of a run, ``(iterates,)``; NaN where not measured. Not collective."""
        key = (id(run), quantity)
        if key not in self._cache:
            self._cache[key] = _values(run, quantity, larger=self.larger_is_better)
        return self._cache[key]

    def end(self, kind: str) -> float:
        """Return the least seconds or work at which a run ended that could have gone on. Not collective.

        A run that converged or diverged is at its end: it does not keep the others from being looked at later.
        """
        ends = [(last(abscissa(run, kind)), run.summary["status"] == "budget") for run in self.runs]
        open_ends = [end for end, bounded in ends if bounded and not math.isnan(end)]
        known = [end for end, _ in ends if not math.isnan(end)]
        return min(open_ends) if open_ends else max(known, default=math.nan)

    def points(self, kind: str) -> list[float]:
        """Return the seconds or the work at which the methods are compared: a quarter, half and all of the budget.

        Not collective. Without a budget of time, and for work, that of the run that ended first (see `end`).
        """
        end = self.end(kind)
        whole = self.budget if kind == SECONDS and self.budget is not None else end
        points = {whole / 4, whole / 2, whole}
        if end < CLOSE * whole:
            points.add(end)
        return sorted(point for point in points if point > 0)

    def at(self, method: Method, quantity: str, kind: str, point: float) -> Spread | None:
        """Return what a method is worth at a time or at some work; None where nothing is known. Not collective."""
        return Spread.of(step(abscissa(run, kind), self.values(run, quantity), point) for run in method.runs)

    def final(self, run: Run, quantity: str) -> float:
        """Return what a run is worth at the end of the budget, NaN where that is not known. Not collective."""
        bound = self.budget if self.budget is not None else math.inf
        return step(abscissa(run, SECONDS), self.values(run, quantity), bound)

    # --------------------------------------------------------------------------------------------- comparisons

    def reaches(self, method: Method, quantity: str, kind: str) -> tuple[Spread | None, Spread | None]:
        """Return when a method is first as good as the reference is at its end, and how many times later.

        Not collective. Every seed is measured against the reference with the same seed, or against the median over the
        reference's seeds where there is none. The second is the method's time (or work) over the reference's to its own
        final value. Both are infinite where the method does not get there.
        """
        reference = next(m for m in self.methods if m.name == self.reference)
        larger = self.larger(quantity)
        targets = {run.summary["seed"]: self.final(run, quantity) for run in reference.runs}
        own = {
            run.summary["seed"]: first(
                abscissa(run, kind), self.values(run, quantity), targets[run.summary["seed"]], larger
            )
            for run in reference.runs
        }
        bound = self.budget if self.budget is not None else math.inf
        times, slowness = [], []
        for run in method.runs:
            seed = run.summary["seed"]
            target = targets.get(seed, _median(targets.values()))
            within = abscissa(run, SECONDS) <= bound
            time = first(abscissa(run, kind)[within], self.values(run, quantity)[within], target, larger)
            times.append(time)
            base = own.get(seed, _median(own.values()))
            slowness.append(time / base if base > 0 else math.nan)
        return Spread.of(times), Spread.of(slowness)


def best_of(comparison: Comparison) -> int:
    """Return the number of the best run: by the best validation metric, without any by the training loss.

    Not collective.
    """
    for quantity in (BEST_VALIDATION, TRAIN_LOSS):
        sign = 1.0 if comparison.larger(quantity) else -1.0
        values = [sign * comparison.final(run, quantity) for run in comparison.runs]
        if not all(math.isnan(value) for value in values):
            return max(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])
    return 0


def _median(values: Iterable[float]) -> float:
    found = Spread.of(values)
    return math.nan if found is None else found.median


def abscissa(run: Run, kind: str) -> np.ndarray:
    """Return seconds, work or iterations at each iterate of a run, ``(iterates,)``. Not collective."""
    by_kind: Mapping[str, Callable[[], np.ndarray]] = {
        SECONDS: lambda: run.history["wall_seconds"],
        WORK: lambda: work(run),
        ITERATIONS: lambda: run.history["iteration"],
    }
    return by_kind[kind]()


def last(x: np.ndarray) -> float:
    """Return the last entry, NaN without any. Not collective."""
    return float(x[-1]) if len(x) else math.nan


def step(x: np.ndarray, values: np.ndarray, at: float) -> float:
    """Return the last finite value whose abscissa is not above ``at``; NaN without one. Not collective."""
    known = np.flatnonzero(np.isfinite(values) & (x <= at))
    return float(values[known[-1]]) if len(known) else math.nan


def first(x: np.ndarray, values: np.ndarray, target: float, larger: bool) -> float:
    """Return the first abscissa at which a value is as good as the target; infinity without one, NaN without a target.

    Not collective.
    """
    if math.isnan(target):
        return math.nan
    with np.errstate(invalid="ignore"):
        good = np.flatnonzero(values >= target if larger else values <= target)
    return float(x[good[0]]) if len(good) else math.inf


def _values(run: Run, quantity: str, *, larger: bool) -> np.ndarray:
    history = run.history
    raw = history["validation_metric"]
    if quantity == VALIDATION:
        return raw
    if quantity == TRAIN_LOSS:
        # Of a minibatch method the history has the mean over the batches of an epoch, at weights on the way.
        return _evaluated(run, "train_loss") if run.evaluations else history["train_loss"]
    if quantity == TRAIN:
        return _evaluated(run, "train_metric") if run.evaluations else np.full(len(raw), np.nan)
    sign = 1.0 if larger else -1.0
    best = np.fmax.accumulate(np.where(np.isfinite(raw), sign * raw, -np.inf)) if len(raw) else raw
    if quantity == BEST_VALIDATION:
        return np.where(np.isfinite(best), sign * best, np.nan)
    if not run.evaluations:
        return _test_of_summary(run)
    test = _evaluated(run, "test_metric")
    if not np.isfinite(raw).any():
        return test
    improved = np.flatnonzero(np.diff(best, prepend=-np.inf) > 0)
    chosen = np.full(len(raw), np.nan)
    for begin, end in zip(improved, [*improved[1:], len(raw)], strict=True):
        chosen[begin:end] = test[begin]
    return chosen


def _evaluated(run: Run, column: str) -> np.ndarray:
    values = np.full(len(run.history["iteration"]), np.nan)
    rows = run.evaluations["row"].astype(int)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(values)):
        raise DataError(f"{run.path / 'evaluations.csv'} has row {rows.max()}, history.csv {len(values)} rows")
    values[rows] = run.evaluations[column]
    return values


def _test_of_summary(run: Run) -> np.ndarray:
    """Return the test metric of the iterate that the summary is of, from there on."""
    iteration = run.history["iteration"]
    found, at = run.summary["metric"]["test"], run.summary.get("evaluated_iteration")
    if found is None or at is None:
        return np.full(len(iteration), np.nan)
    return np.where(iteration >= at, float(found), np.nan)
