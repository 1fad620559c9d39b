"""Time to a verified fixed point, and to a verified gradient, beside torchdeq 0.1.0 at its best.

    python scripts/bench_solves.py                           every row, about an hour of one core
    python scripts/bench_solves.py --rows tanh-0.95/float64  the rows whose name contains this text, or is it: 3 minutes
    python scripts/bench_solves.py --quick                   3 repeats, and a smaller search for the peer's settings

Rows are named CELL-RADIUS/PRECISION/PASS. CELL: tanh, 256 samples of tanh(W z + x) with a Gaussian 256 x 256 matrix W;
conv, 32 samples of 32 channels of 16 x 16 points under a 3 x 3 convolution and tanh; graph, message passing (the cell of
hpcdeq's graph DEQ) in 512 real crystals. RADIUS: the largest spectral radius of the cell's derivative at the samples'
fixed points. PRECISION: float32 solved to 1e-4, float64 to 1e-8: ||f(z) - z|| <= tolerance ||f(z)|| in every sample, by
the true residual. PASS: forward, or forward+backward (gradients of <z, c> in weights and inputs).

A row is refused, with its reason, where an answer misses the tolerance, or a gradient is further than 10 times the
tolerance from the reference (plain iteration in float64, forward and backward, to 1e-12). torchdeq is given its settings and
the number of iterations in advance: see bench_torchdeq.py. Its bare loop, plain iteration of a known length without any
test of convergence, is timed too, but not compared with. One thread; the sides take turns; medians of the thread's own
seconds, which on an idle machine are those of the wall clock (the CSV has both) and on a busy one are disturbed less.

Columns: seconds; evaluations of the cell and products with its transposed derivative, in whole batches; the share of the
time that is neither (overhead); the ratio of seconds, torchdeq over hpcdeq, and the ratio that is aimed at.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_cells import Case, Counted, conv_case, graph_cases, scaled_to, solved, tanh_case, transposed_product
from bench_torchdeq import (
    Choice,
    Variant,
    adjoint_function,
    fastest,
    fewest_iterations,
    forward_model,
    inside,
    layouts,
    training_model,
    variants,
)
from torch import Tensor

import hpcdeq
from hpcdeq.errors import ConvergenceError

PRECISIONS = {"float32": (torch.float32, 1e-4), "float64": (torch.float64, 1e-8)}
PASSES = ("forward", "forward+backward")
KINDS = [("tanh", 0.9), ("tanh", 0.95), ("tanh", 0.99), ("conv", 0.9), ("graph", 0.9)]
# torchdeq's seconds over hpcdeq's that are aimed at, by tolerance and spectral radius.
AIMS = {(1e-8, 0.9): 1.5, (1e-8, 0.95): 2.5, (1e-8, 0.99): 4.0, (1e-4, 0.9): 1.3, (1e-4, 0.95): 2.0, (1e-4, 0.99): 3.0}
GRADIENT_SLACK = 10.0
REFERENCE_ERROR = 1e-12
CRYSTALS = Path(__file__).resolve().parents[2] / "shared/data/crystals/crystals_small.jsonl.gz"


class Refused(Exception):
    """A row that is not measured, and why."""


@dataclass
class Timed:
    """What one side's repeats took: CPU and wall seconds, share outside the cell; evaluations and products of the last."""

    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)
    evaluations: float = 0.0
    products: int = 0

    @property
    def median(self) -> float:
        """CPU seconds."""
        return statistics.median(self.seconds)


@dataclass
class Side:
    """One of the two that are compared: its measured cell, and a call that returns z and gradients (none forward)."""

    cell: Counted
    call: Callable[[], tuple[Tensor, list[Tensor]]]
    timed: Timed = field(default_factory=Timed)

    def measure(self, rows: int) -> None:
        """Run once more under the clock. Not collective."""
        self.cell.seconds, self.cell.rows = 0.0, 0
        with measured_products() as products:
            wall, since = time.perf_counter(), time.process_time()
            self.call()
            seconds = time.process_time() - since
        self.timed.wall.append(time.perf_counter() - wall)
        self.timed.seconds.append(seconds)
        self.timed.overhead.append(1 - (self.cell.seconds + sum(products)) / seconds)
        self.timed.evaluations, self.timed.products = self.cell.rows / rows, len(products)


autograd_grad = torch.autograd.grad


@contextlib.contextmanager
def measured_products() -> Iterator[list[float]]:
    """Measure the calls of ``torch.autograd.grad``, by which both libraries multiply with derivatives of the cell."""
    taken: list[float] = []

    def grad(*arguments: object, **options: object) -> object:
        since = time.process_time()
        result = autograd_grad(*arguments, **options)  # type: ignore[arg-type]
        taken.append(time.process_time() - since)
        return result

    torch.autograd.grad = grad  # type: ignore[assignment]
    try:
        yield taken
    finally:
        torch.autograd.grad = autograd_grad


