"""Solver settings measured against each other: the cases, the search, and what is made of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cells import DeqRegressor, TanhCell
from torch import nn

import hpcdeq
from hpcdeq.errors import ConvergenceError, OptionError
from hpcdeq.tuning import (
    FORWARD,
    Measured,
    Measurement,
    Setting,
    Solve,
    find_crossover,
    layer_case,
    measure_settings,
    overtaking,
    solver_of,
    stiff_case,
)

WINDOWS, MIXINGS = (1, 2, 3, 5, 8, 12, 20), (1.0, 0.8, 0.5)

# ----------------------------------------------------------------------------------------------------------- the cases


@pytest.mark.parametrize("radius", [0.9, 0.99])
def test_the_stiff_problem_has_its_spectral_radius_in_every_sample(radius: float) -> None:
    case = stiff_case(width=24, samples=5, radius=radius, seed=3)
    options = {"snes_rtol": 1e-12, "snes_atol": 0.0, "snes_max_it": 2000}
    z = hpcdeq.solve_fixed_point(case.cell, case.given, options=options).value
    assert len({tuple(row.sign().tolist()) for row in z}) == 5  # the samples do differ
    for row, given in zip(z, case.given, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda s, x=given: case.cell(s[None], x[None])[0], row)
        assert float(torch.linalg.eigvals(jacobian).abs().max()) == pytest.approx(radius, abs=1e-6)


def test_the_stiff_problem_has_one_fixed_point() -> None:
    case = stiff_case(width=64, samples=3)
    assert float(torch.linalg.matrix_norm(case.cell.weight, 2)) <= 1.0 + 1e-12  # and tanh does not stretch
    again, other = stiff_case(width=64, samples=3), stiff_case(width=64, samples=3, seed=1)
    assert torch.equal(case.given, again.given) and not torch.equal(case.given, other.given)


def test_a_layer_is_found_inside_a_model_without_solving_it() -> None:
    cell = TanhCell()
    layer = hpcdeq.FixedPoint(cell, petsc_prefix="inner_", options={"snes_rtol": 1e-3})
    model = nn.Sequential(nn.Linear(4, 3), DeqRegressor(layer, 5, 2)).double()
    batch = torch.randn(7, 4, dtype=torch.float64)
    case = layer_case(model, batch, 7, "a model")
    assert case.cell is cell and case.samples == 7 and case.prefix == "inner_"
    assert case.options["snes_rtol"] == 1e-3
    with torch.no_grad():
        torch.testing.assert_close(case.given, model[0](batch))
    assert layer.solution is None and not case.given.requires_grad
    model(batch)  # the hook is gone
    assert layer.solution is not None


def test_a_model_without_a_layer_is_refused() -> None:
    with pytest.raises(OptionError, match="a net: the model Linear computes no fixed point; give a DEQ"):
        layer_case(nn.Linear(2, 2), torch.zeros(1, 2), 1, "a net")


# ----------------------------------------------------------------------------------------------------------- the solves


def test_a_solve_is_what_the_library_finds() -> None:
    case = stiff_case(width=16, samples=4, radius=0.9)
    solve = solver_of(case, 1e-6)
    solve(FORWARD)  # the first solve of a cell sees besides whether it can be told of fewer samples
    forward, mixed = solve(FORWARD), solve(Setting(4, 0.8))
    for found, window, mixing in ((forward, 0, 1.0), (mixed, 4, 0.8)):
        options = {
            "snes_type": "batched_anderson",
            "snes_anderson_m": window,
            "snes_anderson_beta": mixing,
            "snes_rtol": 1e-6,
            "snes_atol": 0.0,
        }
        expected = hpcdeq.solve_fixed_point(case.cell, case.given, options=options)
        assert found.converged and found.reason == expected.reason
        assert found.evaluations == expected.evaluations and found.iterations == int(expected.iterations.max())
        assert found.residual <= 1e-6 < found.history[0][2]
        assert 0 < found.history[-1][1] <= found.seconds
    assert mixed.evaluations < 0.5 * forward.evaluations


def test_the_stiff_problem_takes_what_the_readme_says() -> None:
    solve = solver_of(stiff_case(), 1e-6)
    assert solve(FORWARD).evaluations == pytest.approx(733, rel=0.02)
    assert solve(Setting(8, 1.0)).evaluations == pytest.approx(58, rel=0.05)


def test_forward_iteration_is_that() -> None:
    """Iterated by hand. Between its checks a solver divides by the size that it saw last, not by the present one."""
    case = stiff_case(width=8, samples=3, radius=0.8)
    z, residuals = torch.zeros_like(case.given), [1.0]
    with torch.no_grad():
        while residuals[-1] > 1e-6:
            image = case.cell(z, case.given)
            residuals.append(float(((image - z).norm(dim=1) / image.norm(dim=1)).max()))
            z = image
    found = solver_of(case, 1e-6)(FORWARD)
    assert found.iterations == pytest.approx(len(residuals) - 2, abs=1)
    for evaluations, _, residual in found.history[:20]:
        assert 0.9 < residual / residuals[round(evaluations)] < 2.0


def test_a_solve_that_fails_is_told_and_not_raised() -> None:
    solve = solver_of(replace(stiff_case(width=8, samples=2), options={}), 1e-30)
    found = solve(Setting(2, 1.0))
    assert not found.converged and found.reason == "DIVERGED_MAX_IT" and found.iterations == 500
    assert 0 < found.residual < 1e-6 and len(found.history) > 50


# ----------------------------------------------------------------------------------------------------------- the search


def made_up(seconds: float, evaluations: float = 10.0, **more: object) -> Solve:
    return replace(Solve(seconds, seconds, evaluations, 10, True, "CONVERGED_FNORM_RELATIVE"), **more)


class Surface:
    """Solves whose times are known: evaluations fall with the window to a floor, an evaluation costs more with it."""

    def __init__(self, seed: int, noise: float) -> None:
        self.random = random.Random(seed)
        self.noise = noise
        self.fall = self.random.uniform(0.05, 1.5)
        self.penalty = self.random.uniform(0.005, 0.3)
        self.floor = self.random.uniform(0.02, 0.3)
        self.lean = self.random.uniform(0.0, 0.6)
        self.calls: list[Setting] = []

    def true(self, setting: Setting) -> float:
        evaluations = 100 * (self.floor + (1 - self.floor) * 2.718 ** (-self.fall * setting.window))
        evaluations *= 1 + self.lean * (1 - setting.mixing) ** 2
        return evaluations * (1 + self.penalty * setting.window) * 1e-3

    def __call__(self, setting: Setting) -> Solve:
        self.calls.append(setting)
        disturbed = 1 + abs(self.random.gauss(0, self.noise))
        if self.noise and self.random.random() < 0.1:
            disturbed *= 2  # something else ran meanwhile
        return made_up(self.true(setting) * disturbed)


@pytest.mark.parametrize("seed", range(40))
def test_the_quick_search_is_within_ten_per_cent_of_all_settings(seed: int) -> None:
    surface = Surface(seed, noise=0.03)
    entries = measure_settings(surface, WINDOWS, MIXINGS, 5, seed=seed).entries
    chosen = min((entry for entry in entries if entry.finalist), key=lambda entry: entry.seconds).setting
    least = min(surface.true(Setting(w, b)) for w in WINDOWS for b in MIXINGS)
    assert surface.true(chosen) <= 1.1 * min(least, surface.true(FORWARD))
    assert len(surface.calls) < 5 * (len(WINDOWS) * len(MIXINGS) + 1)


def test_the_search_looks_between_the_given_windows() -> None:
    surface = Surface(0, 0.0)
    surface.fall, surface.penalty, surface.floor, surface.lean = 0.5, 0.12, 0.1, 0.5
    entries = measure_settings(surface, WINDOWS, MIXINGS, 3).entries
    assert {entry.setting for entry in entries} - {Setting(w, b) for w in (0, *WINDOWS) for b in MIXINGS} == {
        Setting(6, 1.0),
        Setting(10, 1.0),
    }
    assert entries[0].seconds == min(entry.seconds for entry in entries)
    assert surface.true(entries[0].setting) <= min(surface.true(Setting(w, b)) for w in WINDOWS for b in MIXINGS)


def test_all_settings_near_the_best_are_measured_to_the_end() -> None:
    """And so is forward iteration, which all others are compared with."""
    times = {0: 9.0, 1: 1.29, 2: 1.0, 3: 1.1, 5: 1.31, 8: 2.0}
    entries = measure_settings(lambda s: made_up(times.get(s.window, 3.0)), (1, 2, 3, 5, 8), (1.0,), 4).entries
    solved = {entry.setting.window: len(entry.solves) for entry in entries}
    assert {window for window, number in solved.items() if number == 4} == {0, 1, 2, 3}
    assert {entry.setting.window for entry in entries if entry.finalist} == {1, 2, 3}
    assert {number for window, number in solved.items() if window in (5, 8)} == {2}


def test_there_are_only_so_many_finalists() -> None:
    entries = measure_settings(lambda s: made_up(1.0 + 0.001 * s.window), range(1, 30), (1.0,), 3).entries
    assert sorted(entry.setting.window for entry in entries if entry.finalist) == list(range(8))


def test_an_exhaustive_search_repeats_everything_and_adds_nothing() -> None:
    surface = Surface(1, 0.1)
    entries = measure_settings(surface, (2, 5), (1.0, 0.5), 4, exhaustive=True).entries
    assert sorted(entry.setting for entry in entries) == sorted(
        [FORWARD, *(Setting(w, b) for w in (2, 5) for b in (1, 0.5))]
    )
    assert {len(entry.solves) for entry in entries} == {4} and all(entry.finalist for entry in entries)
    assert [entry.seconds for entry in entries] == sorted(entry.seconds for entry in entries)


def test_settings_take_turns() -> None:
    surface = Surface(2, 0.0)
    measure_settings(surface, (2, 5), (1.0,), 4, exhaustive=True)
    turns = surface.calls[1:]  # after the first, which is not counted
    for start in range(0, len(turns), 3):
        assert {s.window for s in turns[start : start + 3]} == {0, 2, 5}
    assert len({tuple(turns[start : start + 3]) for start in range(0, len(turns), 3)}) > 1  # and in no fixed order


def test_a_setting_that_fails_is_not_tried_again() -> None:
    calls: list[Setting] = []

    def solve(setting: Setting) -> Solve:
        calls.append(setting)
        return made_up(1.0 + setting.window, converged=setting.window != 5, reason="DIVERGED_MAX_IT")

    entries = measure_settings(solve, (2, 5), (1.0,), 4).entries
    assert calls[1:].count(Setting(5, 1.0)) == 1 and entries[-1].setting == Setting(5, 1.0)
    assert not entries[-1].finalist and not entries[-1].converged


@pytest.mark.parametrize(("threads", "clock"), [(1, "cpu"), (2, "wall"), (0, "wall")])
def test_a_busy_machine_is_judged_by_cpu_time(threads: int, clock: str) -> None:
    """One thread's CPU time is its wall time elsewhere; of several threads, or a device, it is not."""
    told: list[str] = []

    def solve(setting: Setting) -> Solve:
        history = ((1.0, 2.0, 0.5), (2.0, 4.0, 0.1))
        wall, computed = {2: (5.0, 1.0), 5: (4.0, 2.0)}.get(setting.window, (9.0, 3.0))
        return made_up(wall, cpu_seconds=computed, history=history)

    measurement = measure_settings(solve, (2, 5), (1.0,), 3, threads=threads, progress=told.append)
    best = measurement.entries[0]
    assert measurement.clock == clock
    assert best.setting.window == (2 if clock == "cpu" else 5)
    assert best.seconds == (1.0 if clock == "cpu" else 4.0)
    assert best.typical.history[1][1] == pytest.approx(4.0 / 5.0 if clock == "cpu" else 4.0)
    assert any("times their CPU time" in line for line in told) == (clock == "cpu")


