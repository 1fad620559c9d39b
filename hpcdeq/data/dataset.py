"""This rank's samples: read from a dataset file, or given as tensors."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from hpcdeq import parallel
from hpcdeq.data.batches import GraphBatch, Inputs, RowsLike, graph_arrays, graph_batch, numpy_rows, taken
from hpcdeq.data.descriptors import descriptors_of
from hpcdeq.data.graphs import GraphArrays
from hpcdeq.data.rows import HEAVIEST, SampleRows
from hpcdeq.data.schema import SPLITS, Schema
from hpcdeq.data.shares import Boundaries, Recut, Shares, sample_costs
from hpcdeq.errors import DataError

DESCRIBED = 1024  # samples whose descriptors are computed together, which bounds the memory


class Dataset:
    """This rank's contiguous share of one split of a dataset file.

    Collective on comm. Rank 0 looks at headers and sizes and says where shares begin (`hpcdeq.data.shares`); each rank opens the
    file for itself and reads its own rows only, once; nothing is gathered. If any rank finds fault, all raise the same error.

    Files are opened independently even where HDF5 has MPI: what a rank reads are a few long stretches that no other rank
    asks for, which collective buffering has nothing to merge in, and the MPI-IO driver would make every failure to read a
    collective one.

    Parameters
    ----------
    path
        A dataset file, a folder of parts, or the `Shares` of either where several splits are read.
    split
        ``train``, ``validation`` or ``test``.
    comm
        Over which the samples of the split are shared out, equal numbers of arrays, equal costs of graphs; a share may be
        empty where there are fewer samples than ranks.
    dtype
        Of inputs and of regression targets.

    Attributes
    ----------
    schema
        What the file says of itself; `schema.count` counts all splits.
    task, input_shape, output_size, count, offset, targets
        See `hpcdeq.data.batches.SampleSource`; ``count`` is the split's.
    auxiliary
        ``(b, A)`` numbers that may be learned beside the targets; NaN where a sample has none.
    boundaries
        Where the ranks' shares begin.
    usual_chunk_size
        Samples that are best worked on together.

    Raises
    ------
    DataError
        The file is missing, damaged or unfit, with dataset, row and reason.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Shares,
        split: str = "train",
        comm: parallel.Comm = parallel.WORLD,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.split = split
        self.dtype = dtype
        with parallel.agreement(comm):
            if split not in SPLITS:
                raise DataError(f"no split '{split}'; splits are {', '.join(SPLITS)}")
        shares = path if isinstance(path, Shares) else Shares(Path(path), comm)
        self.path = shares.path
        self._shares, self._comm, self._number = shares, comm, SPLITS.index(split)
        self.schema: Schema = shares.shards.schema
        self.usual_chunk_size = shares.shards.usual_chunk_size
        self.task = self.schema.task
        self.input_shape = self.schema.sample_shape
        self.output_size = self.schema.output_size
        self.count = int(shares.of[self._number].numbers[-1])
        self.move(shares.of[self._number])

    def move(self, boundaries: Boundaries) -> None:
        """Take the samples of a share of other boundaries: this rank reads its rows, and none besides.

        Collective on comm. Until they are read it holds its former samples, and if any rank fails all keep them. Samples keep
        their global numbers.

        Raises
        ------
        DataError
            What is read is damaged; on all ranks.
        """
        with parallel.agreement(self._comm):
            rows = self._shares.rows(self._number, boundaries)
            samples = self._shares.shards.read(rows, names=False)
        self._take(boundaries, rows, samples)

    def recut(self, seconds: np.ndarray) -> Recut:
        """Return shares that take nearly equal time, for `move`; see `hpcdeq.data.shares.recut`.

        Collective on comm.

        Parameters
        ----------
        seconds
            ``(ranks,)`` time that each rank was busy with its present share; not all zero.
        """
        return self._shares.recut(self._number, self.boundaries, seconds)

    def boundaries_at(self, numbers: np.ndarray) -> Boundaries:
        """Return shares that begin at given samples, ``(ranks + 1,)``, for `move`. Collective on comm."""
        return self._shares.at(self._number, numbers)

    @property
    def moved(self) -> bool:
        """Whether the shares are others than those by cost."""
        return not np.array_equal(self.boundaries.numbers, self._shares.of[self._number].numbers)

    @property
    def imbalance(self) -> float:
        """Largest cost of a rank's share over their mean."""
        return self.boundaries.imbalance

    def _take(self, boundaries: Boundaries, rows: np.ndarray, samples: SampleRows) -> None:
        self.boundaries = boundaries
        self.offset = self._shares.own(boundaries).start
        self._rows = rows
        self.auxiliary = torch.from_numpy(samples.auxiliary).to(self.dtype)
        targets = torch.from_numpy(samples.targets)
        self.targets = targets if self.task == "classification" else targets.to(self.dtype)
        self._inputs: GraphArrays | torch.Tensor
        if isinstance(samples.inputs, GraphArrays):
            self._inputs = samples.inputs
        else:
            self._inputs = torch.from_numpy(samples.inputs).to(self.dtype)
        self.__dict__.pop("ids", None)  # those of the former samples, where they were asked for

    def __len__(self) -> int:
        """Return the number of samples of this rank. Not collective."""
        return len(self._rows)

    @property
    def costs(self) -> np.ndarray:
        """What each of this rank's samples costs, ``(b,)`` in the units that shares are made by."""
        if isinstance(self._inputs, GraphArrays):
            return sample_costs(np.diff(self._inputs.node_offset), np.diff(self._inputs.edge_offset))
        return np.ones(len(self), np.int64)

    @cached_property
    def ids(self) -> list[str]:
        """This rank's sample names, read when they are first asked for."""
        return self._shares.shards.names(self._rows)

    def batch(self, rows: RowsLike) -> tuple[Inputs, torch.Tensor]:
        """Return inputs and targets of some of this rank's samples.

        Not collective. A slice shares memory with the dataset where types allow.

        Parameters
        ----------
        rows
            A slice, or ``(b,)`` integers: numbers of samples within this rank.

        Returns
        -------
        tuple
            ``(b, *input_shape)`` tensor or `GraphBatch`, and ``(b,)`` or ``(b, T)`` targets.
        """
        targets = taken(self.targets, rows)
        if isinstance(self._inputs, GraphArrays):
            return graph_batch(self._inputs, numpy_rows(rows), self.dtype), targets
        return taken(self._inputs, rows), targets

    def descriptors(self) -> np.ndarray:
        """Return simple descriptors of this rank's samples, ``(b, d)``; see `hpcdeq.data.descriptors`. Not collective."""
        parts = []
        for start in range(0, max(len(self), 1), DESCRIBED):  # without samples too, for the number of columns
            rows = slice(start, start + DESCRIBED)
            own = self._inputs.take(rows) if isinstance(self._inputs, GraphArrays) else self._inputs[rows].numpy()
            parts.append(descriptors_of(own).values)
        return np.concatenate(parts)


