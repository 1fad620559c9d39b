"""Figures of a run: loss and metric against time and work, and what the fixed points took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcdeq.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION = "#1f5fa8", "#d1702a"
MARKED = 60  # with more iterates than this, markers hide the line


def work(run: Run) -> np.ndarray:
    """Return the work at each iterate of a run, ``(iterates,)``, in gradients of one sample.

    Not collective. A loss counts a third (a forward pass, and the backward pass costs two), a Gauss-Newton or Hessian
    product two.
    """
    h = run.history
    return h["gradients"] + h["losses"] / 3 + 2 * (h["gauss_newton_products"] + h["hessian_products"])


def write_figures(run: Run, folder: Path | None = None) -> list[Path]:
    """Draw loss.png, metric.png and fixed_points.png, each if the history has it, and return what was written.

    Not collective: one rank draws.

    Parameters
    ----------
    folder
        Where to; default: ``figures`` in the run directory.
    """
    folder = run.path / "figures" if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    metric = str(run.summary["metric"]["name"]).replace("_", " ")
    drawn: dict[str, Figure] = {}
    if len(run.history["iteration"]):
        losses = [("training", "train_loss", TRAIN), ("validation", "validation_loss", VALIDATION)]
        drawn["loss.png"] = _against_time_and_work(run, losses, "loss", logarithmic=True)
        if np.isfinite(run.history["validation_metric"]).any():
            columns = [("validation", "validation_metric", VALIDATION)]
            drawn["metric.png"] = _against_time_and_work(run, columns, metric, logarithmic=False)
        if np.isfinite(run.history["fixed_point_iterations_mean"]).any():
            drawn["fixed_points.png"] = _fixed_points(run)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in drawn]


def _new_figure(run: Run, width: float) -> Figure:
    # Importing matplotlib takes longer than a small run's last iteration; a Figure without pyplot needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.8), layout="constrained")
    summary = run.summary
    figure.suptitle(f"{summary['model']}, {summary['optimizer']}, seed {summary['seed']}", fontsize=11)
    return figure


def _against_time_and_work(
    run: Run, columns: Sequence[tuple[str, str, str]], label: str, *, logarithmic: bool
) -> Figure:
    from matplotlib.ticker import EngFormatter

    figure = _new_figure(run, 9.0)
    left, right = figure.subplots(1, 2, sharey=True)
    abscissae = (
        (left, run.history["wall_seconds"], "wall time (s)"),
        (right, work(run), "work (sample gradients:\ngradients + losses/3 + 2 × curvature products)"),
    )
    for axes, x, name in abscissae:
        for legend, column, colour in columns:
            _line(axes, x, run.history[column], legend, colour)
        axes.set_xlabel(name)
        _finish(axes)
    left.set_ylabel(label)
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    shown = np.concatenate([run.history[column] for _, column, _ in columns])
    shown = shown[np.isfinite(shown)]
    if logarithmic and shown.size and shown.min() > 0:
        left.set_yscale("log")
    return figure


def _fixed_points(run: Run) -> Figure:
    figure = _new_figure(run, 6.0)
    axes = figure.subplots()
    h = run.history
    _line(axes, h["iteration"], h["fixed_point_iterations_max"], "slowest sample", VALIDATION)
    _line(axes, h["iteration"], h["fixed_point_iterations_mean"], "mean of the samples", TRAIN)
    axes.set_xlabel("iteration of the optimiser")
    axes.set_ylabel("iterations of a fixed-point solve")
    axes.set_ylim(bottom=0)
    _finish(axes)
    return figure


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, colour: str) -> None:
    measured = np.isfinite(x) & np.isfinite(y)
    if measured.any():
        marker = "o" if measured.sum() <= MARKED else ""
        axes.plot(x[measured], y[measured], marker=marker, markersize=3, linewidth=1.5, color=colour, label=label)


def _finish(axes: Axes) -> None:
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
