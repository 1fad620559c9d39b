"""Files that are there whole or not at all, and what to say of one that cannot be written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hpcdeq.errors import HpcdeqError


@contextlib.contextmanager
def replaced(path: Path, former: Path | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to ``path`` at the end of the block, in one step.

    Not collective: one rank writes. The data are on the disk before the rename. After an exception the temporary file
    is removed, and what was at ``path`` before is still there.

    Parameters
    ----------
    former
        Where what was at ``path`` goes on; None: it is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _synchronise(temporary)
        if former is not None and path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _synchronise(path.parent)


def cannot_write(path: Path, error: OSError) -> HpcdeqError:
    """Return the error for a file that cannot be written. Not collective."""
    return HpcdeqError(f"cannot write {path}: {error.strerror}; is the disk or the quota full?")


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
