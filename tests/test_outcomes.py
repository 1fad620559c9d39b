"""How minimisations end that cannot go well: never with NaN, never with a success that is none, always with what to do."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from cells import TanhCell
from conftest import Run
from test_problem import deq_model, distributed, explicit_model, samples, serial
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.errors import ConvergenceError, DataError, OptionError
from hpcdeq.optim import minimize
from hpcdeq.optim.base import Result
from hpcdeq.optim.stopping import Ending, status_of, words
from hpcdeq.problem import MeanSquare, TrainingProblem
from hpcdeq.problem.determinism import nondeterminism

NAMED = ["trgn", "lbfgs", "newton"]
FULL_BATCH = [*NAMED, *(f"tao:{kind}" for kind in ("blmvm", "bqnls", "nls", "ntr", "bntr", "bqnktr", "cg", "brgn"))]
DOUBLE = torch.float64


def line(comm: parallel.Comm = parallel.SELF, slope: float = 1.2, count: int = 6) -> tuple[Tensor, Tensor]:
    """Points on y = slope x over the ranks, all of them on the first."""
    x = torch.linspace(0.5, 1.5, count, dtype=DOUBLE)[:, None]
    own = slice(0, count if comm.rank == 0 else 0)
    return x[own], slope * x[own]


def assert_honest(result: Result, problem: TrainingProblem) -> None:
    """What holds of every ending: finite weights, whose loss is what is told, and no worse than the first."""
    assert bool(result.x.isfinite().all())
    assert result.loss == pytest.approx(problem.loss(result.x), rel=1e-9)
    assert all(math.isfinite(loss) and math.isfinite(norm) for _, _, loss, norm in result.history)
    assert result.loss <= result.history[0][2]
    assert result.message and len(result.message) < 2 * 132


# ------------------------------------------------------------------------------------------------ NaN and infinity


class Bounded(nn.Module):
    """y = (w₁ + w₂) x inside a disc of weights; outside, what is told. Its edge is at w₁ + w₂ = √2."""

    def __init__(self, outside: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, 0.4], dtype=DOUBLE))
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        y = self.w.sum() * x
        if self.outside == "root":  # its derivatives are NaN too
            return y + 0.0 * (1.0 - self.w.square().sum()).sqrt()
        return torch.where(self.w.square().sum() < 1, y, float(self.outside))


@pytest.mark.parametrize("outside", ["nan", "inf", "root"])
@pytest.mark.parametrize("method", FULL_BATCH)
def test_a_minimum_beyond_which_there_is_nan(method: str, outside: str) -> None:
    problem = TrainingProblem(Bounded(outside), line(slope=1.2), "mse", parallel.SELF)
    # Where there is a trust region it is too large at first, so that trial points fall outside.
    result = minimize(problem, method, 60, {"tao_trust0": 100.0}, raise_on_failure=False)
    assert_honest(result, problem)
    assert result.status in ("converged", "budget")
    assert float(result.x.sum()) == pytest.approx(1.2, abs=1e-3)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("outside", ["nan", "inf", "root"])
@pytest.mark.parametrize("method", FULL_BATCH)
def test_a_minimum_that_nan_hides(method: str, outside: str, comm: parallel.Comm) -> None:
    problem = TrainingProblem(Bounded(outside), line(comm, slope=3.0), "mse", comm)
    result = minimize(problem, method, 40, raise_on_failure=False)
    assert_honest(result, problem)
    assert result.status in ("diverged", "budget") and result.rejected > 0
    assert 1.2 < float(result.x.sum()) < 2**0.5
    if result.status == "diverged":
        assert f"{result.rejected} trial points had a NaN or infinite loss or gradient" in result.message


def test_a_diverged_run_raises_its_words_and_keeps_its_record() -> None:
    problem = TrainingProblem(Bounded("nan"), line(slope=3.0), "mse", parallel.SELF)
    with pytest.raises(
        ConvergenceError, match="lbfgs stopped after .* DIVERGED_LS_FAILURE, .* NaN or infinite"
    ) as told:
        minimize(problem, "lbfgs")
    assert isinstance(told.value.record, Result)
    assert_honest(told.value.record, problem)


class Unbounded(MeanSquare):
    """A loss that falls to minus infinity: -exp of the outputs."""

    name = "unbounded"

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.exp().sum()

    def residual(self, outputs: Tensor, targets: Tensor) -> None:
        return None

    def residual_scale(self, outputs: Tensor) -> None:
        return None


@pytest.mark.parametrize("method", [m for m in FULL_BATCH if m != "tao:brgn"])
def test_a_loss_without_a_minimum(method: str) -> None:
    problem = TrainingProblem(nn.Linear(1, 1).double(), line(), Unbounded(), parallel.SELF)
    result = minimize(problem, method, 60, raise_on_failure=False)
    assert_honest(result, problem)
    assert result.status in ("diverged", "budget")


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["trgn", "lbfgs", "tao:brgn", "torch-lbfgs"])
def test_infinite_beginnings(method: str, comm: parallel.Comm) -> None:
    x, y = line(comm)
    huge = TrainingProblem(nn.Linear(1, 1).double(), (x, 1e200 * y), "mse", comm)
    with pytest.raises(DataError, match="loss at the initial weights is inf"):
        minimize(huge, method)
    if method == "tao:brgn":
        return
    steep = Bounded("root")
    with torch.no_grad():
        steep.w.copy_(torch.tensor([0.6, 0.8], dtype=DOUBLE))  # on the edge: the root is zero, its slope infinite
    with pytest.raises(
        DataError, match="gradient at the initial weights is NaN or infinite although the loss is finite"
    ):
        minimize(TrainingProblem(steep, (x, y), "mse", comm), method)


@pytest.mark.parametrize("method", FULL_BATCH)
def test_a_huge_loss_is_still_a_loss(method: str) -> None:
    x, y = line()
    problem = TrainingProblem(nn.Linear(1, 1).double(), (x, 1e100 * y), "mse", parallel.SELF)
    result = minimize(problem, method, 5, raise_on_failure=False)
    assert_honest(result, problem)


# ------------------------------------------------------------------------------------------------ nothing to learn


class Product(nn.Module):
    """y = w₁ w₂ x: the gradient is zero at zero, where the loss is not smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.w[0] * self.w[1] * x


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", [*FULL_BATCH, "torch-lbfgs"])
def test_a_start_without_a_gradient(method: str, comm: parallel.Comm) -> None:
    result = minimize(TrainingProblem(Product(), line(comm), "mse", comm), method, 10)
    assert (result.status, result.iterations, result.gradient_norm) == ("converged", 0, 0.0)
    assert "the gradient is zero at the initial weights" in result.message and "--seed" in result.message


