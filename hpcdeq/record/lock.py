"""One job at a time writes in a folder: a lock that its owner holds while it lives, and no longer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hpcdeq import parallel
from hpcdeq.errors import UsageError

NAME = ".lock"
# The ranks of a job whose launcher was killed leave within seconds: who begins it again at once waits for them.
PATIENCE, PAUSE = 20.0, 0.5


class FolderLock:
    """The lock of a folder, held from when it is made until `release`, or until the process ends.

    Not collective: one rank holds it. The system keeps the lock (flock) and frees it when its owner is gone, however it
    went; the file says who that is. Where a file system has no locks the file alone speaks: an owner on this host that is
    alive keeps others out.

    Parameters
    ----------
    folder
        It exists.

    Raises
    ------
    UsageError
        Another process holds it.
    OSError
        The file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: IO[str] | None = None
        until = time.monotonic() + PATIENCE
        while not self._take():
            if time.monotonic() >= until:
                raise UsageError(
                    f"{folder} is in use by {_owner(self.path) or 'another process'}: wait until that has ended, or choose another"
                    " --out"
                )
            time.sleep(PAUSE)

    def _take(self) -> bool:
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return _owner(self.path) == _told()  # this process has it already
        except OSError:  # the file system has no locks
            if _is_alive(_owner(self.path)):
                file.close()
                return False
        if not _is_there(self.path, file):  # its former owner removed it in the meantime
            file.close()
            return False
        file.truncate(0)
        file.write(_told() + "\n")
        file.flush()
        self._file = file
        return True

    def release(self) -> None:
        """Let others have it; once is enough."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


@contextlib.contextmanager
def locked(comm: parallel.Comm, folder: Path) -> Iterator[None]:
    """Hold the lock of a folder on rank 0 inside a ``with`` block; the folder is made if need be, and removed if it stays empty.

    Collective on comm at the beginning.

    Raises
    ------
    UsageError
        Another process holds it, or the folder cannot be made or written.
    """
    lock, made = None, False
    with parallel.agreement(comm):
        if comm.rank == 0:
            try:
                made = not folder.exists()
                folder.mkdir(parents=True, exist_ok=True)
                lock = FolderLock(folder)
            except OSError as error:
                raise UsageError(
                    f"the folder {folder} cannot be written ({error.strerror}): choose another --out"
                ) from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
            if made:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()


def _told() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _is_alive(owner: str) -> bool:
    """Say whether an owner is another process of this host that is alive."""
    words = owner.split()
    if len(words) != 4 or words[3] != socket.gethostname() or int(words[1]) == os.getpid():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
