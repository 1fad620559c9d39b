"""Signals and wall-time limits: an agreed stop at a safe point, a checkpoint, exit code 75; and on from there."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Run, clean_environment

from hpcdeq.builders.fields import prepare_burgers
from hpcdeq.record.checkpoint import LATEST, _verify
from hpcdeq.record.interruption import seconds_left, slurm_seconds
from hpcdeq.startup import STARTED
from hpcdeq.train import main

TRAIN = ("-m", "hpcdeq.train")
SMALL = ("--data", "b.h5", "--model", "mlp", "--optimizer", "adam", "--schedule", "constant", "--batch-size", "8")


@pytest.fixture
def burgers(tmp_path: Path) -> None:
    prepare_burgers(tmp_path / "b.h5", 60)


def started(folder: Path, *arguments: str, ranks: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Start a run, and wait until it is at work."""
    command = [sys.executable, *TRAIN, *arguments]
    if ranks > 1:
        command = ["mpirun", "-n", str(ranks), *command]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 100
    while len(history(folder / "r")) < 5 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    return process


def history(folder: Path) -> list[dict[str, str]]:
    path = folder / "history.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def processes_of(parent: int) -> list[int]:
    """Return the Python processes below one."""
    children = [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    found = [pid for pid in children if b"hpcdeq.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found or [pid for child in children for pid in processes_of(child)]


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_to_one_rank_ends_in_a_checkpoint_and_the_run_goes_on(
    run: Run, tmp_path: Path, burgers: None, ranks: int, number: int
) -> None:
    arguments = (*SMALL, "--max-iterations", "100000", "--out", "r", "--resume")
    process = started(tmp_path, *arguments, ranks=ranks)
    pid = process.pid if ranks == 1 else processes_of(process.pid)[-1]
    os.kill(pid, number)
    out, error = process.communicate(timeout=100)
    assert process.returncode == 75, error
    name = signal.Signals(number).name
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and f"stopped by {name}; --resume goes on" in summary["message"]
    assert summary["loss"] == {"train": None, "validation": None, "test": None}
    assert f"interrupted after {summary['iterations']} iterations" in out
    if ranks == 1:
        assert "stopping at the next safe point; once more stops at once" in error
    before = history(tmp_path / "r")
    assert int(before[-1]["iteration"]) == summary["iterations"]
    done = run(*TRAIN, *arguments, "--max-iterations", str(summary["iterations"] + 3), ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"resumed    at iteration {summary['iterations']}" in done.stdout
    after = history(tmp_path / "r")
    assert after[: len(before)] == before and len(after) == len(before) + 3
    assert float(after[-1]["wall_seconds"]) > float(before[-1]["wall_seconds"])
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "budget"


@pytest.mark.parametrize("told", ["Slurm", "--wall-seconds"])
def test_a_limit_of_the_job_stops_before_it(
    tmp_path: Path, burgers: None, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """Both count on their own clock: Slurm's end is a time of the day, the option counts from the start of the process."""
    monkeypatch.chdir(tmp_path)
    arguments = [*SMALL, "--max-iterations", "1000000", "--out", "r", "--quiet"]
    if told == "Slurm":
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 4.0)))
    else:
        arguments += ["--wall-seconds", str(time.monotonic() + 4.0 - STARTED)]
    assert main(arguments) == 75
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["message"].startswith("stopped before the job's wall-time limit; --resume goes on")
    rows = [int(row["iteration"]) for row in history(tmp_path / "r")]
    assert rows == list(range(summary["iterations"] + 1))


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(run: Run, tmp_path: Path, burgers: None) -> None:
    arguments = (*SMALL, "--out", "r", "--checkpoint-every", "2")
    process = started(tmp_path, *arguments, "--max-iterations", "100000")
    process.kill()
    process.communicate(timeout=60)
    _verify(tmp_path / "r" / LATEST)
    left = [path.name for path in (tmp_path / "r").iterdir()]
    assert "summary.json" not in left
    reached = int(history(tmp_path / "r")[-1]["iteration"])
    done = run(*TRAIN, *arguments, "--resume", "--max-iterations", str(reached + 2))
    assert done.returncode == 0, done.stderr
    rows = [int(row["iteration"]) for row in history(tmp_path / "r")]
    assert rows == list(range(reached + 3))
    assert not [path.name for path in (tmp_path / "r").iterdir() if path.name.endswith(".partial")]


TWICE = """
import os, signal, sys, time
from hpcdeq.record import Signals
from hpcdeq.petsc import PETSc
with Signals() as signals:
    os.kill(os.getpid(), signal.SIGUSR1)
    print(signals.caught == signal.SIGUSR1, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once(run: Run) -> None:
    done = run("-c", TWICE, timeout=50)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True\n")
    assert done.stderr.startswith("SIGUSR1: stopping at the next safe point")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45", 45),
        ("3:07", 187),
        ("1:00:00", 3600),
        ("2-01:00:10", 176410),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_times_of_slurm(text: str, seconds: float | None) -> None:
    assert slurm_seconds(text) == seconds


def test_what_is_left_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_left({}, None, 5.0) is None
    assert seconds_left({}, 60.0, 5.0) == 55.0
    monkeypatch.setattr("time.time", lambda: 1000.0)
    assert seconds_left({"SLURM_JOB_END_TIME": "1030", "SLURM_JOB_ID": "7"}, None, 5.0) == 30.0
    assert seconds_left({"SLURM_JOB_END_TIME": "1030"}, 20.0, 5.0) == 15.0
    asked = tmp_path / "squeue"
    asked.write_text('#!/bin/sh\n[ "$*" = "-h -j 7 -o %L" ] && echo 1-00:00:30\n')
    asked.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert seconds_left({"SLURM_JOB_ID": "7"}, None, 5.0) == 86430.0
    asked.write_text("#!/bin/sh\nexit 1\n")
    assert seconds_left({"SLURM_JOB_ID": "7"}, None, 5.0) is None
