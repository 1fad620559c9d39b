"""A run that was stopped and goes on is the run that was not stopped: to the last bit on as many ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hpcdeq import FixedPoint, TrainingProblem, minimize, parallel
from hpcdeq.errors import OptionError
from hpcdeq.methods import MINIBATCH, Schedule
from hpcdeq.optim import Result
from hpcdeq.optim.sampling import Sampling
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.record import read_checkpoint, write_checkpoint
from hpcdeq.state import State

SAMPLES, INPUTS, OUTPUTS = 23, 3, 2
BEFORE, AFTER = 4, 8  # iterations
SETTINGS = MinibatchSettings(batch_size=5, learning_rate=0.01, schedule=Schedule("constant"))


class Cell(nn.Module):
    """A contraction of seven numbers a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(7, 7), nn.Linear(INPUTS, 7)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.5 * self.w(z) + self.u(x))

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), 7)


def explicit() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 9), nn.Tanh(), nn.Linear(9, OUTPUTS))


def implicit() -> nn.Module:
    tight = {"snes_rtol": 1e-12, "ksp_rtol": 1e-12}
    return nn.Sequential(FixedPoint(Cell(), options=tight), nn.Linear(7, OUTPUTS))


def problem_of(model: Callable[[], nn.Module], comm: parallel.Comm, *, adaptive: bool = False) -> TrainingProblem:
    """Return a regression whose samples are shared out over the ranks, the same each time."""
    torch.manual_seed(7)
    net = model().double()
    x = torch.randn(SAMPLES, INPUTS, dtype=torch.float64)
    y = torch.stack([torch.sin(2 * x[:, 0]) + x[:, 1], x[:, 2] * x[:, 0]], dim=1)
    own = parallel.own_slice(SAMPLES, comm.rank, comm.size)
    return TrainingProblem(net, (x[own].clone(), y[own].clone()), "mse", comm, chunk_size=4, adaptive=adaptive)


class StopAt:
    """Keeps the state at the first safe point with enough iterations behind it, and the wanted number of calls; ends there."""

    why = "stopped by a test"
    warm_bytes = 2**30

    def __init__(self, folder: Path, comm: parallel.Comm, iteration: int, more: int = 0) -> None:
        self.folder, self.comm, self.iteration, self.more = folder, comm, iteration, more

    def __call__(self, iteration: int, state: Callable[[], State], *, last: bool) -> bool:
        if iteration < self.iteration:
            return False
        self.more -= 1
        if self.more >= 0:
            return False
        write_checkpoint(self.folder, state(), self.comm)
        return True


def run(problem: TrainingProblem, method: str, iterations: int = AFTER, **more: object) -> Result:
    if method in MINIBATCH:
        more["minibatch"] = SETTINGS
    return minimize(problem, method, iterations, raise_on_failure=False, **more)  # type: ignore[arg-type]


def stopped_and_resumed(
    folder: Path,
    model: Callable[[], nn.Module],
    method: str,
    comm: parallel.Comm,
    *,
    adaptive: bool = False,
    more: int = 0,
    **given: object,
) -> tuple[Result, Result]:
    """Return the results of a run, and of one that was stopped and went on."""
    whole = run(problem_of(model, comm, adaptive=adaptive), method, **given)
    first = run(problem_of(model, comm, adaptive=adaptive), method, keeper=StopAt(folder, comm, BEFORE, more), **given)
    assert (first.status, first.iterations) == ("interrupted", BEFORE), first.message
    with read_checkpoint(folder, comm) as known:
        assert known is not None
        rest = run(problem_of(model, comm, adaptive=adaptive), method, resume=known, **given)
    return whole, rest


def without_clock(result: Result) -> list[tuple[int, float, float]]:
    return [(iteration, loss, norm) for iteration, _, loss, norm in result.history]


EXACT = ("adam", "adamw", "rmsprop", "lbfgs", "trgn", "newton", "torch-lbfgs")


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("model", [explicit, implicit])
@pytest.mark.parametrize("method", EXACT)
def test_a_resumed_run_is_the_same_to_the_last_bit(
    shared_tmp_path: Path, comm: parallel.Comm, method: str, model: Callable[[], nn.Module]
) -> None:
    whole, rest = stopped_and_resumed(shared_tmp_path, model, method, comm)
    assert without_clock(rest) == without_clock(whole)
    assert torch.equal(rest.x, whole.x)
    assert (rest.status, rest.reason, rest.message) == (whole.status, whole.reason, whole.message)
    # A cell is tried once in every process, to see whether samples may leave a batch.
    assert {**vars(rest.counts), "cell_evaluations": 0} == {**vars(whole.counts), "cell_evaluations": 0}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["adam", "lbfgs", "trgn", "newton"])
