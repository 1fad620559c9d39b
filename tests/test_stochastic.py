"""Methods on minibatches and torch's L-BFGS: equal to torch's own, on any number of ranks, with honest endings."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Run
from test_problem import deq_model, distributed, explicit_model, samples, serial
from torch import Tensor, nn

from hpcdeq import parallel, train
from hpcdeq.config import TrainConfig
from hpcdeq.errors import ConvergenceError, DataError, OptionError
from hpcdeq.methods import METHODS, MINIBATCH, Schedule, learning_rate_grid
from hpcdeq.optim import Iterate, minimize
from hpcdeq.optim.presets import PRESETS
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.problem import TrainingProblem

PLAIN = Schedule("constant")
RATE, BATCH, DECAY = 0.02, 4, 0.1


def torchs(method: str, model: nn.Module, decay: float) -> torch.optim.Optimizer:
    """The optimiser of the same name and settings, element by element."""
    given = {"lr": RATE, "foreach": False, "weight_decay": decay}
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    return kinds[method](model.parameters(), **given)


def epochs_of_torch(optimizer: torch.optim.Optimizer, model: nn.Module, loss: str, epochs: int, rates: list) -> Tensor:
    """Weights after some epochs of a plain training loop; the batches are those of seed 0."""
    inputs, targets = samples(loss)
    for epoch in range(1, epochs + 1):
        order = torch.from_numpy(np.random.default_rng([0, epoch]).permutation(len(inputs)))
        for batch in order.split(BATCH):
            if rates:
                optimizer.param_groups[0]["lr"] = rates.pop(0)
            optimizer.zero_grad()
            outputs = model(inputs[batch])
            if loss == "mse":
                (0.5 * nn.functional.mse_loss(outputs, targets[batch])).backward()
            else:
                nn.functional.cross_entropy(outputs, targets[batch]).backward()
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# ------------------------------------------------------------------------------------------------- the updates


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("method", MINIBATCH)
def test_updates_are_torchs(method: str, decay: float, loss: str, comm: parallel.Comm) -> None:
    outside = method == "adamw"  # whose decay is no part of the loss
    problem = distributed(explicit_model(), loss, comm, weight_decay=0.0 if outside else decay)
    settings = MinibatchSettings(RATE, BATCH, schedule=PLAIN, weight_decay=decay if outside else None)
    seen: list[Tensor] = []
    result = minimize(problem, method, 4, minibatch=settings, callback=lambda iterate: seen.append(iterate.x))
    for epochs in (1, 4):  # 3 and 12 steps, the last of each epoch a short batch
        model = explicit_model()
        theirs = epochs_of_torch(torchs(method, model, decay), model, loss, epochs, [])
        torch.testing.assert_close(seen[epochs], theirs, rtol=0, atol=1e-12)
    assert torch.equal(result.x, seen[-1])
    assert result.counts.gradients == BATCH + 4 * 11  # a look at the first batch, then every sample once an epoch


@pytest.mark.parallel([1, 2, 3])
def test_iterates_are_the_running_average_of_the_weights(comm: parallel.Comm) -> None:
    memory = 0.75
    seen: dict[str, list[Tensor]] = {"plain": [], "averaged": []}
    for name, average in (("plain", None), ("averaged", memory)):
        # One step an epoch, so that every step's weights are seen.
        settings = MinibatchSettings(RATE, None, schedule=PLAIN, average=average)
        problem = distributed(explicit_model(), "mse", comm)
        result = minimize(problem, "adam", 40, minibatch=settings, callback=lambda i, n=name: seen[n].append(i.x))
        assert torch.equal(result.x, seen[name][-1])
    mean = seen["plain"][0]
    for step, x in enumerate(seen["plain"][1:], start=1):
        mean = mean + (x - mean) * (1 - min(memory, step / (step + 9)))
        torch.testing.assert_close(seen["averaged"][step], mean, rtol=0, atol=1e-12)


def test_what_is_random_in_training_is_not_so_in_evaluations() -> None:
    inputs, targets = samples("cross_entropy")
    model = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    problem = TrainingProblem(model, (inputs, targets), "cross_entropy", parallel.SELF)
    p = problem.initial()
    first, second = (problem.evaluate(p, problem.dataset) for _ in range(2))
    assert first == second and problem.loss(p) != problem.loss(p)
    model.eval()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(inputs), targets)
    model.train()
    assert first.loss == pytest.approx(float(expected), rel=1e-12)
    assert model[1].training  # as before
    runs = [minimize(problem, "adam", 3, minibatch=MinibatchSettings(RATE, BATCH, seed=s)).x for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_adamw_has_torchs_default_decay() -> None:
    model = explicit_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    theirs = epochs_of_torch(optimizer, model, "mse", 3, [])
    settings = MinibatchSettings(RATE, BATCH, schedule=PLAIN)
    ours = minimize(serial(explicit_model(), "mse"), "adamw", 3, minibatch=settings).x
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_single_precision_is_torchs_too() -> None:
    inputs, targets = samples("mse")
    problem = TrainingProblem(explicit_model().float(), (inputs.float(), targets.float()), "mse", parallel.SELF)
    settings = MinibatchSettings(RATE, None, schedule=PLAIN)
    result = minimize(problem, "adam", 10, minibatch=settings)
    model = explicit_model().float()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(10):
        optimizer.zero_grad()
        (0.5 * nn.functional.mse_loss(model(inputs.float()), targets.float())).backward()
        optimizer.step()
    theirs = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert result.x.dtype == torch.float32
    torch.testing.assert_close(result.x, theirs, rtol=0, atol=1e-5)


@pytest.mark.parallel([3])
@pytest.mark.parametrize("method", MINIBATCH)
def test_more_ranks_than_weights(method: str, comm: parallel.Comm) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.diag_embed(self.slope[[0, 1, 0]])

    settings = MinibatchSettings(RATE, BATCH)
    one = minimize(serial(Two(), "mse"), method, 3, minibatch=settings)
    problem = distributed(Two(), "mse", comm)
    many = minimize(problem, method, 3, minibatch=settings)
    torch.testing.assert_close(many.x, one.x, rtol=0, atol=1e-12)
    assert many.loss < problem.loss(problem.initial())


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", MINIBATCH)
def test_a_batch_larger_than_the_data_is_all_of_it(method: str, comm: parallel.Comm) -> None:
    results = [
        minimize(distributed(deq_model(), "mse", comm), method, 3, minibatch=MinibatchSettings(RATE, size))
        for size in (None, 11, 10**6)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.x, results[0].x, rtol=0, atol=1e-9)
    assert results[2].counts.gradients == 4 * 11


# --------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("kind", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 3.0])
def test_schedules_are_torchs(kind: str, warmup: float) -> None:
    steps, floor = 12, 0.2
    rise = round(warmup * steps) if warmup < 1 else int(warmup)
    sgd = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE) for _ in range(2)]
    parts: list = []
    if rise:
        parts.append(torch.optim.lr_scheduler.LinearLR(sgd[0], 1 / rise, 1.0, rise - 1))
    if kind == "cosine":
        parts.append(torch.optim.lr_scheduler.CosineAnnealingLR(sgd[1], steps, RATE * floor))
    theirs = []
    for _ in range(steps):
        theirs.append(RATE * math.prod(part.get_last_lr()[0] / RATE for part in parts))
        for part in parts:
            part.optimizer.step()
            part.step()
    schedule = Schedule(kind, warmup, floor)
    np.testing.assert_allclose([RATE * schedule.factor(step, steps) for step in range(steps)], theirs, rtol=1e-12)


def test_the_run_is_as_far_along_as_the_further_of_time_and_steps() -> None:
    schedule = Schedule("cosine", 0.0, 0.1)
    assert schedule.factor(50, 100, 0.2) == pytest.approx(0.55)
    assert schedule.factor(1, 100, 0.5) == pytest.approx(0.55)
    assert schedule.factor(99, 10**9, 1.0) == pytest.approx(0.1)
    rising = Schedule("constant", 0.1)
    assert rising.factor(0, 10**9, 0.05) == pytest.approx(0.5) and rising.factor(5, 10**9, 0.3) == 1.0
    assert Schedule().factor(500, 10**4) == Schedule("cosine", 0.05).factor(500, 10**4) < 1.0
    assert Schedule("constant").factor(0, 10**4) == 1.0


@pytest.mark.parallel([1, 2])
def test_a_run_follows_its_schedule(comm: parallel.Comm) -> None:
    epochs, steps = 4, 12
    schedule = Schedule("cosine", 2.0, 0.0)
    result = minimize(
        distributed(explicit_model(), "mse", comm),
        "adam",
        epochs,
        minibatch=MinibatchSettings(RATE, BATCH, schedule=schedule),
    )
    rates = [RATE * min(1.0, (k + 1) / 2) * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]
    model = explicit_model()
    theirs = epochs_of_torch(torchs("adam", model, 0.0), model, "mse", epochs, rates)
    torch.testing.assert_close(result.x, theirs, rtol=0, atol=1e-12)


@pytest.mark.parallel([1, 2, 3])
def test_with_a_time_limit_the_schedule_follows_the_first_ranks_clock(
    comm: parallel.Comm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every look at the clock takes a second; the clocks of other ranks run at other speeds.
    began, ticks = time.perf_counter(), iter(range(10**9))
    clock = SimpleNamespace(perf_counter=lambda: began + next(ticks) * (1.0 + 5.0 * comm.rank))
    monkeypatch.setattr("hpcdeq.optim.base.time", clock)
    factors: list[float] = []
    factor = Schedule.factor

    def noted(self: Schedule, step: int, steps: int, spent: float = 0.0) -> float:
        factors.append(factor(self, step, steps, spent))
        return factors[-1]

    monkeypatch.setattr(Schedule, "factor", noted)
    settings = MinibatchSettings(RATE, BATCH, schedule=Schedule("cosine", 0.0))
    result = minimize(distributed(explicit_model(), "mse", comm), "adam", 10**6, max_seconds=100.0, minibatch=settings)
    assert (result.status, result.reason) == ("budget", "DIVERGED_USER")
    assert 5 < len(factors) < 100
    assert factors[0] > 0.9 and factors[-1] < 0.1 and all(a > b for a, b in zip(factors, factors[1:], strict=False))
    everyone = parallel.sum_over_ranks(comm, result.x.numpy())
    np.testing.assert_allclose(everyone, comm.size * result.x.numpy(), rtol=1e-15)


# ---------------------------------------------------------------------------------------------------- outcomes


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("kind", ["float64", "float32", "deq"])
@pytest.mark.parametrize("rate", [1e6, 1e300])
def test_a_learning_rate_far_too_large(rate: float, kind: str, comm: parallel.Comm) -> None:
    class Quartic(nn.Module):
        """Outputs that grow with the weights, unlike those of a bounded activation."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).pow(4).sinh()

    model = Quartic(deq_model() if kind == "deq" else explicit_model())
    if kind == "float32":
        model = model.float()
    problem = distributed(model, "mse", comm)
    seen: list[Iterate] = []
    settings = MinibatchSettings(rate, BATCH, schedule=PLAIN)
    result = minimize(problem, "adam", 5, minibatch=settings, raise_on_failure=False, callback=seen.append)
    assert (result.status, result.reason) == ("diverged", "DIVERGED_NAN")
    assert "in epoch 1, after" in result.message
    assert f"at a learning rate of {rate:.3g}" in result.message and f"such as {rate / 10:.3g}" in result.message
    assert bool(torch.isfinite(result.x).all()) and math.isfinite(result.loss)
    assert result.loss == pytest.approx(problem.loss(result.x), rel=1e-5)
    assert all(math.isfinite(value) for _, _, *values in result.history for value in values[:1])
    assert torch.equal(seen[-1].x, result.x)
    with pytest.raises(ConvergenceError, match="--learning-rate") as caught:
        minimize(problem, "adam", 5, minibatch=settings)
    assert caught.value.record.status == "diverged"


