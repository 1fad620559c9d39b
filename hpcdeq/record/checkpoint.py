"""The complete state of a run in one HDF5 file: written by rank 0 block by block, read by each rank in parts.

A file begins with 512 bytes of text (HDF5's user block) that hold the SHA-256 of all that follows: what is truncated or
damaged anywhere is refused. A line of its own in it tells the ``work`` done so far, to scripts that read no HDF5. Root
attributes: ``format = "hpcdeq-checkpoint"``, ``version``. Nested mappings are groups, numbers and texts their attributes, arrays
their datasets; a vector that was shared out over the ranks is one dataset in rank order (``distributed = true``).
``checkpoint.h5`` is the latest one, ``checkpoint-previous.h5`` the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcdeq import parallel
from hpcdeq.data.new_file import NewFile
from hpcdeq.errors import CheckpointError
from hpcdeq.record.atomic import replaced
from hpcdeq.state import Block, Known, State

FORMAT = "hpcdeq-checkpoint"
VERSION = 1
LATEST, PREVIOUS = "checkpoint.h5", "checkpoint-previous.h5"
HEADER = 512  # bytes of the user block, the least that HDF5 allows
MAGIC = b"hpcdeq-checkpoint sha256 "
_READ = 1 << 22  # bytes at once
_TROUBLE = (OSError, RuntimeError, TypeError, ValueError)  # what h5py raises where a file cannot be written or read


class CheckpointWarning(UserWarning):
    """A checkpoint that cannot be used, where another one can."""


# ------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(folder: Path, state: State, comm: parallel.Comm, work: int = 0) -> None:
    """Write a state as the latest checkpoint of a run's folder; the one that was the latest is kept as the previous.

    Collective on comm. Rank 0 writes, and holds one block of another rank at a time.

    Parameters
    ----------
    state
        The same names on all ranks, and the same values but for `Block`s.
    work
        A number that grows whenever the run comes further.

    Raises
    ------
    CheckpointError
        The file cannot be written, on all ranks; the former checkpoints are still there.
    """
    path = folder / LATEST
    error = None
    try:
        with replaced(path, folder / PREVIOUS) if comm.rank == 0 else contextlib.nullcontext(path) as temporary:
            _Writer(temporary, comm, work).write(state)
    except OSError as raised:
        left = "the former one is still there" if path.exists() else "there is none yet"
        error = CheckpointError(
            f"the checkpoint {path} cannot be written ({_first_line(raised)}); {left}. Is the disk or the quota full, or the"
            " folder read-only? Mend that, and go on with --resume"
        )
        error.__cause__ = raised
    parallel.agree(comm, error)


class _Writer:
    """One file in the making. What goes wrong on rank 0 is told at the end: the other ranks hand over all the same.

    Parameters
    ----------
    path
        The file, on rank 0.
    comm
        All of its ranks make one.
    work
        Told in the header.
    """

    def __init__(self, path: Path, comm: parallel.Comm, work: int) -> None:
        self.path = path
        self.comm = comm
        self.work = work
        self._new: NewFile | None = None
        self._file: h5py.File | None = None
        self._error: Exception | None = None

    def write(self, state: State) -> None:
        """Write a state and seal the file.

        Collective on comm.

        Raises
        ------
        OSError
            On rank 0.
        """
        self._attempt(self._open)
        for name, value in _entries(state):
            if isinstance(value, Block):
                self._write_vector(name, value.values)
            else:
                self._attempt(self._write_value, name, value)
        if self._new is not None:
            try:
                self._new.close()
            except _TROUBLE as error:
                self._error = self._error or error
        self._attempt(self._seal)
        if self._error is not None:
            raise OSError(_first_line(self._error)) from self._error

    def _attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        """Do a part of the writing on rank 0, unless one before has failed."""
        if self.comm.rank == 0 and self._error is None:
            try:
                write(*arguments)
                if self._new is not None:
                    self._new.check()
            except _TROUBLE as error:
                self._error = error

    def _open(self) -> None:
        self._new = NewFile(self.path, userblock_size=HEADER, libver="latest")
        self._file = self._new.hdf5
        self._file.attrs.update({"format": FORMAT, "version": VERSION})

    def _write_value(self, name: str, value: Any) -> None:
        assert self._file is not None
        if isinstance(value, np.ndarray):
            self._file.create_dataset(name, data=value)
        else:
            group, _, last = name.rpartition("/")
            self._file.require_group(group or "/").attrs[last] = value

    def _write_vector(self, name: str, own: np.ndarray) -> None:
        shapes = parallel.to_root(self.comm, (len(own), own.dtype.str))
        self._attempt(self._make_vector, name, shapes)
        start = 0
        for part in parallel.blocks_to_root(self.comm, own, shapes):
            self._attempt(self._write_part, name, start, part)
            start += len(part)

    def _make_vector(self, name: str, shapes: list[tuple[int, str]]) -> None:
        assert self._file is not None
        kind = next((dtype for length, dtype in shapes if length), "<f8")
        vector = self._file.create_dataset(name, (sum(length for length, _ in shapes),), kind)
        vector.attrs["distributed"] = True

    def _write_part(self, name: str, start: int, part: np.ndarray) -> None:
        assert self._file is not None
        self._file[name][start : start + len(part)] = part

    def _seal(self) -> None:
        with self.path.open("r+b") as raw:
            told = MAGIC + f"{_digest(self.path)}\nwork {self.work}\n".encode()
            raw.write(told.ljust(HEADER, b" "))


def _entries(state: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all that a state holds with its path, in the same order on every rank; None is left out."""
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Mapping):
            yield from _entries(value, f"{before}{key}/")
        elif value is not None:
            yield f"{before}{key}", value


