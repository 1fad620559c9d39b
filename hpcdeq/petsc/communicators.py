"""PETSc's private copies of communicators."""

from __future__ import annotations

from hpcdeq.parallel import Comm
from hpcdeq.petsc import PETSc

_anchors: dict[int, PETSc.Vec] = {}


def anchor(comm: Comm) -> None:
    """Keep PETSc's copy of a communicator alive for the rest of the process.

    Collective on comm. PETSc copies a communicator, collectively, for the first object on it, and frees the copy with the
    last. Python frees objects when its garbage collector comes around, at another time on each rank: one rank may then
    wait for the others to copy what they still have. An object that is never freed rules that out.
    """
    if comm.handle not in _anchors:
        _anchors[comm.handle] = PETSc.Vec().createMPI((0, 0), comm=comm)
