"""Print a Markdown table of evaluated runs: python scripts/study_table.py RUN_DIR... [--by COLUMN --source TABLE.csv[.gz]].

With --by, the samples of each value of a column of the source are scored by themselves, too.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from pathlib import Path

import numpy as np

from hpcdeq.report.classification import class_scores


def row(name: str, weights: str, seconds: str, scores: dict) -> str:
    low, high = scores["accuracy_interval"]
    return (
        f"| {name} | {weights} | {seconds} | {scores['accuracy']:.4f} ({low:.3f} to {high:.3f}) |"
        f" {scores['balanced_accuracy']:.4f} | {scores['macro_f1']:.4f} |"
    )


def values_of(source: Path, column: str) -> dict[str, str]:
    """Return a column of a table by the ids of its rows."""
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", newline="") as file:
        return {line["id"]: line[column] for line in csv.DictReader(file)}


def scores_by(evaluation: Path, values: dict[str, str]) -> dict[str, tuple[int, dict]]:
    """Return the number of samples and their scores by value."""
    with (evaluation / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [column.removeprefix("p_") for column in rows[0] if column.startswith("p_")]
    labels = np.array([names.index(line["label"]) for line in rows])
    probabilities = np.array([[float(line[f"p_{name}"]) for name in names] for line in rows])
    value = np.array([values[line["id"]] for line in rows])
    return {
        one: (int((value == one).sum()), class_scores(labels[value == one], probabilities[value == one]).as_dict())
        for one in sorted(set(value))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN_DIR", type=Path, nargs="+")
    parser.add_argument("--by", metavar="COLUMN", help="of the source: score its values by themselves, too")
    parser.add_argument("--source", metavar="TABLE.csv[.gz]", type=Path, help="with ids")
    arguments = parser.parse_args()
    if bool(arguments.by) != bool(arguments.source):
        parser.error("--by and --source go together")
    values = values_of(arguments.source, arguments.by) if arguments.by else None
    print("| model | weights | training | test accuracy (95 %) | balanced | macro F1 |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for folder in arguments.runs:
        summary = json.loads((folder / "summary.json").read_text())
        found = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        print(row(folder.name, f"{summary['parameters']:,}", f"{summary['wall_seconds']:.0f} s", found["scores"]))
        if values is not None:
            for one, (count, scores) in scores_by(folder / "evaluation", values).items():
                print(row(f"{folder.name}, {count} of {arguments.by} {one}", "", "", scores))
        for name, baseline in found["baselines"].items():
            if baseline["scores"] is not None:
                print(row(name, "", "", baseline["scores"]))


if __name__ == "__main__":
    main()
