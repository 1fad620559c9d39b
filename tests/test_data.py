"""Dataset files: round trips, refusals, shards, and the rows of each rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpcdeq import parallel
from hpcdeq.data.batches import GraphBatch, graph_arrays, graph_batch
from hpcdeq.data.dataset import Dataset, TensorDataset
from hpcdeq.data.graphs import GraphArrays, join_graphs, no_graphs
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import Schema, open_dataset, read_schema
from hpcdeq.data.shards import Shards
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import DataError

GRAPHS = Schema("classification", "graph", classes=("a", "b", "c"), provenance={"source": "random"})
ARRAYS = Schema("regression", "array", target_names=("p", "q"), target_units=("eV", "1"), sample_shape=(2, 3))


def random_graphs(count: int, seed: int = 0) -> GraphArrays:
    """Return graphs of 1 to 5 nodes and 0 to 7 edges."""
    random = np.random.default_rng(seed)
    nodes, edges = random.integers(1, 6, count), random.integers(0, 8, count)
    largest = np.repeat(nodes, edges)
    return GraphArrays(
        np.concatenate([[0], np.cumsum(nodes)]),
        random.integers(1, 90, nodes.sum()).astype(np.uint8),
        np.concatenate([[0], np.cumsum(edges)]),
        random.integers(0, largest).astype(np.int32),
        random.integers(0, largest).astype(np.int32),
        random.standard_normal((edges.sum(), 3)),
    )


def graph_rows(count: int, seed: int = 0) -> SampleRows:
    """Return samples of `GRAPHS`; names are not ASCII."""
    labels = np.random.default_rng(seed + 1).integers(0, 3, count)
    return SampleRows([f"Ångström-{seed}-{row}" for row in range(count)], labels, random_graphs(count, seed))


def array_rows(count: int, seed: int = 0) -> SampleRows:
    """Return samples of `ARRAYS`."""
    random = np.random.default_rng(seed)
    inputs, targets = random.standard_normal((count, 2, 3)), random.standard_normal((count, 2))
    return SampleRows([str(row) for row in range(count)], targets, inputs)


def write(path: Path, schema: Schema, rows: SampleRows, splits: np.ndarray, batch: int = 4) -> None:
    """Write samples in batches."""
    with DatasetWriter(path, schema) as writer:
        for start in range(0, len(splits), batch):
            part = slice(start, start + batch)
            writer.append(rows.take(part), splits[part])


def same_graphs(one: GraphArrays, other: GraphArrays) -> bool:
    """Say whether all arrays are equal."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    """Return a good file of ten graphs: rows 0 to 5 train, 6 and 7 validation, 8 and 9 test."""
    path = tmp_path / "graphs.h5"
    write(path, GRAPHS, graph_rows(10), np.repeat([0, 1, 2], [6, 2, 2]).astype(np.uint8))
    return path


@pytest.fixture
def array_file(tmp_path: Path) -> Path:
    """Return a good file of ten arrays whose splits are scattered."""
    path = tmp_path / "arrays.h5"
    write(path, ARRAYS, array_rows(10), np.array([0, 1, 0, 2, 0, 0, 1, 2, 0, 0], np.uint8))
    return path


def test_graphs_come_back_as_written(graph_file: Path) -> None:
    """Read back what was written in batches of four."""
    rows = graph_rows(10)
    found = Shards(graph_file).read(np.arange(10))
    assert found.ids == rows.ids
    assert np.array_equal(found.targets, rows.targets)
    assert isinstance(found.inputs, GraphArrays) and isinstance(rows.inputs, GraphArrays)
    assert same_graphs(found.inputs, rows.inputs)
    assert found.inputs.edge_source.dtype == np.int32 and found.inputs.atomic_number.dtype == np.uint8
    with open_dataset(graph_file) as file:
        schema = read_schema(graph_file, file)
        assert file["/graph/edge_vector"].attrs["units"] == "angstrom"
    assert schema.difference(GRAPHS) is None
    assert (schema.count, schema.output_size, schema.provenance["source"]) == (10, 3, "random")
    assert not list(graph_file.parent.glob("*.partial"))


def test_scattered_splits_give_the_rows_of_the_split(array_file: Path) -> None:
    """Read a split whose rows are not contiguous."""
    rows = array_rows(10)
    train = Dataset(array_file, comm=parallel.SELF)
    own = [0, 2, 4, 5, 8, 9]
    assert train.ids == [str(row) for row in own]
    inputs, targets = train.batch(slice(None))
    assert torch.equal(inputs, torch.from_numpy(np.asarray(rows.inputs)[own]))
    assert torch.equal(targets, torch.from_numpy(rows.targets[own]))
    assert (train.input_shape, train.output_size, train.count, train.offset) == ((2, 3), 2, 6, 0)
    single = Dataset(array_file, comm=parallel.SELF, dtype=torch.float32)
    inputs, targets = single.batch(torch.tensor([1, 0]))
    assert inputs.dtype == targets.dtype == torch.float32
    assert torch.equal(inputs, torch.from_numpy(np.asarray(rows.inputs)[[2, 0]]).float())


def edit(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    """Return a function that damages a file from inside."""

    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return damage


def put(name: str, row: int, value: float) -> Callable[[Path], None]:
    """Return a function that changes one row of a dataset."""

    def change(file: h5py.File) -> None:
        file[name][row] = value

    return edit(change)


def attribute(name: str, value: object) -> Callable[[Path], None]:
    """Return a function that changes a root attribute."""

    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return edit(change)


def cut(path: Path) -> None:
    """Drop the last third of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


