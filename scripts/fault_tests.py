"""What becomes of runs that something goes wrong with: every case several times, at random moments of a fixed seed.

    python scripts/fault_tests.py                             5 runs of each case, 16 minutes on two cores
    python scripts/fault_tests.py --quick                     one run of each
    python scripts/fault_tests.py --cases crowd --runs 1      64 ranks: 5 minutes
    python scripts/fault_tests.py --cases kill-rank,disk-full --runs 20 --out faults.csv

A run of a case trains a small model on 2 or 3 ranks, does the harm, and waits for the job to end: one that does not is a
hang. A checkpoint that was there before has to be there after, whole, or a later one. Then the same command goes on with --resume
to the end, and has to arrive where an undisturbed run of as many ranks does: the same history and the same weights, bit for bit.
Exit code 1 if anything else came out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from bench_table import write_table

from hpcdeq.record.checkpoint import LATEST, PREVIOUS, _verify

# Another program rounds otherwise, and its fixed points then differ by their tolerance: relative to the largest number.
NEARLY = 1e-5
LIMIT = 300.0  # seconds that a job may take to end, whatever was done to it
PROBLEMS = {
    "adam": ("mlp", "--optimizer", "adam", "--batch-size", "32", "--max-iterations", "120", "--checkpoint-every", "7"),
    "lbfgs": ("mlp", "--optimizer", "lbfgs", "--max-iterations", "24", "--checkpoint-every", "3"),
    "deq": (
        "mlp_deq",
        "--optimizer",
        "adam",
        "--batch-size",
        "32",
        "--max-iterations",
        "30",
        "--checkpoint-every",
        "2",
    ),
}
COMPARED = ("iteration", "train_loss", "gradient_norm", "validation_loss", "validation_metric", "losses", "gradients")
# Harm that only the inside of a process can do: at a call of a rank's, once so many have passed.
SABOTAGE = """
import sys
from hpcdeq import parallel
from hpcdeq.data import Dataset
kind, rank, after = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
own, calls = Dataset.batch, 0
def batch(self, rows):
    global calls
    inputs, targets = own(self, rows)
    if self.split != "train" or parallel.WORLD.rank != rank:
        return inputs, targets
    calls += 1
    if calls > after and kind == "raise":
        raise ZeroDivisionError("planted")
    if calls > after:
        numbers = list(range(len(self)))[rows] if isinstance(rows, slice) else [int(row) for row in rows]
        if 2 in numbers:
            targets = targets.clone()
            targets[numbers.index(2)] = float("nan")
    return inputs, targets
Dataset.batch = batch
from hpcdeq.train import main
parallel.launch(main, sys.argv[4:])
"""


class Wrong(Exception):
    """What came out is not what has to."""


class Hang(Wrong):
    """A job that did not end."""


class Lost(Wrong):
    """A checkpoint that was there and is not any more."""


@dataclass
class Job:
    """A training job that has been started."""

    process: subprocess.Popen[str]
    folder: Path
    log: Path
    ranks: list[int] = field(default_factory=list)

    def processes(self) -> list[int]:
        """Return the launcher and the ranks, those that are still there."""
        return [pid for pid in [self.process.pid, *self.ranks] if alive(pid)]

    def told(self) -> str:
        """Return all that the job has said."""
        return self.log.read_text(errors="replace")

    def wait_for_rows(self, count: int) -> None:
        """Wait until the history has so many rows, and learn the processes of the ranks."""
        until = time.monotonic() + LIMIT
        while rows_in(self.folder) < count and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        self.ranks = ranks_of(self.process.pid)

    def must_run(self) -> None:
        """Refuse a job that has ended before anything was done to it."""
        if self.process.poll() is not None:
            raise Wrong(f"the job has ended by itself, with {self.process.poll()}:\n{self.told()}")

    def end(self) -> tuple[int, float]:
        """Wait until no process is left; return the launcher's exit code, and the seconds that it took."""
        began = time.monotonic()
        while time.monotonic() < began + LIMIT:
            code = self.process.poll()
            if code is not None and not self.processes():
                return code, time.monotonic() - began
            time.sleep(0.02)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise Hang(f"{len(self.processes())} processes were left after {LIMIT:.0f} s")


