"""The schema of a dataset file: what its root says, and the checks that a file has to pass before it is believed.

A file holds `/sample/{id,split,target}` with one row a sample and either `/array/x` or the ragged arrays of `/graph`
(see `hpcdeq.data.graphs.GraphArrays`). Every refusal names the file, the dataset, the row and the reason.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcdeq.errors import DataError

FORMAT = "hpcdeq"
VERSION = 1
SPLITS = ("train", "validation", "test")  # stored as 0, 1, 2
CONFORMERS = "/graph/conformers"
AUXILIARY = "/sample/auxiliary"
TASKS = ("classification", "regression")
REPRESENTATIONS = ("array", "graph")
REMEDY = "make it again with: python -m hpcdeq.prepare KIND SOURCE --out FILE.h5"


@dataclass(frozen=True)
class Schema:
    """What a dataset holds, without its rows.

    Attributes
    ----------
    task
        ``classification`` (targets are labels) or ``regression`` (targets are ``T`` numbers a sample).
    representation
        ``array`` (inputs are one array a sample) or ``graph``.
    classes
        Names of the labels 0, 1, ...; empty for regression.
    target_names, target_units
        One each a target; empty for classification.
    sample_shape
        Shape of one sample's input array; ``()`` for graphs.
    conformers
        Positions that every atom of a graph has, besides its edges; 0: none.
    auxiliary
        Names of numbers that may be learned beside the targets, ``A`` of them; a sample may lack some (NaN).
    count
        Number of samples in the file or folder, over all splits.
    provenance
        Source, command and versions.
    """

    task: str
    representation: str
    classes: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()
    target_units: tuple[str, ...] = ()
    sample_shape: tuple[int, ...] = ()
    conformers: int = 0
    auxiliary: tuple[str, ...] = ()
    count: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_size(self) -> int:
        """The number of classes, or of targets of a regression."""
        return len(self.classes) if self.task == "classification" else len(self.target_names)

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of one sample's target: ``()`` for a label, else ``(T,)``."""
        return () if self.task == "classification" else (len(self.target_names),)

    def as_json(self) -> str:
        """Return the schema as text; `from_json` reads it. Not collective."""
        return json.dumps({item.name: getattr(self, item.name) for item in fields(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Return the schema that `as_json` wrote; ``ValueError`` for anything else. Not collective."""
        found = json.loads(text)
        names = {item.name for item in fields(cls)}
        if not isinstance(found, dict) or not set(found) <= names:
            raise ValueError("no schema of a dataset")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return cls(**values)

    def difference(self, other: Schema) -> str | None:
        """Name the first property in which two parts of one dataset disagree; None where they fit.

        Not collective. Count and provenance may differ from part to part.
        """
        own = ("count", "provenance")
        for name in (item.name for item in fields(self) if item.name not in own):
            if getattr(self, name) != getattr(other, name):
                return name
        return None


@contextlib.contextmanager
def reading(path: Path, dataset: str = "") -> Iterator[None]:
    """Turn what h5py raises inside the block into a `DataError` that names file and dataset. Not collective."""
    where = f"{path}: {dataset}" if dataset else f"{path}"
    try:
        yield
    except KeyError as error:
        raise DataError(f"{where} is missing; {REMEDY}") from error
    except OSError as error:
        text = str(error)
        if "truncated file" in text:
            reason = f"truncated: {path.stat().st_size} bytes on disk, fewer than HDF5 wrote; copy it again or"
        elif "signature not found" in text:
            reason = "not an HDF5 file;"
        else:
            reason = f"cannot be read ({text});"
        raise DataError(f"{where}: {reason} {REMEDY}") from error


@contextlib.contextmanager
def open_dataset(path: Path) -> Iterator[h5py.File]:
    """Open a dataset file to read, for this rank alone.

    Not collective.

    Raises
    ------
    DataError
        The file is missing, not HDF5, or truncated.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; {REMEDY}")
    with reading(path):
        # Nothing writes to a finished file, and file locks fail on many parallel and read-only file systems. Rows are read
        # once: without a cache of chunks they come into place straight away.
        file = h5py.File(path, "r", locking=False, rdcc_nbytes=0)
    with file:
        yield file


def read_schema(path: Path, file: h5py.File) -> Schema:
    """Read and check the root attributes, and the lengths and types of all datasets.

    Not collective. The rows themselves are checked as they are read.

    Raises
    ------
    DataError
        The file is no hpcdeq dataset, is newer than this version, is not complete, or its datasets do not fit.
    """
    if _text(file, "format") != FORMAT:
        raise DataError(f"{path}: no hpcdeq dataset (root attribute format is not '{FORMAT}'); {REMEDY}")
    version = file.attrs.get("version")
    if not isinstance(version, (int, np.integer)) or not 1 <= version <= VERSION:
        raise DataError(f"{path}: version {version}, this hpcdeq reads 1 to {VERSION}; update hpcdeq, or {REMEDY}")
    if not isinstance(file.attrs.get("complete"), (bool, np.bool_)) or not file.attrs["complete"]:
        raise DataError(f"{path}: not complete (its writing was interrupted); {REMEDY}")
    task, representation = _text(file, "task"), _text(file, "representation")
    if task not in TASKS:
        raise DataError(f"{path}: root attribute task is '{task}', not one of {', '.join(TASKS)}; {REMEDY}")
    if representation not in REPRESENTATIONS:
        known = ", ".join(REPRESENTATIONS)
        raise DataError(f"{path}: root attribute representation is '{representation}', not one of {known}; {REMEDY}")
    try:
        provenance = json.loads(_text(file, "provenance") or "{}")
    except ValueError as error:
        raise DataError(f"{path}: root attribute provenance is not JSON ({error}); {REMEDY}") from error
    schema = Schema(
        task,
        representation,
        classes=_texts(file, "classes"),
        target_names=_texts(file, "target_names"),
        target_units=_texts(file, "target_units"),
        sample_shape=_dataset(path, file, "/array/x").shape[1:] if representation == "array" else (),
        auxiliary=_texts(file, "auxiliary_names"),
        conformers=(*_dataset(path, file, CONFORMERS).shape, 0)[1] if CONFORMERS in file else 0,
        count=len(_dataset(path, file, "/sample/split")),
        provenance=provenance,
    )
    if schema.output_size == 0:
        named = "classes" if task == "classification" else "target_names"
        raise DataError(f"{path}: root attribute {named} is missing or empty; {REMEDY}")
    if len(schema.target_units) != len(schema.target_names):
        raise DataError(f"{path}: {len(schema.target_names)} target_names, {len(schema.target_units)} target_units")
    _check_datasets(path, file, schema)
    return schema


def _text(file: h5py.File, name: str) -> str:
    value = file.attrs.get(name, "")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _texts(file: h5py.File, name: str) -> tuple[str, ...]:
    return tuple(str(value) for value in np.atleast_1d(file.attrs.get(name, ())))


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    with reading(path, name):
        dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
        raise DataError(f"{path}: {name} is not a dataset with rows; {REMEDY}")
    return dataset


def _check_datasets(path: Path, file: h5py.File, schema: Schema) -> None:
    """Compare every dataset's kind of number and shape with what the schema asks for."""
    rows = schema.count
    target_kind = "iu" if schema.task == "classification" else "f"
    _check_shape(path, file, "/sample/id", "OSU", (rows,))
    _check_shape(path, file, "/sample/split", "iu", (rows,))
    _check_shape(path, file, "/sample/target", target_kind, (rows, *schema.target_shape))
    if schema.auxiliary:
        _check_shape(path, file, AUXILIARY, "f", (rows, len(schema.auxiliary)))
    if schema.representation == "array":
        _check_shape(path, file, "/array/x", "f", (rows, *schema.sample_shape))
        return
    for name in ("node", "edge"):
        _check_shape(path, file, f"/graph/{name}_offset", "iu", (rows + 1,))
    with reading(path, "/graph"):
        nodes = int(file["/graph/node_offset"][-1])
        edges = int(file["/graph/edge_offset"][-1])
    _check_shape(path, file, "/graph/atomic_number", "iu", (nodes,))
    _check_shape(path, file, "/graph/edge_source", "iu", (edges,))
    _check_shape(path, file, "/graph/edge_target", "iu", (edges,))
    _check_shape(path, file, "/graph/edge_vector", "f", (edges, 3))
    # Files of structures alone may lack what only molecules have.
    optional = (("edge_bond", "iu", edges), ("formal_charge", "iu", nodes), ("partial_charge", "f", nodes))
    for name, kinds, rows in optional:
        if f"/graph/{name}" in file:
            _check_shape(path, file, f"/graph/{name}", kinds, (rows,))
    if CONFORMERS in file:
        _check_shape(path, file, CONFORMERS, "f", (nodes, schema.conformers, 3))


def _check_shape(path: Path, file: h5py.File, name: str, kinds: str, shape: tuple[int, ...]) -> None:
    dataset = _dataset(path, file, name)
    if dataset.dtype.kind not in kinds:
        raise DataError(f"{path}: {name} holds {dataset.dtype}, which the schema does not allow; {REMEDY}")
    if dataset.shape != shape:
        raise DataError(f"{path}: {name} has shape {dataset.shape}, expected {shape}: lengths mismatched; {REMEDY}")
