"""What a step of hpcdeq's Adam costs beside a plain loop of torch, on explicit networks too small to hide any overhead.

    python scripts/bench_adam.py --out adam.csv

Two networks from 64 numbers to 64 (a perceptron and a DeepONet, about 18,000 weights each), 1,500 samples, batches of 64,
float64, one thread. The loops take turns: some epochs of torch (index_select, forward, backward, torch.optim.Adam with
``fused`` or ``foreach``, the loss read off) and as many of hpcdeq (`minimize(..., "adam")`: distributed moments, schedule,
history, clock). The time of a step is that of a turn over its steps, the ratio that of two turns next to each other; medians
over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_table import write_table
from torch import Tensor, nn

import hpcdeq
from hpcdeq.methods import Schedule
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.parallel import SELF

POINTS, SAMPLES, BATCH, WIDTH, HARMONICS = 64, 1500, 64, 64, 4


def perceptron(inputs: int, hidden: int, width: int = WIDTH) -> nn.Sequential:
    """Return a tanh network with some hidden layers, linear at its end."""
    layers: list[nn.Module] = []
    for i in range(hidden):
        layers += [nn.Linear(width if i else inputs, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, width))


class DeepONet(nn.Module):
    """Branch on the samples of the input function, trunk on the points of a periodic grid (Lu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = perceptron(POINTS, 2)
        self.trunk = perceptron(2 * HARMONICS, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        phase = 2 * torch.pi * torch.arange(POINTS)[:, None] / POINTS * torch.arange(1, HARMONICS + 1)
        self.register_buffer("features", torch.cat([phase.cos(), phase.sin()], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the values at the grid's points, ``(B, 64)``."""
        return nn.functional.linear(self.branch(x), self.trunk(self.features)) + self.bias


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": lambda: perceptron(POINTS, 3), "deeponet": DeepONet}


def fresh(name: str) -> nn.Module:
    """Return a network with the same initial weights at every call."""
    torch.manual_seed(0)
    return MODELS[name]().double()


def torchs_seconds(name: str, inputs: Tensor, targets: Tensor, epochs: int, variant: str) -> float:
    """Return the seconds of a step of a plain training loop."""
    model = fresh(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=variant == "fused", foreach=variant == "foreach")
    steps = 0
    began = time.perf_counter()
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            outputs = model(inputs.index_select(0, rows))
            loss = 0.5 * nn.functional.mse_loss(outputs, targets.index_select(0, rows))
            loss.backward()
            optimizer.step()
            total += loss.item()
            steps += 1
    return (time.perf_counter() - began) / steps


def our_seconds(name: str, inputs: Tensor, targets: Tensor, epochs: int) -> float:
    """Return the seconds of a step of `minimize`, from the first iterate of its history to the last."""
    problem = hpcdeq.TrainingProblem(fresh(name), (inputs, targets), "mse", SELF)
    settings = MinibatchSettings(1e-3, BATCH, schedule=Schedule("cosine"))
    result = hpcdeq.minimize(problem, "adam", epochs, minibatch=settings)
    return (result.history[-1][1] - result.history[0][1]) / (epochs * -(-len(inputs) // BATCH))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, metavar="N", help="of a turn (default 6)")
    parser.add_argument("--turns", type=int, default=15, metavar="N", help="of each loop (default 15)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the table there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    inputs = torch.randn(SAMPLES, POINTS, dtype=torch.float64)
    targets = torch.tanh(inputs @ torch.randn(POINTS, POINTS, dtype=torch.float64) / 8)
    table: list[dict] = []
    print(
        "model       weights  torch fused  torch foreach   hpcdeq   over fused   over foreach   (microseconds a step)"
    )
    for name in MODELS:
        times: dict[str, list[float]] = {"fused": [], "foreach": [], "hpcdeq": []}
        for turn in range(options.turns + 1):
            for variant, seconds in times.items():
                if variant == "hpcdeq":
                    spent = our_seconds(name, inputs, targets, options.epochs)
                else:
                    spent = torchs_seconds(name, inputs, targets, options.epochs, variant)
                if turn:  # the first turn warms up
                    seconds.append(spent)
        medians = {variant: 1e6 * statistics.median(seconds) for variant, seconds in times.items()}
        ratios = {
            variant: statistics.median(o / t for o, t in zip(times["hpcdeq"], times[variant], strict=True))
            for variant in ("fused", "foreach")
        }
        weights = sum(p.numel() for p in fresh(name).parameters())
        print(
            f"{name:<12}{weights:>7}{medians['fused']:13.0f}{medians['foreach']:15.0f}{medians['hpcdeq']:9.0f}"
            f"{ratios['fused']:13.2f}{ratios['foreach']:15.2f}",
            flush=True,
        )
        row = {"model": name, "weights": weights, "turns": options.turns}
        row |= {f"{variant}_microseconds": value for variant, value in medians.items()}
        table.append(row | {f"ratio_to_{variant}": value for variant, value in ratios.items()})
    write_table(options.out, table)


if __name__ == "__main__":
    main()
