"""What warm starts, adaptive accuracy and factors save in training: cell evaluations of L-BFGS, the price of a product.

    python scripts/bench_training.py --data crystals.h5 --out training.csv

First table: 50 L-BFGS iterations of the graph DEQ on the data's training rows, with and without warm starts and adaptive
accuracy: evaluations of the cell and products with its derivative a sample, seconds, the last loss. Second table: seconds of
a gradient and of a Gauss-Newton product, in the mean over a run of trust-region Gauss-Newton; assembling and factoring are
in the products' time. One thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_table import write_table

import hpcdeq
from hpcdeq.config import NO_FALLBACK, TRAINING_OPTIONS
from hpcdeq.models import build_model, model_config

OPTIONS = {name.removeprefix("deq_"): value for name, value in {**TRAINING_OPTIONS, **NO_FALLBACK}.items()}


def problem_on(data: str, model: str, settings: dict[str, Any], loss: str, **kept: Any) -> hpcdeq.TrainingProblem:
    """Return the training problem of a fresh model on the training rows of a file."""
    rows = hpcdeq.Dataset(data, split="train")
    representation = "graph" if model == "graph_deq" else "array"
    network = build_model(
        model,
        model_config(model, settings),
        representation,
        rows.input_shape,
        rows.output_size,
        seed=0,
        dtype=torch.float64,
    )
    for module in network.modules():
        if isinstance(module, hpcdeq.FixedPoint):
            module.options.given.update(OPTIONS)
    return hpcdeq.TrainingProblem(network, rows, loss, **kept)


def lbfgs(data: str, iterations: int, table: list[dict]) -> None:
    """Run L-BFGS with all savings and with none, and print the two side by side."""
    print(f"{iterations} L-BFGS iterations, graph DEQ, a sample in the mean")
    print("                                evaluations  products  seconds  last loss  largest gradient error measured")
    results = {}
    for name, kept in (("neither", False), ("warm starts, adaptive", True)):
        problem = problem_on(data, "graph_deq", {}, "cross_entropy", warm_start=kept, adaptive=kept)
        began = time.perf_counter()
        result = hpcdeq.minimize(problem, "tao:lmvm", iterations, {"tao_lmvm_mat_lmvm_hist_size": 20})
        seconds = time.perf_counter() - began
        count = problem.dataset.count
        evaluations, products = result.counts.cell_evaluations / count, result.counts.cell_vjps / count
        errors = [error for _, _, error in problem.accuracy.measured] if problem.accuracy else []
        results[name] = evaluations, result.loss
        print(
            f"{name:<32}{evaluations:10.1f}{products:10.1f}{seconds:9.1f}{result.loss:11.5f}"
            f"  {max(errors, default=float('nan')):.1e}",
            flush=True,
        )
        table.append(
            {"table": "lbfgs", "row": name, "evaluations": evaluations, "products": products, "seconds": seconds}
            | {"loss": result.loss}
        )
    (much, loss), (little, kept_loss) = results.values()
    print(
        f"ratio of evaluations {much / little:.2f} (aim 3), losses differ by {abs(kept_loss - loss) / loss:.2%} (aim 1 %)\n"
    )


class Clock:
    """Wraps a method and sums up its seconds."""

    def __init__(self, method: Callable) -> None:
        self.method = method
        self.calls = 0
        self.seconds = 0.0

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Call the method."""
        began = time.perf_counter()
        try:
            return self.method(*given, **named)
        finally:
            self.seconds += time.perf_counter() - began
            self.calls += 1

    @property
    def mean(self) -> float:
        """Seconds a call."""
        return self.seconds / max(self.calls, 1)


def products(cases: dict[str, tuple[str, str, dict, str]], iterations: int, table: list[dict]) -> None:
    """Print what gradients and Gauss-Newton products cost in runs of trgn."""
    print(f"{iterations} iterations of trgn, seconds in the mean over the run")
    print("case                            savings   gradient   product   ratio   aim   products by")
    for name, (data, model, settings, loss) in cases.items():
        for kept in (True, False):
            problem = problem_on(data, model, settings, loss, warm_start=kept, adaptive=kept)
            gradient, product = Clock(problem.owned_loss_and_gradient), Clock(problem.owned_product)
            problem.owned_loss_and_gradient = gradient  # type: ignore[method-assign]
            problem.owned_product = product  # type: ignore[method-assign]
            hpcdeq.minimize(problem, "trgn", iterations)
            (layer,) = problem.guidance.layers.values()
            method = layer.methods[-1].split(":")[0]
            ratio, aim = product.mean / gradient.mean, 1.0 if "LU" in method else 2.2
            print(
                f"{name:<32}{'on' if kept else 'off':<8}{gradient.mean:10.4f}{product.mean:10.4f}{ratio:8.2f}{aim:6.1f}   {method}",
                flush=True,
            )
            table.append(
                {"table": "products", "row": name, "savings": kept, "gradient": gradient.mean, "product": product.mean}
                | {"ratio": ratio, "aim": aim, "method": method}
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FILE.h5", help="crystals, from `python -m hpcdeq.prepare crystals`")
    parser.add_argument("--iterations", type=int, default=50, metavar="N", help="of L-BFGS (default 50)")
    parser.add_argument("--trgn-iterations", type=int, default=4, metavar="N", help="of trgn (default 4)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write both tables there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        from hpcdeq.builders.fields import prepare_burgers

        burgers = str(Path(folder) / "burgers.h5")
        prepare_burgers(burgers, 1000)
        if options.data:
            lbfgs(options.data, options.iterations, table)
        else:
            print("no --data: the L-BFGS table and the graph DEQ are left out\n")
        cases = {
            "mlp_deq, 64 numbers": (burgers, "mlp_deq", {"width": 64}, "mse"),
            "mlp_deq, 128 numbers": (burgers, "mlp_deq", {"width": 128}, "mse"),
            "mlp_deq, 400 numbers": (burgers, "mlp_deq", {"width": 400}, "mse"),
        }
        if options.data:
            cases["graph_deq, crystals"] = (options.data, "graph_deq", {}, "cross_entropy")
        products(cases, options.trgn_iterations, table)
    write_table(options.out, table)


if __name__ == "__main__":
    main()
