"""Which PETSc options exist.

PETSc has no list of its options: each object asks for the names that it knows when it is set up. Their names are
string constants of the library, though, so that the set of all names can be read from the library file itself. That
is what lets a misspelt option be refused before anything has run.
"""

from __future__ import annotations

import difflib
import functools
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import petsc4py

from hpcdeq.errors import OptionError
from hpcdeq.petsc.python_types import OPTIONS


@functools.cache
def vocabulary() -> frozenset[str]:
    """Return every option name that the PETSc library knows, with its dash; empty where it cannot be read.

    Not collective.
    """
    names: set[str] = set()
    for path in _libraries():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names.update(found.decode() for found in re.findall(rb"\x00(-[a-z][a-z0-9_]+)(?=\x00)", data))
    return frozenset(names) | OPTIONS if names else frozenset()


def in_library(word: str) -> bool:
    """Say whether a word is a string constant of the PETSc library, as the name of a type is; True where it cannot be read.

    Not collective.
    """
    for path in _libraries():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(b"\x00" + word.encode() + b"\x00") >= 0:
                return True
    return not _libraries()


@functools.cache
def _libraries() -> tuple[Path, ...]:
    settings = petsc4py.get_config()
    root = Path(settings["PETSC_DIR"]) / settings.get("PETSC_ARCH", "")
    found = (*root.glob("lib/libpetsc*.so*"), *root.glob("lib/libpetsc*.dylib"))
    return tuple(sorted({path.resolve() for path in found}))


def check_options(given: Iterable[str], prefixes: Iterable[str]) -> None:
    """Refuse PETSc options that do not exist.

    Not collective.

    Parameters
    ----------
    given
        Option names as typed, with their dash and prefix: ``-deq_snes_rtol``.
    prefixes
        The prefixes in use, such as ``tao_`` or ``deq_``; an option without a prefix must be one of PETSc's own.

    Raises
    ------
    OptionError
        Names each unknown option and its nearest valid name.
    """
    known = vocabulary()
    if not known:
        return
    wrong = [name for name in given if not _exists(name, known, tuple(prefixes))]
    if wrong:
        raise OptionError("; ".join(_explain(name, known, tuple(prefixes)) for name in wrong))


def _exists(name: str, known: frozenset[str], prefixes: tuple[str, ...]) -> bool:
    if name in known:
        # Every object of this package has a prefix: a bare -snes_rtol would be read by nothing.
        return not name.startswith(("-snes_", "-ksp_", "-pc_")) or any(name.startswith(f"-{p}") for p in prefixes)
    for prefix in prefixes:
        # A prefix given twice would be read by nothing.
        if name.startswith(f"-{prefix}") and not name.startswith(f"-{prefix}{prefix}"):
            # Solvers inside solvers add prefixes of their own (npc_, sub_, tao_nls_ …): some tail must be a name.
            pieces = name[len(prefix) + 1 :].split("_")
            tails = ("-" + "_".join(pieces[start:]) for start in range(len(pieces) - 1))
            if any(tail in known for tail in tails):
                return True
    return False


def _explain(name: str, known: frozenset[str], prefixes: tuple[str, ...]) -> str:
    candidates = set(known)
    solvers = [word for word in known if word.startswith(("-snes_", "-ksp_", "-pc_"))]
    for prefix in prefixes:
        candidates.update(f"-{prefix}{word[1:]}" for word in solvers)
        if name.startswith(f"-{prefix}"):
            pieces = name[len(prefix) + 1 :].split("_")
            for start in range(1, len(pieces) - 1):
                head, tail = "_".join(pieces[:start]), "-" + "_".join(pieces[start:])
                near = difflib.get_close_matches(tail, solvers, n=1, cutoff=0.8)
                candidates.update(f"-{prefix}{head}_{word[1:]}" for word in near)
    if name in known:
        better = [f"-{p}{name[1:]}" for p in prefixes if f"-{p}" != "-tao_"]
    else:
        better = difflib.get_close_matches(
            name, [c for c in candidates if _exists(c, known, prefixes)], n=1, cutoff=0.5
        )
    hint = (
        f"did you mean {better[0]}?"
        if better
        else f"PETSc options here begin with {', '.join('-' + p for p in prefixes)}"
    )
    return f"unknown PETSc option {name}: {hint}"
