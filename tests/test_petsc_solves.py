"""Solves through the bridge: PETSc's own published histories, records of how a solve ended, errors from callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcdeq.parallel import Comm
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.operators import matrix_from_products
from hpcdeq.petsc.options import Options
from hpcdeq.petsc.solves import SolveRecord, reason_name, reraise, run_ksp, run_snes
from hpcdeq.petsc.vectors import copy_to_vector, shaped_read

# PETSc, src/snes/tutorials/output/ex5_5_anderson.out and ex5_5_ngmres.out: the function norms of 50 iterations.
ANDERSON = """1.13079 2.12139 1.85651 0.846894 0.70983 0.505785 0.43302 0.350587 0.308708 0.265092 0.238297 0.2115 0.192985
    0.174885 0.161359 0.148317 0.138016 0.128169 0.120073 0.112377 0.105855 0.0996795 0.0943247 0.0892672 0.0848046
    0.0805982 0.0768363 0.0732965 0.0700979 0.0670922 0.0643545 0.0617879 0.0588739 0.0574172 0.0553943 0.0538047
    0.0526017 0.0514605 0.0500416 0.0486235 0.0471819 0.0471111 0.0451429 0.0448917 0.0441476 0.0429995 0.042344
    0.0414978 0.0408157 0.0400908 0.0394343"""
NGMRES = """1.13079 0.713946 0.521996 0.405618 0.336961 0.285037 0.249059 0.219562 0.197226 0.178103 0.1628 0.14934 0.138158
    0.12814 0.119595 0.111837 0.105089 0.0989027 0.0934416 0.0883998 0.0838984 0.079721 0.0759595 0.0724563 0.0692822
    0.0663199 0.0636248 0.0611084 0.0588145 0.0566762 0.0547287 0.0529205 0.0512781 0.0497611 0.0483894 0.0471312
    0.0460008 0.0449728 0.0440566 0.043231 0.0423323 0.0415277 0.0407989 0.0400326 0.0393447 0.0386504 0.0380193
    0.0373987 0.0368335 0.0362901 0.0357998"""


class Bratu:
    """-Δu - λ eᵘ = forcing on the unit square, by the five-point stencil on n x n points, boundary points included.

    The forcing is that of the solution x (1 - x) y (1 - y), which also holds on the boundary: ``-mms 1`` of PETSc's
    tutorial ex5. Residuals are multiplied by the area of a mesh cell.
    """

    def __init__(self, n: int, strength: float) -> None:
        step = 1.0 / (n - 1)
        points = torch.arange(n, dtype=torch.float64) * step
        x, y = points[None, :], points[:, None]
        self.strength, self.area = strength, step**2
        self.solution = x * (1 - x) * y * (1 - y)
        self.forcing = 2 * x * (1 - x) + 2 * y * (1 - y) - strength * self.solution.exp()
        wall = torch.minimum(points, 1.0 - points)
        height = torch.minimum(wall[None, :], wall[:, None]).clamp(min=0.0)
        self.guess = strength / (strength + 1.0) * height.sqrt()
        self.guess[[0, -1], :] = 0.0
        self.guess[:, [0, -1]] = 0.0

    def residual(self, u: Tensor) -> Tensor:
        known = self.solution.clone()
        known[1:-1, 1:-1] = u[1:-1, 1:-1]
        centre = known[1:-1, 1:-1]
        laplacian = 4.0 * centre - known[1:-1, :-2] - known[1:-1, 2:] - known[:-2, 1:-1] - known[2:, 1:-1]
        found = 4.0 * (u - self.solution)
        found[1:-1, 1:-1] = laplacian - self.area * (self.strength * centre.exp() + self.forcing[1:-1, 1:-1])
        return found


Function = Callable[[Tensor], Tensor]


def snes_of(function: Function, guess: Tensor, prefix: str) -> tuple[PETSc.SNES, PETSc.Vec]:
    """Return a SNES for function(u) = 0 and a vector that holds the guess."""
    x = PETSc.Vec().createSeq(guess.numel(), comm=PETSc.COMM_SELF)
    copy_to_vector(guess, x)

    def evaluate(snes: PETSc.SNES, point: PETSc.Vec, value: PETSc.Vec) -> None:
        with shaped_read(point, guess) as u:
            copy_to_vector(function(u), value)

    snes = PETSc.SNES().create(PETSc.COMM_SELF)
    snes.setOptionsPrefix(prefix)
    snes.setFunction(evaluate, x.duplicate())
    return snes, x


def solve(function: Function, guess: Tensor, **options: object) -> tuple[SolveRecord, Tensor, list[float]]:
    """Solve function(u) = 0 under the prefix ``try_``; returns record, solution, norms."""
    snes, x = snes_of(function, guess, "try_")
    norms: list[float] = []
    snes.setMonitor(lambda solver, iteration, norm: norms.append(norm))
    with Options("try_", options).inserted():
        snes.setFromOptions()
        record = run_snes(snes, None, x)
    with shaped_read(x, guess) as view:
        solution = view.clone()
    snes.destroy()
    return record, solution, norms


# --------------------------------------------------------------------------------------------------- known histories


@pytest.mark.parametrize(
    ("options", "published"),
    [({"snes_type": "anderson"}, ANDERSON), ({"snes_type": "ngmres", "snes_ngmres_m": 10}, NGMRES)],
    ids=["anderson", "ngmres"],
)
def test_petsc_s_published_history_of_bratu_s_problem(options: dict[str, object], published: str) -> None:
    """``ex5 -da_grid_x 81 -da_grid_y 81 -snes_max_it 50 -par 6.0`` with ``-mms 1``, its default, digit by digit."""
    problem = Bratu(81, 6.0)
    record, _, norms = solve(problem.residual, problem.guess, snes_max_it=50, **options)
    assert [f"{norm:g}" for norm in norms[:30]] == published.split()[:30]
    # Mixing more than thirty directions amplifies rounding, which another BLAS does otherwise.
    np.testing.assert_allclose(norms, [float(number) for number in published.split()], rtol=1e-3)
    assert record.reason == "DIVERGED_MAX_IT" and record.iterations == 50 and not record.converged
    assert record.residual_norm == norms[-1] and record.solver == options["snes_type"]


def test_bratu_s_problem_converges_to_the_solution_it_was_made_for() -> None:
    """The five-point stencil is exact for this polynomial."""
    problem = Bratu(9, 2.0)
    record, found, _ = solve(problem.residual, problem.guess, snes_type="anderson", snes_rtol=1e-11)
    assert record.converged
    np.testing.assert_allclose(found, problem.solution, rtol=0, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------- reasons


@pytest.mark.parametrize(
    ("reasons", "code", "name"),
    [
        (PETSc.SNES.ConvergedReason, 2, "CONVERGED_FNORM_ABS"),
        (PETSc.SNES.ConvergedReason, 3, "CONVERGED_FNORM_RELATIVE"),
        (PETSc.SNES.ConvergedReason, -3, "DIVERGED_LINEAR_SOLVE"),
        (PETSc.SNES.ConvergedReason, -4, "DIVERGED_FUNCTION_NANORINF"),
        (PETSc.SNES.ConvergedReason, -5, "DIVERGED_MAX_IT"),
        (PETSc.SNES.ConvergedReason, -6, "DIVERGED_LINE_SEARCH"),
        (PETSc.SNES.ConvergedReason, 0, "CONVERGED_ITERATING"),
        (PETSc.KSP.ConvergedReason, 2, "CONVERGED_RTOL"),
        (PETSc.KSP.ConvergedReason, 3, "CONVERGED_ATOL"),
        (PETSc.KSP.ConvergedReason, -4, "DIVERGED_DTOL"),
        (PETSc.KSP.ConvergedReason, -9, "DIVERGED_NANORINF"),
        (PETSc.TAO.ConvergedReason, 3, "CONVERGED_GATOL"),
        (PETSc.TAO.ConvergedReason, -2, "DIVERGED_MAXITS"),
        (PETSc.TAO.ConvergedReason, -6, "DIVERGED_LS_FAILURE"),
        (PETSc.SNES.ConvergedReason, 4711, "4711"),
    ],
)
def test_reasons_have_petsc_s_names(reasons: type, code: int, name: str) -> None:
    assert reason_name(reasons, code) == name


def half(u: Tensor) -> Tensor:
    """The residual of u = u / 2 + 1, which Picard iteration halves each time."""
    return u / 2 - 1


def test_a_record_of_a_snes_that_converged() -> None:
    record, found, norms = solve(half, torch.zeros(3, dtype=torch.float64), snes_type="nrichardson", snes_rtol=1e-3)
    assert (record.kind, record.solver, record.prefix) == ("SNES", "nrichardson", "try_")
    assert record.converged and record.reason == "CONVERGED_FNORM_RELATIVE"
    assert record.iterations == len(norms) - 1 and record.residual_norm == norms[-1] <= 1e-3 * norms[0]
    np.testing.assert_allclose(found, 2.0, rtol=2e-3)


@pytest.mark.parametrize(
    ("function", "options", "reason", "remedy"),
    [
        (half, {"snes_max_it": 2}, "DIVERGED_MAX_IT", r"\(-try_snes_max_it\), or try -try_snes_type newtonls"),
        (lambda u: -9 * u - 1, {"snes_divergence_tolerance": 10}, "DIVERGED_DTOL", "-try_snes_type newtonls"),
        (lambda u: u * torch.nan, {}, "DIVERGED_FUNCTION_NANORINF", "returned NaN or Inf"),
    ],
    ids=["iterations", "expands", "nan"],
)
def test_a_snes_that_failed_says_what_to_type(
    function: Function, options: dict[str, object], reason: str, remedy: str
) -> None:
    # lambda = 1 without a line search: what Picard iteration does
    options = {"snes_type": "nrichardson", "snes_linesearch_type": "basic", **options}
    record, _, _ = solve(function, torch.zeros(3, dtype=torch.float64), **options)
    assert not record.converged and record.reason == reason
    with pytest.raises(AssertionError, match=remedy):
        raise AssertionError(record.remedy())


def test_an_unknown_failure_points_to_the_history() -> None:
    record = SolveRecord("KSP", "gmres", "deq_", "DIVERGED_SOMEHOW", False, 3, 1.0)
    assert record.remedy() == "look at the history: -deq_ksp_monitor -deq_ksp_converged_reason"


# --------------------------------------------------------------------------------------------------------------- KSP


@pytest.fixture
def linear(comm: Comm) -> Iterator[tuple[PETSc.KSP, np.ndarray]]:
    """A GMRES without preconditioner for a matrix of four by four that is not symmetric."""
    dense = np.random.default_rng(3).standard_normal((4, 4)) + 3 * np.eye(4)

    def product_of(matrix: np.ndarray) -> Callable[[PETSc.Vec, PETSc.Vec], None]:
        def product(x: PETSc.Vec, y: PETSc.Vec) -> None:
            with shaped_read(x, torch.empty(4, dtype=torch.float64)) as view:
                copy_to_vector(torch.from_numpy(matrix) @ view, y)

        return product

    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOptionsPrefix("try_")
    ksp.setOperators(matrix_from_products(PETSc.COMM_SELF, (4, 4), (4, 4), product_of(dense), product_of(dense.T)))
    ksp.setType("gmres")
    ksp.getPC().setType("none")
    ksp.setTolerances(rtol=1e-12)
    yield ksp, dense
    ksp.destroy()


@pytest.mark.parametrize("transpose", [False, True])
def test_a_record_of_a_ksp_that_converged(linear: tuple[PETSc.KSP, np.ndarray], transpose: bool) -> None:
    ksp, dense = linear
    x, b = ksp.getOperators()[0].createVecs()
    copy_to_vector(torch.arange(4.0), b)
    record = run_ksp(ksp, b, x, transpose=transpose)
    assert (record.kind, record.solver, record.prefix) == ("KSP", "gmres", "try_")
    assert record.converged and record.reason in ("CONVERGED_RTOL", "CONVERGED_HAPPY_BREAKDOWN")
    assert record.iterations == 4 and record.residual_norm < 1e-10
    np.testing.assert_allclose(x.getArray(), np.linalg.solve(dense.T if transpose else dense, np.arange(4.0)))


def test_a_ksp_that_failed_says_what_to_type(linear: tuple[PETSc.KSP, np.ndarray]) -> None:
    ksp, _ = linear
    x, b = ksp.getOperators()[0].createVecs()
    copy_to_vector(torch.arange(4.0), b)
    ksp.setTolerances(max_it=2)
    record = run_ksp(ksp, b, x)
    assert not record.converged and record.iterations == 2 and record.residual_norm > 1e-3
    assert record.reason == "DIVERGED_ITS"  # as PETSc prints it
    assert record.remedy() == "allow more iterations (-try_ksp_max_it), or a longer -try_ksp_gmres_restart"


@pytest.mark.parametrize("reason", [name for name in vars(PETSc.KSP.ConvergedReason) if name.startswith("DIVERGED_")])
def test_the_remedy_of_a_ksp_is_of_the_ksp(reason: str) -> None:
    remedy = SolveRecord("KSP", "gmres", "deq_", reason.replace("MAX_IT", "ITS"), False, 3, 1.0).remedy()
    assert "snes" not in remedy


# -------------------------------------------------------------------------------------------------- callbacks' errors


class Mine(Exception):
    pass


@pytest.mark.parametrize("kind", ["anderson", "ngmres", "nrichardson", "newtonls"])
def test_what_a_callback_raises_comes_out_itself(kind: str) -> None:
    error = Mine("of my own")

    def function(u: Tensor) -> Tensor:
        raise error

    with pytest.raises(Mine, match="^of my own$") as caught:
        solve(function, torch.zeros(3, dtype=torch.float64), snes_type=kind)
    assert caught.value is error


def test_what_a_product_raises_comes_out_itself() -> None:
    error = Mine("of my own")

    def product(x: PETSc.Vec, y: PETSc.Vec) -> None:
        raise error

    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOperators(matrix_from_products(PETSc.COMM_SELF, (2, 2), (2, 2), product))
    ksp.getPC().setType("none")
    x, b = ksp.getOperators()[0].createVecs()
    b.set(1.0)
    with pytest.raises(Mine) as caught:
        run_ksp(ksp, b, x)
    assert caught.value is error


def test_an_error_in_a_solve_inside_a_solve_comes_out_itself() -> None:
    def inner(u: Tensor) -> Tensor:
        raise Mine("deep inside")

    def outer(u: Tensor) -> Tensor:
        snes, x = snes_of(inner, torch.zeros(2, dtype=torch.float64), "inner_")
        snes.setType("nrichardson")
        snes.solve(None, x)  # without reraise: PETSc wraps it once here, once outside
        return u

    with pytest.raises(Mine, match="deep inside"):
        solve(outer, torch.zeros(2, dtype=torch.float64), snes_type="nrichardson")


def test_petsc_s_own_errors_stay_petsc_s() -> None:
    with pytest.raises(PETSc.Error, match="error code"):
        reraise(lambda: PETSc.Vec().createSeq(2, comm=PETSc.COMM_SELF).axpy(1.0, PETSc.Vec().createSeq(3)))


def test_the_bridge_goes_on_after_an_error() -> None:
    test_what_a_product_raises_comes_out_itself()
    record, _, _ = solve(half, torch.zeros(3, dtype=torch.float64), snes_type="nrichardson")
    assert record.converged
