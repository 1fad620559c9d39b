"""Shares that are moved during a run: cut as a plain computation would, and nothing but the work of the ranks changes."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import DeqRegressor, TanhCell
from test_data import ARRAYS, GRAPHS, array_rows, graph_rows, write
from test_resume import SETTINGS, StopAt, without_clock
from test_shares import on_root
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.builders.fields import prepare_burgers
from hpcdeq.config import TrainConfig
from hpcdeq.data import TensorDataset
from hpcdeq.data.dataset import Dataset
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import Schema
from hpcdeq.data.shards import Shards
from hpcdeq.data.shares import Boundaries, Recut, boundaries, recut, share_costs
from hpcdeq.deq import FixedPoint
from hpcdeq.errors import DataError, OptionError
from hpcdeq.methods import MINIBATCH
from hpcdeq.models import build_model, model_config
from hpcdeq.optim import Result, minimize
from hpcdeq.parallel import Comm
from hpcdeq.problem import LOSSES, JacobianPenalty, Phases, Rebalancing, TrainingProblem, rebalancing
from hpcdeq.problem.auxiliary import AuxiliarySource, WithAuxiliary, standardisation
from hpcdeq.problem.phases import PHASES
from hpcdeq.problem.rebalancing import move_shares, rebalance
from hpcdeq.record import read_checkpoint
from hpcdeq.train import main

COUNT = 23  # samples in a file, of which 15 are for training
SPLITS = np.where(np.arange(COUNT) % 3 == 1, np.arange(COUNT) % 2 + 1, 0).astype(np.uint8)
TRAINING = int((SPLITS == 0).sum())
TIGHT = {"snes_rtol": 1e-13, "ksp_rtol": 1e-13}
UNIT = 0.003  # seconds that a sample is made to take: far more than it takes by itself, on a busy machine too

# --------------------------------------------------------------------------------------------------------- cutting


def cut_again(costs: np.ndarray, numbers: np.ndarray, seconds: np.ndarray, blocks: int = 1) -> Recut:
    """Return what `recut` makes of samples that lie in some blocks."""
    parts = np.array_split(costs, blocks)
    counts, totals = (np.array([measure(part) for part in parts], np.int64) for measure in (len, np.sum))
    now = Boundaries(numbers, share_costs(numbers, counts, totals, lambda block: parts[block]))
    np.testing.assert_array_equal(now.costs, [costs[a:b].sum() for a, b in itertools.pairwise(numbers)])
    return recut(now, seconds, counts, totals, lambda block: parts[block])


def times_of(costs: np.ndarray, numbers: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return how long each sample took, one by one."""
    found = np.zeros(len(costs))
    for share, (start, stop) in enumerate(itertools.pairwise(numbers)):
        for i in range(start, stop):
            found[i] = seconds[share] * costs[i] / costs[start:stop].sum()
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shares_are_cut_as_all_cuts_together_say(ranks: int, seed: int) -> None:
    """Try every way to cut: none is better by more than a sample, and each boundary is where its part of the time ends."""
    random = np.random.default_rng(seed)
    count = int(random.integers(ranks + 3, 15))
    costs = random.integers(1, 60, count)
    numbers = np.concatenate([[0], np.sort(random.choice(np.arange(1, count), ranks - 1, replace=False)), [count]])
    seconds = random.lognormal(0, 1, ranks)
    times = times_of(costs, numbers, seconds)
    found = cut_again(costs, numbers, seconds)
    new = found.boundaries.numbers
    assert new[0] == 0 and new[-1] == count and (np.diff(new) >= 1).all()
    np.testing.assert_array_equal(found.boundaries.costs, [costs[a:b].sum() for a, b in itertools.pairwise(new)])

    def largest(cut: Any) -> float:
        return max(float(times[a:b].sum()) for a, b in itertools.pairwise(cut))

    assert found.foretold == pytest.approx(largest(new) * ranks / seconds.sum(), rel=1e-6)
    best = min(largest([0, *inner, count]) for inner in itertools.combinations(range(1, count), ranks - 1))
    assert best <= largest(new) * (1 + 1e-9) <= best + times.max() + 1e-9
    reached = np.concatenate([[0], np.cumsum(times)])
    wanted = seconds.sum() * np.arange(1, ranks) / ranks
    nearest = [0, *np.abs(reached[:, None] - wanted).argmin(axis=0).tolist(), count]
    if (np.diff(nearest) >= 1).all():  # otherwise a rank would have no sample
        assert new.tolist() == nearest


