"""Warm starts, predicted states, adaptive accuracy, and samples without a fixed point: cheaper, never different."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from cells import DeqRegressor, TanhCell
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.deq import FixedPoint, StateCache
from hpcdeq.deq.samples import Samples
from hpcdeq.errors import ConvergenceError, OptionError
from hpcdeq.optim import minimize
from hpcdeq.problem import TrainingProblem
from hpcdeq.problem.accuracy import ALLOWED_ERROR, BEGINNING, Accuracy
from hpcdeq.problem.branches import elsewhere


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return x, torch.sin(2 * x)


def problem(comm: parallel.Comm = parallel.SELF, norm: float = 0.9, **settings: object) -> TrainingProblem:
    torch.manual_seed(1)
    options = {"snes_rtol": 1e-10, "ksp_rtol": 1e-10, "ksp_type": "batched_anderson", "snes_fallback": "none"}
    model = DeqRegressor(FixedPoint(TanhCell(12, norm=norm), options=options), 12, 3)
    inputs, targets = data()
    own = (
        parallel.own_slice(len(inputs), comm.rank, max(1, comm.size - 1)) if comm.rank < max(1, comm.size - 1) else None
    )
    rows = slice(0, 0) if own is None else own
    return TrainingProblem(model, (inputs[rows], targets[rows]), "mse", comm, chunk_size=7, **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- the cache


def test_states_are_recalled_by_sample_in_any_order() -> None:
    cache = StateCache(10**6)
    states = torch.arange(12.0).reshape(4, 3)
    cache.keep("layer", [5, 6, 7, 8], states, Samples(4))
    default = torch.full((3, 3), -1.0)
    recalled = cache.recall("layer", [8, 2, 5], default, Samples(3))
    assert torch.equal(recalled, torch.stack([states[3], default[1], states[0]]))
    assert torch.equal(cache.recall("another", [8, 2, 5], default, Samples(3)), default)


def test_states_of_several_rows_are_recalled_whole() -> None:
    cache = StateCache(10**6)
    index = torch.tensor([0, 0, 1, 2, 2, 2])
    cache.keep("layer", [10, 11, 12], torch.arange(6.0)[:, None], Samples(3, index))
    recalled = cache.recall("layer", [12, 10], torch.zeros(5, 1), Samples(2, torch.tensor([0, 0, 0, 1, 1])))
    assert recalled[:, 0].tolist() == [3.0, 4.0, 5.0, 0.0, 1.0]
    other_size = cache.recall("layer", [11], torch.full((2, 1), -1.0), Samples(1, torch.tensor([0, 0])))
    assert other_size[:, 0].tolist() == [-1.0, -1.0]


def test_memory_is_bounded_and_given_back() -> None:
    cache = StateCache(100)
    cache.keep("layer", [0, 1], torch.zeros(2, 5), Samples(2))  # 40 bytes
    cache.keep("layer", [2, 3, 4, 5], torch.ones(4, 5), Samples(4))  # 80 more do not fit
    assert cache.bytes == 40
    assert torch.equal(cache.recall("layer", [2], torch.full((1, 5), 7.0), Samples(1)), torch.full((1, 5), 7.0))
    for _ in range(5):
        cache.keep("layer", [1, 0], torch.ones(2, 5), Samples(2))
    assert cache.bytes == 40


# ----------------------------------------------------------------------------------------------- warm starts


@pytest.mark.parallel([1, 2, 3])
def test_warm_starts_change_the_work_and_not_the_numbers(comm: parallel.Comm) -> None:
    cold, warm = problem(comm, warm_start=False), problem(comm)
    p = cold.initial()
    generator = torch.Generator().manual_seed(0)
    spent = []
    for step in range(4):
        q = p + 0.01 * step * torch.randn(len(p), dtype=p.dtype, generator=generator)
        a, b = cold.loss_and_gradient(q), warm.loss_and_gradient(q)
        assert b[0] == pytest.approx(a[0], rel=1e-9)
        assert float((a[1] - b[1]).norm()) <= 1e-8 * float(a[1].norm())
        spent.append((cold.accounts.totals().cell_evaluations, warm.accounts.totals().cell_evaluations))
    assert spent[0][0] == spent[0][1]
    assert spent[-1][1] - spent[0][1] < 0.95 * (spent[-1][0] - spent[0][0])


def test_rows_in_any_order_find_their_own_states() -> None:
    warm = problem()
    p = warm.initial()
    warm.loss(p)
    before = warm.accounts.totals().cell_evaluations
    rows = np.array([20, 3, 11, 7, 16])
    value = warm.loss(p, rows)
    assert warm.accounts.totals().cell_evaluations - before <= 2 * len(rows)
    assert value == pytest.approx(problem(warm_start=False).loss(p, rows), rel=1e-9)


def test_a_gauss_newton_step_predicts_the_states() -> None:
    kept = problem()
    p = kept.initial()
    kept.loss_and_gradient(p)
    generator = torch.Generator().manual_seed(4)
    v, w = (torch.randn(len(p), dtype=p.dtype, generator=generator) for _ in range(2))
    kept.gauss_newton_product(p, v)
    kept.gauss_newton_product(p, w)

    def evaluations(q: Tensor) -> float:
        before = kept.accounts.totals().cell_evaluations
        kept.loss(q)
        return (kept.accounts.totals().cell_evaluations - before) / 24

    step = 1e-4 * (0.3 * v - 0.7 * w)
    mixture = kept.guidance._mixture(p + step)
    assert mixture is not None
    torch.testing.assert_close(mixture, torch.tensor([0.3e-4, -0.7e-4], dtype=p.dtype), rtol=1e-6, atol=0)
    predicted = kept.guidance._predict(mixture, 0, "layer")
    assert predicted is not None
    fresh = problem(warm_start=False)  # finds the state at the new weights from nothing
    fresh.loss(p + step)
    with torch.no_grad():
        pieces = dict(zip(fresh.layout.names, fresh.layout.unflatten(p + step), strict=True))
        torch.func.functional_call(fresh.model, pieces, (data()[0][:7],))
    found = fresh.model.layer.solution.value
    old = kept.guidance._states[0, "layer"]
    # An error of second order in the step.
    assert float((predicted - found).norm()) < 0.05 * float((old - found).norm())
    along = evaluations(p + step)
    across = evaluations(p + 1e-4 * torch.randn(len(p), dtype=p.dtype, generator=generator))
    assert along < across


# -------------------------------------------------------------------------------------------------- accuracy


def test_tolerances_follow_the_progress() -> None:
    accuracy = Accuracy()
    assert accuracy.tolerance == BEGINNING
    assert accuracy.update(1.0, 10.0, 2.0)
    accuracy.learn(0.25 * ALLOWED_ERROR)  # as it should be
    assert not accuracy.update(0.5, 5.0, 2.0)
    assert accuracy.tolerance == pytest.approx(0.5 * BEGINNING)
    accuracy.update(0.499, 5.0, 2.0)  # hardly any decrease
    assert accuracy.tolerance == pytest.approx(BEGINNING * (0.001 / 0.499) / 0.1)
    assert accuracy.update(0.3, 5.0, 4.0)  # adjoints grew: measure
    assert accuracy.tolerance == pytest.approx(0.5 * BEGINNING / 4)
    accuracy.learn(1.0)  # far too wrong
    assert accuracy.factor <= BEGINNING * ALLOWED_ERROR
    last = accuracy.tolerance
    accuracy.stop()
    accuracy.update(0.1, 5.0, 4.0)
    assert accuracy.tolerance == 0.0 and f"tolerance {last:.1e} in the last steps" in accuracy.describe()


def test_minibatches_that_rise_and_fall_ask_for_no_more_accuracy() -> None:
    """Only growing adjoints, and errors that were measured, make solves tighter."""
    accuracy = Accuracy(noisy=True)
    accuracy.update(1.0, 10.0, 2.0)
    accuracy.learn(0.25 * ALLOWED_ERROR)
    for loss, norm in ((1.1, 5.0), (0.5, 20.0), (0.5, 0.1)):
        accuracy.update(loss, norm, 2.0)
        assert accuracy.tolerance == BEGINNING
    accuracy.update(0.5, 0.1, 4.0)
    assert accuracy.tolerance == pytest.approx(BEGINNING / 4)
    accuracy.learn(1.0)
    assert accuracy.tolerance < BEGINNING * ALLOWED_ERROR


@pytest.mark.parametrize(("method", "iterations"), [("lbfgs", 15), ("trgn", 3), ("newton", 3)])
def test_adaptive_runs_cost_less_and_end_at_the_same_loss(method: str, iterations: int) -> None:
    exact, loose = problem(norm=0.8, warm_start=False), problem(norm=0.8, adaptive=True)
    a = minimize(exact, method, max_iterations=iterations, raise_on_failure=False)
    b = minimize(loose, method, max_iterations=iterations, raise_on_failure=False)
    assert b.loss == pytest.approx(a.loss, rel=0.1)
    assert b.loss == pytest.approx(exact.loss(b.x), rel=1e-8)  # what is reported is solved for as the options say
    assert b.counts.cell_evaluations < 0.6 * a.counts.cell_evaluations
    assert loose.accuracy is not None and loose.accuracy.measured


def test_the_measured_error_is_the_gradients() -> None:
    loose = problem(adaptive=True)
    p = loose.initial()
    loose.begin()
    loose.guidance.loosened = (1e-3, 1e-3)
    _, rough = loose.local.loss_and_gradient(p, np.arange(7))
    fresh = problem(warm_start=False)
    _, tight = fresh.local.loss_and_gradient(p, np.arange(7))
    expected = float((rough - tight).norm() / tight.norm())
    assert 1e-7 < expected < ALLOWED_ERROR
    assert loose._gradient_error(p) <= 2 * expected


def test_an_adaptive_run_ends_as_exactly_as_a_tight_one() -> None:
    kept = {"norm": 0.5, "weight_decay": 0.1}  # a cell that stays contractive: its fixed points are the only ones
    result = minimize(problem(adaptive=True, **kept), "lbfgs", max_iterations=300, options={"tao_gatol": 1e-6})  # type: ignore[arg-type]
    assert result.status == "converged"
    assert result.gradient_norm <= 1e-6
    assert float(problem(warm_start=False, **kept).gradient(result.x).norm()) <= 1.1e-6  # type: ignore[arg-type]


class Bistable(nn.Module):
    """z ↦ tanh(3 z + x + b): two fixed points attract where x + b is small."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(3 * z + x + self.b)


