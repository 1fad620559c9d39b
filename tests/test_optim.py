"""Optimisers: known minima, the same path on any number of ranks, honest endings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_problem import deq_model, distributed, explicit_model, samples, serial
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.errors import ConvergenceError, DataError, OptionError
from hpcdeq.optim import Iterate, minimize, resolved_options
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.problem import TrainingProblem

TAO_TYPES = ["lmvm", "blmvm", "bqnls", "nls", "ntr", "bnls", "bntr", "bqnktr", "cg", "brgn"]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def linear_problem(comm: parallel.Comm) -> tuple[TrainingProblem, Tensor]:
    """Linear least squares over the ranks, and its answer by another road."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(30, 3, dtype=torch.float64, generator=generator)
    t = torch.randn(30, 2, dtype=torch.float64, generator=generator)
    own = parallel.own_slice(30, comm.rank, comm.size)
    return TrainingProblem(Linear(), (x[own], t[own]), "mse", comm), torch.linalg.lstsq(x, t).solution.reshape(-1)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", ["trgn", "lbfgs", "newton", *(f"tao:{kind}" for kind in TAO_TYPES)])
def test_linear_least_squares_to_its_known_answer(method: str, comm: parallel.Comm) -> None:
    problem, answer = linear_problem(comm)
    # brgn adds a penalty of its own, a weight below which its answer is the unpenalised one to the digits asked for.
    options = {"tao_brgn_regularizer_weight": 1e-10} if method == "tao:brgn" else {}
    result = minimize(problem, method, max_iterations=200, options={"tao_gatol": 1e-9, **options})
    assert result.status == "converged" and result.reason.startswith("CONVERGED")
    torch.testing.assert_close(result.x, answer, rtol=0, atol=1e-6)
    assert result.loss == pytest.approx(problem.loss(answer), rel=1e-9)
    assert result.gradient_norm < 1e-6


@pytest.mark.parametrize("kind", TAO_TYPES)
def test_every_tao_type_trains_a_deq(kind: str) -> None:
    problem = serial(deq_model(), "mse")
    start = problem.loss(problem.initial())
    result = minimize(problem, f"tao:{kind}", max_iterations=8, raise_on_failure=False)
    assert result.status in ("budget", "converged")
    assert result.loss < 0.7 * start
    assert result.loss == pytest.approx(problem.loss(result.x), rel=1e-9)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_ten_iterations_of_trgn_are_the_same_on_any_number_of_ranks(loss: str, comm: parallel.Comm) -> None:
    # The decay keeps the curvature away from zero: eleven samples alone are separable.
    one = minimize(serial(deq_model(), loss, weight_decay=1e-2), "trgn", max_iterations=10)
    many = minimize(distributed(deq_model(), loss, comm, weight_decay=1e-2), "trgn", max_iterations=10)
    assert many.iterations == one.iterations
    assert float((many.x - one.x).norm()) <= 1e-8 * float(one.x.norm())
    assert many.loss == pytest.approx(one.loss, rel=1e-8)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", ["lbfgs", "newton", "adam"])
def test_other_methods_are_the_same_on_any_number_of_ranks(method: str, comm: parallel.Comm) -> None:
    settings = MinibatchSettings(learning_rate=0.01, batch_size=4) if method == "adam" else None
    one = minimize(serial(deq_model(), "mse"), method, max_iterations=5, minibatch=settings)
    many = minimize(distributed(deq_model(), "mse", comm), method, max_iterations=5, minibatch=settings)
    assert float((many.x - one.x).norm()) <= 1e-8 * float(one.x.norm())
    assert many.counts.gradients == one.counts.gradients


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["trgn", "lbfgs", "newton", "adam"])
def test_iterates_are_emitted_in_order_with_everything_known_of_them(method: str, comm: parallel.Comm) -> None:
    seen: list[Iterate] = []
    problem = distributed(deq_model(), "mse", comm)
    result = minimize(problem, method, max_iterations=4, callback=seen.append)
    assert [i.iteration for i in seen] == [0, 1, 2, 3, 4]
    assert [h[0] for h in result.history] == [0, 1, 2, 3, 4]
    assert seen[0].step_norm is None and all(i.step_norm is not None and i.step_norm > 0 for i in seen[1:])
    assert all(
        a.seconds <= b.seconds and a.counts.gradients <= b.counts.gradients
        for a, b in zip(seen, seen[1:], strict=False)
    )
    assert (seen[-1].trust_radius is not None) == (method == "trgn")
    assert all(i.fixed_point is not None for i in seen)
    assert torch.equal(seen[-1].x, result.x)
    if method != "adam":
        for iterate in seen:
            assert iterate.loss == pytest.approx(problem.loss(iterate.x), rel=1e-9)
    # lbfgs takes one, which sets the scale of its damping.
    products = {"trgn": "gauss_newton_products", "lbfgs": "gauss_newton_products", "newton": "hessian_products"}
    for name in ("gauss_newton_products", "hessian_products"):
        assert (getattr(result.counts, name) > 0) == (products.get(method) == name)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["trgn", "adam", "newton", "torch-lbfgs", "tao:lmvm", "tao:brgn", "tao:bntr"])
