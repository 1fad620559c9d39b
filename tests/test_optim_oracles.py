"""Products and optimisers against what others have computed: curvlinops, NIST, normal equations, a Newton method in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.optim import minimize
from hpcdeq.optim.base import Result
from hpcdeq.problem import TrainingProblem

METHODS = ["trgn", "tao:brgn", "lbfgs", "newton"]


def over_ranks(model: nn.Module, inputs: Tensor, targets: Tensor, loss: str, comm: parallel.Comm, **more: Any):
    """The samples over the ranks of comm, the last of several ranks without any."""
    working = max(1, comm.size - 1)
    own = parallel.own_slice(len(inputs), comm.rank, working) if comm.rank < working else slice(0, 0)
    return TrainingProblem(model, (inputs[own], targets[own]), loss, comm, **more)


def minimized(problem: TrainingProblem, method: str, max_iterations: int = 500, **options: Any) -> Result:
    """The minimum, to a gradient norm near rounding."""
    if method == "tao:brgn":  # its own penalty, made too small to matter
        options |= {"tao_brgn_regularizer_weight": 1e-14}
    tolerances = {"tao_gatol": 1e-10, "tao_grtol": 0.0, "tao_gttol": 0.0}
    result = minimize(problem, method, max_iterations, {**tolerances, **options})
    assert (result.status, result.reason) == ("converged", "CONVERGED_GATOL")
    return result


# ------------------------------------------------------------------------------------------- curvature products


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Softplus(), nn.Linear(6, outputs)).double()


class Small(nn.Module):
    """Two convolutions, a pool and a linear layer."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3, stride=2)
        self.last = nn.Linear(4, outputs)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.second(torch.tanh(self.first(x.reshape(-1, 1, 7, 7)))))
        return self.last(x.mean(dim=(2, 3)))


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize(("network", "width"), [(mlp, 5), (Small, 49)])
def test_products_equal_curvlinops(network: Any, width: int, loss: str, comm: parallel.Comm) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    torch.manual_seed(8)
    model = network(4)
    inputs = torch.randn(23, width, dtype=torch.float64)
    real = torch.randn(23, 4, dtype=torch.float64)
    targets = real if loss == "mse" else real.argmax(dim=1)
    problem = over_ranks(model, inputs, targets, loss, comm, chunk_size=6)
    # torch's mean squared error is twice ours.
    theirs, factor = (nn.MSELoss(), 0.5) if loss == "mse" else (nn.CrossEntropyLoss(), 1.0)
    data = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]
    weights = list(model.parameters())
    p = problem.initial()
    for kind, product in (
        (curvlinops.GGNLinearOperator, problem.gauss_newton_product),
        (curvlinops.HessianLinearOperator, problem.hessian_product),
    ):
        operator = kind(model, theirs, weights, data)
        for v in torch.randn(3, problem.layout.count, dtype=torch.float64):
            expected = factor * (operator @ v)
            assert float((product(p, v) - expected).norm()) <= 1e-8 * float(expected.norm())


# ------------------------------------------------------------------------------------------- nonlinear least squares

# NIST's Chwirut1, an ultrasonic calibration: response by metal distance.
# https://www.itl.nist.gov/div898/strd/nls/data/chwirut1.shtml; also src/tao/leastsquares/tutorials/chwirut1.c of PETSc.
CHWIRUT1 = {
    0.5: "92.9 90.6 80 74.1 81.5 78 76.8 78 76.8 75.8 70.5 78 70.8 80.7 66.7 81 81.7 81.3",
    0.625: "78.7 76.9 79 67.3 66",
    0.75: "64.2 71.6 63.8 60.8 62.4 59.9 61 63.5 60 62 59.5 62 54.7 61.3 59.2 64.5 61.6 60.9",
    0.875: "64.9 63.6 57.2 55.5 58",
    1: "57.1 54 53.2 50.3 47.8 48.8 48.5 47.7 48 47.5 40.8",
    1.25: "43.3 39.2 42.5 41 37.8",
    1.5: "32.5 33.2 32.9 33.8 32 35.2 35.8 39.8 29 30.7 35.5",
    1.75: "31.1 31.05 29.3 29.175 26.8 26.85 29.4 29.3625 25.5 25.95 29.8 29.81 28.4 28.69 28.9 28.95",
    2: "22.2 22.57 20 20.32 21 21.67 29.8 29.62 24 24.56 25.7 25.99",
    2.25: "23.6 23.775 21.4 22.125 20.4 21 20.4 21.15 20.2 21.07",
    2.5: "18.82 19.31 21 23.7 23.81 17.7 18.67 16.3 16.95",
    2.75: "17.7375 17.5125 16.4625 16.7625 13.87 17.17 16.65",
    3: "12.41 13.12 15.56 13.84 12.75 14.62 13.87 11.81 13.31 12.56 12.75 13.12 13.95 12.75 15.64 24.19"
    " 25.76 18.07 11.81 12.07 16.12 17.7 16.24 13.35 13.69 13.31 12.94 15.19 14.62 15.64",
    3.25: "13.8 14.25 12.525 13.2 9.67",
    3.75: "11.5875 9.45 10.5375 10.875 7.76 10.39 10.05",
    4: "11.25 10.42 8.17 11.55 8.74 8.62",
    4.25: "9.4125 9.15 8.5875 8.175 5.44",
    4.75: "7.725 7.9125 7.125 7.35 4.87",
    5: "9 7.31 8.55 12.07 7.87 7.2",
    5.25: "7.35 8.475 6.1125 5.9625 4.01",
    5.75: "8.025 6.1125 5.9625 5.625 3.75",
    6: "5.63 3.94 5.44 5.63 5.44 6.67 7.42 10.12 8.74 8.51 6.64 4.87 5.06",
}
CERTIFIED = [1.9027818370e-01, 6.1314004477e-03, 1.0530908399e-02]
CERTIFIED_SUM_OF_SQUARES = 2.3844771393e03