@pytest.mark.parametrize("blocks", [2, 5, 40])
def test_cutting_again_does_not_depend_on_how_samples_lie_in_blocks(blocks: int) -> None:
    random = np.random.default_rng(1)
    costs = random.integers(1, 10_000, 300)
    numbers, seconds = np.array([0, 20, 20, 190, 300]), np.array([2.0, 0.0, 1.0, 0.5])
    whole, parts = cut_again(costs, numbers, seconds), cut_again(costs, numbers, seconds, blocks)
    np.testing.assert_array_equal(whole.boundaries.numbers, parts.boundaries.numbers)
    np.testing.assert_array_equal(whole.boundaries.costs, parts.boundaries.costs)
    assert whole.foretold == parts.foretold < 1.2


def test_shares_that_took_as_long_as_they_cost_stay() -> None:
    costs = np.random.default_rng(0).integers(1, 50, 500)
    now = boundaries(np.array([500]), np.array([costs.sum()]), lambda _: costs, 7)
    found = cut_again(costs, now.numbers, 3e-4 * now.costs)
    np.testing.assert_array_equal(found.boundaries.numbers, now.numbers)
    assert found.foretold == pytest.approx(now.imbalance, rel=1e-9)


def test_no_rank_loses_all_its_samples() -> None:
    """One rank takes all the time, in a share of one sample; another took none."""
    costs = np.ones(9, np.int64)
    found = cut_again(costs, np.array([0, 4, 5, 9]), np.array([1e-9, 1e3, 0.0]))
    assert (np.diff(found.boundaries.numbers) >= 1).all()
    for slow in range(3):
        seconds = np.full(3, 1e-6)
        seconds[slow] = 1e6
        assert (np.diff(cut_again(costs[:3], np.arange(4), seconds).boundaries.numbers) == 1).all()
        assert (np.diff(cut_again(costs, np.array([0, 3, 6, 9]), seconds).boundaries.numbers) >= 1).all()


# ----------------------------------------------------------------------------------------------------- derivatives


class Flat(nn.Module):
    """Arrays as rows, with outputs beside those of the targets in training alone."""

    def __init__(self, outputs: int, beside: int) -> None:
        super().__init__()
        self.beside = beside
        self.net = DeqRegressor(FixedPoint(TanhCell(5, 6), options=TIGHT), 5, outputs + beside)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.net(x.flatten(1))
        return outputs if self.training else outputs[:, : outputs.shape[1] - self.beside]


