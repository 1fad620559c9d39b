"""Fixed points that are known beforehand, by every Anderson solver: jaxopt's test problems, and degenerate histories.

The problems and their answers are those of google/jaxopt's tests/anderson_test.py and tests/fixed_point_iteration_test.py;
what those test besides (auxiliary outputs, a mixing frequency, the ridge of its least-squares problem) has no counterpart here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hpcdeq.deq import FixedPoint, Solution, solve_fixed_point
from hpcdeq.errors import ConvergenceError

DOTTIE = 0.7390851332151607  # x = cos x

Options = dict[str, str | int | float]
ALONE: Options = {"snes_fallback": "none"}  # no other solver comes to the help of one that fails
BATCHED: Options = {**ALONE, "snes_type": "batched_anderson"}
NATIVE: Options = {**ALONE, "snes_type": "anderson"}
MIXING: dict[str, Options] = {
    "default": {},
    "batched m=1 period=1": {**BATCHED, "snes_anderson_m": 1, "snes_anderson_period": 1},
    "batched m=3": {**BATCHED, "snes_anderson_m": 3},
    "batched m=6 period=1": {**BATCHED, "snes_anderson_m": 6, "snes_anderson_period": 1},
    "batched m=5 beta=0.5": {**BATCHED, "snes_anderson_m": 5, "snes_anderson_beta": 0.5},
    "batched m=30": {**BATCHED, "snes_anderson_m": 30},
    "native": NATIVE,
    "native m=3 beta=0.5": {**NATIVE, "snes_anderson_m": 3, "snes_anderson_beta": 0.5},
}
PLAIN: dict[str, Options] = {
    "plain": {**BATCHED, "snes_anderson_m": 0},
    "plain beta=0.5": {**BATCHED, "snes_anderson_m": 0, "snes_anderson_beta": 0.5},
}
SOLVERS = MIXING | PLAIN
TIGHT: Options = {"snes_rtol": 1e-13, "snes_atol": 1e-12, "snes_max_it": 1500, "ksp_rtol": 1e-13}


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A map of one state, where it starts, its fixed point, and which solvers do not get there in 1,500 iterations.

    A state of at most one dimension is one sample.
    """

    function: Callable[[Tensor], Tensor]
    start: Tensor
    answer: Tensor
    beyond: tuple[str, ...] = ()
    tolerance: float = 1e-10


def geometric_decay() -> Problem:
    rates = double([0.9, 0.99, 0.999])
    beyond = (*PLAIN, "batched m=1 period=1")  # one difference cannot tell three rates apart
    # The residual is a thousandth of the error in the last component.
    return Problem(lambda z: rates * z, double([1.0, 0.4, -0.2]), torch.zeros(3).double(), beyond, 2e-9)


def scalar() -> Problem:
    return Problem(lambda z: 0.5 * z + 0.5, double(0.0), double(1.0))


def sine() -> Problem:
    """Components of three kinds: sin(z) z² and z³, flat at their fixed point 0, and -z, which turns for ever."""

    def function(z: Tensor) -> Tensor:
        a, b, c = z.split([3, 2, 4])
        return torch.cat([torch.sin(a) * a.square(), b**3, -c])

    start = torch.cat([double([0.6, 0.0, -0.1]), double([0.7, 0.5]), double([-1.0, 0.0, 2.0, -0.4]) / 3])
    return Problem(function, start, torch.zeros_like(start), ("plain",))


def cosine() -> Problem:
    """The second component's slope at its fixed point is -1: plain iteration creeps."""
    shift = double([0.0, math.pi / 2])
    answer = double([DOTTIE, math.pi / 2])
    return Problem(lambda z: torch.cos(z) + shift, double([0.3, math.pi / 4]), answer, ("plain",))


