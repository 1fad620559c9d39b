"""The figures of a classifier's evaluation: its confusion matrix, and how far its probabilities can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcdeq.record.atomic import replaced
from hpcdeq.report.classification import ClassScores, wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
MARKERS = ("o", "s", "^", "D")
MOST_WRITTEN = 20  # with more classes than this, numbers in the cells cannot be read
LONG_NAME = 9  # letters; longer names below the columns are turned where there are many
INCHES = 1.05  # of a cell of few classes; many share what a page has
WIDEST = 9.0


def write_confusion_figure(path: Path, title: str, scores: ClassScores, classes: Sequence[str]) -> None:
    """Draw a confusion matrix: colours and percentages of each true class, and counts.

    Not collective: one rank draws.

    Parameters
    ----------
    path
        The PNG to write.
    title
        What was evaluated.
    scores
        Of the classifier.
    classes
        Names.
    """
    # Importing matplotlib takes seconds; a Figure without pyplot needs no display.
    from matplotlib.figure import Figure

    number = len(classes)
    side = min(max(INCHES * number, 2.4), WIDEST)
    longest = max(len(name) for name in classes)
    figure = Figure(figsize=(side + 1.6 + 0.07 * min(longest, 30), side + 1.4), layout="constrained")
    axes = figure.subplots()
    support = scores.confusion.sum(axis=1, keepdims=True)
    share = np.divide(scores.confusion, support, out=np.zeros((number, number)), where=support > 0)
    # The figure has the shape of the matrix and its labels, so that the cells are nearly square; a forced aspect would push the
    # labels out of it.
    image = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    cell = 72 * side / number  # points
    if number <= MOST_WRITTEN:
        size = min(11.0, cell / 4.2)
        for row, column in np.ndindex(number, number):
            count = int(scores.confusion[row, column])
            percent = f"{100 * share[row, column]:.0f} %" if support[row, 0] else "–"
            dark = share[row, column] > 0.55
            axes.text(
                column,
                row,
                f"{count:,}\n{percent}",
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else "0.1" if count else "0.65",
            )
    turned = longest > LONG_NAME and longest * 5.5 > cell
    axes.set_xticks(range(number), classes, rotation=35 if turned else 0, ha="right" if turned else "center")
    if turned:
        axes.tick_params(axis="x", pad=1)
    named = [f"{name}\n({int(n):,})" for name, n in zip(classes, support[:, 0], strict=True)]
    axes.set_yticks(range(number), named if number <= MOST_WRITTEN else list(classes))
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class (samples)")
    axes.set_title(f"{title}\naccuracy {scores.accuracy:.3f}, balanced {scores.balanced_accuracy:.3f}", fontsize=10.5)
    axes.set_xticks(np.arange(number - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(number - 1) + 0.5, minor=True)
    axes.grid(True, which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
    bar.set_label("fraction of the true class")
    bar.outline.set_visible(False)
    _save(figure, path)


def write_calibration_figure(path: Path, title: str, scores: Mapping[str, ClassScores]) -> None:
    """Draw accuracy against confidence, and how many samples are how confident.

    Not collective: one rank draws.

    Parameters
    ----------
    path
        The PNG to write.
    title
        What was evaluated.
    scores
        By the classifier's name, at most four; the first is the one in question.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 6.0), layout="constrained")
    figure.suptitle(title, fontsize=10.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated")
    for place, (name, found) in enumerate(scores.items()):
        _reliability(upper, name, found, COLOURS[place], MARKERS[place])
    edges = [scores_bin.low for scores_bin in next(iter(scores.values())).bins] + [1.0]
    for place, found in enumerate(scores.values()):
        shares = [item.count / found.count for item in found.bins]
        lower.stairs(
            shares, edges, color=COLOURS[place], fill=place == 0, alpha=0.6 if place == 0 else 1.0, linewidth=1.5
        )
    upper.set_ylabel("fraction correct")
    upper.set_ylim(-0.03, 1.03)
    upper.set_xlim(-0.02, 1.02)
    upper.legend(frameon=False, fontsize=9, loc="upper left")
    lower.set_ylabel("samples (share)")
    lower.set_xlabel("confidence: probability of the predicted class")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(True, which="major", color="0.9")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    _save(figure, path)


def _reliability(axes: Axes, name: str, scores: ClassScores, colour: str, marker: str) -> None:
    filled = [item for item in scores.bins if item.count]
    confidence, accuracy = (np.array([getattr(item, field) for item in filled]) for field in ("confidence", "accuracy"))
    ends = np.array([wilson_interval(round(item.accuracy * item.count), item.count) for item in filled])
    bars = np.clip([accuracy - ends[:, 0], ends[:, 1] - accuracy], 0.0, None)
    axes.errorbar(
        confidence,
        accuracy,
        bars,
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.5,
        elinewidth=1,
        capsize=2,
        label=f"{name}, calibration error {scores.calibration_error:.3f}",
    )


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
