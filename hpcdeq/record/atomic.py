"""Files that are there whole or not at all, and what to say of one that cannot be written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hpcdeq.errors import CheckpointError, HpcdeqError


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


def cut_table(path: Path, rows: int) -> None:
    """Leave a table of lines with its header and some first rows, by an atomic replacement.

    Not collective.

    Raises
    ------
    HpcdeqError
        It has fewer rows, or cannot be written.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if len(lines) < rows + 1:
            raise CheckpointError(
                f"{path} has {max(len(lines) - 1, 0)} rows, fewer than the {rows} that were there at the checkpoint: put back"
                " what is missing, or begin again with another --out"
            )
        with replaced(path) as temporary:
            temporary.write_text("".join(lines[: rows + 1]), encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: put it back, or begin again with another --out") from error
    except OSError as error:
        raise cannot_write(path, error) from error


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