def rotation() -> Problem:
    """Seven planes that turn about a centre: no contraction, and 14 eigenvalues on the unit circle."""
    angles = math.pi / double([2, 3, 4, 5, 6, 1.27, 1.73])
    turns = [double([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in angles.tolist()]
    matrix, centre = torch.block_diag(*turns), torch.arange(1, 15, dtype=torch.float64)
    return Problem(lambda z: matrix @ (z - centre) + centre, uniform(14), centre, ("plain", "batched m=1 period=1"))


def contraction(size: int) -> Tensor:
    """Return a symmetric matrix whose eigenvalues are below a half."""
    matrix = 2 * uniform(size, size) - 1
    matrix = matrix + matrix.T
    return matrix / (2 * torch.linalg.eigvalsh(matrix).abs().max() + 1e-4)


def affine(size: int) -> Problem:
    matrix, shift = contraction(size), uniform(size)
    answer = torch.linalg.solve(torch.eye(size).double() - matrix, shift)
    return Problem(lambda z: matrix @ z + shift, torch.zeros(size).double(), answer)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "geometric decay": geometric_decay,
    "scalar": scalar,
    "sine": sine,
    "cosine": cosine,
    "rotation": rotation,
    "affine 10": lambda: affine(10),
    "affine 200": lambda: affine(200),
}


def solve(function: Callable[[Tensor], Tensor], start: Tensor, options: Options) -> Solution:
    solution = solve_fixed_point(lambda z, x: function(z), None, z0=start, options={**TIGHT, **options})
    assert len(solution.attempts) == 1  # the default has others come to its help: not here
    return solution


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------- jaxopt's problems


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_known_answers(name: str, solver: str) -> None:
    problem = PROBLEMS[name]()
    if solver in problem.beyond:
        with pytest.raises(ConvergenceError, match="DIVERGED_MAX_IT after 1500 iterations"):
            solve(problem.function, problem.start, SOLVERS[solver])
        return
    solution = solve(problem.function, problem.start, SOLVERS[solver])
    assert_close(solution.value, problem.answer, problem.tolerance)
    assert solution.record.solver == SOLVERS[solver].get("snes_type", "batched_anderson")
    residual = torch.linalg.vector_norm(problem.function(solution.value) - solution.value)
    assert_close(solution.residual, residual.reshape(1), 1e-15)


def test_plain_iteration_stops_where_a_formula_says() -> None:
    problem, rates, tolerance = geometric_decay(), double([0.9, 0.99, 0.999]), 1e-5
    expected = next(
        k for k in range(9000) if torch.linalg.vector_norm((1 - rates) * rates**k * problem.start) <= tolerance
    )
    options: Options = {"snes_rtol": 0.0, "snes_atol": tolerance, "snes_max_it": 8000}
    solution = solve(problem.function, problem.start, {**SOLVERS["plain"], **options})
    assert int(solution.iterations) == expected
    assert solution.evaluations == expected + 1
    assert_close(solution.value, rates**expected * problem.start)
    assert float(solution.value.norm()) < 1e-2


def test_plain_iteration_creeps_to_a_slope_of_minus_one() -> None:
    """From π/2 + e a step leads to π/2 - sin e: after k steps e² is about 3 / k, and the residual 2 e."""
    problem = cosine()
    options: Options = {"snes_rtol": 0.0, "snes_atol": 0.1, "snes_max_it": 2000}
    solution = solve(problem.function, problem.start, {**SOLVERS["plain"], **options})
    assert 1150 <= int(solution.iterations) <= 1250
    assert_close((solution.value - problem.answer).abs(), double([0.0, 0.05]), 1e-4)


@pytest.mark.parametrize("solver", MIXING)
@pytest.mark.parametrize("start", [math.pi / 2, math.pi / 4])
def test_gradient_of_a_shifted_cosine(solver: str, start: float) -> None:
    shift = double([0.0, math.pi / 2]).requires_grad_()
    layer = FixedPoint(lambda z, x: torch.cos(z) + x, options={**TIGHT, **MIXING[solver]})
    z = layer(shift, double([0.0, start]))
    assert_close(z.detach(), double([DOTTIE, math.pi / 2]))
    (gradient,) = torch.autograd.grad(z.sum(), shift)
    assert_close(gradient, 1 / (1 + torch.sin(double([DOTTIE, math.pi / 2]))))


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_where_the_answer_does_not_change(solver: str) -> None:
    factor = double([0.05, 0.2]).requires_grad_()
    layer = FixedPoint(lambda z, x: x * z, options={**TIGHT, **SOLVERS[solver]})
    z = layer(factor, double([1.0, -0.5]))
    assert_close(z.detach(), torch.zeros(2).double(), 1e-11)
    (gradient,) = torch.autograd.grad(z.sum(), factor)
    assert_close(gradient, torch.zeros(2).double())
    second = layer(factor, double([1.0, -0.5])).square().sum()
    (gradient,) = torch.autograd.grad(second, factor)
    assert_close(gradient, torch.zeros(2).double())


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_of_a_large_affine_map(solver: str) -> None:
    matrix, shift = contraction(200).requires_grad_(), uniform(200).requires_grad_()
    weight = torch.randn(200, dtype=torch.float64)
    layer = FixedPoint(lambda z, x: x[0] @ z + x[1], options={**TIGHT, **SOLVERS[solver]})
    z = layer((matrix, shift), torch.zeros(200).double())
    ours = torch.autograd.grad(weight @ z, [matrix, shift])
    adjoint = torch.linalg.solve((torch.eye(200).double() - matrix.detach()).T, weight)
    assert_close(ours[0], torch.outer(adjoint, z.detach()))
    assert_close(ours[1], adjoint)


# ------------------------------------------------------------------------------------------ degenerate histories


@pytest.mark.parametrize("solver", MIXING)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_affine_map_of_low_rank(solver: str, rank: int) -> None:
    """After ``rank`` steps every new difference depends on those before."""
    left, right = torch.randn(2, 20, rank, dtype=torch.float64)
    matrix = left @ right.T
    matrix = matrix * (0.9 / torch.linalg.matrix_norm(matrix, 2).clamp(min=1e-3))
    x = torch.randn(5, 20, dtype=torch.float64)
    solution = solve(lambda z: z @ matrix.T + x, torch.zeros_like(x), MIXING[solver])
    assert_close(solution.value, torch.linalg.solve(torch.eye(20).double() - matrix, x.T).T)
    # With a mixing at every iteration, and a window for all that there is to learn:
    if solver in ("batched m=6 period=1", "native"):
        assert int(solution.iterations.max()) <= rank + 2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_of_equal_components(solver: str, dtype: torch.dtype) -> None:
    """All differences of a sample point the same way, whatever the window."""
    tight = {torch.float64: (1e-13, 1e-11), torch.float32: (1e-6, 2e-6)}[dtype]
    start = torch.tensor([[0.0], [0.5], [2.0]], dtype=dtype).expand(3, 8).contiguous()
    solution = solve(torch.cos, start, {**SOLVERS[solver], "snes_rtol": tight[0], "snes_atol": 0.0})
    assert_close(solution.value, torch.full_like(start, DOTTIE), tight[1])
    assert torch.equal(solution.value, solution.value[:, :1].expand(3, 8))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_is_at_its_fixed_point_already(solver: str) -> None:
    """Its residual and all its differences are zero, beside samples that have a way to go."""
    start = double([[1.0, 1.0, 1.0], [0.0, 3.0, -2.0], [5.0, 5.0, 7.0]])
    rates = double([0.5, 0.25, -0.5])
    solution = solve(lambda z: rates * z + (1 - rates), start, SOLVERS[solver])
    assert_close(solution.value, torch.ones_like(start))
    assert int(solution.iterations[0]) == 0
    # PETSc sums up the combinations of all states at once, with weights that add up to one but for rounding.
    assert float(solution.residual[0]) <= (1e-15 if solver.startswith("native") else 0.0)
    assert bool((solution.iterations[1:] > 0).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_samples_at_their_fixed_points(solver: str) -> None:
    start = torch.randn(4, 3, dtype=torch.float64)
    solution = solve(lambda z: z, start, SOLVERS[solver])
    assert torch.equal(solution.value, start)
    assert solution.iterations.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_identical_samples_have_identical_answers(solver: str) -> None:
    x = torch.randn(1, 6, dtype=torch.float64).expand(5, 6).contiguous()
    solution = solve(lambda z: 0.8 * torch.tanh(z.flip(1) + x), torch.zeros_like(x), SOLVERS[solver])
    assert_close(solution.value, solution.value[:1].expand(5, 6), 1e-10)  # each is within 5e-12 of the answer


@pytest.mark.parametrize("solver", MIXING)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_window_longer_than_the_dimension(solver: str, size: int) -> None:
    shift = torch.linspace(0.0, math.pi / 2, size, dtype=torch.float64)
    start = torch.linspace(0.3, 1.2, 4 * size, dtype=torch.float64).reshape(4, size)
    solution = solve(lambda z: torch.cos(z) + shift, start, {**MIXING[solver], "snes_atol": 0.0})
    expected = [root(lambda z, s=s: math.cos(z) + s - z, 0.0, 3.0) for s in shift.tolist()]
    assert_close(solution.value, double(expected).expand(4, size), 1e-11)


@pytest.mark.parametrize("window", [9, 12, 13, 20, 30])
def test_a_window_that_the_period_of_mixing_does_not_divide(window: int) -> None:
    """The oldest columns are overwritten in the middle of a period; a longer window still learns more."""
    matrix = 0.97 * torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    x = 0.3 * torch.randn(6, 20, dtype=torch.float64)
    options: Options = {**BATCHED, "snes_rtol": 1e-10, "snes_anderson_period": 8}
    divided, other = (
        solve(lambda z: torch.tanh(z @ matrix.T + x), torch.zeros_like(x), {**options, "snes_anderson_m": m})
        for m in (8, window)
    )
    assert_close(other.value, divided.value, 1e-6)
    assert int(other.iterations.max()) <= int(divided.iterations.max())


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_that_is_constant(solver: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    solution = solve(lambda z: x + 0 * z, torch.zeros_like(x), {**SOLVERS[solver], "snes_atol": 0.0})
    assert_close(solution.value, x, 1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_residual_that_never_changes_is_an_error(solver: str) -> None:
    """Every difference of residuals is zero, and there is no fixed point."""
    with pytest.raises(ConvergenceError, match=r"3 of 3 samples(?s:.)*\|\|f\(z\) - z\|\| = 2 "):
        # Without help: ngmres leaps to 1e17, where z + 1 is z.
        options = {**SOLVERS[solver], "snes_max_it": 50, "snes_rtol": 0.0, **ALONE}
        solve(lambda z: z + 1, torch.zeros(3, 4).double(), options)


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function that falls crosses zero, by bisection to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return low