def alive(pid: int) -> bool:
    """Say whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ranks_of(pid: int) -> list[int]:
    """Return the training processes below one."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads = Path(f"/proc/{pid}/task").glob("*/children")  # any of them may have started some
        for child in [int(child) for thread in threads for child in thread.read_text().split()]:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [child] if b"python" in command.split(b"\0")[0] else ranks_of(child)
    return found


def rows_in(folder: Path) -> int:
    """Return the rows of a run's history."""
    try:
        return max((folder / "history.csv").read_bytes().count(b"\n") - 1, 0)
    except FileNotFoundError:
        return 0


def latest(folder: Path) -> int:
    """Return the iteration of the latest checkpoint that is whole; -1 without any."""
    found = -1
    for name in (LATEST, PREVIOUS):
        with contextlib.suppress(Exception):
            _verify(folder / name)
            with h5py.File(folder / name, locking=False) as file:
                found = max(found, int(file["run"].attrs["iteration"]))
    return found


def outcome(folder: Path) -> tuple[list[tuple[str, ...]], bytes]:
    """Return what two runs that are the same have in common: the history but for clocks, and the weights at the end."""
    with (folder / "history.csv").open(newline="") as file:
        rows = [tuple(row[name] for name in COMPARED) for row in csv.DictReader(file)]
    with h5py.File(folder / LATEST, locking=False) as file:
        return rows, np.asarray(file["run/x"]).tobytes()


def difference(one: tuple[list[tuple[str, ...]], bytes], other: tuple[list[tuple[str, ...]], bytes]) -> float:
    """Return how far two outcomes are apart, relative to the largest number of a column; infinite for other iterations."""
    (rows, weights), (wanted, goal) = one, other
    pairs = [[np.array(table, dtype=float) for table in (rows, wanted)], [np.frombuffer(v) for v in (weights, goal)]]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(float((np.abs(a - b).max(axis=0) / np.abs(b).max(axis=0).clip(1e-300)).max()) for a, b in pairs)


class Bench:
    """Where the jobs are run: data, undisturbed runs, and one folder for each that is disturbed."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.undisturbed: dict[tuple[str, int, str], tuple[list[tuple[str, ...]], bytes]] = {}
        self.seconds: dict[
            tuple[str, int, str], tuple[float, float]
        ] = {}  # of undisturbed runs: start and end, training
        self.number = 0
        for name, limit in (("b.h5", 200), ("few.h5", 4)):
            command = [
                sys.executable,
                "-m",
                "hpcdeq.prepare",
                "burgers",
                "--limit",
                str(limit),
                "--out",
                str(root / name),
            ]
            subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)

    def folder(self) -> Path:
        """Return a new place for a run."""
        self.number += 1
        return self.root / f"run-{self.number}"

    def start(
        self, folder: Path, problem: str, ranks: int, *more: str, data: str = "b.h5", sabotage: tuple[str, ...] = ()
    ) -> Job:
        """Start a job; ``sabotage`` says what goes wrong inside of it."""
        model, *settings = PROBLEMS[problem]
        program = ["-c", SABOTAGE, *sabotage] if sabotage else ["-m", "hpcdeq.train"]
        path = data if data.startswith("/") else str(self.root / data)
        command = ["mpirun", "--bind-to", "none", "-n", str(ranks), sys.executable, *program]
        # As a job that may be begun anew has to be: --resume begins a run, too, with a checkpoint before the first step.
        command += ["--data", path, "--model", model, *settings, "--out", str(folder), "--resume", "--quiet", *more]
        log = self.root / f"job-{time.monotonic_ns()}.log"  # beside a disk that may be full
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
        return Job(process, folder, log)

    def reference(self, problem: str, ranks: int, data: str) -> tuple[list[tuple[str, ...]], bytes]:
        """Return the outcome of a run that nothing was done to."""
        key = (problem, ranks, data)
        if key not in self.undisturbed:
            job = self.start(self.folder(), problem, ranks, data=data)
            code, took = job.end()
            if code:
                raise Wrong(f"the undisturbed run ended with {code}:\n{job.told()}")
            self.undisturbed[key] = outcome(job.folder)
            training = json.loads((job.folder / "summary.json").read_text())["wall_seconds"]
            self.seconds[key] = (took - training, training)
        return self.undisturbed[key]

    def part(self, problem: str, ranks: int) -> tuple[float, float]:
        """Return the seconds before an undisturbed run trains, and a random part of those that it trains."""
        self.reference(problem, ranks, "b.h5")
        start, training = self.seconds[problem, ranks, "b.h5"]
        return start, self.random.random() * training

    def moment(self, problem: str) -> int:
        """Return a random number of rows of the history, well before the end."""
        settings = PROBLEMS[problem]
        return self.random.randint(2, int(settings[settings.index("--max-iterations") + 1]) * 2 // 3)

    def go_on(
        self, folder: Path, problem: str, ranks: int, data: str = "b.h5", told: str = "", *, exact: bool = True
    ) -> None:
        """Go on with a run to its end, and compare it with an undisturbed one; not exact: up to rounding."""
        job = self.start(folder, problem, ranks, data=data)
        code, _ = job.end()
        if code:
            raise Wrong(f"--resume ended with {code}:\n{job.told()}")
        if told not in job.told():
            raise Wrong(f"--resume did not say {told!r}:\n{job.told()}")
        found, wanted = outcome(folder), self.reference(problem, ranks, data)
        if found != wanted and (exact or difference(found, wanted) > NEARLY):
            raise Wrong(f"the run that went on has arrived elsewhere, {difference(found, wanted):.1e} away")


def environment() -> dict[str, str]:
    """Return the environment of a job: more ranks than cores are allowed, one thread each."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }


