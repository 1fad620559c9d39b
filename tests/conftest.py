"""What all tests share: rank counts, a folder for all ranks, commands run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hpcdeq import parallel

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "parallel(sizes): run on these numbers of ranks; without it, on one")
    config.addinivalue_line("markers", "crowded: takes all cores for minutes; run by itself")
    config.addinivalue_line("markers", "real_data: needs the real data beside the repository")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    size = parallel.WORLD.size
    chosen, others = [], []
    for item in items:
        mark = item.get_closest_marker("parallel")
        (chosen if size in (mark.args[0] if mark else [1]) else others).append(item)
        if item.get_closest_marker("real_data") and not DATA.exists():
            item.add_marker(pytest.mark.skip(reason=f"no real data at ../shared/data beside {ROOT.name}"))
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.fixture
def comm() -> parallel.Comm:
    """The communicator of all ranks."""
    return parallel.WORLD


@pytest.fixture
def shared_tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder, the same on all ranks."""
    own = tmp_path_factory.mktemp("shared") if parallel.WORLD.rank == 0 else None
    return parallel.from_root(parallel.WORLD, own)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Start each test from the same random state, on every rank, and leave no solver option to the next one."""
    from hpcdeq.petsc.options import only_options

    torch.manual_seed(1234)
    with only_options({}, ("deq_", "tao_")):
        yield


Run = Callable[..., subprocess.CompletedProcess[str]]


def clean_environment(**more: str) -> dict[str, str]:
    """Return the environment without what this process's own MPI left in it."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_", "PMI_"))}
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        keep |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # More ranks than cores, in Open MPI 5 and in 4.
    keep |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    return {**keep, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run ``python ARGUMENTS`` on some ranks, as a user would, in an empty folder; returns the finished process."""

    def call(
        *arguments: str, ranks: int = 1, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        if ranks > 1:
            command = ["mpirun", "-n", str(ranks), *command]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=clean_environment(**environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call
