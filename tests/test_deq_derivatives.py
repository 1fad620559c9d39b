"""Derivatives of fixed points, each against a second computation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cells import TanhCell, unrolled
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp

from hpcdeq.deq import FixedPoint
from hpcdeq.errors import ConvergenceError, HpcdeqError

TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-14, "ksp_rtol": 1e-13}


def layer_and_arguments(**options: object) -> tuple[FixedPoint, list[str], tuple[Tensor, ...]]:
    layer = FixedPoint(TanhCell(), options={**TIGHT, **options})  # type: ignore[arg-type]
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    return layer, names, (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))


def as_function(layer: nn.Module, names: list[str]) -> Callable[..., Tensor]:
    return lambda x, *weights: functional_call(layer, dict(zip(names, weights, strict=True)), (x,))


def test_gradcheck_with_forward_mode() -> None:
    layer, names, arguments = layer_and_arguments()
    assert torch.autograd.gradcheck(as_function(layer, names), arguments, check_forward_ad=True)


def test_gradgradcheck() -> None:
    layer, names, arguments = layer_and_arguments()
    assert torch.autograd.gradgradcheck(as_function(layer, names), arguments)


@pytest.mark.parametrize("kind", ["bcgs", "tfqmr", "fgmres", "lgmres"])
def test_any_krylov_type(kind: str) -> None:
    layer, names, arguments = layer_and_arguments(ksp_type=kind)
    assert torch.autograd.gradcheck(as_function(layer, names), arguments, check_forward_ad=True)
    as_function(layer, names)(*arguments).sum().backward()
    assert layer.adjoint is not None and layer.adjoint.record.solver == kind


def test_gradients_equal_those_of_unrolling() -> None:
    layer, _, (x, *_) = layer_and_arguments()
    weight = torch.randn(4, 5, dtype=torch.float64)
    ours = torch.autograd.grad((layer(x) * weight).sum(), [x, *layer.parameters()])
    z = unrolled(layer.cell, x, torch.zeros(4, 5, dtype=torch.float64), 400)
    theirs = torch.autograd.grad((z * weight).sum(), [x, *layer.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_gradients_equal_torchdeqs() -> None:
    torchdeq = pytest.importorskip("torchdeq")
    layer, _, (x, *_) = layer_and_arguments()
    deq = torchdeq.get_deq(
        f_solver="anderson", f_tol=1e-13, f_max_iter=300, f_stop_mode="rel", b_solver="anderson", b_tol=1e-13, b_max_iter=300,
        ift=True, b_stop_mode="rel",
    )  # fmt: skip
    (z, *_), _ = deq(lambda z: layer.cell(z, x), torch.zeros(4, 5, dtype=torch.float64))
    theirs = torch.autograd.grad(z.square().sum(), list(layer.parameters()))
    ours = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_adjoint_and_tangent_equal_dense_solves() -> None:
    layer, _, (x, *_) = layer_and_arguments()
    z = layer(x)
    cell = layer.cell
    for i in range(4):
        jacobian = torch.func.jacrev(lambda state, i=i: cell(state[None], x[i : i + 1])[0])(z[i].detach())
        inside = torch.func.jacrev(lambda given, i=i: cell(z[i : i + 1].detach(), given[None])[0])(x[i].detach())
        dense = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - jacobian, inside)
        for column in range(5):
            (row,) = torch.autograd.grad(z[i, column], x, retain_graph=True)
            torch.testing.assert_close(row[i], dense[column], rtol=0, atol=1e-11)
            assert not bool(torch.cat([row[:i], row[i + 1 :]]).any())


def function_of_weights() -> tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Tensor]]:
    layer, _, (x, *_) = layer_and_arguments()
    at = {name: p.detach() for name, p in layer.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in at.items()}
    return lambda p: functional_call(layer, p, (x.detach(),)).pow(3).sum(), at, along


def test_forward_over_reverse_equals_reverse_over_forward() -> None:
    loss, at, along = function_of_weights()
    one = jvp(grad(loss), (at,), (along,))[1]
    _, pull = vjp(lambda p: jvp(loss, (p,), (along,))[1], at)
    (two,) = pull(torch.ones((), dtype=torch.float64))
    for name in at:
        torch.testing.assert_close(one[name], two[name], rtol=1e-10, atol=1e-10)


def test_taylor_rates_of_gradient_and_hessian() -> None:
    loss, at, along = function_of_weights()

    def moved(step: float) -> dict[str, Tensor]:
        return {name: at[name] + step * along[name] for name in at}

    value, slope = jvp(loss, (at,), (along,))
    _, curved = jvp(grad(loss), (at,), (along,))
    curvature = sum((curved[name] * along[name]).sum() for name in at)
    steps = [2e-2, 1e-2, 5e-3]
    first = [abs(float(loss(moved(h)) - value - h * slope)) for h in steps]
    second = [abs(float(loss(moved(h)) - value - h * slope - h * h / 2 * curvature)) for h in steps]
    rates = [torch.log2(torch.tensor(e[i] / e[i + 1])).item() for e in (first, second) for i in range(2)]
    assert min(rates[:2]) > 1.9
    assert min(rates[2:]) > 2.9


def test_third_derivative_by_finite_differences() -> None:
    layer = FixedPoint(TanhCell(width=2, features=2), options=TIGHT)
    x = torch.randn(1, 2, dtype=torch.float64)

    def curvature(given: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(layer(given).sum(), given, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), given, create_graph=True)
        return second

    along = torch.randn_like(x)
    at = x.clone().requires_grad_()
    (third,) = torch.autograd.grad(curvature(at), at, along)
    h = 1e-4
    ends = [curvature((x + s * h * along).requires_grad_()).detach() for s in (1, -1)]
    # The matrix of second derivatives of a scalar is symmetric: its transpose times `along` is its product with it.
    torch.testing.assert_close(third, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_jacobians_and_hessians_of_torch_func() -> None:
    layer = FixedPoint(TanhCell(), options=TIGHT)
    x = torch.randn(2, 3, dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), rows, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x), rows, rtol=0, atol=1e-10)

    def scalar(given: Tensor) -> Tensor:
        return layer(given).square().sum()

    expected = torch.autograd.functional.hessian(scalar, x)
    torch.testing.assert_close(torch.func.hessian(scalar)(x), expected, rtol=0, atol=1e-10)
    with pytest.raises(HpcdeqError, match="give the samples as one batch"):
        torch.func.vmap(lambda row: layer(row[None]))(x)


def test_single_precision() -> None:
    double = FixedPoint(TanhCell(), options=TIGHT)
    single = FixedPoint(TanhCell(dtype=torch.float32))
    single.load_state_dict({k: v.float() for k, v in double.state_dict().items()})
    x = torch.randn(4, 3, dtype=torch.float64)
    a = torch.autograd.grad(double(x).sum(), list(double.parameters()))
    b = torch.autograd.grad(single(x.float()).sum(), list(single.parameters()))
    for one, two in zip(a, b, strict=True):
        assert two.dtype == torch.float32
        torch.testing.assert_close(one.float(), two, rtol=1e-3, atol=1e-3)


def test_frozen_weights_get_no_gradient_and_do_no_harm() -> None:
    layer, _, (x, *_) = layer_and_arguments()
    layer.cell.injection.weight.requires_grad_(False)
    layer(x.detach()).sum().backward()
    assert layer.cell.injection.weight.grad is None
    assert layer.cell.recurrent.weight.grad is not None


def test_outcomes_of_adjoint_and_tangent_are_kept() -> None:
    layer, _, (x, *_) = layer_and_arguments(ksp_type="batched_anderson")
    z = layer(x)
    assert layer.adjoint is None and layer.tangent is None
    z.sum().backward()
    assert layer.adjoint is not None and layer.adjoint.reason.startswith("CONVERGED")
    assert layer.adjoint.residual.shape == (4,)
    assert bool((layer.adjoint.residual <= 1e-11 * layer.adjoint.right_hand_side).all())
    jvp(layer, (x.detach(),), (torch.ones_like(x),))
    assert layer.tangent is not None and layer.tangent.iterations > 0


@pytest.mark.parametrize("kind", ["gmres", "batched_anderson", "batched_gmres"])
def test_a_failed_adjoint_is_an_error_and_not_a_gradient(kind: str) -> None:
    layer, _, (x, *_) = layer_and_arguments(ksp_type=kind, ksp_max_it=1)
    z = layer(x)
    with pytest.raises(ConvergenceError, match=r"adjoint system .* DIVERGED_ITS(?s:.)*-deq_ksp_max_it"):
        z.sum().backward()
    with pytest.raises(ConvergenceError, match="tangent system"):
        jvp(layer, (x.detach(),), (torch.ones_like(x),))


def test_a_singular_system_is_an_error() -> None:
    layer = FixedPoint(lambda z, x: z + 0.0 * x)
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    z = layer(x)  # every state is a fixed point; I - J is zero
    with pytest.raises(ConvergenceError, match="adjoint system"):
        z.sum().backward()


def test_memory_does_not_hold_the_iterations() -> None:
    class Counting(TanhCell):
        calls = 0

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            Counting.calls += torch.is_grad_enabled() and z.requires_grad
            return super().forward(z, x)

    layer = FixedPoint(Counting(), options=TIGHT)
    z = layer(torch.randn(4, 3, dtype=torch.float64))
    assert layer.solution is not None and layer.solution.evaluations > 10
    assert Counting.calls == 1  # the linearisation's; the check for hidden tensors has no graph
    z.sum().backward()
    assert Counting.calls == 1


def test_weights_put_in_for_the_call_alone_are_those_of_the_adjoint() -> None:
    """Samples that leave the adjoint solve are linearised again, after ``functional_call`` has put the old weights back."""
    torch.manual_seed(0)
    layer = FixedPoint(
        TanhCell(10, norm=0.3), options={"snes_rtol": 1e-12, "ksp_rtol": 1e-11, "ksp_type": "batched_anderson"}
    )
    other = TanhCell(10, norm=0.9)
    x, weight = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 10, dtype=torch.float64)
    weights = {f"cell.{name}": p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    z = torch.func.functional_call(layer, weights, (x,))
    found = torch.autograd.grad((z * weight).sum(), list(weights.values()))
    z = FixedPoint(other, options={"snes_rtol": 1e-12, "ksp_type": "gmres", "ksp_rtol": 1e-12})(x)
    expected = torch.autograd.grad((z * weight).sum(), list(other.parameters()))
    assert layer.adjoint is not None and layer.work.cell_vjps < 30 * (layer.adjoint.iterations + 2)  # some left
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
