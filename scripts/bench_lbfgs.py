"""What an iteration of hpcdeq's L-BFGS costs beside torch.optim.LBFGS on the same full-batch problem.

    python scripts/bench_lbfgs.py --out lbfgs.csv

Two networks (a perceptron and a DeepONet, about 18,000 weights each) learn Burgers' equation, initial condition to solution, on
the training rows of 5,000 samples (those of scripts/study_pde.sh); float64, one thread, one rank, the last 20 steps remembered.
Four ways take turns from the same weights: a plain loop of torch (module, closure, torch.optim.LBFGS with strong_wolfe in one
call), the same optimiser through `minimize(..., "torch-lbfgs")`, TAO's as it is (`tao:lmvm`), and the preset `lbfgs` with its
own settings. hpcdeq works in chunks of samples (``--chunk-size``), torch's loop on all at once. Seconds are of iterations after
the first evaluation; line searches differ, so that both seconds an iteration and seconds an evaluation (loss and gradient over
all samples) are told. Ratios are of turns next to each other; medians over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_adam import MODELS, fresh
from bench_table import write_table
from torch import Tensor, nn

import hpcdeq
from hpcdeq.builders.fields import prepare_burgers
from hpcdeq.parallel import SELF

HISTORY, SAMPLES = 20, 5000
Turn = tuple[float, int, float]  # seconds of the iterations, evaluations in them, last loss


def plain(name: str, inputs: Tensor, targets: Tensor, iterations: int) -> Turn:
    """Run torch's L-BFGS on a module, as its documentation does."""
    model = fresh(name)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=iterations,
        max_eval=10**9,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    times: list[float] = []
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        times.append(time.perf_counter())
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    return time.perf_counter() - times[0], len(times) - 1, min(losses)


def through_hpcdeq(name: str, method: str, inputs: Tensor, targets: Tensor, iterations: int, chunk: int) -> Turn:
    """Run a method of `minimize`."""
    problem = hpcdeq.TrainingProblem(fresh(name), (inputs, targets), "mse", SELF, chunk_size=chunk)
    options = {"tao_lmvm_mat_lmvm_hist_size": HISTORY} if method == "tao:lmvm" else None
    result = hpcdeq.minimize(problem, method, iterations, options, raise_on_failure=False)
    seconds = result.history[-1][1] - result.history[0][1]
    return seconds, result.counts.gradients // len(inputs) - 1, result.loss


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300, metavar="N", help="of a turn (default 300)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="of each way (default 5)")
    parser.add_argument("--chunk-size", type=int, default=1024, metavar="N", help="of hpcdeq (default 1024)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the table there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare_burgers(str(Path(folder) / "burgers.h5"), SAMPLES)
        rows = hpcdeq.Dataset(Path(folder) / "burgers.h5", "train", SELF)
    inputs, targets = rows.batch(slice(0, len(rows)))
    assert isinstance(inputs, Tensor)
    table: list[dict] = []
    print(
        "model     way            iterations  evaluations   ms/iteration  ms/evaluation   to torch: iteration  evaluation"
    )
    for name in MODELS:
        turns: dict[str, list[Turn]] = {"torch": [], "torch-lbfgs": [], "tao:lmvm": [], "lbfgs": []}
        for turn in range(options.turns + 1):
            for way, taken in turns.items():
                if way == "torch":
                    spent = plain(name, inputs, targets, options.iterations)
                else:
                    spent = through_hpcdeq(name, way, inputs, targets, options.iterations, options.chunk_size)
                if turn:  # the first turn warms up
                    taken.append(spent)
        for way, taken in turns.items():
            per = [(s / options.iterations, s / evaluations) for s, evaluations, _ in taken]
            base = [(s / options.iterations, s / evaluations) for s, evaluations, _ in turns["torch"]]
            row = {"model": name, "way": way, "iterations": options.iterations, "evaluations": taken[0][1]}
            row |= {"samples": len(inputs), "turns": options.turns, "last_loss": taken[0][2]}
            for i, unit in enumerate(("iteration", "evaluation")):
                row[f"milliseconds_{unit}"] = 1e3 * statistics.median(p[i] for p in per)
                row[f"ratio_{unit}"] = statistics.median(p[i] / b[i] for p, b in zip(per, base, strict=True))
            table.append(row)
            print(
                f"{name:<10}{way:<15}{row['iterations']:>10}{row['evaluations']:>13}{row['milliseconds_iteration']:15.2f}"
                f"{row['milliseconds_evaluation']:15.2f}{row['ratio_iteration']:22.2f}{row['ratio_evaluation']:12.2f}",
                flush=True,
            )
    write_table(options.out, table)


if __name__ == "__main__":
    main()