GRAPH_DAMAGE = {
    "missing": (Path.unlink, r"graphs\.h5: no such file; make it again with: python -m hpcdeq\.prepare"),
    "text": (lambda path: path.write_text("not HDF5"), r"graphs\.h5: not an HDF5 file"),
    "cut": (cut, r"graphs\.h5: truncated: \d+ bytes on disk"),
    "format": (attribute("format", "other"), r"no hpcdeq dataset"),
    "newer": (attribute("version", 2), r"version 2, this hpcdeq reads 1 to 1; update hpcdeq"),
    "incomplete": (edit(lambda file: file.attrs.__delitem__("complete")), r"not complete"),
    "completefalse": (attribute("complete", False), r"not complete"),
    "task": (attribute("task", "clustering"), r"task is 'clustering', not one of classification, regression"),
    "classes": (edit(lambda file: file.attrs.__delitem__("classes")), r"classes is missing or empty"),
    "provenance": (attribute("provenance", "{"), r"provenance is not JSON"),
    "lost": (edit(lambda file: file.__delitem__("/graph/edge_vector")), r"/graph/edge_vector is missing"),
    "shorter": (
        edit(lambda file: file["/sample/target"].resize(9, axis=0)),
        r"/sample/target has shape \(9,\), expected \(10,\): lengths mismatched",
    ),
    "edges": (edit(lambda file: file["/graph/edge_target"].resize(3, axis=0)), r"/graph/edge_target has shape \(3,\)"),
    "backwards": (put("/graph/node_offset", 3, 0), r"/graph/node_offset row 3: offsets decrease from \d+ to 0"),
    "start": (put("/graph/node_offset", 0, 1), r"/graph/node_offset row 0: 1, offsets start at 0"),
    "far": (put("/graph/edge_offset", 2, 10**6), r"/graph/edge_offset row 2: 1000000 is outside 0 to"),
    "split": (put("/sample/split", 4, 7), r"/sample/split row 4: 7 is not 0, 1 or 2"),
    "label": (put("/sample/target", 5, 3), r"/sample/target row 5: 3 is label out of range, classes are 0 to 2"),
    "negative": (put("/sample/target", 0, -1), r"/sample/target row 0: -1 is label out of range"),
    "element": (put("/graph/atomic_number", 0, 119), r"/graph/atomic_number row 0: 119 is not 0 to 118"),
    "neighbour": (put("/graph/edge_source", 0, 50), r"/graph/edge_source row 0: 50 is no node of its own graph"),
    "nan": (put("/graph/edge_vector", 0, np.nan), r"/graph/edge_vector row 0: nan is not finite"),
}


@pytest.mark.parametrize("damage", GRAPH_DAMAGE)
def test_damaged_graph_file_is_refused(graph_file: Path, damage: str) -> None:
    """Refuse a damaged file with its name, the dataset, the row and the reason."""
    change, message = GRAPH_DAMAGE[damage]
    assert Dataset(graph_file, comm=parallel.SELF).count == 6
    change(graph_file)
    with pytest.raises(DataError, match=message) as caught:
        Dataset(graph_file, comm=parallel.SELF)
    assert "graphs.h5" in str(caught.value)


