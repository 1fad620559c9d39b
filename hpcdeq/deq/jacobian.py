"""Products with J = ∂f/∂z and with ∂f/∂θ at one point, from one evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcdeq.deq.arguments import StateFunction


class Linearisation:
    """The cell linearised at (z, θ): evaluated once, its graph kept for any number of products.

    J v comes from differentiating u ↦ Jᵀ u, which is linear, so that its derivative graph does not depend on u and
    is built once too. (Forward-mode automatic differentiation would evaluate the cell again for each product, and
    cannot be nested inside a forward-mode derivative of the caller's.)

    Parameters
    ----------
    function
        ``function(z, *tensors)``.
    z, tensors
        The point; detached here.
    """

    def __init__(self, function: StateFunction, z: Tensor, tensors: Sequence[Tensor]) -> None:
        with torch.enable_grad():
            self.z = z.detach().requires_grad_()
            # The marks are kept so that products with frozen tensors cost nothing.
            self.tensors = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            self._output = function(self.z, *self.tensors)
        self.value = self._output.detach()
        self._pulled: tuple[Tensor, Tensor] | None = None

    def vjp(self, u: Tensor) -> Tensor:
        """Return Jᵀ u in the shape of z. Not collective."""
        if not self._output.requires_grad:
            return torch.zeros_like(self.z)
        (product,) = torch.autograd.grad(self._output, self.z, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.z) if product is None else product

    def vjps(self, basis: Tensor) -> Tensor:
        """Return Jᵀ u for many u at once, ``(k, *z.shape)``. Not collective."""
        if not self._output.requires_grad:
            return torch.zeros_like(basis)
        try:
            (products,) = torch.autograd.grad(
                self._output, self.z, basis, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # an operation that cannot be vectorised
            return torch.stack([self.vjp(u) for u in basis])
        return torch.zeros_like(basis) if products is None else products

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v in the shape of z. Not collective."""
        if self._pulled is None:
            with torch.enable_grad():
                u = torch.zeros_like(self._output, requires_grad=True)
                if self._output.requires_grad:
                    (pulled,) = torch.autograd.grad(self._output, self.z, u, create_graph=True, allow_unused=True)
                else:
                    pulled = None
            self._pulled = (u, torch.zeros_like(self.z) if pulled is None else pulled)
        u, pulled = self._pulled
        if not pulled.requires_grad:
            return torch.zeros_like(self.z)
        (product,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
        return product

    def tensor_vjp(self, u: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return (∂f/∂t)ᵀ u for each wanted tensor t, None for the others. Not collective."""
        chosen = [t for t, want in zip(self.tensors, wanted, strict=True) if want]
        if not chosen or not self._output.requires_grad:
            return [None] * len(wanted)
        products = iter(torch.autograd.grad(self._output, chosen, u, retain_graph=True, allow_unused=True))
        return [next(products) if want else None for want in wanted]
