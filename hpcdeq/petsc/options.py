"""PETSc options under a mandatory prefix, alive inside a ``with``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from hpcdeq.errors import OptionError, suggestion
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.python_types import SHORT_NAMES, short_name, spelled_out
from hpcdeq.petsc.vocabulary import check_options, in_library

Value = str | int | float | bool | None


class Options:
    """The options of one prefix.

    The order of precedence is PETSc's own: what stands in the options database (the command line) wins over what is
    given here. What is given here is in the database only inside `inserted`, through set-up *and* solve, because
    PETSc reads some options (``-snes_view``, monitors) only when a solve ends.

    Parameters
    ----------
    prefix
        Prefix of every name, such as ``deq_``; never empty, so that two solvers cannot take each other's options.
    given
        Option names without prefix and dash, and their values; None or True for a flag.

    Raises
    ------
    OptionError
        An empty prefix, or a name that PETSc does not know.
    """

    def __init__(self, prefix: str, given: Mapping[str, Value] | None = None) -> None:
        if not prefix or not prefix.replace("_", "").isalnum() or not prefix.endswith("_"):
            raise OptionError(
                f"a PETSc options prefix is letters and digits with an underscore last (deq_), not {prefix!r}"
            )
        self.prefix = prefix
        named = {name.lstrip("-"): value for name, value in (given or {}).items()}
        check_options([f"-{prefix}{name}" for name in named], [prefix])
        full = {prefix + name: value for name, value in named.items()}
        check_types(full)
        self.given: dict[str, Any] = {name.removeprefix(prefix): value for name, value in spelled_out(full).items()}

    def chosen(self, chooser: str) -> str | None:
        """Return the type that ``snes_type``, ``ksp_type`` or ``pc_type`` names, None if nothing does. Not collective."""
        database = PETSc.Options(self.prefix)
        python = chooser.removesuffix("type") + "python_type"
        kind = database.getString(chooser, "") or self.given.get(chooser)
        if kind == "python":
            return short_name(database.getString(python, "") or self.given.get(python))
        return kind

    @contextlib.contextmanager
    def inserted(self) -> Iterator[None]:
        """Keep the options in PETSc's database inside a ``with`` block. Not collective."""
        database = PETSc.Options()
        present = {name: value for name, value in database.getAll().items() if name.startswith(self.prefix)}
        for name, value in spelled_out(present).items():
            if present.get(name) != value:
                database.setValue(name, value)
        added = [self.prefix + name for name in self.given if not database.hasName(self.prefix + name)]
        for name in added:
            database.setValue(name, as_text(self.given[name[len(self.prefix) :]]))
        try:
            yield
        finally:
            for name in added:
                database.delValue(name)


def check_types(options: Mapping[str, object]) -> None:
    """Refuse solver types that do not exist.

    Not collective.

    Parameters
    ----------
    options
        Names without the dash, with their prefix, and values; only those that choose a type are looked at.

    Raises
    ------
    OptionError
        Names the option, the value, and the nearest type.
    """
    for name, value in options.items():
        chooser = next((c for c in _TYPES if name == c or name.endswith("_" + c)), None)
        if chooser is None:
            continue
        known = {word for kind, word in vars(_TYPES[chooser]).items() if kind.isupper() and isinstance(word, str)}
        known |= set(SHORT_NAMES.get(chooser, ()))
        if value not in known and not in_library(str(value)):
            hint = suggestion(str(value), known, "see PETSc's manual page for the names")
            raise OptionError(f"-{name} {value}: PETSc has no such type: {hint}")


_TYPES = {
    "snes_type": PETSc.SNES.Type,
    "ksp_type": PETSc.KSP.Type,
    "pc_type": PETSc.PC.Type,
    "tao_type": PETSc.TAO.Type,
}


def number(options: PETSc.Options, name: str, default: float) -> float:
    """Return the value of an option that is a number, whole where its default is.

    Not collective.

    Raises
    ------
    OptionError
        It is none.
    """
    whole = isinstance(default, int)
    try:
        return options.getInt(name, default) if whole else options.getReal(name, default)
    except PETSc.Error as error:
        told = f"-{options.prefix or ''}{name} is {options.getString(name, '')!r}"
        raise OptionError(f"{told}: give a {'whole number' if whole else 'number'}") from error


def as_text(value: Value) -> str | None:
    """Return an option's value as PETSc reads it; a flag has none. Not collective."""
    if value is None or value is True:
        return None
    return "false" if value is False else str(value)


def insert_options(given: Mapping[str, str]) -> None:
    """Put options with their prefix into PETSc's database for good; an empty value makes a flag.

    Not collective. Where PETSc is initialised with them they are there already; a program that had initialised it before
    has them only through this.
    """
    database = PETSc.Options()
    for name, value in given.items():
        database.setValue(name, value or None)


@contextlib.contextmanager
def only_options(given: Mapping[str, str], prefixes: tuple[str, ...]) -> Iterator[None]:
    """Keep these options, and no others of the prefixes, in PETSc's database inside a ``with`` block.

    Not collective. Afterwards the database is as before, whatever was inserted meanwhile: runs one after the other do not
    see each other's options.
    """
    database = PETSc.Options()
    before = database_options()
    for name in before:
        if name.startswith(prefixes):
            database.delValue(name)
    insert_options(given)
    try:
        yield
    finally:
        for name in database.getAll():
            if name not in before or name.startswith(prefixes):
                database.delValue(name)
        insert_options({name: value for name, value in before.items() if not database.hasName(name)})


def database_options() -> dict[str, str]:
    """Return PETSc's options database as it stands, names without the dash, "" for a flag. Not collective."""
    return {name: value or "" for name, value in PETSc.Options().getAll().items() if name != "options_left"}


def unused_options(prefixes: tuple[str, ...]) -> list[str]:
    """Return the options in the database, of the given prefixes, that no object has read so far. Not collective."""
    database = PETSc.Options()
    return [f"-{name}" for name in database.getAll() if name.startswith(prefixes) and not database.used(name)]
