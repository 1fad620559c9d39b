"""How good the probabilities of a classifier are: accuracy, confusion, ranking and calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcdeq.errors import DataError, ShapeError

BINS = 10
NORMAL_QUANTILE = 1.959963984540054  # of 0.975: two-sided intervals of 95 %
SUM_TOLERANCE = 1e-4  # by how much probabilities may miss one; single precision misses it by 1e-7 a class


@dataclass(frozen=True)
class CalibrationBin:
    """The samples whose confidence, the largest probability, lies in ``(low, high]``.

    Attributes
    ----------
    low, high
        Ends of the bin.
    count
        How many samples.
    confidence, accuracy
        Their mean confidence, and the fraction that is classified correctly; NaN without samples.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class ClassScores:
    """How good a classifier is on ``N`` samples of ``C`` classes. NaN stands for what is not defined.

    Attributes
    ----------
    count
        N.
    confusion
        ``(C, C)`` samples by true class (row) and predicted class (column).
    accuracy
        Fraction of correct predictions.
    accuracy_interval
        Its 95 % interval, as in `wilson_interval`.
    balanced_accuracy
        Mean recall of the classes that occur.
    macro_f1
        Mean F1 of the classes that occur or are predicted; the others are left out.
    roc_auc
        Of two classes, as in `roc_auc`; NaN for more, or if one does not occur.
    log_loss
        Mean negative logarithm of the true class's probability, nats.
    brier
        Mean of Σ_k (p_k - y_k)² over samples, y one-hot: 0 to 2 (Brier 1950, doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2).
    calibration_error
        Expected calibration error, as in `calibration_bins`.
    precision, recall, f1
        ``(C,)``: TP / (TP + FP), TP / (TP + FN) and 2 TP / (2 TP + FP + FN) of each class.
    bins
        What the calibration error is made of.
    """

    count: int
    confusion: np.ndarray
    accuracy: float
    accuracy_interval: tuple[float, float]
    balanced_accuracy: float
    macro_f1: float
    roc_auc: float
    log_loss: float
    brier: float
    calibration_error: float
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    bins: tuple[CalibrationBin, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as JSON takes them, NaN as it is. Not collective."""
        plain: dict[str, Any] = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()
        }
        return plain | {"bins": [vars(item) for item in self.bins]}


def class_scores(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> ClassScores:
    """Return how good predicted probabilities are.

    Not collective. The predicted class is the most probable one; of equal ones, the first.

    Parameters
    ----------
    labels
        ``(N,)`` true classes, 0 to C - 1.
    probabilities
        ``(N, C)``, rows that sum to one.
    bins
        Number of the calibration bins.

    Raises
    ------
    ShapeError, DataError
        They do not fit together, there are no samples, or the rows are no probabilities.
    """
    labels, probabilities = _checked(labels, probabilities)
    count, classes = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, classes)
    hits, occurs, chosen = (
        x.astype(float) for x in (confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0))
    )
    correct = int(confusion.trace())
    recall, precision = _ratio(hits, occurs), _ratio(hits, chosen)
    f1 = _ratio(2 * hits, occurs + chosen)
    true_probability = probabilities[np.arange(count), labels]
    errors = probabilities.copy()
    errors[np.arange(count), labels] -= 1.0
    found = calibration_bins(probabilities.max(axis=1), predicted == labels, bins)
    return ClassScores(
        count=count,
        confusion=confusion,
        accuracy=correct / count,
        accuracy_interval=wilson_interval(correct, count),
        balanced_accuracy=float(recall[occurs > 0].mean()),
        macro_f1=float(f1[occurs + chosen > 0].mean()),
        roc_auc=roc_auc(labels, probabilities[:, 1]) if classes == 2 else float("nan"),
        # A probability of zero would cost infinitely much; rounding makes such zeros of what is only small.
        log_loss=float(-np.log(np.maximum(true_probability, np.finfo(float).eps)).mean()),
        brier=float(np.square(errors).sum(axis=1).mean()),
        calibration_error=float(sum(b.count * abs(b.accuracy - b.confidence) for b in found if b.count) / count),
        precision=precision,
        recall=recall,
        f1=f1,
        bins=found,
    )


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return ``(classes, classes)`` numbers of samples by true class (row) and predicted class. Not collective."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return pairs.reshape(classes, classes)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a fraction, ``successes / count``.

    Not collective. Wilson 1927 (doi:10.1080/01621459.1927.10502953): the fractions p with |p̂ - p| ≤ q √(p (1 - p) / n), which
    stay within 0 and 1 and hold their level for small samples too.
    """
    fraction, spread = successes / count, NORMAL_QUANTILE**2 / count
    centre = (fraction + spread / 2) / (1 + spread)
    half = (spread * fraction * (1 - fraction) + spread * spread / 4) ** 0.5 / (1 + spread)
    # At the ends, where the interval ends at 0 or 1 exactly, rounding must not leave it on the wrong side.
    return max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < count else 1.0


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the receiver operating characteristic of a score for class 1 against class 0.

    Not collective. It is the probability that a sample of class 1 has a higher score than one of class 0, ties counted half
    (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747), from the ranks: (R₁ - n₁ (n₁ + 1) / 2) / (n₀ n₁).

    Parameters
    ----------
    labels
        ``(N,)``, 0 or 1.
    scores
        ``(N,)``.

    Returns
    -------
    float
        NaN if one class does not occur.
    """
    positive = labels == 1
    ones = int(positive.sum())
    zeros = len(labels) - ones
    if not ones or not zeros:
        return float("nan")
    _, place, number = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(number)
    rank = (last - (number - 1) / 2)[place]  # from 1; equal scores share their mean rank
    return float((rank[positive].sum() - ones * (ones + 1) / 2) / (zeros * ones))


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> tuple[CalibrationBin, ...]:
    """Sort samples into bins of equal width by their confidence.

    Not collective. The expected calibration error is Σ_b n_b / N |accuracy_b - confidence_b| (Guo et al. 2017, arXiv 1706.04599).

    Parameters
    ----------
    confidence
        ``(N,)`` probability of the predicted class.
    correct
        ``(N,)`` whether it is the true one.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)  # a bin owns its upper end
    number = np.bincount(place, minlength=bins)
    mean = _ratio(np.bincount(place, confidence, bins), number)
    accuracy = _ratio(np.bincount(place, correct.astype(float), bins), number)
    return tuple(
        CalibrationBin(float(edges[b]), float(edges[b + 1]), int(number[b]), float(mean[b]), float(accuracy[b]))
        for b in range(bins)
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return quotients, NaN for those by zero."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, float)
    if labels.ndim != 1 or probabilities.ndim != 2 or len(labels) != len(probabilities):
        raise ShapeError(f"labels have shape {labels.shape}, probabilities {probabilities.shape}: give (N,) and (N, C)")
    if not len(labels):
        raise DataError("no samples to evaluate: give at least one")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise DataError(f"labels are whole numbers from 0 to {probabilities.shape[1] - 1}")
    wrong = ~(
        np.isfinite(probabilities).all(axis=1)
        & (probabilities >= 0).all(axis=1)
        & (abs(probabilities.sum(axis=1) - 1) <= SUM_TOLERANCE)
    )
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"row {row}: {probabilities[row].tolist()} are no probabilities, which sum to one")
    return labels.astype(np.int64), probabilities
