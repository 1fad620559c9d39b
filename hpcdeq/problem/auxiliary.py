"""Numbers that a model learns beside its targets, and that its application leaves out (multi-task learning: Caruana 1997).

In training the model gives them behind its outputs; in application (``model.eval()``) it gives the outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.data import SampleSource
from hpcdeq.data.batches import Inputs, RowsLike, taken
from hpcdeq.data.dataset import column_statistics
from hpcdeq.errors import ShapeError
from hpcdeq.problem.losses import Loss


def standardisation(numbers: Tensor, comm: parallel.Comm) -> Callable[[Tensor], Tensor]:
    """Return a map of rows of numbers to the same less their means, over their standard deviations, both of all ranks' rows.

    Collective on comm; the map is not.

    Parameters
    ----------
    numbers
        This rank's ``(b, A)`` rows; NaN is not known, and stays. A column that is always the same becomes zeros.
    """
    mean, deviation = column_statistics(numbers, comm)
    scale = torch.where(deviation > 0, deviation, 1.0)
    return lambda rows: ((rows.double() - mean) / scale).to(rows)


class AuxiliarySource:
    """A source of samples whose targets have numbers to learn beside them.

    Not collective.

    Parameters
    ----------
    source
        The samples.
    numbers
        This rank's ``(b, A)`` numbers, NaN where they are not known.
    again
        Returns them anew once the source has other samples; None: it never has.

    Attributes
    ----------
    task, count, offset, input_shape, output_size
        As in the source.
    targets
        ``(b, T + A)`` floating numbers: the source's targets (a class number counts as T = 1), then the others.
    """

    def __init__(self, source: SampleSource, numbers: Tensor, again: Callable[[], Tensor] | None = None) -> None:
        self.source = source
        self.again = again
        self.task, self.count = source.task, source.count
        self.input_shape, self.output_size = source.input_shape, source.output_size
        self._take(numbers)

    def follow(self) -> None:
        """Take over the samples that the source has now. Not collective."""
        assert self.again is not None
        self._take(self.again())

    def _take(self, numbers: Tensor) -> None:
        source = self.source
        self.offset = source.offset
        own = source.targets if source.targets.ndim == 2 else source.targets[:, None]
        self.targets = torch.cat([own.to(numbers), numbers], dim=1)

    def __len__(self) -> int:
        """Return the number of samples of this rank. Not collective."""
        return len(self.source)

    def batch(self, rows: RowsLike) -> tuple[Inputs, Tensor]:
        """Return inputs and targets of some of this rank's samples. Not collective."""
        return self.source.batch(rows)[0], taken(self.targets, rows)


class WithAuxiliary(Loss):
    """ℓ(y, t) + w/A Σ ½ (u - s)² over the known ones of A numbers s, u the model's for them.

    Outputs are ``(B, c + A)`` and targets those of `AuxiliarySource`; `plain` is the loss ℓ alone.

    Parameters
    ----------
    loss
        ℓ.
    count
        A.
    weight
        w.
    """

    def __init__(self, loss: Loss, count: int, weight: float) -> None:
        self.loss = loss
        self.count = count
        self.weight = weight
        self.name, self.task, self.metric = loss.name, loss.task, loss.metric
        self.larger_is_better = loss.larger_is_better

    @property
    def plain(self) -> Loss:
        """The loss of the targets alone."""
        return self.loss.plain

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 2 or outputs.shape[1] <= self.count:
            raise ShapeError(
                f"{self.count} auxiliary numbers need outputs of shape (B, outputs + {self.count}), the model gives"
                f" {tuple(outputs.shape)} in training: leave them out (--auxiliary-weight 0)"
            )
        self.loss.check(outputs[:, : -self.count], self._own(targets))

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        known = targets[:, -self.count :].isfinite()
        difference = torch.where(known, outputs[:, -self.count :] - targets[:, -self.count :], 0.0)
        beside = 0.5 * self.weight / self.count * difference.square().sum()
        return self.loss.total(outputs[:, : -self.count], self._own(targets)) + beside

    def curvature(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        split = -self.count
        own = self.loss.curvature(outputs[:, :split], self._own(targets), tangent[:, :split])
        return torch.cat([own, self._curvatures(targets) * tangent[:, split:]], dim=1)

    def curvature_root(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        split = -self.count
        own = self.loss.curvature_root(outputs[:, :split], self._own(targets), noise[:, :split])
        return torch.cat([own, self._curvatures(targets).sqrt() * noise[:, split:]], dim=1)

    def metric_terms(self, outputs: Tensor, targets: Tensor) -> tuple[float, float]:
        return self.loss.metric_terms(outputs[:, : -self.count], self._own(targets))

    def metric_value(self, numerator: float, denominator: float) -> float:
        return self.loss.metric_value(numerator, denominator)

    def _own(self, targets: Tensor) -> Tensor:
        own = targets[:, : -self.count]
        return own[:, 0].long() if self.task == "classification" else own

    def _curvatures(self, targets: Tensor) -> Tensor:
        return targets[:, -self.count :].isfinite().to(targets.dtype) * (self.weight / self.count)