@pytest.mark.parallel([1, 2, 3])
def test_a_loss_of_fixed_points_that_only_warm_starts_find_is_told(comm: parallel.Comm) -> None:
    x = torch.linspace(-0.15, 0.15, 7, dtype=torch.float64)[:, None]
    own = parallel.own_slice(len(x), comm.rank, comm.size)
    model = FixedPoint(Bistable(), options={"snes_rtol": 1e-10})
    made = TrainingProblem(model, (x[own], x[own] + 1.0), "mse", comm, chunk_size=10)
    p = made.initial()
    made.loss(p)
    assert elsewhere(made, p) == (0, 7)
    assert made.loss(p - 1.0) < 0.1  # b = 0: the states stay near one, and there is another fixed point near zero
    assert elsewhere(made, p - 1.0) == (7, 7)
    assert made.evaluate(p - 1.0, made.dataset).loss > 0.4
    told = minimize(made, "trgn", max_iterations=0, initial=p - 1.0).message
    assert "7 of 7 samples have another fixed point" in told
    cold = TrainingProblem(model, (x[own], x[own] + 1.0), "mse", comm, warm_start=False)
    assert elsewhere(cold, p - 1.0) == (0, 0)


def test_what_dropout_leaves_out_is_not_taken_for_another_fixed_point() -> None:
    x = torch.linspace(-0.15, 0.15, 7, dtype=torch.float64)[:, None]
    model = nn.Sequential(FixedPoint(Bistable(), options={"snes_rtol": 1e-10}), nn.Dropout(0.5)).train()
    made = TrainingProblem(model, (x, x + 1.0), "mse")
    p = made.initial()
    made.loss(p)
    assert elsewhere(made, p) == (0, 7) and model.training


