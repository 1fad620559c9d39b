"""Ranks that hang or lose their launcher end the job; a folder takes one job at a time; a full disk is told in time.

`scripts/fault_tests.py` does all kinds of harm to whole runs; here is what they stand on.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, clean_environment

from hpcdeq import parallel, startup, watchdog
from hpcdeq.builders.fields import prepare_burgers
from hpcdeq.errors import CheckpointError, OptionError, UsageError
from hpcdeq.record import FolderLock, RunDirectory, locked
from hpcdeq.record.space import check_space
from hpcdeq.state import Block
from hpcdeq.train import main

# ------------------------------------------------------------------------------------------------------------ hangs

HANG = """
import os, sys, time
from hpcdeq import parallel
from hpcdeq.petsc import PETSc
from hpcdeq.watchdog import watched
import numpy as np
world, kind = parallel.WORLD, sys.argv[1]
with watched(2.0):
    v = PETSc.Vec().createMPI((2, PETSc.DECIDE), comm=world)
    v.set(1.0)
    if world.rank == world.size - 1:
        time.sleep(60)  # makes no progress either
    v.sum() if kind == "petsc" else parallel.sum_over_ranks(world, np.ones(3))
"""


@pytest.mark.parametrize("kind", ["mpi", "petsc"])
def test_a_hung_collective_becomes_tracebacks_of_all_ranks_and_an_end(run: Run, kind: str) -> None:
    """Inside PETSc's collectives no thread of Python's runs: the other rank has it told."""
    done = run("-c", HANG, kind, ranks=2)
    # Where the rank that waits inside MPI keeps Python's lock, its timer ends it, which may come first.
    assert done.returncode in (1, 128 + signal.SIGPROF)
    assert "no progress for 2 s. It hangs, waits for another rank" in done.stderr
    for rank in (0, 1):
        assert f"in rank {rank} on " in done.stderr  # a traceback of each
    where = "v.sum()" if kind == "petsc" else "sum_over_ranks"
    assert "most recent call first" in done.stderr and (kind == "petsc" or where in done.stderr)


ALONE = """
from hpcdeq.watchdog import watched
with watched(1.0):
    sum(range(10**12))  # one call in C: no other thread of Python's runs before it ends
"""


def test_a_process_that_keeps_pythons_lock_is_ended_by_a_timer(run: Run) -> None:
    done = run("-c", ALONE, OMP_NUM_THREADS="1")
    assert done.returncode == -signal.SIGPROF
    assert "in this process on " in done.stderr


def test_progress_keeps_the_watch_quiet_and_nothing_is_left_of_it() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with watchdog.watched(0.5), watchdog.watched(0.01):  # the inner one does nothing
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            parallel.from_root(parallel.WORLD, 1)
            time.sleep(0.02)
    assert signal.getsignal(signal.SIGUSR2) is before
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0.0


def test_where_the_time_without_progress_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(watchdog.VARIABLE, raising=False)
    assert watchdog.hang_seconds() == 0.0
    assert watchdog.hang_seconds(None, 1800.0) == 1800.0
    monkeypatch.setenv(watchdog.VARIABLE, "12.5")
    assert watchdog.hang_seconds(None, 1800.0) == 12.5
    assert watchdog.hang_seconds(0.0, 1800.0) == 0.0
    monkeypatch.setenv(watchdog.VARIABLE, "soon")
    with pytest.raises(OptionError, match="HPCDEQ_HANG_SECONDS=soon: give seconds, or 0"):
        watchdog.hang_seconds()


# --------------------------------------------------------------------------------------------------------- launcher

ORPHAN = """
import os, sys, time
from hpcdeq.startup import leave_with_launcher
leave_with_launcher()
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
os.environ.pop("PMIX_RANK", None)
child = subprocess.Popen(sys.argv[1:], env={**os.environ, "PMIX_RANK": "0"})
child.wait()
"""


@pytest.mark.parametrize("wrapper", [(), ("sh", "-c", '"$@"; true', "sh")])
def test_a_rank_leaves_when_its_launcher_was_killed(tmp_path: Path, wrapper: tuple[str, ...]) -> None:
    """Also where a shell stands between them."""
    note = tmp_path / "pid"
    command = [sys.executable, "-c", PARENT, *wrapper, sys.executable, "-c", ORPHAN, str(note)]
    launcher = subprocess.Popen(command, env=clean_environment())
    until = time.monotonic() + 30
    while not (note.exists() and note.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    pid = int(note.read_text())
    time.sleep(2 * startup.LOOK_SECONDS)
    assert is_alive(pid)
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------------------------- lock


@pytest.mark.parametrize("system", [True, False])
def test_a_folder_in_use_is_refused_and_a_dead_owner_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: bool
) -> None:
    """With locks of the file system, and without."""
    monkeypatch.setattr("hpcdeq.record.lock.PATIENCE", 0.0)
    no_locks = "import fcntl\ndef no(*a): raise OSError(38, 'no locks')\nfcntl.flock = no\n"
    if not system:
        monkeypatch.setattr("fcntl.flock", lambda *a: (_ for _ in ()).throw(OSError(38, "no locks")))
    text = (
        ("" if system else no_locks)
        + "import sys, time, pathlib\nfrom hpcdeq.record.lock import FolderLock\n"
        + "lock = FolderLock(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", text, str(tmp_path)]
    owner = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"is in use by process {owner.pid} on .*: wait until that has ended"):
        FolderLock(tmp_path)
    owner.kill()
    owner.communicate()
    lock = FolderLock(tmp_path)
    again = FolderLock(tmp_path)  # this process has it already
    again.release()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parallel([1, 2])
def test_a_folder_is_free_after_its_run(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    for _ in range(2):
        with RunDirectory(shared_tmp_path / "r") as directory:
            directory.create(comm, resume=True)
        with locked(comm, shared_tmp_path / "r"):
            pass
    parallel.any_rank(comm, False)
    assert not list((shared_tmp_path / "r").iterdir())


# ------------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parallel([1, 2, 3])
def test_room_on_the_disk_is_asked_for(
    shared_tmp_path: Path, comm: parallel.Comm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ranks hold counts once each, what all of them have once in all."""
    own = parallel.own_slice(2**18, comm.rank, comm.size)
    state = {"vector": Block(np.zeros(2**18)[own]), "group": {"table": np.zeros(2**17)}, "number": 1.5}
    usage = namedtuple("usage", "free")
    free = [9 * 2**20, 9 * 2**20 - 1]  # three of 2 + 1 MiB
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(free[0]))
    check_space(shared_tmp_path, state, comm)
    free.pop(0)
    told = r"has 9.0 MiB left, and the checkpoints of this run need 9.0 MiB \(3 of 3.0 MiB\)"
    with pytest.raises(CheckpointError, match=told) as error:
        check_space(shared_tmp_path, state, comm)
    assert error.value.agreed


def test_a_run_without_room_ends_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_burgers(tmp_path / "b.h5", 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: namedtuple("usage", "free")(1000))
    with pytest.raises(CheckpointError, match="make room, or choose another --out"):
        main(["--data", "b.h5", "--model", "mlp", "--optimizer", "lbfgs", "--out", "r", "--quiet"])
    assert len((tmp_path / "r" / "history.csv").read_text().splitlines()) == 2
    assert not (tmp_path / "r" / ".lock").exists()
