"""Which sample makes a loss or a gradient that is not finite: looked for sample by sample, once that is known."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.data import Dataset
from hpcdeq.errors import ConvergenceError
from hpcdeq.problem.chunks import unnoticed
from hpcdeq.problem.training import TrainingProblem


def culprit(problem: TrainingProblem, p: Tensor, rows: np.ndarray | None = None) -> str:
    """Say which sample's loss or gradient is not finite: its number, its name, its rank and what is wrong with it.

    Collective on the problem's comm. Nothing is counted or remembered of the evaluations.

    Parameters
    ----------
    p
        ``(n,)`` weights, the same on all ranks.
    rows
        Global numbers of the samples to look among, the same on all ranks; None: all.

    Returns
    -------
    str
        A sentence, the same on all ranks; nothing where no sample's alone is not finite.
    """
    if not bool(torch.isfinite(p).all()):
        return "The weights themselves are not finite"
    found = parallel.of_all_ranks(problem.comm, problem.agreed(lambda: _first(problem, p, rows) or ""))
    rank, told = next(((rank, told) for rank, told in enumerate(found) if told), (0, ""))
    if not told:
        return ""
    where = f" on rank {rank}" if problem.comm.size > 1 else ""
    name, cause = told.split("\n", 1)
    return f"The first is training sample {name}{where}: {cause}"


def _first(problem: TrainingProblem, p: Tensor, rows: np.ndarray | None) -> str | None:
    """Return the name and the fault of this rank's first sample that has one."""
    with unnoticed(problem):
        for ids, _ in problem.visits.batches(rows):
            if _fault(problem, p, list(ids)) is None:
                continue
            for i in ids:
                fault = _fault(problem, p, [i])
                if fault is not None:
                    return f"{_name(problem, i)}\n{fault}"
    return None


def _fault(problem: TrainingProblem, p: Tensor, ids: list[int]) -> str | None:
    """Say what is wrong with the sum of some of this rank's samples; None where nothing is."""
    try:
        loss, gradient = problem.local.loss_and_gradient(p, problem.dataset.offset + np.array(ids))
    except ConvergenceError as error:
        return f"it has no fixed point ({str(error).splitlines()[0]})"
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    return None if bool(torch.isfinite(gradient).all()) else "its gradient is NaN or infinite"


def _name(problem: TrainingProblem, i: int) -> str:
    number, dataset = problem.dataset.offset + i, problem.dataset
    return f"{number} ({dataset.ids[i]})" if isinstance(dataset, Dataset) else str(number)