@pytest.mark.parallel([1, 2])
def test_a_gradient_that_is_not_finite_at_the_end_of_an_epoch(comm: parallel.Comm) -> None:
    class Root(nn.Module):
        """Its derivative is infinite, then NaN, where the weight has become zero; its value is not."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            wild = torch.sqrt(self.w - self.w.detach()) if self.seen > 3 else 0.0
            return x @ (self.w + wild)

    problem = distributed(Root(), "mse", comm)
    result = minimize(problem, "adam", 9, minibatch=MinibatchSettings(RATE, None), raise_on_failure=False)
    assert result.status == "diverged" and bool(torch.isfinite(result.x).all()) and math.isfinite(result.loss)


def test_settings_out_of_range() -> None:
    for wrong, told in (
        ({"learning_rate": math.inf}, "learning rate inf: give a finite number"),
        ({"learning_rate": math.nan}, "learning rate nan: give a finite number"),
        ({"batch_size": 0}, "batch size 0"),
        ({"weight_decay": -1.0}, "weight decay -1.0"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"average": 1.0}, "average is 1.0: give a number between 0 and 1"),
    ):
        with pytest.raises(OptionError, match=told):
            MinibatchSettings(**wrong)
    for wrong, told in (
        ({"kind": "linear"}, "schedule is 'linear': choose constant or cosine"),
        ({"warmup": -0.5}, "warmup is -0.5"),
        ({"floor": 1.5}, "floor is 1.5"),
    ):
        with pytest.raises(OptionError, match=told):
            Schedule(**wrong)


@pytest.mark.parametrize("method", [*MINIBATCH, "torch-lbfgs"])
def test_petsc_s_options_are_refused(method: str) -> None:
    with pytest.raises(OptionError, match=f"{method} has no PETSc options"):
        minimize(serial(explicit_model(), "mse"), method, options={"tao_gatol": 1e-8})
    if method not in MINIBATCH:
        with pytest.raises(OptionError, match="settings of minibatches do not go with torch-lbfgs"):
            minimize(serial(explicit_model(), "mse"), method, minibatch=MinibatchSettings())


def test_names_are_the_same_everywhere() -> None:
    assert set(METHODS) == set(PRESETS)
    grid = learning_rate_grid()
    assert list(grid) == sorted(grid) and MinibatchSettings().learning_rate in grid


# ----------------------------------------------------------------------------------------------- torch's L-BFGS


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_torchs_lbfgs_takes_the_steps_of_one_long_call(loss: str, comm: parallel.Comm) -> None:
    iterations, decay = 12, 1e-2
    result = minimize(distributed(explicit_model(), loss, comm, weight_decay=decay), "torch-lbfgs", iterations)
    model = explicit_model()
    inputs, targets = samples(loss)
    evaluations = 0
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=iterations,
        max_eval=10**6,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        outputs = model(inputs)
        kind = nn.functional.cross_entropy
        value = 0.5 * nn.functional.mse_loss(outputs, targets) if loss == "mse" else kind(outputs, targets)
        value = value + decay / 2 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    theirs = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert result.iterations == iterations == len(result.history) - 1
    torch.testing.assert_close(result.x, theirs, rtol=1e-8, atol=1e-8)
    # What a call evaluates first is what the last one ended with: nothing is evaluated twice.
    assert result.counts.gradients == 11 * evaluations


@pytest.mark.parallel([1, 2, 3])
def test_torchs_lbfgs_trains_a_deq(comm: parallel.Comm) -> None:
    problem = distributed(deq_model(), "mse", comm, weight_decay=0.1)
    result = minimize(problem, "torch-lbfgs", 15)
    one = minimize(serial(deq_model(), "mse", weight_decay=0.1), "torch-lbfgs", 15)
    assert result.loss < 0.65 * result.history[0][2]
    assert result.loss == pytest.approx(problem.loss(result.x), rel=1e-9)
    torch.testing.assert_close(result.x, one.x, rtol=0, atol=1e-6)
    assert result.counts.cell_vjps > 0 and result.counts.gauss_newton_products == 0


def test_torchs_lbfgs_ends_where_the_gradient_does() -> None:
    result = minimize(serial(explicit_model(), "cross_entropy", weight_decay=0.1), "torch-lbfgs", 500)
    assert (result.status, result.reason) == ("converged", "CONVERGED_GATOL")
    other = minimize(serial(explicit_model(), "cross_entropy", weight_decay=0.1), "lbfgs", 500)
    assert result.loss == pytest.approx(other.loss, rel=1e-9)


@pytest.mark.parallel([1, 2])
def test_torchs_lbfgs_beside_points_without_a_loss(comm: parallel.Comm) -> None:
    class Wall(nn.Module):
        """Without a finite value beyond a weight of one; the data wants more."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(self.w.abs().max() < 1.0, x * self.w, math.inf)

    inputs, _ = samples("mse")
    own = parallel.own_slice(len(inputs), comm.rank, comm.size)
    problem = TrainingProblem(Wall(), (inputs[own], 3.0 * inputs[own]), "mse", comm)
    result = minimize(problem, "torch-lbfgs", 50, raise_on_failure=False)
    assert result.rejected > 0
    assert math.isfinite(result.loss) and result.loss < result.history[0][2]
    assert result.loss == pytest.approx(problem.loss(result.x), rel=1e-12)


