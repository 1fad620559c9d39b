"""The report of a classifier's evaluation: evaluation.json, evaluation.md, predictions.csv and two figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq import __version__
from hpcdeq.errors import HpcdeqError
from hpcdeq.record import RunDirectory
from hpcdeq.report.baselines import MAJORITY, Baseline
from hpcdeq.report.classification import ClassScores, class_scores
from hpcdeq.report.classification_figures import write_calibration_figure, write_confusion_figure
from hpcdeq.report.document import Block, Document, Figure, Heading, Paragraph, Table, document_markdown
from hpcdeq.report.tables import Row

FORMAT, VERSION = "hpcdeq-evaluation", 1
INTERVAL = "95 % interval"
HOW = """\
The interval of the accuracy is Wilson's, for the samples as a random draw. Balanced accuracy is the mean recall of the classes \
that occur; macro F1 the mean F1 of the classes that occur or are predicted. The log loss is in nats, the Brier score is summed \
over the classes (0 to 2), and the calibration error is the expected one over bins of equal width. A dash is not defined: ROC \
AUC is that of two classes, both of them present."""


@dataclass(frozen=True)
class Evaluated:
    """What a classifier says of the ``N`` samples of a split, and what baselines say of them.

    Attributes
    ----------
    model
        Its name in the registry of models.
    classes
        Names of the classes.
    ids, labels, probabilities, converged
        ``N`` names, ``(N,)`` true classes, ``(N, C)``, and ``(N,)`` whether each sample's fixed points were found.
    baselines
        Of the same samples; empty if none were wanted.
    facts
        Further facts for evaluation.json, and the first table: run, data, split.
    """

    model: str
    classes: tuple[str, ...]
    ids: Sequence[str]
    labels: np.ndarray
    probabilities: np.ndarray
    converged: np.ndarray
    baselines: Sequence[Baseline] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> np.ndarray:
        """``(N,)`` whether the classifier has an answer: fixed points found, and probabilities finite."""
        return self.converged & np.isfinite(self.probabilities).all(axis=1)


def write_evaluation(evaluated: Evaluated, directory: RunDirectory) -> str:
    """Write the report, and return its table for the terminal.

    Not collective: one rank writes; each file is replaced in one step.

    Raises
    ------
    HpcdeqError
        No sample has an answer, or a file cannot be written.
    """
    answered = evaluated.answered
    if not answered.any():
        raise HpcdeqError(
            f"none of the {len(answered)} samples has an answer: their fixed points were not found."
            " Likely fix: -deq_snes_max_it 1000, or -deq_snes_fallback ngmres,newtonls"
        )
    labels = evaluated.labels[answered]
    scores = {evaluated.model: class_scores(labels, evaluated.probabilities[answered])}
    for baseline in evaluated.baselines:
        if baseline.probabilities is not None:
            scores[baseline.name] = class_scores(labels, baseline.probabilities[answered])
    figures = {
        "confusion": directory.path / "figures" / "confusion.png",
        "calibration": directory.path / "figures" / "calibration.png",
    }
    title = f"{evaluated.model}, {evaluated.facts.get('split', '')} samples of {Path(str(evaluated.facts.get('data', ''))).name}"
    try:
        write_confusion_figure(figures["confusion"], title, scores[evaluated.model], evaluated.classes)
        # The majority class has one confidence for all samples: nothing to draw.
        drawn = {name: found for name, found in scores.items() if name != MAJORITY}
        write_calibration_figure(figures["calibration"], title, drawn)
    except OSError as error:
        raise HpcdeqError(f"cannot write the figures in {directory.path}: {error.strerror}") from error
    directory.write_text("predictions.csv", predictions_text(evaluated))
    rows = score_rows(evaluated, scores)
    document = Document(f"Evaluation of {evaluated.model}", [*_overview(evaluated, rows), *_details(evaluated, scores)])
    directory.write_text("evaluation.md", document_markdown(document))
    directory.write_json("evaluation.json", _numbers(evaluated, scores))
    return terminal_text(rows)


