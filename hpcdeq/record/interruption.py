"""What may end a run before it is done: signals, and the wall-time limit of its job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ASK_SECONDS = 10.0  # that squeue may take to answer


class Signals:
    """Notes the first SIGTERM or SIGUSR1 inside a ``with`` block; the second one ends the process at once.

    Not collective. A signal may reach one rank or all of them: they agree at the next safe point.

    Parameters
    ----------
    speak
        Say on the standard error that the signal has been noted.

    Attributes
    ----------
    caught
        Number of the signal; 0 before any.
    """

    def __init__(self, *, speak: bool = True) -> None:
        self.caught = 0
        self._speak = speak
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        """Begin to listen. Not collective."""
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave signals to whoever listened before. Not collective."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        # From here on the system ends the process, even inside a long call of a library that no Python handler interrupts.
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._speak:
            text = f"{signal.Signals(number).name}: stopping at the next safe point; once more stops at once\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())


def seconds_left(environment: Mapping[str, str], wall_seconds: float | None, used: float) -> float | None:
    """Return how many seconds this job may go on; None where that is not known, or there is no limit.

    Not collective: one rank asks.

    Parameters
    ----------
    environment
        Of the process: inside a job of Slurm's its end is asked for.
    wall_seconds
        A limit that was given, counted from the start of this process.
    used
        Seconds since then.
    """
    limits = [] if wall_seconds is None else [wall_seconds - used]
    end = environment.get("SLURM_JOB_END_TIME", "")
    job = environment.get("SLURM_JOB_ID", "")
    if end.isdecimal():
        limits.append(int(end) - time.time())
    elif job:
        told = _ask_slurm(job)
        if told is not None:
            limits.append(told)
    return min(limits, default=None)


def _ask_slurm(job: str) -> float | None:
    command = ["squeue", "-h", "-j", job, "-o", "%L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return slurm_seconds(done.stdout.strip())


def slurm_seconds(text: str) -> float | None:
    """Return the seconds of a time as Slurm writes it, ``[days-][[hours:]minutes:]seconds``; None for anything else.

    Not collective.
    """
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) > 3 or (dash and not days.isdecimal()):
        return None
    total = 0
    for part in parts:
        total = 60 * total + int(part)
    return float(total + 86400 * int(days or 0))
