"""Fixed points found sample by sample: mixing, batches and samples on their own, failures, samples that leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cells import TanhCell, unrolled
from oracles import Watched, affine, bounded, failing, graphs, krylov_states, matrices, mixed, randn, zeros
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.deq import solve_fixed_point
from hpcdeq.deq.anderson import Settings
from hpcdeq.models.graph_deq import MessageCell
from hpcdeq.parallel import Comm

TYPES = ["batched_anderson", "batched_newton"]
TIGHT = {"snes_rtol": 1e-12, "snes_atol": 1e-13}
ANDERSON = "hpcdeq.deq.anderson.PerSampleAnderson"


# ------------------------------------------------------------------------------------------------------------ mixing


DEFAULTS = {
    "m": Settings.window,
    "beta": Settings.mixing,
    "period": Settings.period,
    "type": Settings.kind,
    "delay": Settings.delay,
    "restart": Settings.restart,
    "growth": Settings.growth,
}
SETTINGS: list[dict[str, Any]] = [
    {"period": 1, "m": 3},
    {"period": 1, "m": 3, "type": 1},
    {"period": 3, "m": 4},
    {"period": 3, "m": 4, "type": 1, "beta": 0.7},
    {"period": 2, "m": 5, "beta": 0.5},
    {"period": 1, "m": 4, "delay": 4},
    {"period": 4, "m": 4, "delay": 2},
    {"period": 6, "m": 9},
    {"period": 5, "m": 7},
    {"period": 2, "m": 3, "delay": 5, "beta": 0.8},
    {"period": 1, "m": 4, "restart": 1},
    {"period": 1, "m": 4, "restart": 3},
    {"period": 3, "m": 2, "restart": 2},
    {"period": 1, "m": 3, "growth": 1.05},
    {"period": 4, "m": 8, "growth": 1.05},
    {"period": 1, "m": 1},
    {"period": 2, "m": 1},
    {"m": 0},
    {"m": 0, "beta": 0.3},
    {},
]


@pytest.mark.parametrize("cell", [affine, bounded])
@pytest.mark.parametrize(
    ("norms", "dtype"),
    [((0.9, 0.5, 0.95), torch.float64), ((1.6, 0.8, 3.0), torch.float64), ((0.9, 0.5, 0.95), torch.float32)],
)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()) or "default")
def test_mixing_equals_least_squares_sample_by_sample(
    cell: Callable[..., Tensor], norms: tuple[float, ...], dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    x, watched = tuple(t.to(dtype) for t in matrices(*norms, d=10)), Watched(cell)
    options = {f"snes_anderson_{name}": value for name, value in settings.items()}
    z0 = torch.full((3, 10), 0.3, dtype=dtype)
    steps = 15 if dtype == torch.float64 else 8
    failing(watched, x, z0, snes_max_it=steps - 1, snes_rtol=0, snes_atol=0, snes_divergence_tolerance=1e30,
            snes_fallback="none", **options)  # fmt: skip
    for i in range(3):
        a, b = (t[i].double().numpy() for t in x)
        f = {affine: lambda z, a=a, b=b: a @ z + b, bounded: lambda z, a=a, b=b: np.tanh(a @ z + b)}[cell]
        expected = mixed(f, z0[i].double().numpy(), steps, **{**DEFAULTS, **settings})
        found = torch.stack([z[i] for z in watched.states]).double().numpy()
        close = 1e-8 if dtype == torch.float64 else 2e-3
        np.testing.assert_allclose(found, expected, rtol=0, atol=close * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("type", [1, 2])
def test_a_full_window_on_an_affine_map_is_a_krylov_method(type: int) -> None:  # noqa: A002
    """Its states are the images of GMRES's, type I's those of full orthogonalisation (Walker and Ni 2011)."""
    x, watched = matrices(0.9, 1.5, d=12), Watched(affine)
    failing(watched, x, zeros(2, 12), snes_max_it=9, snes_rtol=0, snes_atol=0, snes_fallback="none",
            snes_anderson_m=20, snes_anderson_period=1, snes_anderson_type=type, snes_anderson_growth=1e9,
            snes_divergence_tolerance=1e30)  # fmt: skip
    for i in range(2):
        a, b = (t[i].numpy() for t in x)
        states, norms = krylov_states(a, b, np.zeros(12), 8, galerkin=type == 1)
        for k, state in enumerate(states):
            image = watched.states[k + 1][i].numpy()
            np.testing.assert_allclose(image, a @ state + b, rtol=0, atol=1e-8 * (1 + np.abs(state).max()))
            if type == 2:
                residual = image - np.linalg.solve(a, image - b)
                np.testing.assert_allclose(np.linalg.norm(residual), norms[k], rtol=1e-5)


# ------------------------------------------------------------------------------------------------- one and the batch


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("kind", TYPES)
def test_a_batch_on_any_ranks_equals_each_sample_alone(comm: Comm, kind: str) -> None:
    cell, x = TanhCell(norm=0.9), 3 * randn(5, 3)
    sizes = [[5], [5, 0], [3, 0, 2]][comm.size - 1]
    start = sum(sizes[: comm.rank])
    own, z0 = x[start : start + sizes[comm.rank]], zeros(sizes[comm.rank], 5)
    found = solve_fixed_point(cell, own, z0=z0, options={"snes_type": kind, **TIGHT})
    everything = np.empty(25)
    parallel.gather_blocks(comm, found.value.detach().numpy().ravel(), [5 * n for n in sizes], everything)
    for i in range(5):
        alone = solve_fixed_point(cell, x[i : i + 1], options={"snes_type": kind, **TIGHT}).value
        np.testing.assert_allclose(everything[5 * i : 5 * i + 5], alone[0].detach().numpy(), rtol=0, atol=1e-10)


@pytest.mark.parallel([1, 2, 3])
def test_graphs_of_several_sizes_on_any_ranks_equal_each_alone(comm: Comm) -> None:
    lengths, cell = [3, 7, 4, 9, 5], MessageCell()
    everything = graphs(lengths)
    share = [[0, 1, 2, 3, 4], [], []] if comm.size == 1 else [[0, 2, 4], [], [1, 3]]
    share = [[0, 1, 2, 3, 4], []] if comm.size == 2 else share
    for i in share[comm.rank]:
        alone = cell.select(everything, torch.tensor([i]))
        index = {"sample_index": lambda given: given.node_graph, "options": TIGHT}
        one = solve_fixed_point(cell, alone, **index).value
        together = cell.select(everything, torch.tensor(share[comm.rank]))
        watched = Watched(cell)
        batch = solve_fixed_point(watched, together, **index)
        mine = together.node_graph == share[comm.rank].index(i)
        torch.testing.assert_close(batch.value[mine], one, rtol=0, atol=1e-10)
        torch.testing.assert_close(one, unrolled(cell, alone, torch.zeros_like(one), 400), rtol=0, atol=1e-10)
        assert batch.residual.shape == (len(share[comm.rank]),) and min(watched.rows) < max(watched.rows)


@pytest.mark.parametrize("setting", [{}, {"restart": 2, "period": 2}, {"growth": 1.1, "period": 8}])
def test_an_expanding_batch_mate_changes_no_iterate(setting: dict[str, float]) -> None:
    turns = torch.stack([norm * torch.nn.init.orthogonal_(zeros(12, 12)) for norm in (0.9, 3.0, 1.04)])
    x, cell = (turns, randn(3, 12)), affine
    options = {"snes_max_it": 11, "snes_rtol": 0, "snes_atol": 0, "snes_divergence_tolerance": 1e30}
    options |= {"snes_fallback": "none", **{f"snes_anderson_{k}": v for k, v in setting.items()}}
    together = Watched(cell)
    failing(together, x, zeros(3, 12), **options)
    for i in range(3):
        alone = Watched(cell)
        failing(alone, tuple(t[i : i + 1] for t in x), zeros(1, 12), **options)
        for a, b in zip(together.states, alone.states, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------- failures, sample by sample


def treacherous(z: Tensor, x: Tensor) -> Tensor:
    """Contracts, but for samples with x > 5, which have no fixed point, and x < -5, which have none and overflow."""
    usual = torch.where(x > 5, z * z + x, 0.5 * torch.tanh(z) + x)
    return torch.where(x < -5, torch.exp(100 * torch.where(x < -5, z, 0.0) ** 2) - x, usual)


@pytest.mark.parametrize("kind", TYPES)
def test_bad_samples_are_named_and_the_good_ones_are_right(kind: str) -> None:
    x = randn(6, 3)
    x[1], x[3], x[4] = 9.0, float("nan"), -9.0
    match = r"3 of 6 samples \(sample 1, 3, 4\).*DIVERGED_FUNCTION_NANORINF"
    found = failing(treacherous, x, torch.zeros_like(x), match, snes_type=kind, snes_max_it=50, **TIGHT)
    good = [0, 2, 5]
    assert found.converged.tolist() == [True, False, True, False, False, True]
    expected = unrolled(treacherous, x[good], zeros(3, 3), 100)
    torch.testing.assert_close(found.value[good], expected, rtol=0, atol=1e-9)
    residual = torch.linalg.vector_norm(treacherous(found.value, x) - found.value, dim=1)
    torch.testing.assert_close(found.residual[good], residual[good], rtol=1e-6, atol=1e-15)
    assert not bool((found.residual[[1, 3, 4]] < 1).any())
    for i in good if kind == "batched_anderson" else []:  # Newton's steps wait for those that are halved
        alone = solve_fixed_point(treacherous, x[i : i + 1], options={"snes_type": kind, **TIGHT})
        assert abs(int(found.iterations[i]) - int(alone.iterations)) <= 1


@pytest.mark.parametrize("when", range(9))
@pytest.mark.parametrize("kind", TYPES)
def test_an_infinite_image_is_no_fixed_point(kind: str, when: int) -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.where(z >= when, torch.inf, z.round() + x)

    options = {"snes_type": kind, "snes_fallback": "none", "snes_anderson_m": 0}
    found = failing(cell, torch.ones(2, 1), torch.zeros(2, 1), "0 of 2|not reached", **options)
    assert not bool(found.converged.any()) and found.record.reason.startswith("DIVERGED")


@pytest.mark.parametrize("kind", TYPES)
def test_iterations_are_each_samples_own_in_a_large_batch(kind: str) -> None:
    """A few that have converged stay until an eighth has, so that little is copied: that is not theirs to count."""
    cell, x = TanhCell(norm=0.5), randn(40, 3)
    z0 = zeros(40, 5)
    with torch.no_grad():
        z0[:2] = unrolled(cell, x[:2], z0[:2], 200)
        z0[2] = z0[1] + 1e-6
        x[2] = x[1]
    found = solve_fixed_point(cell, x, z0=z0, options={"snes_type": kind})
    assert found.iterations[:2].tolist() == [0, 0] and 0 < int(found.iterations[2]) < int(found.iterations[3:].min())


# ---------------------------------------------------------------------------------------------------- leaving samples


@pytest.mark.parametrize("kind", TYPES)
def test_converged_samples_leave_and_every_evaluation_is_counted(kind: str) -> None:
    x, watched = randn(12, 3) * torch.logspace(-9, 1, 12, dtype=torch.float64)[:, None], Watched(TanhCell(norm=0.3))
    z0 = unrolled(watched.cell, 0 * x, zeros(12, 5), 99).detach()
    found = solve_fixed_point(watched, x, z0=z0, options={"snes_type": kind})
    assert sum(watched.rows) == found.evaluations * 12
    assert min(watched.rows) < 12 and sorted(watched.rows, reverse=True)[0] == 12
    assert len(found.iterations.unique()) > 2
    residual = torch.linalg.vector_norm(watched.cell(found.value, x) - found.value, dim=1)
    torch.testing.assert_close(found.residual, residual.detach(), rtol=1e-5, atol=1e-15)
    if kind == "batched_anderson":
        assert sum(watched.rows) < 12 * (int(found.iterations.max()) + 1)


def less_the_mean(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * torch.tanh(z - z.mean(dim=0)) + x


def picky(z: Tensor, x: Tensor) -> Tensor:
    if len(z) != 6:
        raise ValueError("batch normalisation, say, wants more samples")
    return 0.5 * torch.tanh(z) + x


class Normalised(nn.Module):
    """Its samples depend on each other in training, and not in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.3 * torch.tanh(self.norm(z)) + x