def test_row_in_message_is_the_row_of_the_file(array_file: Path) -> None:
    """Name the file's row, not the row of the split or of the rank."""
    put("/array/x", 8, np.inf)(array_file)
    with pytest.raises(DataError, match=r"arrays\.h5: /array/x row 8: inf is not finite \(6 such values"):
        Dataset(array_file, comm=parallel.SELF)
    assert Dataset(array_file, "test", comm=parallel.SELF).count == 2
    put("/sample/target", 3, np.nan)(array_file)
    with pytest.raises(DataError, match=r"/sample/target row 3: nan is not finite"):
        Dataset(array_file, "test", comm=parallel.SELF)


def test_unknown_split_is_refused(array_file: Path) -> None:
    """List the splits that there are."""
    with pytest.raises(DataError, match="no split 'dev'; splits are train, validation, test"):
        Dataset(array_file, "dev", comm=parallel.SELF)


def test_a_failed_write_leaves_the_old_file(graph_file: Path) -> None:
    """Keep a good file byte for byte when its successor fails, and leave no partial file."""
    before = graph_file.read_bytes()
    with pytest.raises(RuntimeError, match="lost power"), DatasetWriter(graph_file, GRAPHS) as writer:
        writer.append(graph_rows(3), np.zeros(3, np.uint8))
        raise RuntimeError("lost power")
    with pytest.raises(DataError, match="no samples to write"), DatasetWriter(graph_file, GRAPHS):
        pass
    assert graph_file.read_bytes() == before
    assert [path.name for path in graph_file.parent.iterdir()] == ["graphs.h5"]


def test_writer_refuses_samples_that_do_not_fit(tmp_path: Path) -> None:
    """Refuse at writing what reading would refuse."""
    path = tmp_path / "out.h5"
    rows, splits = array_rows(3), np.zeros(3, np.uint8)
    wrong = SampleRows(rows.ids, np.where(np.eye(3, 2), np.nan, rows.targets), rows.inputs)
    with pytest.raises(DataError, match=r"/sample/target row 0: nan is not finite"):
        write(path, ARRAYS, wrong, splits)
    with pytest.raises(DataError, match="inputs do not fit representation graph"):
        write(path, GRAPHS, SampleRows(rows.ids, splits, rows.inputs), splits)
    with pytest.raises(DataError, match="splits are 0 to 2, got 3 to 3"):
        write(path, ARRAYS, rows, splits + 3)
    with pytest.raises(DataError, match="does not exist; make it with: mkdir -p"):
        write(tmp_path / "no" / "out.h5", ARRAYS, rows, splits)
    assert not list(tmp_path.iterdir())


def make_shards(folder: Path, sizes: tuple[int, ...] = (4, 0, 5, 1)) -> SampleRows:
    """Write ten graphs as parts, one of them empty of train rows, and return them."""
    rows, splits = graph_rows(10), np.array([0, 0, 1, 0, 0, 2, 0, 0, 0, 0], np.uint8)
    folder.mkdir()
    start = 0
    for part, size in enumerate(size for size in sizes if size):
        own = slice(start, start + size)
        write(folder / f"part-{part:05d}.h5", GRAPHS, rows.take(own), splits[own])
        start += size
    write(folder.parent / "single.h5", GRAPHS, rows, splits)
    return rows


