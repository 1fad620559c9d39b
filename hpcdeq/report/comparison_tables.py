"""The tables of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpcdeq.report.comparison import (
    BEST_VALIDATION,
    SECONDS,
    TEST,
    TRAIN,
    TRAIN_LOSS,
    WORK,
    Comparison,
    Method,
    abscissa,
    last,
)
from hpcdeq.report.runs import Run
from hpcdeq.report.tables import NEVER, Row, Spread, comparison_table, digits

QUANTITIES = (TEST, BEST_VALIDATION, TRAIN, TRAIN_LOSS)
COUNTS = ("losses", "cell_jvps", "cell_vjps")  # the others are in every table of runs
FACTS = (
    "message",
    "parameters",
    "ranks",
    "threads",
    "dtype",
    "device",
    "energy_joules",
    "evaluated_iteration",
    "products_per_iteration",
    "initial_weights",
)


def title_of(comparison: Comparison, quantity: str) -> str:
    """Return a quantity in words. Not collective."""
    metric = comparison.metric.replace("_", " ")
    return {
        TRAIN_LOSS: "training loss",
        TRAIN: f"training {metric}",
        BEST_VALIDATION: f"best validation {metric}",
        TEST: f"test {metric} at best validation",
    }[quantity]


def run_rows(comparison: Comparison) -> list[Row]:
    """Return a row for every run with everything that is known of it, those of scans last. Not collective."""
    entries = [(method.name, "comparison", run) for method in comparison.methods for run in method.runs]
    shown = {id(run) for run in comparison.runs}
    entries += [(t.method, "learning-rate scan", t.run) for t in comparison.trials if id(t.run) not in shown]
    phases = sorted({name for _, _, run in entries for name in run.summary.get("phases") or {}})
    rows: list[Row] = []
    for (name, part, run), base in zip(entries, comparison_table(run for *_, run in entries), strict=True):
        summary = run.summary
        row: Row = {"method": name, "part": part, **base, "learning rate": run.settings.get("learning_rate")}
        row["work"] = _number(last(abscissa(run, WORK)))
        for quantity in QUANTITIES:
            row[f"{quantity} within budget"] = _number(comparison.final(run, quantity))
        row |= {"train metric": summary["metric"].get("train")}
        row |= {f"{split} loss": summary["loss"].get(split) for split in ("validation", "test")}
        row |= {count: summary["counts"].get(count) for count in COUNTS}
        row |= {f"fixed point {key}": value for key, value in (summary.get("fixed_point") or {}).items()}
        row |= {f"{split} without fixed point": number for split, number in (summary.get("left_out") or {}).items()}
        row |= {fact: summary.get(fact) for fact in FACTS}
        row |= {f"seconds {phase}": (summary.get("phases") or {}).get(phase) for phase in phases}
        rows.append(row)
    return rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def equal_rows(comparison: Comparison, quantity: str, kind: str) -> list[Row]:
    """Return a row for each method, a column for each time (or amount of work) at which they are compared; bold: the best.

    Not collective.
    """
    points = comparison.points(kind)
    heads = [f"{digits(point, 3)}{' s' if kind == SECONDS else ''}" for point in points]
    rows: list[Row] = [
        {"method": m.name, **{h: comparison.at(m, quantity, kind, p) for h, p in zip(heads, points, strict=True)}}
        for m in comparison.methods
    ]
    return _marked(rows, heads, comparison.larger(quantity))


def _marked(rows: list[Row], names: Sequence[str], larger: bool) -> list[Row]:
    """Mark the best median of each column, where there is more than one."""
    for name in names:
        found = [row[name] for row in rows]
        medians = [cell.median for cell in found if isinstance(cell, Spread) and math.isfinite(cell.median)]
        if len(medians) < 2:
            continue
        best = max(medians) if larger else min(medians)
        for row in rows:
            cell = row[name]
            if isinstance(cell, Spread) and cell.median == best:
                row[name] = cell.marked()
    return rows


def end_rows(comparison: Comparison) -> list[Row]:
    """Return what each method ended with. Not collective."""
    names = {quantity: title_of(comparison, quantity) for quantity in QUANTITIES}
    rows: list[Row] = []
    for method in comparison.methods:
        row: Row = {"method": method.name, "seeds": len(method.runs)}
        for quantity, name in names.items():
            row[name] = Spread.of(comparison.final(run, quantity) for run in method.runs)
        row["iterations"] = Spread.of(float(run.summary["iterations"]) for run in method.runs)
        row["seconds"] = Spread.of(last(abscissa(run, SECONDS)) for run in method.runs)
        row["work"] = Spread.of(last(abscissa(run, WORK)) for run in method.runs)
        rows.append(row)
    for quantity, name in names.items():
        _marked(rows, [name], comparison.larger(quantity))
    return rows


def reach_rows(comparison: Comparison, quantity: str) -> list[Row]:
    """Return when each method is first as good as the reference is at its end. Not collective."""
    rows: list[Row] = []
    for method in comparison.methods:
        row: Row = {"method": method.name}
        for kind, unit in ((SECONDS, "seconds"), (WORK, "work")):
            times, slowness = comparison.reaches(method, quantity, kind)
            row[unit] = times
            row[f"{comparison.reference} / method, {unit}"] = _factor(slowness)
        rows.append(row)
    return rows


def _factor(slowness: Spread | None) -> str | None:
    """Return how many times sooner as text, from how many times later."""
    if slowness is None:
        return None
    ends = (slowness.median, slowness.high, slowness.low)
    words = [f"{1 / value:.3g}×" if math.isfinite(value) else NEVER for value in ends]
    return words[0] if slowness.low == slowness.high else f"{words[0]} ({words[1]} – {words[2]})"


def trial_rows(comparison: Comparison) -> list[Row]:
    """Return a row for each run of the scans of learning rates. Not collective."""
    rows: list[Row] = []
    for trial in comparison.trials:
        row: Row = {
            "method": trial.method,
            "learning rate": f"{trial.learning_rate:g}",
            "seed": trial.run.summary["seed"],
        }
        for quantity in (BEST_VALIDATION, TRAIN_LOSS):
            row[title_of(comparison, quantity)] = _number(comparison.final(trial.run, quantity))
        rows.append({**row, "status": trial.run.summary["status"], "chosen": "**yes**" if trial.chosen else ""})
    return rows


def outcome_rows(comparison: Comparison) -> list[Row]:
    """Return how each method ended, what it spent on an iteration, and where its time went. Not collective."""
    phases = list(dict.fromkeys(name for run in comparison.runs for name in run.summary.get("phases") or {}))
    rows: list[Row] = []
    for method in comparison.methods:
        row: Row = {
            "method": method.name,
            "status": _distinct(method, "status"),
            "reason": _distinct(method, "reason"),
            "message": _distinct(method, "message"),
            "curvature products an iteration": Spread.of(_products(run) for run in method.runs),
        }
        for phase in phases:
            row[f"% {phase}"] = Spread.of(_share(run, phase) for run in method.runs)
        rows.append(row)
    return rows


def _distinct(method: Method, key: str) -> str:
    told = [str(run.summary.get(key) or "–") for run in method.runs]
    return "; ".join(
        text if told.count(text) == len(told) else f"{text} ({told.count(text)} of {len(told)} seeds)"
        for text in dict.fromkeys(told)
    )


def _products(run: Run) -> float:
    told = run.summary.get("products_per_iteration")
    if isinstance(told, (int, float)):
        return float(told)
    return math.nan


def _share(run: Run, phase: str) -> float:
    phases = run.summary.get("phases") or {}
    whole = sum(phases.values())
    return round(100.0 * phases[phase] / whole, 1) if phase in phases and whole else math.nan


def weight_rows(comparison: Comparison) -> list[Row]:
    """Return a fingerprint of the initial weights of each method (columns) and seed (rows). Not collective."""
    seeds = sorted({run.summary["seed"] for run in comparison.runs})
    rows: list[Row] = []
    for seed in seeds:
        row: Row = {"seed": str(seed)}
        for method in comparison.methods:
            run = next((run for run in method.runs if run.summary["seed"] == seed), None)
            found = None if run is None else run.summary.get("initial_weights")
            row[method.name] = None if found is None else f"`{found[:12]}`"
        rows.append(row)
    return rows