def test_a_restriction_is_looked_at_anew_in_another_mode_of_the_module() -> None:
    cell, x, z0 = Normalised(), 3 * randn(16, 3), 3 * randn(16, 3)
    for mode in (False, True):
        cell.train(mode)
        with torch.no_grad():
            x[:8] = z0[:8] - cell(z0, 0 * x)[:8]  # at fixed points, in training until the others have moved
            found = solve_fixed_point(cell, x, z0=z0, options=TIGHT)
            residual = torch.linalg.vector_norm(cell(found.value, x) - found.value, dim=1)
        assert float(residual.max()) < 1e-10
    assert solve_fixed_point(cell, x).value.shape == x.shape  # where one sample alone is refused with a ValueError


WEIGHT = 0.8 * torch.nn.init.orthogonal_(torch.empty(5, 5, dtype=torch.float64))


@pytest.mark.parametrize("case", ["coupled", "zero", "frozen", "closure", "picky", "weight", "weight later"])
def test_samples_that_cannot_leave_are_evaluated_to_the_end(case: str) -> None:
    x = randn(6, 5) * torch.logspace(-8, 1, 6, dtype=torch.float64)[:, None]
    cell, given, z0 = less_the_mean, x, zeros(6, 5)
    if case == "zero":  # half of them are at fixed points at first, where the mean of the others is that of all
        x[:3] = 0
    elif case == "frozen":  # half of them are at fixed points until the others have moved
        z0 = randn(6, 5)
        x[:3] = z0[:3] - 0.5 * torch.tanh(z0[:3] - z0.mean(dim=0))
    elif case == "closure":
        cell, given = (lambda z, _: 0.5 * torch.tanh(z) + x), None
    elif case == "picky":
        cell = picky
    elif case.startswith("weight"):
        x = x[1:] if case == "weight" else torch.cat([x, x[:1]])  # seven samples become five on the way
        cell, z0 = (lambda z, x: torch.tanh(z @ x[1].T + x[0])), torch.zeros_like(x)
        given = (x, WEIGHT)
    watched = Watched(cell)
    found = solve_fixed_point(watched, given, z0=z0, options=TIGHT)
    torch.testing.assert_close(found.value, unrolled(cell, given, z0, 400), rtol=0, atol=1e-10)
    residual = torch.linalg.vector_norm(cell(found.value, given) - found.value, dim=1)
    torch.testing.assert_close(found.residual, residual, rtol=1e-5, atol=1e-15)
    assert bool((residual <= 1e-11 * torch.linalg.vector_norm(found.value, dim=1) + 1e-12).all())
    if case != "weight later":
        assert sum(len(z) for z in watched.states if len(z) == len(x)) >= len(x) * (int(found.iterations.max()) + 1)
