"""Curvature products and gradients on some of the samples: what a problem made of those samples gives, at its price."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_guidance import picky
from test_problem import LOSS_NAMES, assert_same, deq_model, directions, distributed, samples, serial
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.errors import ConvergenceError, OptionError
from hpcdeq.problem import L2, JacobianPenalty, TrainingProblem

ROWS = np.array([9, 2, 3, 7, 0])


def of_rows(loss: str, rows: np.ndarray, **settings: object) -> TrainingProblem:
    inputs, targets = samples(loss)
    chosen = np.sort(rows).tolist()
    return TrainingProblem(deq_model(), (inputs[chosen], targets[chosen]), loss, parallel.SELF, **settings)  # type: ignore[arg-type]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_products_are_those_of_a_problem_of_these_samples(curvature: str, loss: str, comm: parallel.Comm) -> None:
    problem = distributed(deq_model(), loss, comm, weight_decay=0.1, chunk_size=2)
    alone = of_rows(loss, ROWS, weight_decay=0.1)
    p, (v, w) = problem.initial(), directions(problem.layout.count)
    for along in (v, w):
        expected = getattr(alone, f"{curvature}_product")(p, along)
        block = problem.owned_product(p, along, curvature=curvature, rows=ROWS)
        assert_same(problem.layout.gather(block), expected, 1e-11)
        assert_same(getattr(problem, f"{curvature}_product")(p, along, ROWS), expected, 1e-11)
    counts = problem.accounts.totals()
    assert getattr(counts, f"{curvature}_products") == 4 * len(ROWS)


@pytest.mark.parallel([1, 3])
def test_parts_of_the_samples_make_up_the_whole(comm: parallel.Comm) -> None:
    terms = [JacobianPenalty(1.0), L2(0.2)]
    problem = distributed(deq_model(), "cross_entropy", comm, terms=terms, chunk_size=3)
    p, (v, _) = problem.initial(), directions(problem.layout.count)
    order = np.random.default_rng(0).permutation(11)
    parts = [order[:4], order[4:5], order[5:]]
    for product in (problem.gauss_newton_product, problem.hessian_product):
        mean = sum(len(rows) * product(p, v, rows) for rows in parts) / 11
        assert_same(mean, product(p, v), 1e-11)


@pytest.mark.parallel([1, 2, 3])
def test_rows_follow_seed_and_iteration_alone(comm: parallel.Comm) -> None:
    one, many = serial(deq_model(), "mse"), distributed(deq_model(), "mse", comm)
    chosen = [many.curvature_rows(0.4, seed, iteration) for seed in (0, 1) for iteration in range(20)]
    for rows, again in zip(chosen, (one.curvature_rows(0.4, s, i) for s in (0, 1) for i in range(20)), strict=True):
        assert rows is not None and again is not None
        assert np.array_equal(rows, again)
        assert len(rows) == len(set(rows.tolist())) == 4 and 0 <= rows.min() and rows.max() < 11
        assert bool((np.diff(rows) > 0).all())
    assert len({tuple(rows.tolist()) for rows in chosen if rows is not None}) > 35
    assert many.curvature_rows(1.0, 0, 0) is None
    assert len(many.curvature_rows(1e-9, 0, 0)) == 1  # type: ignore[arg-type]
    for wrong in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(OptionError, match="give a number above 0 and at most 1"):
            many.curvature_rows(wrong, 0, 0)


def test_every_sample_is_as_likely_as_any_other() -> None:
    problem = serial(deq_model(), "mse")
    counts = np.zeros(11)
    for iteration in range(3000):
        rows = problem.curvature_rows(0.3, 5, iteration)
        assert rows is not None
        counts[rows] += 1
    expected = 3000 * 3 / 11
    assert float(np.abs(counts - expected).max()) < 4.5 * (expected * (1 - 3 / 11)) ** 0.5


def test_one_linearisation_serves_all_products_of_a_choice() -> None:
    problem = serial(deq_model(), "mse", chunk_size=2, warm_start=False)
    p, (v, w) = problem.initial(), directions(problem.layout.count)

    def evaluations(along: Tensor, rows: np.ndarray | None, at: Tensor = p) -> int:
        before = problem.accounts.totals().cell_evaluations
        problem.gauss_newton_product(at, along, rows)
        return problem.accounts.totals().cell_evaluations - before

    assert evaluations(v, ROWS) > 5 * len(ROWS)
    assert evaluations(w, ROWS.copy()) == 0
    assert evaluations(v, None) > 5 * 11
    assert evaluations(w, ROWS) == evaluations(w, None) == 0  # both are kept
    assert evaluations(v, ROWS[:3]) > 15
    assert evaluations(v, ROWS) > 25 and evaluations(v, None) == 0
    assert evaluations(v, ROWS, p + 0.1 * w) > 25
    assert evaluations(v, None) > 5 * 11


def test_predicted_states_rest_on_products_of_all_samples() -> None:
    problem = serial(deq_model(), "mse", chunk_size=4)
    p, (v, w) = problem.initial(), directions(problem.layout.count)
    problem.gauss_newton_product(p, v)
    q = p + 0.01 * w
    problem.gauss_newton_product(q, v, ROWS)
    assert problem.guidance._mixture(q + 0.3 * v) is None  # neither the old point's nor the part's directions
    assert problem.guidance._mixture(p + 0.3 * v) is None
    problem.gauss_newton_product(q, w)
    problem.gauss_newton_product(q, v, ROWS)
    mixture = problem.guidance._mixture(q - 0.5 * w)
    assert mixture is not None
    torch.testing.assert_close(mixture, torch.tensor([-0.5], dtype=p.dtype))
    step = q - 1e-4 * w
    predicted = problem.guidance._predict(problem.guidance._mixture(step), 0, "layer")  # type: ignore[arg-type]
    fresh = serial(deq_model(), "mse", chunk_size=4, warm_start=False)
    fresh.layout.load(fresh.model, step)
    found = fresh.model.layer(samples("mse")[0][:4]).detach()
    fresh.layout.load(fresh.model, q)
    before = fresh.model.layer(samples("mse")[0][:4]).detach()
    assert predicted is not None
    assert float((predicted - found).norm()) < 0.01 * float((before - found).norm())


@pytest.mark.parallel([1, 2, 3])
def test_samples_without_a_fixed_point_leave_the_mean(comm: parallel.Comm) -> None:
    x = torch.tensor([0.5, 3.0, 1.0, 1.5, 4.0, 0.7], dtype=torch.float64)[:, None]
    rows = np.array([0, 1, 3, 5])
    masked, expected = picky(comm, x, on_failure="mask"), picky(parallel.SELF, x[[0, 3, 5]])
    p = masked.initial()
    v = torch.ones_like(p)
    masked.loss(p)  # leaves out two of all samples, one of which is not among the rows
    for product in ("gauss_newton_product", "hessian_product"):
        torch.testing.assert_close(getattr(masked, product)(p, v, rows), getattr(expected, product)(p, v))
    with pytest.raises(ConvergenceError, match="no sample has a fixed point"):
        masked.gauss_newton_product(p, v, np.array([1, 4]))


@pytest.mark.parallel([1, 2, 3])
def test_no_samples_are_refused(comm: parallel.Comm) -> None:
    problem = distributed(deq_model(), "mse", comm)
    p = problem.initial()
    for quantity in (problem.loss, problem.gradient):
        with pytest.raises(OptionError, match="rows is empty"):
            quantity(p, np.array([], dtype=np.int64))
    with pytest.raises(OptionError, match="rows is empty"):
        problem.gauss_newton_product(p, p, np.array([], dtype=np.int64))


@pytest.mark.parallel([1, 2, 3])
def test_growing_batches_start_warm_and_give_the_same_numbers(comm: parallel.Comm) -> None:
    """Evaluations at the same rows again and again, along steps, as TAO asks for them; then at more rows."""
    problem = distributed(deq_model(), "mse", comm, chunk_size=2)
    order = np.random.default_rng(1).permutation(11)
    p = problem.initial()
    for size in (3, 6, 11):
        rows = order[:size]
        for repeat in range(4):
            cold = of_rows("mse", rows, warm_start=False)
            expected, gradient = cold.loss_and_gradient(p)
            before = problem.accounts.totals().cell_evaluations
            value, block = problem.owned_loss_and_gradient(p, rows)
            first = problem.accounts.totals().cell_evaluations
            assert value == pytest.approx(expected, rel=1e-11)
            found = problem.layout.gather(block)
            assert_same(found, gradient, 1e-10)
            if repeat:
                assert first - before < 0.8 * cold.accounts.totals().cell_evaluations
            assert problem.loss(p, rows) == pytest.approx(value, rel=1e-11)
            again = problem.layout.gather(problem.owned_loss_and_gradient(p, rows)[1])
            assert_same(again, gradient, 1e-10)
            assert problem.accounts.totals().cell_evaluations - first <= 4 * size
            p = p - 1e-3 * found
