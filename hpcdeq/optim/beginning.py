"""What is said of a loss or gradient that is not finite before the first step."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hpcdeq.errors import DataError
from hpcdeq.problem import TrainingProblem
from hpcdeq.problem.culprit import culprit

SUM = "No sample's alone is not finite: their sum overflows"


def initial_gradient_error(problem: TrainingProblem, p: Tensor, rows: np.ndarray | None = None) -> DataError:
    """Return the error for a gradient that is not finite at the start, with the sample that makes it so.

    Collective on the problem's comm. Arguments as in `culprit`.
    """
    return DataError(
        "the gradient at the initial weights is NaN or infinite although the loss is finite: look for a square root, norm"
        f" or logarithm of zero in the model, or change the initial weights (--seed). {culprit(problem, p, rows) or SUM}",
        agreed=True,
    )


def initial_loss_error(problem: TrainingProblem, loss: float, p: Tensor, rows: np.ndarray | None = None) -> DataError:
    """Return the error for a loss that is not finite at the start, with the sample that makes it so.

    Collective on the problem's comm. Arguments as in `culprit`.
    """
    return DataError(
        f"the loss at the initial weights is {loss}: look for NaN in the initial weights, or for inputs or targets that are"
        f" far out of scale. {culprit(problem, p, rows) or SUM}",
        agreed=True,
    )
