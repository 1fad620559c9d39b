"""The figure of a study of Anderson's window and mixing: residuals, times to tolerance, and the mixing penalty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdeq.tuning import Crossover, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

FORWARD_COLOUR, BEST_COLOUR, TOLERANCE_COLOUR = "#333333", "#c8102e", "0.55"
MIXING_COLOURS = ("#1f5fa8", "#d1702a", "#3a8a4d", "#7b5aa6", "#8c6d31", "#4aa3b5")
MARKERS = ("o", "s", "^", "D", "v", "P")
CURVES = 6  # windows drawn in the residual diagrams, besides the best: more cannot be told apart


def write_crossover_figure(
    path: Path, title: str, measured: Sequence[Measured], found: Crossover, tolerance: float
) -> None:
    """Draw residual against time and evaluations, time against window, and what a window saves and costs.

    Not collective: one rank draws.

    Parameters
    ----------
    path
        The PNG to write; its folder is made.
    title
        What was measured.
    measured, found
        As `measure_settings` and `find_crossover` return them.
    tolerance
        That the solves were to reach.
    """
    # Importing matplotlib takes seconds; a Figure without pyplot needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 8.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(2, 2)
    seconds = "CPU seconds" if found.clock == "cpu" else "seconds"
    _residuals(axes[0][0], found, tolerance, column=1, label=seconds)
    _residuals(axes[0][1], found, tolerance, column=0, label="cell evaluations a sample")
    axes[0][0].set_ylabel("largest relative residual of a sample")
    axes[0][1].legend(frameon=False, fontsize=9, ncols=2, loc="upper right", columnspacing=1.2, borderaxespad=0.0)
    _times(axes[1][0], measured, found)
    axes[1][0].set_ylabel(f"{seconds} (median, and range)")
    _penalty(axes[1][1], found)
    mixing = f"mixing {found.best.setting.mixing:g}"
    titles = (
        f"Residual against time ({mixing})",
        f"Residual against evaluations ({mixing})",
        "Time to the tolerance",
        f"What a longer window saves and costs ({mixing})",
    )
    for panel, name in zip(axes.flat, titles, strict=True):
        panel.set_title(name, loc="left", fontsize=10.5)
        panel.grid(True, which="major", color="0.92")
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _drawn(found: Crossover) -> list[Measured]:
    """Return the windows to draw residuals of: the best one, the ends, and some evenly between."""
    family = [entry for entry in found.family if entry.setting.window > 0]
    if len(family) <= CURVES:
        return family
    step = (len(family) - 1) / (CURVES - 1)
    places = {round(step * number) for number in range(CURVES)} | {
        place for place, entry in enumerate(family) if entry is found.best
    }
    return [family[place] for place in sorted(places)]


def _residuals(axes: Axes, found: Crossover, tolerance: float, column: int, label: str) -> None:
    from matplotlib import colormaps

    drawn = _drawn(found)
    colours = colormaps["viridis"]
    _curve(axes, found.forward, column, color=FORWARD_COLOUR, linewidth=1.8, linestyle=(0, (5, 1.5)), label="forward")
    for place, entry in enumerate(drawn):
        label_of_window = f"window {entry.setting.window}"
        if entry is found.best:
            style: dict[str, Any] = {
                "color": BEST_COLOUR,
                "linewidth": 2.4,
                "zorder": 3,
                "label": f"{label_of_window} (best)",
            }
        else:
            shade = colours(0.9 * place / max(len(drawn) - 1, 1))
            style = {"color": shade, "linewidth": 1.3, "label": label_of_window}
        _curve(axes, entry, column, **style)
    axes.axhline(tolerance, color=TOLERANCE_COLOUR, linewidth=1, linestyle=":")
    axes.annotate(
        f"tolerance {tolerance:g}",
        (0.01, tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        color="0.4",
        fontsize=8,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(label)
    _plain_numbers(axes.xaxis, *axes.get_xlim())


def _curve(axes: Axes, entry: Measured, column: int, **style: Any) -> None:
    points = [row for row in entry.typical.history if row[column] > 0 and row[2] > 0]
    axes.plot([row[column] for row in points], [row[2] for row in points], **style)


def _times(axes: Axes, measured: Sequence[Measured], found: Crossover) -> None:
    mixings = sorted({e.setting.mixing for e in measured if e.setting.window > 0 and e.converged}, reverse=True)
    windows: set[int] = set()
    told = False
    for number, mixing in enumerate(mixings):
        entries = sorted(
            (e for e in measured if e.setting.window > 0 and e.setting.mixing == mixing and e.converged),
            key=lambda e: e.setting,
        )
        colour = MIXING_COLOURS[number % len(MIXING_COLOURS)]
        x = [entry.setting.window for entry in entries]
        windows.update(x)
        y = [entry.seconds for entry in entries]
        axes.plot(
            x,
            y,
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
            color=colour,
            label=f"mixing {mixing:g}",
        )
        lost = [
            e.setting.window for e in measured if e.setting.mixing == mixing and not e.converged and e.setting.window
        ]
        windows.update(lost)
        axes.plot(
            lost,
            [0.03] * len(lost),
            marker="x",
            color=colour,
            linestyle="none",
            transform=axes.get_xaxis_transform(),
            label="does not converge" if lost and not told else None,  # once for all colours: the axes are small
        )
        told = told or bool(lost)
        ends = [[solve.seconds for solve in entry.solves] for entry in entries]
        axes.vlines(x, [min(e) for e in ends], [max(e) for e in ends], color=colour, linewidth=1, alpha=0.5)
    if found.forward.converged:
        axes.axhline(
            found.forward.seconds,
            color=FORWARD_COLOUR,
            linewidth=1.5,
            linestyle=(0, (5, 1.5)),
            label="forward iteration",
        )
    best = found.best
    if best.setting.window > 0:
        axes.plot(
            best.setting.window,
            best.seconds,
            marker="*",
            markersize=17,
            color=BEST_COLOUR,
            markeredgecolor="white",
            linestyle="none",
            zorder=5,
            label=f"best: window {best.setting.window}, mixing {best.setting.mixing:g}, {best.seconds:.3g} s",
        )
    _window_axis(axes, sorted(windows))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    _plain_numbers(axes.yaxis, *axes.get_ylim())
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right", columnspacing=1.2, borderaxespad=0.0)


def _plain_numbers(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with numbers as they are, also where it does not span a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    span = high / low
    steps = (
        (1.0,) if span > 100 else (1.0, 2.0, 5.0) if span > 4 else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    )
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _window_axis(axes: Axes, windows: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(list(windows), [str(window) for window in windows])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("window (vectors mixed)")


def _penalty(axes: Axes, found: Crossover) -> None:
    family = [entry for entry in found.family if entry.setting.window > 0]
    if len(family) < 2:
        axes.text(0.5, 0.5, "one window only: nothing to compare", ha="center", transform=axes.transAxes, color="0.4")
        return
    first = family[0]
    x = [entry.setting.window for entry in family]
    lines = (
        ("evaluations", [e.evaluations / first.evaluations for e in family], MIXING_COLOURS[0], "-", 1.5),
        (
            "time of one evaluation",
            [e.seconds_per_evaluation / first.seconds_per_evaluation for e in family],
            MIXING_COLOURS[1],
            "-",
            1.5,
        ),
        ("time, their product", [e.seconds / first.seconds for e in family], BEST_COLOUR, "-", 2.4),
    )
    for label, y, colour, style, width in lines:
        axes.plot(x, y, marker="o", markersize=4, color=colour, linestyle=style, linewidth=width, label=label)
    if found.best.setting.window > 0:
        left = found.best is family[-1]  # there is no room at its right
        axes.axvline(found.best.setting.window, color=TOLERANCE_COLOUR, linewidth=1, linestyle=":")
        axes.annotate(
            "crossover" if found.longer is not None or found.failed else "best",
            (found.best.setting.window, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, 0),
            textcoords="offset points",
            va="bottom",
            ha="right" if left else "left",
            color="0.4",
            fontsize=8,
        )
    _window_axis(axes, x)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"relative to window {first.setting.window}, mixing {found.best.setting.mixing:g}")
    axes.legend(frameon=False, fontsize=9)
