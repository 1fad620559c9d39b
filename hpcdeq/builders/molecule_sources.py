"""Rows of sources of molecules: tables with SMILES, SDF, xyz files, JSON lines. Cheap, in order, nothing is interpreted yet."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdeq.builders.structures import ID_KEYS, TABLE
from hpcdeq.errors import DataError

SMILES, SDF, XYZ, ENTRY = "smiles", "sdf", "xyz", "entry"
ENDINGS = {
    SMILES: (".csv", ".smi", ".tsv"),
    SDF: (".sdf", ".sd"),
    XYZ: (".xyz", ".extxyz"),
    ENTRY: (".jsonl", ".ndjson"),
}
ACCEPTED = f"a table with SMILES (.csv[.gz], .tsv), .sdf[.gz], .xyz (also a folder of them with {TABLE}) or .jsonl[.gz]"
PAIR = re.compile(r"""([A-Za-z_][\w-]*)=(?:"([^"]*)"|'([^']*)'|(\S+))""")  # of an extended xyz file's comment


@dataclass(frozen=True)
class MoleculeRow:
    """A row as found: a name for messages, its form, its text, and what a table says of it."""

    name: str
    form: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def source_rows(source: Path) -> Iterator[MoleculeRow]:
    """Yield the rows of a source in its order.

    Not collective.

    Raises
    ------
    DataError
        The source as a whole is missing, of an unknown kind, or damaged.
    """
    if source.is_dir():
        yield from _xyz_folder(source)
        return
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; SOURCE is {ACCEPTED}")
    name = source.name.lower().removesuffix(".gz")
    form = next((form for form, endings in ENDINGS.items() if name.endswith(endings)), None)
    if form is None:
        raise DataError(f"{source}: unknown kind of source; SOURCE is {ACCEPTED}")
    opener = gzip.open if source.name.lower().endswith(".gz") else open
    try:
        with opener(source, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            yield from READERS[form](source, file)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"{source}: cannot be read to its end ({error}); copy it again") from error


def _table_rows(source: Path, file: Any) -> Iterator[MoleculeRow]:
    delimiter = "\t" if source.name.lower().removesuffix(".gz").endswith((".tsv", ".smi")) else ","
    for number, fields in enumerate(csv.DictReader(file, delimiter=delimiter), start=2):
        yield MoleculeRow(f"line {number}", SMILES, "", {key: value for key, value in fields.items() if key})


def _sdf_rows(source: Path, file: Any) -> Iterator[MoleculeRow]:
    lines: list[str] = []
    number = 0
    for line in file:
        if line.rstrip() == "$$$$":
            number += 1
            yield MoleculeRow(f"record {number}", SDF, "".join(lines))
            lines = []
        else:
            lines.append(line)
    if any(line.strip() for line in lines):
        yield MoleculeRow(f"record {number + 1}", SDF, "".join(lines))


def _xyz_rows(source: Path, file: Any) -> Iterator[MoleculeRow]:
    lines = file.read().splitlines()
    place = number = 0
    while place < len(lines):
        if not lines[place].strip():
            place += 1
            continue
        number += 1
        try:
            atoms = int(lines[place])
        except ValueError:
            raise DataError(
                f"{source}: line {place + 1} is not a number of atoms; an xyz file has it before every molecule"
            ) from None
        block = lines[place : place + atoms + 2]
        place += atoms + 2
        comment = block[1] if len(block) > 1 else ""
        fields = {key: a or b or c for key, a, b, c in PAIR.findall(comment)}
        yield MoleculeRow(f"molecule {number}", XYZ, "\n".join(block), fields)


def _line_rows(source: Path, file: Any) -> Iterator[MoleculeRow]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield MoleculeRow(f"line {number}", ENTRY, line)


def _xyz_folder(folder: Path) -> Iterator[MoleculeRow]:
    """Yield the xyz files that a folder's table names; without one, all of them, which then have no property."""
    table = folder / TABLE
    if not table.is_file():
        files = sorted(folder.glob("*.xyz"))
        if not files:
            raise DataError(f"{folder}: no xyz files and no {TABLE}; SOURCE is {ACCEPTED}")
        rows = [{"id": path.stem} for path in files]
    else:
        with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = list(csv.DictReader(file))
        if rows and not any(key in rows[0] for key in ID_KEYS):
            raise DataError(f"{table}: its first line has to name the columns, one of them {', '.join(ID_KEYS[:3])}")
    for row in rows:
        name = next(str(row[key]) for key in ID_KEYS if key in row).removesuffix(".xyz")
        path = folder / f"{name}.xyz"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        yield MoleculeRow(name, XYZ, text, row)


READERS = {SMILES: _table_rows, SDF: _sdf_rows, XYZ: _xyz_rows, ENTRY: _line_rows}
