"""How evenly the work is shared out: by cost and by number, whole splits and minibatches, on the sizes of real samples.

    python scripts/bench_shares.py crystals.h5 --out shares.csv        seconds; nothing but offsets is read
    python scripts/bench_shares.py crystals.h5 --costs                 and a minute to measure what atoms and edges cost

Numbers of ranks are simulated: shares follow from the sizes alone. A minibatch is a random choice of all samples, each
rank works on those that it holds, and waits for the rank with the most: what is told is the mean over an epoch. Beside it what
one sample from each of as many stretches of the data as the batch is large would give.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from bench_table import write_table

from hpcdeq import parallel
from hpcdeq.data.schema import SPLITS
from hpcdeq.data.shards import Shards
from hpcdeq.data.shares import boundaries, sample_costs

RANKS = (2, 4, 8, 16, 32, 64)
BATCHES = (64, 128, 512)


def uneven(work: np.ndarray) -> float:
    """Return the largest over the mean."""
    return float(work.max() / work.mean())


def whole_splits(costs: np.ndarray, splits: np.ndarray, table: list[dict]) -> None:
    """Print how even the shares of each split are."""
    print("largest share / mean      " + "".join(f"{ranks:>8}" for ranks in RANKS) + "  ranks")
    for split, name in enumerate(SPLITS):
        own = costs[splits == split]
        for way in ("cost", "number"):
            row = []
            for ranks in RANKS:
                numbers = np.array([len(own) * rank // ranks for rank in range(ranks + 1)])
                if way == "cost":
                    numbers = boundaries(
                        np.array([len(own)]), np.array([own.sum()]), lambda _, own=own: own, ranks
                    ).numbers
                reached = np.concatenate([[0], np.cumsum(own)])
                row.append(uneven(np.diff(reached[numbers])))
                table.append({"table": name, "way": f"by {way}", "ranks": ranks, "imbalance": row[-1]})
            print(f"  {name:<12}by {way:<9}" + "".join(f"{value:8.3f}" for value in row))


def minibatches(costs: np.ndarray, table: list[dict]) -> None:
    """Print how even the work of minibatches is."""
    random = np.random.default_rng(0)
    print("\nminibatches, mean of largest / mean      2       4       8  ranks")
    for size in BATCHES:
        steps = len(costs) // size
        drawn = random.permutation(len(costs))[: steps * size].reshape(steps, size)
        edges = len(costs) * np.arange(size + 1) // size
        spread = np.stack(
            [random.permutation(np.arange(a, b))[:steps] for a, b in zip(edges, edges[1:], strict=False)], 1
        )
        for way, batches in (("random", drawn), ("one of each stretch", spread)):
            row = []
            for ranks in RANKS[:3]:
                found = boundaries(np.array([len(costs)]), np.array([costs.sum()]), lambda _: costs, ranks)
                owners = np.searchsorted(found.numbers, batches, side="right") - 1
                work = np.stack([np.where(owners == rank, costs[batches], 0).sum(axis=1) for rank in range(ranks)])
                row.append(float((work.max(axis=0) / work.mean(axis=0)).mean()))
                table.append({"table": f"batches of {size}", "way": way, "ranks": ranks, "imbalance": row[-1]})
            print(f"  {size:>5} {way:<26}" + "".join(f"{value:8.3f}" for value in row))


def measured_costs(table: list[dict], repeats: int) -> None:
    """Fit seconds of a gradient of the graph DEQ to samples, atoms and edges of chunks that differ in all three."""
    import torch

    import hpcdeq
    from hpcdeq.data.batches import GraphBatch
    from hpcdeq.models import build_model, model_config

    torch.set_num_threads(1)
    model = build_model(
        "graph_deq", model_config("graph_deq", {}), "graph", (), 3, seed=0, dtype=torch.float64, device="cpu"
    )
    for module in model.modules():
        if isinstance(module, hpcdeq.FixedPoint):
            module.options.given.update({"snes_rtol": 1e-8, "ksp_rtol": 1e-6})
    rows, seconds = [], []
    for size, degree in ((8, 4), (8, 12), (8, 24), (32, 4), (32, 12), (32, 24)):
        samples = max(1, 8192 // (size * degree))
        atoms, torch_random = samples * size, torch.Generator().manual_seed(size + degree)
        graph = torch.arange(samples).repeat_interleave(size)
        target = torch.arange(atoms).repeat_interleave(degree)
        source = target // size * size + torch.randint(0, size, (atoms * degree,), generator=torch_random)
        vectors = 2 * torch.randn(atoms * degree, 3, dtype=torch.float64, generator=torch_random)
        numbers = torch.randint(1, 90, (atoms,), generator=torch_random)
        batch = GraphBatch(numbers, source, target, vectors, graph, samples, degree=degree)
        problem = hpcdeq.TrainingProblem(
            model, (batch, torch.arange(samples) % 3), "cross_entropy", parallel.SELF, warm_start=False
        )
        p, best = problem.initial(), float("inf")
        for _ in range(repeats + 1):
            before = problem.accounts.totals().cell_evaluations
            began = time.process_time()
            problem.gradient(p)
            best = min(best, time.process_time() - began)
            iterations = (problem.accounts.totals().cell_evaluations - before) / samples
        # A unit of work is an iteration: how many a sample takes is not known before.
        rows.append([samples, atoms, atoms * degree])
        seconds.append(best / iterations)
        print(
            f"  {samples:5} samples {atoms:6} atoms {atoms * degree:6} edges: {1e3 * seconds[-1]:7.3f} ms an iteration"
        )
    weighted = np.array(rows) / np.array(seconds)[:, None]
    found = np.linalg.lstsq(weighted, np.ones(len(rows)), rcond=None)[0]
    error = np.abs(weighted @ found - 1).max()
    print("  an edge {2:.3f}, an atom {1:.3f}, a sample {0:.3f} us an iteration".format(*(1e6 * found)), end="")
    print(
        f": an atom costs {found[1] / found[2]:.1f} edges, a sample {found[0] / found[2]:.1f}; largest error {error:.0%}"
    )
    for name, value in zip(("sample", "atom", "edge"), found, strict=True):
        table.append({"table": "costs", "way": name, "seconds": value})


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FILE.h5", help="graphs, from python -m hpcdeq.prepare")
    parser.add_argument("--costs", action="store_true", help="measure the cost of a sample, too")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each gradient (default 3)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the tables there")
    options = parser.parse_args()
    shards = Shards(options.data)
    costs = sample_costs(*shards.sizes_of(0, int(shards.starts[1])))
    splits = shards.splits_of(0, int(shards.starts[1]))
    table: list[dict] = []
    whole_splits(costs, splits, table)
    minibatches(costs[splits == 0], table)
    if options.costs:
        print("\ncosts of a gradient in processor time, the best of the repeats")
        measured_costs(table, options.repeats)
    write_table(options.out, table)


if __name__ == "__main__":
    main()
