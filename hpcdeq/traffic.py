"""What ranks hand to collectives, counted where somebody asks for it: calls and bytes of each kind."""

from __future__ import annotations

import contextlib
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Traffic:
    """What one rank has handed to collectives, by their kind.

    Attributes
    ----------
    calls
        How often each kind was called.
    bytes
        Of the arrays that they worked on: of a sum its array, of a gathered or scattered vector the whole; of Python objects
        their pickled size.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


_traffic: list[Traffic] = []  # those that count at present


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this rank hands to collectives inside a ``with`` block. Not collective.

    PETSc's own reductions (inner products and norms of its vectors) are not among them: PETSc counts those.
    """
    own = Traffic()
    _traffic.append(own)
    try:
        yield own
    finally:
        _traffic.remove(own)


def count(kind: str, content: object) -> None:
    """Count a call of a collective, and the bytes of what it works on. Not collective."""
    for traffic in _traffic:
        traffic.calls[kind] += 1
        size = content.nbytes if isinstance(content, np.ndarray) else len(pickle.dumps(content))
        traffic.bytes[kind] += size