@pytest.mark.parallel([1, 2, 3])
def test_shards_equal_the_single_file(shared_tmp_path: Path) -> None:
    """Give every rank the same rows from three parts as from one file."""
    folder = shared_tmp_path / "parts"
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            make_shards(folder)
    one, many = Dataset(shared_tmp_path / "single.h5"), Dataset(folder)
    assert one.ids == many.ids and one.count == many.count == 8
    for first, second in zip(
        vars(one.batch(slice(None))[0]).values(), vars(many.batch(slice(None))[0]).values(), strict=True
    ):
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    """Refuse a gap in the numbers, another schema, and a folder without parts."""
    folder = tmp_path / "parts"
    make_shards(folder)
    (folder / "part-00001.h5").rename(folder / "kept")
    with pytest.raises(DataError, match=r"part-00001\.h5 is missing \(1 of 3 parts\)"):
        Shards(folder)
    (folder / "kept").rename(folder / "part-00001.h5")
    edit(lambda file: file.attrs.__setitem__("classes", ["a", "b", "d"]))(folder / "part-00002.h5")
    with pytest.raises(DataError, match=r"part-00002\.h5: classes is \('a', 'b', 'd'\), but \('a', 'b', 'c'\) in part"):
        Shards(folder)
    with pytest.raises(DataError, match="a folder without part-00000"):
        Shards(tmp_path)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_ranks_together_hold_the_split(shared_tmp_path: Path, split: str) -> None:
    """Share out 5, 2 and 0 rows: each rank has its part of what one rank alone reads, in order."""
    path = shared_tmp_path / "graphs.h5"
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            write(path, GRAPHS, graph_rows(7), np.array([0, 1, 0, 0, 1, 0, 0], np.uint8))
    whole, own = Dataset(path, split, comm=parallel.SELF), Dataset(path, split)
    assert own.count == whole.count == len(whole)
    assert sum(parallel.counts_of_ranks(parallel.WORLD, len(own))) == whole.count
    expected = slice(own.offset, own.offset + len(own))
    assert own.ids == whole.ids[expected]
    assert own.offset == sum(parallel.counts_of_ranks(parallel.WORLD, len(own))[: parallel.WORLD.rank])
    (inputs, targets), (all_inputs, all_targets) = own.batch(slice(None)), whole.batch(expected)
    assert torch.equal(targets, all_targets) and targets.dtype == torch.int64
    assert isinstance(inputs, GraphBatch) and isinstance(all_inputs, GraphBatch)
    assert torch.equal(inputs.edge_source, all_inputs.edge_source)
    assert torch.equal(inputs.edge_vector, all_inputs.edge_vector) and inputs.edge_vector.shape[1:] == (3,)
    assert inputs.num_graphs == len(own)


@pytest.mark.parallel([2, 3])
def test_all_ranks_raise_what_one_finds(shared_tmp_path: Path) -> None:
    """Put a NaN where only the last rank reads it."""
    path = shared_tmp_path / "arrays.h5"
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            write(path, ARRAYS, array_rows(6), np.zeros(6, np.uint8))
            put("/array/x", 5, np.nan)(path)
    with pytest.raises(DataError, match=rf"rank {parallel.WORLD.size - 1}: .*/array/x row 5: nan") as caught:
        Dataset(path)
    assert caught.value.agreed


@pytest.mark.parallel([1, 2, 3])
def test_tensor_dataset_counts_over_ranks(shared_tmp_path: Path) -> None:
    """Give rank 0 nothing where there is another, the others two rows each."""
    comm = parallel.WORLD
    own = 0 if comm.rank == 0 and comm.size > 1 else 2
    inputs, labels = torch.full((own, 4), float(comm.rank)), torch.full((own,), comm.rank)
    data = TensorDataset(inputs, labels)
    assert data.count == 2 * max(comm.size - 1, 1)
    assert data.offset == 2 * max(comm.rank - 1, 0)
    assert (data.output_size, data.input_shape, data.task) == (comm.size, (4,), "classification")
    assert data.batch(slice(0, 1))[0].shape == (min(own, 1), 4)
    values = TensorDataset(inputs, inputs[:, 0])
    assert (values.output_size, values.targets.shape, values.task) == (1, (own, 1), "regression")


@pytest.mark.parallel([2, 3])
def test_tensor_dataset_refusals_are_agreed(shared_tmp_path: Path) -> None:
    """Raise on all ranks what only the last rank's tensors have wrong."""
    last = parallel.WORLD.rank == parallel.WORLD.size - 1
    inputs, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match="but 4 targets: give one target a sample"):
        TensorDataset(inputs, torch.zeros(4 if last else 3))
    with pytest.raises(DataError, match=r"a rank without samples gives tensors with zero rows of the common shape"):
        TensorDataset(torch.zeros(0, 5) if last else inputs, labels[:0] if last else labels)
    with pytest.raises(DataError, match="inputs row 0: not finite"):
        TensorDataset(inputs + torch.nan if last else inputs, labels)
    with pytest.raises(DataError, match="label -1 is out of range"):
        TensorDataset(inputs, labels - 1 if last else labels)
    with pytest.raises(DataError, match="label 4 is out of range for 3 classes"):
        TensorDataset(inputs, labels + 4 if last else labels, classes=3)


