"""The scripts of the studies run from raw files to a table, on a handful of samples and for a second a model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, clean_environment


def crystals(path: Path) -> Path:
    """Write 90 cubic crystals of two atoms, whose class is their size."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(90):
        side = 4.0 + number % 3 + 0.2 * random.random()
        row = {"id": f"c{number}", "band_gap": [0.0, 1.0, 4.0][number % 3], "cell": [side] * 3 + [90] * 3}
        row |= {
            "e_form": -side,
            "magmom": 0.0,
            "e_fermi": side,
            "Z": random.choice([3, 11, 17, 8], 2).tolist(),
            "frac": [0, 0, 0, 0.5, 0.5, 0.5],
        }
        rows.append({**row, "split": "test" if number > 60 else "train"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.timeout(600)
def test_the_study_of_crystals(tmp_path: Path) -> None:
    source, out = crystals(tmp_path / "rows.jsonl"), tmp_path / "study"
    command = ["bash", str(ROOT / "scripts" / "study_crystals.sh"), str(source), str(out), "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (out / "table.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names[0] == "graph_deq" and names[-2:] == ["graph_unrolled", "cgcnn"]
    assert {"majority class", "gradient boosting"} <= set(names)
    assert len((out / "predictions.csv").read_text().splitlines()) == 91
    again = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    assert again.returncode == 0 and "iterations" not in again.stdout, "what is finished was done again"


def test_a_study_without_its_source_says_what_to_type() -> None:
    for name in ("crystals", "frameworks", "molecules", "images"):
        script = str(ROOT / "scripts" / f"study_{name}.sh")
        done = subprocess.run(["bash", script], capture_output=True, text=True, env=clean_environment(), check=False)
        assert done.returncode == 2 and f"bash scripts/study_{name}.sh [--full] SOURCE" in done.stderr
