"""`--resume` as a user types it: the same command begins a run, goes on with it, or says that it has ended."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path

import h5py
import pytest

from hpcdeq.builders.fields import prepare_burgers
from hpcdeq.errors import CheckpointError, HpcdeqError, OptionError, UsageError
from hpcdeq.record.checkpoint import LATEST, PREVIOUS
from hpcdeq.train import main

NOT_COMPARED = ("wall_seconds", "memory_bytes", "energy_joules", "cell_evaluations")


@pytest.fixture
def common(tmp_path: Path) -> list[str]:
    """Return options of a quick run on Burgers' equation."""
    prepare_burgers(tmp_path / "b.h5", 50)
    return ["--data", str(tmp_path / "b.h5"), "--model", "mlp", "--quiet"]


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name not in NOT_COMPARED} for row in rows]


def summary(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "summary.json").read_text()))


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs", "trgn", "torch-lbfgs"])
def test_ten_and_ten_are_twenty(tmp_path: Path, common: list[str], optimizer: str) -> None:
    """The whole run directory is that of one run, and so are the numbers of its summary."""
    given = [*common, "--optimizer", optimizer] + (["--schedule", "constant"] if optimizer == "adam" else [])
    assert main([*given, "--max-iterations", "20", "--out", str(tmp_path / "whole")]) == 0
    assert main([*given, "--max-iterations", "10", "--out", str(tmp_path / "parts")]) == 0
    assert main([*given, "--max-iterations", "20", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = history(tmp_path / "whole"), history(tmp_path / "parts")
    assert len(parts) == 21
    # The first row after the pause knows no step before it, but where it goes on from.
    assert parts == whole
    one, two = summary(tmp_path / "whole"), summary(tmp_path / "parts")
    for name in ("status", "reason", "message", "iterations", "loss", "metric", "counts", "evaluated_iteration"):
        assert two[name] == one[name], name
    assert tomllib.loads((tmp_path / "parts" / "config.toml").read_text())["max_iterations"] == 20
    earlier = json.loads((tmp_path / "parts" / "environment.json").read_text())["earlier"]
    assert len(earlier) == 1 and "--resume" not in earlier[0]["command"]
    with h5py.File(tmp_path / "whole" / "best.h5") as a, h5py.File(tmp_path / "parts" / "best.h5") as b:
        assert a.attrs["iteration"] == b.attrs["iteration"]
        for name in a["parameters"]:
            assert a["parameters"][name][...].tobytes() == b["parameters"][name][...].tobytes()


def test_one_command_for_the_beginning_the_middle_and_the_end(
    tmp_path: Path, common: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*common[:-1], "--optimizer", "lbfgs", "--max-iterations", "4", "--out", str(tmp_path / "r"), "--resume"]
    assert main(command) == 0
    assert summary(tmp_path / "r")["iterations"] == 4
    capsys.readouterr()
    before = (tmp_path / "r" / "summary.json").read_bytes()
    assert main(command) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path / 'r'} has ended already: budget after 4 iterations")
    assert "--max-iterations allows more" in told
    assert (tmp_path / "r" / "summary.json").read_bytes() == before
    assert main([*command, "--max-iterations", "6"]) == 0
    assert "resumed    at iteration 4" in capsys.readouterr().out
    assert summary(tmp_path / "r")["iterations"] == 6


def test_a_larger_time_goes_on(tmp_path: Path, common: list[str]) -> None:
    command = [*common, "--optimizer", "adam", "--max-iterations", "100000", "--out", str(tmp_path / "r"), "--resume"]
    assert main([*command, "--max-seconds", "0.3"]) == 0
    first = summary(tmp_path / "r")
    assert (first["status"], first["reason"]) == ("budget", "DIVERGED_USER")
    assert main([*command, "--max-seconds", "0.6"]) == 0
    second = summary(tmp_path / "r")
    assert second["iterations"] > first["iterations"] and 0.6 <= second["wall_seconds"] < 5  # type: ignore[operator]
    rows = [int(row["iteration"]) for row in history(tmp_path / "r")]
    assert rows == list(range(len(rows)))


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path: Path, common: list[str]) -> None:
    folder = tmp_path / "r"
    command = [*common, "--optimizer", "lbfgs", "--out", str(folder), "--resume", "--max-iterations"]
    assert main([*command, "3"]) == 0
    (folder / "summary.json").unlink()
    kept = (folder / "history.csv").read_text()
    (folder / "history.csv").write_text(kept + "4,99.0,1,1\n5,99")  # as a process that was killed leaves it
    (folder / ".checkpoint.h5.17.partial").write_text("half")
    assert main([*command, "5"]) == 0
    assert (folder / "history.csv").read_text().startswith(kept)
    assert [row["iteration"] for row in history(folder)] == list("012345")
    assert not list(folder.glob(".*.partial"))
    (folder / "summary.json").unlink()
    (folder / "history.csv").write_text(kept.splitlines()[0] + "\n")
    with pytest.raises(CheckpointError, match="history.csv has 0 rows, fewer than the 6 that were there"):
        main([*command, "7"])


