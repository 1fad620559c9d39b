"""Fixed points: every solver type, every shape, and what happens when there is none."""

from __future__ import annotations

import math

import pytest
import torch
from cells import TanhCell, unrolled
from torch import Tensor, nn

import hpcdeq
from hpcdeq.deq import FixedPoint, solve_fixed_point
from hpcdeq.errors import ConvergenceError, HpcdeqError, OptionError, ShapeError

SOLVERS = {
    "anderson": {},
    "ngmres": {},
    "qn": {},
    "newtonls": {},
    "newtontr": {},
    "nrichardson": {"snes_linesearch_type": "basic"},
    "ncg": {},
    "composite": {"snes_composite_sneses": "anderson,newtonls"},
}


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_solver_type_finds_the_fixed_point_of_unrolling(kind: str) -> None:
    cell, x = TanhCell(norm=0.5), torch.randn(7, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = unrolled(cell, x, torch.zeros(7, 5, dtype=torch.float64), 300)
    solution = solve_fixed_point(cell, x, options={"snes_type": kind, "snes_rtol": 1e-12, **SOLVERS[kind]})
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-10)
    assert solution.record.solver == kind
    assert solution.reason.startswith("CONVERGED")


def test_nonlinear_preconditioning_by_option() -> None:
    cell, x = TanhCell(), torch.randn(7, 3, dtype=torch.float64)
    options = {"snes_type": "ngmres", "npc_snes_type": "nrichardson", "npc_snes_max_it": 1}
    assert solve_fixed_point(cell, x, options=options).residual.max() < 1e-8


def test_the_residual_is_the_true_one_and_within_each_samples_tolerance() -> None:
    cell, x = TanhCell(), torch.randn(7, 3, dtype=torch.float64)
    solution = solve_fixed_point(cell, x, options={"snes_rtol": 1e-6, "snes_atol": 0.0})
    with torch.no_grad():
        image = cell(solution.value, x)
        residual = torch.linalg.vector_norm(image - solution.value, dim=1)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-15)
    assert bool((residual <= 1e-6 * torch.linalg.vector_norm(image, dim=1)).all())
    assert solution.iterations.shape == (7,)
    assert int(solution.iterations.max()) == solution.record.iterations


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    cell, x = TanhCell(norm=0.95), torch.randn(9, 3, dtype=torch.float64)
    options = {"snes_rtol": 1e-12}
    together = solve_fixed_point(cell, x, options=options).value
    for i in range(9):
        alone = solve_fixed_point(cell, x[i : i + 1], options=options).value
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4,), (3, 2), (2, 3, 4), (1, 2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_of_any_shape_and_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    solution = solve_fixed_point(lambda z, x: 0.5 * torch.cos(z) + x, x)
    assert solution.value.shape == shape and solution.value.dtype == dtype
    assert solution.residual.shape == ((shape[0],) if len(shape) > 1 else (1,))
    torch.testing.assert_close(solution.value, 0.5 * torch.cos(solution.value) + x, rtol=1e-4, atol=1e-4)


def test_no_samples_at_all() -> None:
    layer = FixedPoint(TanhCell())
    x = torch.empty(0, 3, dtype=torch.float64)
    z = layer(x, z0=torch.empty(0, 5, dtype=torch.float64))
    assert z.shape == (0, 5)
    z.sum().backward()


@pytest.mark.parametrize(
    ("cell", "start", "answer"),
    [
        (lambda z, x: 1 + 0.5 * (z - 1), 5.0, 1.0),  # geometric decay
        (lambda z, x: torch.cos(z), 0.5, 0.7390851332151607),
        (lambda z, x: 0.9 * torch.sin(z), 0.3, 0.0),
    ],
)
def test_scalar_problems_with_known_answers(cell: object, start: float, answer: float) -> None:
    z0 = torch.tensor([start], dtype=torch.float64)
    solution = solve_fixed_point(cell, None, z0=z0, options={"snes_atol": 1e-12})  # type: ignore[arg-type]
    assert math.isclose(float(solution.value[0]), answer, abs_tol=1e-9)


def test_a_rotation_which_plain_iteration_never_solves() -> None:
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    solution = solve_fixed_point(
        lambda z, x: z @ turn.T + x, torch.ones(3, 2, dtype=torch.float64), options={"snes_max_it": 20}
    )
    torch.testing.assert_close(solution.value, torch.tensor([0.0, 1.0], dtype=torch.float64).expand(3, 2))


def test_a_large_affine_map_against_a_direct_solve() -> None:
    matrix = 0.9 * nn.init.orthogonal_(torch.empty(200, 200, dtype=torch.float64))
    x = torch.randn(2, 200, dtype=torch.float64)
    solution = solve_fixed_point(lambda z, x: z @ matrix.T + x, x, options={"snes_rtol": 1e-12, "snes_anderson_m": 30})
    expected = torch.linalg.solve(torch.eye(200, dtype=torch.float64) - matrix, x.T).T
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-9)


