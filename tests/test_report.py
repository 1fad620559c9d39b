"""Run directories read back, tables of them, and their figures."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from hpcdeq.errors import DataError
from hpcdeq.record import HISTORY_COLUMNS
from hpcdeq.report import Run, comparison_table, read_run, to_csv, to_markdown, write_figures
from hpcdeq.report.plots import work

SUMMARY = {
    "model": "mlp_deq",
    "optimizer": "trgn",
    "status": "converged",
    "reason": "CONVERGED_GATOL",
    "iterations": 2,
    "wall_seconds": 1.25,
    "seed": 3,
    "loss": {"train": 0.125, "validation": 0.5, "test": None},
    "metric": {"name": "accuracy", "train": 1.0, "validation": 0.75, "test": None},
    "counts": {"gradients": 30, "gauss_newton_products": 1200, "hessian_products": 0, "cell_evaluations": 12345},
}


def history(iterates: int, **given: object) -> dict[str, np.ndarray]:
    columns = {name: np.full(iterates, np.nan) for name in HISTORY_COLUMNS}
    columns["iteration"] = np.arange(float(iterates))
    for name in ("losses", "gradients", "gauss_newton_products", "hessian_products"):
        columns[name] = 10 * columns["iteration"]
    columns["wall_seconds"] = 0.5 * columns["iteration"]
    columns["train_loss"] = np.exp(-columns["iteration"])
    columns.update({name: np.asarray(value, float) for name, value in given.items()})
    return columns


def write_run(folder: Path, columns: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text('model = "mlp_deq"\n')
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    rows = [",".join(columns)]
    for i in range(len(columns["iteration"])):
        rows.append(",".join("" if np.isnan(c[i]) else repr(float(c[i])) for c in columns.values()))
    (folder / "history.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_run_comes_back_as_written(tmp_path: Path):
    written = history(3, validation_loss=[0.1, np.nan, 1 / 3])
    run = read_run(write_run(tmp_path / "run", written))
    assert run.config == 'model = "mlp_deq"\n'
    assert run.summary == SUMMARY
    assert list(run.history) == list(HISTORY_COLUMNS)
    for name, values in written.items():
        np.testing.assert_array_equal(run.history[name], values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "summary.json").unlink(), "no summary.json: the run has not finished"),
        (lambda d: [(d / n).unlink() for n in ("summary.json", "history.csv")], "this is no run directory"),
        (lambda d: (d / "summary.json").write_text('{"loss": '), "summary.json is damaged"),
        (lambda d: (d / "summary.json").write_text("[1]"), "summary.json is damaged: not an object"),
        (lambda d: (d / "config.toml").unlink(), "config.toml cannot be read"),
        (lambda d: (d / "history.csv").write_text("iteration,losses\n"), "has no column wall_seconds"),
        (lambda d: (d / "history.csv").write_text(""), "has no column iteration"),
        (lambda d: _append(d / "history.csv", "1,2\n"), "line 5: 2 fields"),
        (lambda d: _spoil(d / "history.csv"), "line 2: could not convert string to float: 'x'"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path: Path, damage, message: str):
    folder = write_run(tmp_path / "run", history(3))
    damage(folder)
    with pytest.raises(DataError, match=message):
        read_run(folder)


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def _spoil(path: Path) -> None:
    path.write_text(path.read_text().replace("0.0", "x", 1))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no such run directory"):
        read_run(tmp_path / "none")


def test_tables_have_every_run_and_keep_the_unmeasured_empty():
    other = {**SUMMARY, "optimizer": "a|b", "counts": {**SUMMARY["counts"], "gradients": 0}}
    rows = comparison_table([Run(Path("out/one"), "", SUMMARY, {}), Run(Path("out/two"), "", other, {})])
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [r["run"] for r in read] == ["one", "two"]
    assert read[0] == {
        "run": "one",
        "optimizer": "trgn",
        "seed": "3",
        "status": "converged",
        "reason": "CONVERGED_GATOL",
        "iterations": "2",
        "seconds": "1.25",
        "train loss": "0.125",
        "metric": "accuracy",
        "validation metric": "0.75",
        "test metric": "",
        "gradient samples": "30",
        "GN products": "1200",
        "Hessian products": "0",
        "cell evaluations": "12345",
    }
    lines = to_markdown(rows).splitlines()
    assert len(lines) == 4
    assert "a\\|b" in lines[3]
    assert all(line.replace("\\|", "").count("|") == len(rows[0]) + 1 for line in lines)
    assert "| 0.75 | – | 30 | 1,200 | 0 | 12,345 |" in lines[2]
    assert to_csv([]) == to_markdown([]) == ""


def test_work_weighs_losses_and_products():
    columns = history(2, losses=[0, 30], gradients=[0, 7], gauss_newton_products=[0, 5], hessian_products=[0, 2])
    np.testing.assert_allclose(work(Run(Path("run"), "", SUMMARY, columns)), [0, 7 + 10 + 10 + 4])


def test_figures_are_pictures(tmp_path: Path):
    columns = history(
        4,
        validation_loss=[1, np.nan, 0.5, np.nan],
        validation_metric=[0.2, np.nan, 0.8, np.nan],
        fixed_point_iterations_mean=[9, 9.5, 10, 11],
        fixed_point_iterations_max=[20, 21, 22, 25],
    )
    written = write_figures(read_run(write_run(tmp_path / "run", columns)))
    assert [path.name for path in written] == ["loss.png", "metric.png", "fixed_points.png"]
    from matplotlib.image import imread

    for path in written:
        assert path.parent == tmp_path / "run" / "figures"
        picture = imread(path)
        assert min(picture.shape[:2]) > 400
        assert picture[..., :3].std() > 0.05  # lines and text, not an empty page


def test_figures_are_drawn_only_of_what_was_measured(tmp_path: Path):
    flat = Run(tmp_path, "", SUMMARY, history(1, train_loss=[0.0]))
    assert [path.name for path in write_figures(flat, tmp_path / "flat")] == ["loss.png"]
    assert write_figures(Run(tmp_path, "", SUMMARY, history(0)), tmp_path / "none") == []
