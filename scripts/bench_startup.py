"""How long a job of many ranks takes to begin, beside the import of torch and petsc4py that no such job can do without.

    python scripts/bench_startup.py --ranks 64 --out startup.csv      about 10 minutes on 2 cores
    python scripts/bench_startup.py --ranks 2 --repeats 1             whether it runs

Two jobs take turns. One imports torch, petsc4py and mpi4py on every rank, meets, and ends. The other is `hpcdeq.train` up to where
the optimiser would begin: command line, imports, data read, model built, run directory made; there it meets, and ends as the
first. What is told is the wall time of `mpirun`, its start and end included, as the median over the repeats, and the median of
the ratios of neighbours.

"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_table import write_table

IMPORTS = """
import torch
from petsc4py import PETSc
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
"""
# What would be trained is not: the first step is where start-up ends.
BEGUN = """
import sys
from hpcdeq.training import Training
def begin(self, known):
    self.comm.Barrier()
    sys.exit(0)
Training._minimize = begin
from hpcdeq.train import build_parser, main
build_parser().parse_args(sys.argv[1:])
from hpcdeq.parallel import launch
launch(main, sys.argv[1:])
"""
KINDS = ("torch and petsc4py", "hpcdeq.train")


def seconds(ranks: int, *program: str) -> float:
    """Return how long a job takes from its launch to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["mpirun", "--bind-to", "none", "-n", str(ranks), sys.executable, *program]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"a job on {ranks} ranks failed:\n{done.stderr}")
    return time.perf_counter() - began


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64, metavar="P", help="of a job (default 64)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of both jobs (default 3)")
    parser.add_argument("--data", type=Path, metavar="FILE.h5", help="a dataset (default: 1,000 of Burgers' equation)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write every time there")
    options = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "burgers.h5"
        if options.data is None:
            make = ["-m", "hpcdeq.prepare", "burgers", "--limit", "1000", "--out", str(data)]
            subprocess.run([sys.executable, *make], check=True, stdout=subprocess.DEVNULL)
        for number in range(options.repeats):
            run = ["--data", str(data), "--out", str(Path(folder) / f"run-{number}"), "--quiet"]
            for kind, program in zip(KINDS, (("-c", IMPORTS), ("-c", BEGUN, *run)), strict=True):
                table.append({"kind": kind, "repeat": number, "seconds": seconds(options.ranks, *program)})
    by_kind = {kind: [row["seconds"] for row in table if row["kind"] == kind] for kind in KINDS}
    ratios = [ours / alone for alone, ours in zip(*by_kind.values(), strict=True)]
    print(f"seconds from launch to end on {options.ranks} ranks, {len(os.sched_getaffinity(0))} cores")
    for kind, spent in by_kind.items():
        print(f"  {kind:<20}{statistics.median(spent):8.1f}   of " + " ".join(f"{value:.1f}" for value in spent))
    print(
        f"  ratio               {statistics.median(ratios):8.2f}   of " + " ".join(f"{value:.2f}" for value in ratios)
    )
    write_table(options.out, table)


if __name__ == "__main__":
    main()
