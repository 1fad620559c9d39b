"""Say whether this environment can run hpcdeq, and what to type where it cannot.

Nothing heavy is imported before the command line is read, and a package that is missing is a finding, not a traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcdeq.commands import CommandParser
from hpcdeq.errors import EXIT_DONE, EXIT_FAILED

OK, WARN, FAIL = "ok", "warn", "FAIL"
SETUP = "bash scripts/setup.sh"
SELF_TEST_ERROR = 1e-8
GIB = 2**30

# Package, and the module whose import proves that it works. mpi4py and PETSc come first: see mpi_findings.
PACKAGES = {
    "mpi4py": "mpi4py.MPI",
    "petsc4py": "hpcdeq.petsc",
    "torch": "torch",
    "numpy": "numpy",
    "h5py": "h5py",
    "pymatgen": "pymatgen.core",
    "rdkit": "rdkit.Chem",
}
# How many ranks the launcher started, in the variables of Open MPI, and of MPICH, Intel MPI and Cray MPI.
LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
SLURM = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE")

_MPI_LIBRARY = re.compile(r"libmpi(ch|_abi|_cray|_gnu\w*|_intel\w*)?[.\-\d]*\.so")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes
    ----------
    level
        ``ok``, ``warn`` (works, but slower or less than it could) or ``FAIL``.
    subject, told
        What was looked at, and what it is.
    remedy
        What to type; empty if all is well.
    """

    level: str
    subject: str
    told: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return the line as it is printed; the remedy has a line of its own."""
        line = f"{self.level:<5} {self.subject:<12} {self.told}"
        return f"{line}\n{'':<18} -> {self.remedy}" if self.remedy else line


def loaded_mpi_libraries(maps: Path = Path("/proc/self/maps")) -> set[str]:
    """Return the files of the MPI libraries in this process, links resolved; none where the system does not tell.

    Not collective.

    Parameters
    ----------
    maps
        The table of mapped files.
    """
    mapped = {fields[5] for fields in (line.split(maxsplit=5) for line in _read(maps).splitlines()) if len(fields) == 6}
    return {os.path.realpath(path) for path in mapped if _MPI_LIBRARY.match(Path(path).name)}


def mpi_findings() -> Iterator[Finding]:
    """Yield the MPI library, who loads it, and whether the launcher is its own. Not collective.

    Runs before anything else has loaded an MPI: a library that appears with a package is that package's.
    """
    from hpcdeq import parallel

    ranks = parallel.WORLD.size
    yield Finding(OK, "MPI", f"{parallel.mpi_library()}, {ranks} rank{'s' if ranks > 1 else ''}")
    launched = max((int(os.environ.get(name, 1)) for name in LAUNCHED), default=1)
    if launched > 1 and ranks == 1:
        yield Finding(
            FAIL,
            "launcher",
            f"it started {launched} processes, and each finds itself alone: it belongs to another MPI",
            f"start with the mpirun of the MPI above, e.g. {Path(sys.executable).parent / 'mpirun'}",
        )
    known = loaded_mpi_libraries()
    owners = {file: "mpi4py" for file in known}
    for package in ("petsc4py", "h5py"):
        importlib.import_module(PACKAGES[package])
        owners.update({file: package for file in loaded_mpi_libraries() - set(owners)})
    told = ", ".join(f"{file} ({owner})" for file, owner in owners.items())
    if len(owners) > 1:
        remedy = f"build all of them with one MPI: remove the environment, set MPICC to its mpicc, then {SETUP}"
        yield Finding(FAIL, "libmpi", f"{len(owners)} in one process: {told}", remedy)
    elif owners:
        yield Finding(OK, "libmpi", f"{next(iter(owners))} (mpi4py and petsc4py)")
    else:
        yield Finding(OK, "libmpi", "this system does not tell which file is loaded")


def package_findings() -> Iterator[Finding]:
    """Yield the versions of Python and of every package; each is imported. Not collective."""
    yield Finding(OK, "python", f"{platform.python_version()} ({sys.executable})")
    for package, module in PACKAGES.items():
        try:
            importlib.import_module(module)
            yield Finding(OK, package, importlib.metadata.version(package))
        except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError where it finds no MPI library
            yield Finding(FAIL, package, f"cannot be imported: {_first_line(error)}", SETUP)


def petsc_findings() -> Iterator[Finding]:
    """Yield what PETSc was built with. Not collective."""
    from hpcdeq.petsc.facts import petsc_facts

    facts = petsc_facts()
    yield Finding(OK, "petsc", f"{facts['version']} in {facts['petsc_dir']}")
    blas = " ".join(word for word in facts["blas"].split() if not word.startswith(("-Wl,", "-L")))
    yield Finding(OK, "petsc build", f"MPI compiler {facts['mpi_compiler']}, BLAS {blas}")
    numbers = f"{facts['scalar']}, indices {facts['integer']}"
    if facts["scalar"] == "real float64":
        yield Finding(OK, "petsc scalar", numbers)
    else:
        remedy = f"unset PETSC_DIR PETSC_ARCH && {SETUP} (or name a PETSc with --with-scalar-type=real, in double)"
        yield Finding(FAIL, "petsc scalar", f"{numbers}: hpcdeq needs real float64", remedy)


def hdf5_findings() -> Iterator[Finding]:
    """Yield how h5py was built. Not collective."""
    import h5py

    kind = "parallel" if h5py.get_config().mpi else "serial, which is enough: each rank reads its own rows"
    yield Finding(OK, "hdf5", f"{h5py.version.hdf5_version}, {kind}")


def thread_findings() -> Iterator[Finding]:
    """Yield threads, cores and ranks of this host. Collective on MPI.COMM_WORLD."""
    from hpcdeq import parallel

    ranks = parallel.ranks_on_this_host(parallel.WORLD)  # before torch, whose import may fail on one rank alone
    import torch

    threads = torch.get_num_threads()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    # A launcher that binds gives each rank cores of its own; otherwise the ranks share all of them.
    own = cores if cores < (os.cpu_count() or 1) else max(1, cores // ranks)
    setting = os.environ.get("OMP_NUM_THREADS", "not set")
    told = f"{threads} of torch, {cores} core{'s' if cores > 1 else ''} usable, {ranks} rank(s) on this host"
    told = f"{told}, OMP_NUM_THREADS {setting}"
    if threads > own:
        yield Finding(WARN, "threads", f"{told}: more threads than cores", f"export OMP_NUM_THREADS={own}")
    else:
        yield Finding(OK, "threads", told)


def device_findings() -> Iterator[Finding]:
    """Yield the GPUs that torch can use. Not collective."""
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding(OK, "CUDA", f"{torch.version.cuda}: {names}")
    elif Path("/dev/nvidiactl").exists():
        told = f"this host has a GPU that torch {torch.__version__} cannot use"
        yield Finding(WARN, "CUDA", told, f"HPCDEQ_TORCH='torch' {SETUP}, with a build for this host's driver")
    else:
        yield Finding(OK, "CUDA", "no GPU on this host: --device cpu")


def available_bytes() -> int:
    """Return the host's free memory; what the system could free (caches) counts as free, where it tells. Not collective."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    return int(available[1]) * 1024 if available else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_findings() -> Iterator[Finding]:
    """Yield memory and Slurm job. Collective on MPI.COMM_WORLD."""
    from hpcdeq import parallel

    ranks = parallel.ranks_on_this_host(parallel.WORLD)
    share = available_bytes() / ranks
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = f"{total / GIB:.1f} GiB, {share / GIB:.1f} GiB free a rank"
    if share < GIB:
        yield Finding(WARN, "memory", told, "start fewer ranks on this host, or end what else runs here")
    else:
        yield Finding(OK, "memory", told)
    job = " ".join(f"{name}={os.environ[name]}" for name in SLURM if name in os.environ)
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > parallel.WORLD.size:
        told = f"{job}: {parallel.WORLD.size} of {tasks} tasks are running this"
        yield Finding(WARN, "Slurm", told, f"start with: mpirun -n {tasks} python -m hpcdeq.doctor")
    else:
        yield Finding(OK, "Slurm", job or "not in a job")


