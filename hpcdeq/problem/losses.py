"""Losses of a network's outputs, with the curvature that the Gauss-Newton matrix is made of.

A loss is summed over samples here; `TrainingProblem` divides by their number. Cross entropy is in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from hpcdeq.errors import DataError, OptionError, ShapeError


class Loss(ABC):
    """What training needs to know of a loss ℓ(y, t) of outputs y ``(B, c)`` and targets t.

    Attributes
    ----------
    name, task
        Its name, and the task (``classification`` or ``regression``) whose targets it takes.
    metric
        Name of the figure of merit that goes with it.
    larger_is_better
        Whether a larger metric is a better model.
    """

    name: str
    task: str
    metric: str
    larger_is_better: bool

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise DataError or ShapeError where outputs and targets do not fit this loss. Not collective."""

    @abstractmethod
    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of ℓ over the samples, a differentiable scalar. Not collective."""

    @abstractmethod
    def curvature(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """Return L·tangent with L = ∂²ℓ/∂y², in the shape of the outputs. Not collective."""

    @abstractmethod
    def curvature_root(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        """Return R·noise with R Rᵀ = L, in the shape of the outputs. Not collective."""

    @abstractmethod
    def metric_terms(self, outputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """Return what is summed over all samples for the metric: numerator and denominator. Not collective."""

    @abstractmethod
    def metric_value(self, numerator: float, denominator: float) -> float:
        """Return the metric from the sums. Not collective."""

    def missing_terms(self, count: int) -> tuple[float, float]:
        """Return what samples without an answer add to the metric's sums. Not collective."""
        return 0.0, 0.0

    @property
    def plain(self) -> Loss:
        """What models are judged by: the loss without what only training has."""
        return self

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return r with ℓ = ½‖r‖² summed over samples, or None where ℓ is not a sum of squares. Not collective."""
        return None

    def residual_scale(self, outputs: Tensor) -> float | None:
        """Return ∂r/∂y (a number, for the losses that have a residual), or None. Not collective."""
        return None


class CrossEntropy(Loss):
    """Cross entropy of class scores (logits): ℓ = log Σⱼ exp yⱼ - Σⱼ qⱼ yⱼ; L = diag(p) - p pᵀ with p = softmax(y).

    Parameters
    ----------
    smoothing
        Part ε of a label that is shared out evenly (Szegedy et al. 2016): q = (1 - ε) e_t + ε / c.
    """

    name = "cross_entropy"
    task = "classification"
    metric = "accuracy"
    larger_is_better = True

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    @property
    def plain(self) -> Loss:
        """Cross entropy with the labels as they are."""
        return CrossEntropy()

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point():
            raise DataError(
                "cross_entropy needs class numbers as targets, these are real numbers (a regression): use the loss mse"
            )
        if outputs.dim() != 2 or outputs.shape[0] != targets.shape[0]:
            raise ShapeError(
                f"cross_entropy needs outputs of shape ({targets.shape[0]}, classes), the model gives {tuple(outputs.shape)}"
            )
        if targets.numel() and int(targets.max()) >= outputs.shape[1]:
            raise ShapeError(
                f"the model gives scores for {outputs.shape[1]} classes, the data holds class number {int(targets.max())}"
            )

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.smoothing)

    def curvature(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        p = torch.softmax(outputs, dim=1)
        weighted = p * tangent
        return weighted - p * weighted.sum(dim=1, keepdim=True)

    def curvature_root(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        p = torch.softmax(outputs, dim=1)
        weighted = p.sqrt() * noise
        return weighted - p * weighted.sum(dim=1, keepdim=True)

    def metric_terms(self, outputs: Tensor, targets: Tensor) -> tuple[float, float]:
        return float((outputs.argmax(dim=1) == targets).sum()), float(targets.shape[0])

    def metric_value(self, numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else float("nan")

    def missing_terms(self, count: int) -> tuple[float, float]:
        return 0.0, float(count)


class MeanSquare(Loss):
    """Half the squared error, averaged over the outputs of a sample: ℓ = ½‖y - t‖²/c, L = I/c.

    The metric is the relative error ‖y - t‖/‖t‖ over all samples.
    """

    name = "mse"
    task = "regression"
    metric = "relative_error"
    larger_is_better = False

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if not targets.is_floating_point():
            raise DataError(
                "mse needs real numbers as targets, these are class numbers (a classification): use the loss cross_entropy"
            )
        if outputs.shape != targets.shape:
            raise ShapeError(
                f"the model gives outputs of shape {tuple(outputs.shape)}, the targets have {tuple(targets.shape)}"
            )

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs, targets, reduction="sum") * (0.5 / per_sample(outputs))

    def curvature(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        return tangent / per_sample(outputs)

    def curvature_root(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        return noise / per_sample(outputs) ** 0.5

    def metric_terms(self, outputs: Tensor, targets: Tensor) -> tuple[float, float]:
        return float((outputs - targets).double().square().sum()), float(targets.double().square().sum())

    def metric_value(self, numerator: float, denominator: float) -> float:
        return (numerator / denominator) ** 0.5 if denominator else float("nan")

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return (outputs - targets) / per_sample(outputs) ** 0.5

    def residual_scale(self, outputs: Tensor) -> float | None:
        return per_sample(outputs) ** -0.5


def per_sample(outputs: Tensor) -> int:
    """Return the number of outputs of one sample. Not collective."""
    return max(1, outputs[:1].numel() if outputs.shape[0] else outputs.shape[1:].numel())


LOSSES: dict[str, Loss] = {loss.name: loss for loss in (CrossEntropy(), MeanSquare())}


def loss_named(loss: str | Loss) -> Loss:
    """Return a loss by its name; an object passes through. Not collective."""
    if isinstance(loss, Loss):
        return loss
    if loss not in LOSSES:
        raise OptionError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}, or pass a hpcdeq.problem.Loss")
    return LOSSES[loss]