class Tame(nn.Module):
    """A contraction of seven numbers a sample, whatever its weights become: no trial point is without fixed points."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(7, 7), nn.Linear(6, 7)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        w = 0.7 * self.w.weight / (1 + self.w.weight.square().sum()).sqrt()
        return torch.tanh(z @ w.T + self.w.bias + self.u(x))

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 7)


def problem_on(path: Path, kind: str, comm: Comm, **settings: object) -> TrainingProblem:
    """Return a problem on the training samples of a file, the same each time; its file is written where it is missing."""
    torch.manual_seed(3)
    if kind == "graph":
        on_root(comm, lambda: path.exists() or write(path, GRAPHS, graph_rows(COUNT), SPLITS))
        given = model_config("graph_deq", {"width": 5})
        model = build_model("graph_deq", given, "graph", (), 3, seed=1, dtype=torch.float64, device="cpu")
        for layer in model.modules():
            if isinstance(layer, FixedPoint):
                layer.add_options(TIGHT)
        data = Dataset(path, "train", comm)
        return TrainingProblem(model, data, "cross_entropy", comm, chunk_size=4, **settings)  # type: ignore[arg-type]
    if kind == "smooth":  # a task that can be learnt, so that rounding does not grow
        rows = array_rows(COUNT)
        assert isinstance(rows.inputs, np.ndarray)
        x = rows.inputs.reshape(COUNT, 6)
        smooth = np.stack([np.sin(2 * x[:, 0]) + x[:, 1], x[:, 2] * x[:, 0]], axis=1)
        on_root(comm, lambda: path.exists() or write(path, ARRAYS, SampleRows(rows.ids, smooth, rows.inputs), SPLITS))
        data = Dataset(path, "train", comm)
        net = nn.Sequential(nn.Flatten(), FixedPoint(Tame(), options=TIGHT), nn.Linear(7, 2)).double()
        return TrainingProblem(net, data, "mse", comm, chunk_size=4, **settings)  # type: ignore[arg-type]
    if kind == "array":
        on_root(comm, lambda: path.exists() or write(path, ARRAYS, array_rows(COUNT), SPLITS))
        data = Dataset(path, "train", comm)
        return TrainingProblem(Flat(2, 0), data, "mse", comm, chunk_size=4, **settings)  # type: ignore[arg-type]

    def with_numbers() -> None:
        rows = array_rows(COUNT)
        numbers = np.random.default_rng(9).standard_normal((COUNT, 3)) * 5 + 2
        numbers[3, 1] = np.nan
        schema = Schema("regression", "array", target_names=("p", "q"), target_units=("1", "1"), sample_shape=(2, 3),
                        auxiliary=("a", "b", "c"))  # fmt: skip
        write(path, schema, SampleRows(rows.ids, rows.targets, rows.inputs, numbers), SPLITS)

    on_root(comm, lambda: path.exists() or with_numbers())
    data = Dataset(path, "train", comm)
    standard = standardisation(data.auxiliary, comm)
    source = AuxiliarySource(data, standard(data.auxiliary), lambda: standard(data.auxiliary))
    loss = WithAuxiliary(LOSSES["mse"], 3, 0.7)
    return TrainingProblem(Flat(2, 3), source, loss, comm, chunk_size=4, **settings)  # type: ignore[arg-type]


def data_of(problem: TrainingProblem) -> Dataset:
    return rebalancing.movable(problem)


def moved_by(problem: TrainingProblem, samples: int) -> Boundaries:
    """Return boundaries that lie so many samples farther than the present ones."""
    data = data_of(problem)
    numbers = data.boundaries.numbers.copy()
    numbers[1:-1] += samples
    return data.boundaries_at(numbers)


def values(problem: TrainingProblem, p: Tensor) -> list[Tensor]:
    v = torch.linspace(-1, 1, len(p), dtype=p.dtype)
    rows = np.random.default_rng(0).permutation(problem.dataset.count)[:7]
    loss, gradient = problem.loss_and_gradient(p)
    part, part_gradient = problem.loss_and_gradient(p, rows)
    found = [gradient, part_gradient, problem.gauss_newton_product(p, v), problem.hessian_product(p, v)]
    found.append(torch.from_numpy(problem.owned_product(p, v, curvature="gauss_newton", rows=np.sort(rows))))
    evaluated = problem.evaluate(p, data_of(problem))
    return [torch.tensor([loss, part, evaluated.loss, evaluated.metric], dtype=torch.float64), *found]


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("kind", ["array", "graph", "auxiliary"])
def test_moved_shares_change_no_value_and_no_derivative(shared_tmp_path: Path, comm: Comm, kind: str) -> None:
    path = shared_tmp_path / "data.h5"
    problem = problem_on(path, kind, comm, terms=[JacobianPenalty(0.5)])  # its probes follow the samples' numbers
    p = problem.initial()
    before, alone = values(problem, p), Dataset(path, "train", parallel.SELF)
    for samples in (2, -4, 1):
        move_shares(problem, moved_by(problem, samples))
        data = data_of(problem)
        mine = slice(data.offset, data.offset + len(data))
        assert data.ids == alone.ids[mine] and torch.equal(data.targets, alone.targets[mine])
        assert problem.dataset.offset == data.offset == data.boundaries.numbers[comm.rank]
        assert len(problem.dataset) == len(problem.dataset.targets) == len(data)
        lengths = parallel.counts_of_ranks(comm, len(data))
        assert sum(lengths) == data.count == TRAINING and sum(lengths[: comm.rank]) == data.offset
        for one, other in zip(before, values(problem, p), strict=True):
            assert float((one - other).norm()) <= 1e-10 * float(one.norm())
    assert data.moved
    move_shares(problem, moved_by(problem, 1))
    assert not data.moved and rebalancing.moved_boundaries(problem) is None


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("kind", ["array", "graph"])
def test_samples_that_stay_begin_warm_and_those_that_move_cold(shared_tmp_path: Path, comm: Comm, kind: str) -> None:
    problem = problem_on(shared_tmp_path / "data.h5", kind, comm)
    p = problem.initial()
    problem.loss_and_gradient(p)
    problem.gauss_newton_product(p, torch.ones_like(p))
    cache = problem.guidance.cache
    assert cache is not None and cache.keys()

    def known() -> dict[Any, dict[int, Tensor]]:
        first = problem.dataset.offset
        return {key: {first + name: row.clone() for name, row in cache.rows(key).items()} for key in cache.keys()}

    def spent() -> int:
        """Evaluations of cells on this rank for a loss at p."""
        before = sum(layer.work.cell_evaluations for layer in problem.guidance.layers.values())
        problem.loss(p)
        return sum(layer.work.cell_evaluations for layer in problem.guidance.layers.values()) - before

    had = known()
    former = range(problem.dataset.offset, problem.dataset.offset + len(problem.dataset))
    warm = spent() / len(former)
    move_shares(problem, moved_by(problem, 2))
    now = range(problem.dataset.offset, problem.dataset.offset + len(problem.dataset))
    staying = [i for i in now if i in former]
    came = [i for i in now if i not in former]
    assert staying and (comm.rank == comm.size - 1 or came)
    found = known()
    for key, rows in had.items():
        assert set(found[key]) == {i for i in rows if i in now} == set(staying)
        for i in staying:
            assert torch.equal(found[key][i], rows[i])
    first = spent()
    cold = problem_on(shared_tmp_path / "data.h5", kind, parallel.SELF, warm_start=False)
    cells = [layer.work for layer in cold.guidance.layers.values()]
    before = sum(work.cell_evaluations for work in cells)
    cold.loss(p, np.array(came or [0]))
    each = (sum(work.cell_evaluations for work in cells) - before) / len(came or [0])
    assert each > 3 * warm
    # Where the stop is tested for a batch together, a sample may be evaluated once more than it needs.
    assert warm * len(staying) <= first <= (warm + 1) * len(staying) + 1.3 * each * len(came)
    if came:
        assert first >= 0.7 * each * len(came)
    assert spent() <= (warm + 1) * len(now)


def test_what_left_a_rank_takes_no_memory() -> None:
    from hpcdeq.deq import StateCache
    from hpcdeq.deq.samples import Samples

    cache = StateCache(10**6)
    cache.keep("layer", [0, 1], torch.zeros(2, 5), Samples(2))
    cache.keep("layer", [2, 3], torch.ones(2, 5), Samples(2))
    cache.renumber(2, 5)
    assert cache.bytes == 40 and set(cache.rows("layer")) == {0, 1}
    default = torch.full((3, 5), 7.0)
    assert cache.recall("layer", [1, 0, 2], default, Samples(3))[:, 0].tolist() == [1.0, 1.0, 7.0]
    assert torch.equal(cache.recall("layer", [0, 1], default[:2], Samples(2)), torch.ones(2, 5))
    cache.renumber(-3, 4)
    assert set(cache.rows("layer")) == {3} and cache.bytes == 40
    cache.renumber(4, 4)
    assert not cache.rows("layer") and cache.bytes == 0
    cache.keep("layer", [0, 1, 2, 3], torch.arange(20.0).reshape(4, 5), Samples(4))
    cache.renumber(1, 4)
    default = torch.full((4, 5), -1.0)
    assert cache.recall("layer", [0, 1, 2, 3], default, Samples(4))[:, 0].tolist() == [5.0, 10.0, 15.0, -1.0]


# -------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parallel([2, 3])
def test_shares_move_where_ranks_differ_by_more_than_a_tenth(shared_tmp_path: Path, comm: Comm) -> None:
    problem = problem_on(shared_tmp_path / "data.h5", "array", comm)
    data = data_of(problem)
    before = data.boundaries.numbers.copy()
    assert rebalance(problem, 0.0) is None
    slower = 1.2 if comm.size == 2 else 1.14  # by 1.09 of the mean; other shares would be more even, on 2 ranks
    assert rebalance(problem, slower if comm.rank == 0 else 1.0) is None
    np.testing.assert_array_equal(data.boundaries.numbers, before)
    move = rebalance(problem, 3.0 if comm.rank == 0 else 1.0)
    assert move is not None
    lengths = np.diff(before)
    took = times_of(np.ones(TRAINING), before, np.array([3.0] + [1.0] * (comm.size - 1)))
    numbers = data.boundaries.numbers
    shares = np.array([took[a:b].sum() for a, b in itertools.pairwise(numbers)])
    assert move.before == pytest.approx(3.0 * comm.size / (comm.size + 2))
    assert move.foretold == pytest.approx(shares.max() / shares.mean(), rel=1e-9) and move.foretold < 1.2
    assert str(move) == f"shares moved: imbalance {move.before:.2f} before, about {move.foretold:.2f} foretold"
    assert numbers[1] < lengths[0] and parallel.counts_of_ranks(comm, len(data)) == np.diff(numbers).tolist()


def test_busy_is_who_works_on_samples_and_waits_for_nobody() -> None:
    now = 0.0
    phases = Phases(lambda: now)
    phases.begin()
    for number, name in enumerate(PHASES):
        with phases.of(name):
            now += 2.0**number
    now += 0.5
    names = ("forward", "adjoint", "tangent", "transposed", "hessian")
    assert phases.busy() == sum(2.0 ** PHASES.index(name) for name in names)
    with phases.of("tangent"):
        now += 1000.0
        assert phases.busy() > 1000.0  # a phase that is still open counts up to now


@pytest.mark.parallel([2, 3])
def test_one_sample_that_holds_up_the_others_moves_nothing_again_and_again(shared_tmp_path: Path, comm: Comm) -> None:
    problem = problem_on(shared_tmp_path / "data.h5", "array", comm)
    data = data_of(problem)
    data.move(data.boundaries_at(np.array([0, 1, TRAINING] if comm.size == 2 else [0, 1, 8, TRAINING])))
    assert rebalance(problem, 100.0 if comm.rank == 0 else 1.0) is None


@pytest.mark.parallel([2, 3])
def test_few_samples_leave_one_to_every_rank(shared_tmp_path: Path, comm: Comm) -> None:
    problem = problem_on(shared_tmp_path / "data.h5", "array", comm)
    for slow in range(comm.size):
        rebalance(problem, 1e6 if comm.rank == slow else 1e-6)
        assert len(problem.dataset) >= 1
        assert sum(parallel.counts_of_ranks(comm, len(problem.dataset))) == TRAINING


@pytest.mark.parallel([2, 3])
def test_a_failure_to_read_on_one_rank_is_everyone_s_and_all_keep_what_they_had(
    shared_tmp_path: Path, comm: Comm, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_on(shared_tmp_path / "data.h5", "array", comm)
    p = problem.initial()
    before, ids = problem.loss(p), data_of(problem).ids
    to = moved_by(problem, 1)
    read = Shards.read

    def broken(self: Shards, rows: np.ndarray, **more: Any) -> SampleRows:
        if comm.rank == 1:
            raise DataError("the disk is gone")
        return read(self, rows, **more)

    monkeypatch.setattr(Shards, "read", broken)
    with pytest.raises(DataError, match="rank 1: the disk is gone"):
        move_shares(problem, to)
    assert data_of(problem).ids == ids and problem.loss(p) == pytest.approx(before, rel=1e-10)


@pytest.mark.parallel([1, 2])
def test_what_cannot_be_moved_is_refused(shared_tmp_path: Path, comm: Comm) -> None:
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    model = nn.Linear(6, 2).double()
    with pytest.raises(OptionError, match="given its own as tensors: write a file, and give its Dataset"):
        Rebalancing(TrainingProblem(model, (x, y), "mse", comm), 2)
    beside = AuxiliarySource(TensorDataset(x, y, comm), torch.zeros(4, 1, dtype=torch.float64))
    with pytest.raises(OptionError, match="given its own as tensors"):
        Rebalancing(TrainingProblem(model, beside, WithAuxiliary(LOSSES["mse"], 1, 1.0), comm), 2)
    problem = problem_on(shared_tmp_path / "data.h5", "array", comm)
    with pytest.raises(OptionError, match="every 0 iterations: give 1 or more"):
        Rebalancing(problem, 0)
    with pytest.raises(OptionError, match="tao:brgn keeps residuals where its samples are: leave it out"):
        minimize(problem, "tao:brgn", 1, rebalancing=Rebalancing(problem, 1))
    with pytest.raises(DataError, match=r"15 samples over \d ranks have no shares that begin at"):
        data_of(problem).boundaries_at(np.arange(comm.size + 1))


def test_the_option_is_checked_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="tao:brgn keeps residuals"):
        main(["--optimizer", "tao:brgn", "--rebalance", "2", "--out", "r"])
    with pytest.raises(OptionError, match="rebalance is 0: give 1 or more"):
        main(["--rebalance", "0", "--out", "r"])
    assert not list(tmp_path.iterdir())
    assert TrainConfig().rebalance is None


@pytest.mark.parallel([2, 3])
def test_chunks_that_bound_the_memory_never_hold_more(shared_tmp_path: Path, comm: Comm) -> None:
    """After a move that brings the costliest samples together, fewer of them are worked on at once."""
    problem = problem_on(shared_tmp_path / "data.h5", "graph", comm)
    data = data_of(problem)

    def heaviest() -> float:
        own = np.sort(data.costs)[::-1][: problem.visits.chunk_size]
        return parallel.max_over_ranks(comm, float(own.sum()))

    plain, bounded = Rebalancing(problem, 1), Rebalancing(problem, 1, bounded=True)
    for numbers in ([0, 1, TRAINING], [0, TRAINING - 1, TRAINING]):
        full = numbers if comm.size == 2 else [*numbers[:2], numbers[1], TRAINING]
        state = {"ranks": comm.size, "boundaries": np.array(full)}
        problem.visits.chunk_size = 4
        data.move(data.boundaries_at(np.array([TRAINING * r // comm.size for r in range(comm.size + 1)])))
        move_shares(problem, data.boundaries)
        bounded._most = heaviest()
        allowed = heaviest()
        plain.restore(state)
        exceeds = heaviest() > allowed
        assert problem.visits.chunk_size == 4
        bounded.restore(state)
        assert heaviest() <= allowed
        assert (problem.visits.chunk_size < 4) == exceeds
        sizes = parallel.counts_of_ranks(comm, problem.visits.chunk_size)
        assert len(set(sizes)) == 1 and sizes[0] >= 1


# ------------------------------------------------------------------------------------------------------------- runs


def run(problem: TrainingProblem, method: str, iterations: int = 6, **more: Any) -> Result:
    if method in MINIBATCH:
        more["minibatch"] = SETTINGS
    return minimize(problem, method, iterations, raise_on_failure=False, **more)


METHODS = ["adam", "adamw", "rmsprop", "lbfgs", "trgn", "newton", "torch-lbfgs", "tao:bntr", "tao:blmvm", "tao:bqnktr"]


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_when_shares_move(
    shared_tmp_path: Path, comm: Comm, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Move them at every iteration, there and back: iterates are those of the run without, to rounding."""
    path = shared_tmp_path / "data.h5"
    plain = run(problem_on(path, "smooth", comm), method)
    moves: list[int] = []

    def there_and_back(problem: TrainingProblem, seconds: float) -> rebalancing.Move:
        assert seconds > 0
        moves.append(2 - 4 * (len(moves) % 2))
        move_shares(problem, moved_by(problem, moves[-1]))
        return rebalancing.Move(2.0, 1.0)

    monkeypatch.setattr(rebalancing, "rebalance", there_and_back)
    problem = problem_on(path, "smooth", comm)
    looks = Rebalancing(problem, 1)
    found = run(problem, method, rebalancing=looks)
    assert len(moves) == len(looks.moves) == 5  # after every iteration but the last
    assert [entry[0] for entry in found.history] == list(range(7))
    for one, other in zip(without_clock(found), without_clock(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-8)
    torch.testing.assert_close(found.x, plain.x, rtol=1e-7, atol=1e-9)
    assert vars(found.counts)["gradients"] == vars(plain.counts)["gradients"]
    assert problem.phases.seconds["shares"] > 0


class Slow:
    """Makes every visit of some samples take longer, and notes how long ranks were busy between two looks.

    Parameters
    ----------
    seconds
        By the rank and the global number of a sample.
    """

    def __init__(self, comm: Comm, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, int], float]) -> None:
        self.comm = comm
        self.imbalances: list[float] = []
        self.lengths: list[list[int]] = []
        take, look = Dataset.batch, rebalancing.rebalance

        def batch(data: Dataset, rows: Any) -> Any:
            if data.split == "train":
                time.sleep(sum(seconds(comm.rank, data.offset + i) for i in np.atleast_1d(np.arange(len(data))[rows])))
            return take(data, rows)

        def noted(problem: TrainingProblem, spent: float) -> Any:
            everyone = np.array(parallel.of_all_ranks(comm, spent))
            self.imbalances.append(float(everyone.max() / everyone.mean()))
            found = look(problem, spent)
            self.lengths.append(parallel.counts_of_ranks(comm, len(problem.dataset)))
            return found

        monkeypatch.setattr(Dataset, "batch", batch)
        monkeypatch.setattr(rebalancing, "rebalance", noted)


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def command(path: Path, out: Path, optimizer: str, *more: str) -> list[str]:
    given = ["--data", str(path), "--model", "mlp", "--optimizer", optimizer, "--out", str(out), "--chunk-size", "100"]
    return [*given, "--no-adaptive", *more]