def self_test_findings() -> Iterator[Finding]:
    """Yield the error of a fixed point in two dimensions, z = A z + x, against the solution of (I - A) z = x.

    Not collective.
    """
    import torch

    from hpcdeq.deq import solve_fixed_point

    matrix = torch.tensor([[0.5, 0.2], [-0.1, 0.3]], dtype=torch.float64)
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    solution = solve_fixed_point(lambda z, x: z @ matrix.T + x, x, options={"snes_rtol": 1e-12})
    exact = torch.linalg.solve(torch.eye(2, dtype=x.dtype) - matrix, x[0])
    error = float((solution.value[0] - exact).abs().max())
    told = f"z = A z + x by PETSc in {int(solution.iterations.max())} iterations, error {error:.1e}"
    if error <= SELF_TEST_ERROR:
        yield Finding(OK, "self test", told)
    else:
        remedy = f"PETSc or its BLAS gives wrong numbers here: build anew with rm -r .venv && {SETUP}"
        yield Finding(FAIL, "self test", told, remedy)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "MPI": mpi_findings,
    "packages": package_findings,
    "petsc": petsc_findings,
    "hdf5": hdf5_findings,
    "threads": thread_findings,
    "CUDA": device_findings,
    "host": host_findings,
    "self test": self_test_findings,
}


