"""Crystal structures and one property each, from CIF folders, JSON lines, or pymatgen's own JSON.

`source_rows` finds the rows (cheap, in order); `read_block` parses some of them (slow for CIF, so workers do it).
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcdeq.builders.samples import Skipped
from hpcdeq.data.rows import HEAVIEST
from hpcdeq.errors import DataError

if TYPE_CHECKING:
    from pymatgen.core import Structure

LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
DOCUMENTS = (".json", ".json.gz")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
ID_KEYS = ("id", "material_id", "entry_id", "task_id")
ACCEPTED = "a folder of CIF files with id_prop.csv, JSON lines (.jsonl[.gz]) or pymatgen's JSON (.json[.gz])"


@dataclass(frozen=True)
class SourceRow:
    """A row as found: a name for messages, and a JSON line, an entry or the path of a CIF file to parse."""

    name: str
    payload: str | Mapping[str, Any] | Path
    value: str | None = None


@dataclass(frozen=True)
class StructureRecord:
    """A periodic structure of ``n`` atoms with its property.

    Attributes
    ----------
    id
        The source's name for it.
    lattice
        ``(3, 3)`` Å, one lattice vector a row.
    atomic_number
        ``(n,)`` uint8.
    frac
        ``(n, 3)`` coordinates in units of the lattice vectors.
    value
        The property, in the source's unit.
    split
        ``train``, ``validation``, ``test``, or None where the source does not say.
    formula
        Atomic numbers and smallest integer counts: the same for all cells of one reduced formula.
    """

    id: str
    lattice: np.ndarray
    atomic_number: np.ndarray
    frac: np.ndarray
    value: float
    split: str | None
    formula: str


def source_rows(source: Path) -> Iterator[SourceRow]:
    """Yield the rows of a source in its order.

    Not collective.

    Raises
    ------
    DataError
        The source as a whole is missing, of an unknown kind, or damaged.
    """
    name = source.name.lower()
    if source.is_dir():
        yield from _cif_rows(source)
    elif not source.exists():
        raise DataError(f"{source}: no such file or folder; SOURCE is {ACCEPTED}")
    elif name.endswith(LINES):
        yield from _line_rows(source)
    elif name.endswith(DOCUMENTS):
        yield from _document_rows(source)
    else:
        raise DataError(f"{source}: unknown kind of source; SOURCE is {ACCEPTED}")


def read_block(rows: list[SourceRow], property_name: str) -> list[StructureRecord | Skipped]:
    """Parse some rows; one that cannot be read gives a `Skipped` in its place.

    Not collective: runs in workers.
    """
    found: list[StructureRecord | Skipped] = []
    for row in rows:
        name = row.name
        try:
            if isinstance(row.payload, Path):
                found.append(_from_cif(row.name, row.payload, row.value))
                continue
            entry = json.loads(row.payload) if isinstance(row.payload, str) else row.payload
            if not isinstance(entry, Mapping):
                raise ValueError("no JSON object")
            name = _identity(entry) or row.name
            found.append(_from_entry(name, entry, property_name))
        except Exception as error:  # foreign parsers on foreign input raise anything; one bad row must not end the job
            found.append(Skipped(name if name == row.name else f"{name} ({row.name})", _reason(error)))
    return found


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if type(error) is ValueError and text else f"{type(error).__name__}: {text}"


def _cif_rows(folder: Path) -> Iterator[SourceRow]:
    table = folder / "id_prop.csv"
    if not table.is_file():
        raise DataError(f"{folder}: a folder without id_prop.csv (lines `id,property`); SOURCE is {ACCEPTED}")
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        for cells in csv.reader(file):
            if cells and any(cells):
                yield SourceRow(cells[0].strip(), folder / f"{cells[0].strip()}.cif", ",".join(cells[1:2]))


def _open_text(source: Path) -> Any:
    opener = gzip.open if source.name.lower().endswith(".gz") else open
    return opener(source, "rt", encoding="utf-8", errors="replace")


def _line_rows(source: Path) -> Iterator[SourceRow]:
    try:
        with _open_text(source) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield SourceRow(f"line {number}", line)
    except (OSError, EOFError) as error:
        raise DataError(f"{source}: cannot be read to its end ({error}); copy it again") from error


def _document_rows(source: Path) -> Iterator[SourceRow]:
    try:
        with _open_text(source) as file:
            document = json.load(file)
    except (OSError, EOFError) as error:
        raise DataError(f"{source}: cannot be read to its end ({error}); copy it again") from error
    except ValueError as error:
        raise DataError(f"{source}: not JSON ({error}); name it .jsonl if it has one object a line") from error
    if isinstance(document, list):
        for number, entry in enumerate(document):
            yield SourceRow(f"entry {number}", entry)
    elif isinstance(document, dict) and ("sites" in document or "structure" in document):
        yield SourceRow("entry 0", document)
    elif isinstance(document, dict):
        for key, entry in document.items():
            yield SourceRow(key, entry)
    else:
        raise DataError(f"{source}: neither a list nor an object of structures; SOURCE is {ACCEPTED}")


def _from_cif(name: str, path: Path, value: str | None) -> StructureRecord:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    number = _number("property", value)
    from pymatgen.io.cif import CifParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about rounding and formula remarks; what matters is checked below
        structure = CifParser(path).parse_structures(primitive=False, on_error="raise")[0]
    return _from_structure(name, structure, number, None)


def _from_entry(name: str, entry: Mapping[str, Any], property_name: str) -> StructureRecord:
    """Read a row with `cell`, `Z` and `frac`, a structure, or an entry that holds one."""
    plain = {"cell", "Z", "frac"} <= entry.keys()
    structure = entry if plain or "sites" in entry else entry.get("structure")
    if not isinstance(structure, Mapping):
        raise ValueError("neither cell, Z and frac, nor a pymatgen structure")
    value = _number(property_name, _lookup(entry, structure, property_name))
    split = entry.get("split")
    if split is not None and split not in SPLIT_NAMES:
        raise ValueError(f"split '{split}' is not train, validation or test")
    split = SPLIT_NAMES[split] if split is not None else None
    from pymatgen.core import Lattice, Structure

    if not plain:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _from_structure(name, Structure.from_dict(dict(structure)), value, split)
    cell = np.asarray(entry["cell"], float)
    if cell.shape != (6,) or not np.isfinite(cell).all():
        raise ValueError("cell is not six finite numbers a, b, c, alpha, beta, gamma")
    return _record(name, Lattice.from_parameters(*cell).matrix, entry["Z"], entry["frac"], value, split)


def _lookup(entry: Mapping[str, Any], structure: Mapping[str, Any], property_name: str) -> Any:
    """Find the property in the entry, its `properties` and `data`, or the structure's own `properties`."""
    for place in (entry, entry.get("properties"), entry.get("data"), structure.get("properties")):
        if isinstance(place, Mapping) and place.get(property_name) is not None:
            return place[property_name]
    return None


