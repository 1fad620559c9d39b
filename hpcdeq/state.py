"""What a run has to remember to go on, as plain data: nested mappings of numbers, texts and arrays.

A state is a mapping from names to numbers, texts, arrays that are the same on all ranks, `Block`s, and further states. What
is read back has something that can be sliced in place of a `Block`, in global numbers: a rank takes the part that it needs,
on whatever number of ranks there are then. None is left out, and is what a missing name stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

State = dict[str, Any]
Known = Mapping[str, Any]  # a state that was read


@dataclass(frozen=True)
class Block:
    """This rank's part of a vector that is shared out over the ranks, in rank order.

    Attributes
    ----------
    values
        ``(b,)`` numbers; on a rank that has none, of any type.
    """

    values: np.ndarray


class Vector(Protocol):
    """A vector that was read: its length, and any part of it."""

    def __len__(self) -> int:
        """Return the number of entries over all ranks. Not collective."""
        ...

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return some consecutive entries, by their global numbers. Not collective."""
        ...


def whole(vector: Vector) -> np.ndarray:
    """Return all entries of a vector that was read. Not collective."""
    return vector[0 : len(vector)]


def own_share(vector: Vector, rank: int, ranks: int) -> np.ndarray | None:
    """Return what this rank gave to a vector of as many entries from every rank; None where ranks were more or fewer.

    Not collective.

    Parameters
    ----------
    ranks
        How many ranks wrote it; 0 where they are not as many as now.
    """
    if not ranks:
        return None
    size = len(vector) // ranks
    return vector[rank * size : (rank + 1) * size]


def table(rows: Mapping[int, np.ndarray]) -> State:
    """Return rows of different lengths, each on one rank alone, as a state. Not collective.

    Parameters
    ----------
    rows
        This rank's, by numbers that no other rank has.
    """
    keys = sorted(rows)
    values = [rows[key].reshape(-1) for key in keys]
    return {
        "keys": Block(np.array(keys, dtype=np.int64)),
        "lengths": Block(np.array([len(row) for row in values], dtype=np.int64)),
        "values": Block(np.concatenate(values) if values else np.zeros(0)),
    }


def rows_of(known: Known, wanted: Iterable[int]) -> dict[int, np.ndarray]:
    """Return those of some rows of a `table` that it has, by their numbers. Not collective."""
    keys, lengths = whole(known["keys"]), whole(known["lengths"])
    ends = np.cumsum(lengths)
    places = np.flatnonzero(np.isin(keys, np.fromiter(wanted, dtype=np.int64)))
    found: dict[int, np.ndarray] = {}
    # What lies together is read together.
    for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []:
        start = int(ends[run[0]] - lengths[run[0]])
        values = known["values"][start : int(ends[run[-1]])]
        for place in run:
            end = int(ends[place]) - start
            found[int(keys[place])] = values[end - int(lengths[place]) : end]
    return found
