"""The study command as a user types it."""

from __future__ import annotations

import csv
import json
import math
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import Run

from hpcdeq.builders.fields import prepare_burgers
from hpcdeq.config import TrainConfig, read_config
from hpcdeq.errors import HpcdeqError
from hpcdeq.study import build_parser, main

STUDY = ("-m", "hpcdeq.study", "crossover")
QUICK = ("--windows", "1,4", "--mixings", "1.0,0.7", "--repeats", "2", "--samples", "12")
COLUMNS = (
    "window,mixing,method,best,converged,reason,solves,clock,seconds_median,seconds_min,seconds_max,times_forward,"
    "evaluations,iterations_max,seconds_per_evaluation,residual"
)


def rows(folder: Path, name: str = "crossover.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------- runs


def test_without_data_the_stiff_problem_is_measured(run: Run, tmp_path: Path) -> None:
    done = run(*STUDY, *QUICK, "--out", "s", "--config-out", "s.toml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "tanh cell 256 x 256, spectral radius 0.99 at the fixed point, 12 samples, tolerance 1e-06"
    )
    assert "best: window " in done.stdout and "times as fast as forward iteration" in done.stdout
    assert done.stdout.rstrip().endswith("next: mpirun -n 2 python -m hpcdeq.train s.toml")
    table = rows(tmp_path / "s")
    assert ",".join(table[0]) == COLUMNS
    assert {(int(r["window"]), float(r["mixing"])) for r in table} >= {(0, 1.0), (1, 1.0), (4, 1.0), (1, 0.7), (4, 0.7)}
    assert all(r["converged"] == "1" and float(r["residual"]) <= 1e-6 for r in table)
    (best,) = (r for r in table if r["best"] == "1")
    assert best is table[0] and int(best["window"]) >= 2
    assert float(best["seconds_median"]) == min(float(r["seconds_median"]) for r in table if int(r["solves"]) == 2)
    (forward,) = (r for r in table if r["method"] == "forward")
    assert 500 < float(forward["evaluations"]) < 1000 and float(forward["times_forward"]) == 1.0
    expected = float(forward["seconds_median"]) / float(best["seconds_median"])
    assert float(best["times_forward"]) == pytest.approx(expected)
    curve = [r for r in rows(tmp_path / "s", "residuals.csv") if r["window"] == "0"]
    assert len(curve) > 50 and float(curve[-1]["residual"]) == float(forward["residual"]) < float(curve[0]["residual"])
    assert (tmp_path / "s" / "figures" / "crossover.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "s" / "environment.json").read_text())["ranks"] == 1
    settings = tomllib.loads((tmp_path / "s.toml").read_text())
    assert settings == {
        "petsc": {
            "deq_snes_type": "batched_anderson",
            "deq_snes_anderson_m": best["window"],
            "deq_snes_anderson_beta": f"{float(best['mixing']):g}",
        }
    }


def test_the_written_configuration_is_one_that_training_takes(run: Run, tmp_path: Path) -> None:
    prepare_burgers(tmp_path / "b.h5", 40)
    words = ["--data", "b.h5", "--model", "mlp_deq", "--seed", "3", "--dtype", "float32", "--tolerance", "1e-4"]
    done = run(*STUDY, *QUICK, *words, "--out", "s", "--config-out", "s.toml", "-deq_snes_anderson_period", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mlp_deq fresh, 12 samples of b.h5, tolerance 0.0001")
    config = TrainConfig(**read_config(tmp_path / "s.toml"))
    assert (config.data, config.model, config.seed, config.dtype) == ("b.h5", "mlp_deq", 3, "float32")
    (best,) = (r for r in rows(tmp_path / "s") if r["best"] == "1")
    assert config.petsc["deq_snes_anderson_m"] == best["window"]
    assert config.petsc["deq_snes_anderson_period"] == "2"  # what was measured with is part of the choice
    done = run("-m", "hpcdeq.train", "s.toml", "--max-iterations", "1", "--out", "r")
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "r" / "petsc_options.txt").read_text()
    assert f"-deq_snes_anderson_m {best['window']}\n" in told and "read by no solver" not in done.stdout


def test_a_run_is_measured_with_its_weights_and_keeps_its_settings(run: Run, tmp_path: Path) -> None:
    prepare_burgers(tmp_path / "b.h5", 40)
    words = ["--data", "b.h5", "--max-iterations", "2", "--out", "r", "-tao_gatol", "1e-7"]
    done = run("-m", "hpcdeq.train", *words, "-deq_snes_type", "ngmres")
    assert done.returncode == 0, done.stderr
    done = run(*STUDY, "r", *QUICK, "--out", "s", "--config-out", "s.toml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mlp_deq trained in r, 12 samples of b.h5")
    saved, config = (read_config(tmp_path / name) for name in ("r/config.toml", "s.toml"))
    assert config.pop("petsc") | {} == {
        **saved.pop("petsc"),
        "deq_snes_type": "batched_anderson",
        "deq_snes_anderson_m": rows(tmp_path / "s")[0]["window"],
        "deq_snes_anderson_beta": f"{float(rows(tmp_path / 's')[0]['mixing']):g}",
    }
    assert config == saved
    # Trained weights are not the fresh ones of the same seed.
    fresh = run(*STUDY, *QUICK, "--data", "b.h5", "--out", "f")
    assert fresh.returncode == 0, fresh.stderr
    first, second = (rows(tmp_path / name, "residuals.csv") for name in ("s", "f"))
    of_forward = [[float(r["residual"]) for r in table if r["window"] == "0"][:3] for table in (first, second)]
    assert of_forward[0] != pytest.approx(of_forward[1], rel=1e-3)
    (tmp_path / "b.h5").rename(tmp_path / "moved.h5")
    done = run(*STUDY, "r", *QUICK, "--out", "t")
    assert done.returncode == 2 and "its data b.h5 are not there; say where they are with --data FILE.h5" in done.stderr
    done = run(*STUDY, "r", "--data", "moved.h5", *QUICK, "--out", "t")
    assert done.returncode == 0, done.stderr


def test_the_embedded_run_is_measured_on_its_own_data(run: Run, tmp_path: Path) -> None:
    done = run("-m", "hpcdeq.train", "--max-iterations", "1", "--out", "r")
    assert done.returncode == 0, done.stderr
    done = run(*STUDY, "r", *QUICK, "--quiet", "--out", "s")
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith("window")


def test_a_tolerance_out_of_reach_ends_with_code_1(run: Run, tmp_path: Path) -> None:
    done = run(*STUDY, *QUICK, "--dtype", "float32", "--tolerance", "1e-9", "--out", "s", "-deq_snes_max_it", "60")
    assert done.returncode == 1
    assert "ConvergenceError: no setting reached the tolerance 1e-09" in done.stderr and "Likely fix" in done.stderr
    assert not (tmp_path / "s" / "crossover.csv").exists()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("crossover", "the following arguments are required: --out"),
        ("crossover --out s --window 3", "unknown option --window: did you mean --windows?"),
        ("crossover --out s --windows 3,x", "'3,x': give whole numbers from 0 on, e.g. 1,2,5,10"),
        ("crossover --out s --windows -1", "'-1': give whole numbers from 0 on"),
        ("crossover --out s --windows=", "'': give whole numbers from 0 on"),
        ("crossover --out s --mixings 1,3", "'1,3': give numbers above 0, at most 2"),
        ("crossover --out s --mixings 0", "'0': give numbers above 0"),
        ("crossover --out s --tolerance 2", "'2': give a number between 0 and 1"),
        ("crossover --out s --repeats 0", "'0': give a whole number, 1 or more"),
        ("crossover --out s --samples few", "'few': give a whole number, 1 or more"),
        ("crossover --out s --problem easy", "invalid choice: 'easy'"),
        ("crossing --out s", "invalid choice: 'crossing'"),
        ("", "the following arguments are required: KIND"),
    ],
)
def test_wrong_command_lines(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == 2
    text = capsys.readouterr()
    assert told in text.err and text.out == ""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with one of an unfinished run, and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    prepare_burgers("b.h5", 40)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--problem stiff --data b.h5", "--problem stiff is measured without data: leave out RUN_DIR and --data"),
        ("--model mlp_deq", "--model mlp_deq needs data to be built for: add --data FILE.h5"),
        ("r --data b.h5 --model mlp_deq", "the run in r has its own model: leave out --model mlp_deq"),
        ("--seed -1", "--seed -1: at least 0"),
        ("-deq_snes_anderson_m 4", "-deq_snes_anderson_m is not for a study: use --windows"),
        ("-deq_snes_rtol 1e-3", "-deq_snes_rtol is not for a study: use --tolerance"),
        ("-deq_snes_type ngmres", "-deq_snes_type is not for a study"),
        ("-deq_snes_max_itt 5", "unknown PETSc option -deq_snes_max_itt: did you mean -deq_snes_max_it\\?"),
        ("-tao_gatol 1", "-tao_gatol is not for a study, which trains nothing: leave it out"),
        ("absent", "absent: no such run directory"),
        ("empty", "empty/best.h5: no such file"),
        ("--data absent.h5", "absent.h5"),
        ("--data b.h5 --model graph_deq", "model graph_deq takes data as graph, the dataset holds array"),
        ("--data b.h5 --model nlp_deq", "unknown model 'nlp_deq': did you mean mlp_deq\\?"),
        ("--config-out no/s.toml", "--config-out no/s.toml cannot be written, there is no folder no"),
        ("--config-out empty", "--config-out empty is a folder: give a file name, e.g. crossover.toml"),
        ("--device cuda", "--device cuda: torch finds no GPU here"),
    ],
)
def test_what_cannot_be_measured_is_refused(here: Path, words: str, told: str) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(HpcdeqError, match=told) as raised:
        main(["crossover", *words.split(), "--out", "s"])
    # A saved model that is not there is a failure, as everywhere; all else is bad usage or input.
    assert raised.value.exit_code == (1 if words == "empty" else 2)
    assert not (here / "s").exists()


def test_a_refusal_as_the_user_sees_it(run: Run) -> None:
    done = run(*STUDY, "--out", "s", "-deq_snes_rtol", "1e-3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "OptionError: -deq_snes_rtol is not for a study: use --tolerance\n"


def test_several_ranks_are_refused(run: Run) -> None:
    done = run(*STUDY, "--out", "s", ranks=2)
    assert done.returncode == 2 and "a study times one process: leave out mpirun" in done.stderr


def test_a_folder_that_holds_a_run_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "history.csv").write_text("precious")
    done = run(*STUDY, *QUICK, "--out", "r")
    assert done.returncode == 2 and "choose another --out" in done.stderr
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["history.csv"]


def test_defaults_are_those_that_the_help_names() -> None:
    options = build_parser().parse_args(["crossover", "--out", "s"])
    text = build_parser()._subparsers._group_actions[0].choices["crossover"].format_help()  # type: ignore[union-attr]
    told = " ".join(text.split())
    assert f"default {','.join(map(str, options.windows))}" in told
    assert f"default {','.join(map(str, options.mixings))}" in told
    assert math.isclose(options.tolerance, 1e-6) and "(default 1e-6)" in told
    assert f"(default {options.repeats})" in told and f"(default {options.samples})" in told
