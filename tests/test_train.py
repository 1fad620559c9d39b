"""The main command, as a user runs it: a source file goes in, a run directory comes out."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from pathlib import Path

import h5py
import pytest
from conftest import DATA, Run

from hpcdeq.doctor import available_bytes
from hpcdeq.record import HISTORY_COLUMNS

PREPARE, TRAIN = ("-m", "hpcdeq.prepare"), ("-m", "hpcdeq.train")
SUMMARY_KEYS = {
    "task", "model", "parameters", "optimizer", "status", "reason", "iterations", "wall_seconds", "loss", "metric", "counts",
    "fixed_point", "ranks", "threads", "dtype", "device", "seed", "energy_joules", "peak_memory_bytes",
}  # fmt: skip


def burgers(run: Run, count: int = 60) -> None:
    done = run(*PREPARE, "burgers", "--out", "b.h5", "--limit", str(count))
    assert done.returncode == 0, done.stderr


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_directory_holds_all_that_is_promised(run: Run, tmp_path: Path, ranks: int) -> None:
    burgers(run)
    done = run(*TRAIN, "--data", "b.h5", "--max-iterations", "3", "--out", "r", "-deq_snes_type", "ngmres", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "budget after 3 iterations" in done.stdout
    folder = tmp_path / "r"
    for name in ("config.toml", "petsc_options.txt", "environment.json", "history.csv", "best.h5", "summary.json"):
        assert (folder / name).stat().st_size > 0, name
    assert {p.name for p in (folder / "figures").iterdir()} == {"loss.png", "metric.png", "fixed_points.png"}
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert (summary["status"], summary["reason"], summary["ranks"]) == ("budget", "DIVERGED_MAXITS", ranks)
    assert set(summary["loss"]) == {"train", "validation", "test"}
    rows = history(folder)
    assert tuple(rows[0]) == HISTORY_COLUMNS
    assert [int(r["iteration"]) for r in rows] == [0, 1, 2, 3]
    losses = [float(r["train_loss"]) for r in rows]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
    assert int(rows[-1]["gauss_newton_products"]) == summary["counts"]["gauss_newton_products"] > 0
    assert "-deq_snes_type ngmres" in (folder / "petsc_options.txt").read_text()
    with h5py.File(folder / "best.h5") as file:
        assert file.attrs["complete"]


def test_the_saved_configuration_repeats_the_run(run: Run, tmp_path: Path) -> None:
    burgers(run)
    first = run(
        *TRAIN, "--data", "b.h5", "--max-iterations", "2", "--seed", "4", "--out", "one", "-tao_bnk_ksp_max_it", "5"
    )
    assert first.returncode == 0, first.stderr
    config = tomllib.loads((tmp_path / "one" / "config.toml").read_text())
    assert config["model"] == "mlp_deq" and config["model_settings"]["width"] == 64
    assert config["seed"] == 4 and config["petsc"]["tao_bnk_ksp_max_it"] == "5"
    second = run(*TRAIN, "one/config.toml", "--out", "two")
    assert second.returncode == 0, second.stderr
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    for name in ("train_loss", "gradient_norm", "trust_radius", "validation_loss", "cell_evaluations"):
        assert [row[name] for row in one] == [row[name] for row in two], name  # to the last bit


def test_ranks_do_not_change_the_run(run: Run, tmp_path: Path) -> None:
    burgers(run)
    for ranks in (1, 2, 3):
        tight = ["-deq_snes_rtol", "1e-12", "-deq_ksp_rtol", "1e-12"]
        done = run(*TRAIN, "--data", "b.h5", "--max-iterations", "3", "--out", f"r{ranks}", *tight, ranks=ranks)
        assert done.returncode == 0, done.stderr
    losses = [[float(r["train_loss"]) for r in history(tmp_path / f"r{n}")] for n in (1, 2, 3)]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-8)


@pytest.mark.parametrize("optimizer", ["lbfgs", "newton", "adam", "tao:blmvm"])
def test_every_optimizer_ends_with_a_reason_and_a_summary(run: Run, tmp_path: Path, optimizer: str) -> None:
    burgers(run)
    done = run(*TRAIN, "--data", "b.h5", "--optimizer", optimizer, "--max-iterations", "3", "--out", "r", ranks=2)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["optimizer"] == optimizer and summary["status"] == "budget"
    rows = history(tmp_path / "r")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_single_precision_and_quiet(run: Run, tmp_path: Path) -> None:
    burgers(run)
    done = run(*TRAIN, "--data", "b.h5", "--dtype", "float32", "--max-iterations", "2", "--out", "r", "--quiet")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("model", ["mlp_deq", "mlp"])
def test_an_option_that_nothing_reads_is_told(run: Run, model: str) -> None:
    """And only that one, though an explicit model reads none of those that every run begins with."""
    burgers(run)
    words = ("--model", model, "--max-iterations", "1", "-deq_snes_ngmres_m", "5")
    done = run(*TRAIN, "--data", "b.h5", *words, "--out", "r")
    assert done.returncode == 0, done.stderr
    assert "read by no solver of this run: -deq_snes_ngmres_m\n" in done.stdout


def test_no_argument_at_all_trains_the_embedded_problem(run: Run, tmp_path: Path) -> None:
    done = run(*TRAIN, ranks=2)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["task"] == "regression" and summary["metric"]["test"] < 0.25


@pytest.mark.real_data
@pytest.mark.parametrize("optimizer", ["trgn", "adam"])
def test_real_crystals_from_source_to_classes(run: Run, tmp_path: Path, optimizer: str) -> None:
    source = DATA / "crystals" / "crystals_small.jsonl.gz"
    done = run(*PREPARE, "crystals", str(source), "--out", "c.h5", "--limit", "400")
    assert done.returncode == 0, done.stderr
    settings = ["--batch-size", "16", "--learning-rate", "0.005"] if optimizer == "adam" else []
    arguments = ["--data", "c.h5", "--optimizer", optimizer, "--max-iterations", "6", *settings, "--out", "r"]
    done = run(*TRAIN, *arguments, ranks=2, timeout=250)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["model"] == "graph_deq" and summary["fixed_point"]["unconverged"] == 0
    rows = history(tmp_path / "r")
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    with h5py.File(tmp_path / "c.h5") as file:
        labels = file["sample/target"][file["sample/split"][:] == 0]
    majority = max((labels == k).mean() for k in range(3))
    assert summary["metric"]["train"] > majority + 0.05


OF_A_RUN = 120 * 2**20  # bytes that a rank holds besides what it imports


@pytest.mark.crowded
@pytest.mark.timeout(1200)
def test_sixty_four_ranks(run: Run, tmp_path: Path) -> None:
    """That such a job goes on after it was killed: `scripts/fault_tests.py --cases crowd`."""
    imports = run("-c", "import hpcdeq.models, hpcdeq.optim, hpcdeq.problem; print(open('/proc/self/status').read())")
    own = re.search(r"RssAnon:\s+(\d+) kB", imports.stdout)  # files in memory are shared
    assert own is not None, imports.stderr
    needed = 64 * (int(own[1]) * 1024 + OF_A_RUN)
    if available_bytes() < needed:
        pytest.skip(f"64 ranks need {needed / 2**30:.0f} GiB of memory with this build of torch")
    done = run(*TRAIN, "--max-iterations", "1", "--out", "r", ranks=64, timeout=1100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["ranks"] == 64