def missing_classes(dataset: Dataset, comm: parallel.Comm) -> list[str]:
    """Return the names of the classes that no sample of the split has, on any rank; none for a regression.

    Collective on comm.
    """
    if dataset.task != "classification":
        return []
    own = np.bincount(dataset.targets.numpy(), minlength=dataset.output_size)
    counts = parallel.sum_over_ranks(comm, own)
    return [name for name, count in zip(dataset.schema.classes, counts, strict=True) if not count]


def column_statistics(numbers: torch.Tensor, comm: parallel.Comm) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each column over the rows of all ranks, ``(T,)`` float64.

    Collective on comm.

    Parameters
    ----------
    numbers
        This rank's ``(b, T)`` numbers; NaN is not known, and does not count. A column without any is of mean 0 and deviation 0.
    """
    own = numbers.double().cpu().numpy()
    known = np.isfinite(own)
    count = np.maximum(parallel.sum_over_ranks(comm, known.sum(axis=0).astype(float)), 1.0)
    mean = parallel.sum_over_ranks(comm, np.where(known, own, 0.0).sum(axis=0)) / count
    squares = np.square(np.where(known, own - mean, 0.0))  # two passes: no cancellation
    variance = parallel.sum_over_ranks(comm, squares.sum(axis=0)) / count
    return torch.from_numpy(mean), torch.from_numpy(np.sqrt(variance))


class TensorDataset:
    """A pair of tensors, this rank's rows, as a source of samples.

    Collective on comm. A rank without samples gives tensors with zero rows and the common trailing shape.

    Parameters
    ----------
    inputs
        ``(b, ...)`` tensor, or a `GraphBatch` of ``b`` graphs; used in its own precision and on its own device.
    targets
        ``(b,)`` integers make it a classification; ``(b, T)`` or ``(b,)`` floating numbers a regression.
    comm
        Over which the samples are shared out, in rank order.
    classes
        Number of classes; by default, one more than the largest label on any rank.

    Attributes
    ----------
    schema, task, input_shape, output_size, count, offset, targets
        As in `Dataset`; a regression's targets have shape ``(b, T)``.

    Raises
    ------
    DataError
        Lengths or trailing shapes differ, numbers are not finite, labels are out of range.
    """

    def __init__(
        self,
        inputs: Inputs,
        targets: torch.Tensor,
        comm: parallel.Comm = parallel.WORLD,
        classes: int | None = None,
    ) -> None:
        floating = targets.is_floating_point()
        self.task = "regression" if floating else "classification"
        self.targets = targets if floating else targets.to(torch.int64)
        if floating and targets.ndim == 1:
            self.targets = targets.unsqueeze(1)
        self._inputs = inputs
        self._graphs: GraphArrays | None = None
        self.input_shape: tuple[int, ...] = () if isinstance(inputs, GraphBatch) else tuple(inputs.shape[1:])
        root = parallel.from_root(comm, self._trailing_shapes())
        with parallel.agreement(comm):
            self._check(root)
            if isinstance(inputs, GraphBatch):
                self._graphs = graph_arrays(inputs)
        counts = parallel.counts_of_ranks(comm, len(targets))
        self.count = sum(counts)
        self.offset = sum(counts[: comm.rank])
        if floating:
            self.output_size = int(self.targets.shape[1])
        else:
            largest = int(parallel.max_over_ranks(comm, int(self.targets.max()) if len(targets) else -1))
            self.output_size = largest + 1 if classes is None else classes
            with parallel.agreement(comm):
                if largest >= self.output_size:
                    raise DataError(f"label {largest} is out of range for {self.output_size} classes")
        self.schema = Schema(
            self.task,
            "graph" if self._graphs is not None else "array",
            classes=() if floating else tuple(str(label) for label in range(self.output_size)),
            target_names=tuple(f"target {place}" for place in range(self.output_size)) if floating else (),
            target_units=("1",) * self.output_size if floating else (),
            sample_shape=self.input_shape,
            count=self.count,
            provenance={"source": "tensors"},
        )

    def __len__(self) -> int:
        """Return the number of samples of this rank. Not collective."""
        return len(self.targets)

    def batch(self, rows: RowsLike) -> tuple[Inputs, torch.Tensor]:
        """Return inputs and targets of some of this rank's samples; see `Dataset.batch`.

        Not collective.
        """
        targets = taken(self.targets, rows)
        if isinstance(self._inputs, GraphBatch):
            assert self._graphs is not None
            made = graph_batch(self._graphs, numpy_rows(rows), self._inputs.edge_vector.dtype)
            return made.to(device=self._inputs.edge_vector.device), targets
        return taken(self._inputs, rows), targets

    def _trailing_shapes(self) -> tuple[str, bool, tuple[int, ...], tuple[int, ...]]:
        return self.task, isinstance(self._inputs, GraphBatch), self.input_shape, tuple(self.targets.shape[1:])

    def _check(self, root: tuple[str, bool, tuple[int, ...], tuple[int, ...]]) -> None:
        """Refuse this rank's tensors where they do not fit together, or do not fit rank 0's."""
        inputs, targets = self._inputs, self.targets
        if len(inputs) != len(targets):
            raise DataError(f"{len(inputs)} inputs, but {len(targets)} targets: give one target a sample")
        if targets.ndim != (1 if self.task == "classification" else 2):
            raise DataError(f"targets of a {self.task} have shape (b,) or (b, T), got {tuple(targets.shape)}")
        if self._trailing_shapes() != root:
            raise DataError(
                f"task, graphs, input and target shapes are {self._trailing_shapes()}, but {root} on rank 0;"
                " a rank without samples gives tensors with zero rows of the common shape"
            )
        if self.task == "classification" and (targets < 0).any():
            row = int(torch.argmax((targets < 0).int()))
            raise DataError(f"targets row {row}: label {int(targets[row])} is out of range, labels start at 0")
        values = {"inputs": inputs.edge_vector if isinstance(inputs, GraphBatch) else inputs, "targets": targets}
        for name, tensor in values.items():
            wrong = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1) if tensor.numel() else None
            if wrong is not None and wrong.any():
                row = int(torch.argmax(wrong.int()))
                raise DataError(f"{name} row {row}: not finite; drop the row or repair its source")
        if isinstance(inputs, GraphBatch):
            self._check_graphs(inputs)

    @staticmethod
    def _check_graphs(batch: GraphBatch) -> None:
        nodes, graphs = len(batch.atomic_number), batch.node_graph
        ends = torch.cat([batch.edge_source, batch.edge_target])
        if len(ends) and not (0 <= int(ends.min()) and int(ends.max()) < nodes):
            raise DataError(f"edges name nodes {int(ends.min())} to {int(ends.max())} of {nodes}")
        if len(graphs) != nodes or (graphs.diff() < 0).any():
            raise DataError("node_graph has to name a sample for each node, and must not decrease")
        if nodes and not (0 <= int(graphs[0]) and int(graphs[-1]) < batch.num_graphs):
            raise DataError(f"node_graph names samples {int(graphs[0])} to {int(graphs[-1])} of {batch.num_graphs}")
        if (graphs[batch.edge_source] != graphs[batch.edge_target]).any():
            raise DataError("an edge joins two samples; edges stay within their sample")
        if nodes and not (0 <= int(batch.atomic_number.min()) and int(batch.atomic_number.max()) <= HEAVIEST):
            raise DataError(f"atomic numbers are 0 (a void) to {HEAVIEST}")