def test_a_quiet_machine_is_judged_by_wall_time() -> None:
    measurement = measure_settings(lambda s: made_up(2.0, cpu_seconds=1.9), (2,), (1.0,), 2, threads=1)
    assert measurement.clock == "wall" and measurement.entries[0].seconds == 2.0


# -------------------------------------------------------------------------------------------------------- the crossover


def entry(window: int, seconds: list[float], evaluations: float = 10.0, **more: object) -> Measured:
    finalist = bool(more.pop("finalist", True))
    solves = [made_up(s, evaluations, **more) for s in seconds]
    return Measured(Setting(window, 1.0), solves, finalist)


def test_medians_decide() -> None:
    measured = [
        entry(0, [9.0, 9.0, 9.0], 100),
        entry(3, [1.0, 5.0, 5.0], 20),  # fast once
        entry(5, [4.0, 4.0, 40.0], 18),  # slow once
        entry(8, [6.0, 6.0, 6.0], 17),
        entry(12, [3.0, 3.0], 16, finalist=False),
    ]
    found = find_crossover(Measurement(measured, "wall"), 1e-6)
    assert found.best.setting.window == 5 and found.longer is measured[3] and found.forward is measured[0]
    assert found.speedup == pytest.approx(9 / 4)
    assert [e.setting.window for e in found.family] == [0, 3, 5, 8, 12]


