"""Exact derivatives of a fixed point, of any order, by linear solves.

At z = f(z, θ) with J = ∂f/∂z (implicit function theorem; Bai, Kolter, Koltun 2019, arXiv 1909.01377, section 3):

    tangent   dz = (I - J)⁻¹ (∂f/∂θ) dθ
    adjoint   θ̄ = (∂f/∂θ)ᵀ u,   u = (I - J)⁻ᵀ z̄

Two differentiable functions say all of it: `FixedPointFunction`, θ ↦ z, and `Resolvent`, g ↦ (I - J)⁻¹ g or
(I - J)⁻ᵀ g, which depends on (z, θ) through J. Each one's derivatives are written with the other and with derivatives
of f: derivatives of any order and any mix of forward and reverse mode follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcdeq.deq.arguments import StateFunction
from hpcdeq.deq.equilibrium import Equilibrium
from hpcdeq.deq.inexact import refuse_inexact
from hpcdeq.errors import HpcdeqError


class FixedPointFunction(torch.autograd.Function):
    """θ ↦ z with z = f(z, θ)."""

    @staticmethod
    def forward(equilibrium: Equilibrium, z0: Tensor, *tensors: Tensor) -> Tensor:
        return equilibrium.solve(z0, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.equilibrium, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], equilibrium: Equilibrium, z0: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, None]:
        """Solve once where a vmap is over directions of differentiation alone. Not collective."""
        refuse_batched(in_dims[1:])
        return FixedPointFunction.apply(equilibrium, z0, *tensors), None

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        equilibrium, (z, *tensors) = ctx.equilibrium, ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if cotangent is None or not any(wanted):
            return (None,) * (2 + len(tensors))
        if torch.is_grad_enabled():
            refuse_inexact(equilibrium.kind, "a second derivative")
        u = Resolvent.apply(equilibrium, True, cotangent, z, *tensors)
        equilibrium.log.work.cell_vjps += equilibrium.samples.count
        if not torch.is_grad_enabled():  # first derivatives only: the graph of the linearisation has them
            return None, None, *equilibrium.linearisation().tensor_vjp(u, wanted)
        partial, chosen = restrict(equilibrium.function, z, tensors, wanted)
        pull = pullback(partial, *chosen)
        products = iter(pull(u))
        return None, None, *(next(products) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        equilibrium, (z, *tensors) = ctx.equilibrium, ctx.saved_tensors
        given = tangents[2:]
        wanted = [t is not None for t in given]
        partial, chosen = restrict(equilibrium.function, z, tensors, wanted)
        equilibrium.log.work.cell_jvps += equilibrium.samples.count
        right = push_forward(partial, chosen, [t for t in given if t is not None], z)
        return Resolvent.apply(equilibrium, False, right, z, *tensors)


class Resolvent(torch.autograd.Function):
    """(g, z, θ) ↦ (I - J(z, θ))⁻¹ g, or with the transpose.

    With s(z, θ; a, b) = <a, J(z, θ) b> and A = I - J, both derivatives of w = A⁻¹ g are derivatives of s:
    dw = A⁻¹ (dg + dJ w), and a cotangent w̄ gives ḡ = v = A⁻ᵀ w̄ and (z̄, θ̄) = ∂s(z, θ; v, w). For w = A⁻ᵀ g the roles of
    a and b change.
    """

    @staticmethod
    def forward(equilibrium: Equilibrium, transpose: bool, g: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
        return equilibrium.resolvent(g, transpose=transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.equilibrium, ctx.transpose, _, z, *tensors = inputs
        ctx.save_for_backward(output, z, *tensors)
        ctx.save_for_forward(output, z, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        equilibrium: Equilibrium,
        transpose: bool,
        g: Tensor,
        z: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, int | None]:
        """Solve for many right-hand sides at one fixed point, as ``jacrev`` and ``hessian`` ask for. Not collective."""
        refuse_batched(in_dims[3:])
        if in_dims[2] is None:
            return Resolvent.apply(equilibrium, transpose, g, z, *tensors), None
        parts = [Resolvent.apply(equilibrium, transpose, part, z, *tensors) for part in g.unbind(in_dims[2])]
        return torch.stack(parts), 0

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        equilibrium, (w, z, *tensors) = ctx.equilibrium, ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if cotangent is None:
            return (None,) * (4 + len(tensors))
        v = Resolvent.apply(equilibrium, not ctx.transpose, cotangent, z, *tensors)
        # The gradient of s vanishes with w, as it does wherever a product J v is taken by differentiating a zero Jᵀ u.
        if not any(wanted) or not (torch.is_grad_enabled() or bool(w.any())):
            return None, None, v, *(None for _ in wanted)
        equilibrium.log.work.cell_vjps += 2 * equilibrium.samples.count
        gradient = bilinear_gradient(equilibrium.function, z, tensors, wanted)
        products = iter(gradient(w, v) if ctx.transpose else gradient(v, w))
        return None, None, v, *(next(products) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        equilibrium, (w, z, *tensors) = ctx.equilibrium, ctx.saved_tensors
        right, given = tangents[2], tangents[3:]
        wanted = [t is not None for t in given]
        if any(wanted):
            equilibrium.log.work.cell_jvps += 2 * equilibrium.samples.count
            gradient = bilinear_gradient(equilibrium.function, z, tensors, wanted)
            if ctx.transpose:
                pull = pullback(lambda b: gradient(w, b), torch.zeros_like(z))
            else:
                pull = pullback(lambda a: gradient(a, w), torch.zeros_like(z))
            (change,) = pull(tuple(t for t in given if t is not None))
            right = change if right is None else right + change
        assert right is not None
        return Resolvent.apply(equilibrium, ctx.transpose, right, z, *tensors)


def refuse_batched(in_dims: Sequence[int | None]) -> None:
    """Refuse a vmap over the inputs or weights of a fixed point. Not collective."""
    if any(dim is not None for dim in in_dims):
        raise HpcdeqError(
            "vmap over the input or the weights of a fixed point is not supported: give the samples as one batch"
        )


def pullback(function: Callable[..., Any], *at: Tensor) -> Callable[..., Any]:
    """Return the transpose of a function's derivative at a point. Not collective."""
    return torch.func.vjp(function, *at)[1]


