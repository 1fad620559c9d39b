"""Chunks that fit into a rank's memory: what is measured, and what follows from it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from torch import nn

from hpcdeq import parallel
from hpcdeq.errors import OptionError
from hpcdeq.parallel import Comm
from hpcdeq.problem import TrainingProblem
from hpcdeq.problem.chunks import GIB, LiveBytes, fitting_chunk_size
from hpcdeq.problem.memory import process_bytes

WIDTH = 4096  # numbers of a sample in each of the tensors that are alive at once
SAMPLES = 120  # more on each of two ranks than fit


def problem(comm: Comm, chunk_size: int = 64) -> TrainingProblem:
    """Return a problem whose samples need much memory and whose weights need little; the last rank has no samples."""
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 8, WIDTH, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(WIDTH, 1), nn.Flatten(), nn.Linear(8, 2)).double()
    working = max(1, comm.size - 1)
    own = parallel.own_slice(SAMPLES, comm.rank, working) if comm.rank < working else slice(0, 0)
    return TrainingProblem(model, (x[own], torch.zeros(SAMPLES, 2).double()[own]), "mse", comm, chunk_size=chunk_size)


def fitting(made: TrainingProblem, costs: np.ndarray, mib: float, *, products: bool = False) -> int:
    """Return the chunk size for so much memory beyond what the process that holds most holds already."""
    fitting_chunk_size(made, costs, 64 * GIB, products=products)  # what libraries take with their first call is taken
    held = parallel.max_over_ranks(made.comm, process_bytes())
    return fitting_chunk_size(made, costs, held + mib * 2**20, products=products)


def test_live_bytes_are_those_of_tensors_alive_at_once() -> None:
    given = torch.zeros(1000, dtype=torch.float64)
    with LiveBytes() as live:
        for _ in range(5):
            a = given + 1
            b = a.view(10, 100).T
            b += 1
            del a, b
        assert live.peak == 8000
        kept = [given * 2 for _ in range(3)]
    assert live.peak == 24_000 and len(kept) == 3


@pytest.mark.parallel([1, 2, 3])
def test_chunks_become_smaller_where_memory_asks_for_it(comm: Comm) -> None:
    """A sample is picked out of the data set, 8 x 4,096 numbers: 256 KiB and a few more; products need some more."""
    made = problem(comm)
    costs = np.ones(len(made.dataset), np.int64)
    before = made.accounts.totals()
    sizes = [fitting(made, costs, mib) for mib in (8, 4, 10**5)]
    assert sizes == [int(parallel.max_over_ranks(comm, size)) for size in sizes]
    assert 12 <= sizes[0] <= 32 and sizes[1] <= sizes[0] - 8 and sizes[2] == 64
    assert fitting(made, costs, 8, products=True) <= sizes[0]
    assert made.accounts.totals() == before


@pytest.mark.parallel([1, 2, 3])
def test_the_costliest_samples_decide(comm: Comm) -> None:
    made = problem(comm)
    costs = np.ones(len(made.dataset), np.int64)
    even = fitting(made, costs, 8)
    costs[-1:] = 9
    assert even - 10 <= fitting(made, costs, 8) <= even - 6


@pytest.mark.parallel([1, 2, 3])
def test_too_little_memory_for_a_sample_is_told_on_all_ranks(comm: Comm) -> None:
    made = problem(comm)
    pattern = r"--memory-per-rank 0\.001: a rank needs (\d\.\d+) GiB to work on its largest"
    with pytest.raises(OptionError, match=pattern) as caught:
        fitting_chunk_size(made, np.ones(len(made.dataset), np.int64), 0.001 * GIB, products=False)
    told = re.search(pattern, str(caught.value))
    held = parallel.max_over_ranks(comm, process_bytes()) / GIB
    assert told is not None and float(told[1]) == pytest.approx(held, abs=0.05)  # the samples themselves take little


def test_a_run_says_and_saves_the_chunk_size_that_fits(run: Run, tmp_path: Path) -> None:
    done = run("-m", "hpcdeq.train", "--out", "out", "--max-iterations", "1", "--memory-per-rank", "64", timeout=200)
    assert done.returncode == 0, done.stderr
    assert "memory     64 GiB a rank: chunks of 512 samples" in done.stdout
    saved = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert (saved["chunk_size"], saved["memory_per_rank"]) == (512, 64.0)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["iterations"] == 1
