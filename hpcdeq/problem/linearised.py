"""A network linearised in its weights on one chunk of samples, for many products at the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpcdeq.problem.losses import Loss


def leaves(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Return the pieces as tensors to differentiate with respect to. Not collective."""
    return [piece.detach().requires_grad_() for piece in pieces]


def outputs_of(model: nn.Module, names: Sequence[str], weights: Sequence[Tensor], inputs: Any) -> Tensor:
    """Return the model's outputs at the given weights. Not collective."""
    return functional_call(model, dict(zip(names, weights, strict=True)), (inputs,))


class Linearised:
    """Outputs y(p) of one chunk with the graphs that products need, each made when first used and kept.

    Parameters
    ----------
    model, names, pieces
        The network, and its weights by name.
    inputs, targets
        The chunk.
    loss
        The loss of the outputs.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], pieces: Sequence[Tensor], inputs: Any, targets: Tensor, loss: Loss
    ) -> None:
        self.loss = loss
        self.targets = targets
        self.weights = leaves(pieces)
        with torch.enable_grad():
            self._outputs = outputs_of(model, names, self.weights, inputs)
        loss.check(self._outputs, targets)
        self.outputs = self._outputs.detach()
        self._pulled: tuple[Tensor, list[Tensor], list[int]] | None = None
        self._gradient: tuple[list[Tensor], list[int]] | None = None

    def jacobian_product(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return (∂y/∂p) v in the shape of the outputs. Not collective."""
        if self._pulled is None:
            with torch.enable_grad():
                u = torch.zeros_like(self._outputs, requires_grad=True)
                pulled = torch.autograd.grad(self._outputs, self.weights, u, create_graph=True, allow_unused=True)
            used = [i for i, p in enumerate(pulled) if p is not None and p.requires_grad]
            self._pulled = (u, [pulled[i] for i in used], used)
        u, pulled_used, used = self._pulled
        if not used:
            return torch.zeros_like(self.outputs)
        (product,) = torch.autograd.grad(pulled_used, u, [tangents[i] for i in used], retain_graph=True)
        return product

    def jacobian_transpose_product(self, cotangent: Tensor) -> list[Tensor | None]:
        """Return (∂y/∂p)ᵀ u, a piece for each weight tensor. Not collective."""
        return list(torch.autograd.grad(self._outputs, self.weights, cotangent, retain_graph=True, allow_unused=True))

    def gauss_newton_product(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Return Jᵀ L J v with J = ∂y/∂p and L the loss's curvature. Not collective."""
        curved = self.loss.curvature(self.outputs, self.targets, self.jacobian_product(tangents))
        return self.jacobian_transpose_product(curved)

    def hessian_product(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Return ∂²ℓ/∂p² v by differentiating the gradient's graph. Not collective."""
        if self._gradient is None:
            with torch.enable_grad():
                total = self.loss.total(self._outputs, self.targets)
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
