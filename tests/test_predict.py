"""Prediction: what a trained model says of raw files is what it says of its own dataset, on any number of ranks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image

import hpcdeq
from hpcdeq import parallel
from hpcdeq.data.dataset import column_statistics
from hpcdeq.data.schema import Schema
from hpcdeq.errors import CheckpointError, DataError
from hpcdeq.models.blocks import OutputScale
from hpcdeq.predict import main
from hpcdeq.prepare import main as prepare_main
from hpcdeq.record.restore import saved_of
from hpcdeq.train import main as train

PREPARE, TRAIN, PREDICT = ("-m", "hpcdeq.prepare"), ("-m", "hpcdeq.train"), ("-m", "hpcdeq.predict")
TRAINED = "--optimizer adam --max-iterations 2 --batch-size 16 --quiet"


def crystals(path: Path, count: int) -> list[str]:
    """Write rows of random crystals of two or three kinds of atoms, and return their names."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        frac = (np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0, 0.25]]) + 0.05 * random.random((3, 3)))[: 2 + number % 2]
        kinds = random.choice([3, 11, 17, 8, 26], len(frac)).tolist()
        cell = [*(4 + random.random(3)).tolist(), 90, 95, 100]
        row = {
            "id": f"c{number}",
            "band_gap": 5 * random.random(),
            "cell": cell,
            "Z": kinds,
            "frac": frac.ravel().tolist(),
        }
        rows.append({**row, "split": ("train", "validation", "test")[min(number % 5, 2) if number % 5 < 3 else 0]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return [str(row["id"]) for row in rows]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of_dataset(run_dir: Path, data: Path) -> dict[str, np.ndarray]:
    """Return probabilities by id, from the dataset file itself and the model's own forward pass."""
    model = hpcdeq.load(run_dir)
    found = {}
    for split in ("train", "validation", "test"):
        rows = hpcdeq.Dataset(data, split, parallel.SELF)
        if not len(rows):
            continue
        with torch.no_grad():
            outputs = torch.softmax(model(rows.batch(slice(None))[0]), dim=1).numpy()
        found |= dict(zip(rows.ids, outputs, strict=True))
    return found


@pytest.fixture(scope="module")
def run_of_crystals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source, its dataset and a run on it."""
    from hpcdeq.builders.crystals import prepare_crystals

    folder = tmp_path_factory.mktemp("crystals")
    crystals(folder / "rows.jsonl", 150)
    prepare_crystals(folder / "c.h5", folder / "rows.jsonl", comm=parallel.SELF)
    assert train([*f"--data {folder / 'c.h5'} --out {folder / 'r'} {TRAINED}".split()]) == 0
    return folder


def test_a_prediction_is_what_the_model_says(run_of_crystals: Path, tmp_path: Path) -> None:
    """Compare all rows, in the source's order, with the dataset's own batches: another path to the same numbers."""
    out = tmp_path / "p.csv"
    assert main([str(run_of_crystals / "r"), str(run_of_crystals / "rows.jsonl"), "--out", str(out)]) == 0
    rows = table(out)
    assert [row["id"] for row in rows] == [f"c{number}" for number in range(150)]
    expected = of_dataset(run_of_crystals / "r", run_of_crystals / "c.h5")
    names = ("metal", "semiconductor", "insulator")
    for row in rows:
        found = np.array([float(row[f"p_{name}"]) for name in names])
        assert np.abs(found - expected[row["id"]]).max() < 1e-5  # six digits are written
        assert row["class"] == names[int(expected[row["id"]].argmax())]
        assert row["converged"] == "true" and 0 <= float(row["residual"]) < 1e-5
    assert len({row["p_metal"] for row in rows}) > 100


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_and_bad_rows(run_of_crystals: Path, run: Run, tmp_path: Path, ranks: int) -> None:
    """Write the same table on many ranks, and list what cannot be read; a property is not asked for."""
    rows = [json.loads(line) for line in (run_of_crystals / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        del row["band_gap"], row["split"]
    rows[70]["Z"] = [200, 3]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{oops\n")
    one = run(*PREDICT, str(run_of_crystals / "r"), "new.jsonl", "--out", "one.csv")
    many = run(*PREDICT, str(run_of_crystals / "r"), "new.jsonl", "--out", "many.csv", ranks=ranks)
    assert one.returncode == many.returncode == 0, one.stderr + many.stderr
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "many.csv").read_text()
    assert len(table(tmp_path / "many.csv")) == 149
    skipped = table(tmp_path / "many.skipped.csv")
    assert [row["row"] for row in skipped] == ["c70 (line 71)", "line 151"]
    assert "149 predictions in" in many.stdout and "skipped          2" in many.stdout


def test_what_did_not_converge_says_so(run_of_crystals: Path, run: Run, tmp_path: Path) -> None:
    """Stop the fixed points after one step."""
    done = run(*PREDICT, str(run_of_crystals / "r"), str(run_of_crystals / "rows.jsonl"), "--out", "p.csv", "--limit", "9",
               "-deq_snes_max_it", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "p.csv")
    assert len(rows) == 9 and all(row["converged"] == "false" and float(row["residual"]) > 1e-6 for row in rows)
    assert "without fixed point       9" in done.stdout


def test_molecules_and_images(run: Run, tmp_path: Path) -> None:
    """Train on SMILES and on a folder of images, and predict on the same, without classes."""
    smiles = ["C" * k + end for k in range(1, 9) for end in ("O", "N", "C", "F", "C#N")]
    lines = [f"m{i},{text},{float(text[-1] in 'ONF') * 3}" for i, text in enumerate(smiles)]
    (tmp_path / "m.csv").write_text("id,smiles,mu\n" + "\n".join(lines))
    (tmp_path / "new.csv").write_text("smiles\n" + "\n".join(smiles[:7]) + "\nC1CC\n")
    for number in range(24):
        folder = tmp_path / "pictures" / ("dark", "light")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 100, (8, 8, 3)) + 120 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in (tmp_path / "pictures").rglob("*.png"):
        (plain / path.name).write_bytes(path.read_bytes())
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(plain / "large.png")
    (plain / "text.txt").write_text("no image")
    for kind, source, new, count, lost in (
        ("molecules", "m.csv", "new.csv", 7, 1),
        ("images", "pictures", "plain", 24, 2),
    ):
        for words in (
            [*PREPARE, kind, source, "--out", f"{kind}.h5"],
            [
                *TRAIN,
                "--data",
                f"{kind}.h5",
                "--out",
                kind,
                *TRAINED.split(),
                *(["--model", "conv_deq"] if kind == "images" else []),
            ],
            [*PREDICT, kind, new, "--out", f"{kind}.csv"],
        ):
            done = run(*words)
            assert done.returncode == 0, done.stderr
        rows = table(tmp_path / f"{kind}.csv")
        assert (len(rows), len(table(tmp_path / f"{kind}.skipped.csv"))) == (count, lost)
        expected = of_dataset(tmp_path / kind, tmp_path / f"{kind}.h5")
        ids = {row["id"]: row for row in rows}
        match = (
            {f"m{i}": f"line {i + 2}" for i in range(7)}
            if kind == "molecules"
            else {n: n.split("/")[-1] for n in expected}
        )
        names = [name for name in rows[0] if name.startswith("p_")]
        for name, other in match.items():
            assert np.abs(np.array([float(ids[other][p]) for p in names]) - expected[name]).max() < 1e-5


def test_bad_usage(run_of_crystals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say what, where and what to type, and leave nothing behind."""
    monkeypatch.chdir(tmp_path)
    source, good = str(run_of_crystals / "rows.jsonl"), str(run_of_crystals / "r")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("oops\n")
    for words, kind, told in (
        (["absent", source], DataError, "absent: no such run directory"),
        (["empty", source], CheckpointError, "empty/best.h5: no such file"),
        ([good, "none.jsonl"], DataError, "none.jsonl: no such file or folder"),
        ([good, "bad.jsonl"], DataError, "none of its 1 rows can be used"),
    ):
        with pytest.raises(kind, match=told):
            main([*words, "--out", "p.csv"])
    for words, told in (
        (["--limit", "0"], "--limit 0: at least 1"),
        (["-deq_snes_max_itt", "3"], "did you mean -deq_snes_max_it"),
        (["-tao_gatol", "3"], "-tao_gatol is not for a prediction, which trains nothing: leave it out"),
        (["--out", str(tmp_path / "no" / "p.csv")], "give a file name in a folder that exists"),
    ):
        with pytest.raises(hpcdeq.HpcdeqError, match=told):
            main([good, source, "--out", "p.csv", *words])
    assert not list(tmp_path.glob("p*"))


def test_models_of_other_data_or_times(run_of_crystals: Path, run: Run, tmp_path: Path) -> None:
    """Refuse to predict from files with a model of equations; load it in Python all the same; refuse a file without schema."""
    assert run(*PREPARE, "burgers", "--out", "b.h5", "--limit", "60").returncode == 0
    assert run(*TRAIN, "--data", "b.h5", "--out", "b", *TRAINED.split()).returncode == 0
    done = run(*PREDICT, "b", "b.h5", "--out", "p.csv")
    assert done.returncode == 2 and "call hpcdeq.load(RUN_DIR) in Python" in done.stderr
    saved = saved_of(hpcdeq.load(tmp_path / "b"))
    assert (saved.model, saved.schema.task, saved.config["seed"]) == ("mlp_deq", "regression", 0)
    assert Schema.from_json(saved.schema.as_json()) == saved.schema
    with h5py.File(tmp_path / "b" / "best.h5", "r+") as file:
        del file.attrs["schema"]
    with pytest.raises(CheckpointError, match="does not say what data it was trained on"):
        hpcdeq.load(tmp_path / "b")


def test_numbers_are_predicted_in_the_units_of_the_training_targets(tmp_path: Path) -> None:
    """The model learns numbers of mean 0 and deviation 1; what it says is in the units of the data, the saved model's too."""
    folder = tmp_path / "crystals"
    folder.mkdir()
    crystals(folder / "rows.jsonl", 60)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["energy"] = 7000 + 50 * row["band_gap"]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare = ["crystals", str(folder / "rows.jsonl"), "--property", "energy", "--regression", "--units", "meV"]
    assert prepare_main([*prepare, "--out", str(folder / "c.h5"), "--quiet"]) == 0
    assert train([*f"--data {folder / 'c.h5'} --out {folder / 'r'} {TRAINED} --max-iterations 0".split()]) == 0
    known = np.array([row["energy"] for row in rows if row["split"] == "train"])
    model = hpcdeq.load(folder / "r")
    scale = next(module for module in model.modules() if isinstance(module, OutputScale))
    assert float(scale.mean) == pytest.approx(known.mean(), rel=1e-12)
    assert float(scale.deviation) == pytest.approx(known.std(), rel=1e-12)
    assert main([str(folder / "r"), str(folder / "rows.jsonl"), "--out", str(folder / "p.csv"), "--quiet"]) == 0
    found = np.array([float(row["energy"]) for row in table(folder / "p.csv")])
    assert abs(found - known.mean()).max() < 5 * known.std() < 1000


@pytest.mark.parallel([1, 2, 3])
def test_column_statistics_do_not_depend_on_the_ranks(comm: parallel.Comm) -> None:
    targets = 1e6 + torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets[2, 2] = targets[5, 2] = torch.nan
    targets[:, 3] = torch.nan
    own = parallel.own_slice(7, comm.rank, max(comm.size - 1, 1)) if comm.rank < max(comm.size - 1, 1) else slice(0, 0)
    mean, deviation = column_statistics(targets[own], comm)
    whole = targets[:, :3].numpy()
    np.testing.assert_allclose(mean[:3], np.nanmean(whole, axis=0), rtol=1e-14)
    np.testing.assert_allclose(deviation[:3], np.nanstd(whole, axis=0), rtol=1e-9)
    assert float(mean[3]) == float(deviation[3]) == 0.0  # nothing is known
