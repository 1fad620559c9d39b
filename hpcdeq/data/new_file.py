"""New HDF5 files on disks that may be full."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py


class NewFile:
    """A new HDF5 file; what the disk refuses is told by `check` and at the end, and never to HDF5.

    HDF5 cannot close a file that it could not write to: it complains for every object of it, and may crash when the process
    ends. Here it writes through an object that notes the first error and goes on as if nothing were wrong.

    Not collective, every method.

    Parameters
    ----------
    path
        Of the file, which is emptied if it is there.
    settings
        Of `h5py.File`.

    Attributes
    ----------
    hdf5
        The file, open.

    Raises
    ------
    OSError
        It cannot be made.
    """

    def __init__(self, path: Path, **settings: Any) -> None:
        self._bytes = _Bytes(path)
        try:
            self.hdf5 = h5py.File(self._bytes, "w", locking=False, **settings)
        except BaseException:
            self._bytes.close()
            raise

    def check(self) -> None:
        """Raise what the disk has refused so far: an OSError."""
        if self._bytes.refused is not None:
            raise self._bytes.refused

    def close(self) -> None:
        """Write the rest, and close. Raises as `check`."""
        try:
            self.hdf5.close()
        finally:
            self._bytes.close()
        self.check()

    def __enter__(self) -> NewFile:
        """Return the file, which is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an error of the block comes before one of the disk."""
        try:
            self.close()
        except OSError:
            if error is None:
                raise


class _Bytes(io.RawIOBase):
    """The bytes of a file as HDF5 asks for them: once one write was refused, what is written is dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.refused: OSError | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._place = self._size = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")
        found = os.pread(self._descriptor, len(wanted), self._place)
        wanted[: len(found)] = found
        wanted[len(found) :] = bytes(len(wanted) - len(found))  # beyond the end, and what was dropped
        self._place += len(wanted)
        return len(wanted)

    def write(self, data: Any) -> int:
        given = memoryview(data).cast("B")
        done = 0
        while done < len(given) and self.refused is None:
            done += self._attempt(os.pwrite, given[done:], self._place + done)
        self._place += len(given)
        self._size = max(self._size, self._place)
        return len(given)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._place if size is None else size
        if self.refused is None:
            self._attempt(os.ftruncate, self._size)
        return self._size

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._attempt(os.close)

    def _attempt(self, call: Callable[..., int | None], *arguments: Any) -> int:
        try:
            return call(self._descriptor, *arguments) or 0
        except OSError as error:
            self.refused = self.refused or error
            return 0