def _digest(path: Path) -> str:
    """Return the SHA-256 of what follows the header."""
    found = hashlib.sha256()
    with path.open("rb") as raw:
        raw.seek(HEADER)
        while part := raw.read(_READ):
            found.update(part)
    return found.hexdigest()


# ------------------------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def read_checkpoint(folder: Path, comm: parallel.Comm) -> Iterator[Known | None]:
    """Give the state of a folder's latest checkpoint, inside a ``with`` block; None where there is none.

    Collective on comm at the beginning. Numbers, texts and arrays are read at once, vectors when they are sliced. One that
    is damaged is passed over for the previous one, with a warning.

    Raises
    ------
    CheckpointError
        All that are there are damaged, or of another version.
    """
    path = parallel.only_root(comm, lambda: _choose(folder))
    if path is None:
        yield None
        return
    error: CheckpointError | None = None
    file = None
    try:
        file = h5py.File(path, "r", locking=False)
        known = _read(file)
    except _TROUBLE as raised:
        error = CheckpointError(f"the checkpoint {path} cannot be read ({_first_line(raised)})")
    parallel.agree(comm, error)
    assert file is not None
    with file:
        yield known


def _choose(folder: Path) -> Path | None:
    """Return the latest checkpoint that is whole; None where there is none at all."""
    there = [folder / name for name in (LATEST, PREVIOUS) if (folder / name).exists()]
    wrong: list[str] = []
    for path in there:
        try:
            _verify(path)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        for told in wrong:
            warnings.warn(f"{told}: going on from {path.name} instead", CheckpointWarning, stacklevel=2)
        return path
    if wrong:
        raise CheckpointError("; ".join(wrong) + ". There is no other checkpoint: begin again with another --out")
    return None


def _verify(path: Path) -> None:
    """Refuse a checkpoint that is not as it was written.

    Raises
    ------
    CheckpointError
        Names the file and what is wrong with it.
    """
    try:
        with path.open("rb") as raw:
            header = raw.read(HEADER)
        if not header.startswith(MAGIC) or len(header) < HEADER:
            raise CheckpointError(f"{path} is no checkpoint, or was not written to its end")
        if header[len(MAGIC) :].split()[0].decode("ascii", "replace") != _digest(path):
            raise CheckpointError(f"{path} is damaged: its checksum does not fit")
        with h5py.File(path, "r", locking=False) as file:
            version = file.attrs.get("version")
    except _TROUBLE as error:
        raise CheckpointError(f"{path} cannot be read ({_first_line(error)})") from error
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version}, and this hpcdeq reads version {VERSION}")


def _read(group: h5py.Group) -> State:
    found: State = {}
    for name, value in group.attrs.items():
        found[name] = value.item() if isinstance(value, np.generic) else value
    for name, item in group.items():
        if isinstance(item, h5py.Group):
            found[name] = _read(item)
        else:
            found[name] = item if item.attrs.get("distributed") else item[...]
    return found


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
