"""What comes before PETSc, MPI or torch are imported: the command line's PETSc options, the life of workers and of ranks."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import threading
import time
from pathlib import Path

from hpcdeq.errors import EXIT_FAILED

# `hpcdeq.petsc` initialises PETSc with these; a command fills them in before it imports anything of PETSc's.
PETSC_ARGUMENTS: list[str] = []

# When this process began, but for the start of Python: what a wall-time limit counts from.
STARTED = time.monotonic()

# A launcher of MPI's gives one of these to each rank, and has none itself.
LAUNCHED = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
LOOK_SECONDS = 1.0  # from one look at the launcher to the next
LEAVE_SECONDS = 5.0  # that the other ranks have to notice that it is gone, before one of them leaves

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


def leave_with_launcher() -> None:
    """End this rank soon after its launcher is gone, even if that was killed outright; do nothing without a launcher.

    Not collective. Ranks without a launcher go on as if nothing had happened: nobody sees what they write, and nothing ends
    them, while the run may have been begun again.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return
    line = _ancestors()

    def watch() -> None:
        while _ancestors() == line:
            time.sleep(LOOK_SECONDS)
        # The first rank that leaves lets the others wait within a collective, where PETSc keeps this thread from running. All
        # of them look again before that, and then are ended by a timer that needs no thread of Python's.
        silence = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True, file=silence)
        time.sleep(2 * LEAVE_SECONDS)
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, daemon=True).start()


def _ancestors() -> list[int]:
    """Return the processes between this one and its launcher, the launcher included, as far as the system tells."""
    found = [os.getppid()]
    while _is_of_a_rank(found[-1]):
        try:
            stat = Path(f"/proc/{found[-1]}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            break
        found.append(int(stat.rpartition(")")[2].split()[1]))
    return found


def _is_of_a_rank(pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(entry.partition(b"=")[0].decode("ascii", "replace") in LAUNCHED for entry in environment)
