"""A network linearised in its weights on one chunk of samples, for many products at the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcdeq.problem.losses import Loss
from hpcdeq.problem.network import Evaluated
from hpcdeq.problem.phases import HESSIAN, TANGENT, TRANSPOSED, Phases


class Linearised:
    """Outputs and features y(p) of one chunk with the graphs that products need, each made when first used and kept.

    Parameters
    ----------
    found
        The network evaluated at ``weights``.
    weights
        What it is differentiated with respect to.
    targets
        Of the chunk.
    loss
        The loss of the outputs.
    phases
        Where the time of products is counted.

    Attributes
    ----------
    heads
        What the network and the terms give: its outputs, then the features of each term; without graphs.
    """

    def __init__(
        self, found: Evaluated, weights: Sequence[Tensor], targets: Tensor, loss: Loss, phases: Phases
    ) -> None:
        loss.check(found.outputs, targets)
        self.loss = loss
        self.targets = targets
        self.weights = weights
        self.phases = phases
        self.terms = [term for term, _ in found.features]
        self._found = found
        self._heads = [found.outputs, *(features for _, features in found.features)]
        self._live = [i for i, head in enumerate(self._heads) if head.requires_grad]
        self.heads = [head.detach() for head in self._heads]
        self._pulled: tuple[list[Tensor], list[Tensor], list[int]] | None = None
        self._gradient: tuple[list[Tensor], list[int]] | None = None

    @property
    def outputs(self) -> Tensor:
        """The network's outputs."""
        return self.heads[0]

    def jacobian_product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Return (∂y/∂p) v for each head, in its shape. Not collective."""
        with self.phases.of(TANGENT):
            if self._pulled is None:
                heads = [self._heads[i] for i in self._live]
                with torch.enable_grad():
                    us = [torch.zeros_like(head, requires_grad=True) for head in heads]
                    pulled = torch.autograd.grad(heads, self.weights, us, create_graph=True, allow_unused=True)
                used = [i for i, p in enumerate(pulled) if p is not None and p.requires_grad]
                self._pulled = (us, [pulled[i] for i in used], used)
            us, pulled_used, used = self._pulled
            products = [torch.zeros_like(head) for head in self.heads]
            if used:
                found = torch.autograd.grad(
                    pulled_used, us, [tangents[i] for i in used], retain_graph=True, allow_unused=True
                )
                for i, product in zip(self._live, found, strict=True):
                    products[i] = products[i] if product is None else product
            return products

    def jacobian_transpose_product(self, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Return (∂y/∂p)ᵀ u, a piece for each weight tensor; u has a part for each head. Not collective."""
        with self.phases.of(TRANSPOSED):
            heads, given = [self._heads[i] for i in self._live], [cotangents[i] for i in self._live]
            return list(torch.autograd.grad(heads, self.weights, given, retain_graph=True, allow_unused=True))

    def gauss_newton_product(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Return Jᵀ L J v with J = ∂y/∂p and L the curvature of the loss and of the terms. Not collective."""
        along, *others = self.jacobian_product(tangents)
        curved = [self.loss.curvature(self.outputs, self.targets, along)]
        curved += [
            term.curvature(features, part)
            for term, features, part in zip(self.terms, self.heads[1:], others, strict=True)
        ]
        return self.jacobian_transpose_product(curved)

    def hessian_product(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Return ∂²ℓ/∂p² v, terms included, by differentiating the gradient's graph. Not collective."""
        with self.phases.of(HESSIAN):
            if self._gradient is None:
                with torch.enable_grad():
                    total = self._found.total(self.loss, self.targets)
                    gradient = torch.autograd.grad(total, self.weights, create_graph=True, allow_unused=True)
                used = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]
                self._gradient = ([gradient[i] for i in used], used)
            gradient_used, used = self._gradient
            if not used:
                return [None] * len(self.weights)
            return list(
                torch.autograd.grad(
                    gradient_used, self.weights, [tangents[i] for i in used], retain_graph=True, allow_unused=True
                )
            )