def expect(job: Job, code: int, codes: tuple[int, ...], words: tuple[str, ...] = ()) -> None:
    """Refuse an ending that is none of those that have to be, or that does not say what it has to."""
    if code not in codes:
        raise Wrong(f"exit code {code}, not {' or '.join(map(str, codes))}:\n{job.told()}")
    for word in words:
        if job.told().count(word) != 1:
            raise Wrong(f"{job.told().count(word)} times {word!r}, not once:\n{job.told()}")


def checkpoint_stays(folder: Path, before: int) -> None:
    """Refuse a checkpoint that is gone."""
    after = latest(folder)
    if after < before:
        raise Lost(f"the checkpoint of iteration {before} is gone, that of {after} is left")


# --------------------------------------------------------------------------------------------------------- cases

KILLED = (1, 137, 143, 255, -9)


def killed(bench: Bench, problem: str, ranks: int, victim: str, data: str = "b.h5") -> float:
    """Kill one rank or the launcher."""
    folder = bench.folder()
    job = bench.start(folder, problem, ranks, data=data)
    job.wait_for_rows(bench.moment(problem))
    time.sleep(bench.random.uniform(0.0, 0.2))
    before = latest(folder)
    job.must_run()
    os.kill(job.process.pid if victim == "launcher" else bench.random.choice(job.ranks), signal.SIGKILL)
    at_once = victim == "launcher" and bench.random.random() < 0.5
    if at_once:  # the next job waits for the ranks that are left
        bench.go_on(folder, problem, ranks, data)
    code, seconds = job.end()
    expect(job, code, KILLED)
    if not at_once:
        checkpoint_stays(folder, before)
        bench.go_on(folder, problem, ranks, data)
    return 0.0 if at_once else seconds


def kill_rank(bench: Bench, problem: str, ranks: int) -> float:
    """Kill -9 one rank."""
    return killed(bench, problem, ranks, "rank")


def kill_launcher(bench: Bench, problem: str, ranks: int) -> float:
    """Kill -9 mpirun."""
    return killed(bench, problem, ranks, "launcher")


def empty_rank(bench: Bench, problem: str, ranks: int) -> float:
    """Kill -9 one rank of more ranks than there are training samples."""
    return killed(bench, problem, 3, "rank", "few.h5")


def crowd(bench: Bench, problem: str, ranks: int) -> float:
    """Kill -9 one of 64 ranks, whatever the number of cores."""
    return killed(bench, problem, 64, "rank")


