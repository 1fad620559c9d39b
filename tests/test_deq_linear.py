"""Tangent and adjoint systems: every type against dense solves, recycling, the automatic choice, inexact adjoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cells import TanhCell, unrolled
from oracles import Watched, affine, graphs, matrices, randn, zeros
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp

from hpcdeq.deq import FixedPoint, linear, solve_fixed_point
from hpcdeq.deq.arguments import CellFunction
from hpcdeq.deq.forward import ForwardSolver
from hpcdeq.deq.history import SECANT_RIDGE
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.linear import LinearSolver
from hpcdeq.deq.samples import Samples
from hpcdeq.deq.work import Work
from hpcdeq.errors import ConvergenceError, HpcdeqError, OptionError
from hpcdeq.models.graph_deq import MessageCell
from hpcdeq.petsc.options import Options

TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-14, "ksp_rtol": 1e-13}
ITERATIVE: dict[str, dict[str, Any]] = {
    "automatic": {},
    "gmres": {"ksp_type": "gmres"},
    "batched_anderson": {"ksp_type": "batched_anderson"},
    "mixing always": {"ksp_type": "batched_anderson", "ksp_anderson_period": 1, "ksp_anderson_m": 20},
    "type I": {"ksp_type": "batched_anderson", "ksp_anderson_type": 1, "ksp_anderson_beta": 0.8},
    "batched_gmres": {"ksp_type": "batched_gmres"},
    "secant": {"pc_type": "secant"},
    "secant of type I": {"pc_type": "secant", "snes_anderson_type": 1, "ksp_type": "bcgs"},
}
DIRECT = {
    "batched_lu": {"ksp_type": "batched_lu"},
    "LU alone": {"pc_type": "batched_lu"},
    "LU in gmres": {"pc_type": "batched_lu", "ksp_type": "gmres"},
}
EVERY = {**ITERATIVE, **DIRECT}
INEXACT = ["jfb", "phantom", "shine"]


class Shifted(nn.Module):
    """z ↦ tanh(W z) + x: its derivative with respect to x is the identity."""

    def __init__(self, width: int = 6, norm: float = 0.9) -> None:
        super().__init__()
        weight = randn(width, width)
        self.weight = nn.Parameter(norm * weight / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T) + x


def jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return jacrev(function)(at.detach()).reshape(-1, at.numel()).detach()


def resolvent(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return the whole matrix I - J."""
    return torch.eye(z.numel(), dtype=z.dtype) - jacobian(function, z)


def solver_of(cell: Any, x: Any, z: Tensor, options: dict[str, Any], index: Tensor | None = None, **more: Any):
    function = CellFunction(cell, x)
    at = Linearisation(function, z, function.tensors)
    return LinearSolver(
        at, function.bind(function.tensors, now=True), Samples.of(z, index), Options("deq_", options), Work(), **more
    )


# --------------------------------------------------------------------------------------------------------- all types


@pytest.mark.parametrize("kind", EVERY)
def test_tangents_and_adjoints_equal_dense_solves(kind: str) -> None:
    layer = FixedPoint(Shifted(), options={**TIGHT, **EVERY[kind]})
    x, g = randn(4, 6).requires_grad_(), randn(4, 6) * torch.logspace(-6, 2, 4, dtype=torch.float64)[:, None]
    z = layer(x)
    matrix = resolvent(lambda state: layer.cell(state, x), z)
    (adjoint,) = torch.autograd.grad(z, x, g)
    expected = torch.linalg.solve(matrix.T, g.ravel()).reshape(4, 6)
    torch.testing.assert_close(adjoint, expected, rtol=0, atol=1e-9)
    tangent = jvp(layer, (x.detach(),), (g,))[1]
    torch.testing.assert_close(tangent, torch.linalg.solve(matrix, g.ravel()).reshape(4, 6), rtol=0, atol=1e-9)
    assert layer.adjoint is not None and layer.tangent is not None
    for outcome in (layer.adjoint, layer.tangent):
        assert outcome.reason.startswith("CONVERGED") and outcome.residual.shape == (4,)
        torch.testing.assert_close(outcome.right_hand_side, torch.linalg.vector_norm(g, dim=1))
    if "batched" in layer.method:  # judged sample by sample
        torch.testing.assert_close(adjoint[0], expected[0], rtol=1e-9, atol=0)
        assert bool((layer.adjoint.residual <= 1e-12 * layer.adjoint.right_hand_side).all())


