"""Arrays that the rows of several files are read into, end to end: what is read apart need not be copied together."""

from __future__ import annotations

from collections.abc import Mapping

import h5py
import numpy as np

from hpcdeq.data.graphs import EDGE_FIELDS, NODE_FIELDS

GRAPH = "/graph/"


class Room:
    """Memory for the inputs of some stretches of rows.

    Not collective, every method.

    Parameters
    ----------
    lengths
        Rows of each dataset over all stretches, by its name.
    like
        A file that has these datasets, of the types and trailing shapes that all files have.

    Attributes
    ----------
    arrays
        By the names of their datasets.
    """

    def __init__(self, lengths: dict[str, int], like: h5py.File) -> None:
        self.arrays = {
            name: np.empty((length, *like[name].shape[1:]), like[name].dtype) for name, length in lengths.items()
        }
        self._used = dict.fromkeys(lengths, 0)

    def place(self, name: str, count: int) -> np.ndarray:
        """Return the next rows of an array."""
        start = self._used[name]
        self._used[name] = start + count
        return self.arrays[name][start : start + count]

    def graph_fields(self) -> dict[str, np.ndarray]:
        """Return the arrays by the names that `GraphArrays` has for them, floating ones in its types."""
        kinds = {GRAPH + name: np.dtype(kind) for name, kind in (NODE_FIELDS | EDGE_FIELDS).items()}
        return {
            name.removeprefix(GRAPH): values.astype(kinds[name], copy=False) if kinds[name].kind == "f" else values
            for name, values in self.arrays.items()
        }


def inputs_of(file: h5py.File) -> dict[str, tuple[str, np.dtype]]:
    """Return the datasets of a file that hold inputs, each with the offsets that it goes by and its type.

    Not collective.
    """
    if "/array/x" in file:
        return {"/array/x": ("", file["/array/x"].dtype)}
    kinds = [("node", name) for name in NODE_FIELDS] + [("edge", name) for name in EDGE_FIELDS]
    return {
        GRAPH + name: (f"{GRAPH}{kind}_offset", file[GRAPH + name].dtype)
        for kind, name in kinds
        if GRAPH + name in file
    }


def lengths_of(file: h5py.File, inputs: Mapping[str, tuple[str, np.dtype]], start: int, stop: int) -> dict[str, int]:
    """Return how many rows of each dataset the samples ``start`` to ``stop - 1`` have.

    Not collective.

    Parameters
    ----------
    inputs
        The datasets, as `inputs_of` gives them.
    """
    found = {}
    ends = {offset: [int(file[offset][row]) for row in (start, stop)] for offset, _ in inputs.values() if offset}
    for name, (offset, _) in inputs.items():
        if offset:  # which is not checked yet
            first, last = (min(max(end, 0), file[name].shape[0]) for end in ends[offset])
            found[name] = max(last - first, 0)
        else:
            found[name] = stop - start
    return found