def predictions_text(evaluated: Evaluated) -> str:
    """Return a row a sample as CSV: id, label, predicted, a probability for each class, converged.

    Not collective. Prediction and probabilities are empty where they are no numbers.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "predicted", *(f"p_{name}" for name in evaluated.classes), "converged"])
    finite = np.isfinite(evaluated.probabilities).all(axis=1)
    for row, name in enumerate(evaluated.ids):
        p = evaluated.probabilities[row]
        found = (
            [evaluated.classes[int(p.argmax())], *(f"{value:.9g}" for value in p)]
            if finite[row]
            else [""] * (len(p) + 1)
        )
        told = str(bool(evaluated.converged[row])).lower()
        writer.writerow([name, evaluated.classes[int(evaluated.labels[row])], *found, told])
    return text.getvalue()


def score_rows(evaluated: Evaluated, scores: Mapping[str, ClassScores]) -> list[Row]:
    """Return a row of numbers for the classifier and each baseline; what was not computed is None. Not collective."""
    rows: list[Row] = [_row(evaluated.model, scores[evaluated.model])]
    rows += [_row(baseline.name, scores.get(baseline.name), baseline.told) for baseline in evaluated.baselines]
    return rows


def _row(name: str, scores: ClassScores | None, told: str = "") -> Row:
    if scores is None:
        others = ("balanced accuracy", "macro F1", "ROC AUC", "log loss", "Brier", "calibration error")
        return {"": name, "accuracy": None, INTERVAL: told, **dict.fromkeys(others)}
    low, high = scores.accuracy_interval
    return {
        "": name,
        "accuracy": scores.accuracy,
        INTERVAL: f"{low:.3f} – {high:.3f}",
        "balanced accuracy": scores.balanced_accuracy,
        "macro F1": scores.macro_f1,
        "ROC AUC": _known(scores.roc_auc),
        "log loss": scores.log_loss,
        "Brier": scores.brier,
        "calibration error": scores.calibration_error,
    }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def terminal_text(rows: Sequence[Row]) -> str:
    """Return rows as aligned columns, numbers to three decimals. Not collective."""
    names = list(rows[0])
    lines = [names, *([_short(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if c == 0 else text.rjust(w) for c, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _overview(evaluated: Evaluated, rows: Sequence[Row]) -> list[Block]:
    facts: list[Row] = [{"": name, "value": str(value)} for name, value in evaluated.facts.items() if value is not None]
    blocks: list[Block] = [Table([{"": "samples", "value": f"{len(evaluated.ids):,}"}, *facts])]
    lost = len(evaluated.ids) - int(evaluated.answered.sum())
    if lost:
        counted = _accuracy_of_all(evaluated)
        blocks.append(
            Paragraph(
                f"{lost} of {len(evaluated.ids)} samples have no fixed point to the run's tolerance. They are left out below, for"
                f" the baselines too; counted as wrong, the accuracy of {evaluated.model} is {counted:.4f}.",
                warning=True,
            )
        )
    blocks += [Heading("Beside the baselines"), Table(rows), Paragraph(HOW)]
    blocks += [Paragraph(f"{baseline.name}: {baseline.told}.") for baseline in evaluated.baselines]
    return blocks


def _accuracy_of_all(evaluated: Evaluated) -> float:
    """Return the accuracy with samples without an answer counted as wrong."""
    right = evaluated.probabilities[evaluated.answered].argmax(axis=1) == evaluated.labels[evaluated.answered]
    return float(right.sum() / len(evaluated.labels))


def _details(evaluated: Evaluated, scores: Mapping[str, ClassScores]) -> list[Block]:
    own, classes = scores[evaluated.model], evaluated.classes
    confusion: list[Row] = [
        {"true class": name, **{f"→ {other}": int(n) for other, n in zip(classes, own.confusion[place], strict=True)}}
        for place, name in enumerate(classes)
    ]
    per_class: list[Row] = [
        {
            "class": name,
            "samples": int(own.confusion[place].sum()),
            "predicted": int(own.confusion[:, place].sum()),
            "precision": _known(own.precision[place]),
            "recall": _known(own.recall[place]),
            "F1": _known(own.f1[place]),
        }
        for place, name in enumerate(classes)
    ]
    bins: list[Row] = [
        {
            "confidence": f"{item.low:.2g} – {item.high:.2g}",
            "samples": item.count,
            "mean confidence": _known(item.confidence),
            "accuracy": _known(item.accuracy),
        }
        for item in own.bins
    ]
    return [
        Heading("Confusion matrix"),
        Table(confusion),
        Figure(
            "figures/confusion.png",
            "Samples by true and predicted class; colours and percentages are of the true class.",
        ),
        Heading("Classes"),
        Table(per_class),
        Heading("Calibration"),
        Table(bins),
        Figure(
            "figures/calibration.png",
            "Accuracy against confidence, with 95 % intervals, and the share of samples in each bin.",
        ),
    ]


def _numbers(evaluated: Evaluated, scores: Mapping[str, ClassScores]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "hpcdeq": __version__,
        "model": evaluated.model,
        **evaluated.facts,
        "classes": list(evaluated.classes),
        "samples": len(evaluated.ids),
        "unconverged": int((~evaluated.converged).sum()),
        "without_answer": int((~evaluated.answered).sum()),
        "accuracy_without_answer_wrong": _accuracy_of_all(evaluated),
        "scores": scores[evaluated.model].as_dict(),
        "baselines": {
            baseline.name: {
                "told": baseline.told,
                "scores": scores[baseline.name].as_dict() if baseline.name in scores else None,
            }
            for baseline in evaluated.baselines
        },
    }