def alias(tensor: Tensor) -> Tensor:
    """Return the tensor under a new name.

    Not collective. A saved *output* that is differentiated with respect to would lead back into the function that is
    being differentiated, and from there around without end.
    """
    return tensor.view_as(tensor)


def restrict(
    function: StateFunction, z: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return f as a function of the wanted tensors only, and their aliased values. Not collective."""
    state = alias(z)

    def partial(*chosen: Tensor) -> Tensor:
        values = iter(chosen)
        return function(state, *(next(values) if want else t for t, want in zip(tensors, wanted, strict=True)))

    return partial, tuple(alias(t) for t, want in zip(tensors, wanted, strict=True) if want)


def push_forward(
    function: Callable[..., Tensor], at: Sequence[Tensor], tangents: Sequence[Tensor], like: Tensor
) -> Tensor:
    """Return the derivative of a function along tangents, by differentiating its transpose twice.

    Not collective. Forward-mode automatic differentiation cannot be nested, and this runs inside its rules.
    """
    pull = pullback(function, *at)
    pull_back = pullback(pull, torch.zeros_like(like))
    return pull_back(tuple(tangents))[0]


def bilinear_gradient(
    function: StateFunction, z: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return (a, b) ↦ ∂s/∂(the wanted of z, *tensors) of s = <a, J b>. Not collective."""
    points = (z, *tensors)
    chosen = tuple(alias(p) for p, want in zip(points, wanted, strict=True) if want)

    def gradient(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        def transpose_product(*values: Tensor) -> Tensor:
            given = iter(values)
            state, *rest = (next(given) if want else alias(p) for p, want in zip(points, wanted, strict=True))
            pull = pullback(lambda y: function(y, *rest), state)
            return pull(a)[0]

        pull = pullback(transpose_product, *chosen)
        return pull(b)

    return gradient
