"""Writing a dataset file: batch by batch, in bounded memory, complete or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from hpcdeq.data.graphs import BONDS, EDGE_FIELDS, NODE_FIELDS, GraphArrays
from hpcdeq.data.new_file import NewFile
from hpcdeq.data.rows import SampleRows, check_rows
from hpcdeq.data.schema import AUXILIARY, FORMAT, SPLITS, VERSION, Schema
from hpcdeq.errors import DataError

CHUNK_BYTES = 1 << 20  # fewer are read slowly, more leave small files large
TEXT = h5py.string_dtype("utf-8")


class DatasetWriter:
    """Write a dataset file; a context manager.

    Not collective: one rank writes. The samples go to ``path + ".partial"``; leaving the context in good order marks
    the file complete and renames it to ``path`` in one step. An exception removes the partial file and leaves a file
    that was at ``path`` before as it was.

    Parameters
    ----------
    path
        The file to make.
    schema
        What it holds; ``count`` is found by counting.
    input_units
        Unit of `/array/x`; graphs are in Å.
    array_attributes
        Further attributes of `/array/x`, such as the grid it is sampled on.
    input_type
        Floating type that `/array/x` is stored in; single precision halves the file of images.

    Raises
    ------
    DataError
        The file cannot be made there, or samples do not fit the schema.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: Schema,
        *,
        input_units: str = "1",
        array_attributes: Mapping[str, Any] | None = None,
        input_type: type[np.floating] = np.float64,
    ) -> None:
        self.path = Path(path)
        self.partial = Path(f"{self.path}.partial")
        self.schema = schema
        self.count = 0
        self._input_units = input_units
        self._array_attributes = dict(array_attributes or {})
        self._input_type = input_type
        self._file: NewFile | None = None

    def __enter__(self) -> DatasetWriter:
        """Open the partial file and lay out empty datasets."""
        self.refuse(self.path)
        try:
            # The file format before HDF5 1.8 holds no list of more than 4,095 names of targets.
            self._file = NewFile(self.partial, libver=("v108", "v110"))
        except OSError as error:
            raise DataError(f"cannot write {self.partial}: {error}; give another --out") from error
        try:
            self._lay_out(self._file.hdf5)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete and rename the file, or remove it after an exception."""
        if error is not None:
            self._discard()
            return
        try:
            if self.count == 0:
                raise DataError(f"{self.path}: no samples to write")
            self._open().attrs["complete"] = True
            assert self._file is not None
            try:
                self._file.close()
            except OSError as refused:
                raise self._full(refused) from refused
            descriptor = os.open(self.partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(self.partial, self.path)
        except BaseException:
            self._discard()
            raise

    @staticmethod
    def refuse(path: Path) -> None:
        """Raise `DataError` where no file can be made. Not collective."""
        if path.is_dir():
            raise DataError(f"{path} is a folder; give --out a file name, e.g. {path / 'data.h5'}")
        if not path.parent.is_dir():
            raise DataError(f"folder {path.parent} does not exist; make it with: mkdir -p {path.parent}")

    def append(self, samples: SampleRows, splits: np.ndarray) -> None:
        """Append some samples.

        Not collective.

        Parameters
        ----------
        samples
            ``b`` samples that fit the schema.
        splits
            ``(b,)`` integers: 0 train, 1 validation, 2 test.

        Raises
        ------
        DataError
            They do not fit, or the disk is full.
        """
        number = len(samples.ids)
        graphs = samples.inputs if isinstance(samples.inputs, GraphArrays) else None
        self._check_lengths(samples, splits)
        check_rows(self.path, self.schema, samples, np.arange(self.count, self.count + number))
        self._extend("/sample/id", np.array(list(samples.ids), dtype=object))
        self._extend("/sample/split", splits)
        self._extend("/sample/target", samples.targets)
        if self.schema.auxiliary:
            self._extend(AUXILIARY, samples.auxiliary)
        if graphs is None:
            self._extend("/array/x", np.asarray(samples.inputs))
        else:
            file = self._open()
            nodes, edges = file["/graph/atomic_number"].shape[0], file["/graph/edge_source"].shape[0]
            self._extend("/graph/node_offset", graphs.node_offset[1:] + nodes)
            self._extend("/graph/edge_offset", graphs.edge_offset[1:] + edges)
            for name in self._graph_fields():
                self._extend(f"/graph/{name}", getattr(graphs, name))
        self.count += number
        assert self._file is not None
        try:
            self._file.check()
        except OSError as error:
            raise self._full(error) from error

    def _open(self) -> h5py.File:
        if self._file is None:
            raise DataError(f"{self.path}: the writer is not open; use it in a with statement")
        return self._file.hdf5

    def _full(self, error: OSError) -> DataError:
        return DataError(f"cannot write {self.partial}: {error.strerror}; is the disk or the quota full?")

    def _discard(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self.partial.unlink()

    def _check_lengths(self, samples: SampleRows, splits: np.ndarray) -> None:
        schema, number = self.schema, len(samples.ids)
        beside = samples.auxiliary.shape
        if beside != (number, len(schema.auxiliary)):
            raise DataError(
                f"{self.path}: auxiliary numbers of shape {beside}, of {number} samples and {schema.auxiliary}"
            )
        found = splits.shape, samples.targets.shape
        if found != ((number,), (number, *schema.target_shape)):
            raise DataError(f"{self.path}: {number} ids, but splits and targets of shapes {found[0]} and {found[1]}")
        if splits.size and not 0 <= splits.min() <= splits.max() < len(SPLITS):
            raise DataError(f"{self.path}: splits are 0 to {len(SPLITS) - 1}, got {splits.min()} to {splits.max()}")
        if isinstance(samples.inputs, GraphArrays) != (schema.representation == "graph"):
            raise DataError(f"{self.path}: inputs do not fit representation {schema.representation}")
        if isinstance(samples.inputs, GraphArrays):
            if len(samples.inputs) != number:
                raise DataError(f"{self.path}: {number} ids, but {len(samples.inputs)} graphs")
            conformers = samples.inputs.conformers.shape[1]
            if number and conformers != schema.conformers:
                raise DataError(f"{self.path}: atoms of {conformers} conformers, expected {schema.conformers}")
        elif samples.inputs.shape != (number, *schema.sample_shape):
            wanted = (number, *schema.sample_shape)
            raise DataError(f"{self.path}: inputs have shape {samples.inputs.shape}, expected {wanted}")

    def _lay_out(self, file: h5py.File) -> None:
        schema = self.schema
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["task"] = schema.task
        file.attrs["representation"] = schema.representation
        if schema.task == "classification":
            file.attrs.create("classes", list(schema.classes), dtype=TEXT)
            label_type: Any = np.int64
            label_units = "number of the class"
        else:
            file.attrs.create("target_names", list(schema.target_names), dtype=TEXT)
            file.attrs.create("target_units", list(schema.target_units), dtype=TEXT)
            label_type = np.float64
            label_units = "see target_units of the root"
        file.attrs["provenance"] = json.dumps(dict(schema.provenance), sort_keys=True)
        self._create("/sample/id", TEXT)
        self._create("/sample/split", np.uint8, units="0 train, 1 validation, 2 test")
        self._create("/sample/target", label_type, schema.target_shape, units=label_units)
        if schema.auxiliary:
            file.attrs.create("auxiliary_names", list(schema.auxiliary), dtype=TEXT)
            self._create(AUXILIARY, np.float64, (len(schema.auxiliary),), units="as in the source; NaN: not known")
        if schema.representation == "array":
            self._create("/array/x", self._input_type, schema.sample_shape, units=self._input_units)
            for name, value in self._array_attributes.items():
                file["/array/x"].attrs[name] = value
            return
        own = "number of the node within the sample's own graph, from 0"
        self._create("/graph/node_offset", np.int64, units="first node of each sample; the last entry is the total")
        self._create("/graph/edge_offset", np.int64, units="first edge of each sample; the last entry is the total")
        units = {
            "atomic_number": "protons; 0: the centre of a void",
            "formal_charge": "elementary charges",
            "partial_charge": "elementary charges",
            "conformers": "angstrom",
            "edge_source": f"the neighbour: {own}",
            "edge_target": f"the atom whose neighbour it is: {own}",
            "edge_vector": "angstrom",
            "edge_bond": ", ".join(f"{number} {name}" for number, name in enumerate(BONDS)),
        }
        shapes = {"edge_vector": (3,), "conformers": (schema.conformers, 3)}
        for name, kind in self._graph_fields().items():
            self._create(f"/graph/{name}", kind, shapes.get(name, ()), units=units[name])
        for name in ("/graph/node_offset", "/graph/edge_offset"):
            self._extend(name, np.zeros(1, np.int64))

    def _graph_fields(self) -> dict[str, Any]:
        """Return the datasets of nodes and edges that the file has, with their types."""
        fields = NODE_FIELDS | EDGE_FIELDS
        return {name: kind for name, kind in fields.items() if name != "conformers" or self.schema.conformers}

    def _create(self, name: str, kind: Any, shape: tuple[int, ...] = (), units: str = "") -> None:
        row_bytes = np.dtype(kind).itemsize * max(int(np.prod(shape)), 1)
        rows = min(max(CHUNK_BYTES // row_bytes, 1), 1 << 18 if name.startswith("/graph") else 1 << 10)
        made = self._open().create_dataset(
            name, shape=(0, *shape), maxshape=(None, *shape), chunks=(rows, *shape), dtype=kind
        )
        if units:
            made.attrs["units"] = units

    def _extend(self, name: str, values: np.ndarray) -> None:
        if values.shape[0]:  # a selection of no rows is an error in HDF5 for some types
            dataset = self._open()[name]
            start = dataset.shape[0]
            dataset.resize(start + values.shape[0], axis=0)
            dataset[start:] = values