def _identity(entry: Mapping[str, Any]) -> str | None:
    for place in (entry, entry.get("data")):
        for key in ID_KEYS:
            if isinstance(place, Mapping) and place.get(key) is not None:
                return str(place[key])
    return None


def _number(name: str, value: Any) -> float:
    if value is None or isinstance(value, bool):
        raise ValueError(f"no {name}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is '{value}', not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, not finite")
    return number


def _from_structure(name: str, structure: Structure, value: float, split: str | None) -> StructureRecord:
    from pymatgen.core import DummySpecies

    if not structure.is_ordered:
        raise ValueError("disordered: sites with partial occupancy")
    if any(isinstance(site.specie, DummySpecies) for site in structure):
        raise ValueError("a site without a chemical element")
    numbers = [site.specie.Z for site in structure]
    return _record(name, structure.lattice.matrix, numbers, structure.frac_coords, value, split)


def _record(name: str, lattice: Any, numbers: Any, frac: Any, value: float, split: str | None) -> StructureRecord:
    lattice, frac = np.asarray(lattice, float), np.asarray(frac, float)
    atoms = np.asarray(numbers)
    if atoms.ndim != 1 or atoms.size == 0:
        raise ValueError("no atoms")
    if atoms.dtype.kind not in "iu" or atoms.min() < 1 or atoms.max() > HEAVIEST:
        raise ValueError(f"atomic numbers are not integers from 1 to {HEAVIEST}")
    if frac.size != 3 * atoms.size:
        raise ValueError(f"{atoms.size} atoms, but {frac.size} coordinates")
    if not (np.isfinite(lattice).all() and np.isfinite(frac).all()):
        raise ValueError("cell or coordinates are not finite")
    volume = abs(float(np.linalg.det(lattice)))
    if volume < 1e-3 * atoms.size:
        raise ValueError(f"cell of {volume:.3g} A^3 for {atoms.size} atoms: its lengths or angles are impossible")
    kinds, counts = np.unique(atoms, return_counts=True)
    formula = " ".join(f"{kind}:{count}" for kind, count in zip(kinds, counts // np.gcd.reduce(counts), strict=True))
    return StructureRecord(name, lattice, atoms.astype(np.uint8), frac.reshape(-1, 3), value, split, formula)
