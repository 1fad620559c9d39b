"""How much memory this process holds and may hold."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from hpcdeq import parallel


def process_bytes() -> int:
    """Return this process's resident memory now; its peak where the system does not tell. Not collective."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had. Not collective."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if os.uname().sysname == "Darwin" else 1024)


def release_unused() -> None:
    """Give memory that the C library keeps for later back to the system, where it can (glibc). Not collective.

    Batches of graphs differ in size, and leave holes in the heap: its resident part would grow for thousands of iterations.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def fair_share(comm: parallel.Comm) -> int:
    """Return half of the host's memory divided among its ranks, in bytes. Collective on comm."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // 2 // parallel.ranks_on_this_host(comm)
