"""One sample whose loss, gradient or evaluation fails is named: its number, its name, its rank and what is wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from cells import TanhCell
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.builders.fields import prepare_burgers
from hpcdeq.data import Dataset
from hpcdeq.deq import FixedPoint
from hpcdeq.errors import DataError, RankError
from hpcdeq.optim import minimize
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.problem import TrainingProblem
from hpcdeq.problem.culprit import culprit

COUNT, BAD = 7, 5
METHODS = ["trgn", "lbfgs", "tao:brgn", "torch-lbfgs", "adam"]


class Fragile(nn.Module):
    """y = w x, but for the one sample with x = 5."""

    def __init__(self, kind: str, weight: float = 0.5) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weight))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        bad = x == BAD
        y = self.w * x
        if self.kind == "raise" and bool(bad.any()):
            raise ZeroDivisionError("five is too much\nfor me")
        if self.kind == "gradient":  # the root of zero: its slope is infinite
            return y + torch.where(bad, self.w - self.w.detach(), 1.0).abs().sqrt()
        if self.kind == "edge":
            return torch.where(bad & (self.w > 0.4), float("inf"), y)
        if self.kind == "overflow":
            return y + torch.where(bad, (90.0 * self.w / 0.5 * x / BAD).exp(), 0.0 * y)
        return torch.where(bad, float("nan"), y) if self.kind == "nan" else y


def problem_of(kind: str, comm: parallel.Comm) -> tuple[TrainingProblem, int]:
    """Return a problem, and the rank that has the bad sample."""
    own = parallel.own_slice(COUNT, comm.rank, comm.size)
    x = torch.arange(COUNT, dtype=torch.float32)[own, None]
    rank = next(r for r in range(comm.size) if BAD in range(COUNT)[parallel.own_slice(COUNT, r, comm.size)])
    return TrainingProblem(Fragile(kind), (x, 2 * x), "mse", comm, chunk_size=3), rank


def where(comm: parallel.Comm, rank: int) -> str:
    return f" on rank {rank}" if comm.size > 1 else ""


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("nan", "its loss is nan"),
        ("overflow", "its loss is inf"),
        ("gradient", "its gradient is NaN or infinite"),
    ],
)
def test_a_sample_that_is_not_finite_is_named(method: str, kind: str, cause: str, comm: parallel.Comm) -> None:
    if kind == "gradient" and method == "tao:brgn":
        pytest.skip("it never sees the gradient at the beginning")
    problem, rank = problem_of(kind, comm)
    told = f"The first is training sample {BAD}{where(comm, rank)}: {cause}"
    with pytest.raises(DataError, match=told) as error:
        minimize(problem, method)
    assert error.value.agreed


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_sample_that_raises_is_named(method: str, comm: parallel.Comm) -> None:
    problem, rank = problem_of("raise", comm)
    kind = ZeroDivisionError if comm.size == 1 else RankError
    with pytest.raises(kind) as error:
        minimize(problem, method)
    note = f"It is sample {BAD} that makes it"
    if comm.size == 1:
        assert error.value.__notes__ == [note]
    else:
        pattern = rf"rank {rank}: ZeroDivisionError: five is too much\nfor me \(at .*test_culprit.py:\d+; .*\)\. {note}"
        assert re.search(pattern, str(error.value))


@pytest.mark.parallel([1, 2])
def test_a_later_overflow_is_named_before_the_weights_are_lost(comm: parallel.Comm) -> None:
    problem, rank = problem_of("edge", comm)
    settings = MinibatchSettings(learning_rate=0.1, batch_size=4)
    start = torch.tensor([0.0])
    result = minimize(problem, "adam", 20, initial=start, minibatch=settings, raise_on_failure=False)
    assert result.status == "diverged" and bool(result.x.isfinite().all())
    assert f"training sample {BAD}{where(comm, rank)}: its loss is" in result.message


@pytest.mark.parallel([1, 2])
def test_no_sample_alone(comm: parallel.Comm) -> None:
    problem, _ = problem_of("fine", comm)
    assert culprit(problem, torch.tensor([0.5])) == ""
    assert culprit(problem, torch.tensor([float("nan")])) == "The weights themselves are not finite"


@pytest.mark.parallel([1, 2])
def test_a_sample_of_a_file_has_its_name_and_nothing_is_counted(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    path = shared_tmp_path / "b.h5"
    prepare_burgers(path, 12, comm=comm)
    dataset = Dataset(path, "train", comm, dtype=torch.float32)

    class Scaled(nn.Module):
        """A fixed point, and a loss that overflows for one sample."""

        def __init__(self) -> None:
            super().__init__()
            size = dataset.input_shape[0]
            self.layer = FixedPoint(TanhCell(size, size, dtype=torch.float32))
            self.out = nn.Linear(size, dataset.output_size)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.layer(x)) * torch.where((x == bad).all(1, keepdim=True), 1e30, 1.0)

    last = dataset.batch(slice(len(dataset) - 1, len(dataset)))[0] if len(dataset) else None
    bad = parallel.of_all_ranks(comm, last)[-1]
    problem = TrainingProblem(Scaled(), dataset, "mse", comm)
    before = problem.accounts.totals()
    told = culprit(problem, problem.initial())
    number, name = dataset.count - 1, parallel.of_all_ranks(comm, dataset.ids)[-1][-1]
    assert told == f"The first is training sample {number} ({name}){where(comm, comm.size - 1)}: its loss is inf"
    assert dataclasses.asdict(problem.accounts.totals()) == dataclasses.asdict(before)
