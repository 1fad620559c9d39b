"""Strong and weak scaling of a full-batch gradient, what it communicates, and a model of both that is projected.

    python scripts/bench_scaling.py --data crystals.h5 --out scaling.csv    about 10 minutes on 2 cores; tables and CSVs
    python scripts/bench_scaling.py --quick                                 random graphs, a minute or two

An evaluation is what an optimiser asks for: the weights gathered from their blocks, the mean loss and gradient of the graph
DEQ over all samples without warm starts, the gradient summed and scattered to its blocks. Every number of ranks is a job of
its own, one thread a rank, and is run twice in turn with the others; a time is the median over the repeats of the slowest
rank's. Collectives and their bytes are counted inside `hpcdeq.parallel`, PETSc's reductions by PETSc's own log; none is
estimated.

The model: t(P) = c W(P) + sum over collectives of (a_kind ceil(log2 P) + b_kind bytes (P - 1)/P), with W(P) the cost of the
largest share (edges and atoms; known before anything runs), c from the evaluation on 1 rank, and a, b fitted by least squares to
repeated collectives of several lengths on every other number of ranks that has a core a rank. Evaluations on more than 1 rank
do not enter: all of them are held out, and stand beside what the model says. The time in collectives is that of the rank that
comes last, in an evaluation; no overlap with work can save more. Where there are more ranks than cores the
largest share is as long as what its core has to do; collectives then wait for the scheduler, which the model does not
know. Beside weak scaling stands what as many jobs of 1 rank each do at the same time: cores share caches, memory and power,
and no program can do better than that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_table import write_table

LENGTHS = (4, 1_000, 30_000, 1_000_000)  # numbers in a collective that is timed
KINDS = ("allreduce", "allgather", "reduce_scatter")
PETSC_REDUCTIONS = ("VecDot", "VecTDot", "VecNorm", "VecMDot", "VecReduceComm")
TURNS = 2
ITERATED = 300  # samples that optimisers are run on
NODES, NEIGHBOURS = 26, 12  # of random graphs, in the mean; as crystals
TARGET_RANKS, TARGET_WEIGHTS, TARGET_SAMPLES = 4096, 10**8, 10**6

ASSUMPTIONS = """\
What the projection assumes: samples distributed like those measured; the same time a unit of cost on every core, in proportion to
the number of weights where this is another; the collectives' logarithmic latency and bandwidth of the network that is named; no
contention, no noise of the system. Inside a host the measured a and b are those of shared memory: a projection to
4,096 ranks is told for them, and for the network that --latency and --bandwidth describe."""


def make_data(source: Path | None, path: Path, count: int) -> np.ndarray:
    """Write a file of so many training graphs, the first of a source's or random ones, and return their costs."""
    from hpcdeq.data.graphs import GraphArrays
    from hpcdeq.data.rows import SampleRows
    from hpcdeq.data.schema import Schema
    from hpcdeq.data.shards import Shards
    from hpcdeq.data.shares import sample_costs
    from hpcdeq.data.writer import DatasetWriter

    if source is not None:
        shards = Shards(source)
        chosen = np.flatnonzero(shards.splits == 0)
        if len(chosen) < count:
            raise SystemExit(f"{source} has {len(chosen)} training samples, {count} are asked for: give --samples")
        rows, schema = shards.read(chosen[:count]), shards.schema
    else:
        random = np.random.default_rng(0)
        nodes = random.lognormal(math.log(NODES) - 0.3, 0.78, count).astype(np.int64) + 2
        offset = np.concatenate([[0], np.cumsum(nodes)])
        target = np.concatenate([np.repeat(np.arange(n, dtype=np.int32), NEIGHBOURS) for n in nodes])
        graphs = GraphArrays(
            offset,
            random.integers(1, 90, offset[-1]).astype(np.uint8),
            NEIGHBOURS * offset,
            (random.random(len(target)) * np.repeat(nodes, NEIGHBOURS * nodes)).astype(np.int32),
            target,
            2 * random.standard_normal((len(target), 3)),
        )
        schema = Schema("classification", "graph", classes=("a", "b", "c"))
        rows = SampleRows([str(k) for k in range(count)], random.integers(0, 3, count), graphs)
    with DatasetWriter(path, schema) as writer:
        writer.append(rows, np.zeros(count, np.uint8))
    return sample_costs(np.diff(rows.inputs.node_offset), np.diff(rows.inputs.edge_offset))


