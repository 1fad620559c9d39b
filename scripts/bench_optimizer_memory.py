"""Memory of the optimisers on one rank, against the number of ranks: vectors of the weights are distributed.

    python scripts/bench_optimizer_memory.py --ranks 1,2,4,8 --out optimizer_memory.csv

A network of 251,000 weights on 8 samples, a few iterations until the methods' memories are full. Counted is what the C library
has handed out and not got back (glibc's mallinfo2, so that it is exact whatever the machine does besides), in the last
callback less before the minimisation, on the rank that holds most, in units of a whole vector of weights (8 n bytes). A rank
holds a + b / P of them: a whole ones that an evaluation needs or that tell of an iterate, and its part of b others. Kronecker
factors go to ranks layer by layer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from bench_table import write_table

METHODS = {
    "adam": ("adam", {}, 3),
    "lbfgs, no preconditioner": ("lbfgs", {"tao_pc_type": "none", "tao_lbfgs_history": 10}, 13),
    "lbfgs, Kronecker factors": ("lbfgs", {"tao_lbfgs_history": 10}, 13),
    "trgn, diagonal": ("trgn", {"tao_pc_type": "gauss_newton_diagonal", "tao_ksp_max_it": 12}, 3),
    "trgn, Kronecker factors": ("trgn", {"tao_ksp_max_it": 12}, 3),
}
LAYERS, WIDTH, SAMPLES = 16, 125, 8


def allocated() -> int:
    """Return the bytes that the C library has handed out."""
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    kind = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    look = ctypes.CDLL(None).mallinfo2
    look.restype = kind
    found = look()
    return int(found.hblkhd + found.uordblks)


def held(name: str) -> dict[str, float]:
    """Return what a method holds on the rank that holds most; collective."""
    import gc

    import torch

    import hpcdeq
    from hpcdeq import parallel
    from hpcdeq.optim.stochastic import MinibatchSettings

    method, options, iterations = METHODS[name]
    comm = parallel.WORLD
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers).double()
    x, y = (torch.randn(SAMPLES, WIDTH, dtype=torch.float64) for _ in range(2))
    own = parallel.own_slice(SAMPLES, comm.rank, comm.size)
    problem = hpcdeq.TrainingProblem(model, (x[own], y[own]), "mse", comm)
    for _ in range(2):  # what libraries keep from their first call is none of the optimiser's
        problem.gauss_newton_product(problem.initial(), problem.gradient(problem.initial()))
    problem.forget()
    gc.collect()
    before, during = allocated(), [0]

    def look(iterate: hpcdeq.optim.Iterate) -> None:
        gc.collect()
        during.append(allocated() - before)

    settings = {"minibatch": MinibatchSettings(batch_size=SAMPLES)} if method == "adam" else {"options": options}
    result = hpcdeq.minimize(problem, method, iterations, callback=look, raise_on_failure=False, **settings)
    most = parallel.max_over_ranks(comm, during[-1])
    return {"weights": problem.layout.count, "bytes": most, "iterations": result.iterations}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4,8", metavar="P,Q,...", help="numbers of ranks (default 1,2,4,8)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the table there")
    parser.add_argument("--inside", metavar="METHOD", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        from hpcdeq import parallel

        found = held(options.inside)
        if parallel.WORLD.rank == 0:
            print("FOUND " + json.dumps(found), flush=True)
        return
    ranks = [int(size) for size in options.ranks.split(",")]
    table = []
    print("whole vectors on a rank         " + "".join(f"{f'{size} ranks':>10}" for size in ranks) + "      a      b")
    for name in METHODS:
        row = []
        for size in ranks:
            command = ["mpirun", "--bind-to", "none", "-n", str(size), sys.executable, __file__, "--inside", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            told = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
            if done.returncode or not told:
                raise SystemExit(f"{name} on {size} ranks failed:\n{done.stderr}")
            found = json.loads(told[0].removeprefix("FOUND "))
            row.append(found["bytes"] / (8 * found["weights"]))
            table.append({"method": name, "ranks": size, "vectors": row[-1]} | found)
        a, b = np.linalg.lstsq(np.stack([np.ones(len(ranks)), 1 / np.array(ranks)], axis=1), row, rcond=None)[0]
        print(f"{name:<32}" + "".join(f"{held:10.1f}" for held in row) + f"{a:7.1f}{b:7.1f}", flush=True)
    write_table(options.out, table)


if __name__ == "__main__":
    main()
