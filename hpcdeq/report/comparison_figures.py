"""The figures of a comparison: loss and metrics against seconds, work and iterations, median and range over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcdeq.report.comparison import (
    BEST_VALIDATION,
    ITERATIONS,
    SECONDS,
    TEST,
    TRAIN,
    TRAIN_LOSS,
    VALIDATION,
    WORK,
    Comparison,
    Method,
    abscissa,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart; the usual methods always have the same.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f3c8d", "#444444")
USUAL = {"trgn": 0, "adam": 1, "lbfgs": 2, "newton": 3}
LABELS = {
    SECONDS: "wall time (s)",
    WORK: "work (sample gradients)",
    ITERATIONS: "iterations (epochs of minibatch methods)",
}
NAMES = {
    TRAIN_LOSS: "training_loss.png",
    TRAIN: "training_metric.png",
    VALIDATION: "validation_metric.png",
    BEST_VALIDATION: "best_validation_metric.png",
    TEST: "test_metric.png",
}
DRAWN = (TRAIN_LOSS, TRAIN, VALIDATION, TEST)
# Values that span less than this factor are drawn on a linear axis.
SPAN = 2.5


def write_comparison_figures(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw each quantity that was measured, and return what was written by quantity.

    Not collective: one rank draws.

    Parameters
    ----------
    folder
        Where to; it is made.
    """
    # Importing matplotlib takes longer than a small run; a Figure without pyplot needs no display.
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(comparison)
    written: dict[str, Path] = {}
    for quantity in DRAWN:
        figure = Figure(figsize=(12.0, 4.4))
        panels = figure.subplots(1, 3, sharey=True)
        # Set by hand: a layout engine would take most of the time, and there is a report after every run.
        figure.subplots_adjust(left=0.075, right=0.99, bottom=0.135, top=0.9, wspace=0.05)
        drawn = [_panel(axes, comparison, quantity, kind, colours) for axes, kind in zip(panels, LABELS, strict=True)]
        if not any(drawn):
            continue
        panels[0].set_ylabel(_label(comparison, quantity))
        _scale(panels[0], [v for m in comparison.methods for r in m.runs for v in comparison.values(r, quantity)[1:]])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=max(1, len(labels)), frameon=False)
        written[quantity] = folder / NAMES[quantity]
        figure.savefig(written[quantity], dpi=130)
    return written


def _label(comparison: Comparison, quantity: str) -> str:
    metric = comparison.metric.replace("_", " ")
    return {
        TRAIN_LOSS: "training loss",
        TRAIN: f"training {metric}",
        VALIDATION: f"validation {metric}",
        TEST: f"test {metric}\nat the best validation so far",
    }[quantity]


def _colours(comparison: Comparison) -> dict[str, str]:
    """Return a colour for each method, the usual ones first."""
    names = [method.name for method in comparison.methods]
    chosen = {name: USUAL[name] for name in names if name in USUAL}
    free = [number for number in range(len(COLOURS)) if number not in chosen.values()]
    for name in names:
        if name not in chosen:
            chosen[name] = free.pop(0) if free else len(chosen) % len(COLOURS)
    return {name: COLOURS[number] for name, number in chosen.items()}


def _panel(axes: Axes, comparison: Comparison, quantity: str, kind: str, colours: dict[str, str]) -> bool:
    drawn = False
    for method in comparison.methods:
        found = band(comparison, method, quantity, kind)
        if found is None:
            continue
        x, median, low, high = found
        colour = colours[method.name]
        axes.plot(x, median, drawstyle="steps-post", color=colour, linewidth=1.8, label=method.name)
        axes.plot(x[-1:], median[-1:], marker="o", markersize=5, color=colour, linestyle="none")
        if (high > low).any():
            axes.fill_between(x, low, high, step="post", color=colour, alpha=0.18, linewidth=0)
        drawn = True
    if kind == ITERATIONS:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
    else:
        axes.set_xscale("log")
    if kind == SECONDS and comparison.budget is not None:
        axes.axvline(comparison.budget, color="0.6", linewidth=1, linestyle=":")
    axes.set_xlabel(LABELS[kind])
    axes.grid(True, which="major", color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return drawn


def band(
    comparison: Comparison, method: Method, quantity: str, kind: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return x, median, low and high over the seeds of a method, ``(points,)`` each; None where nothing was measured.

    Not collective. The points are all iterates of all seeds, from where every seed has a value; a seed that has ended
    stays at its last value.
    """
    lines = []
    for run in method.runs:
        x, y = abscissa(run, kind), comparison.values(run, quantity)
        known = np.isfinite(x) & np.isfinite(y)
        if known.any():
            lines.append((x[known], y[known]))
    if not lines:
        return None
    begin = max(x[0] for x, _ in lines)
    points = np.unique(np.concatenate([x for x, _ in lines]))
    points = points[points >= begin]
    table = np.array([y[np.searchsorted(x, points, side="right") - 1] for x, y in lines])
    return points, np.median(table, axis=0), table.min(axis=0), table.max(axis=0)


def _scale(axes: Axes, values: list[float]) -> None:
    """Make the axis of the values logarithmic where they span enough, with plain numbers where they span little."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    known = np.array([value for value in values if np.isfinite(value)])
    if not known.size or known.min() <= 0 or known.max() < SPAN * known.min():
        return
    axes.set_yscale("log")
    if known.max() < 100 * known.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
