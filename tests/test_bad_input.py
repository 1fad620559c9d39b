"""Bad input on 2 ranks: one clear message, the right exit code, all ranks gone, nothing that looks complete."""

from __future__ import annotations

import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import DATA, Run

TRAIN = ("-m", "hpcdeq.train")


@pytest.fixture(scope="module")
def burgers_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hpcdeq.builders.fields import prepare_burgers

    path = tmp_path_factory.mktemp("data") / "b.h5"
    prepare_burgers(path, 40)
    return path


def refused(run: Run, tmp_path: Path, *arguments: str, says: str, code: int = 2, ranks: int = 2) -> str:
    """Run and check what every refusal has in common; returns what was printed."""
    done: subprocess.CompletedProcess[str] = run(*TRAIN, *arguments, "--out", "out", ranks=ranks, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(says) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "summary.json").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-iteration", "3"], "unknown option --max-iteration: did you mean --max-iterations?"),
        (
            ["-deq_snes_type", "batched_andersn"],
            "batched_andersn: PETSc has no such type: did you mean batched_anderson?",
        ),
        (["-tao_gatoll", "1e-3"], "unknown PETSc option -tao_gatoll: did you mean -tao_gatol?"),
        (["-snes_rtol", "1e-3"], "unknown PETSc option -snes_rtol: did you mean -deq_snes_rtol?"),
        (["--optimizer", "trng"], "unknown optimizer 'trng': did you mean trgn?"),
        (["--optimizer", "tao:lmvn"], "unknown TAO type 'lmvn'"),
        (["--model", "mlp_dec"], "unknown model 'mlp_dec': did you mean mlp_deq?"),
        (["--model", "graph_deq"], "model graph_deq takes data as graph, the dataset holds array"),
        (["--dtype", "float16"], "dtype is 'float16': choose float32 or float64"),
        (["--max-iterations", "many"], "argument --max-iterations: invalid int value: 'many'"),
        (["--optimizer", "newton", "--batch-size", "8"], "--batch-size is an option of adam, adamw, rmsprop"),
        (["--weight-decay", "-1"], "weight_decay is -1.0"),
        (["--label-smoothing", "1"], "label_smoothing is 1.0: give a number from 0 to below 1"),
        (["--label-smoothing", "0.1"], "--label-smoothing is for classes, the data holds numbers: leave it out"),
        (["--device", "cuda"], "torch finds no GPU here"),
        (["missing.toml"], "configuration missing.toml cannot be read"),
    ],
)
def test_wrong_options(run: Run, tmp_path: Path, burgers_file: Path, arguments: list[str], says: str) -> None:
    refused(run, tmp_path, "--data", str(burgers_file), *arguments, says=says)
    assert not (tmp_path / "out").exists()


def test_missing_file(run: Run, tmp_path: Path) -> None:
    refused(run, tmp_path, "--data", "nowhere.h5", says="nowhere.h5")
    assert not (tmp_path / "out").exists()


def test_not_an_hpcdeq_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("not HDF5")
    refused(run, tmp_path, "--data", "text.h5", says="text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(3)
    refused(run, tmp_path, "--data", "other.h5", says="other.h5")


def test_wrong_task_for_the_loss(run: Run, tmp_path: Path, burgers_file: Path) -> None:
    """The command chooses the loss by the task; brgn needs a sum of squares, which classes do not give."""
    with h5py.File(burgers_file) as source, h5py.File(tmp_path / "c.h5", "w") as file:
        for name in source:
            source.copy(name, file)
        file.attrs.update(source.attrs)
        for name in ("target_names", "target_units"):
            file.attrs.pop(name, None)
        del file["sample/target"]
        file["sample/target"] = np.arange(40, dtype=np.int64) % 2
        file.attrs["task"] = "classification"
        file.attrs["classes"] = ["a", "b"]
    says = "needs a sum of squares, and the loss is cross_entropy: use the loss mse"
    refused(run, tmp_path, "--data", "c.h5", "--optimizer", "tao:brgn", says=says)


def test_nan_in_data(run: Run, tmp_path: Path, burgers_file: Path) -> None:
    (tmp_path / "b.h5").write_bytes(burgers_file.read_bytes())
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        file["array/x"][30, 5] = float("nan")
    told = refused(run, tmp_path, "--data", "b.h5", says="array/x")
    assert "30" in told


def test_more_ranks_than_samples(run: Run, tmp_path: Path) -> None:
    from hpcdeq.builders.fields import prepare_burgers

    prepare_burgers(tmp_path / "tiny.h5", 3)
    with h5py.File(tmp_path / "tiny.h5") as file:
        count = int((file["sample/split"][:] == 0).sum())
    says = f"has {count} training samples, the job {count + 1} ranks: run with at most {count}"
    refused(run, tmp_path, "--data", "tiny.h5", says=says, ranks=count + 1)


def test_a_finished_run_is_not_overwritten(run: Run, tmp_path: Path, burgers_file: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "history.csv").write_text("precious")
    refused(run, tmp_path, "--data", str(burgers_file), says="choose another --out")
    assert (tmp_path / "out" / "history.csv").read_text() == "precious"


SCRIPT = """
import sys, torch
import hpcdeq
from hpcdeq import parallel
from hpcdeq.train import main
import hpcdeq.models.mlp_deq as home

rank, how = parallel.WORLD.rank, sys.argv[1]
forward = home.MlpCell.forward
if how == "raise" and rank == 1:
    def broken(self, z, given):
        raise ZeroDivisionError("the cell divides by zero")
    home.MlpCell.forward = broken
if how == "weights":
    build = home.MlpDeq.__init__
    def poisoned(self, *arguments):
        build(self, *arguments)
        with torch.no_grad():
            self.head.bias[0] = float("nan")
    home.MlpDeq.__init__ = poisoned
    import hpcdeq.models.base as base
    base.MODELS["mlp_deq"] = base.ModelKind(home.MlpDeqConfig, "array", home.MlpDeq)
if how == "stuck":
    arguments = ["-deq_snes_max_it", "1"]
else:
    arguments = []
parallel.launch(main, ["--data", sys.argv[2], "--out", "out", *arguments])
"""


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("raise", 1, "rank 1: ZeroDivisionError: the cell divides by zero"),
        ("weights", 2, "the initial weights are not finite"),
        ("stuck", 1, "DIVERGED_MAX_IT after 1 iterations"),
    ],
)
def test_failures_inside_the_run(run: Run, tmp_path: Path, burgers_file: Path, how: str, code: int, says: str) -> None:
    (tmp_path / "job.py").write_text(SCRIPT)
    done = run("job.py", how, str(burgers_file), ranks=2, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(says) == 1, done.stderr
    assert not (tmp_path / "out" / "summary.json").exists()


def test_help_needs_nothing_heavy(run: Run) -> None:
    done = run(*TRAIN, "--help")
    assert done.returncode == 0 and "--optimizer" in done.stdout and "-deq_snes_" in done.stdout


@pytest.mark.real_data
def test_graphs_do_not_fit_the_mlp(run: Run, tmp_path: Path) -> None:
    source = DATA / "crystals" / "crystals_small.jsonl.gz"
    assert run("-m", "hpcdeq.prepare", "crystals", str(source), "--out", "c.h5", "--limit", "50").returncode == 0
    says = "model mlp_deq takes data as array, the dataset holds graph: use --model with one of cgcnn, graph_deq"
    refused(run, tmp_path, "--data", "c.h5", "--model", "mlp_deq", says=says)