def test_budgets(method: str, comm: parallel.Comm) -> None:
    problem = distributed(deq_model(), "mse", comm)
    result = minimize(problem, method, max_iterations=2)
    assert (result.status, result.reason, result.iterations) == ("budget", "DIVERGED_MAXITS", 2)
    result = minimize(problem, method, max_iterations=0)
    assert (result.status, result.reason, result.iterations) == ("budget", "DIVERGED_MAXITS", 0)
    assert torch.equal(result.x, problem.initial())
    # Newton loses its fixed points after 0.2 s.
    result = minimize(problem, method, max_iterations=10**6, max_seconds=0.02)
    assert (result.status, result.reason) == ("budget", "DIVERGED_USER")
    assert "--max-seconds" in result.message


def test_a_step_without_fixed_points_is_rejected_and_counted() -> None:
    class Expanding(nn.Module):
        """z ↦ w z + x has no fixed point that iteration reaches beyond |w| = 1; the data wants w close to 1."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.where(self.w.abs() < 1.0, self.w * z + x, float("nan"))

    from hpcdeq.deq import FixedPoint

    x = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)[:, None]
    problem = TrainingProblem(FixedPoint(Expanding()), (x, 20.0 * x), "mse", parallel.SELF)
    result = minimize(problem, "trgn", max_iterations=60, options={"tao_trust0": 10.0}, raise_on_failure=False)
    assert result.rejected > 0
    assert float(result.x[0]) == pytest.approx(0.95, abs=1e-3)


def test_an_unreachable_start_is_an_error() -> None:
    model = deq_model()
    model.layer.options.given["snes_max_it"] = 1
    with pytest.raises(ConvergenceError, match="DIVERGED_MAX_IT"):
        minimize(serial(model, "mse"), "trgn")


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["trgn", "adam"])
def test_nan_weights(method: str, comm: parallel.Comm) -> None:
    model = explicit_model()
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"initial weights are not finite \(first: number 0 of"):
        minimize(distributed(model, "mse", comm), method)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["trgn", "lbfgs", "adam", "tao:brgn"])
def test_an_infinite_initial_loss(method: str, comm: parallel.Comm) -> None:
    problem = distributed(explicit_model(), "mse", comm)
    huge = torch.full((problem.layout.count,), 1e200, dtype=torch.float64)
    with pytest.raises(DataError, match="loss at the initial weights is (inf|nan)"):
        minimize(problem, method, initial=huge)


def test_refusals() -> None:
    problem = serial(explicit_model(), "cross_entropy")
    with pytest.raises(OptionError, match="unknown optimizer 'trgm': did you mean trgn"):
        minimize(problem, "trgm")
    with pytest.raises(OptionError, match="unknown TAO type 'lmvn': did you mean tao:"):
        minimize(problem, "tao:lmvn")
    with pytest.raises(OptionError, match="-tao_gattol: did you mean -tao_g"):
        minimize(problem, "trgn", options={"tao_gattol": 1e-8})
    with pytest.raises(OptionError, match="needs a sum of squares"):
        minimize(problem, "tao:brgn")
    with pytest.raises(OptionError, match="settings of minibatches do not go with trgn"):
        minimize(problem, "trgn", minibatch=MinibatchSettings())
    with pytest.raises(OptionError, match="adam has no PETSc options"):
        minimize(problem, "adam", options={"tao_gatol": 1e-8})
    with pytest.raises(OptionError, match=r"initial has shape \(2,\)"):
        minimize(problem, "trgn", initial=torch.zeros(2))
    with pytest.raises(OptionError, match="learning rate"):
        MinibatchSettings(learning_rate=0.0)


def test_random_layers_are_refused_for_full_batches_only() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    problem = TrainingProblem(model, samples("mse"), "mse", parallel.SELF)
    with pytest.raises(OptionError, match=r"layer 1 \(Dropout, p = 0.5\)"):
        minimize(problem, "lbfgs")
    assert minimize(problem, "adam", max_iterations=1).status == "budget"


def test_given_options_replace_the_presets() -> None:
    assert resolved_options("trgn", {"-tao_bnk_ksp_max_it": 7})["tao_bnk_ksp_max_it"] == 7
    assert resolved_options("trgn")["tao_type"] == "levenberg_marquardt"
    counts = [
        minimize(serial(deq_model(), "mse"), "trgn", max_iterations=2, options={"tao_ksp_max_it": k}).counts
        for k in (2, 20)
    ]
    assert counts[0].gauss_newton_products < counts[1].gauss_newton_products


def test_single_precision_trains() -> None:
    inputs, targets = samples("mse")
    problem = TrainingProblem(explicit_model().float(), (inputs.float(), targets.float()), "mse", parallel.SELF)
    start = problem.loss(problem.initial())
    result = minimize(problem, "trgn", max_iterations=5, raise_on_failure=False)
    assert result.loss < 0.5 * start and np.isfinite(result.loss)
