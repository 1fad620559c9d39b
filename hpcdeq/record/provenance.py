"""Where, with what and how a run was started."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.petsc.facts import petsc_facts

PACKAGES = ("hpcdeq", "numpy", "h5py", "petsc4py", "mpi4py", "pymatgen")


def environment(comm: parallel.Comm, seed: int, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what environment.json tells: where, with what and how this run was started.

    Not collective: this rank's view.

    Parameters
    ----------
    seed
        The seed of the run.
    command
        The command line as a list; default: this process's.
    """
    return {
        "versions": {"python": platform.python_version(), "petsc": petsc_facts()["version"], **_versions()},
        "mpi_library": parallel.mpi_library(),
        "ranks": comm.size,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "commit": _commit(),
        "seed": seed,
        "command": shlex.join(sys.orig_argv if command is None else command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def fingerprint(weights: Tensor) -> str:
    """Return the SHA-256 of weights ``(n,)`` as float64, so that runs can be seen to have begun alike. Not collective."""
    return hashlib.sha256(weights.detach().double().cpu().numpy().astype("<f8").tobytes()).hexdigest()


def _versions() -> dict[str, str | None]:
    """Return the packages' versions from their metadata: importing pymatgen to ask it would take seconds."""
    # torch tells itself CUDA's build from the CPU's, as its metadata need not.
    found: dict[str, str | None] = {"torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    """Return the commit of the source tree, with -dirty after local changes; None where git does not track it."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # An environment inside someone else's repository is not hpcdeq's source tree: only a tracked file proves one.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True, timeout=10)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
