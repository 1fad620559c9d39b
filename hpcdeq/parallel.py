"""Every MPI call of hpcdeq, named by its meaning.

Three rules keep a job from hanging. Ranks agree on failure before they go on (`agree`, `agreement`). What only one
rank can know (the clock, a file that was written) is decided there and told to all (`from_root`). An error that the
other ranks cannot know of ends the job (`launch`).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar, cast

import numpy as np
from mpi4py import MPI

from hpcdeq.errors import EXIT_DONE, EXIT_FAILED, HpcdeqError, RankError
from hpcdeq.startup import leave_with_launcher, leave_with_parent
from hpcdeq.traffic import count
from hpcdeq.watchdog import beat

T = TypeVar("T")
Comm = MPI.Intracomm

WORLD: Comm = MPI.COMM_WORLD
SELF: Comm = MPI.COMM_SELF


def sum_over_ranks(comm: Comm, values: np.ndarray) -> np.ndarray:
    """Return the element-wise sum of every rank's array.

    Collective on comm. The same bits come out on every rank.
    """
    total = np.ascontiguousarray(values)
    if comm.size > 1:
        total = total.copy()
        count("allreduce", total)
        comm.Allreduce(MPI.IN_PLACE, total, op=MPI.SUM)
        beat()
    return total


def sum_or_raise(comm: Comm, values: np.ndarray, error: BaseException | None) -> np.ndarray:
    """Return the sum of every rank's float64 array, or raise on every rank if any rank holds an error.

    Collective on comm. One reduction when all is well: the failure count travels with the numbers.
    """
    if comm.size == 1 and error is None:
        return values
    total = sum_over_ranks(comm, np.append(values, float(error is not None)))
    if total[-1] > 0:
        agree(comm, error)
    return total[:-1]


def _extreme(comm: Comm, value: float, op: MPI.Op) -> float:
    """Return the largest or least of every rank's numbers, as they are: no object is packed."""
    if comm.size == 1:
        return value
    found = np.array([value], np.float64)
    count("allreduce", found)
    comm.Allreduce(MPI.IN_PLACE, found, op=op)
    beat()
    return float(found[0])


def max_over_ranks(comm: Comm, value: float) -> float:
    """Return the largest of every rank's numbers. Collective on comm."""
    return _extreme(comm, value, MPI.MAX)


def any_rank(comm: Comm, flag: bool) -> bool:
    """Say whether the flag is set on any rank. Collective on comm."""
    return bool(_extreme(comm, float(flag), MPI.MAX))


def from_root(comm: Comm, value: T) -> T:
    """Return rank 0's value on every rank. Collective on comm."""
    if comm.size > 1:
        count("broadcast", value)
    beat()
    return comm.bcast(value, root=0)


def to_root(comm: Comm, value: T) -> list[T]:
    """Return every rank's value on rank 0, in rank order; nothing elsewhere. Collective on comm."""
    return comm.gather(value, root=0) or []


def of_all_ranks(comm: Comm, value: T) -> list[T]:
    """Return every rank's value, in rank order, on every rank. Collective on comm."""
    return comm.allgather(value)


def largest_over_ranks(comm: Comm, values: np.ndarray) -> np.ndarray:
    """Return the element-wise maximum of every rank's array. Collective on comm."""
    if comm.size == 1:
        return values
    largest = np.ascontiguousarray(values).copy()
    comm.Allreduce(MPI.IN_PLACE, largest, op=MPI.MAX)
    beat()
    return largest


def blocks_to_root(comm: Comm, block: np.ndarray, shapes: list[tuple[int, str]]) -> Iterator[np.ndarray]:
    """Yield every rank's array on rank 0, in rank order, one at a time; nothing elsewhere.

    Collective on comm. Rank 0 holds one array of another rank at once. It has to take all of them: the others wait until
    theirs is taken.

    Parameters
    ----------
    shapes
        On rank 0: length and type (``dtype.str``) of every rank's array, as `to_root` has found them.
    """
    if comm.rank:
        if len(block):
            comm.Send(np.ascontiguousarray(block), dest=0)
        return
    for rank, (length, dtype) in enumerate(shapes):
        if rank and length:
            other = np.empty(length, dtype=dtype)
            comm.Recv(other, source=rank)
            beat()
            yield other
        elif length:
            yield block


