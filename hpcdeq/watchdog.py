"""No rank waits for ever: a watch on its progress turns a hung collective into tracebacks and the end of the job.

Each rank watches itself, without MPI. Collectives that have ended and chunks of samples that were worked on are progress
(`beat`). After a time without any, a thread writes where all threads of the process are, and ends it, so that the launcher
ends the job. PETSc's calls keep Python's threads from running while they wait: for these a timer of the system counts the
time that the process computes (a rank that waits for others computes), and a handler in C does the same.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType

from hpcdeq.commands import rank_of_environment
from hpcdeq.errors import EXIT_FAILED, OptionError

HANG_SECONDS = 1800.0
VARIABLE = "HPCDEQ_HANG_SECONDS"
GRACE = 5.0  # seconds that the other ranks have for their tracebacks
POLLS = 20  # looks at the progress before the time is up
LONGEST_POLL = 1.0
SPEAKERS = 2  # ranks of a host, the first ones, that ask the others for their tracebacks

_beats = 0
_active: Watchdog | None = None


def beat() -> None:
    """Note that this rank has made progress. Not collective."""
    global _beats
    _beats += 1


def hang_seconds(given: float | None = None, default: float = 0.0) -> float:
    """Return the time without progress after which a rank is ended: what is given, or the environment's, or a default.

    Not collective.

    Raises
    ------
    OptionError
        The environment's is no number, or negative.
    """
    text = os.environ.get(VARIABLE)
    if given is not None or text is None:
        return default if given is None else given
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise OptionError(f"{VARIABLE}={text}: give seconds, or 0 to let ranks wait for ever")
    return seconds


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Watch the progress of this rank inside a ``with`` block; inside another such block, do nothing.

    Not collective.

    Parameters
    ----------
    seconds
        Without progress, after which the process is ended; 0: never.
    """
    global _active
    if not seconds or _active is not None:
        yield
        return
    _active = Watchdog(seconds)
    try:
        with _active:
            yield
    finally:
        _active = None


class Watchdog:
    """The watch of one rank, inside a ``with`` block. Not collective, every method.

    Parameters
    ----------
    seconds
        Without progress, after which the process is ended.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._poll = min(seconds / POLLS, LONGEST_POLL)
        self._leave = threading.Event()
        self._before: object = None
        # No process computes more seconds than its threads have: the timer never counts faster than a clock does.
        threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        self._computing = seconds * (1 + (int(threads) if threads.isdecimal() else os.cpu_count() or 1))
        rank = rank_of_environment()
        self._who = f"{'this process' if rank is None else f'rank {rank}'} on {socket.gethostname()}"
        self._thread = threading.Thread(target=_called(self._who, self._watch), daemon=True)

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        self._before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # what is left once this rank has told
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        faulthandler.register(signal.SIGPROF, file=2, all_threads=True, chain=True)  # and then the process is ended
        signal.setitimer(signal.ITIMER_PROF, self._computing)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Watch no more."""
        self._leave.set()
        self._thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        faulthandler.unregister(signal.SIGPROF)
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, self._before)  # type: ignore[arg-type]

    def _watch(self) -> None:
        seen, idle, last = _beats, 0.0, time.monotonic()
        while not self._leave.wait(self._poll):
            now = time.monotonic()
            if _beats != seen:
                seen, idle = _beats, 0.0
                signal.setitimer(signal.ITIMER_PROF, self._computing)
            else:  # a process that was stopped, or a whole job that was suspended, has not waited all that time
                idle += min(now - last, 2 * self._poll)
            last = now
            if idle >= self.seconds:
                self._end(idle)

    def _end(self, idle: float) -> None:
        """Write where this process is, ask those beside it for the same, and end it."""
        text = (
            f"\n{self._who}: no progress for {idle:.0f} s. It hangs, waits for another rank that does, or works on one step for"
            f" longer (--hang-seconds, {VARIABLE} allow more; 0: for ever). Where its threads are:\n"
        )
        os.write(2, text.encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        faulthandler.unregister(signal.SIGUSR2)
        beside = siblings()
        if os.getpid() in sorted([os.getpid(), *beside])[:SPEAKERS]:
            for pid in beside:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGUSR2)
        self._leave.wait(GRACE)
        os._exit(EXIT_FAILED)


def siblings() -> list[int]:
    """Return the processes that run the same command and have the same parent: the other ranks of this host.

    Not collective. None are known where the system does not tell.
    """

    def command(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()

    if rank_of_environment() is None:
        return []
    own, found = os.getpid(), []
    for children in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in children.read_text().split()]
    with contextlib.suppress(OSError):
        return [pid for pid in found if pid != own and command(pid) == command(own)]
    return []


def _called(name: str, function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that does the same under another name, which tracebacks show: those in C show nothing else."""

    def stand_in() -> None:
        function()

    return FunctionType(stand_in.__code__.replace(co_name=name), {}, closure=stand_in.__closure__)
