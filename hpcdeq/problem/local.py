"""This rank's share of loss, gradient and curvature products: sums over its own samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcdeq.data import SampleSource
from hpcdeq.errors import ConvergenceError
from hpcdeq.problem.counts import Accounts
from hpcdeq.problem.guidance import Guidance
from hpcdeq.problem.linearised import Linearised
from hpcdeq.problem.losses import Loss
from hpcdeq.problem.memory import process_bytes
from hpcdeq.problem.network import Network, leaves
from hpcdeq.problem.parameters import ParameterLayout
from hpcdeq.problem.phases import ADJOINT, Phases
from hpcdeq.problem.visits import Visits, rows_of


@dataclass
class Chunks:
    """Linearised chunks of one choice of samples at one point, those that memory has room for.

    Attributes
    ----------
    rows
        Global numbers of the samples; None: all.
    kept
        By number of the batch.
    """

    rows: np.ndarray | None = None
    kept: dict[int, Linearised] = field(default_factory=dict)


class LocalSums:
    """Sums over this rank's samples, or over some of them.

    Not collective, every method.

    Parameters
    ----------
    network, layout, loss
        The network with the terms on its fixed points, its weights as a vector, the loss of its outputs.
    visits
        The samples.
    guidance
        Is told what becomes known of fixed points.
    accounts, phases
        Where work and time are counted.
    memory_limit
        Bytes that this process may hold before linearised chunks are no longer kept.

    Attributes
    ----------
    whole, part
        Linearised chunks of all samples, and of the last choice of some, at the last point.
    """

    def __init__(
        self,
        network: Network,
        layout: ParameterLayout,
        loss: Loss,
        visits: Visits,
        guidance: Guidance,
        accounts: Accounts,
        phases: Phases,
        memory_limit: int,
    ) -> None:
        self.network = network
        self.layout = layout
        self.loss_function = loss
        self.visits = visits
        self.guidance = guidance
        self.accounts = accounts
        self.phases = phases
        self.memory_limit = memory_limit
        self.whole, self.part = Chunks(), Chunks()
        self._point: Tensor | None = None
        self._version = 0
        self._last: tuple[Tensor, list[Tensor]] | None = None

    def loss(self, p: Tensor, rows: np.ndarray | None) -> float:
        """Return the sum of losses and terms at weights p; rows as in `TrainingProblem.loss`."""
        pieces = self.layout.unflatten(p)

        def value(inputs: Any, targets: Tensor, ids: Sequence[int]) -> float:
            found = self.network.evaluate(pieces, inputs, ids)
            self.loss_function.check(found.outputs, targets)
            self.accounts.own.losses += len(targets)
            return float(found.total(self.loss_function, targets))

        with torch.no_grad():
            return sum(self.visits.each(p, rows, value))

    def loss_and_gradient(self, p: Tensor, rows: np.ndarray | None) -> tuple[float, Tensor]:
        """Return the sums of losses and of their gradients, ``(n,)``."""
        weights = self._leaves(p)

        def value_and_gradient(inputs: Any, targets: Tensor, ids: Sequence[int]) -> tuple[float, Tensor]:
            with torch.enable_grad():
                found = self.network.evaluate(weights, inputs, ids)
                self.loss_function.check(found.outputs, targets)
                value = found.total(self.loss_function, targets)
            loss = float(value.detach())
            if not math.isfinite(loss):  # its adjoints are not to be found either
                return loss, torch.full_like(self.zeros(), float("nan"))
            with self.phases.of(ADJOINT):
                # A loss that depends on no weight is legal: its gradient is zero, and the optimiser says so.
                parts = torch.autograd.grad(value, weights, allow_unused=True) if value.requires_grad else ()
                gradient = self.layout.flatten(parts) if parts else self.zeros()
            self.accounts.own.gradients += len(targets)
            return loss, gradient

        total, gradient = 0.0, None
        for value, part in self.visits.each(p, rows, value_and_gradient):
            total += value
            gradient = part if gradient is None else gradient.add_(part)
        return total, self.zeros() if gradient is None else gradient

    def _leaves(self, p: Tensor) -> list[Tensor]:
        """Return the pieces of p to differentiate with respect to.

        They are views of a p in the model's precision, and stay right while a minibatch method changes it in place: to make
        them anew for each of its steps takes as long as the step's update.
        """
        if self._last is None or self._last[0] is not p:
            made = leaves(self.layout.unflatten(p))
            if (p.dtype, p.device, p.is_contiguous()) != (self.layout.dtype, self.layout.device, True):
                return made
            self._last = (p, made)
        return self._last[1]

    def product(self, p: Tensor, v: Tensor, kind: str, rows: np.ndarray | None) -> tuple[Tensor, int]:
        """Return the sum of products with v, ``(n,)``, and the number of samples that are in it.

        Parameters
        ----------
        kind
            ``gauss_newton`` or ``hessian``.
        """
        pieces = self.layout.unflatten(v)
        total, count = self.zeros(), 0
        for number, at in self._numbered(p, rows):
            if kind == "gauss_newton":
                total += self.layout.flatten(at.gauss_newton_product(pieces))
                if number is not None:
                    self.guidance.keep_tangents(number)
            else:
                total += self.layout.flatten(at.hessian_product(pieces))
            count += len(at.targets)
        return total, count

    def linearised(self, p: Tensor, rows: np.ndarray | None = None) -> Iterator[Linearised]:
        """Yield the chunks linearised at p, those kept from the last product at the same p as they are."""
        yield from (at for _, at in self._numbered(p, rows))

    def _numbered(self, p: Tensor, rows: np.ndarray | None) -> Iterator[tuple[int | None, Linearised]]:
        """Yield linearised chunks with their numbers among those of the whole set; None: of some samples."""
        if not self._is_at(p):
            self.forget()
            self._point, self._version = p.detach(), p._version  # no copy: whoever changes it in place is noticed
            self.guidance.linearised_at(self._point)
        if rows is not None and (self.part.rows is None or not np.array_equal(self.part.rows, rows)):
            self.part = Chunks(rows.copy())
        chunks = self.whole if rows is None else self.part
        pieces = self.layout.unflatten(p)

        def linearise(inputs: Any, targets: Tensor, ids: Sequence[int]) -> Linearised:
            weights = leaves(pieces)
            with torch.enable_grad():
                found = self.network.evaluate(weights, inputs, ids)
            return Linearised(found, weights, targets, self.loss_function, self.phases)

        for i, (ids, number) in enumerate(self.visits.batches(rows)):
            at = chunks.kept.get(i)
            if at is None:
                at = self.visits.visit(p, ids, number, linearise, products=True)
                if at is None:
                    continue
                if number is not None:
                    self.guidance.keep_states(number)
                if process_bytes() < self.memory_limit:
                    chunks.kept[i] = at
            yield number, at

    def _is_at(self, p: Tensor) -> bool:
        """Say whether p is the last point, as it was then."""
        point = self._point
        return point is not None and point._version == self._version and torch.equal(point, p)

    def forget(self) -> None:
        """Free the linearised chunks of the last point."""
        self.whole, self.part = Chunks(), Chunks()
        self._point = self._last = None

    def evaluation(self, p: Tensor, dataset: SampleSource) -> Sequence[float]:
        """Return the sums of the loss and of the metric's terms on a set, and the number of samples that were left out.

        The model is as in application: without dropout. The sums are NaN where a fixed point was not found, unless such
        samples are left out.
        """
        pieces = self.layout.unflatten(p)
        sums, plain = np.zeros(4), self.loss_function.plain

        def attempt(ids: Sequence[int]) -> tuple[float, float, float]:
            inputs, targets = self.visits.move(*dataset.batch(rows_of(ids)))
            with self.guidance.batch(ids, p, cold=True):
                outputs = self.network.outputs(pieces, inputs)
            plain.check(outputs, targets)
            return float(plain.total(outputs, targets)), *plain.metric_terms(outputs, targets)

        with torch.no_grad(), self.network.applied():
            for start in range(0, len(dataset), self.visits.chunk_size):
                ids = range(start, min(start + self.visits.chunk_size, len(dataset)))
                try:
                    found, missing = self.visits.leaving_out(ids, attempt)
                except ConvergenceError:
                    return [float("nan")] * 4
                sums[:3] += found or 0.0
                sums[1:] += (*plain.missing_terms(missing), missing)
        return list(sums)

    def zeros(self) -> Tensor:
        """Return a vector of zeros like the weights, ``(n,)``."""
        return torch.zeros(self.layout.count, dtype=self.layout.dtype, device=self.layout.device)