def signals(bench: Bench, problem: str, ranks: int) -> float:
    """Send SIGTERM or SIGUSR1 to one rank or to all, at any time."""
    folder = bench.folder()
    _, after = bench.part(problem, ranks)
    job = bench.start(folder, problem, ranks)
    job.wait_for_rows(1)
    time.sleep(after)
    before = latest(folder)
    number = bench.random.choice([signal.SIGTERM, signal.SIGUSR1])
    for pid in bench.random.choice([job.ranks, job.ranks[:1], job.ranks[-1:]]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    code, seconds = job.end()
    expect(job, code, (75, 0))
    checkpoint_stays(folder, before)
    bench.go_on(folder, problem, ranks)
    return seconds


def clock(bench: Bench, problem: str, ranks: int) -> float:
    """Give the job a limit on its wall time."""
    folder = bench.folder()
    limit = sum(bench.part(problem, ranks))
    began = time.monotonic()
    job = bench.start(folder, problem, ranks, "--wall-seconds", str(limit))
    code, _ = job.end()
    took = time.monotonic() - began
    expect(job, code, (75, 0))
    if code == 75:
        checkpoint_stays(folder, 0)
        bench.go_on(folder, problem, ranks)
    elif outcome(folder) != bench.reference(problem, ranks, "b.h5"):
        raise Wrong("the run has arrived elsewhere")
    return max(took - limit, 0.0)  # beyond it: a job that has not come to its first step stops after it


def raised(bench: Bench, problem: str, ranks: int) -> float:
    """Raise an exception on one rank."""
    folder, rank = bench.folder(), bench.random.randrange(ranks)
    job = bench.start(folder, problem, ranks, sabotage=("raise", str(rank), str(bench.random.randint(3, 40))))
    job.wait_for_rows(1)
    code, seconds = job.end()
    expect(job, code, (1,), (f"rank {rank}: ZeroDivisionError: planted",))
    if latest(folder) >= 0:  # another program rounds otherwise: its vectors begin at other addresses
        bench.go_on(folder, problem, ranks, exact=False)
    return seconds


def not_a_number(bench: Bench, problem: str, ranks: int) -> float:
    """Make one sample's target NaN on one rank, in the midst of the run."""
    folder, rank = bench.folder(), bench.random.randrange(ranks)
    job = bench.start(folder, problem, ranks, sabotage=("nan", str(rank), str(bench.random.randint(3, 40))))
    job.wait_for_rows(1)
    code, seconds = job.end()
    expect(job, code, (1,))
    if f" on rank {rank}: its loss is nan" not in job.told() or "training sample" not in job.told():
        raise Wrong(f"the sample or its rank was not named:\n{job.told()}")
    return seconds


def disk_full(bench: Bench, problem: str, ranks: int) -> float:
    """Let the disk be full when a checkpoint is written: a small file system, or else a bound on rank 0's files."""
    with small_disk(bench.folder()) as (folder, fill, free):
        job = bench.start(folder, problem, ranks)
        job.wait_for_rows(bench.moment(problem))
        before = latest(folder)
        job.must_run()
        fill(job.ranks[0])
        code, seconds = job.end()
        expect(job, code, (1,))
        if "cannot be written" not in job.told() and "cannot write" not in job.told():
            raise Wrong(f"nothing was said of the disk:\n{job.told()}")
        checkpoint_stays(folder, before)
        free()
        if before >= 0:
            bench.go_on(folder, problem, ranks)
    return seconds


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[tuple[Path, Callable[[int], None], Callable[[], None]]]:
    """Give a folder for a run, what fills its disk, and what frees it."""
    place.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True).returncode == 0
    )
    filler = place / "filler"

    def fill(pid: int) -> None:
        if not mounted:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def free() -> None:
        filler.unlink(missing_ok=True)

    try:
        yield place / "run", fill, free
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)


def damaged(bench: Bench, problem: str, ranks: int) -> float:
    """Truncate the latest checkpoint, or flip one of its bits, after the run was killed."""
    folder = bench.folder()
    job = bench.start(folder, problem, ranks)
    while not (folder / PREVIOUS).exists() and job.process.poll() is None:
        time.sleep(0.05)
    job.wait_for_rows(1)
    os.kill(bench.random.choice(job.ranks), signal.SIGKILL)
    _, seconds = job.end()
    path = folder / LATEST
    content = bytearray(path.read_bytes())
    place = bench.random.randrange(len(content))
    if bench.random.random() < 0.5:
        del content[place:]
    else:
        place = max(place, 512) if place > 90 else place  # the rest of the header is not read
        content[place] ^= 1 << bench.random.randrange(8)
    path.write_bytes(content)
    bench.go_on(folder, problem, ranks, told=f"going on from {PREVIOUS} instead")
    return seconds


def cut_data(bench: Bench, problem: str, ranks: int) -> float:
    """Cut the dataset's file."""
    whole = (bench.root / "b.h5").read_bytes()
    cut, folder = bench.root / f"cut-{bench.number}.h5", bench.folder()
    cut.write_bytes(whole[: bench.random.randrange(len(whole))])
    job = bench.start(folder, problem, ranks, data=str(cut))
    code, seconds = job.end()
    expect(job, code, (2,), (f"DataError: {cut}",))
    if folder.exists():
        raise Wrong("a run directory was made")
    return seconds


