"""What a classifier has to beat: the most frequent class, and gradient boosting on simple descriptors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MISSING = "scikit-learn is not installed: pip install hpcdeq[baselines]"
MAJORITY, BOOSTING = "majority class", "gradient boosting"
MOST_TREES = 500
FEATURES = 0.3  # part of the descriptors that a split is chosen from, as in random forests: there are many, and alike
PATIENCE = 20  # rounds without a smaller validation loss after which no more trees are added


@dataclass(frozen=True)
class Labelled:
    """Descriptors ``(b, d)`` of some samples and their classes ``(b,)``."""

    values: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Baseline:
    """What a baseline says of the samples that a classifier is evaluated on.

    Attributes
    ----------
    name
        For people.
    told
        How it was fitted, or why it was not.
    probabilities
        ``(N, C)``; None if it was not fitted.
    """

    name: str
    told: str
    probabilities: np.ndarray | None = None


def majority_class(train: np.ndarray, classes: int, count: int) -> Baseline:
    """Return the baseline that gives every sample the frequencies of the training classes, so that it always answers the most
    frequent one.

    Not collective.

    Parameters
    ----------
    train
        ``(n,)`` classes of the training samples.
    classes, count
        C, and the number of samples to answer for.
    """
    if not len(train):
        return Baseline(MAJORITY, "there are no training samples")
    frequency = np.bincount(train, minlength=classes) / len(train)
    told = f"the class frequencies of {len(train)} training samples"
    return Baseline(MAJORITY, told, np.tile(frequency, (count, 1)))


def gradient_boosting(train: Labelled, validation: Labelled, values: np.ndarray, classes: int) -> Baseline:
    """Return what gradient boosting, fitted on descriptors of the training samples, says of others.

    Not collective. scikit-learn's ``HistGradientBoostingClassifier`` with its own settings, but for splits chosen from a random
    0.3 of the descriptors and up to 500 rounds. The validation samples decide when it stops, which is what they are to a
    network as well; without any, there are 100 rounds.

    Parameters
    ----------
    train, validation
        What it is fitted on and stopped by; NaN is a missing value.
    values
        ``(N, d)`` descriptors of the samples to answer for.
    classes
        C; probabilities of classes without training samples are zero.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError:
        return Baseline(BOOSTING, MISSING)
    present = np.unique(train.labels)
    if len(present) < 2:
        return Baseline(BOOSTING, f"the training samples are of {len(present)} classes: there is nothing to fit")
    # What is the same in all training samples cannot divide them. NaN equals nothing, so that it counts as one value.
    filled = np.where(np.isnan(train.values), np.inf, train.values)
    varies = (filled != filled[:1]).any(axis=0)
    if not varies.any():
        return Baseline(BOOSTING, "the descriptors of all training samples are the same: there is nothing to fit")
    known = np.isin(validation.labels, present)
    settings, held_out = {"max_features": FEATURES, "random_state": 0, "early_stopping": False}, {}
    if known.any():
        settings |= {"max_iter": MOST_TREES, "early_stopping": True, "n_iter_no_change": PATIENCE}
        held_out = {"X_val": validation.values[known][:, varies], "y_val": validation.labels[known]}
    model = HistGradientBoostingClassifier(**settings)
    model.fit(train.values[:, varies], train.labels, **held_out)
    probabilities = np.zeros((len(values), classes))
    if len(values):
        probabilities[:, present] = model.predict_proba(values[:, varies])
    told = f"{varies.sum()} descriptors, {model.n_iter_} rounds on {len(train.labels)} training samples"
    told += f", stopped by {known.sum()} validation samples" if known.any() else ""
    return Baseline(BOOSTING, told, probabilities)