@dataclass(frozen=True)
class Reference:
    """The answer to compare with, float64: fixed point, cotangent, gradients."""

    z: Tensor
    cotangent: Tensor
    gradients: list[Tensor]


def reference(case: Case) -> Reference:
    """Return fixed points and gradients by plain iteration, forward and backward. Not collective."""
    z = solved(case, 1e-11)
    with torch.no_grad():
        while True:
            image = case.cell(z, case.given)
            done = float((image - z).norm()) <= REFERENCE_ERROR * float(image.norm())
            z = image
            if done:
                break
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    product, u = transposed_product(case, z), torch.zeros_like(z)
    while True:
        image = product(u) + cotangent
        done = float((image - u).norm()) <= REFERENCE_ERROR * float(image.norm())
        u = image
        if done:
            break
    return Reference(z, cotangent, list(autograd_grad(case.cell(z, case.given), case.tensors(), u)))


def our_side(case: Case, tolerance: float, cotangent: Tensor, *, backward: bool) -> Side:
    """Return hpcdeq's solve with default settings. Not collective."""
    cell = Counted(case.cell)
    options = {"snes_rtol": tolerance, "snes_atol": 0.0, "ksp_rtol": tolerance}
    if not backward:

        def solve() -> tuple[Tensor, list[Tensor]]:
            found = hpcdeq.solve_fixed_point(cell, case.given, case.z0, options=options, sample_index=case.sample_index)
            return found.value, []

        return Side(cell, solve)
    layer = hpcdeq.FixedPoint(cell, options=options, sample_index=case.sample_index)

    def differentiate() -> tuple[Tensor, list[Tensor]]:
        z = layer(case.given, case.z0)
        return z, list(autograd_grad((z * cotangent).sum(), case.tensors()))

    return Side(cell, differentiate)


@dataclass(frozen=True)
class Task:
    """What torchdeq is to solve: a case, its cell as a function of the state, and when an answer counts."""

    case: Case
    tolerance: float
    cotangent: Tensor
    cell: Counted
    backward: bool

    def function(self, z: Tensor) -> Tensor:
        """Return f(z)."""
        return self.cell(z, self.case.given)

    def solves(self, z: Tensor, image: Tensor) -> bool:
        """Whether every sample is within the tolerance."""
        return bool((self.case.norms(image - z) <= self.tolerance * self.case.norms(image)).all())

    def accepts(self, z: Tensor, image: Tensor) -> bool:
        """Whether the answer counts; training returns f of what the solver returns."""
        return self.solves(image, self.function(image)) if self.backward else self.solves(z, image)

    def accepts_adjoint(self, u: Tensor, image: Tensor) -> bool:
        """Whether the adjoint counts: the easier of each sample's test, and all samples' together."""
        return self.solves(u, image) or float((image - u).norm()) <= self.tolerance * float(self.cotangent.norm())

    def adjoint(self, choice: Choice) -> Callable[[Tensor], Tensor]:
        """Return y ↦ Jᵀ y + cotangent at what a solver returns."""
        g, layout = inside(self.function, choice.layout), choice.layout
        with torch.no_grad():
            z = choice.solver()(g, layout.wrap(self.case.z0))[0]
        return adjoint_function(self.function, layout.unwrap(z), self.cotangent)

    def side(self, forward: Choice, back: Choice | None, *, hook: bool = False) -> Side:
        """Return torchdeq with the chosen settings, ready to run."""
        model = forward_model(forward) if back is None else training_model(forward, back, hook=hook)
        g, layout = inside(self.function, forward.layout), forward.layout

        def solve() -> tuple[Tensor, list[Tensor]]:
            with torch.no_grad():
                return layout.unwrap(model(g, layout.wrap(self.case.z0))[0][0]), []

        def differentiate() -> tuple[Tensor, list[Tensor]]:
            z = layout.unwrap(model(g, layout.wrap(self.case.z0))[0][0])
            return z.detach(), list(autograd_grad((z * self.cotangent).sum(), self.case.tensors()))

        return Side(self.cell, solve if back is None else differentiate)

    def better_side(self, forward: Choice, back: Choice | None) -> tuple[Side, str]:
        """Return the faster of torchdeq's two implicit backward passes (none forward), and its name."""
        if back is None:
            return self.side(forward, None), str(forward)
        sides = [self.side(forward, back, hook=hook) for hook in (False, True)]
        for side in sides * 3:
            side.measure(len(self.case.z0))
        hook = min(sides[1].timed.seconds) < min(sides[0].timed.seconds)
        return self.side(forward, back, hook=hook), f"{forward}; backward {back}{', by hook' if hook else ''}"