@pytest.mark.parametrize("kind", ITERATIVE)
def test_graphs_of_several_sizes_equal_dense_solves(kind: str) -> None:
    options = {**TIGHT, **ITERATIVE[kind]}
    layer = FixedPoint(MessageCell(), options=options, sample_index=lambda given: given.node_graph)
    given = graphs([3, 5, 4], width=3)
    node, g = given.node.clone().requires_grad_(), randn(12, 3)
    z = layer(replace(given, node=node))
    matrix = resolvent(lambda state: layer.cell(state, given), z)
    inside = jacobian(lambda n: layer.cell(z.detach(), replace(given, node=n)), node)
    (adjoint,) = torch.autograd.grad(z, node, g)
    expected = (inside.T @ torch.linalg.solve(matrix.T, g.ravel())).reshape(12, 3)
    torch.testing.assert_close(adjoint, expected, rtol=0, atol=1e-9)
    tangent = jvp(lambda n: layer(replace(given, node=n)), (given.node,), (g,))[1]
    expected = torch.linalg.solve(matrix, inside @ g.ravel()).reshape(12, 3)
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-9)
    assert layer.tangent is not None and layer.tangent.residual.shape == (3,)


@pytest.mark.parametrize("kind", EVERY)
def test_derivatives_of_all_orders(kind: str) -> None:
    layer = FixedPoint(TanhCell(width=2, features=2, norm=0.6), options={**TIGHT, **EVERY[kind]})
    names = [name for name, _ in layer.named_parameters()]
    x = randn(2, 2).requires_grad_()

    def function(given: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, weights, strict=True)), (given,))

    arguments = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    rounding = 1e-11 if kind == "batched_gmres" else 0.0  # what it has learned makes a second solve another one
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, nondet_tol=rounding)
    assert torch.autograd.gradgradcheck(function, arguments, nondet_tol=rounding)
    cell = layer.cell
    expected = torch.autograd.functional.hessian(lambda y: unrolled(cell, y, zeros(2, 2), 90).pow(3).sum(), x.detach())
    found = torch.func.hessian(lambda y: layer(y).pow(3).sum())(x.detach())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", DIRECT)
def test_factors_are_refused_where_samples_have_several_rows(kind: str) -> None:
    layer = FixedPoint(MessageCell(), options=DIRECT[kind], sample_index=lambda given: given.node_graph)
    given = graphs([3, 5])
    z = layer(replace(given, node=given.node.clone().requires_grad_()))
    with pytest.raises(
        OptionError, match="batched_lu needs a state with one row a sample(?s:.)*ksp_type batched_anderson"
    ):
        z.sum().backward()


@pytest.mark.parametrize("kind", ["batched_anderson", "batched_gmres"])
def test_values_out_of_range_are_refused(kind: str) -> None:
    for name, value in {"m": -1, "beta": 0, "period": 0, "type": 0, "delay": -1, "restart": -1, "growth": 0.5}.items():
        layer = FixedPoint(Shifted(), options={"ksp_type": kind, f"ksp_anderson_{name}": value})
        with pytest.raises(OptionError, match=f"-deq_ksp_anderson_{name}: give"):
            layer(randn(2, 6).requires_grad_()).sum().backward()


# ---------------------------------------------------------------------------------------- per-sample Krylov methods


@pytest.mark.parametrize("transpose", [False, True])
def test_batched_gmres_needs_as_many_products_as_gmres(transpose: bool) -> None:
    x, g = matrices(0.95, d=40), randn(1, 40)
    counts = []
    for kind in ("gmres", "batched_gmres"):
        solver = solver_of(affine, x, zeros(1, 40), {"ksp_type": kind, "ksp_anderson_m": 60, "ksp_rtol": 1e-8})
        solver.solve(g, transpose=transpose)
        counts.append(solver.outcome.iterations)
    assert abs(counts[0] - counts[1]) <= 1 and counts[0] > 8


