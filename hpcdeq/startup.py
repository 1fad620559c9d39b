"""What comes before PETSc, MPI or torch are imported: the command line's PETSc options, and the life of workers."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
import time

# `hpcdeq.petsc` initialises PETSc with these; a command fills them in before it imports anything of PETSc's.
PETSC_ARGUMENTS: list[str] = []

# When this process began, but for the start of Python: what a wall-time limit counts from.
STARTED = time.monotonic()

_OPTION = re.compile(r"-[a-zA-Z]\w+\Z")


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into hpcdeq's own arguments (double dash, positional) and PETSc's (single dash).

    Not collective. A PETSc option takes the next word as its value unless that begins an option itself; a negative
    number does not.
    """
    own: list[str] = []
    petsc: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not _OPTION.match(word) or word.startswith("--"):
            own.append(word)
            continue
        petsc.append(word)
        if words and not _OPTION.match(words[0]) and not words[0].startswith("--"):
            petsc.append(words.pop(0))
    return own, petsc


def leave_with_parent() -> None:
    """End this worker process as soon as the process that started it is gone, even if that was killed outright.

    Not collective. An idle worker would wait for its next task for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