# --------------------------------------------------------------------------- samples without a fixed point


class Picky(nn.Module):
    """z ↦ w z + x, but NaN for samples above a limit."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 2.0, float("nan"), self.w * z + x)


def picky(comm: parallel.Comm, x: Tensor, **settings: object) -> TrainingProblem:
    own = parallel.own_slice(len(x), comm.rank, comm.size)
    model = FixedPoint(Picky(), options={"snes_rtol": 1e-12})
    return TrainingProblem(model, (x[own], 3.0 * x[own]), "mse", comm, chunk_size=2, **settings)  # type: ignore[arg-type]


@pytest.mark.parallel([1, 2, 3])
def test_masked_samples_leave_the_loss_its_derivatives_and_a_count(comm: parallel.Comm) -> None:
    x = torch.tensor([0.5, 3.0, 1.0, 1.5, 4.0, 0.7], dtype=torch.float64)[:, None]
    good = x[(x <= 2.0).flatten()]
    masked, expected = picky(comm, x, on_failure="mask"), picky(parallel.SELF, good)
    p = masked.initial()
    assert masked.loss(p) == pytest.approx(expected.loss(p), rel=1e-12)
    assert masked.left_out == 2
    torch.testing.assert_close(masked.gradient(p), expected.gradient(p))
    v = torch.ones_like(p)
    for product in ("gauss_newton_product", "hessian_product"):
        torch.testing.assert_close(getattr(masked, product)(p, v), getattr(expected, product)(p, v))
    assert minimize(masked, "trgn", max_iterations=5).loss == pytest.approx(
        minimize(expected, "trgn", max_iterations=5).loss, rel=1e-6, abs=1e-12
    )
    with pytest.raises(ConvergenceError, match="no sample has a fixed point"):
        picky(comm, torch.full((6, 1), 5.0, dtype=torch.float64), on_failure="mask").loss(p)


@pytest.mark.parallel([1, 2, 3])
def test_evaluations_of_masked_samples_say_how_many_are_left_out(comm: parallel.Comm) -> None:
    x = torch.tensor([0.5, 3.0, 1.0, 1.5, 4.0, 0.7], dtype=torch.float64)[:, None]
    masked, strict = picky(comm, x, on_failure="mask"), picky(comm, x)
    p = masked.initial()
    masked.loss(p)
    good = x[(x <= 2.0).flatten()]
    error = 2.0 * good - 3.0 * good  # z = 0.5 z + x
    found = masked.evaluate(p, masked.dataset)
    assert found.left_out == 2 and masked.left_out == 2
    assert found.loss == pytest.approx(float(error.square().mean()) / 2, rel=1e-9)
    assert found.metric == pytest.approx(float((error.square().sum() / (3 * good).square().sum()).sqrt()), rel=1e-9)
    assert math.isnan(strict.evaluate(p, strict.dataset).metric)
    none = picky(comm, torch.full((4, 1), 5.0, dtype=torch.float64), on_failure="mask")
    found = none.evaluate(p, none.dataset)
    assert found.left_out == 4 and math.isnan(found.loss) and math.isnan(found.metric)


class Sides(nn.Module):
    """Scores of two classes by the sign of a fixed point."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = FixedPoint(Picky(), options={"snes_rtol": 1e-12})

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return torch.cat([-z, z], dim=1)