@pytest.mark.parametrize("order", [(False, False), (True, True), (False, True, False, True)])
def test_later_right_hand_sides_are_cheaper_after_samples_have_left(order: tuple[bool, ...]) -> None:
    turns = torch.stack([norm * nn.init.orthogonal_(zeros(24, 24)) for norm in (0.97, 0.0, 0.9, 1e-6, 0.5)])
    turns[4, :, 6:] = 0.0  # which ends after few products
    x, samples = (turns, randn(5, 24)), torch.eye(24, dtype=torch.float64)
    solver = solver_of(affine, x, randn(5, 24), {"ksp_type": "batched_gmres"})
    iterations: dict[bool, list[int]] = {False: [], True: []}
    products = []
    for transpose in order:
        g = randn(5, 24) * torch.tensor([[1.0], [2.0], [0.1], [3.0], [1e3]], dtype=torch.float64)
        before = solver.work.cell_jvps + solver.work.cell_vjps
        found = solver.solve(g, transpose=transpose)
        matrix = samples - (turns.mT if transpose else turns)
        torch.testing.assert_close(found, torch.linalg.solve(matrix, g), rtol=1e-8, atol=1e-9)
        residual = torch.linalg.vector_norm(g - torch.einsum("bij,bj->bi", matrix, found), dim=1)
        torch.testing.assert_close(solver.outcome.residual, residual, rtol=1e-3, atol=1e-11)
        iterations[transpose].append(solver.outcome.iterations)
        products.append(solver.work.cell_jvps + solver.work.cell_vjps - before)
    assert products[0] < 5 * iterations[order[0]][0]  # the easy ones have left
    for counts in iterations.values():
        assert not counts or counts[0] > 15
        assert max(counts[1:], default=0) <= 4


def test_products_that_are_nan_are_an_error() -> None:
    a, b = matrices(0.5, 0.5)
    a[1, 2, 2] = float("nan")
    for kind in ("batched_anderson", "batched_gmres"):
        with pytest.raises(ConvergenceError, match="tangent system .* DIVERGED_NANORINF"):
            solver_of(affine, (a, b), zeros(2, 8), {"ksp_type": kind}).solve(b, transpose=False)


def test_a_right_hand_side_of_zero_needs_no_solve() -> None:
    solver = solver_of(affine, matrices(0.5, 0.5), zeros(2, 8), {"ksp_type": "batched_gmres"})
    assert not bool(solver.solve(zeros(2, 8), transpose=True).any()) and solver.outcome.iterations == 0
    g = randn(2, 8)
    g[0] = 0.0  # in one sample
    assert not bool(solver.solve(g, transpose=True)[0].any())


# ------------------------------------------------------------------------------------------------ the automatic choice


def method(width: int, solves: int = 1, index: Tensor | None = None, **options: Any) -> tuple[str, str]:
    cell, z = Shifted(width, norm=0.5), zeros(2, width)
    solver = solver_of(cell, zeros(2, width), z, options, index, solves=solves)
    g = randn(2, width)
    expected = torch.linalg.solve(torch.eye(width, dtype=torch.float64) - cell.weight.detach(), g.T).T
    torch.testing.assert_close(solver.solve(g, transpose=False), expected, rtol=0, atol=1e-8)
    return solver.method, solver.outcome.record.solver


def test_small_states_are_solved_directly_and_large_ones_by_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, mixing = "^dense LU factors: {} numbers a sample", "^per-sample Anderson mixing: {} numbers a sample"
    for (text, kind), told, solver in (
        (method(5), dense.format(5), "batched_lu"),
        (method(300), mixing.format(300), "batched_anderson"),
        (method(100), mixing.format(100) + ", 1 solves", "batched_anderson"),
        (method(100, solves=60), dense.format(100) + ", 60 solves", "batched_lu"),
        (method(5, index=torch.tensor([0, 0])), "samples of several rows", "batched_anderson"),
        (method(5, ksp_type="batched_gmres"), "^batched_gmres .* as the options say", "batched_gmres"),
        (method(5, ksp_type="batched_anderson"), "^batched_anderson .* as the options say", "batched_anderson"),
        (method(300, ksp_type="batched_lu"), "^batched_lu .* as the options say", "batched_lu"),
        (method(300, pc_type="batched_lu"), "^preonly with preconditioner batched_lu, as the options", "preonly"),
    ):
        assert re.search(told, text) and kind == solver
    monkeypatch.setattr(linear, "DENSE_BYTES", 100)
    text, kind = method(5)
    assert "factors would take" in text and kind == "batched_anderson"