def peer_sides(task: Task, *, quick: bool, say: Callable[[str], None]) -> tuple[Side, str, Side]:
    """Return torchdeq's fastest solve, what it is, and its bare loop. Not collective."""
    z0 = task.case.z0
    pairs: list[tuple[Choice, Choice | None]] = []
    for layout in layouts(task.case):
        best = min((forward.seconds for forward, _ in pairs), default=float("inf"))
        forward = fastest(variants(quick), layout, task.function, z0, task.accepts, say, best)
        if forward is None:
            continue
        if not task.backward:
            pairs.append((forward, None))
            continue
        say("backward:")
        adjoint = task.adjoint(forward)
        back = fastest(variants(quick), layout, adjoint, torch.zeros_like(z0), task.accepts_adjoint, say)
        if back is not None:
            pairs.append((forward, back))
    if not pairs:
        raise Refused("torchdeq reaches the tolerance with none of its solvers")
    chosen = min(pairs, key=lambda pair: sum(c.seconds for c in pair if c is not None))
    with torch.no_grad():
        count = fewest_iterations(Variant("fixed_point_iter"), task.function, z0, task.accepts)
    if count is None:
        raise Refused("plain iteration does not reach the tolerance")
    layout, back = next((f.layout, b) for f, b in pairs if f.layout.plain)
    loop = Choice(Variant("simple_fixed_point_iter"), layout, count, 0.0)
    return *task.better_side(*chosen), task.better_side(loop, back)[0]


def relative(a: Tensor, b: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖. Not collective."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def verified(case: Case, side: Side, who: str, tolerance: float, truth: Reference) -> tuple[float, float, float | None]:
    """Return the residual, the error of the answer and of the gradient, all relative; refuse them where too large.

    Not collective.
    """
    z, gradients = side.call()
    z = z.detach()
    residual = case.residual(z)
    if not residual <= tolerance * (1 + 1e-3):  # the solver's own evaluation rounds differently
        raise Refused(f"{who}: residual {residual:.2e} in the worst sample")
    # At a spectral radius ρ an answer may be 1 / (1 - ρ) times further away than its residual says.
    error, bound = relative(z, truth.z), 10 * tolerance / (1 - case.target)
    if not error <= bound:
        raise Refused(f"{who}: answer {error:.2e} from the reference, more than {bound:.1e}")
    if not gradients:
        return residual, error, None
    worst = max(relative(a, b) for a, b in zip(gradients, truth.gradients, strict=True))
    if not worst <= GRADIENT_SLACK * tolerance:
        raise Refused(f"{who}: gradient {worst:.2e} from the reference, more than {GRADIENT_SLACK * tolerance:.0e}")
    return residual, error, worst


def measure(case: Case, tolerance: float, truth: Reference, backward: bool, options: argparse.Namespace) -> dict:
    """Return one row of the table. Not collective."""

    def say(text: str) -> None:
        if options.verbose:
            print(f"    {text}", flush=True)

    cotangent = truth.cotangent.to(case.z0.dtype)
    ours = our_side(case, tolerance, cotangent, backward=backward)
    our_checks = verified(case, ours, "hpcdeq", tolerance, truth)
    task = Task(case, tolerance, cotangent, Counted(case.cell), backward)
    peer, settings, loop = peer_sides(task, quick=options.quick, say=say)
    peer_checks = verified(case, peer, "torchdeq", tolerance, truth)
    verified(case, loop, "torchdeq's bare loop", tolerance, truth)
    between = relative(ours.call()[0].detach(), peer.call()[0].detach())
    for repeat in range(options.repeats):
        for side in (ours, peer, loop) if repeat % 2 else (loop, peer, ours):
            side.measure(len(case.z0))
    row: dict = {"radius": case.radius, "tolerance": tolerance}
    for who, side, checks in (("hpcdeq", ours, our_checks), ("torchdeq", peer, peer_checks)):
        quartiles = statistics.quantiles(side.timed.seconds, n=4)
        row |= {
            f"{who}_seconds": side.timed.median,
            f"{who}_wall_seconds": statistics.median(side.timed.wall),
            f"{who}_spread": (quartiles[2] - quartiles[0]) / side.timed.median,
            f"{who}_evaluations": side.timed.evaluations,
            f"{who}_products": side.timed.products,
            f"{who}_overhead": statistics.median(side.timed.overhead),
            f"{who}_residual": checks[0],
            f"{who}_answer_error": checks[1],
            f"{who}_gradient_error": checks[2],
        }
    aim = AIMS[tolerance, case.target]
    ratio = row["torchdeq_seconds"] / row["hpcdeq_seconds"]
    return row | {
        "ratio": ratio,
        "aim": aim,
        "reached": ratio >= aim,
        "answers_differ": between,
        "torchdeq_settings": settings,
        "loop_seconds": loop.timed.median,
    }


HEADER = (
    f"{'row':<36} {'ratio':>6} {'aim':>4}    {'seconds':>17} {'evaluations':>13} {'products':>9} {'overhead':>11}"
    f" {'z differ':>9} {'gradient errors':>17}"
)


def line(name: str, row: dict) -> str:
    """Return a row as a line of text: hpcdeq's number, then torchdeq's. Not collective."""
    if "refused" in row:
        return f"{name:<36} refused: {row['refused']}"

    def both(column: str, form: str) -> str:
        values = [row[f"{who}_{column}"] for who in ("hpcdeq", "torchdeq")]
        return " ".join("" if value is None else format(value, form) for value in values)

    return (
        f"{name:<36} {row['ratio']:6.2f} {row['aim']:4.1f} {'ok' if row['reached'] else '- '}"
        f" {both('seconds', '.4f'):>17} {both('evaluations', '.1f'):>13} {both('products', 'd'):>9}"
        f" {both('overhead', '.0%'):>11} {row['answers_differ']:9.1e} {both('gradient_error', '.1e'):>17}"
        f"\n{'':<36} torchdeq: {row['torchdeq_settings']}; bare loop {row['loop_seconds']:.4f} s"
    )


def row_names() -> list[str]:
    """Return the names of all rows. Not collective."""
    names = [f"{kind}-{radius:.2f}" for kind, radius in KINDS]
    return [f"{name}/{precision}/{way}" for name in names for precision in PRECISIONS for way in PASSES]


def asked_for(name: str, text: str) -> bool:
    """Whether a row is meant by --rows: its whole name, or a part of it. Not collective."""
    return name == text if text in row_names() else text in name


def built_cases(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Case | str]]:
    """Yield the names and cases that are asked for, or the reason why one cannot be had. Not collective."""
    for kind, radius in KINDS:
        name = f"{kind}-{radius:.2f}"
        if not any(asked_for(row, options.rows) for row in row_names() if row.startswith(name)):
            continue
        if kind == "graph" and not options.data.exists():
            yield name, f"no crystals at {options.data} (--data FILE)"
            continue
        build = {"tanh": tanh_case, "conv": conv_case}.get(kind) or graph_cases(options.data, folder)
        yield name, scaled_to(build, radius)