def counts_of_ranks(comm: Comm, count: int) -> list[int]:
    """Return every rank's count, in rank order, on every rank. Collective on comm."""
    return comm.allgather(count)


def gather_blocks(comm: Comm, block: np.ndarray, sizes: list[int], out: np.ndarray) -> np.ndarray:
    """Join every rank's block of floating numbers into ``out``, the same on all ranks.

    Collective on comm. ``sizes`` are the block lengths in rank order; ``out`` has their sum, and the blocks' type.
    """
    if comm.size == 1:
        out[:] = block
        return out
    count("allgather", out)
    comm.Allgatherv(np.ascontiguousarray(block), [out, sizes])
    beat()
    return out


def sum_and_scatter(comm: Comm, values: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Sum every rank's full array of float64 and return this rank's block of the sum.

    Collective on comm. ``sizes`` are the block lengths in rank order; ``values`` has their sum.
    """
    if comm.size == 1:
        return values.copy()
    out = np.empty(sizes[comm.rank])
    count("reduce_scatter", values)
    comm.Reduce_scatter([np.ascontiguousarray(values), MPI.DOUBLE], [out, MPI.DOUBLE], recvcounts=sizes, op=MPI.SUM)
    beat()
    return out


def agree(comm: Comm, error: BaseException | None) -> None:
    """Raise on every rank if any rank holds an error.

    Collective on comm. One integer reduction when all is well. Otherwise the lowest failing rank's error is raised
    everywhere, as a new object of its class with its message (and, where it came from, the original as its cause).

    Raises
    ------
    HpcdeqError
        The agreed error, its ``agreed`` set; an error of another class becomes a `RankError`. On a single rank, the error
        itself.
    """
    first = int(_extreme(comm, comm.rank if error is not None else comm.size, MPI.MIN))
    if first == comm.size:
        return
    if comm.size == 1:
        assert error is not None
        if isinstance(error, HpcdeqError):
            error.agreed = True
        raise error
    told = None
    if comm.rank == first:
        assert error is not None
        if isinstance(error, HpcdeqError):
            told = (type(error), str(error))
        else:
            told = (RankError, foreign_error(error))
    kind, message = comm.bcast(told, root=first)
    if not re.search(rf"\brank {first}\b", message) and any_other_rank_fine(comm, error):
        message = f"rank {first}: {message}"
    raised = kind(message)
    raised.agreed = True
    if isinstance(error, HpcdeqError) and comm.rank == first:
        raised.__dict__.update({k: v for k, v in vars(error).items() if k != "agreed"})
    raise raised from error


def only_root(comm: Comm, compute: Callable[[], T]) -> T:
    """Return on every rank what rank 0 alone computes, or raise on every rank what it raised.

    Collective on comm. ``compute`` must not communicate.

    Raises
    ------
    HpcdeqError
        The agreed error, its ``agreed`` set; any other error stays rank 0's own, and ends the job.
    """
    value: T | None = None
    error: tuple[type[HpcdeqError], str] | None = None
    if comm.rank == 0:
        try:
            value = compute()
        except HpcdeqError as raised:
            error = (type(raised), str(raised))
    value, error = comm.bcast((value, error), root=0)
    if error is not None:
        kind, message = error
        agreed = kind(message)
        agreed.agreed = True
        raise agreed
    return cast(T, value)


def foreign_error(error: BaseException) -> str:
    """Return what to tell the other ranks of an error that is not hpcdeq's own. Not collective."""
    if os.environ.get("HPCDEQ_TRACEBACK"):
        return "".join(traceback.format_exception(error)).rstrip()
    place = traceback.extract_tb(error.__traceback__)
    where = f" (at {place[-1].filename}:{place[-1].lineno}; HPCDEQ_TRACEBACK=1 shows how it got there)" if place else ""
    notes = getattr(error, "__notes__", [])
    lines = traceback.format_exception_only(error)
    told = lines[len(lines) - 1 - sum(note.count("\n") + 1 for note in notes)].strip()
    return ". ".join([told + where, *notes])


def any_other_rank_fine(comm: Comm, error: BaseException | None) -> bool:
    """Say whether some rank has no error, so that naming the rank tells something. Collective on comm."""
    return comm.allreduce(int(error is None), op=MPI.SUM) > 0


@contextlib.contextmanager
def agreement(comm: Comm) -> Iterator[None]:
    """Run a local block, then agree on whether it failed anywhere.

    Collective on comm at exit. The block itself must not communicate: a rank that fails inside leaves early.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    agree(comm, error)


@contextlib.contextmanager
def workers(comm: Comm, processes: int) -> Iterator[Executor | None]:
    """Give rank 0 an executor over the other ranks, or over local processes on one rank; None on the other ranks.

    Collective on comm.
    """
    if comm.size > 1:
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor(comm, root=0) as executor:
            yield cast(Executor | None, executor)
    else:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn, initializer=leave_with_parent) as executor:
            yield executor


def own_slice(total: int, rank: int, size: int) -> slice:
    """Return the contiguous share of ``total`` items that belongs to ``rank``; shares differ by one at most.

    Not collective.
    """
    return slice(total * rank // size, total * (rank + 1) // size)


def launch(main: Callable[[list[str]], int | None], arguments: list[str]) -> None:
    """Run a command's ``main`` on every rank and leave with its exit code.

    Collective on MPI.COMM_WORLD. An error that all ranks agreed on is printed once, by rank 0. Any other error is
    printed by the rank that has it, and the whole job is ended: the other ranks may be waiting for this one.
    """
    leave_with_launcher()
    code: int = EXIT_FAILED
    try:
        code = main(arguments) or EXIT_DONE
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else (EXIT_DONE if leave.code is None else EXIT_FAILED)
        if isinstance(leave.code, str):
            sys.stderr.write(f"{leave.code}\n")
    except Exception as error:
        cause = unwrap(error)
        known = isinstance(cause, HpcdeqError)
        code = cause.exit_code if isinstance(cause, HpcdeqError) else EXIT_FAILED
        agreed = isinstance(cause, HpcdeqError) and cause.agreed
        if WORLD.rank == 0 or not agreed:
            report_error(cause, known)
        if not agreed and WORLD.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            WORLD.Abort(code)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # what would be stopped has ended, and has a code of its own
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def unwrap(error: BaseException) -> BaseException:
    """Return what a callback raised, where PETSc wrapped it in an error of its own. Not collective."""
    while type(error).__module__.startswith("petsc4py") and error.__cause__ is not None:
        error = error.__cause__
    return error


def report_error(error: BaseException, known: bool) -> None:
    """Print an error for a person to read, with the traceback where it is not one of ours. Not collective."""
    where = f"[rank {WORLD.rank}] " if WORLD.size > 1 and not getattr(error, "agreed", False) else ""
    if known and not os.environ.get("HPCDEQ_TRACEBACK"):
        text = f"{where}{type(error).__name__}: {error}\n"
    else:
        text = where + "".join(traceback.format_exception(error))
    sys.stderr.write(text)
    sys.stderr.flush()


def mpi_library() -> str:
    """Return the name and version of the MPI library in use. Not collective."""
    return MPI.Get_library_version().splitlines()[0].split(", package")[0].strip("\x00 ")


def some_ranks(comm: Comm, chosen: bool) -> Comm | None:
    """Return a communicator of the ranks that are chosen, on them; None on the others. Collective on comm."""
    found = comm.Split(0 if chosen else MPI.UNDEFINED, comm.rank)
    return None if found == MPI.COMM_NULL else cast(Comm, found)


def ranks_on_this_host(comm: Comm) -> int:
    """Return how many ranks of comm share this host's memory. Collective on comm."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    size = node.size
    node.Free()
    return size


def first_on_this_host(comm: Comm) -> bool:
    """Say whether this rank is the lowest of its host. Collective on comm."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = node.rank == 0
    node.Free()
    return first


def cores_of_rank(comm: Comm) -> int:
    """Return how many cores this rank may keep busy: those it is bound to, or its share of the host's.

    Collective on comm.
    """
    try:
        own = frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        own = frozenset(range(os.cpu_count() or 1))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    everyone = node.allgather(own)
    node.Free()
    sharing = sum(1 for cores in everyone if cores & own)
    return max(1, len(own) // sharing)