def test_the_layer_says_how_its_systems_were_solved() -> None:
    layer = FixedPoint(Shifted())
    assert layer.method == "" and layer.inexact is None
    layer(randn(3, 6).requires_grad_()).sum().backward()
    assert layer.method.startswith("dense LU factors: 6 numbers a sample")


def test_samples_that_depend_on_each_other_have_their_derivatives_too() -> None:
    class Coupled(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * torch.tanh(z - z.mean(dim=0)) + x

    layer, x, g = FixedPoint(Coupled(), options=TIGHT), randn(5, 3).requires_grad_(), randn(5, 3)
    (found,) = torch.autograd.grad(layer(x), x, g)
    (expected,) = torch.autograd.grad(unrolled(layer.cell, x, zeros(5, 3), 200), x, g)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert layer.method.startswith("gmres")


# ------------------------------------------------------------------------------------------------------------- secant


def secant_inverse(states: Sequence[Tensor], images: Sequence[Tensor], kind: int) -> Tensor:
    """Return H of one sample from its last states and images, least squares with the documented ridge."""
    df = torch.stack([b - a for a, b in zip(images, images[1:], strict=False)], dim=1)
    dz = torch.stack([b - a for a, b in zip(states, states[1:], strict=False)], dim=1)
    dr = df - dz
    left = dr if kind == 2 else dz
    gram = left.T @ dr
    gram = gram + SECANT_RIDGE * gram.diagonal().abs().diag()
    return torch.eye(len(df), dtype=df.dtype) - df @ torch.linalg.solve(gram, left.T)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_secant_inverse_equals_its_formula(ragged: bool, kind: int) -> None:
    if ragged:
        x = graphs([2, 1, 3], width=5)
        cell, index, z0 = MessageCell(), x.node_graph, 0.1 * randn(6, 5)
    else:
        cell, x, index, z0 = Shifted(5), randn(6, 5), None, zeros(6, 5)
    watched = Watched(cell)
    function, samples = CellFunction(watched, x), Samples.of(z0, index)
    options = {"snes_anderson_m": 4, "snes_anderson_period": 3, "snes_max_it": 6, "snes_anderson_type": kind}
    solver = ForwardSolver(
        function.bind(function.tensors, now=True),
        samples,
        Options("deq_", {**options, "snes_fallback": "none"}),
        Work(),
    )
    solver.retain = True
    assert not bool(solver.solve(z0).converged.any())
    assert solver.history is not None
    v, y, states = randn(6, 5), randn(6, 5), watched.states[2:7]
    images = [cell(z, x).detach() for z in states]
    forth, back = solver.history.inverse_product(v, transpose=False), solver.history.inverse_product(y, transpose=True)
    assert float((forth * y).sum()) == pytest.approx(float((v * back).sum()), rel=1e-8)
    for i in range(samples.count):
        rows = slice(i, i + 1) if index is None else index == i
        h = secant_inverse([s[rows].ravel() for s in states], [s[rows].ravel() for s in images], kind)
        torch.testing.assert_close(forth[rows].ravel(), h @ v[rows].ravel(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(back[rows].ravel(), h.T @ y[rows].ravel(), rtol=1e-5, atol=1e-6)
    dz, df = states[-1] - states[-2], images[-1] - images[-2]
    secant = solver.history.inverse_product(df - dz, transpose=False)
    torch.testing.assert_close(secant, -dz, rtol=0, atol=1e-2 * float(dz.abs().max()))


@pytest.mark.parametrize("kind", [1, 2])
def test_the_secant_preconditioner_saves_iterations(kind: int) -> None:
    x, counts = randn(3, 40), {}
    cell = Shifted(40, norm=0.98)
    for pc in ("none", "secant"):
        options = {"ksp_type": "gmres", "pc_type": pc, "snes_anderson_m": 30, "snes_anderson_type": kind}
        layer = FixedPoint(cell, options=options)
        (grad,) = torch.autograd.grad(layer(x.clone().requires_grad_()).sum(), cell.weight)
        jvp(layer, (x,), (randn(3, 40),))
        assert layer.adjoint is not None and layer.tangent is not None
        counts[pc] = (layer.adjoint.iterations, layer.tangent.iterations, grad)
    torch.testing.assert_close(counts["none"][2], counts["secant"][2], rtol=1e-6, atol=1e-6)
    assert counts["secant"][0] < 0.8 * counts["none"][0] and counts["secant"][1] < 0.8 * counts["none"][1]


@pytest.mark.parametrize("options", [{"snes_type": "newtonls"}, {"snes_anderson_m": 0}])
def test_without_a_history_there_is_no_secant(options: dict[str, Any]) -> None:
    for choice in ({"pc_type": "secant"}, {"ksp_type": "shine"}):
        layer = FixedPoint(Shifted(norm=0.3), options={**options, **choice})
        with pytest.raises(OptionError, match="needs the history of a forward solve by batched_anderson"):
            layer(randn(2, 6).requires_grad_()).sum().backward()


# ------------------------------------------------------------------------------------------------------------ inexact


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (4, 1.0), (3, 0.6), (30, 0.7)])
def test_phantom_is_the_gradient_of_a_few_damped_steps(steps: int, damping: float) -> None:
    options = {"ksp_type": "phantom", "ksp_phantom_steps": steps, "ksp_phantom_damping": damping, **TIGHT}
    layer, x, g = FixedPoint(Shifted(), options=options), randn(4, 6).requires_grad_(), randn(4, 6)
    found = torch.autograd.grad(layer(x), [x, layer.cell.weight], g)
    z = layer(x).detach()
    for _ in range(steps):
        z = damping * layer.cell(z, x) + (1 - damping) * z
    for a, b in zip(found, torch.autograd.grad(z, [x, layer.cell.weight], g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert layer.adjoint is not None and layer.adjoint.reason == "INEXACT_PHANTOM"


def test_jfb_is_the_gradient_of_the_last_evaluation() -> None:
    layer, x, g = FixedPoint(Shifted(), options={"ksp_type": "jfb"}), randn(4, 6).requires_grad_(), randn(4, 6)
    z = layer(x)
    found = torch.autograd.grad(z, [x, layer.cell.weight], g)
    expected = torch.autograd.grad(layer.cell(z.detach(), x), [x, layer.cell.weight], g)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[0], g)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", [1, 2])
def test_shine_uses_the_differences_of_the_forward_solve(kind: int) -> None:
    options = {"snes_anderson_m": 5, "snes_rtol": 1e-5, "snes_anderson_type": kind}
    layer, x, g = FixedPoint(Shifted(15), options={**options, "ksp_type": "shine"}), 2 * randn(3, 15), randn(3, 15)
    (found,) = torch.autograd.grad(layer(given := x.clone().requires_grad_()), given, g)
    for i in range(3):
        watched = Watched(layer.cell)
        solve_fixed_point(watched, x[i : i + 1], z0=zeros(1, 15), options=options)
        states = [z[0] for z in watched.states[-6:]]
        h = secant_inverse(states, [layer.cell(z, x[i]).detach() for z in states], kind)
        torch.testing.assert_close(found[i], h.T @ g[i], rtol=0, atol=1e-6)
    assert layer.adjoint is not None and layer.adjoint.reason == "INEXACT_SHINE"


@pytest.mark.parametrize("kind", INEXACT)
def test_inexact_adjoints_say_so_and_refuse_what_must_be_exact(kind: str) -> None:
    layer, x = FixedPoint(Shifted(), options={"ksp_type": kind}), randn(4, 6)
    assert layer.inexact == kind
    layer(given := x.clone().requires_grad_()).sum().backward()
    assert layer.adjoint is not None and layer.adjoint.reason == f"INEXACT_{kind.upper()}"
    assert bool(layer.adjoint.residual.isnan().all()) and kind in layer.method
    for wanted in (
        lambda: jvp(layer, (x,), (x,)),
        lambda: torch.autograd.grad(layer(given).sum(), given, create_graph=True),
        lambda: torch.autograd.functional.hessian(lambda y: layer(y).sum(), x),
        lambda: torch.func.hessian(lambda y: layer(y).sum())(x),
    ):
        with pytest.raises(HpcdeqError, match=f"needs exact derivatives, and -ksp_type {kind} is an inexact adjoint"):
            wanted()


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("damping", 0.0), ("damping", 1.5)])
def test_phantom_settings_without_a_meaning_are_refused(name: str, value: float) -> None:
    layer = FixedPoint(Shifted(), options={"ksp_type": "phantom", f"ksp_phantom_{name}": value})
    with pytest.raises(OptionError, match="give 1 or more steps, and a damping above 0 up to 1"):
        layer(randn(2, 6).requires_grad_()).sum().backward()
