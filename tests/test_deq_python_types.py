"""The per-sample types as PETSc sees them: options, monitors, foreign problems; hard maps, fallbacks, Newton's steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cells import TanhCell, unrolled
from oracles import Watched, affine, bounded, failing, graphs, matrices, randn, zeros
from torch import Tensor

from hpcdeq.deq import FixedPoint, solve_fixed_point
from hpcdeq.deq.arguments import CellFunction
from hpcdeq.deq.batch import Batch
from hpcdeq.deq.samples import SampleMap, Samples
from hpcdeq.errors import ConvergenceError, OptionError
from hpcdeq.models.graph_deq import MessageCell
from hpcdeq.parallel import Comm
from hpcdeq.petsc import PETSc

TYPES = ["batched_anderson", "batched_newton"]
ANDERSON = "hpcdeq.deq.anderson.PerSampleAnderson"
NEWTON = "hpcdeq.deq.newton.PerSampleNewton"
SIZE = 12


# ------------------------------------------------------------------------------------------------------------- PETSc


def bratu(u: np.ndarray) -> np.ndarray:
    """Return half of h² (-u'' - eᵘ) on an interval, u zero at both ends."""
    h, padded = 1 / (len(u) + 1), np.pad(u, 1)
    return u - (padded[2:] + padded[:-2]) / 2 - h**2 * np.exp(u) / 2


def bratu_snes(kind: str, comm: Any = PETSc.COMM_SELF) -> tuple[PETSc.SNES, PETSc.Vec]:
    def function(snes: PETSc.SNES, x: PETSc.Vec, residual: PETSc.Vec) -> None:
        residual.setArray(bratu(x.getArray(readonly=True)))

    x = PETSc.Vec().createMPI(SIZE, comm=comm)
    snes = PETSc.SNES().create(comm)
    snes.setFunction(function, x.duplicate())
    snes.setType("python")
    snes.setPythonType(kind)
    snes.setTolerances(rtol=1e-12, atol=1e-12, max_it=200)
    return snes, x


def test_an_ordinary_problem_of_the_users_with_history_and_monitor() -> None:
    snes, x = bratu_snes(ANDERSON)
    seen: list[tuple[int, float, np.ndarray]] = []
    snes.setMonitor(lambda s, number, norm: seen.append((number, norm, s.getSolution().getArray(True).copy())))
    snes.setConvergenceHistory()
    snes.solve(None, x)
    u = np.zeros(SIZE)
    for _ in range(20):  # Newton's method, with differences
        jacobian = np.stack([(bratu(u + e) - bratu(u - e)) / 2e-5 for e in 1e-5 * np.eye(SIZE)], axis=1)
        u = u - np.linalg.solve(jacobian, bratu(u))
    np.testing.assert_allclose(x.getArray(), u, rtol=0, atol=1e-9)
    assert snes.getConvergedReason() == PETSc.SNES.ConvergedReason.CONVERGED_FNORM_RELATIVE
    assert [number for number, _, _ in seen] == list(range(snes.getIterationNumber() + 1))
    for _, norm, state in seen:
        assert norm == pytest.approx(np.linalg.norm(bratu(state)), rel=1e-6, abs=1e-15)
    np.testing.assert_allclose(snes.getConvergenceHistory()[0], [norm for _, norm, _ in seen])
    assert snes.getFunctionNorm() == seen[-1][1]
    snes.destroy()


def test_an_infinite_residual_of_the_users_is_no_success() -> None:
    snes, x = bratu_snes(ANDERSON)
    x.set(1e200)  # whose exponential overflows
    with np.errstate(over="ignore"):
        snes.solve(None, x)
    assert snes.getConvergedReason() < 0
    snes.destroy()


def test_a_right_hand_side_of_the_users() -> None:
    snes, x = bratu_snes(ANDERSON)
    u = np.sin(np.arange(SIZE) + 1.0)
    b = PETSc.Vec().createWithArray(bratu(u), comm=PETSc.COMM_SELF)
    snes.solve(b, x)
    np.testing.assert_allclose(x.getArray(), u, rtol=0, atol=1e-8)
    snes.destroy()


@pytest.mark.parallel([2, 3])
def test_a_problem_over_several_processes_is_refused(comm: Comm) -> None:
    snes, x = bratu_snes(ANDERSON, comm)
    with pytest.raises(PETSc.Error) as caught:
        snes.solve(None, x)
    assert "works on one process" in str(root(caught.value))
    snes.destroy()


def root(error: BaseException | None) -> BaseException | None:
    while isinstance(error, PETSc.Error):
        error = error.__cause__
    return error


def test_newton_refuses_a_problem_that_it_cannot_differentiate() -> None:
    snes, x = bratu_snes(NEWTON)
    with pytest.raises(PETSc.Error) as caught:
        snes.solve(None, x)
    cause = root(caught.value)
    assert isinstance(cause, OptionError) and "newtonls" in str(cause)
    snes.destroy()


def test_a_monitor_sees_the_whole_state_after_samples_have_left() -> None:
    cell, x = TanhCell(norm=0.8), randn(6, 3) * torch.logspace(-6, 1, 6, dtype=torch.float64)[:, None]
    z0 = unrolled(cell, 0 * x, zeros(6, 5), 200).detach()
    function, watched = CellFunction(cell, x), Watched(cell)
    snes, vector = PETSc.SNES().create(PETSc.COMM_SELF), PETSc.Vec().createSeq(30)
    vector.setArray(z0.numpy().ravel())
    snes.setType("python")
    snes.setPythonType(ANDERSON)
    snes.appctx = Batch(SampleMap(CellFunction(watched, x).bind(function.tensors[-1:], now=True), Samples(6)), z0)
    norms = []

    def look(_: PETSc.SNES, number: int, norm: float) -> None:
        z = torch.from_numpy(snes.getSolution().getArray(True).copy()).reshape(6, 5)
        norms.append((norm, float((cell(z, x) - z).detach().norm())))

    snes.setMonitor(look)
    snes.setTolerances(rtol=1e-9, atol=1e-11)
    snes.solve(None, vector)
    assert min(watched.rows) < 6 and len(norms) == len(set(norms)) == snes.getIterationNumber() + 1
    np.testing.assert_allclose(*zip(*norms, strict=True), rtol=1e-4, atol=1e-11)
    snes.appctx = None
    snes.destroy()


def test_views_monitors_and_reasons_are_petscs(capfd: pytest.CaptureFixture[str]) -> None:
    options = {"snes_view": None, "snes_monitor": None, "snes_converged_reason": None, "snes_anderson_period": 3}
    found = solve_fixed_point(TanhCell(), randn(4, 3), options=options)
    printed = capfd.readouterr().out
    assert "per sample: Anderson mixing" in printed and "period=3" in printed
    assert printed.count("SNES Function norm") == found.record.iterations + 1
    assert f"solve converged due to CONVERGED_FNORM_RELATIVE iterations {found.record.iterations}" in printed


@pytest.mark.parametrize("kind", TYPES)
def test_the_limits_are_petscs(kind: str) -> None:
    cell, x = TanhCell(norm=0.9), randn(4, 3)
    options = {"snes_fallback": "none", "snes_type": kind}
    found = failing(cell, x, zeros(4, 5), "DIVERGED_MAX_IT after 3 iterations", snes_max_it=3, **options)
    assert found.iterations.tolist() == [3] * 4 and len(found.history) == 4
    loose = solve_fixed_point(cell, x, options={"snes_rtol": 0.0, "snes_atol": 1e-3, **options})
    assert float(loose.residual.max()) <= 1e-3


def test_the_divergence_tolerance_is_each_samples() -> None:
    growth = torch.tensor([[1.2], [0.5]], dtype=torch.float64)
    options = {"snes_anderson_m": 0, "snes_divergence_tolerance": 10, "snes_fallback": "none"}
    found = failing(lambda z, x: x * z + 100, growth, zeros(2, 1), "DIVERGED_DTOL after", **options)
    steps = int(np.ceil(np.log(10) / np.log(1.2)))
    assert found.converged.tolist() == [False, True]
    assert float(found.residual[0]) == pytest.approx(100 * 1.2**steps)


def test_the_long_spelling() -> None:
    cell, x = TanhCell(), randn(4, 3)
    short = solve_fixed_point(cell, x, options={"snes_type": "batched_anderson", "snes_anderson_m": 3})
    options = {"snes_type": "python", "snes_python_type": ANDERSON, "snes_anderson_m": 3}
    long = solve_fixed_point(cell, x, options=options)
    assert long.record.solver == "batched_anderson" and bool((long.value == short.value).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snes_anderson_perid": 2}, "-deq_snes_anderson_perid: did you mean -deq_snes_anderson_period"),
        ({"ksp_anderson_perid": 2}, "-deq_ksp_anderson_perid: did you mean -deq_ksp_anderson_period"),
        ({"snes_anderson_m": -1}, "-deq_snes_anderson_m: give 0 or more"),
        ({"snes_anderson_beta": 0}, "-deq_snes_anderson_beta: give a number above 0"),
        ({"snes_anderson_beta": "nan"}, "-deq_snes_anderson_beta: give a number above 0"),
        ({"snes_anderson_period": 0}, "-deq_snes_anderson_period: give 1 or more"),
        ({"snes_anderson_type": 3}, "-deq_snes_anderson_type: give 1 or 2"),
        ({"snes_anderson_delay": -1}, "-deq_snes_anderson_delay: give 0 or more"),
        ({"snes_anderson_restart": -1}, "-deq_snes_anderson_restart: give 0 or more"),
        ({"snes_anderson_growth": 1}, "-deq_snes_anderson_growth: give a number above 1"),
        ({"snes_type": "batched_newton", "snes_newton_lag": 0}, "-deq_snes_newton_lag is 0: give 1 or more"),
        (
            {"snes_max_it": 1, "snes_fallback": "ngmress"},
            "-deq_snes_fallback names 'ngmress', which PETSc does not know",
        ),
    ],
)
def test_wrong_options_are_refused_with_what_is_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        solve_fixed_point(TanhCell(), randn(4, 3), options=options)


# --------------------------------------------------------------------------------------------------------- hard maps


@pytest.mark.parametrize("type", [1, 2])
@pytest.mark.parametrize("norm", [1.0, 1.5, 3.0])
def test_expanding_rotations_are_solved(norm: float, type: int) -> None:  # noqa: A002
    turns = norm * torch.stack([torch.nn.init.orthogonal_(zeros(6, 6)) for _ in range(3)])
    if norm == 1:  # by right angles in three planes, whose image of a circle is the circle
        turns[:] = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]])] * 3)
    x = (turns, randn(3, 6))
    found = solve_fixed_point(
        affine, x, z0=zeros(3, 6), options={"snes_fallback": "none", "snes_anderson_type": type, "snes_max_it": 60}
    )
    expected = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - turns, x[1])
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("type", [1, 2])
@pytest.mark.parametrize("period", [1, 2, 4])
def test_histories_without_full_rank_do_no_harm(period: int, type: int) -> None:  # noqa: A002
    a, b = matrices(0.9, 0.9, 0.9, 0.9)
    a[1] = 0.5 * torch.outer(b[1], b[1]) / b[1].square().sum()  # differences in one direction
    a[2], b[3] = 0.9 * torch.eye(8, dtype=torch.float64), 0.0  # likewise; and a sample at its fixed point
    expected = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - a, b)
    options = {"snes_anderson_m": 20, "snes_anderson_period": period, "snes_anderson_type": type}
    options |= {"snes_rtol": 1e-12, "snes_fallback": "none", "snes_max_it": 80}
    found = solve_fixed_point(affine, (a, b), z0=zeros(4, 8), options=options)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-9)
    assert int(found.iterations[3]) == 0
    again = solve_fixed_point(affine, (a, b), z0=expected, options=options)
    assert again.iterations.tolist() == [0] * 4 and again.evaluations == 1
    scalar = solve_fixed_point(lambda z, x: torch.cos(z), None, z0=zeros(3, 1), options=options).value
    torch.testing.assert_close(scalar, torch.full_like(scalar, 0.7390851332151607), rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------------------- fallbacks

PLAIN = {"snes_anderson_m": 0, "snes_max_it": 200}


@pytest.mark.parametrize("chain", [None, "newtonls", " newtonls , ngmres", "batched_newton"])
def test_others_go_on_with_the_samples_that_failed_alone(chain: str | None) -> None:
    turns = torch.stack([norm * torch.nn.init.orthogonal_(zeros(5, 5)) for norm in (0.3, 1.5, 0.2, 2.0)])
    x, options = (turns, randn(4, 5)), dict(PLAIN)
    first = Watched(affine)
    failed = failing(first, x, zeros(4, 5), "not reached by batched_anderson", snes_fallback="none", **options)
    assert failed.converged.tolist() == [True, False, True, False] and len(failed.attempts) == 1
    watched = Watched(affine)
    options |= {} if chain is None else {"snes_fallback": chain}
    found = solve_fixed_point(watched, x, z0=zeros(4, 5), options=options)
    expected = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - turns, x[1])
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-8)
    assert "2 of 4 samples converged" in found.attempts[0]
    if chain is None:  # ngmres finds one of them, and newtonls the other
        name = "newtonls"
        assert found.attempts[1].startswith("ngmres on the other 2: ") and found.attempts[-1].startswith("newtonls")
    else:
        name = chain.split(",")[0].strip()
        assert found.attempts[1:] == [f"{name} on the other 2: 2 of them converged"]
    assert found.record.solver == name and bool(found.converged.all()) and found.reason.startswith("CONVERGED")
    assert bool((found.value[[0, 2]] == failed.value[[0, 2]]).all())
    again = watched.rows[len(first.rows) :]
    # Where they begin, whether they can be told apart, and the end are seen with all samples.
    assert [n for n in again if n == 4] == [4] * again.count(4) and again.count(4) <= 6 and set(again) <= {2, 1, 4}
    assert sum(watched.rows) == found.evaluations * 4


def test_a_fallback_is_not_spoilt_by_a_sample_without_a_fixed_point() -> None:
    """The first has none; the others are found by ngmres, each on its own, after too few iterations of the first solver."""
    matrix = 0.9 * torch.nn.init.orthogonal_(torch.empty(6, 6, dtype=torch.float64))
    shift = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[:, None]

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 0, z + 1 + z.square(), torch.tanh(z @ matrix.T + x[:, 1:]))

    x = torch.cat([shift, randn(3, 6)], dim=1)
    found = failing(cell, x, zeros(3, 6), snes_max_it=60, snes_anderson_m=0, snes_fallback="ngmres")
    assert found.converged.tolist() == [False, True, True]
    for i in (1, 2):
        alone = solve_fixed_point(cell, x[i : i + 1], z0=zeros(1, 6)).value
        torch.testing.assert_close(found.value[i], alone[0], rtol=0, atol=1e-8)


def test_a_fallback_that_fails_too_is_told() -> None:
    x = torch.tensor([[0.1], [9.0]], dtype=torch.float64)
    found = failing(lambda z, x: torch.where(x > 5, z * z + x, 0.5 * z + x), x, zeros(2, 1),
                    r"sample 1\)(?s:.)*Tried: batched_anderson(?s:.)*Tried: ngmres(?s:.)*Tried: newtonls")  # fmt: skip
    assert found.converged.tolist() == [True, False] and found.record.solver == "batched_anderson"


@pytest.mark.parametrize(
    "options", [{"ksp_type": "batched_gmres"}, {"ksp_type": "batched_lu"}, {"pc_type": "secant"}, {"ksp_type": "shine"}]
)
def test_types_of_the_derivative_systems_leave_newton_steps_alone(options: dict[str, str]) -> None:
    cell, x = TanhCell(norm=0.95), randn(4, 3).requires_grad_()
    expected = unrolled(cell, x, zeros(4, 5), 900)
    found = solve_fixed_point(cell, x.detach(), options={"snes_type": "newtonls", **options})
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-8)
    layer = FixedPoint(cell, options={"snes_max_it": 8, "snes_fallback": "newtonls", **options})
    layer(x).sum().backward()
    assert layer.solution is not None and len(layer.solution.attempts) == 2 and x.grad is not None
    (exact,) = torch.autograd.grad(expected.sum(), x)
    if layer.inexact is None:
        torch.testing.assert_close(x.grad, exact, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ Newton's type


def arc(z: Tensor, x: Tensor) -> Tensor:
    """Newton's full steps for arctan z = x swing out from |z| > 1.39 at x = 0."""
    return z - (torch.atan(z) - x)