def test_a_damaged_checkpoint_costs_the_iterations_since_the_one_before(tmp_path: Path, common: list[str]) -> None:
    folder = tmp_path / "r"
    command = [*common, "--optimizer", "trgn", "--out", str(folder), "--resume", "--checkpoint-every", "2"]
    assert main([*command, "--max-iterations", "7"]) == 0
    whole = history(folder)
    (folder / "summary.json").unlink()
    (folder / LATEST).write_bytes((folder / LATEST).read_bytes()[:-50])
    with pytest.warns(UserWarning, match="checkpoint.h5 is damaged: .* going on from checkpoint-previous.h5 instead"):
        assert main([*command, "--max-iterations", "7"]) == 0
    assert history(folder) == whole


CHANGED = {
    "seed": (["--seed", "3"], "--seed 0 there and 3 here"),
    "model": (["--model", "deeponet"], "--model mlp there and deeponet here"),
    "dtype": (["--dtype", "float32"], "--dtype float64 there and float32 here"),
    "optimizer": (["--optimizer", "adam"], "--optimizer lbfgs there and adam here"),
    "weight decay": (["--weight-decay", "0.1"], "--weight-decay not set there and 0.1 here"),
    "model settings": (["--model-settings", "width=5"], "width 64 there and 5 here"),
    "PETSc's": (["-tao_lbfgs_history", "5"], "tao_lbfgs_history not set there and 5 here"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_what_would_be_another_run_is_refused(tmp_path: Path, common: list[str], kind: str) -> None:
    folder = tmp_path / "r"
    assert main([*common, "--optimizer", "lbfgs", "--max-iterations", "2", "--out", str(folder)]) == 0
    typed, says = CHANGED[kind]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(OptionError, match=says) as error:
        main([*common, "--max-iterations", "4", "--out", str(folder), "--resume", *typed])
    assert error.value.exit_code == 2 and "begin another run with another --out" in str(error.value)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_looks_on_may_change(tmp_path: Path, common: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    command = [*common, "--optimizer", "lbfgs", "--out", str(tmp_path / "r"), "--max-iterations"]
    assert main([*command, "2"]) == 0
    assert main([*command, "3", "--resume", "-tao_monitor"]) == 0
    assert "3 TAO" in capfd.readouterr().out


def test_other_data_are_refused(tmp_path: Path, common: list[str]) -> None:
    command = [*common, "--optimizer", "lbfgs", "--out", str(tmp_path / "r"), "--max-iterations"]
    assert main([*command, "2"]) == 0
    prepare_burgers(tmp_path / "b.h5", 40)
    with pytest.raises(UsageError, match="test samples, and had .* put the former file back, or choose another --out"):
        main([*command, "3", "--resume"])


def test_a_run_without_a_checkpoint_says_what_to_type(tmp_path: Path, common: list[str]) -> None:
    folder = tmp_path / "r"
    command = [*common, "--optimizer", "lbfgs", "--out", str(folder), "--max-iterations", "2"]
    assert main(command) == 0
    for name in (LATEST, PREVIOUS, "summary.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UsageError, match="holds a run without a checkpoint to go on from: remove .* to begin again"):
        main([*command, "--resume"])
    lines = (folder / "history.csv").read_text().splitlines()
    for left in (1, 2):  # stopped before its first checkpoint: nothing is lost
        (folder / "history.csv").write_text("\n".join(lines[:left]) + "\n")
        for name in (LATEST, PREVIOUS, "summary.json"):
            (folder / name).unlink(missing_ok=True)
        assert main([*command, "--resume"]) == 0
        told = (folder / "history.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in told] == ["iteration", "0", "1", "2"]
    with pytest.raises(HpcdeqError, match=r"give it, with --out DIR"):
        main([*common, "--resume"])


def test_fixed_points_that_a_checkpoint_leaves_out_are_told(tmp_path: Path, common: list[str]) -> None:
    given = [
        *common,
        "--model",
        "mlp_deq",
        "--optimizer",
        "lbfgs",
        "--checkpoint-cache",
        "0",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*given, "--max-iterations", "2"]) == 0
    assert main([*given, "--max-iterations", "3", "--resume"]) == 0
    assert "of remembered fixed points (--checkpoint-cache holds more)" in str(summary(tmp_path / "r")["message"])
