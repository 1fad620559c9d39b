"""The exceptions of hpcdeq. Each says what, where, how much, and what to type; each knows its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later


class HpcdeqError(Exception):
    """Base of every error that hpcdeq raises on purpose.

    Attributes
    ----------
    agreed
        True once every rank of the communicator is known to raise this error: the launcher may then print it once
        and let all ranks leave in an orderly way. False means that other ranks may still be inside a collective.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str = "", *, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


class UsageError(HpcdeqError):
    """A command line or a call that cannot be carried out as written."""

    exit_code = EXIT_USAGE


class OptionError(UsageError):
    """An option, of hpcdeq or of PETSc, that does not exist or has no valid value."""


class ShapeError(UsageError):
    """Tensors whose shapes do not fit together."""


class DataError(UsageError):
    """A source or dataset file that is missing, damaged or unfit for the task."""


class CheckpointError(HpcdeqError):
    """A saved model or checkpoint that cannot be written or read."""


class ConvergenceError(HpcdeqError):
    """A solve or an optimisation that did not reach its tolerance.

    Attributes
    ----------
    record
        The record of what failed (a ``SolveRecord``, a ``Solution`` or a ``Result``), or None.
    """

    def __init__(self, message: str = "", *, record: object = None, agreed: bool = False) -> None:
        super().__init__(message, agreed=agreed)
        self.record = record


class RankError(HpcdeqError):
    """A failure on another rank, raised here so that no rank waits for one that has left."""


def suggestion(name: str, valid: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """Return what to say of a name that does not exist: the nearest valid one, or else ``otherwise``.

    Not collective.

    Parameters
    ----------
    name, valid
        What was typed, and what could have been.
    otherwise
        What to say where nothing is near.
    prefix
        What stands before a valid name on the command line.
    """
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise
