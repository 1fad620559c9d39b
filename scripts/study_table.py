"""Print a Markdown table of evaluated runs: python scripts/study_table.py RUN_DIR...."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def row(name: str, weights: str, seconds: str, scores: dict[str, float]) -> str:
    low, high = scores["accuracy_interval"]
    return (
        f"| {name} | {weights} | {seconds} | {scores['accuracy']:.4f} ({low:.3f} to {high:.3f}) |"
        f" {scores['balanced_accuracy']:.4f} | {scores['macro_f1']:.4f} |"
    )


def main(runs: list[str]) -> None:
    lines = [
        "| model | weights | training | test accuracy (95 %) | balanced | macro F1 |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for folder in map(Path, runs):
        summary = json.loads((folder / "summary.json").read_text())
        found = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        lines.append(
            row(folder.name, f"{summary['parameters']:,}", f"{summary['wall_seconds']:.0f} s", found["scores"])
        )
        for name, baseline in found["baselines"].items():
            if baseline["scores"] is not None:
                lines.append(row(name, "", "", baseline["scores"]))
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