def test_adaptive_accuracy_and_warm_starts_go_on(shared_tmp_path: Path, comm: parallel.Comm, method: str) -> None:
    whole, rest = stopped_and_resumed(shared_tmp_path, implicit, method, comm, adaptive=True)
    assert without_clock(rest) == without_clock(whole)
    assert torch.equal(rest.x, whole.x)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", MINIBATCH)
def test_a_run_that_is_stopped_within_an_epoch_goes_on_within_it(
    shared_tmp_path: Path, comm: parallel.Comm, method: str
) -> None:
    whole, rest = stopped_and_resumed(shared_tmp_path, implicit, method, comm, more=3)
    assert without_clock(rest) == without_clock(whole)
    assert torch.equal(rest.x, whole.x)
    assert vars(rest.counts)["gradients"] == vars(whole.counts)["gradients"]


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("pc", ["kronecker", "inner_lbfgs", "gauss_newton_diagonal", "none"])
@pytest.mark.parametrize("method", ["lbfgs", "trgn", "newton"])
def test_every_preconditioner_goes_on(shared_tmp_path: Path, comm: parallel.Comm, method: str, pc: str) -> None:
    whole, rest = stopped_and_resumed(shared_tmp_path, explicit, method, comm, options={"tao_pc_type": pc})
    assert without_clock(rest) == without_clock(whole)
    assert torch.equal(rest.x, whole.x)


@pytest.mark.parallel([1, 2])
def test_the_forcing_term_of_newton_goes_on(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    options = {"tao_ksp_rtol": 0.9, "tao_ksp_max_it": 50}  # so that the fall of the gradient decides
    whole, rest = stopped_and_resumed(shared_tmp_path, explicit, "newton", comm, options=options)
    assert without_clock(rest) == without_clock(whole)
    assert torch.equal(rest.x, whole.x)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["lbfgs", "trgn"])
def test_growing_batches_go_on(shared_tmp_path: Path, comm: parallel.Comm, method: str) -> None:
    sampling = Sampling(batch_size=8, batch_growth=1.2, hessian_fraction=0.5 if method == "trgn" else 1.0)
    whole, rest = stopped_and_resumed(shared_tmp_path, explicit, method, comm, sampling=sampling)
    assert without_clock(rest) == without_clock(whole)
    assert torch.equal(rest.x, whole.x)


@pytest.mark.parallel([3])
@pytest.mark.parametrize("model", [explicit, implicit])
@pytest.mark.parametrize("method", EXACT)
def test_a_run_goes_on_with_another_number_of_ranks(
    shared_tmp_path: Path, comm: parallel.Comm, method: str, model: Callable[[], nn.Module]
) -> None:
    whole = run(problem_of(model, comm), method)
    fewer = parallel.some_ranks(comm, comm.rank < 2)
    if fewer is not None:
        first = run(problem_of(model, fewer), method, keeper=StopAt(shared_tmp_path, fewer, BEFORE))
        assert first.status == "interrupted"
    parallel.any_rank(comm, False)  # the file is there
    with read_checkpoint(shared_tmp_path, comm) as known:
        rest = run(problem_of(model, comm), method, resume=known)
    assert rest.iterations == whole.iterations
    for a, b in zip(without_clock(rest), without_clock(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-8)
    torch.testing.assert_close(rest.x, whole.x, rtol=1e-7, atol=1e-8)
    assert {**vars(rest.counts), "cell_evaluations": 0} == {
        **vars(whole.counts),
        "cell_evaluations": 0,
    } or model is implicit


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["tao:bnls", "tao:blmvm", "tao:bntr"])
def test_types_of_petsc_go_on_from_their_weights_and_say_so(
    shared_tmp_path: Path, comm: parallel.Comm, method: str
) -> None:
    whole, rest = stopped_and_resumed(shared_tmp_path, explicit, method, comm)
    kind = method.removeprefix("tao:")
    assert f"Resumed at iteration {BEFORE}: what PETSc's {kind} remembers of earlier steps" in rest.message
    assert without_clock(rest)[: BEFORE + 1] == without_clock(whole)[: BEFORE + 1]
    assert [entry[0] for entry in rest.history] == list(range(AFTER + 1))
    losses = [loss for _, loss, _ in without_clock(rest)]
    assert losses == sorted(losses, reverse=True)


def test_a_state_of_another_run_is_refused(tmp_path: Path, comm: parallel.Comm) -> None:
    run(problem_of(explicit, comm), "lbfgs", keeper=StopAt(tmp_path, comm, 2))
    with read_checkpoint(tmp_path, comm) as known:
        with pytest.raises(OptionError, match="the state is of lbfgs with 56 weights, and this is trgn with 56: go on"):
            run(problem_of(explicit, comm), "trgn", resume=known)
        with pytest.raises(OptionError, match="and this is lbfgs with 100"):
            run(problem_of(implicit, comm), "lbfgs", resume=known)