def test_newton_converges_quadratically_and_a_chord_linearly() -> None:
    x = matrices(2.0)
    answer = unrolled(bounded, x, zeros(1, 8), 400)
    start, quotients, products = answer + 0.03 * randn(1, 8), {}, {}
    for lag in (1, 50):
        options = {"snes_type": "batched_newton", "snes_newton_lag": lag, "snes_rtol": 1e-13, "snes_fallback": "none"}
        layer, watched = FixedPoint(bounded, options=options), Watched(bounded)
        solve_fixed_point(watched, x, z0=start, options=options)
        layer(x, start)
        errors = torch.stack([(z - answer).abs().max() for z in watched.states])
        errors = errors[(errors > 1e-12) & (errors != torch.cat([errors.new_zeros(1), errors[:-1]]))]
        quotients[lag] = (torch.log(errors[1:]) / torch.log(errors[:-1])).tolist()
        products[lag] = layer.work.cell_vjps
    assert len(quotients[1]) >= 2 and min(quotients[1]) > 1.6, quotients
    assert len(quotients[50]) > len(quotients[1]) and max(quotients[50][2:]) < 1.5 and products[50] < products[1]


@pytest.mark.parametrize("start", [3.0, -20.0])
def test_newton_goes_back_half_a_step_where_it_overshoots(start: float) -> None:
    z0 = torch.tensor([[0.5], [start]], dtype=torch.float64)
    found = solve_fixed_point(
        arc, zeros(2, 1), z0=z0, options={"snes_type": "batched_newton", "snes_fallback": "none", "snes_atol": 1e-12}
    )
    assert float(found.value.abs().max()) < 1e-11


