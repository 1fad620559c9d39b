"""Newton's method on TAO: steps against dense ones, negative curvature, quadratic convergence, what follows a failure."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_problem import distributed, explicit_model
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.errors import OptionError
from hpcdeq.optim import Iterate, minimize
from hpcdeq.optim.newton import SHIFTS, Newton
from hpcdeq.petsc import PETSc
from hpcdeq.problem import TrainingProblem


def steihaug(h: np.ndarray, g: np.ndarray, radius: float, rtol: float) -> tuple[np.ndarray, str]:
    """Conjugate gradients for h s = -g in a ball (Nocedal and Wright 2006, algorithm 7.2), and how they ended."""
    s, r, p = np.zeros_like(g), -g, -g

    def to_edge() -> np.ndarray:
        a, b, c = p @ p, 2 * s @ p, s @ s - radius**2
        return s + (-b + np.sqrt(b * b - 4 * a * c)) / (2 * a) * p

    while True:
        bend = p @ h @ p
        if bend <= 0:
            return to_edge(), "curvature"
        alpha = r @ r / bend
        if np.linalg.norm(s + alpha * p) >= radius:
            return to_edge(), "edge"
        s, new = s + alpha * p, r - alpha * h @ p
        if np.linalg.norm(new) <= rtol * np.linalg.norm(g):
            return s, "solved"
        p = new + (new @ new) / (r @ r) * p
        r = new


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(("over", "ending"), [(0.5, "edge"), (300.0, "curvature")])
def test_the_first_step_is_along_that_of_dense_conjugate_gradients(
    over: float, ending: str, comm: parallel.Comm
) -> None:
    problem = distributed(explicit_model(), "mse", comm)
    start = problem.initial()
    h = torch.stack([problem.hessian_product(start, e) for e in torch.eye(len(start), dtype=torch.float64)]).numpy()
    g = problem.gradient(start).numpy()
    assert np.linalg.eigvalsh(h)[0] < 0
    s, how = steihaug(h, g, over * float(np.linalg.norm(g)), 1e-1)
    assert how == ending
    options = {"tao_pc_type": "none", "tao_newton_radius": over, "tao_ksp_max_it": 100}
    step = (minimize(problem, "newton", 1, options).x - start).numpy()
    assert step @ s >= (1 - 1e-8) * np.linalg.norm(step) * np.linalg.norm(s)
    if ending == "edge":  # which is near enough to be taken as it is
        np.testing.assert_allclose(step, s, rtol=0, atol=1e-8 * np.linalg.norm(s))


class Product(nn.Module):
    """y = a b: 1/2 (a b - 1)² has a saddle at zero, and its minima where a b = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.02], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.01], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * self.b * x


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("pc", ["kronecker", "none"])
@pytest.mark.parametrize("ksp", ["stcg", "nash", "gltr", "cg", "minres"])
def test_a_saddle_is_left_for_a_minimum(ksp: str, pc: str, comm: parallel.Comm) -> None:
    one = torch.ones(1 if comm.rank == 0 else 0, 1, dtype=torch.float64)
    problem = TrainingProblem(Product(), (one, one), "mse", comm)
    start = problem.initial()
    g = problem.gradient(start)
    assert float(g @ problem.hessian_product(start, g)) < 0  # a Newton step would go to the saddle
    options = {"tao_ksp_type": ksp, "tao_pc_type": pc, "tao_gatol": 1e-10}
    if ksp == "minres":
        options["tao_ksp_norm_type"] = "preconditioned"
    result = minimize(problem, "newton", 60, options)
    assert result.status == "converged" and result.loss < 1e-16
    assert float(result.x.prod()) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("pc", ["kronecker", "none"])
def test_convergence_is_quadratic(pc: str, comm: parallel.Comm) -> None:
    options = {"tao_pc_type": pc, "tao_ksp_max_it": 200, "tao_gatol": 1e-13, "tao_grtol": 0.0, "tao_gttol": 0.0}
    problem = distributed(explicit_model(), "cross_entropy", comm, weight_decay=3e-2)
    points: list[Tensor] = []
    end = minimize(problem, "newton", 60, options, callback=lambda i: points.append(i.x), raise_on_failure=False).x
    errors = [float((x - end).norm()) for x in points]
    near = [(a, b) for a, b in zip(errors, errors[1:], strict=False) if 1e-5 < a < 0.2]
    assert len(near) >= 2
    orders = [np.log(b) / np.log(a) for a, b in near if b > 1e-12]
    assert orders[-1] > 1.6, errors
    assert min(errors[:-1]) < 1e-9


def test_a_direction_that_is_none_is_sought_with_shifts_and_the_gradient_is_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shifts: list[float] = []

    def uphill(self: Newton, tao: PETSc.TAO, g: PETSc.Vec, hessian: PETSc.Mat, right: PETSc.Vec, d: PETSc.Vec) -> None:
        shifts.append(hessian.getPythonContext().multiple)
        g.copy(d)

    monkeypatch.setattr(Newton, "_direct", uphill)
    problem = distributed(explicit_model(), "mse", parallel.SELF)
    start = problem.initial()
    g = problem.gradient(start)
    scale = float(problem.hessian_product(start, g).norm() / g.norm())
    seen: list[Iterate] = []
    minimize(problem, "newton", 3, callback=seen.append)
    assert shifts[:3] == pytest.approx([multiple * scale for multiple in SHIFTS])
    assert len(shifts) == 9 and shifts[3] == shifts[6] == 0.0
    step = seen[1].x - start
    torch.testing.assert_close(step / step.norm(), -g / g.norm())
    assert [i.loss for i in seen] == sorted((i.loss for i in seen), reverse=True)


@pytest.mark.parametrize(
    ("kind", "reason", "length", "part", "expected"),
    [
        ("stcg", "CONVERGED_STEP_LENGTH", 1.0, 1.0, 8.0),
        ("gltr", "CONVERGED_NEG_CURVE", 0.5, 1.0, 4.0),
        ("stcg", "CONVERGED_STEP_LENGTH", 1.0, 0.8, 4.0),
        ("stcg", "CONVERGED_STEP_LENGTH", 0.5, 0.4, 1.0),
        ("stcg", "CONVERGED_STEP_LENGTH", 1.0, 0.05, 1.0),
        ("stcg", "CONVERGED_RTOL", 1.0, 1.0, 2.0),
        ("stcg", "CONVERGED_RTOL", 0.5, 0.05, 1.0),
        ("cg", "CONVERGED_RTOL", 0.5, 0.05, 2.0),
    ],
)
def test_the_radius_follows_the_step_and_the_models_word(
    kind: str, reason: str, length: float, part: float, expected: float
) -> None:
    newton = Newton()
    newton.reach, newton.length = 2.0, length
    slope, bend = -3.0, 0.5  # the model of a step t s: -3 t + t² / 2
    ksp = SimpleNamespace(
        getType=lambda: kind,
        getConvergedReason=lambda: getattr(PETSc.KSP.ConvergedReason, reason),
        getCGObjectiveValue=lambda: (slope + bend) / newton.reach**2,
    )
    newton._adapt(SimpleNamespace(getKSP=lambda: ksp), part * (length * slope + length**2 * bend), slope)
    assert newton.reach == pytest.approx(expected)


def test_a_radius_is_above_zero() -> None:
    problem = distributed(explicit_model(), "mse", parallel.SELF)
    with pytest.raises(OptionError, match="-tao_newton_radius 0: give a number above 0"):
        minimize(problem, "newton", 1, {"tao_newton_radius": 0})