@pytest.mark.parametrize("method", [*FULL_BATCH, "torch-lbfgs"])
def test_a_model_that_depends_on_no_weight(method: str) -> None:
    class Deaf(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * x

    # brgn has a penalty of its own on all weights.
    options = {"tao_brgn_regularizer_weight": 0.0} if method == "tao:brgn" else {}
    result = minimize(TrainingProblem(Deaf(1, 1).double(), line(), "mse", parallel.SELF), method, 10, options)
    assert (result.status, result.iterations, result.gradient_norm) == ("converged", 0, 0.0)
    assert "look for what cuts the loss off from the weights" in result.message


class PartlyDeaf(nn.Module):
    """A network with weights that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.unused = nn.Linear(3, 2)
        self.used = nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", [*FULL_BATCH, "adam", "torch-lbfgs"])
def test_weights_that_nothing_depends_on_stay(method: str, comm: parallel.Comm) -> None:
    problem = distributed(PartlyDeaf(), "mse", comm)
    start = problem.initial()
    # brgn has a penalty of its own on all weights.
    options = {"tao_brgn_regularizer_weight": 0.0} if method == "tao:brgn" else {}
    result = minimize(problem, method, 5, options, raise_on_failure=False)
    torch.testing.assert_close(result.x[:8], start[:8], rtol=0, atol=0)
    assert result.loss < result.history[0][2]


def test_a_converged_run_says_when_it_has_learnt_little() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.tensor(0.1, dtype=DOUBLE))

        def forward(self, x: Tensor) -> Tensor:
            return self.c + 0.0 * x

    x = torch.linspace(-1, 1, 6, dtype=DOUBLE)[:, None]
    result = minimize(TrainingProblem(Constant(), (x, x), "mse", parallel.SELF), "trgn")
    assert result.status == "converged"
    assert "98% of the first: the model fits no better than this from here" in result.message


# ------------------------------------------------------------------------------------------------ unusual problems


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", [*NAMED, "adam", "torch-lbfgs"])
def test_a_class_that_no_sample_has(method: str, comm: parallel.Comm) -> None:
    x, labels = samples("cross_entropy")
    labels = 2 * (labels > 0).long()  # of 0, 1, 2 no 1
    own = slice(0, len(x) if comm.rank == 0 else 0)
    problem = TrainingProblem(explicit_model(), (x[own], labels[own]), "cross_entropy", comm, weight_decay=1e-3)
    result = minimize(problem, method, 40, raise_on_failure=False)
    assert math.isfinite(result.loss)
    problem.layout.load(problem.model, result.x)
    with torch.no_grad():
        scores = torch.softmax(problem.model(x), dim=1)
    absent = float(scores[:, 1].max())
    assert absent < (0.5 if method == "adam" else 0.1)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", [*FULL_BATCH, "adam", "torch-lbfgs"])
def test_a_single_sample(method: str, comm: parallel.Comm) -> None:
    x, y = samples("mse", 1)
    own = slice(0, 1 if comm.rank == comm.size - 1 else 0)
    problem = TrainingProblem(explicit_model(), (x[own], y[own]), "mse", comm)
    result = minimize(problem, method, 40, raise_on_failure=False)
    assert bool(result.x.isfinite().all())
    assert result.loss < (1.0 if method == "adam" else 1e-3) * result.history[0][2]


class Mixed(nn.Module):
    """Weights of every kind of size: a number, one entry, a row, a matrix, none at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=DOUBLE))
        self.empty = nn.Parameter(torch.zeros(0, dtype=DOUBLE))
        self.shift = nn.Parameter(torch.tensor([0.1], dtype=DOUBLE))
        self.matrix = nn.Parameter(torch.randn(3, 3, dtype=DOUBLE))
        self.row = nn.Parameter(torch.randn(1, 3, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(x @ self.matrix + self.row) + self.shift + self.empty.sum()


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", [*FULL_BATCH, "adam", "torch-lbfgs"])
def test_weights_of_all_sizes(method: str, comm: parallel.Comm) -> None:
    # Some TAO types amplify rounding from iteration to iteration: few of them are compared.
    one = minimize(serial(Mixed(), "mse"), method, 3, raise_on_failure=False)
    many = minimize(distributed(Mixed(), "mse", comm), method, 3, raise_on_failure=False)
    assert one.x.numel() == 14 and one.loss < one.history[0][2]
    torch.testing.assert_close(many.x, one.x, rtol=1e-6, atol=1e-9)


@pytest.mark.parallel([3])
@pytest.mark.parametrize("method", [*FULL_BATCH, "adam", "torch-lbfgs"])
def test_more_ranks_than_weights(method: str, comm: parallel.Comm) -> None:
    problem = TrainingProblem(nn.Linear(1, 1).double(), line(comm), "mse", comm)
    assert problem.layout.block_sizes.count(0) == 1
    result = minimize(problem, method, 60, raise_on_failure=False)
    assert result.loss < {"adam": 1.0, "tao:cg": 1e-4}.get(method, 1e-6) * result.history[0][2]


# -------------------------------------------------------------------------------------------------- determinism


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.01 * torch.rand(()))


class Running(nn.Module):
    """Centres by a mean that it learns from the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.mean
        if self.training:
            self.mean = self.mean + 0.1 * (x.detach().mean(dim=0) - self.mean)
        return y


class OwnCode(nn.Module):
    """The randomness is between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) + torch.rand(4).to(x))


class NoisyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ANN001
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # noqa: ANN001
        return g * (1 + torch.rand(()))


class Backward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoisyBackward.apply(x)


class NoisyCell(TanhCell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z * (1 + 0.1 * torch.rand(())), x)


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer, nn.Linear(4, 3)).double()


def noisy_deq() -> nn.Module:
    model = deq_model()
    model.layer.cell.__class__ = NoisyCell  # same weights, another map
    return model


RANDOM = {
    "a layer": (lambda: between(Noise()), r"layer 2 \(Noise\) changes by \d.*from one evaluation to the next"),
    "a running mean": (lambda: between(Running()), r"layer 2 \(Running\) updates the buffer 2.mean at every"),
    "spectral norm": (
        lambda: between(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
        r".* \(_SpectralNorm\) updates the buffer 2.parametrizations.weight.0._",
    ),
    "code of the model": (lambda: OwnCode().double(), r"the model itself \(OwnCode\) changes by"),
    "a derivative": (lambda: between(Backward()), "the gradient changes by"),
    "a cell": (noisy_deq, r"layer layer.cell \(NoisyCell\) changes by"),
}


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("kind", RANDOM)
def test_a_model_of_chance_is_refused_by_name(kind: str, comm: parallel.Comm) -> None:
    model, told = RANDOM[kind]
    problem = distributed(model(), "mse", comm)
    with pytest.raises(OptionError, match=rf"lbfgs needs a loss that is the same each time, and {told}"):
        minimize(problem, "lbfgs", 3)
    if kind not in (
        "a cell",
        "spectral norm",
    ):  # a fixed point that moves is none; spectral norm has no double backward
        assert minimize(problem, "adam", 2, raise_on_failure=False).status == "budget"


@pytest.mark.parallel([2])
def test_chance_on_one_rank_is_refused_on_all(comm: parallel.Comm) -> None:
    model = between(Noise() if comm.rank == 0 else nn.Identity())
    with pytest.raises(OptionError, match="layer 2") as told:
        minimize(distributed(model, "mse", comm), "trgn", 3)
    assert told.value.agreed


@pytest.mark.parametrize(
    "model",
    [explicit_model, deq_model, lambda: between(Running()).eval(), lambda: between(nn.GRUCell(4, 4))],
    ids=["explicit", "deq", "running mean in evaluation", "recurrent"],
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_deterministic_model_is_not_refused(model, dtype: torch.dtype) -> None:
    problem = TrainingProblem(model().to(dtype), tuple(t.to(dtype) for t in samples("mse")), "mse", parallel.SELF)
    assert nondeterminism(problem, problem.initial()) is None


def test_instance_norm_may_keep_statistics_that_it_does_not_use() -> None:
    layers = [
        nn.Unflatten(1, (3, 1)),
        nn.Conv1d(3, 4, 1),
        nn.Upsample(4),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).double()
    assert nondeterminism(serial(model, "mse"), serial(model, "mse").initial()) is None


@pytest.mark.parametrize("model", [lambda: between(Running()), lambda: between(Noise()), deq_model])
def test_the_check_leaves_no_trace(model) -> None:
    problem = serial(model(), "mse")
    buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
    state = torch.get_rng_state()
    before = problem.accounts.totals()
    nondeterminism(problem, problem.initial())
    assert torch.equal(torch.get_rng_state(), state)
    assert problem.accounts.totals() == before
    assert all(torch.equal(b, buffers[name]) for name, b in problem.model.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in problem.model.modules())
    for layer in problem.guidance.layers.values():
        assert layer.take_amplification() == 0.0


# -------------------------------------------------------------------------------------------------------- words


FALLING = [1.0, 0.5, 0.2, 0.1]
STALLED = [1.0] + [0.5 * (1 + 1e-6 * k) for k in range(12, 0, -1)]
LS, TR, MAXITS = "DIVERGED_LS_FAILURE", "DIVERGED_TR_REDUCTION", "DIVERGED_MAXITS"


@pytest.mark.parametrize(
    ("ending", "status", "told"),
    [
        (Ending("CONVERGED_GATOL", [1.0, 1e-9], [1.0, 1e-9]), "converged", "below -tao_gatol$"),
        (Ending("CONVERGED_GATOL", [1.0], [0.0]), "converged", "they are a stationary point.*--seed"),
        (Ending("CONVERGED_GATOL", [0.0], [0.0]), "converged", "nothing is left to learn"),
        (Ending("CONVERGED_GRTOL", [1.0], [1e-9]), "converged", "nothing was done.*smaller -tao_grtol"),
        (Ending("CONVERGED_GATOL", [1.0, 0.4], [1.0, 1e-9]), "converged", "40% of the first.*Widen it"),
        (
            Ending("CONVERGED_GATOL", [1.0, 1e-9], [1.0, 8e-5], gatol=1e-8),
            "converged",
            "that of the loss is 8.0e-05.*-tao_brgn_regularizer_weight",
        ),
        (Ending(MAXITS, FALLING, [1.0] * 4), "budget", "used up; --max-iterations allows more$"),
        (Ending("DIVERGED_USER", FALLING, [1.0] * 4), "budget", "the time is up; --max-seconds allows more$"),
        (
            Ending(MAXITS, STALLED, [1.0] * 12 + [1e-4]),
            "budget",
            "But the last 10 .* by 1e-05 .*fits no better.*--seed",
        ),
        (Ending(MAXITS, STALLED, [1.0] * 13), "budget", "But the last 10 .*the gradient says that it could.*kinks"),
        (Ending(MAXITS, [1.0, 0.3, 0.0], [1.0, 1.0, 0.0]), "budget", "But the loss is zero up to rounding"),
        (
            Ending(LS, [1.0, 0.3, 0.3 - 1e-6], [1.0] * 3, torch.float32),
            "diverged",
            "float32's rounding.*--dtype float64",
        ),
        (Ending(LS, [1.0, 0.3, 0.3 - 1e-15], [1.0, 1.0, 1e-9]), "diverged", "as low as float64's rounding can tell"),
        (Ending(LS, [1.0, 0.3, 0.3 - 1e-15], [1.0] * 3), "diverged", "kinks"),
        (
            Ending(LS, [1.0, 0.3, 0.3 - 1e-6], [1.0] * 3, tolerance=1e-5),
            "diverged",
            "fixed points solved to 1e-05 hide.*Try tighter -deq_snes_rtol",
        ),
        (
            Ending(LS, [1.0, 0.3, 0.2999], [1.0] * 3, torch.float32, 1e-4),
            "diverged",
            "fixed points solved to 1e-04 hide.*--dtype float64 and tighter",
        ),
        (
            Ending(TR, FALLING, [1.0] * 4, unreached=3),
            "diverged",
            "the trust region shrank.*3 trial points had no fixed",
        ),
        (Ending(LS, FALLING, [1.0] * 4, infinite=2), "diverged", "2 trial points had a NaN .* -tao_lm_damping"),
        (Ending(LS, FALLING, [1.0] * 4), "diverged", "the line search found no decrease: .*kinks"),
        (Ending(TR, [1.0, 0.5], [1.0, 1e-4]), "diverged", "1e-04 of the first: the model fits no better"),
        (Ending("CONVERGED_STEPTOL", FALLING, [1.0] * 4), "diverged", "fell below -tao_steptol: .*kinks"),
        (
            Ending("CONVERGED_STEPTOL", FALLING, [1.0, 1.0, 1.0, 1e-5]),
            "converged",
            "fell below -tao_steptol: .*fits no",
        ),
        (Ending("DIVERGED_NAN", FALLING, [1.0] * 4), "diverged", "--optimizer trgn"),
        (Ending("DIVERGED_SOMETHING", FALLING, [1.0] * 4), "diverged", "manual page"),
    ],
)
def test_an_ending_in_words(ending: Ending, status: str, told: str) -> None:
    assert status_of(ending) == status
    assert re.search(told, words(ending)), words(ending)
    assert len(words(ending)) < 2 * 132


def test_single_precision_says_that_it_is_at_its_end() -> None:
    inputs, targets = samples("mse")
    data = (inputs.float(), targets.float())
    problem = TrainingProblem(explicit_model().float(), data, "mse", parallel.SELF, weight_decay=1e-2)
    result = minimize(problem, "newton", 500, {"tao_gatol": 1e-12, "tao_grtol": 0.0}, raise_on_failure=False)
    assert (result.status, result.reason) == ("diverged", "DIVERGED_LS_FAILURE")
    assert "float32's rounding" in result.message and "--dtype float64" in result.message


def test_every_iterate_of_brgn_is_told() -> None:
    """PETSc's brgn hands its iterations to a solver inside."""
    seen: list[int] = []
    result = minimize(serial(deq_model(), "mse"), "tao:brgn", 4, callback=lambda i: seen.append(i.iteration))
    assert seen == [0, 1, 2, 3, 4] and [entry[0] for entry in result.history] == seen
    result = minimize(serial(deq_model(), "mse"), "tao:brgn", 10**6, max_seconds=0.2)
    assert result.reason == "DIVERGED_USER"


# ---------------------------------------------------------------------------------------------- the command line

JOB = """
import sys, torch
import hpcdeq.models.mlp_deq as home
from hpcdeq import parallel
from hpcdeq.train import main

forward = home.MlpDeq.forward
def random(self, x):
    return forward(self, x) + 0.1 * torch.rand(())
def walled(self, x):  # no step away from the initial weights, of which the skip's are the first to move
    if not hasattr(self, "first"):
        self.first = self.skip.weight.detach().clone()
    moved = (self.skip.weight.detach() - self.first).abs().max() > 1e-12
    return forward(self, x) * torch.where(moved, float("nan"), 1.0)
home.MlpDeq.forward = {"random": random, "walled": walled}[sys.argv[1]]
parallel.launch(main, [*sys.argv[2:], "--data", "b.h5", "--out", "out"])
"""


@pytest.fixture
def burgers(tmp_path: Path) -> Path:
    from hpcdeq.builders.fields import prepare_burgers

    prepare_burgers(tmp_path / "b.h5", 40)
    return tmp_path


def test_a_random_model_at_the_command_line(run: Run, burgers: Path) -> None:
    (burgers / "job.py").write_text(JOB)
    done = run("job.py", "random", ranks=2, timeout=280)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("trgn needs a loss that is the same each time") == 1
    assert "Traceback" not in done.stderr and not (burgers / "out" / "summary.json").exists()


def test_nan_at_every_trial_point_at_the_command_line(run: Run, burgers: Path) -> None:
    (burgers / "job.py").write_text(JOB)
    done = run("job.py", "walled", "--optimizer", "lbfgs", ranks=2, timeout=280)
    assert done.returncode == 1, done.stderr
    summary = json.loads((burgers / "out" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("diverged", "DIVERGED_LS_FAILURE")
    assert "NaN or infinite" in summary["message"] and summary["message"] in done.stdout
    assert math.isfinite(summary["loss"]["train"])


def test_a_class_without_samples_at_the_command_line(run: Run, burgers: Path) -> None:
    with h5py.File(burgers / "b.h5", "r+") as file:
        for name in ("target_names", "target_units"):
            file.attrs.pop(name, None)
        del file["sample/target"]
        file["sample/target"] = 2 * (np.arange(40, dtype=np.int64) % 2)
        file.attrs["task"] = "classification"
        file.attrs["classes"] = ["low", "middle", "high"]
    done = run("-m", "hpcdeq.train", "--data", "b.h5", "--max-iterations", "3", "--out", "out", ranks=2, timeout=280)
    assert done.returncode == 0, done.stderr
    summary = json.loads((burgers / "out" / "summary.json").read_text())
    assert summary["status"] == "budget" and summary["metric"]["train"] > 0.5
