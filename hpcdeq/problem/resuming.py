"""What a training problem has to remember besides the weights, so that a run goes on as if it had never been stopped."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from hpcdeq import parallel
from hpcdeq.problem.phases import PHASES
from hpcdeq.problem.randomness import random_state, set_random_state
from hpcdeq.problem.rebalancing import moved_boundaries
from hpcdeq.problem.training import TrainingProblem
from hpcdeq.state import Block, Known, State, own_share, rows_of, table

WARM_BYTES = 2**30  # of the fixed points of all ranks that a state may hold


def problem_state(problem: TrainingProblem, warm_bytes: int = WARM_BYTES) -> State:
    """Return counters, clocks, accuracy, random numbers, buffers, shares that were moved, and remembered fixed points.

    Collective on the problem's comm.

    Parameters
    ----------
    warm_bytes
        Fixed points and adjoints that all ranks remember together are part of it as far as they take no more than this.
        Otherwise none is: solves begin cold, and the run goes on within the tolerance of its fixed points.
    """
    comm = problem.comm
    problem.phases.settle()
    layers = list(problem.guidance.layers.values())
    grown = [layer.take_amplification() for layer in layers]
    for layer, amplification in zip(layers, grown, strict=True):
        layer.note_amplification(amplification)
    seconds = parallel.sum_over_ranks(comm, np.array([problem.phases.seconds[name] for name in PHASES])) / comm.size
    return {
        "ranks": comm.size,
        "counts": problem.accounts.state(),
        "seconds": dict(zip(PHASES, seconds.tolist(), strict=True)),
        "left_out": problem.left_out,
        "amplification": parallel.max_over_ranks(comm, max(grown, default=0.0)),
        "accuracy": None if problem.accuracy is None else problem.accuracy.state(),
        "random": Block(random_state(problem.layout.device)),
        "buffers": Block(_buffers(problem)),
        "boundaries": moved_boundaries(problem),
        "warm": _warm_state(problem, warm_bytes),
    }


def restore_problem(problem: TrainingProblem, known: Known) -> list[str]:
    """Go on from a state, after the problem's `begin`; return what could not be taken over, a sentence each.

    Not collective: each rank takes its part. What belongs to a rank (random numbers, buffers that follow its batches) is
    taken over on the same number of ranks. Shares are the business of `hpcdeq.problem.rebalancing`.
    """
    comm, notes = problem.comm, []
    problem.accounts.restore(known["counts"])
    problem.phases.add(known["seconds"])
    problem.left_out = int(known["left_out"])
    for layer in list(problem.guidance.layers.values())[:1]:
        layer.note_amplification(known["amplification"])
    if problem.accuracy is not None and "accuracy" in known:
        problem.accuracy.restore(known["accuracy"])
        problem.guidance.loosened = (problem.accuracy.tolerance,) * 2
    ranks = int(known["ranks"]) if known["ranks"] == comm.size else 0
    random = own_share(known["random"], comm.rank, ranks)
    if random is not None:
        set_random_state(random, problem.layout.device)
    buffers = own_share(known["buffers"], comm.rank, ranks)
    if buffers is not None:
        _set_buffers(problem, buffers)
    _restore_warm(problem, known.get("warm", {}))
    if "left_out_bytes" in known.get("warm", {}):
        notes.append(
            f"the checkpoint left out {known['warm']['left_out_bytes'] / 2**20:.0f} MiB of remembered fixed points"
            " (--checkpoint-cache holds more): solves begin cold"
        )
    return notes


# -------------------------------------------------------------------------------------------------------- buffers


def _changeable(problem: TrainingProblem) -> list[torch.Tensor]:
    return [buffer for _, buffer in problem.model.named_buffers() if not buffer.is_complex()]


def _buffers(problem: TrainingProblem) -> np.ndarray:
    flat = [buffer.detach().double().cpu().reshape(-1) for buffer in _changeable(problem)]
    return torch.cat(flat).numpy() if flat else np.zeros(0)


def _set_buffers(problem: TrainingProblem, values: np.ndarray) -> None:
    start = 0
    for buffer in _changeable(problem):
        part = torch.from_numpy(values[start : start + buffer.numel()].copy())
        buffer.copy_(part.reshape(buffer.shape))
        start += buffer.numel()


# --------------------------------------------------------------------------------------------------- fixed points


def _warm_state(problem: TrainingProblem, warm_bytes: int) -> State:
    """Return the remembered states by the samples' global numbers."""
    cache, comm = problem.guidance.cache, problem.comm
    if cache is None:
        return {}
    size = int(parallel.sum_over_ranks(comm, np.array([cache.bytes], dtype=np.int64))[0])
    if size > warm_bytes:
        return {"left_out_bytes": size}
    own = {key: cache.rows(key) for key in cache.keys()}
    shapes = {key: tuple(next(iter(rows.values())).shape[1:]) for key, rows in own.items()}
    everyone: dict[Any, tuple[int, ...]] = {}  # a rank without samples knows no key
    for other in parallel.of_all_ranks(comm, shapes):
        everyone.update(other)
    found: State = {}
    for number, key in enumerate(sorted(everyone)):
        layer, what, call = key
        rows = {
            problem.dataset.offset + name: row.detach().cpu().reshape(-1).numpy()
            for name, row in own.get(key, {}).items()
        }
        found[str(number)] = {
            "layer": layer,
            "what": what,
            "call": call,
            "shape": np.array(everyone[key], dtype=np.int64),
            **table(rows),
        }
    return found


def _restore_warm(problem: TrainingProblem, known: Known) -> None:
    cache, visits, offset = problem.guidance.cache, problem.visits, problem.dataset.offset
    if cache is None:
        return
    cache.clear()
    for entry in known.values():
        if not isinstance(entry, dict):
            continue
        key: Hashable = (entry["layer"], entry["what"], entry["call"])
        shape = [int(length) for length in entry["shape"]]
        found = rows_of(entry, range(offset, offset + len(problem.dataset)))
        for i in range(visits.chunk_count):
            # As full batches are solved for; other batches put their samples together anew.
            chunk = {
                name: torch.tensor(found[offset + name]).reshape(-1, *shape).to(problem.layout.device)
                for name in visits.chunk(i)
                if offset + name in found
            }
            if chunk:
                cache.remember(key, chunk)
