"""How many samples fit into the memory of a rank at once, found by measuring a few.

What a chunk needs is counted tensor by tensor while a gradient (and a curvature product, where the optimiser takes them) of a few
samples is computed: every storage that torch makes, until it is freed. That is the same on every run, unlike the memory of the
process, and grows by a fixed amount with the cost of the samples beyond what does not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcdeq import parallel
from hpcdeq.errors import ConvergenceError, OptionError
from hpcdeq.problem.memory import process_bytes
from hpcdeq.problem.training import TrainingProblem

FEW, MORE = 2, 6  # samples that are measured
GIB = 2.0**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside a ``with`` block that are alive at once.

    Attributes
    ----------
    peak
        The most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in given:
                    self._known.add(key)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self._now)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def fitting_chunk_size(problem: TrainingProblem, costs: np.ndarray, budget: float, *, products: bool) -> int:
    """Return the largest chunk size, at most the problem's own, whose work fits into a rank's memory on every rank.

    Collective on the problem's comm. Whichever samples come together, the costliest of each rank are taken to.

    Parameters
    ----------
    costs
        ``(b,)`` cost of each of this rank's samples, to which its memory is taken to be proportional.
    budget
        Bytes that a rank may hold, what it holds now included.
    products
        Whether curvature products are taken, too.

    Raises
    ------
    OptionError
        Not even one sample fits on some rank.
    """
    size, p, held = problem.visits.chunk_size, problem.initial(), process_bytes()
    fixed, rate = problem.agreed(lambda: _measured(problem, p, costs, products))
    # Of the k costliest samples together; none where there are none.
    most = held + fixed + rate * np.cumsum(np.sort(costs)[::-1][:size])
    fits = int((most <= budget).sum())
    size, needed = size if fits == len(most) else fits, float(most[:1].sum())
    size = -int(parallel.max_over_ranks(problem.comm, -size))
    needed = parallel.max_over_ranks(problem.comm, needed)
    if size < 1:
        raise OptionError(
            f"--memory-per-rank {budget / GIB:.3g}: a rank needs {needed / GIB:.3g} GiB to work on its largest sample: give that"
            " much, or use more ranks, which hold less of the data each",
            agreed=True,
        )
    return size


def _measured(problem: TrainingProblem, p: Tensor, costs: np.ndarray, products: bool) -> tuple[float, float]:
    """Return the bytes that work needs besides the samples', and those for a unit of their cost."""
    if not len(costs):
        return 0.0, 0.0
    found = []
    with unnoticed(problem):
        for count in sorted({min(FEW, len(costs)), min(MORE, len(costs))}):
            rows = problem.dataset.offset + np.arange(count)
            with LiveBytes() as live:
                try:
                    problem.local.loss_and_gradient(p, rows)
                    if products:
                        problem.local.product(p, torch.ones_like(p), "gauss_newton", rows)
                except ConvergenceError:  # the first evaluation proper says so
                    pass
            problem.forget()
            found.append((float(costs[:count].sum()), float(live.peak)))
    (cost, peak), (more_cost, more_peak) = found[0], found[-1]
    if more_cost <= cost or more_peak <= peak:
        return 0.0, more_peak / max(more_cost, 1.0)
    rate = (more_peak - peak) / (more_cost - cost)
    return max(peak - rate * cost, 0.0), rate


@contextlib.contextmanager
def unnoticed(problem: TrainingProblem) -> Iterator[None]:
    """Leave counters, remembered states and random numbers as they are, inside a ``with`` block. Not collective."""
    guidance, accounts, device = problem.guidance, problem.accounts, problem.layout.device
    counts = dataclasses.replace(accounts.own)
    cache, guidance.cache = guidance.cache, None
    try:
        with accounts.paused(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        guidance.cache, accounts.own = cache, counts
        for layer in guidance.layers.values():
            layer.take_amplification()
