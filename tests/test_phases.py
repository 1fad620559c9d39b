"""Where the time goes: self times of nested phases, and a run whose phases are all of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import Run
from test_problem import deq_model, distributed, explicit_model, serial

from hpcdeq import parallel
from hpcdeq.optim import minimize
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.problem import LeastSquares, Phases
from hpcdeq.problem.counts import Counts
from hpcdeq.problem.phases import PHASES, PhaseTime, describe_phases, summarise_phases


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def taken(phases: Phases) -> dict[str, float]:
    return {name: seconds for name, seconds in phases.seconds.items() if seconds}


def test_time_belongs_to_the_innermost_phase() -> None:
    clock = Clock()
    phases = Phases(clock)
    clock.now += 50  # before any phase: nobody's
    with phases.of("forward"):
        clock.now += 1
        with phases.of("adjoint"):
            clock.now += 2
            with phases.of("reduction"):
                clock.now += 4
            clock.now += 8
        clock.now += 16
        with phases.of("forward"):
            clock.now += 32
    clock.now += 64
    assert taken(phases) == {"forward": 49.0, "adjoint": 10.0, "reduction": 4.0}


def test_a_run_leaves_the_rest_to_the_optimiser_and_records_aside() -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases.of("forward"):
        clock.now += 1000  # before the run
    phases.begin()
    clock.now += 1
    with phases.of("tangent"):
        clock.now += 2
    with phases.of("record"):
        clock.now += 4
        with phases.of("forward"):  # validation is not training
            clock.now += 8
        clock.now += 16
    with pytest.raises(ZeroDivisionError), phases.of("forward"), phases.of("adjoint"):
        clock.now += 32
        raise ZeroDivisionError
    clock.now += 64
    phases.end()
    clock.now += 128
    assert taken(phases) == {"optimiser": 65.0, "tangent": 2.0, "record": 28.0, "adjoint": 32.0}
    assert sum(spent.mean for spent in phases.over_ranks(parallel.SELF).values()) == 99.0
    phases.begin()
    assert not taken(phases)
    with pytest.raises(ValueError, match="unknown phase 'backward': choose one of forward, adjoint"):
        phases.of("backward").__enter__()


@pytest.mark.parallel([1, 2, 3])
def test_mean_and_largest_over_the_ranks(comm: parallel.Comm) -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases.of("forward"):
        clock.now += 1 + comm.rank
    if comm.rank == 0:
        with phases.of("factors"):
            clock.now += 6
    mean = (comm.size + 1) / 2
    assert phases.over_ranks(comm) == {
        "forward": PhaseTime(mean, float(comm.size)),
        "factors": PhaseTime(6 / comm.size, 6.0),
    }


def test_every_kind_of_work_has_its_phase() -> None:
    problem = serial(deq_model(), "mse")
    p = problem.initial()

    def phases_of(call: str, *given: object) -> set[str]:
        before = dict(problem.phases.seconds)
        getattr(problem, call)(*given)
        return {name for name, seconds in problem.phases.seconds.items() if seconds > before[name]}

    assert phases_of("loss", p) == {"forward", "reduction"}
    assert phases_of("loss_and_gradient", p) == {"forward", "adjoint", "reduction"}
    assert phases_of("gauss_newton_product", p, p) == {"forward", "tangent", "transposed", "reduction"}
    assert phases_of("gauss_newton_product", p, 2 * p) == {"tangent", "transposed", "reduction"}
    assert phases_of("hessian_product", p, p) == {"hessian", "reduction"}
    assert phases_of("evaluate", p, problem.dataset) == {"record"}
    squares = LeastSquares(problem)
    before = dict(problem.phases.seconds)
    squares.jacobian_product(p, p)
    assert problem.phases.seconds["tangent"] > before["tangent"]
    assert problem.phases.seconds["transposed"] == before["transposed"]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", ["trgn", "newton", "adam"])
def test_phases_make_up_the_time_of_a_run(method: str, comm: parallel.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = distributed(deq_model(), "mse", comm, weight_decay=0.01)
    times: dict[str, float] = {}

    def noting(name: str, call: Callable[..., None], **options: bool) -> None:
        times[name] = time.perf_counter()
        call(**options)

    for name in ("begin", "end"):
        monkeypatch.setattr(problem, name, partial(noting, name, getattr(problem, name)))

    def look(_: object) -> None:
        problem.evaluate(problem.initial(), problem.dataset)

    settings = MinibatchSettings(batch_size=4) if method == "adam" else None
    result = minimize(problem, method, max_iterations=10, callback=look, minibatch=settings)
    seconds = dict(problem.phases.seconds)
    assert sum(seconds.values()) == pytest.approx(times["end"] - times["begin"], rel=0.05)
    assert seconds.pop("record") > 0
    if comm.size == 1:  # by the recorder's clock, which stops at the last iterate and while callbacks run
        assert sum(seconds.values()) == pytest.approx(result.history[-1][1], rel=0.05)
    needed = {"forward", "adjoint", "reduction", "optimiser"}
    needed |= {"trgn": {"tangent", "transposed"}, "newton": {"hessian"}, "adam": set()}[method]
    working = len(problem.dataset) > 0
    assert {name for name, spent in seconds.items() if spent} >= (needed if working else {"reduction", "optimiser"})


def test_an_explicit_network_s_run_is_told_too() -> None:
    problem = serial(explicit_model(), "cross_entropy")
    minimize(problem, "tao:lmvm", max_iterations=3)
    times = problem.phases.over_ranks(parallel.SELF)
    assert set(times) <= set(PHASES) and "tangent" not in times
    assert describe_phases(times).lstrip().startswith("time ")


def test_what_is_told_of_it() -> None:
    times = {"forward": PhaseTime(1.0, 1.05), "reduction": PhaseTime(3.0, 5.0)}
    assert describe_phases(times) == "  time        4.0 s: reduction 75 % (most 5.0 s), forward 25 %"
    counts = Counts(gauss_newton_products=600, hessian_products=200)
    assert summarise_phases(times, counts, 4, 50) == {
        "phases": {"forward": 1.0, "reduction": 3.0},
        "phases_largest": {"forward": 1.05, "reduction": 5.0},
        "products_per_iteration": 4.0,
    }
    assert summarise_phases(times, counts, 0, 50)["products_per_iteration"] is None


def test_a_run_says_where_its_time_went(run: Run, tmp_path: Path) -> None:
    given = ["--max-iterations", "3", "--out", "out", "--l1", "1e-4", "--jacobian-penalty", "0.5"]
    done = run("-m", "hpcdeq.train", *given, ranks=2)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["phases"].keys() == told["phases_largest"].keys() >= {"forward", "tangent", "reduction", "optimiser"}
    assert all(told["phases_largest"][name] >= mean for name, mean in told["phases"].items())
    counts = told["counts"]
    assert told["products_per_iteration"] == counts["gauss_newton_products"] / (800 * 3)
    assert "time  " in done.stdout and " tangent " in done.stdout
    config = (tmp_path / "out" / "config.toml").read_text()
    assert "l1 = 0.0001" in config and "jacobian_penalty = 0.5" in config
    rows = (tmp_path / "out" / "history.csv").read_text().splitlines()
    objective = float(rows[-1].split(",")[2])
    assert objective > told["loss"]["train"]  # of the data alone


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--l1", "-1"], "l1 is -1.0: give a finite number that is not negative"),
        (["--jacobian-penalty", "inf"], "jacobian_penalty is inf: give a finite number"),
        (["--jacobian-penalty", "1", "--model", "mlp"], "Jacobian penalty is on fixed points, and the model has none"),
    ],
)
def test_penalties_out_of_range_are_refused(run: Run, given: list[str], text: str) -> None:
    done = run("-m", "hpcdeq.train", *given, ranks=2)
    assert done.returncode == 2
    assert done.stderr.count(text) == 1
