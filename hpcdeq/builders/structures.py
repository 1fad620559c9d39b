"""Periodic structures with a property, from CIF folders, JSON lines, pymatgen's own JSON, or what ASE reads.

`source_rows` finds the rows (cheap, in order); `read_structure` parses one (slow for CIF, so workers do it).
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq.builders.cif import ordered_atoms, read_cif
from hpcdeq.builders.labelling import Labelling, Value
from hpcdeq.builders.samples import SKIPPED_LIST
from hpcdeq.data.rows import HEAVIEST
from hpcdeq.errors import DataError

LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
DOCUMENTS = (".json", ".json.gz")
ASE = (".xyz", ".extxyz", ".traj", ".db", ".vasp", ".poscar")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
ID_KEYS = ("id", "material_id", "entry_id", "task_id", "name", "filename", "cif_id", "refcode")
FILE_KEYS = ("filename", "cif_id")  # of them, those that name the file where another names the row
TABLE = "id_prop.csv"
FARTHEST = 1e6  # cells: farther away the coordinates of an atom are only good to 1e-9 A
ANY = ""  # name of the only property of a table without a header
ACCEPTED = (
    f"a folder of CIF files (with {TABLE} or another .csv), JSON lines (.jsonl[.gz]), pymatgen's JSON (.json[.gz]), one"
    f" .cif, or what ASE reads ({', '.join(ASE)})"
)
REFCODE = re.compile(r"[A-Z]{6}(?![A-Za-z])")  # of the Cambridge Structural Database: six letters name a family


@dataclass(frozen=True)
class SourceRow:
    """A row as found: a name for messages; a JSON line, an entry or the path of a file; what a table says of it."""

    name: str
    payload: str | Mapping[str, Any] | Path
    table: Mapping[str, Any] = field(default_factory=dict)


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
        The property, in the source's unit; NaN where none was asked for.
    split
        ``train``, ``validation``, ``test``, or None where the source does not say.
    group
        The same for all relatives.
    auxiliary
        Numbers to be learned beside the property; NaN for those that the source has not.
    """

    id: str
    lattice: np.ndarray
    atomic_number: np.ndarray
    frac: np.ndarray
    value: Value
    split: str | None
    group: str
    auxiliary: tuple[float, ...] = ()


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
    elif name.endswith(".cif"):
        yield SourceRow(source.stem, source, {"id": source.stem})
    elif name.endswith(ASE):
        yield from _ase_rows(source)
    else:
        raise DataError(f"{source}: unknown kind of source; SOURCE is {ACCEPTED}")


def read_structure(row: SourceRow, labels: Labelling | None, group: str) -> tuple[str, StructureRecord | None, str]:
    """Parse a row.

    Not collective: runs in workers.

    Parameters
    ----------
    labels
        Which property it has; None: none is asked for.
    group
        What relatives share: ``formula``, ``family`` (of CSD refcodes), or the name of a field of the source.

    Returns
    -------
    tuple
        Its name, and the structure, or None and the reason.
    """
    name = row.name
    try:
        if isinstance(row.payload, Path):
            entry = row.table
            if labels is not None:  # first: parsing takes long
                _refuse_unlabelled(labels, entry)
            structure: Parts = *read_cif(row.payload), {}
        else:
            found = json.loads(row.payload) if isinstance(row.payload, str) else row.payload
            if not isinstance(found, Mapping):
                raise ValueError("no JSON object")
            entry = found
            identity = _identity(entry)
            name = row.name if identity is None else f"{identity} ({row.name})"
            structure = _from_entry(entry)
        lattice, numbers, frac, inner = structure
        atoms = _checked(lattice, numbers, frac)
        value: Value = float("nan")
        auxiliary: tuple[float, ...] = ()
        if labels is not None:
            value = labels.value(_lookup(entry, inner, labels.property_name))
            auxiliary = labels.auxiliary_values(lambda name: _lookup(entry, inner, name))
        identity = _identity(entry) or row.name
        split, relatives = split_named(entry.get("split")), _group(group, identity, entry, atoms[1])
        record = StructureRecord(identity, *atoms, value, split, relatives, auxiliary)
        return identity, record, ""
    except Exception as error:  # foreign parsers on foreign input raise anything; one bad row must not end the job
        return name, None, reason_of(error)