def test_newton_goes_back_from_where_the_cell_is_not_defined() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return z - (torch.log(z) - x)

    x, z0 = torch.zeros(2, 1, dtype=torch.float64), torch.tensor([[5.0], [1.2]], dtype=torch.float64)
    found = solve_fixed_point(cell, x, z0=z0, options={"snes_type": "batched_newton", "snes_fallback": "none"})
    torch.testing.assert_close(found.value, torch.ones_like(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mate", ["hopeless", "converged"])
def test_batch_mates_that_have_ended_cost_no_newton_steps(mate: str) -> None:
    cell, x, z0 = TanhCell(norm=0.9), randn(40, 3), zeros(40, 5)
    usual = solve_fixed_point(cell, x, options={"snes_type": "batched_newton"})
    if mate == "hopeless":
        x[7] = float("nan")
        found = failing(cell, x, z0, "sample 7", snes_type="batched_newton")
    else:
        z0[:9] = usual.value[:9]  # too few to leave at once, where a quarter has to end
        found = solve_fixed_point(cell, x, z0=z0, options={"snes_type": "batched_newton"})
    assert int(found.iterations[found.converged].max()) <= usual.record.iterations + 1
    assert found.evaluations <= usual.evaluations + 4


def test_newton_refuses_samples_of_several_rows() -> None:
    with pytest.raises(OptionError, match="batched_newton needs a state with one row a sample: use newtonls"):
        solve_fixed_point(
            MessageCell(),
            graphs([3, 4]),
            options={"snes_type": "batched_newton"},
            sample_index=lambda given: given.node_graph,
        )


def test_a_singular_jacobian_is_an_error() -> None:
    with pytest.raises(ConvergenceError, match="NANORINF"):
        solve_fixed_point(
            lambda z, x: z + x, torch.ones(2, 3), options={"snes_type": "batched_newton", "snes_fallback": "none"}
        )
