"""A program that is cut and goes on as hpcdeq.train does, without its start-up time, on any number of ranks.

A step takes 0.2 seconds. STAND_IN in the environment: ``once`` does not end before it was interrupted, and 20 steps later;
``stuck`` makes no step, ``deaf`` hears no signal, ``bad`` fails.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

from mpi4py import MPI

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--max-iterations", type=int, default=0)
parser.add_argument("--resume", action="store_true", required=True)
options = parser.parse_args()
kind = os.environ.get("STAND_IN", "")
caught: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN if kind == "deaf" else lambda number, frame: caught.append(number))
history, checkpoint = options.out / "history.csv", options.out / "checkpoint.h5"

comm = MPI.COMM_WORLD
if comm.rank == 0:
    options.out.mkdir(parents=True, exist_ok=True)
    if not history.exists():
        history.write_text("iteration,wall_seconds\n")
done = comm.bcast(len(history.read_text().splitlines()) - 1 if comm.rank == 0 else None)
hosts = comm.gather(MPI.Get_processor_name())
if hosts:
    told = ", ".join(f"{host} {hosts.count(host)}" for host in sorted(set(hosts)))
    print(
        f"stand-in: {comm.size} ranks on {hosts[0]}, {os.environ['OMP_NUM_THREADS']} threads, from {done}", flush=True
    )
    print(f"stand-in: ranks on {told}", flush=True)
if kind == "bad":
    sys.exit(1)
steps = math.inf if kind == "stuck" else float(options.max_iterations)
if kind == "once":
    begun = any(os.environ.get(name, "0") != "0" for name in ("SLURM_RESTART_COUNT", "HPCDEQ_LINKS"))
    steps = done + 20 if begun else math.inf
while done < steps:
    time.sleep(0.2)
    if kind != "stuck":
        done += 1
        if comm.rank == 0:
            with history.open("a") as file:
                file.write(f"{done},0\n")
            checkpoint.write_text(f"{done}\nwork {32 * done}\n")
    if comm.allreduce(len(caught)):
        if comm.rank == 0:
            print(f"stand-in: interrupted at {done}", flush=True)
        sys.exit(75)