class Calibration(nn.Module):
    """y = exp(-b₁ x) / (b₂ + b₃ x), from PETSc's start."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.15, dtype=torch.float64))
        self.divisor = nn.Parameter(torch.tensor([0.008, 0.010], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-self.decay * x) / (self.divisor[0] + self.divisor[1] * x)


def chwirut1() -> tuple[Tensor, Tensor]:
    rows = [(x, float(y)) for x, told in CHWIRUT1.items() for y in told.split()]
    x, y = torch.tensor(rows, dtype=torch.float64).T
    return x[:, None], y[:, None]


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_nists_certified_fit(method: str, comm: parallel.Comm) -> None:
    inputs, targets = chwirut1()
    assert len(inputs) == 214
    # The first gradient has the norm 6e3: a smaller tolerance is below its rounding.
    result = minimized(over_ranks(Calibration(), inputs, targets, "mse", comm), method, tao_gatol=1e-8)
    assert result.x.tolist() == pytest.approx(CERTIFIED, rel=1e-6)
    assert 2 * 214 * result.loss == pytest.approx(CERTIFIED_SUM_OF_SQUARES, rel=1e-10)


class Rosenbrock(nn.Module):
    """Residuals (10 (b - a²), 1 - a) of pairs (a, b): a sample is the pair that its one-hot input points to."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((pairs,), -1.2, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(pairs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x @ self.a, x @ self.b
        return torch.stack([10 * (b - a * a), 1 - a], dim=1)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_rosenbrock_to_its_minimum(method: str, pairs: int, comm: parallel.Comm) -> None:
    problem = over_ranks(Rosenbrock(pairs), torch.eye(pairs).double(), torch.zeros(pairs, 2).double(), "mse", comm)
    assert problem.loss(problem.initial()) == pytest.approx(24.2 / 4)
    result = minimized(problem, method)
    torch.testing.assert_close(result.x, torch.ones(2 * pairs, dtype=torch.float64), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ linear networks


# An exact inner solve, and neither damping nor trust region in its way.
EXACT = {
    "trgn": {
        "tao_ksp_max_it": 200,
        "tao_ksp_rtol": 1e-14,
        "tao_lm_overhead": 0.0,
        "tao_lm_damping": 1e-14,
        "tao_lm_damping_min": 1e-14,
    },
    "newton": {"tao_ksp_max_it": 200, "tao_ksp_rtol": 1e-14, "tao_newton_radius": 1e6},
    "tao:bntr": {
        "tao_bnk_ksp_max_it": 200,
        "tao_bnk_ksp_rtol": 1e-14,
        "tao_bnk_init_type": "constant",
        "tao_trust0": 1e6,
    },
}


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("method", list(EXACT))
def test_one_gauss_newton_iteration_solves_the_normal_equations(
    method: str, weight_decay: float, comm: parallel.Comm
) -> None:
    x = torch.randn(40, 6, dtype=torch.float64)
    t = torch.randn(40, 3, dtype=torch.float64)
    problem = over_ranks(nn.Linear(6, 3).double(), x, t, "mse", comm, weight_decay=weight_decay)
    result = minimize(problem, method, 1, EXACT[method])
    assert result.iterations == 1
    # The loss is averaged over samples and outputs, and the decay is on weights and bias alike.
    a = np.hstack([x.numpy(), np.ones((40, 1))])
    normal = a.T @ a / (40 * 3) + weight_decay * np.eye(7)
    weights = np.linalg.solve(normal, a.T @ t.numpy() / (40 * 3)).T
    answer = np.concatenate([weights[:, :6].ravel(), weights[:, 6]])
    np.testing.assert_allclose(result.x.numpy(), answer, rtol=0, atol=1e-10)


class Logistic(nn.Module):
    """Scores (0, w·x + c) of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        score = self.linear(x)
        return torch.cat([torch.zeros_like(score), score], dim=1)


def newton_logistic(x: np.ndarray, labels: np.ndarray, decay: float) -> tuple[np.ndarray, float]:
    """Minimise mean log(1 + exp(-s w·a)) + decay/2 ‖w‖² over a = (x, 1) by Newton's method; the minimum and its loss."""
    a, w = np.hstack([x, np.ones((len(x), 1))]), np.zeros(x.shape[1] + 1)
    for _ in range(50):
        p = 1 / (1 + np.exp(-a @ w))
        gradient = a.T @ (p - labels) / len(a) + decay * w
        hessian = (a * (p * (1 - p))[:, None]).T @ a / len(a) + decay * np.eye(len(w))
        w = w - np.linalg.solve(hessian, gradient)
    assert np.linalg.norm(gradient) < 1e-14
    signs = 2 * labels - 1
    return w, float(np.log1p(np.exp(-signs * (a @ w))).mean() + decay / 2 * w @ w)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["trgn", "lbfgs", "newton", "tao:bqnktr"])
def test_logistic_regression_equals_newtons_method(method: str, comm: parallel.Comm) -> None:
    x = torch.randn(60, 4, dtype=torch.float64)
    noise = torch.randn(60, dtype=torch.float64)
    labels = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + noise > 0.3).long()
    expected, loss = newton_logistic(x.numpy(), labels.numpy(), 0.01)
    result = minimized(over_ranks(Logistic(), x, labels, "cross_entropy", comm, weight_decay=0.01), method)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(result.x.numpy(), expected, rtol=0, atol=1e-7)
