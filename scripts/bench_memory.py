"""Peak memory of forward + backward against the number of iterations: the fixed-point layer and an unrolled network.

    python scripts/bench_memory.py --out runs/bench_memory     table on the screen; table.csv and memory.png there

About two minutes. The map is tanh(W z + x), 256 samples of 256 unknowns in float64, with W scaled so that the largest
spectral radius of its derivative at the fixed points is 0.99 or so, and plain iteration needs a thousand steps to a
residual that is still far above rounding. For each N the layer's tolerance is the residual that plain iteration has after
N steps, so that the layer (plain iteration too: -deq_snes_anderson_m 0) stops after N steps and solves the adjoint system
to the same tolerance; the unrolled network is N steps under autograd. A third curve is the layer as it is, with Anderson
mixing, to the same tolerance: it takes fewer iterations, and keeps its window of them.

Each number is a process of its own: the highest resident memory during forward + backward, less the resident memory
before, when the libraries are loaded and have worked on 1 iteration.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

COUNTS = (10, 30, 100, 300, 1000)
LAYER, MIXED, UNROLLED = "layer, plain iteration", "layer, Anderson mixing", "unrolled network"
KINDS = (LAYER, MIXED, UNROLLED)
COLOURS = {LAYER: "#1f5fa8", MIXED: "#5a9a3c", UNROLLED: "#d1702a"}
# Scale of the Gaussian W whose spectral radius at the fixed points is 0.99 for 256 unknowns (found by bench_cells.scaled_to).
SCALE = 1.3672
MIB = 2.0**20


def resident(what: str) -> int:
    """Return this process's resident memory in bytes: VmRSS at present, VmHWM the highest. Not collective."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise SystemExit("no /proc/self/status: this benchmark needs Linux")


def forget_peak() -> None:
    """Let the highest resident memory begin anew at the present one. Not collective."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(kind: str, count: int, scale: float) -> dict:
    """Return what one process needs. Not collective."""
    import torch
    from bench_cells import tanh_case

    import hpcdeq

    torch.set_num_threads(1)
    case = tanh_case(scale).to(torch.float64)
    cell, x, z0 = case.cell, case.given, case.z0
    with torch.no_grad():
        z = z0
        for _ in range(count):
            z = cell(z, x)
    # What plain iteration has reached after so many steps, so that the layer's own test stops it there.
    tolerance = case.residual(z) * (1 + 1e-9)
    del z
    options = {"snes_rtol": tolerance, "snes_atol": 0.0, "snes_max_it": 4 * count, "ksp_rtol": tolerance}
    if kind == LAYER:
        options["snes_anderson_m"] = 0
    layer = hpcdeq.FixedPoint(cell, options=options)
    easy = hpcdeq.FixedPoint(cell, options={**options, "snes_rtol": 0.9, "snes_max_it": 1000, "ksp_rtol": 0.9})

    def run(steps: int, layer: hpcdeq.FixedPoint) -> None:
        if kind == UNROLLED:
            z = z0
            for _ in range(steps):
                z = cell(z, x)
        else:
            z = layer(x, z0)
        z.square().sum().backward()
        cell.zero_grad()
        x.grad = None

    run(1, easy)
    before = resident("VmRSS")
    forget_peak()
    run(count, layer)
    iterations = count if kind == UNROLLED else int(layer.solution.iterations.max())
    return {
        "kind": kind,
        "steps": count,
        "tolerance": tolerance,
        "iterations": iterations,
        "peak_mib": (resident("VmHWM") - before) / MIB,
    }


def draw(rows: list[dict], path: Path) -> None:
    """Draw peak memory against steps. Not collective."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for kind in KINDS:
        points = [(row["steps"], row["peak_mib"]) for row in rows if row["kind"] == kind]
        axes.loglog(*zip(*points, strict=True), "o-", color=COLOURS[kind], label=kind)
        axes.annotate(f"{points[-1][1]:.0f}", points[-1], (7, -3), textcoords="offset points", color=COLOURS[kind])
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["steps"] for row in rows})))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_xlabel("steps of plain iteration that the tolerance takes")
    axes.set_ylabel("peak memory of forward + backward (MiB)")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, write and draw. Not collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for table.csv and memory.png")
    parser.add_argument("--steps", type=lambda text: [int(n) for n in text.split(",")], default=COUNTS, metavar="N,...")
    parser.add_argument("--scale", type=float, default=SCALE, help=f"of the weights (default {SCALE})")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "N"), help=argparse.SUPPRESS)  # how it calls itself
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.scale)))
        return
    rows = []
    print(f"{'':<24} {'steps':>6} {'tolerance':>10} {'iterations':>10} {'peak MiB':>9}")
    for count in options.steps:
        for kind in KINDS:
            command = [sys.executable, __file__, "--scale", str(options.scale), "--one", kind, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{kind}, {count} steps failed:\n{done.stderr}")
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(
                f"{kind:<24} {count:>6} {row['tolerance']:10.1e} {row['iterations']:>10} {row['peak_mib']:9.1f}",
                flush=True,
            )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "table.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        draw(rows, options.out / "memory.png")


if __name__ == "__main__":
    main()
