"""Whether the disk has room for what a run will keep, asked before hours are spent on it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq import parallel
from hpcdeq.errors import CheckpointError
from hpcdeq.record.checkpoint import LATEST, PREVIOUS
from hpcdeq.state import Block, State

AT_ONCE = 3  # files: the latest, the one before, and the next in the making
MIB = 2.0**20


def check_space(folder: Path, state: State, comm: parallel.Comm) -> None:
    """Refuse to begin where the checkpoints of a run do not fit onto the disk.

    Collective on comm. What a later state holds more (pairs of L-BFGS) and quotas are not known here.

    Parameters
    ----------
    folder
        Where they go.
    state
        The first of them.

    Raises
    ------
    CheckpointError
        On all ranks; says how much is missing.
    """
    shared = _bytes(state, blocks=False) if comm.rank == 0 else 0
    size = int(parallel.sum_over_ranks(comm, np.array([_bytes(state, blocks=True) + shared], dtype=np.int64))[0])

    def ask() -> None:
        there = sum((folder / name).exists() for name in (LATEST, PREVIOUS))
        needed, free = (AT_ONCE - there) * size, shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"the disk of {folder} has {free / MIB:.1f} MiB left, and the checkpoints of this run need {needed / MIB:.1f} MiB"
                f" ({AT_ONCE - there} of {size / MIB:.1f} MiB): make room, or choose another --out"
            )

    parallel.only_root(comm, ask)


def _bytes(state: Mapping[str, Any], *, blocks: bool) -> int:
    """Return the size of all of this rank's blocks in a state, or of all arrays that every rank has."""
    total = 0
    for value in state.values():
        if isinstance(value, Mapping):
            total += _bytes(value, blocks=blocks)
        elif isinstance(value, Block) and blocks:
            total += value.values.nbytes
        elif isinstance(value, np.ndarray) and not blocks:
            total += value.nbytes
    return total
