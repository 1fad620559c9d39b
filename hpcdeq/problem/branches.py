"""Whether a training followed fixed points that nobody finds who applies the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.errors import ConvergenceError
from hpcdeq.problem.phases import RECORD
from hpcdeq.problem.training import TrainingProblem

# Outputs that differ by more than this part of all outputs' size are those of different fixed points: far above what
# tolerances explain, far below the distance of two fixed points that both attract.
DIFFERENT = 0.05


def elsewhere(problem: TrainingProblem, p: Tensor) -> tuple[int, int]:
    """Count samples whose warm-started fixed point is not the one that is found from the layers' own initial state.

    A cell may come to have several fixed points for a sample. Warm starts then follow one of them from iterate to iterate,
    while whoever applies the model, and every evaluation on other data, begins cold and may arrive at another. Such a
    training has lowered the loss of a function that it does not leave behind.

    Collective on the problem's comm. Not counted as work.

    Parameters
    ----------
    problem
        What was minimised.
    p
        ``(n,)`` weights.

    Returns
    -------
    differing, examined
        Samples on all ranks; each rank examines its first chunk.
    """
    if problem.guidance.cache is None:
        return 0, 0
    pieces = problem.layout.unflatten(p)

    def compare(inputs: Any, _: Tensor, ids: Sequence[int]) -> tuple[int, int]:
        warm = problem.local.network.outputs(pieces, inputs)
        try:
            with problem.guidance.batch(ids, p, cold=True):
                cold = problem.local.network.outputs(pieces, inputs)
        except ConvergenceError as error:
            found = getattr(error.record, "converged", None)
            return len(ids) if found is None else int((~found).sum()), len(ids)
        size = torch.linalg.vector_norm(warm) / len(ids) ** 0.5
        apart = torch.linalg.vector_norm((warm - cold).reshape(len(ids), -1), dim=1)
        return int((apart > DIFFERENT * size).sum()), len(ids)

    def own() -> tuple[int, int]:
        if not problem.visits.chunk_count:
            return 0, 0
        # Dropout would leave out other things each time.
        with torch.no_grad(), problem.local.network.applied():
            return problem.visits.visit(p, problem.visits.chunk(0), 0, compare) or (0, 0)

    with problem.phases.of(RECORD), problem.accounts.paused():
        counts = np.array(problem.agreed(own))
    differing, examined = parallel.sum_over_ranks(problem.comm, counts)
    return int(differing), int(examined)
