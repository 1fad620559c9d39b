"""The scripts of the studies run from raw files to a table, on a handful of samples and for a second a model."""

from __future__ import annotations

import json
import subprocess
import sys
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
    command.insert(2, "--full")
    again = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    assert again.returncode == 0 and "iterations" not in again.stdout, "what is finished was done again"


def test_a_study_without_its_source_says_what_to_type() -> None:
    for name in ("crystals", "frameworks", "molecules", "images"):
        script = str(ROOT / "scripts" / f"study_{name}.sh")
        done = subprocess.run(["bash", script], capture_output=True, text=True, env=clean_environment(), check=False)
        assert done.returncode == 2 and f"bash scripts/study_{name}.sh [--full] SOURCE" in done.stderr


def test_the_table_scores_parts_of_a_source_by_themselves(tmp_path: Path) -> None:
    """Two of three right from the lab, none of one from the field."""
    evaluation = tmp_path / "run" / "evaluation"
    evaluation.mkdir(parents=True)
    rows = [("a", "low", 0.9), ("b", "low", 0.6), ("c", "high", 0.8), ("d", "high", 0.7)]
    lines = [f"{name},{label},low,{p},{1 - p},true" for name, label, p in rows]
    (evaluation / "predictions.csv").write_text("\n".join(["id,label,predicted,p_low,p_high,converged", *lines]) + "\n")
    scores = {"accuracy": 0.5, "accuracy_interval": [0.2, 0.8], "balanced_accuracy": 0.5, "macro_f1": 0.3}
    (evaluation / "evaluation.json").write_text(json.dumps({"scores": scores, "baselines": {}}))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"parameters": 1234, "wall_seconds": 5.0}))
    (tmp_path / "source.csv").write_text("id,place\nd,field\nc,lab\nb,lab\na,lab\nunused,moon\n")
    command = [sys.executable, str(ROOT / "scripts" / "study_table.py"), str(tmp_path / "run")]
    by = ["--by", "place", "--source", str(tmp_path / "source.csv")]
    done = subprocess.run([*command, *by], capture_output=True, text=True, env=clean_environment(), check=False)
    assert done.returncode == 0, done.stderr
    table = {
        cells[1].strip(): cells[4].split()[0] for line in done.stdout.splitlines()[2:] for cells in [line.split("|")]
    }
    assert table == {"run": "0.5000", "run, 1 of place field": "0.0000", "run, 3 of place lab": "0.6667"}
    done = subprocess.run([*command, *by[:2]], capture_output=True, text=True, env=clean_environment(), check=False)
    assert done.returncode == 2 and "--by and --source go together" in done.stderr
