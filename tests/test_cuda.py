"""The same numbers on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch
from cells import DeqRegressor, TanhCell

from hpcdeq import parallel
from hpcdeq.deq import FixedPoint, solve_fixed_point
from hpcdeq.models import build_model, model_config
from hpcdeq.optim import minimize
from hpcdeq.problem import TrainingProblem
from hpcdeq.problem.randomness import random_state, set_random_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

OPTIONS = [
    {},
    {"snes_anderson_type": 1, "snes_anderson_beta": 0.8},
    {"snes_type": "batched_newton"},
    {"snes_type": "ngmres"},
]
SYSTEMS = [{"ksp_type": kind} for kind in ("batched_anderson", "batched_gmres", "batched_lu", "gmres")]


def cell_and_input() -> tuple[TanhCell, torch.Tensor]:
    torch.manual_seed(0)
    return TanhCell(20, norm=0.9), torch.randn(40, 3, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS)
def test_fixed_points(options: dict) -> None:
    cell, x = cell_and_input()
    expected = solve_fixed_point(cell, x, options=options).value
    solution = solve_fixed_point(cell.cuda(), x.cuda(), options=options)
    assert solution.value.is_cuda
    torch.testing.assert_close(solution.value.cpu(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", SYSTEMS)
def test_gradients(options: dict) -> None:
    cell, x = cell_and_input()
    weight = torch.randn(40, 20, dtype=torch.float64)
    x.requires_grad_()
    (expected,) = torch.autograd.grad((FixedPoint(cell, options=options)(x) * weight).sum(), x)
    moved = x.detach().cuda().requires_grad_()
    (found,) = torch.autograd.grad((FixedPoint(cell.cuda(), options=options)(moved) * weight.cuda()).sum(), moved)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-7)


def test_random_numbers_of_a_checkpoint() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    kept = random_state(gpu)
    drawn = torch.rand(5), torch.rand(5, device=gpu)
    set_random_state(kept, gpu)
    again = torch.rand(5), torch.rand(5, device=gpu)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    set_random_state(kept, cpu)  # a run that goes on without the GPU
    assert torch.equal(torch.rand(5), drawn[0])


def test_training() -> None:
    cell, x = cell_and_input()
    targets = torch.sin(x)
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        model = DeqRegressor(FixedPoint(TanhCell(20)), 20, 3).to(device)
        results.append(minimize(TrainingProblem(model, (x, targets), "mse", parallel.SELF), "trgn", max_iterations=4))
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)


def test_the_convolutional_model_in_single_precision() -> None:
    config = model_config("conv_deq", {})
    model = build_model("conv_deq", config, "array", (3, 32, 32), 10, dtype=torch.float32, device="cuda")
    model(torch.randn(8, 3, 32, 32, device="cuda")).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