def test_values_equal_torchdeqs() -> None:
    torchdeq = pytest.importorskip("torchdeq")
    cell, x = TanhCell(), torch.randn(6, 3, dtype=torch.float64)
    deq = torchdeq.get_deq(
        f_solver="anderson", f_tol=1e-12, f_max_iter=200, f_stop_mode="rel", b_tol=1e-12, b_max_iter=200
    )
    (theirs, *_), _ = deq(lambda z: cell(z, x), torch.zeros(6, 5, dtype=torch.float64))
    ours = FixedPoint(cell, options={"snes_rtol": 1e-12})(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["anderson", "ngmres", "newtonls", "nrichardson"])
def test_nan_is_an_error_with_its_sample(kind: str) -> None:
    x = torch.zeros(4, 3, dtype=torch.float64)
    x[2] = float("nan")
    with pytest.raises(ConvergenceError, match=r"sample .*2.*(?s:.)*DIVERGED_FUNCTION_NANORINF") as caught:
        solve_fixed_point(TanhCell(), x, options={"snes_type": kind})
    assert caught.value.record.reason == "DIVERGED_FUNCTION_NANORINF"


def test_no_fixed_point_is_an_error_with_reason_residual_and_remedy() -> None:
    layer = FixedPoint(nn.Module(), options={"snes_max_it": 20})
    layer.cell.forward = lambda z, x: z * z + x  # type: ignore[method-assign]
    with pytest.raises(
        ConvergenceError, match=r"not reached by batched_anderson(?s:.)*\|\|f\(z\) - z\|\| =(?s:.)*Likely fix"
    ) as caught:
        layer(torch.ones(3, 2, dtype=torch.float64))
    assert layer.solution is caught.value.record
    assert layer.work.unconverged == 3


def test_too_few_iterations_never_pass_for_a_solution() -> None:
    with pytest.raises(ConvergenceError, match="DIVERGED_MAX_IT after 2 iterations"):
        solve_fixed_point(TanhCell(), torch.randn(4, 3, dtype=torch.float64), options={"snes_max_it": 2})


def test_the_state_shape_is_found_or_asked_for() -> None:
    assert FixedPoint(TanhCell(width=5, features=3))(torch.randn(2, 3, dtype=torch.float64)).shape == (2, 5)
    with pytest.raises(ShapeError, match=r"pass z0="):
        FixedPoint(lambda z, x: z.sum(1, keepdim=True))(torch.randn(2, 3))
    with pytest.raises(ShapeError, match="type int"):
        FixedPoint(lambda z, x: z)(3)
    with pytest.raises(ShapeError, match=r"maps a state of shape \(2, 4\) to shape \(2, 5\)"):
        solve_fixed_point(lambda z, x: torch.zeros(2, 5), torch.zeros(2, 3), z0=torch.zeros(2, 4))


def test_inputs_in_containers() -> None:
    cell = TanhCell()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cell

        def initial_state(self, x: dict[str, list[Tensor]]) -> Tensor:
            return torch.zeros(4, 5, dtype=torch.float64)

        def forward(self, z: Tensor, x: dict[str, list[Tensor]]) -> Tensor:
            return self.inner(z, x["features"][0])

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    z = FixedPoint(Wrapped())({"features": [x], "name": "ignored"})
    torch.testing.assert_close(z, FixedPoint(cell)(x))
    z.sum().backward()
    assert x.grad is not None and bool(x.grad.any())


def test_sample_index_judges_whole_samples() -> None:
    index = torch.tensor([0, 0, 1, 1, 1])
    layer = FixedPoint(TanhCell(), sample_index=lambda x: index)
    layer(torch.randn(5, 3, dtype=torch.float64))
    assert layer.solution is not None and layer.solution.residual.shape == (2,)
    wrong = FixedPoint(TanhCell(), sample_index=lambda x: index[:3])
    with pytest.raises(ShapeError, match="sample_index"):
        wrong(torch.randn(5, 3, dtype=torch.float64))


def test_a_hidden_tensor_is_refused_instead_of_given_a_zero_gradient() -> None:
    hidden = torch.ones(2, requires_grad=True)
    with pytest.raises(HpcdeqError, match="neither a parameter of the cell nor inside x"):
        FixedPoint(lambda z, x: 0.5 * torch.tanh(z) + hidden * x)(torch.ones(3, 2))


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="-deq_snes_rtoll: did you mean -deq_snes_rtol"):
        hpcdeq.FixedPoint(TanhCell(), options={"snes_rtoll": 1e-8})


def test_prefixes_keep_layers_apart() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    first = FixedPoint(TanhCell(), petsc_prefix="one_", options={"snes_type": "newtonls"})
    second = FixedPoint(TanhCell(), petsc_prefix="two_", options={"snes_type": "ngmres"})
    first(x), second(x)
    assert (first.solution.record.solver, second.solution.record.solver) == ("newtonls", "ngmres")  # type: ignore[union-attr]
