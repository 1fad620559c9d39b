"""Jobs in a real Slurm, on a cluster of this machine alone: cut and gone on with, cancelled, in arrays, on two nodes.

All of it is skipped, saying why, without Slurm's programs (`bash scripts/slurm_cluster.sh install`) or another MPI than Open MPI.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

from hpcdeq.parallel import mpi_library

pytestmark = pytest.mark.skipif("Open MPI" not in mpi_library(), reason="slurm/env.sh is written for Open MPI")

CLUSTER = ROOT / "scripts" / "slurm_cluster.sh"
STAND_IN = ROOT / "tests" / "stand_in"
EQUATION = ("--data", "b.h5", "--model", "mlp")
MOLECULES = [
    f"m{i},{text},{float(text[-1] in 'ONF') * 3}"
    for i, text in enumerate("C" * k + end for k in range(1, 9) for end in ("O", "N", "C", "F", "C#N"))
]
LACKING = 3  # exit code of slurm_cluster.sh where this machine cannot do it


class Cluster:
    """A running cluster, with a folder that its jobs work in.

    Parameters
    ----------
    folder
        Its own: configuration, state, logs.
    nodes
        How many; more than one need root.
    """

    def __init__(self, folder: Path, nodes: int = 1) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        started = subprocess.run(
            ["bash", str(CLUSTER), "start", str(folder), str(nodes)],
            # Jobs of several tests run beside each other, so that there are more cores than there are.
            env={**os.environ, "OWNER": str(os.getpid()), "CPUS": "32"},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        if started.returncode == LACKING:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        own = {name: value for name, value in clean_environment().items() if not name.startswith(("SLURM", "HPCDEQ_"))}
        self.early: dict[str, str] = {}
        self.environment = {**own, "SLURM_CONF": str(folder / "slurm.conf"), "VIRTUAL_ENV": sys.prefix}

        speaks = subprocess.run(["srun", "--mpi=pmix", "true"], env=self.environment, timeout=60, check=False)
        if speaks.returncode:
            self.stop()
            pytest.skip("srun --mpi=pmix does not run: bash scripts/slurm_cluster.sh install")

    def stop(self) -> None:
        """End all jobs and daemons."""
        subprocess.run(["bash", str(CLUSTER), "stop", str(self.folder)], check=True, timeout=60, capture_output=True)

    def call(self, *words: object, **environment: str) -> str:
        """Return what a command of Slurm's prints."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.work,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(
        self,
        name: str,
        script: str,
        *arguments: object,
        options: tuple[str, ...] = ("-n2",),
        package: Path = ROOT,
        slurm: Path = ROOT / "slurm",
        **environment: str,
    ) -> str:
        """Submit one of slurm/*.sbatch with its log in NAME.log; return the job's number."""
        environment = {"PYTHONPATH": str(package), **environment}
        log = f"--output={name}.log"
        return self.call(
            "sbatch", "--parsable", log, "-t5", *options, slurm / f"{script}.sbatch", *arguments, **environment
        )

    def until(self, happened: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for something, for so long at most."""
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                logs = "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in self.work.glob("*.log"))
                pytest.fail(f"not within {seconds:.0f} s: {what}\n{self.call('squeue')}\n{logs}")
            time.sleep(0.3)

    def ended(self, *jobs: str, seconds: float = 120) -> None:
        """Wait until none of these jobs is waiting or running."""
        self.until(lambda: not self.call("squeue", "-h", "-j", ",".join(jobs)), seconds, f"the end of {jobs}")

    def fact(self, job: str, name: str) -> str:
        """Return what Slurm says of a job."""
        found = re.search(rf"\b{name}=(\S*)", self.call("scontrol", "show", "job", job))
        assert found
        return found[1]

    def log(self, name: str) -> str:
        """Return what a job has printed."""
        path = self.work / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def iterations(self, run: str) -> list[int]:
        """Return the first column of a run's history."""
        path = self.work / run / "history.csv"
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        return [int(line.split(",")[0]) for line in lines if line.partition(",")[1]]

    def interrupt(self, job: str, run: str, signal: str = "USR1") -> None:
        """Send what `--signal=B:USR1@N` sends, once a run has come somewhere."""
        self.until(lambda: len(self.iterations(run)) > 2, 120, f"three iterations of {run}")
        self.call("scancel", "--batch", f"--signal={signal}", job)

    def went_on(self, name: str, run: str) -> bool:
        """Say whether a run of the stand-in has what it had when it was interrupted, and then 20 iterations, each once."""
        at = int(re.findall(r"interrupted at (\d+)", self.log(name))[0])
        return at > 2 and self.iterations(run) == list(range(1, at + 21)) and f"threads, from {at}" in self.log(name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node, with the jobs on it that take long: other tests go on meanwhile."""
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.call(
            sys.executable, "-m", "hpcdeq.prepare", "burgers", "--limit", "200", "--out", "b.h5", PYTHONPATH=str(ROOT)
        )
        made.submit(
            "limit",
            "train",
            *EQUATION,
            *("--optimizer", "adam", "--max-seconds", "55", "--max-iterations", "1000000", "--out", "limit", "--quiet"),
            options=("-n1", "-t1", "--signal=B:USR1@1"),
        )
        made.submit(
            "deaf",
            "train",
            *("--out", "deaf", "--max-iterations", "520"),
            options=("-n1", "-t1", "--signal=B:USR1@1"),
            package=STAND_IN,
            STAND_IN="deaf",
            # Slurm ends what srun started. What mpirun did, it would lose sight of here, without cgroups.
            HPCDEQ_LAUNCHER="srun",
        )
        (made.work / "m.csv").write_text("id,smiles,mu\n" + "\n".join(MOLECULES))
        for name, options, words in (
            ("prepare", ("-n1",), ("molecules", "m.csv", "--out", "m.h5")),
            ("train", ("-n2",), ("--data", "m.h5", "--max-iterations", "2", "--out", "m")),
            ("predict", ("-n1",), ("m", "m.csv", "--out", "p.csv")),
        ):
            after = tuple(f"--dependency=afterok:{job}" for job in made.early.values())[-1:]
            made.early[name] = made.submit(
                name, name, *words, options=(*options, *after, "--kill-on-invalid-dep=yes"), HPCDEQ_LAUNCHER="srun"
            )
        words = ("--optimizers", "lbfgs,adam", "--seeds", "2", "--max-iterations", "3", "--out", "c")
        made.early["array"] = made.submit(
            "part-%a", "compare", *EQUATION, *words, options=("-n1", "--array=0-3", "--job-name=c")
        )
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def stand_ins(cluster: Cluster) -> dict[str, str]:
    """Jobs that are interrupted once, all at the same time."""
    more = {
        "mpirun": {"HPCDEQ_LAUNCHER": "mpirun"},
        "srun": {"HPCDEQ_LAUNCHER": "srun"},
        "chain": {"HPCDEQ_CONTINUE": "chain"},
        "bounded": {"HPCDEQ_MAX_CONTINUATIONS": "0"},
        "stuck": {"STAND_IN": "stuck"},
        "asked": {},
    }
    options = ("-n2", "--job-name=some job")
    jobs = {
        name: cluster.submit(
            name, "train", "--out", name, options=options, package=STAND_IN, **{"STAND_IN": "once", **environment}
        )
        for name, environment in more.items()
    }
    words = ("--data", "b.h5", "--out", "cut", "--reference", "adam")
    options = ("-n1", "--array=0-1")
    jobs["cut"] = cluster.submit("cut-%a", "compare", *words, options=options, package=STAND_IN, STAND_IN="once")
    for task in range(2):
        cluster.interrupt(f"{jobs['cut']}_{task}", f"cut/parts/{task}/runs/adam-{task}")
    for name in ("mpirun", "srun", "chain", "bounded"):
        cluster.interrupt(jobs[name], name)
    cluster.interrupt(jobs["asked"], "asked", "TERM")
    cluster.until(lambda: "stand-in:" in cluster.log("stuck"), 60, "its start")
    cluster.call("scancel", "--batch", "--signal=USR1", jobs["stuck"])
    cluster.ended(*jobs.values())
    return jobs


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_what_a_signal_cut_is_requeued_and_finishes(cluster: Cluster, stand_ins: dict[str, str], launcher: str) -> None:
    log, job = cluster.log(launcher), stand_ins[launcher]
    assert cluster.went_on(launcher, launcher)
    assert (cluster.fact(job, "JobState"), cluster.fact(job, "Restarts")) == ("COMPLETED", "1")
    # Two ranks and one thread of the allocation.
    assert re.findall(r"stand-in: (\d) ranks on \S+, (\d) threads", log) == [("2", "1")] * 2
    assert log.count("requeued") == 1 and log.count("] done") == 1 and f"by {launcher}" in log


def test_a_task_of_an_array_goes_on_and_the_report_waits(cluster: Cluster, stand_ins: dict[str, str]) -> None:
    job = stand_ins["cut"]
    found = re.search(r"writes the report: (\d+)", cluster.log("cut-0"))
    assert found and "writes the report" not in cluster.log("cut-1")
    cluster.ended(found[1])
    for task in range(2):
        assert cluster.fact(f"{job}_{task}", "Restarts") == "1"
        assert cluster.went_on(f"cut-{task}", f"cut/parts/{task}/runs/adam-{task}")
    log = cluster.log(f"compare-{job}-report")
    assert "report of adam-0 adam-1 ['--out', 'cut', '--reference', 'adam']" in log and "] done" in log, log
    assert cluster.fact(found[1], "StartTime") >= cluster.fact(f"{job}_1", "EndTime")


def test_where_requeueing_is_refused_a_chain_goes_on(cluster: Cluster, stand_ins: dict[str, str]) -> None:
    found = re.search(r"goes on in job (\d+)", cluster.log("chain"))
    assert found
    cluster.ended(found[1])
    assert cluster.went_on("chain", "chain")
    assert (cluster.fact(stand_ins["chain"], "Restarts"), cluster.fact(found[1], "Restarts")) == ("0", "0")
    for name in ("NumNodes", "NumTasks", "CPUs/Task", "TimeLimit", "JobName", "WorkDir", "StdOut", "Command"):
        assert cluster.fact(found[1], name) == cluster.fact(stand_ins["chain"], name), name
    assert "continuation 1" in cluster.log("chain") and cluster.log("chain").count("] done") == 1


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("stuck", "1:0", "brought no progress"),
        ("bounded", "75:0", "stopped after 0 continuations"),
        ("asked", "75:0", "cancelled: the same command goes on from there"),
    ],
)
def test_what_should_not_go_on_does_not(
    cluster: Cluster, stand_ins: dict[str, str], name: str, code: str, told: str
) -> None:
    job = stand_ins[name]
    assert (cluster.fact(job, "JobState"), cluster.fact(job, "ExitCode")) == ("FAILED", code)
    assert cluster.fact(job, "Restarts") == "0" and told in cluster.log(name)
    assert name == "stuck" or len(cluster.iterations(name)) >= 3


def test_failures_end_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """A program that fails, command lines that lack something, and a launcher that starts separate programs."""
    machine = shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    text = (machine / "env.sh").read_text()
    (machine / "env.sh").write_text(text.replace("--mpi=pmix", "--mpi=none"))
    words = ("--out", "failed", "--max-iterations", "9")
    jobs = {
        "failed": cluster.submit("failed", "train", *words, package=STAND_IN, STAND_IN="bad"),
        "nameless": cluster.submit("nameless", "train", "--max-iterations", "9", package=STAND_IN),
        "alone": cluster.submit("alone", "compare", *EQUATION, "--out", "alone"),
        "apart": cluster.submit(
            "apart", "train", "--out", "apart", package=STAND_IN, slurm=machine, HPCDEQ_LAUNCHER="srun"
        ),
    }
    cluster.ended(*jobs.values())
    told = {
        "failed": ("1:0", "failed with exit code 1"),
        "nameless": ("2:0", "refused: --out DIR must be given"),
        "alone": ("2:0", "refused: this is a job array: sbatch --array=0-N"),
        "apart": ("2:0", "refused: srun started jobs of 1 rank(s) where one of 2 was asked for: see slurm/env.sh"),
    }
    for name, (code, text) in told.items():
        assert cluster.fact(jobs[name], "ExitCode") == code and text in cluster.log(name), cluster.log(name)
        assert cluster.fact(jobs[name], "Restarts") == "0"
    assert not (cluster.work / "apart").exists()


def test_a_cancelled_run_stays_and_the_same_command_goes_on(cluster: Cluster) -> None:
    words = (*EQUATION, "--optimizer", "adam", "--max-seconds", "5", "--max-iterations", "1000000", "--out", "left")
    job = cluster.submit("left", "train", *words, "--checkpoint-every", "1")
    run = cluster.work / "left"
    cluster.until(lambda: (run / "checkpoint-previous.h5").exists(), 90, "two checkpoints")
    cluster.call("scancel", job)
    cluster.ended(job)
    assert cluster.fact(job, "JobState") == "CANCELLED" and cluster.fact(job, "Restarts") == "0"
    cluster.until(lambda: "cancelled: the same command goes on" in cluster.log("left"), 10, "its last words")
    before = len(cluster.iterations("left"))
    again = cluster.submit("again", "train", *words)
    cluster.ended(again)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "budget", cluster.log("again")
    # Nothing twice, nothing missing.
    assert cluster.iterations("left") == list(range(summary["iterations"] + 1)) and summary["iterations"] > before - 10


def test_prepare_then_train_then_predict(cluster: Cluster) -> None:
    job = cluster.early["predict"]
    cluster.ended(job, seconds=180)
    told = [cluster.log(name) for name in ("prepare", "train", "predict")]
    assert cluster.fact(job, "JobState") == "COMPLETED", "\n".join(told)
    assert all("by srun" in text and text.count("] done") == 1 for text in told)
    rows = list(csv.DictReader((cluster.work / "p.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == [f"m{i}" for i in range(40)]
    assert json.loads((cluster.work / "m" / "summary.json").read_text())["ranks"] == 2


def test_an_array_compares_and_a_last_job_reports(cluster: Cluster) -> None:
    job = cluster.early["array"]
    cluster.until(lambda: (cluster.work / f"c-{job}-report.log").exists(), 180, "the report's job")
    report = re.search(r"writes the report: (\d+)", cluster.log("part-0"))
    assert report
    cluster.ended(report[1])
    assert cluster.fact(report[1], "JobState") == "COMPLETED", cluster.log(f"c-{job}-report")
    runs = cluster.work / "c" / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["adam-0", "adam-1", "lbfgs-0", "lbfgs-1"]
    summaries = {path.name: json.loads((path / "summary.json").read_text()) for path in runs.iterdir()}
    rows = csv.DictReader((cluster.work / "c" / "comparison.csv").read_text().splitlines())
    found = {row["run"]: (row["method"], float(row["train loss"]), int(row["iterations"])) for row in rows}
    assert found == {name: (name[:-2], told["loss"]["train"], 3) for name, told in summaries.items()}
    assert all((told["optimizer"], told["seed"]) == (name[:-2], int(name[-1])) for name, told in summaries.items())
    # A report of fewer runs than there should be is one, and says so.
    job = cluster.submit("lacking", "compare", "report", "c", "5", "--reference", "lbfgs", options=("-n1",))
    cluster.ended(job)
    assert cluster.fact(job, "ExitCode") == "1:0" and "the report lacks 1 of 5 parts" in cluster.log("lacking")
    assert "part 4 has not ended well: see its log, and c/parts/4" in cluster.log("lacking")


def test_the_time_limit_is_no_end(cluster: Cluster) -> None:
    """A run that stops by itself before its limit, and a program that hears nothing and is ended at it, are both finished."""
    cluster.until(lambda: "] done" in cluster.log("limit"), 200, "the end of the training")
    log = cluster.log("limit")
    assert log.count("requeued") >= 1 and log.count("] done") == 1
    summary = json.loads((cluster.work / "limit" / "summary.json").read_text())
    assert summary["status"] == "budget" and cluster.iterations("limit") == list(range(summary["iterations"] + 1))
    cluster.until(lambda: "] done" in cluster.log("deaf"), 60, "the end of the program that hears nothing")
    log = cluster.log("deaf")
    assert "DUE TO TIME LIMIT" in log and "signal TIMEOUT" in log and "continuation 1" in log
    assert cluster.iterations("deaf") == list(range(1, 521))


def test_two_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ranks on two nodes by either launcher; the signal of the first node's script reaches all of them."""
    cluster = Cluster(tmp_path_factory.mktemp("nodes"), nodes=2)
    try:
        jobs = {
            name: cluster.submit(
                name,
                "train",
                *("--out", name),
                options=("-N2", "--ntasks-per-node=2", "-c2"),
                package=STAND_IN,
                STAND_IN="once",
                HPCDEQ_LAUNCHER=name,
            )
            for name in ("mpirun", "srun")
        }
        for name, job in jobs.items():
            cluster.interrupt(job, name)
        cluster.ended(*jobs.values())
        for name, job in jobs.items():
            log = cluster.log(name)
            assert cluster.fact(job, "JobState") == "COMPLETED" and cluster.fact(job, "Restarts") == "1", log
            assert len(re.findall(r"stand-in: 4 ranks on node1, 2 threads", log)) == 2
            assert "ranks on node1 2, node2 2" in log and cluster.went_on(name, name)
    finally:
        cluster.stop()