def main() -> int:
    """Measure, print and write the table; return 1 if a row was refused. Not collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", default="", metavar="TEXT", help="only the row of this name, or rows whose name contains it"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="of each measurement (default 9; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, a smaller search for the peer's settings")
    parser.add_argument("--data", type=Path, default=CRYSTALS, metavar="FILE", help=f"crystals (default {CRYSTALS})")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write all columns there")
    parser.add_argument("--verbose", action="store_true", help="say what the search for the peer's settings finds")
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 9)
    if options.repeats < 3:
        parser.error("--repeats: at least 3, for a median")
    if not any(asked_for(row, options.rows) for row in row_names()):
        parser.error(f"--rows {options.rows}: no such row; they are {', '.join(row_names())}")
    torch.set_num_threads(1)

    rows: dict[str, dict] = {}
    print(f"numbers in pairs: hpcdeq torchdeq; {options.repeats} repeats\n{HEADER}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, exact in built_cases(options, Path(folder)):
            if isinstance(exact, str):
                print(f"{name:<36} skipped: {exact}")
                continue
            exact = exact.to(torch.float64)
            print(f"{name}: largest spectral radius {exact.radius:.4f}, {exact.count} samples", flush=True)
            truth = reference(exact)
            for precision, (dtype, tolerance) in PRECISIONS.items():
                for way in PASSES:
                    row_name = f"{name}/{precision}/{way}"
                    if not asked_for(row_name, options.rows):
                        continue
                    try:
                        rows[row_name] = measure(exact.to(dtype), tolerance, truth, way != "forward", options)
                    except (Refused, ConvergenceError) as error:
                        rows[row_name] = {"refused": " ".join(str(error).split("\n")[0].split())}
                    print(line(row_name, rows[row_name]), flush=True)
                    if options.out is not None:
                        write(options.out, rows)
    return int(any("refused" in row for row in rows.values()))


def write(path: Path, rows: dict[str, dict]) -> None:
    """Write the table as CSV; what was not measured is empty. Not collective."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["row", *columns])
        table.writeheader()
        table.writerows({"row": name, **row} for name, row in rows.items())


if __name__ == "__main__":
    sys.exit(main())