@pytest.mark.parallel([2])
@pytest.mark.parametrize("cause", ["samples", "rank"])
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_run_with_a_slow_rank_becomes_even(
    shared_tmp_path: Path,
    comm: Comm,
    cause: str,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Samples that take long, whoever has them, are foretold; a rank that takes long for any is come to in steps."""
    path = shared_tmp_path / "b.h5"
    prepare_burgers(path, 40, comm=comm)
    given = ["--max-iterations", "7"] + (["--batch-size", "8"] if optimizer == "adam" else [])
    assert main(command(path, shared_tmp_path / "plain", optimizer, *given, "--quiet")) == 0
    half = 16
    slow = {
        "samples": lambda rank, i: 4 * UNIT if i < half else UNIT,
        "rank": lambda rank, i: UNIT if rank else 3 * UNIT,
    }
    seen = Slow(comm, monkeypatch, slow[cause])
    capsys.readouterr()
    assert main(command(path, shared_tmp_path / "moved", optimizer, *given, "--rebalance", "2")) == 0
    out = capsys.readouterr().out
    assert len(seen.imbalances) == 3
    assert seen.imbalances[0] > 1.3 and seen.imbalances[-1] < 1.2 < seen.imbalances[0] - 0.1
    assert seen.lengths[0][0] < half and all(sum(lengths) == 2 * half for lengths in seen.lengths)
    if comm.rank == 0:
        assert f"shares moved: imbalance {seen.imbalances[0]:.2f} before, about 1.0" in out
        one, other = history(shared_tmp_path / "plain"), history(shared_tmp_path / "moved")
        assert len(one) == len(other) == 8
        for name in ("train_loss", "gradient_norm", "validation_loss"):
            assert [float(row[name]) for row in one] == pytest.approx([float(row[name]) for row in other], rel=1e-8)
        assert [row["gradients"] for row in one] == [row["gradients"] for row in other]


@pytest.mark.parallel([2])
def test_even_ranks_keep_their_shares(shared_tmp_path: Path, comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_tmp_path / "b.h5"
    prepare_burgers(path, 40, comm=comm)
    seen = Slow(comm, monkeypatch, lambda rank, i: 3 * UNIT)
    assert main(command(path, shared_tmp_path / "r", "lbfgs", "--max-iterations", "3", "--rebalance", "1")) == 0
    assert seen.lengths == [[16, 16]] * 2
    with read_checkpoint(shared_tmp_path / "r", comm) as known:
        assert known is not None and "boundaries" not in known["problem"]


@pytest.mark.parallel([2])
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_run_that_goes_on_begins_with_the_moved_shares(
    shared_tmp_path: Path, comm: Comm, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = shared_tmp_path / "b.h5", shared_tmp_path / "r"
    prepare_burgers(path, 40, comm=comm)
    more = ["--rebalance", "2", "--quiet"] + (["--schedule", "constant"] if optimizer == "adam" else [])
    assert main([*command(path, shared_tmp_path / "plain", optimizer, *more[2:]), "--max-iterations", "7"]) == 0
    seen = Slow(comm, monkeypatch, lambda rank, i: 4 * UNIT if i < 16 else UNIT)
    given = command(path, folder, optimizer, *more)
    assert main([*given, "--max-iterations", "3"]) == 0
    (lengths,) = seen.lengths
    assert lengths[0] < 16
    with read_checkpoint(folder, comm) as known:
        assert known is not None
        assert known["problem"]["boundaries"].tolist() == [0, lengths[0], 32]
    begun: list[list[int]] = []
    begin = Rebalancing.begin

    def noted(self: Rebalancing, iteration: int) -> None:
        begin(self, iteration)
        begun.append([iteration, *self.dataset.boundaries.numbers.tolist()])

    monkeypatch.setattr(Rebalancing, "begin", noted)
    assert main([*given, "--max-iterations", "7", "--resume"]) == 0
    assert begun[0] == [3, 0, lengths[0], 32]
    assert [entry[0] for entry in begun] == [3, 4, 6]
    assert all(now == lengths for now in seen.lengths[1:])
    if comm.rank == 0:
        one, other = history(shared_tmp_path / "plain"), history(folder)
        for name in ("train_loss", "gradient_norm"):
            assert [float(row[name]) for row in one] == pytest.approx([float(row[name]) for row in other], rel=1e-8)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("method", ["adam", "trgn"])
def test_a_state_gives_its_shares_to_as_many_ranks_and_warm_states_to_whom_they_belong(
    shared_tmp_path: Path, comm: Comm, method: str
) -> None:
    path = shared_tmp_path / "data.h5"
    problem = problem_on(path, "smooth", comm)
    looks = Rebalancing(problem, 100)
    move_shares(problem, moved_by(problem, 2))
    moved = data_of(problem).boundaries.numbers.tolist()
    first = run(problem, method, keeper=StopAt(shared_tmp_path, comm, 3), rebalancing=looks)
    assert first.status == "interrupted"
    whole = problem_on(path, "smooth", comm)
    move_shares(whole, moved_by(whole, 2))
    expected = run(whole, method, rebalancing=Rebalancing(whole, 100))
    with read_checkpoint(shared_tmp_path, comm) as known:
        assert known is not None
        again = problem_on(path, "smooth", comm)
        rest = run(again, method, resume=known, rebalancing=Rebalancing(again, 100))
        fewer = parallel.some_ranks(comm, comm.rank < comm.size - 1)
        if fewer is not None:
            other = problem_on(path, "smooth", fewer)
            result = run(other, method, resume=known, rebalancing=Rebalancing(other, 100))
            assert not data_of(other).moved
            assert result.loss == pytest.approx(expected.loss, rel=1e-8)
    assert data_of(again).boundaries.numbers.tolist() == moved
    assert without_clock(rest) == without_clock(expected)  # the shares are the same, and so is every bit
    assert torch.equal(rest.x, expected.x)
    Rebalancing(again, 1).restore({"ranks": comm.size})  # of a checkpoint whose shares were never moved, or an old one
    assert data_of(again).boundaries.numbers.tolist() == moved
    strange = {"ranks": comm.size, "boundaries": np.linspace(0, TRAINING + 1, comm.size + 1).astype(np.int64)}
    with pytest.raises(DataError, match="have no shares that begin at"):
        Rebalancing(problem, 1).restore(strange)