@pytest.mark.parallel([1, 2])
def test_torchs_lbfgs_within_its_time(comm: parallel.Comm) -> None:
    result = minimize(distributed(deq_model(), "mse", comm), "torch-lbfgs", 10**6, max_seconds=0.2)
    assert result.status in ("budget", "converged") and result.history[-1][1] < 60
    with pytest.raises(DataError, match="loss at the initial weights"):
        problem = distributed(explicit_model(), "mse", comm)
        huge = torch.full((problem.layout.count,), 1e200, dtype=torch.float64)
        minimize(problem, "torch-lbfgs", initial=huge)


# -------------------------------------------------------------------------------------------- the command line

TRAIN = ("-m", "hpcdeq.train", "--model", "mlp_deq", "--data")


@pytest.fixture
def two_of_three(tmp_path: Path) -> Path:
    """Points of two classes, in a file whose schema knows three."""
    from hpcdeq.data.rows import SampleRows
    from hpcdeq.data.schema import Schema
    from hpcdeq.data.writer import DatasetWriter

    points = np.random.default_rng(0).standard_normal((60, 2))
    labels = np.where(points[:, 0] > 0, 2, 0)
    schema = Schema("classification", "array", classes=("left", "middle", "right"), sample_shape=(2,))
    with DatasetWriter(tmp_path / "two.h5", schema) as writer:
        splits = np.array([0] * 8 + [1, 2], np.uint8)[np.arange(60) % 10]
        writer.append(SampleRows([f"p{i}" for i in range(60)], labels, points), splits)
    return tmp_path / "two.h5"


