"""Which Gauss-Newton method of TAO's, with which preconditioner: loss and test error after equal times.

    python scripts/bench_gauss_newton.py --seconds 20 --out gauss_newton.csv

A DeepONet (18,257 weights) learns Burgers' equation, initial condition of five modes to solution, on the training rows of 2,500
samples; float64, one thread, one rank. Every row begins from the same weights; the rows take turns, ``--seeds`` times.
Medians over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

import hpcdeq
from hpcdeq.builders.field_settings import Burgers
from hpcdeq.builders.fields import prepare_field
from hpcdeq.data import Dataset
from hpcdeq.models import build_model, model_config
from hpcdeq.parallel import SELF

SAMPLES = 2500
BNK = {"tao_bnk_ksp_max_it": 30, "tao_bnk_ksp_rtol": 0.1, "tao_bnk_init_type": "constant", "tao_trust0": 1.0}


@dataclass(frozen=True)
class Way:
    """A method and its options."""

    name: str
    method: str
    options: dict[str, str | float] = field(default_factory=dict)
    curvature: str | None = "gauss_newton"


WAYS = (
    Way("levenberg_marquardt, kronecker (trgn)", "trgn"),
    Way("levenberg_marquardt, inner_lbfgs", "trgn", {"tao_pc_type": "inner_lbfgs"}),
    Way("levenberg_marquardt, diagonal", "trgn", {"tao_pc_type": "gauss_newton_diagonal"}),
    Way("levenberg_marquardt, none", "trgn", {"tao_pc_type": "none"}),
    Way("bntr, kronecker", "tao:bntr", {**BNK, "tao_bnk_pc_type": "kronecker"}),
    Way("bntr, lmvm (PETSc's default)", "tao:bntr", BNK),
    Way("bnls, kronecker", "tao:bnls", {**BNK, "tao_bnk_pc_type": "kronecker"}),
    Way("ntr, kronecker", "tao:ntr", {"tao_ntr_ksp_max_it": 30, "tao_ntr_pc_type": "kronecker"}),
    Way("brgn over bntr", "tao:brgn", {}, None),
    Way("newton", "newton", {}, None),
    Way("lbfgs, kronecker", "lbfgs", {}, None),
    Way("lmvm (PETSc's)", "tao:lmvm", {}, None),
)


def run(way: Way, sets: dict[str, Dataset], seed: int, seconds: float) -> dict[str, float | str | int]:
    """Train once, and say what came of it."""
    train = sets["train"]
    settings = model_config("deeponet", {})
    model = build_model("deeponet", settings, "array", train.input_shape, train.output_size, seed=seed)
    problem = hpcdeq.TrainingProblem(model, train, "mse", SELF, chunk_size=2048)
    result = hpcdeq.minimize(
        problem,
        way.method,
        10**6,
        way.options,
        max_seconds=seconds,
        curvature=way.curvature,
        raise_on_failure=False,
    )
    return {
        "way": way.name,
        "seed": seed,
        "reason": result.reason,
        "iterations": result.iterations,
        "seconds": result.history[-1][1],
        "products": result.counts.gauss_newton_products / train.count,
        "gradients": result.counts.gradients / train.count,
        "loss": result.loss,
        "test": problem.evaluate(result.x, sets["test"]).metric,
    }


def main() -> None:
    """Run all, print a table, write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of each run (default 20)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument("--out", type=Path, default=Path("gauss_newton.csv"), metavar="FILE.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "burgers.h5"
        prepare_field(path, Burgers(modes=5), SAMPLES, comm=SELF)
        sets = {split: Dataset(path, split, SELF) for split in ("train", "test")}
    rows = []
    for seed in range(options.seeds):
        for way in WAYS:
            rows.append(run(way, sets, seed, options.seconds))
            print(f"seed {seed} {way.name:<40} loss {rows[-1]['loss']:.3e} test {rows[-1]['test']:.4f}", flush=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(f"\n{'method':<40}{'iterations':>11}{'products':>10}{'loss':>11}{'test error':>12}{'over trgn':>11}")
    own = statistics.median(float(r["test"]) for r in rows if r["way"] == WAYS[0].name)
    for way in WAYS:
        found = [r for r in rows if r["way"] == way.name]
        middle = {k: statistics.median(float(r[k]) for r in found) for k in ("iterations", "products", "loss", "test")}
        print(
            f"{way.name:<40}{middle['iterations']:>11.0f}{middle['products']:>10.0f}{middle['loss']:>11.2e}"
            f"{middle['test']:>12.4f}{middle['test'] / own:>11.2f}"
        )
    print(f"rows of every seed: {options.out}")


if __name__ == "__main__":
    main()
