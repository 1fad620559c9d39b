"""The doctor: what it says of this environment, of a missing package, and of two MPIs in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcdeq import doctor

# What a launcher sets would make a child process believe that it is a rank of the job that runs these tests.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")) and name != "OMP_NUM_THREADS"
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def test_all_is_well_in_this_environment():
    done = run("-m", "hpcdeq.doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    levels = {line.split()[0] for line in done.stdout.splitlines()[:-1]}
    assert levels <= {"ok", "warn", "->"}
    for subject in ("MPI", "libmpi", "python", *doctor.PACKAGES, "petsc scalar", "hdf5", "threads", "CUDA", "memory"):
        assert f" {subject} " in done.stdout
    assert "self test" in done.stdout


def test_help_is_fast_and_imports_nothing_heavy():
    since = time.monotonic()
    done = run("-X", "importtime", "-m", "hpcdeq.doctor", "--help")
    seconds = time.monotonic() - since
    assert done.returncode == 0
    assert "usage:" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "mpi4py", "petsc4py", "h5py"}
    assert seconds < 5  # under a second on a quiet machine; this one may be busy


def test_a_missing_package_is_a_finding_with_a_remedy():
    hidden = "import runpy, sys; sys.modules['mpi4py'] = sys.modules['rdkit'] = None; sys.argv[1:] = []\n"
    done = run("-c", hidden + "runpy.run_module('hpcdeq.doctor', run_name='__main__')")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for package in ("mpi4py", "rdkit"):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"FAIL  {package} "))
        assert "cannot be imported" in lines[at]
        assert "bash scripts/setup.sh" in lines[at + 1]


def test_an_unknown_option_is_refused():
    done = run("-m", "hpcdeq.doctor", "--hlep")
    assert done.returncode == 2
    assert "did you mean --help?" in done.stderr


def test_mpi_libraries_are_told_from_their_companions(tmp_path: Path):
    one, other = tmp_path / "a" / "libmpi.so.40.40.7", tmp_path / "b" / "libmpich.so.12"
    for path in (one, other):
        path.parent.mkdir()
        path.touch()
    link = tmp_path / "a" / "libmpi.so.40"
    link.symlink_to(one.name)
    beside = [
        "/x/libmpi_mpifh.so.40",
        "/x/libmpicxx.so.12",
        "/x/libmpi_gtl_cuda.so.0",
        "/x/libpmix.so.2",
        "/x/MPI.abi3.so",
    ]
    maps = tmp_path / "maps"
    files = [one, link, *beside, other]
    maps.write_text(
        "".join(f"7f00-7f01 r-xp 00000000 08:01 1234   {file}\n" for file in files) + "7f02-7f03 rw-p 0 0 0\n"
    )
    assert doctor.loaded_mpi_libraries(maps) == {os.path.realpath(one), os.path.realpath(other)}
    assert doctor.loaded_mpi_libraries(tmp_path / "none") == set()


def test_a_second_mpi_library_fails_and_names_its_package(monkeypatch: pytest.MonkeyPatch):
    seen = iter([{"/a/libmpi.so.40"}, {"/a/libmpi.so.40", "/b/libmpi.so.12"}, {"/a/libmpi.so.40", "/b/libmpi.so.12"}])
    monkeypatch.setattr(doctor, "loaded_mpi_libraries", lambda: next(seen))
    (finding,) = [f for f in doctor.mpi_findings() if f.subject == "libmpi"]
    assert finding.level == doctor.FAIL
    assert "/b/libmpi.so.12 (petsc4py)" in finding.told
    assert "MPICC" in finding.remedy


def test_a_foreign_launcher_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    assert [f.subject for f in doctor.mpi_findings() if f.level == doctor.FAIL] == ["launcher"]


def test_a_slurm_job_of_more_tasks_warns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_NTASKS", "64")
    (finding,) = [f for f in doctor.host_findings() if f.subject == "Slurm"]
    assert finding.level == doctor.WARN
    assert "mpirun -n 64" in finding.remedy


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken():
        raise ValueError("no such thing\nsecond line")
        yield

    monkeypatch.setattr(doctor, "CHECKS", {"thing": broken})
    found = doctor.examine()
    assert doctor.report(found) == 1
    assert "FAIL  thing        not checked: ValueError: no such thing\n" in capsys.readouterr().out


@pytest.mark.parallel([1, 2, 3])
def test_all_ranks_return_the_same_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from hpcdeq import parallel

    last = parallel.WORLD.size - 1

    def one_rank_fails():
        yield doctor.Finding(doctor.FAIL if parallel.WORLD.rank == last else doctor.OK, "thing", "told", "do this")

    monkeypatch.setattr(doctor, "CHECKS", {"thing": one_rank_fails})
    assert doctor.main([]) == 1
    told = capsys.readouterr().out
    assert ("FAIL  thing" in told) == (parallel.WORLD.rank == last)