# ------------------------------------------------------------------------------------------------- inside a job


def timed(comm: Any, work: Any, repeats: int) -> list[float]:
    """Return the slowest rank's seconds of each repeat, the first left out; collective."""
    from hpcdeq import parallel

    spent = []
    for _ in range(repeats + 1):
        parallel.any_rank(comm, False)  # together
        began = time.perf_counter()
        work()
        spent.append(parallel.max_over_ranks(comm, time.perf_counter() - began))
    return spent[1:]


def collectives(comm: Any, repeats: int) -> list[dict[str, Any]]:
    """Return the seconds of each kind of collective for several lengths; collective."""
    from hpcdeq import parallel

    found = []
    for length in LENGTHS if comm.size > 1 else ():
        slices = [parallel.own_slice(length, rank, comm.size) for rank in range(comm.size)]
        sizes = [own.stop - own.start for own in slices]
        whole, block = np.ones(length), np.ones(sizes[comm.rank])
        kinds = {
            "allreduce": lambda whole=whole: parallel.sum_over_ranks(comm, whole),
            "allgather": lambda whole=whole, block=block, sizes=sizes: parallel.gather_blocks(
                comm, block, sizes, whole
            ),
            "reduce_scatter": lambda whole=whole, sizes=sizes: parallel.sum_and_scatter(comm, whole, sizes),
        }
        for kind, call in kinds.items():
            times = max(1, 200 // (1 + length // 1000))
            spent = timed(comm, lambda call=call, times=times: [call() for _ in range(times)], repeats)
            found.append({"kind": kind, "bytes": 8 * length, "seconds": statistics.median(spent) / times})
    return found


def inside(asked: dict[str, Any]) -> dict[str, Any]:
    """Return times and counts of this job; collective."""
    import torch

    import hpcdeq
    from hpcdeq import parallel
    from hpcdeq.config import NO_FALLBACK, TRAINING_OPTIONS
    from hpcdeq.models import build_model, model_config
    from hpcdeq.petsc import PETSc
    from hpcdeq.problem.phases import REDUCTION
    from hpcdeq.traffic import counted

    torch.set_num_threads(1)
    comm = parallel.WORLD
    rows = hpcdeq.Dataset(asked["path"], "train", comm)
    settings = model_config("graph_deq", {})
    model = build_model("graph_deq", settings, "graph", (), rows.output_size, seed=0, dtype=torch.float64, device="cpu")
    for module in model.modules():
        if isinstance(module, hpcdeq.FixedPoint):
            given = {**TRAINING_OPTIONS, **NO_FALLBACK}
            module.options.given.update({name.removeprefix("deq_"): value for name, value in given.items()})
    problem = hpcdeq.TrainingProblem(
        model, rows, "cross_entropy", comm, chunk_size=rows.usual_chunk_size, warm_start=False
    )
    layout = problem.layout
    block = layout.block(problem.initial())

    def evaluate() -> None:
        problem.owned_loss_and_gradient(layout.gather(block))

    problem.phases.begin()
    spent = timed(comm, evaluate, asked["repeats"])
    problem.phases.end()
    # The rank that comes last waits for nobody: its time in collectives is theirs.
    waiting = -parallel.max_over_ranks(comm, -problem.phases.seconds[REDUCTION]) / (asked["repeats"] + 1)
    with counted() as traffic:
        evaluate()
    found = {
        "ranks": comm.size,
        "samples": rows.count,
        "weights": layout.count,
        "spent": spent,
        "seconds": statistics.median(spent),
        "communication": waiting,
        "imbalance": rows.imbalance,
        "calls": dict(traffic.calls),
        "bytes": dict(traffic.bytes),
        "collectives": collectives(comm, asked["repeats"]),
    }
    if asked["iterations"]:
        found["iteration"] = {}
        PETSc.Log.begin()
        for method in ("lbfgs", "trgn"):
            before = {name: PETSc.Log.Event(name).getPerfInfo()["count"] for name in PETSC_REDUCTIONS}
            with counted() as traffic:
                result = hpcdeq.minimize(problem, method, asked["iterations"], raise_on_failure=False)
            own = sum(PETSc.Log.Event(n).getPerfInfo()["count"] - count for n, count in before.items())
            found["iteration"][method] = {
                "iterations": result.iterations,
                "calls": dict(traffic.calls),
                "bytes": dict(traffic.bytes),
                "petsc": own,
            }
    return found


def started(ranks: int, asked: dict[str, Any]) -> subprocess.Popen[str]:
    """Start this script on some ranks, wherever there are cores."""
    command = ["mpirun", "--bind-to", "none", "-n", str(ranks), sys.executable, __file__, "--inside", json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def found_by(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a job and return what it found."""
    out, error = process.communicate()
    told = [line for line in out.splitlines() if line.startswith("FOUND ")]
    if process.returncode or not told:
        raise SystemExit(f"a job failed: {' '.join(map(str, process.args))}\n{error}")
    return json.loads(told[0].removeprefix("FOUND "))


def job(ranks: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Run this script on some ranks and return what it found."""
    return found_by(started(ranks, asked))


def in_turns(sizes: list[int], asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what jobs on several numbers of ranks found, which take turns: a machine is not as fast at all times."""
    runs: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in sizes}
    for _ in range(TURNS):
        for ranks, own in runs.items():
            own.append(job(ranks, {**asked, "repeats": -(-asked["repeats"] // TURNS)}))
    return [
        {**own[0], "seconds": statistics.median(second for run in own for second in run["spent"])}
        for own in runs.values()
    ]


# -------------------------------------------------------------------------------------------------------- model


def fitted(runs: list[dict[str, Any]], cores: int) -> dict[str, tuple[float, float]]:
    """Return latency (s a step) and seconds a byte of each kind of collective.

    Of jobs that have a core a rank; where there is none, of the smallest with several ranks, which says less.
    """
    usable = [run for run in runs[1:] if run["ranks"] <= cores] or runs[1:2]
    model = {}
    for kind in KINDS:
        rows = []
        for run in usable:
            steps, part = math.ceil(math.log2(run["ranks"])), 1 - 1 / run["ranks"]
            # Relative errors count: short ones tell of the latency, long ones of the bandwidth.
            rows += [
                np.array([steps, part * found["bytes"]]) / found["seconds"]
                for found in run["collectives"]
                if found["kind"] == kind
            ]
        solution = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
        model[kind] = (max(float(solution[0]), 0.0), max(float(solution[1]), 0.0))
    return model


def communication(
    model: dict[str, tuple[float, float]], calls: dict[str, float], sizes: dict[str, float], ranks: int
) -> float:
    """Return the seconds of counted collectives on some ranks."""
    steps, part = math.ceil(math.log2(ranks)), 1 - 1 / ranks
    return sum(
        calls.get(kind, 0) * model[kind][0] * steps + sizes.get(kind, 0) * model[kind][1] * part for kind in KINDS
    )


def share_of(costs: np.ndarray, ranks: int) -> float:
    """Return the cost of the largest share."""
    from hpcdeq.data.shares import boundaries

    found = boundaries(np.array([len(costs)]), np.array([costs.sum()]), lambda _: costs, ranks)
    return float(found.costs.max())


def projected(
    costs: np.ndarray, base: dict[str, Any], model: dict[str, tuple[float, float]], counted: dict[str, Any], name: str
) -> list[dict[str, Any]]:
    """Return the projection for several numbers of ranks, the data set's samples repeated as often as it takes."""
    rate = base["seconds"] / costs.sum()
    table = []
    for weights in (base["weights"], TARGET_WEIGHTS):
        scale = weights / base["weights"]
        for ranks in (64, 512, TARGET_RANKS):
            # Shares of so many samples are even but for a sample at either end.
            mean = float(costs.mean()) * TARGET_SAMPLES / ranks
            compute = rate * scale * (mean + float(costs.max()))
            sizes = {k: v * (scale if k != "allreduce" else 1) for k, v in counted["bytes"].items()}
            talk = communication(model, counted["calls"], sizes, ranks)
            row = {"table": "projection", "network": name, "weights": weights, "ranks": ranks, "compute": compute}
            table.append(row | {"communication": talk, "efficiency": rate * scale * mean / (compute + talk)})
    return table


def show(options: argparse.Namespace, sizes: list[int], folder: Path) -> list[dict[str, Any]]:
    """Run all jobs, print the tables, and return their rows."""
    cores = len(os.sched_getaffinity(0))
    strong, weak, table = [], [], []
    path = folder / "strong.h5"
    costs = make_data(options.data, path, options.samples)
    asked = {"path": str(path), "repeats": options.repeats}
    for told in in_turns(sizes, {**asked, "iterations": 0}):
        ranks = told["ranks"]
        strong.append(told)
        print(
            f"{ranks} ranks: {told['seconds']:.3f} s, of which {1e3 * told['communication']:.2f} ms in collectives",
            flush=True,
        )
    base = strong[0]
    # An iteration's collectives are as many whatever the number of samples.
    few = min(options.samples, ITERATED)
    make_data(options.data, folder / "few.h5", few)
    entering = [size for size in sizes[1:] if size <= cores] or sizes[1:2]
    iterated = job(entering[-1], {"path": str(folder / "few.h5"), "repeats": 1, "iterations": options.iterations})
    model = fitted(strong, cores)
    print(f"{options.samples} samples, {base['weights']} weights, {cores} cores; {base['seconds']:.3f} s on 1 rank\n")
    print("counted, an evaluation on a rank")
    for kind in KINDS:
        call, size = strong[-1]["calls"].get(kind, 0), strong[-1]["bytes"].get(kind, 0)
        print(f"  {kind:<16}{call:5} calls{size:12} bytes")
    for method, told in iterated["iteration"].items():
        steps = max(told["iterations"], 1)
        counts = ", ".join(f"{told['calls'].get(k, 0) / steps:.1f} {k}" for k in KINDS)
        size = sum(told["bytes"].get(k, 0) for k in KINDS) / steps
        print(
            f"  an iteration of {method}: {counts}, {size:.0f} bytes, {told['petsc'] / steps:.1f} reductions of PETSc's"
        )
    print(
        f"\nfitted to collectives on {', '.join(map(str, entering))} ranks\n"
        "                      latency (us a step)   bandwidth (GB/s)"
    )
    for kind, (latency, rate) in model.items():
        print(f"  {kind:<16}{1e6 * latency:20.1f}{1e-9 / rate if rate else float('nan'):19.2f}")
        table.append({"table": "fit", "kind": kind, "latency": latency, "seconds_a_byte": rate})
    print("\nstrong scaling   ranks  seconds  speed-up  efficiency  largest share / mean   model (held out)  error")
    rate = base["seconds"] / costs.sum()
    for run in strong:
        ranks = run["ranks"]
        mean = costs.sum() / ranks
        work = max(share_of(costs, ranks), mean * ranks / min(ranks, cores))
        told = rate * work + communication(model, run["calls"], run["bytes"], ranks)
        gain = base["seconds"] / run["seconds"]
        note = "" if ranks <= cores else "  more ranks than cores"
        print(
            f"{ranks:22}{run['seconds']:9.3f}{gain:10.2f}{gain / min(ranks, cores):12.3f}{share_of(costs, ranks) / mean:22.3f}"
            + (f"{told:19.3f}{told / run['seconds'] - 1:7.0%}{note}" if ranks > 1 else "             enters")
        )
        row = {"table": "strong", "ranks": ranks, "seconds": run["seconds"], "model": told}
        row |= {"efficiency": gain / min(ranks, cores), "imbalance": run["imbalance"]}
        table.append(row | {"communication": run["communication"]})
    print("\nweak scaling     ranks  samples  seconds  efficiency  of as many jobs of 1 rank at once")
    for ranks in sizes:
        count = options.samples // max(sizes) * ranks
        make_data(options.data, folder / "weak.h5", count)
        asked = {"path": str(folder / "weak.h5"), "repeats": options.repeats, "iterations": 0}
        weak.append(job(ranks, asked))
        if ranks == 1:
            shutil.copy(folder / "weak.h5", folder / "one.h5")
        # What the machine allows: jobs that know nothing of each other share its memory and its clock all the same.
        apart = [started(1, {**asked, "path": str(folder / "one.h5")}) for _ in range(ranks)]
        slowest = max(found_by(process)["seconds"] for process in apart)
        gain = [weak[0]["seconds"] / spent * max(1, ranks / cores) for spent in (weak[-1]["seconds"], slowest)]
        print(f"{ranks:22}{count:9}{weak[-1]['seconds']:9.3f}{gain[0]:12.3f}{gain[1]:34.3f}", flush=True)
        row = {"table": "weak", "ranks": ranks, "samples": count, "seconds": weak[-1]["seconds"]}
        table.append(row | {"efficiency": gain[0], "apart": gain[1]})
    given = dict.fromkeys(KINDS, (options.latency, 1 / options.bandwidth))
    print(f"\nprojected: an evaluation of {TARGET_SAMPLES:.0e} samples")
    print("  network                              weights  ranks  compute (s)  communication (s)  efficiency")
    names = {"as fitted here, in shared memory": model, "as --latency and --bandwidth say": given}
    for name, network in names.items():
        for row in projected(costs, base, network, strong[-1], name):
            print(
                f"  {name:<36}{row['weights']:8.0e}{row['ranks']:7}{row['compute']:13.2f}"
                f"{row['communication']:19.3f}{row['efficiency']:12.3f}"
            )
            table.append(row)
    print("\n" + ASSUMPTIONS)
    return table


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=ASSUMPTIONS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="FILE.h5", help="crystals (default: random graphs)")
    parser.add_argument("--samples", type=int, metavar="N", help="of strong scaling (default 8000; --quick: 300)")
    parser.add_argument("--ranks", metavar="1,P,...", help="numbers of ranks, 1 first (default 1,2,3,4; --quick: 1,2)")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed after one more (default 5; --quick: 3)")
    parser.add_argument("--iterations", type=int, default=3, metavar="N", help="of optimisers that are counted")
    parser.add_argument("--latency", type=float, default=2e-6, metavar="S", help="of a network (default 2e-6)")
    parser.add_argument("--bandwidth", type=float, default=1e10, metavar="B", help="bytes a second (default 1e10)")
    parser.add_argument("--quick", action="store_true", help="few samples, ranks and repeats: whether it runs")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the tables there")
    parser.add_argument("--inside", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        from hpcdeq import parallel

        found = inside(json.loads(options.inside))
        if parallel.WORLD.rank == 0:
            print("FOUND " + json.dumps(found), flush=True)
        return
    options.samples = options.samples or (300 if options.quick else 8000)
    options.repeats = options.repeats or (3 if options.quick else 5)
    sizes = [int(size) for size in (options.ranks or ("1,2" if options.quick else "1,2,3,4")).split(",")]
    if sizes[0] != 1 or len(sizes) < 2:
        parser.error("--ranks begins with 1 and goes on, such as 1,2,4")
    with tempfile.TemporaryDirectory() as folder:
        table = show(options, sizes, Path(folder))
    write_table(options.out, table)


if __name__ == "__main__":
    main()