@pytest.mark.parametrize("optimizer", ["adamw", "torch-lbfgs"])
def test_a_class_without_training_samples(run: Run, tmp_path: Path, two_of_three: Path, optimizer: str) -> None:
    arguments = [str(two_of_three), "--optimizer", optimizer, "--max-iterations", "6", "--out", "r"]
    done = run(*TRAIN, *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "note: no training sample is of class middle;" in done.stdout
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "budget" and math.isfinite(summary["loss"]["train"])
    with (tmp_path / "r" / "history.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]
    written = (tmp_path / "r" / "config.toml").read_text()
    resolved = [
        'schedule = "cosine"',
        "warmup = 0.05",
        "learning_rate = 0.001",
        "batch_size = 64",
        "weight_decay = 0.01",
    ]
    for line in resolved:
        assert (line in written) == (optimizer == "adamw"), line


def test_a_diverged_run_has_a_summary_and_exit_code_one(run: Run, tmp_path: Path, two_of_three: Path) -> None:
    arguments = [str(two_of_three), "--optimizer", "adam", "--learning-rate", "1e308", "--max-iterations", "3"]
    done = run(*TRAIN, *arguments, "--out", "r", ranks=2)
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "diverged" and math.isfinite(summary["loss"]["train"])
    assert "--learning-rate" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_an_infinite_learning_rate_ends_with_code_two(run: Run, two_of_three: Path, tmp_path: Path) -> None:
    arguments = ["--out", "r", "--optimizer", "adam", "--learning-rate", "inf"]
    done = run(*TRAIN, str(two_of_three), *arguments, ranks=2)
    assert done.returncode == 2 and "learning_rate is inf: give a finite number above 0" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("adam --learning-rate nan", "learning_rate is nan: give a number above 0"),
        ("adam --schedule linear", "schedule is 'linear': choose constant or cosine"),
        ("rmsprop --warmup -1", "warmup is -1.0"),
        ("adam --learning-rate-floor 2", "floor is 2.0"),
        ("adamw --average 0", "average is 0.0: give a number between 0 and 1"),
        ("lbfgs --average 0.9", "--average is an option of adam, adamw, rmsprop; lbfgs works on all"),
        ("lbfgs --schedule cosine", "--schedule is an option of adam, adamw, rmsprop; lbfgs works on all"),
        ("torch-lbfgs --warmup 0.1", "--warmup is an option of adam, adamw, rmsprop; torch-lbfgs works on all"),
        ("trgn --learning-rate-floor 0.1", "--learning-rate-floor is an option of adam, adamw, rmsprop"),
    ],
)
def test_wrong_settings_on_the_command_line(arguments: str, says: str) -> None:
    options = train.build_parser().parse_args(["--data", "a.h5", "--optimizer", *arguments.split()])
    with pytest.raises(OptionError, match=says):
        train.resolve(options, [])


def test_what_a_minibatch_method_leaves_to_defaults_is_resolved() -> None:
    def resolved(words: str) -> TrainConfig:
        return train.resolve(train.build_parser().parse_args(["--data", "a.h5", *words.split()]), [])[1]

    found = resolved("--optimizer adamw")
    assert (found.learning_rate, found.batch_size, found.schedule) == (1e-3, 64, "cosine")
    assert (found.warmup, found.learning_rate_floor, found.weight_decay, found.penalty()) == (0.05, 0.0, 0.01, 0.0)
    assert found.learning_rates() == Schedule("cosine", 0.05, 0.0)
    found = resolved("--optimizer adam --schedule constant --weight-decay 0.5")
    assert (found.warmup, found.penalty()) == (0.0, 0.5)
    assert resolved("--optimizer adamw --weight-decay 0").weight_decay == 0.0
    assert resolved("--optimizer lbfgs").learning_rate is None