def test_graph_batch_of_any_rows_joins_single_graphs() -> None:
    """Compare the vectorised batch with one built graph by graph in a loop."""
    graphs = random_graphs(9)
    for rows in (slice(2, 6), np.array([5, 0, 8, 5]), torch.tensor([3]), np.empty(0, np.int64), slice(0, 9, 3)):
        batch = graph_batch(graphs, rows)
        chosen = range(9)[rows] if isinstance(rows, slice) else [int(row) for row in rows]
        numbers, sources, targets, vectors, owners = [], [], [], [], []
        for place, row in enumerate(chosen):
            first = len(numbers)
            numbers += graphs.atomic_number[graphs.node_offset[row] : graphs.node_offset[row + 1]].tolist()
            owners += [place] * (len(numbers) - first)
            for edge in range(graphs.edge_offset[row], graphs.edge_offset[row + 1]):
                sources.append(first + graphs.edge_source[edge])
                targets.append(first + graphs.edge_target[edge])
                vectors.append(graphs.edge_vector[edge].tolist())
        assert batch.atomic_number.tolist() == numbers and batch.node_graph.tolist() == owners
        assert batch.edge_source.tolist() == sources and batch.edge_target.tolist() == targets
        assert batch.edge_vector.tolist() == vectors and batch.num_graphs == len(chosen)
        assert {tensor.dtype for tensor in (batch.atomic_number, batch.edge_source, batch.node_graph)} == {torch.int64}
        assert torch.allclose(batch.edge_distance**2, (batch.edge_vector**2).sum(1))


def test_graph_batches_come_apart_again() -> None:
    """Take a batch apart, also with its edges shuffled, and select from it through a `TensorDataset`."""
    graphs = random_graphs(6)
    batch = graph_batch(graphs, slice(None))
    assert same_graphs(graph_arrays(batch), graphs)
    order = torch.randperm(len(batch.edge_source), generator=torch.Generator().manual_seed(0))
    shuffled = GraphBatch(
        batch.atomic_number,
        batch.edge_source[order],
        batch.edge_target[order],
        batch.edge_vector[order].float(),
        batch.node_graph,
        6,
    )
    data = TensorDataset(shuffled, torch.arange(6), comm=parallel.SELF)
    picked, targets = data.batch(np.array([4, 1]))
    assert isinstance(picked, GraphBatch) and picked.edge_vector.dtype == torch.float32
    expected = graph_batch(graphs, np.array([4, 1]))
    assert targets.tolist() == [4, 1]
    assert torch.equal(picked.node_graph, expected.node_graph)
    found = sorted(zip(picked.edge_source.tolist(), picked.edge_target.tolist(), strict=True))
    assert found == sorted(zip(expected.edge_source.tolist(), expected.edge_target.tolist(), strict=True))


def test_graph_batch_changes_precision_of_vectors_only() -> None:
    """Keep integers as they are."""
    single = graph_batch(random_graphs(3), slice(None)).to(torch.float32)
    assert single.edge_vector.dtype == torch.float32 and single.edge_source.dtype == torch.int64


def test_joined_parts_equal_the_whole() -> None:
    """Cut graphs in three, one of them empty, and join them again."""
    graphs = random_graphs(8)
    parts = [graphs.take(slice(0, 3)), no_graphs(), graphs.take(np.arange(3, 8))]
    assert same_graphs(join_graphs(parts), graphs)
    with pytest.raises(IndexError):
        graphs.take(np.array([8]))


def test_copying_a_part_of_a_file_is_noticed(graph_file: Path, tmp_path: Path) -> None:
    """Refuse the partial file of a writer that was killed, under whatever name it was kept."""
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "new.h5", GRAPHS) as writer:
        writer.append(graph_rows(3), np.zeros(3, np.uint8))
        writer._open().flush()
        shutil.copy(writer.partial, tmp_path / "kept.h5")
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="not complete"):
        Shards(tmp_path / "kept.h5")


def test_chunks_of_graphs_have_a_bounded_number_of_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, arrays = graph_rows(40), array_rows(7)
    write(tmp_path / "g.h5", GRAPHS, graphs, np.zeros(40, np.uint8))
    write(tmp_path / "a.h5", ARRAYS, arrays, np.zeros(7, np.uint8))
    edges = len(graphs.inputs.edge_source) / 40
    assert Shards(tmp_path / "a.h5").usual_chunk_size == Shards(tmp_path / "g.h5").usual_chunk_size == 512
    for most, expected in ((10 * edges, 10), (0.1 * edges, 1)):
        monkeypatch.setattr("hpcdeq.data.shards.CHUNK_EDGES", int(most + 0.5))
        assert abs(Dataset(tmp_path / "g.h5", "train", parallel.SELF).usual_chunk_size - expected) <= 1