def examine() -> list[Finding]:
    """Return all findings, that a check could not be made among them. Collective on MPI.COMM_WORLD."""
    found: list[Finding] = []
    for subject, check in CHECKS.items():
        try:
            found.extend(check())
        except Exception as error:  # whatever it is: a doctor that falls ill himself helps nobody
            found.append(Finding(FAIL, subject, f"not checked: {type(error).__name__}: {_first_line(error)}", SETUP))
    return found


def report(found: list[Finding]) -> int:
    """Print findings and return the exit code. Not collective."""
    for finding in found:
        print(finding)
    failed, warned = (sum(f.level == level for f in found) for level in (FAIL, WARN))
    print(f"{failed} failed, {warned} to look at" if failed or warned else "all is well")
    return EXIT_FAILED if failed else EXIT_DONE


def build_parser() -> CommandParser:
    """Return the parser of the command line. Not collective."""
    return CommandParser(
        prog="python -m hpcdeq.doctor",
        description="Check this environment: versions, MPI of petsc4py and mpi4py, scalar type, threads, GPU, Slurm,\n"
        "memory, and a small fixed point. Says what to type where something is wrong. Exit code 1 if something is.",
        epilog="On several ranks, as in a job: mpirun -n 2 python -m hpcdeq.doctor",
    )


def main(arguments: list[str]) -> int:
    """Examine every rank; the first one with a failure reports, or rank 0.

    Collective on MPI.COMM_WORLD.
    """
    from hpcdeq import parallel

    build_parser().parse_args(arguments)
    found = examine()
    failures = parallel.counts_of_ranks(parallel.WORLD, sum(finding.level == FAIL for finding in found))
    speaker = next((rank for rank, number in enumerate(failures) if number), 0)
    if parallel.WORLD.rank == speaker:
        if speaker:
            print(f"rank {speaker} on {platform.node()}:")
        report(found)
    return EXIT_FAILED if any(failures) else EXIT_DONE


if __name__ == "__main__":
    build_parser().parse_args(sys.argv[1:])  # a wrong command line ends here, before MPI starts
    try:
        from hpcdeq.parallel import launch
    except (ImportError, RuntimeError):  # no mpi4py, or no MPI library for it: the findings say so
        sys.exit(report(examine()))
    launch(main, sys.argv[1:])