def split_named(found: Any) -> str | None:
    """Return the split that a row names, None where it names none; `ValueError` for an unknown one. Not collective."""
    if found is None or found == "":
        return None
    if found not in SPLIT_NAMES:
        raise ValueError(f"split '{found}' is not train, validation or test")
    return SPLIT_NAMES[found]


def _refuse_unlabelled(labels: Labelling, table: Mapping[str, Any]) -> None:
    found = _lookup(table, {}, labels.property_name)
    if found is None and table.keys() == {"id"}:
        raise ValueError(f"no {labels.property_name}: a CIF file has none, and there is no {TABLE} beside it that does")
    labels.value(found)


def _group(kind: str, identity: str, entry: Mapping[str, Any], atoms: np.ndarray) -> str:
    if kind not in ("formula", "family"):
        if entry.get(kind) in (None, ""):
            raise ValueError(f"no {kind}, which is to name its relatives (--group)")
        return str(entry[kind])
    if kind == "family":
        refcode = REFCODE.match(identity)
        if entry.get("family") not in (None, ""):
            return str(entry["family"])
        if refcode:
            return refcode.group()
    kinds, counts = np.unique(atoms, return_counts=True)
    # Atomic numbers and smallest integer counts: the same for all cells of one reduced formula.
    return " ".join(f"{z}:{count}" for z, count in zip(kinds, counts // np.gcd.reduce(counts), strict=True))


def reason_of(error: Exception) -> str:
    """Return why a row cannot be used, in one line. Not collective."""
    text = " ".join(str(error).split())[:300]
    return text if type(error) is ValueError and text else f"{type(error).__name__}: {text}"


def _cif_rows(folder: Path) -> Iterator[SourceRow]:
    """Yield the rows of a folder's table; without one, its CIF files, which then have no property.

    A first line with one of `ID_KEYS` names the columns; without it they are file and property. The file of a row is named
    by one of `FILE_KEYS`, else by the first of `ID_KEYS` among the columns.
    """
    tables = [folder / TABLE]
    if not tables[0].is_file():
        tables = sorted(path for path in folder.glob("*.csv") if not path.name.endswith(SKIPPED_LIST))
    if len(tables) > 1:
        raise DataError(f"{folder}: {len(tables)} tables of properties and no {TABLE}; SOURCE is {ACCEPTED}")
    if not tables:
        files = sorted(folder.glob("*.cif"))
        if not files:
            raise DataError(f"{folder}: neither CIF files nor {TABLE} (lines `id,property`); SOURCE is {ACCEPTED}")
        for path in files:
            yield SourceRow(path.stem, path, {"id": path.stem})
        return
    head: list[str] = []
    try:
        with tables[0].open(newline="", encoding="utf-8-sig", errors="replace") as file:
            for cells in csv.reader(file):
                cells = [cell.strip() for cell in cells]
                if not any(cells):
                    continue
                if not head:
                    head = [cell.lower() if cell.lower() in ID_KEYS else cell for cell in cells]
                    if any(cell in ID_KEYS for cell in head):
                        continue
                    head = ["id", ANY]
                table = dict(zip(head, cells, strict=False))
                keys = [key for key in FILE_KEYS if key in head] or [key for key in head if key in ID_KEYS]
                stem = table.get(keys[0], "").removesuffix(".cif")
                yield SourceRow(stem, folder / f"{stem}.cif", {**table, "id": stem})
    except (OSError, csv.Error) as error:
        raise DataError(f"{tables[0]}: cannot be read to its end ({error})") from error


def _ase_rows(source: Path) -> Iterator[SourceRow]:
    try:
        import ase.db
        import ase.io
    except ImportError as error:
        raise DataError(f"{source}: only ASE reads this; install it with: pip install ase") from error
    try:
        found: Iterator[Any]
        if source.suffix.lower() == ".db":  # whose columns `iread` leaves out
            found = ((row.toatoms(), row.key_value_pairs) for row in ase.db.connect(str(source)).select())
        else:
            found = ((atoms, atoms.info) for atoms in ase.io.iread(str(source), index=":"))
        for number, (atoms, told) in enumerate(found):
            entry = {
                **(getattr(atoms.calc, "results", None) or {}),
                **told,
                "matrix": np.array(atoms.cell),
                "Z": atoms.numbers.tolist(),
                "frac": atoms.get_scaled_positions(wrap=False),
            }
            yield SourceRow(f"{source.stem}-{number}", entry)
    except Exception as error:  # whatever a parser of some sixty formats raises
        raise DataError(f"{source}: ASE cannot read it ({error})") from error


def _open_text(source: Path) -> Any:
    opener = gzip.open if source.name.lower().endswith(".gz") else open
    return opener(source, "rt", encoding="utf-8", errors="replace")


def _line_rows(source: Path) -> Iterator[SourceRow]:
    try:
        with _open_text(source) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield SourceRow(f"line {number}", line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source}: cannot be read to its end ({error}); copy it again") from error


def _document_rows(source: Path) -> Iterator[SourceRow]:
    try:
        with _open_text(source) as file:
            document = json.load(file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source}: cannot be read to its end ({error}); copy it again") from error
    except ValueError as error:
        raise DataError(f"{source}: not JSON ({error}); name it .jsonl if it has one object a line") from error
    if isinstance(document, list):
        for number, entry in enumerate(document):
            yield SourceRow(f"entry {number}", entry)
    elif isinstance(document, dict) and {"sites", "structure", "frac"} & document.keys():
        yield SourceRow("entry 0", document)
    elif isinstance(document, dict):
        for key, entry in document.items():
            yield SourceRow(key, entry)
    else:
        raise DataError(f"{source}: neither a list nor an object of structures; SOURCE is {ACCEPTED}")


Parts = tuple[Any, Any, Any, Mapping[str, Any]]  # lattice, atomic numbers, coordinates, the structure's own fields


def _from_entry(entry: Mapping[str, Any]) -> Parts:
    """Read a row with `cell` (or `matrix`), `Z` and `frac`, a structure, or an entry that holds one."""
    plain = {"Z", "frac"} <= entry.keys() and ("cell" in entry or "matrix" in entry)
    structure = entry if plain or "sites" in entry else entry.get("structure")
    if not isinstance(structure, Mapping):
        raise ValueError("neither cell, Z and frac, nor a pymatgen structure")
    from pymatgen.core import Lattice, Structure

    if not plain:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return *ordered_atoms(Structure.from_dict(dict(structure))), structure
    if "matrix" in entry:
        return entry["matrix"], entry["Z"], entry["frac"], {}
    cell = np.asarray(entry["cell"], float)
    if cell.shape != (6,) or not np.isfinite(cell).all():
        raise ValueError("cell is not six finite numbers a, b, c, alpha, beta, gamma")
    return Lattice.from_parameters(*cell).matrix, entry["Z"], entry["frac"], {}


def _lookup(entry: Mapping[str, Any], structure: Mapping[str, Any], property_name: str) -> Any:
    """Find the property in the entry, its `properties` and `data`, or the structure's own `properties`."""
    for place in (entry, entry.get("properties"), entry.get("data"), structure.get("properties")):
        if isinstance(place, Mapping) and place.get(property_name) is not None:
            return place[property_name]
    return entry.get(ANY)


def _identity(entry: Mapping[str, Any]) -> str | None:
    for place in (entry, entry.get("data")):
        for key in ID_KEYS:
            if isinstance(place, Mapping) and place.get(key) is not None:
                return str(place[key])
    return None


def _checked(lattice: Any, numbers: Any, frac: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    if lattice.shape != (3, 3):
        raise ValueError(f"a cell of shape {lattice.shape}, not three vectors")
    if np.abs(frac).max() > FARTHEST:
        raise ValueError(f"an atom {np.abs(frac).max():.3g} cells away: its coordinates have no digits left")
    volume = abs(float(np.linalg.det(lattice)))
    if volume < 1e-3 * atoms.size:
        raise ValueError(f"cell of {volume:.3g} A^3 for {atoms.size} atoms: its lengths or angles are impossible")
    return lattice, atoms.astype(np.uint8), frac.reshape(-1, 3)