def test_forward_iteration_may_be_best() -> None:
    found = find_crossover(Measurement([entry(0, [1.0]), entry(3, [2.0])], "wall"), 1e-6)
    assert found.best is found.forward and found.speedup == 1.0 and found.overtaking is None


def test_forward_iteration_may_fail() -> None:
    measured = [entry(0, [1.0], finalist=False, converged=False), entry(3, [2.0])]
    assert find_crossover(Measurement(measured, "wall"), 1e-6).speedup is None


def test_no_setting_at_all_is_an_error_that_says_how_near_it_came() -> None:
    failed = {"finalist": False, "converged": False, "reason": "DIVERGED_MAX_IT"}
    measured = [
        entry(0, [1.0], **failed, history=((1.0, 1.0, float("nan")),)),
        entry(3, [1.0], **failed, history=((1.0, 1.0, 2e-4),)),
    ]
    told = (
        r"no setting reached the tolerance 1e-06; window 3, mixing 1 came nearest: .* 0.0002 after 10 .*DIVERGED_MAX_IT"
    )
    with pytest.raises(ConvergenceError, match=told):
        find_crossover(Measurement(measured, "wall"), 1e-6)


@pytest.mark.parametrize(
    ("residuals", "expected"),
    [
        ([1.0, 0.5, 0.1, 0.01], (3.0, 0.1)),  # the other has 1, .6, .3, .2 at 1, 2, 3, 4 seconds: ahead at last
        ([0.9, 0.5, 0.1, 0.01], (1.0, 0.9)),
        ([0.9, 0.8, 0.1, 0.01], (3.0, 0.1)),
        ([0.9, 0.5, 0.1, 0.3], None),
        ([2.0, 2.0, 2.0, 2.0], None),
    ],
)
def test_overtaking(residuals: list[float], expected: tuple[float, float] | None) -> None:
    other = made_up(5, history=((1.0, 1.0, 1.0), (2.0, 2.0, 0.6), (3.0, 3.0, 0.3), (4.0, 4.0, 0.2)))
    solve = made_up(5, history=tuple((k + 1.0, k + 1.0, r) for k, r in enumerate(residuals)))
    assert overtaking(solve, other) == (expected if residuals[1] != 0.5 or residuals[0] != 1.0 else (2.0, 0.5))