def test_a_sample_without_answer_is_not_classified_rightly() -> None:
    x = torch.tensor([0.5, 3.0, -1.0, 1.5], dtype=torch.float64)[:, None]
    problem = TrainingProblem(Sides(), (x, torch.tensor([1, 1, 0, 0])), "cross_entropy", on_failure="mask")
    found = problem.evaluate(problem.initial(), problem.dataset)
    assert found.metric == 2 / 4 and found.left_out == 1
    assert found.loss == pytest.approx(float(torch.nn.functional.softplus(torch.tensor([-2.0, -4.0, 6.0])).mean()))


def test_raise_is_the_default_and_warn_goes_on() -> None:
    x = torch.tensor([0.5, 3.0], dtype=torch.float64)[:, None]
    p = picky(parallel.SELF, x).initial()
    with pytest.raises(ConvergenceError, match="sample 1"):
        picky(parallel.SELF, x).loss(p)
    with pytest.warns(UserWarning, match="unconverged states are used(?s:.)*sample 1"):
        picky(parallel.SELF, x, on_failure="warn").loss(p)
    with pytest.raises(OptionError, match="raise, warn, mask"):
        picky(parallel.SELF, x, on_failure="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = FixedPoint(Picky(), on_failure="warn")
        assert bool(layer.solution is None) and layer(x[:1]).isfinite().all()
    with pytest.raises(OptionError, match="raise or warn"):
        FixedPoint(Picky(), on_failure="mask")


def test_inexact_adjoints_are_for_adam_alone() -> None:
    model = DeqRegressor(FixedPoint(TanhCell(12), options={"ksp_type": "jfb"}), 12, 3)
    rough = TrainingProblem(model, data(), "mse", parallel.SELF)
    for method in ("trgn", "lbfgs", "newton", "tao:blmvm"):
        with pytest.raises(OptionError, match="inexact adjoint jfb"):
            minimize(rough, method, max_iterations=1)
    start = rough.loss(rough.initial())
    assert minimize(rough, "adam", max_iterations=5).loss < start
