"""What a run leaves behind: history, summary, progress, energy, best weights."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from hpcdeq import parallel, record
from hpcdeq.errors import CheckpointError, HpcdeqError, UsageError
from hpcdeq.optim.base import Iterate, Result
from hpcdeq.problem.counts import Counts, FixedPointStatistics
from hpcdeq.problem.training import Evaluation
from hpcdeq.record import atomic, energy

# As the design fixes them, written out: a column that moves breaks its readers.
COLUMNS = """iteration, wall_seconds, train_loss, gradient_norm, step_norm, trust_radius, validation_loss,
    validation_metric, losses, gradients, gauss_newton_products, hessian_products, cell_evaluations, cell_jvps,
    cell_vjps,
    fixed_point_iterations_mean, fixed_point_iterations_max, unconverged_samples, memory_bytes, energy_joules"""
SUMMARY_KEYS = """task, model, parameters, optimizer, status, reason, message, iterations, wall_seconds, loss, metric,
    counts, fixed_point, ranks, threads, dtype, device, seed, energy_joules, peak_memory_bytes"""
COUNTS = Counts(1, 2, 3, 4, 5, 6, 7)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def iterate(number: int = 0, **given: Any) -> Iterate:
    values: dict[str, Any] = {
        "iteration": number,
        "x": torch.zeros(3),
        "loss": 1 / 3,
        "gradient_norm": 0.1,
        "step_norm": None,
        "trust_radius": None,
        "seconds": 0.25 * number,
        "counts": COUNTS,
        "fixed_point": None,
    }
    return Iterate(**{**values, **given})


def result(**given: Any) -> Result:
    values: dict[str, Any] = {
        "x": torch.zeros(3),
        "status": "converged",
        "reason": "CONVERGED_GATOL",
        "message": "the gradient is small enough",
        "loss": 0.5,
        "gradient_norm": 1e-9,
        "iterations": 4,
        "counts": COUNTS,
        "history": [],
    }
    return Result(**{**values, **given})


def summary(**given: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "task": "classification",
        "model": "mlp_deq",
        "optimizer": "trgn",
        "metric_name": "accuracy",
        "train": Evaluation(0.5, 0.75),
        "validation": Evaluation(math.nan, math.nan),
        "test": None,
        "fixed_point": None,
        "wall_seconds": 2.5,
        "ranks": 2,
        "dtype": "float64",
        "device": "cpu",
        "seed": 0,
        "energy_joules": None,
        "peak_memory_bytes": 1 << 30,
    }
    return record.summary(given.pop("result", result()), **{**values, **given})


# ------------------------------------------------------------------------------------------------ run directory


@pytest.mark.parallel([1, 2, 3])
def test_rank_zero_alone_writes(tmp_path: Path):
    folder = Path(parallel.from_root(parallel.WORLD, str(tmp_path))) / "a" / "run"
    with record.RunDirectory(folder) as run:
        run.create(parallel.WORLD)
        run.write_text(f"from-{parallel.WORLD.rank}.txt", "text")
    parallel.any_rank(parallel.WORLD, False)  # wait for all
    assert [path.name for path in folder.iterdir()] == ["from-0.txt"]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("held", ["summary.json", "history.csv"])
def test_a_run_is_never_overwritten(tmp_path: Path, held: str):
    folder = Path(parallel.from_root(parallel.WORLD, str(tmp_path)))
    if parallel.WORLD.rank == 0:
        (folder / held).write_text("precious")
    with pytest.raises(UsageError, match=rf"holds a run already \({held}\): choose another --out or remove it"):
        record.RunDirectory(folder).create(parallel.WORLD)
    assert (folder / held).read_text() == "precious"


@pytest.mark.parallel([1, 2, 3])
def test_a_folder_that_cannot_be_made_is_refused_on_all_ranks(tmp_path: Path):
    folder = Path(parallel.from_root(parallel.WORLD, str(tmp_path)))
    if parallel.WORLD.rank == 0:
        (folder / "file").touch()
    with pytest.raises(UsageError, match="cannot be written .*: choose another --out"):
        record.RunDirectory(folder / "file" / "run").create(parallel.WORLD)


def test_a_replacement_that_fails_leaves_the_former_file(tmp_path: Path):
    path = tmp_path / "summary.json"
    path.write_text("former")
    with pytest.raises(ZeroDivisionError), atomic.replaced(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_what_is_no_number(tmp_path: Path):
    with record.RunDirectory(tmp_path) as run:
        run.create(parallel.SELF)
        run.write_json("summary.json", {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf, "e": "NaN"}})
        found = json.loads((tmp_path / "summary.json").read_text())
        assert found == {"a": None, "b": [None, 1.5], "c": {"d": None, "e": "NaN"}}
        with pytest.raises(HpcdeqError, match="cannot write .*none/x.json"):
            run.write_json("none/x.json", {})


# ------------------------------------------------------------------------------------------ history and summary


def test_history_has_the_designs_columns_and_blanks(tmp_path: Path):
    path = tmp_path / "history.csv"
    found = FixedPointStatistics(100, 7.5, 12, 1)
    with record.HistoryWriter(path) as history:
        history.write(iterate(), None)
        history.write(
            iterate(1, step_norm=0.1, trust_radius=2.0, fixed_point=found),
            Evaluation(2 / 3, math.nan),
            memory_bytes=4096,
            energy_joules=0.1,
        )
        rows = _rows(path)
    assert list(record.HISTORY_COLUMNS) == names(COLUMNS) == list(rows[0])
    blank = {name for name, value in rows[0].items() if value == ""}
    assert blank == {*names(COLUMNS)[4:8], *names(COLUMNS)[15:]}
    assert float(rows[0]["train_loss"]) == 1 / 3
    assert rows[1] == {
        **dict(zip(names(COLUMNS)[8:15], "1234567", strict=True)),
        "iteration": "1",
        "wall_seconds": "0.25",
        "train_loss": repr(1 / 3),
        "gradient_norm": "0.1",
        "step_norm": "0.1",
        "trust_radius": "2.0",
        "validation_loss": repr(2 / 3),
        "validation_metric": "",
        "fixed_point_iterations_mean": "7.5",
        "fixed_point_iterations_max": "12",
        "unconverged_samples": "1",
        "memory_bytes": "4096",
        "energy_joules": "0.1",
    }


def _rows(path: Path) -> list[dict[str, str]]:
    """Read what is on the disk while the writer still has the file open: a killed run keeps its history."""
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_summary_has_the_designs_keys():
    found = summary(
        fixed_point=record.over_run([FixedPointStatistics(10, 4.0, 9, 0), FixedPointStatistics(10, 6.0, 7, 2)])
    )
    assert list(found) == names(SUMMARY_KEYS)
    assert list(found["loss"]) == ["train", "validation", "test"]
    assert list(found["metric"]) == ["name", "train", "validation", "test"]
    assert list(found["counts"]) == names(COLUMNS)[8:15]
    assert found["fixed_point"] == {"mean_iterations": 5.0, "max_iterations": 9, "unconverged": 2}
    assert found["parameters"] == 3
    assert found["metric"]["train"] == 0.75
    assert found["loss"]["test"] is None


def test_summary_of_a_model_without_fixed_points_has_nulls():
    assert record.over_run([]) is None
    assert set(summary()["fixed_point"].values()) == {None}


def test_environment_tells_where_the_run_was_started():
    found = record.environment(parallel.SELF, 7, ["python", "-m", "hpcdeq.train", "a b.toml"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["petsc"].startswith("3.")
    assert found["command"] == "python -m hpcdeq.train 'a b.toml'"
    assert (found["ranks"], found["seed"]) == (1, 7)
    assert found["started"].endswith("+00:00")
    json.dumps(found)


# ----------------------------------------------------------------------------------------------------- progress


def test_progress_prints_the_first_and_the_last_line(capsys: pytest.CaptureFixture[str]):
    progress = record.Progress("accuracy", interval=3600)
    for number in range(50):
        progress.write(iterate(number, fixed_point=FixedPointStatistics(100, 7.25, 12, 3)), Evaluation(1.0, 0.875))
    progress.finish(
        result(),
        train=Evaluation(0.5, 0.75),
        validation=None,
        test=Evaluation(math.nan, math.nan),
        wall_seconds=12.5,
        run_directory=Path("out/run"),
    )
    header, first, last, *block = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "0" and last.split()[0] == "49"
    assert len(header) == len(first) == len(last)
    assert last.split() == ["49", "12.2", "0.333333", "1.00e-01", "0.875", "7.2/12", "!3", "2", "7"]
    text = "\n".join(block)
    for told in ("converged after 4 iterations and 12.5 s: CONVERGED_GATOL", "the gradient is small", "out/run"):
        assert told in text
    assert "nan" not in text and "validation" not in text


def test_progress_prints_every_line_of_a_slow_run_once():
    stream = io.StringIO()
    progress = record.Progress("accuracy", interval=0, stream=stream)
    for number in range(3):
        progress.write(iterate(number, counts=Counts(gradients=123_456, gauss_newton_products=9_999)), None)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["it", "0", "1", "2"]
    assert lines[1].split()[-3:] == ["-", "123k", "9999"]


def test_quiet_progress_prints_nothing(capsys: pytest.CaptureFixture[str]):
    progress = record.Progress("accuracy", quiet=True)
    progress.write(iterate(), None)
    progress.finish(result(), train=None, validation=None, test=None, wall_seconds=0.0, run_directory=None)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------- energy


def domain(root: Path, name: str, kind: str, microjoules: int, wrap: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_energy_sums_packages_and_survives_a_wrap(tmp_path: Path):
    first = domain(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 0)
    domain(tmp_path, "intel-rapl:0:0", "core", 5)
    domain(tmp_path, "intel-rapl:2", "psys", 5)
    meter = record.EnergyMeter(tmp_path)
    meter.start()
    try:
        assert meter.joules() == 0.0
        second.write_text("250000\n")
        assert meter.joules() == pytest.approx(0.25)
        first.write_text("100000\n")  # wrapped: 0.1 J to the end of the range, 0.1 J since
        assert meter.joules() == pytest.approx(0.45)
        for part in tmp_path.glob("*/energy_uj"):
            part.write_text("1\n" if part == first else part.read_text())
        assert meter.joules() == pytest.approx(0.45 + 0.900001)
    finally:
        meter.stop()


def test_energy_is_none_where_it_cannot_be_read(tmp_path: Path):
    empty = record.EnergyMeter(tmp_path)
    empty.start()
    assert empty.joules() is None
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = record.EnergyMeter(tmp_path)
    assert meter.joules() is None  # not started
    meter.start()
    counter.unlink()
    assert meter.joules() is None
    counter.write_text("2\n")
    assert meter.joules() is None  # what it missed is unknown
    meter.stop()


def test_energy_is_read_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(energy, "READING_SECONDS", 0.01)
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = record.EnergyMeter(tmp_path)
    meter.start()
    for value in (600_000, 200_000, 700_000):  # one wrap, which a single reading at the end would not see
        before = meter._last
        partial = counter.with_suffix(".new")
        partial.write_text(f"{value}\n")
        partial.replace(counter)
        deadline = time.monotonic() + 10
        while meter._last == before and time.monotonic() < deadline:
            time.sleep(0.005)
    try:
        assert meter.joules() == pytest.approx(1.7)
    finally:
        meter.stop()


@pytest.mark.parallel([1, 2, 3])
def test_a_host_is_counted_once(tmp_path: Path):
    comm = parallel.WORLD
    measured = record.host_meter(comm)
    assert (measured is not None) == (comm.rank == 0)  # one host here
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = None
    if measured is not None:
        meter = record.EnergyMeter(tmp_path)
        meter.start()
    counter.write_text("500000\n")
    assert record.job_joules(comm, meter) == pytest.approx(0.5)
    if meter is not None:
        meter.stop()


@pytest.mark.parallel([1, 2, 3])
def test_part_of_the_energy_is_not_told_as_all(tmp_path: Path):
    comm = parallel.WORLD
    domain(tmp_path, "intel-rapl:0", "package-0", 0)
    last = comm.rank == comm.size - 1
    meter = record.EnergyMeter(tmp_path / "none" if last else tmp_path)  # as if each rank were a host
    meter.start()
    assert record.job_joules(comm, meter) is None
    meter.stop()


# -------------------------------------------------------------------------------------------------- best weights


def saved(path: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "cell.weight": torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        "scale": torch.tensor(0.1),
        "empty": torch.zeros(0, 2),
        "odd/name": torch.ones(2, requires_grad=True),
    }
    buffers = {"steps": torch.tensor(5), "mask": torch.tensor([True, False])}
    record.save_model(path, "mlp_deq", 'a = 1\n# "π"\n', tensors, buffers, {"metric": 0.875, "iteration": 12})
    return tensors


def test_a_model_comes_back_bit_for_bit(tmp_path: Path):
    path = tmp_path / "best.h5"
    path.write_text("a former one, of no matter what kind")
    tensors = saved(path)
    found = record.load_model(path)
    assert (found.model_name, found.config_text) == ("mlp_deq", 'a = 1\n# "π"\n')
    assert found.attributes == {"metric": 0.875, "iteration": 12}
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert found.buffers["steps"].item() == 5 and found.buffers["mask"].tolist() == [True, False]
    with h5py.File(path) as file:
        assert file.attrs["format"] == "hpcdeq-model" and file.attrs["version"] == 1 and file.attrs["complete"]
        assert file["/parameters/cell.weight"].shape == (3, 4)
    assert list(tmp_path.iterdir()) == [path]


def _edit(path: Path, change) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    """Change one bit of a weight where it lies in the file."""
    with h5py.File(path) as file:
        place = file["/parameters/cell.weight"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "best.h5: no such file"),
        (_truncate, "best.h5 is truncated, damaged or no HDF5 file"),
        (_flip, "best.h5 is truncated, damaged or no HDF5 file"),
        (lambda p: p.write_bytes(b"pickle"), "best.h5 is truncated, damaged or no HDF5 file"),
        (lambda p: _edit(p, lambda f: f.__delitem__("buffers")), "best.h5 is truncated, damaged .*buffers"),
        (lambda p: _edit(p, lambda f: f.attrs.__delitem__("config")), "best.h5 is truncated, damaged .*config"),
        (lambda p: _edit(p, lambda f: f.attrs.update(format="hpcdeq")), "format is 'hpcdeq', not 'hpcdeq-model'"),
        (lambda p: _edit(p, lambda f: f.attrs.update(version=2)), "version 2, and this hpcdeq reads version 1"),
        (lambda p: _edit(p, lambda f: f.attrs.__delitem__("complete")), "best.h5 is not complete"),
        (
            lambda p: _edit(p, lambda f: f["parameters/cell.weight"].__setitem__((0, 0), math.inf)),
            "/parameters/cell.weight has 1 of 12 numbers that are NaN or Inf",
        ),
    ],
)
def test_a_damaged_model_is_refused(tmp_path: Path, damage, message: str):
    path = tmp_path / "best.h5"
    saved(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        record.load_model(path)


def test_a_model_that_cannot_be_saved_leaves_the_former_one(tmp_path: Path):
    path = tmp_path / "best.h5"
    saved(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="/buffers/b has 1 of 2 numbers that are NaN or Inf"):
        record.save_model(path, "m", "", {}, {"b": torch.tensor([0.0, math.nan])}, {})
    with pytest.raises(CheckpointError, match="the attribute model is the format's own"):
        record.save_model(path, "m", "", {}, {}, {"model": 1})
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot write .*none/best.h5"):
        record.save_model(tmp_path / "none" / "best.h5", "m", "", {}, {}, {})