def stopped(bench: Bench, problem: str, ranks: int) -> float:
    """Stop one rank, as a device or a network that hangs does."""
    folder = bench.folder()
    job = bench.start(folder, problem, ranks, "--hang-seconds", "8")
    job.wait_for_rows(bench.moment(problem))
    before = latest(folder)
    job.must_run()
    os.kill(bench.random.choice(job.ranks), signal.SIGSTOP)
    code, seconds = job.end()
    expect(job, code, KILLED)
    if "most recent call first" not in job.told():
        raise Wrong(f"there is no traceback:\n{job.told()}")
    checkpoint_stays(folder, before)
    bench.go_on(folder, problem, ranks)
    return seconds


def in_use(bench: Bench, problem: str, ranks: int) -> float:
    """Begin a second job in the folder of one that runs."""
    folder = bench.folder()
    job = bench.start(folder, problem, ranks, "--max-iterations", "1000000")
    job.wait_for_rows(2)
    other = bench.start(folder, problem, ranks, "--max-iterations", "1000000")
    code, seconds = other.end()
    expect(other, code, (2,), (f"{folder} is in use by process",))
    os.kill(job.ranks[0], signal.SIGKILL)
    job.end()
    return seconds


CASES: dict[str, Callable[[Bench, str, int], float]] = {
    "kill-rank": kill_rank,
    "kill-launcher": kill_launcher,
    "signal": signals,
    "exception": raised,
    "nan": not_a_number,
    "disk-full": disk_full,
    "damaged-checkpoint": damaged,
    "truncated-data": cut_data,
    "empty-rank": empty_rank,
    "clock": clock,
    "stopped-rank": stopped,
    "in-use": in_use,
    "crowd": crowd,
}
SELDOM = ("crowd",)  # not without being asked for: minutes for each start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        default=",".join(name for name in CASES if name not in SELDOM),
        help=f"some of {', '.join(CASES)} (default: all but {', '.join(SELDOM)})",
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each case (default 5)")
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments and the victims (default 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="one row a run")
    options = parser.parse_args()
    names = options.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}: choose some of {', '.join(CASES)}")
    table: list[dict[str, object]] = []
    root = Path(tempfile.mkdtemp(prefix="hpcdeq-faults-"))
    bench = Bench(root, options.seed)
    print(
        f"{'case':<20}{'runs':>5}{'hangs':>7}{'lost checkpoints':>18}{'wrong':>7}{'seconds to end: median':>25}{'worst':>7}"
    )
    failed = False
    for name in names:
        own = [one(bench, name, number) for number in range(1 if options.quick else options.runs)]
        table += own
        bad = {kind: sum(row["outcome"] == kind for row in own) for kind in ("hang", "lost", "wrong")}
        seconds = [float(str(row["seconds"])) for row in own if row["seconds"] != ""] or [float("nan")]
        print(
            f"{name:<20}{len(own):>5}{bad['hang']:>7}{bad['lost']:>18}{bad['wrong']:>7}"
            f"{statistics.median(seconds):>25.1f}{max(seconds):>7.1f}",
            flush=True,
        )
        for row in own:
            if row["outcome"] != "good":
                failed = True
                print(f"  run {row['run']} ({row['problem']}, {row['ranks']} ranks): {row['told']}", flush=True)
        write_table(options.out, table)
    if failed:
        print(f"what the jobs left is in {root}")
    else:
        shutil.rmtree(root)
    return int(failed)


def one(bench: Bench, name: str, number: int) -> dict[str, object]:
    """Run a case once, on one of the problems, and return its row of the table."""
    problem, ranks = list(PROBLEMS)[number % len(PROBLEMS)], 3 if number == 3 else 2
    row: dict[str, object] = {"case": name, "run": number, "problem": problem, "ranks": ranks, "outcome": "good"}
    seconds: object = ""
    told = ""
    try:
        seconds = round(CASES[name](bench, problem, ranks), 2)
    except Wrong as error:
        row["outcome"] = {Hang: "hang", Lost: "lost"}.get(type(error), "wrong")
        told = str(error)
    return {**row, "seconds": seconds, "told": told}


if __name__ == "__main__":
    sys.exit(main())