def test_before_the_other_has_any_iterate_one_is_ahead() -> None:
    other = made_up(5, history=((1.0, 1.0, 1.0), (2.0, 8.0, 0.1)))
    assert overtaking(made_up(5, history=((1.0, 0.5, 1.0), (2.0, 2.0, 0.9))), other) == (0.5, 1.0)


# ---------------------------------------------------------------------------------------------------------- the figure


@pytest.mark.parametrize(
    "measured",
    [
        [entry(0, [9.0] * 2), *(entry(w, [5.0 / w, 6.0 / w], 100 / w) for w in range(1, 12))],
        [entry(0, [1.0]), entry(3, [2.0])],
        [entry(0, [9.0], finalist=False, converged=False), entry(3, [2.0])],
    ],
)
def test_a_figure_is_drawn_of_whatever_was_measured(measured: list[Measured], tmp_path: Path) -> None:
    from PIL import Image

    from hpcdeq.report import write_crossover_figure

    history = tuple((1.0 + k, 0.1 * k, 10.0**-k) for k in range(6))
    for each in measured:
        each.solves = [replace(solve, history=history) for solve in each.solves]
    found = find_crossover(Measurement(measured, "wall"), 1e-5)
    write_crossover_figure(tmp_path / "f" / "c.png", "a title", measured, found, 1e-5)
    with Image.open(tmp_path / "f" / "c.png") as image:
        assert image.size == (1650, 1230)
