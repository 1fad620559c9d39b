"""Shares of samples by cost: how even they are, and that nothing but the work of the ranks depends on them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_data import ARRAYS, GRAPHS, array_rows, graph_rows, same_graphs, write

import hpcdeq
from hpcdeq import parallel
from hpcdeq.data import shares
from hpcdeq.data.dataset import Dataset
from hpcdeq.data.graphs import GraphArrays, join_graphs
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.shards import Shards
from hpcdeq.data.shares import Boundaries, Shares, boundaries, sample_costs
from hpcdeq.errors import DataError
from hpcdeq.models import build_model, model_config
from hpcdeq.parallel import Comm

EVERY = pytest.mark.parallel([1, 2, 3, 5])


def cut(costs: np.ndarray, ranks: int, blocks: int = 1) -> Boundaries:
    """Return the boundaries of samples that lie in some blocks."""
    parts = np.array_split(costs, blocks)
    counts, totals = (np.array([measure(part) for part in parts], np.int64) for measure in (len, np.sum))
    return boundaries(counts, totals, lambda block: parts[block], ranks)


def heavy_tailed(count: int) -> np.ndarray:
    """Return costs with a mean of about 500 and a largest one of some twenty times as much."""
    return np.random.default_rng(3).lognormal(5.8, 0.8, count).astype(np.int64) + 1


# ------------------------------------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16, 32, 64])
def test_a_heavy_tailed_distribution_is_shared_out_evenly(ranks: int) -> None:
    costs = heavy_tailed(26_000)
    found = cut(costs, ranks)
    by_hand = np.array([costs[a:b].sum() for a, b in zip(found.numbers, found.numbers[1:], strict=False)])
    np.testing.assert_array_equal(found.costs, by_hand)
    assert found.numbers[0] == 0 and found.numbers[-1] == len(costs)
    assert found.imbalance == by_hand.max() / by_hand.mean() <= 1.1
    # No other boundary is nearer to its part of the whole.
    reached = np.concatenate([[0], np.cumsum(costs)])
    wanted = int(costs.sum()) * np.arange(1, ranks) // ranks
    off = np.abs(reached[found.numbers[1:-1]] - wanted)
    np.testing.assert_array_equal(off, np.abs(reached[:, None] - wanted).min(axis=0))


@pytest.mark.parametrize("blocks", [2, 7, 100])
def test_boundaries_do_not_depend_on_how_samples_lie_in_blocks(blocks: int) -> None:
    costs = heavy_tailed(90)
    for ranks in (1, 2, 5, 13, 90):
        whole, parts = cut(costs, ranks), cut(costs, ranks, blocks)
        np.testing.assert_array_equal(whole.numbers, parts.numbers)
        np.testing.assert_array_equal(whole.costs, parts.costs)


def test_every_rank_has_a_sample_where_there_are_enough() -> None:
    for costs in ([100, 1, 1], [1, 1, 100], [1, 100, 1], [5, 5, 5]):
        assert cut(np.array(costs), 3).numbers.tolist() == [0, 1, 2, 3]
    assert cut(np.array([9, 9]), 5).numbers.tolist() == [0, 0, 0, 1, 1, 2]
    assert cut(np.zeros(0, np.int64), 3).numbers.tolist() == [0, 0, 0, 0]
    assert cut(np.zeros(0, np.int64), 3).imbalance == 1


@pytest.mark.parametrize(("count", "ranks"), [(7, 2), (5, 3), (100, 7), (3, 3), (2, 4)])
def test_samples_of_equal_cost_are_shared_out_by_number(count: int, ranks: int) -> None:
    numbers = cut(np.ones(count, np.int64), ranks).numbers
    assert numbers.tolist() == [*(parallel.own_slice(count, r, ranks).start for r in range(ranks)), count]


# ------------------------------------------------------------------------------------------------------------ files


def uneven_file(path: Path, heavy: int, count: int = 23) -> SampleRows:
    """Write graphs in all three splits, scattered, sample ``heavy`` as costly as all others together."""
    small = graph_rows(count)
    assert isinstance(small.inputs, GraphArrays)
    nodes, edges = 100, 2000
    random = np.random.default_rng(5)
    large = GraphArrays(
        np.array([0, nodes]),
        random.integers(1, 90, nodes).astype(np.uint8),
        np.array([0, edges]),
        random.integers(0, nodes, edges).astype(np.int32),
        random.integers(0, nodes, edges).astype(np.int32),
        random.standard_normal((edges, 3)),
    )
    graphs = join_graphs([small.inputs.take(slice(0, heavy)), large, small.inputs.take(slice(heavy + 1, count))])
    rows = SampleRows(small.ids, small.targets, graphs)
    write(path, GRAPHS, rows, np.where(np.arange(count) % 7 == 3, np.arange(count) % 2 + 1, 0).astype(np.uint8))
    return rows


def on_root(comm: Comm, make: object) -> None:
    with parallel.agreement(comm):
        if comm.rank == 0:
            make()  # type: ignore[operator]


@EVERY
@pytest.mark.parametrize("block", [1 << 18, 4])
def test_a_rank_with_a_heavy_sample_has_few_others(
    shared_tmp_path: Path, comm: Comm, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks together hold each split in order, and looking at few rows at a time changes nothing."""
    monkeypatch.setattr(shares, "BLOCK", block)
    path = shared_tmp_path / "uneven.h5"
    on_root(comm, lambda: uneven_file(path, heavy=2))
    for split in ("train", "validation", "test"):
        whole, own = Dataset(path, split, parallel.SELF), Dataset(path, split, comm)
        mine = slice(own.offset, own.offset + len(own))
        assert own.ids == whole.ids[mine] and own.count == whole.count == len(whole)
        assert torch.equal(own.targets, whole.targets[mine])
        assert isinstance(own._inputs, GraphArrays) and isinstance(whole._inputs, GraphArrays)
        assert same_graphs(own._inputs, whole._inputs.take(mine))
        lengths = parallel.counts_of_ranks(comm, len(own))
        assert own.offset == sum(lengths[: comm.rank]) and sum(lengths) == own.count
        if split == "train" and comm.size > 1:
            assert lengths[0] <= 3 < lengths[-1]
    graphs = Dataset(path, "train", parallel.SELF)._inputs
    assert isinstance(graphs, GraphArrays)
    costs = sample_costs(np.diff(graphs.node_offset), np.diff(graphs.edge_offset))
    np.testing.assert_array_equal(Shares(path, comm).of[0].numbers, cut(costs, comm.size).numbers)


@EVERY
def test_each_rank_reads_its_own_rows_only(shared_tmp_path: Path, comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what is taken out of the datasets with one item a row, a node or an edge."""
    path = shared_tmp_path / "long.h5"
    on_root(comm, lambda: write(path, GRAPHS, graph_rows(120), np.repeat([0, 1, 2], [80, 20, 20]).astype(np.uint8), 30))
    taken: dict[str, int] = {}

    def counted(dataset: h5py.Dataset, key: object, *rest: object) -> object:
        found = read(dataset, key, *rest)
        taken[dataset.name] = taken.get(dataset.name, 0) + (len(found) if isinstance(found, np.ndarray) else 1)
        return found

    read = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    files = Shares(path, comm)
    taken.clear()
    own = Dataset(files, "train", comm)
    assert isinstance(own._inputs, GraphArrays)
    nodes, edges = len(own._inputs.atomic_number), len(own._inputs.edge_source)
    assert taken["/graph/atomic_number"] == nodes and taken["/graph/edge_vector"] == edges
    assert taken["/sample/target"] == len(own) and taken["/graph/node_offset"] == len(own) + 1
    assert "/sample/id" not in taken
    assert len(own.ids) == len(own)


@EVERY
@pytest.mark.parametrize("kind", ["graph", "array"])
def test_many_parts_are_read_as_one_file(shared_tmp_path: Path, comm: Comm, kind: str) -> None:
    """Read ranges over several parts into one memory, parts without a field and scattered splits included."""
    rows, schema = (graph_rows(40), GRAPHS) if kind == "graph" else (array_rows(40), ARRAYS)
    splits = np.repeat([0, 1, 0, 2, 0], 8).astype(np.uint8)
    (shared_tmp_path / "parts").mkdir(exist_ok=True)

    def make() -> None:
        write(shared_tmp_path / "one.h5", schema, rows, splits)
        for part, start in enumerate(range(0, 40, 10)):
            own = slice(start, start + 10)
            write(shared_tmp_path / "parts" / f"part-{part:05d}.h5", schema, rows.take(own), splits[own])
        if kind == "graph":
            with h5py.File(shared_tmp_path / "parts" / "part-00001.h5", "r+") as file:
                del file["/graph/edge_bond"]

    on_root(comm, make)
    for split in ("train", "validation", "test"):
        one, many = (Dataset(shared_tmp_path / name, split, comm) for name in ("one.h5", "parts"))
        assert one.ids == many.ids and one.offset == many.offset and torch.equal(one.targets, many.targets)
        if isinstance(one._inputs, GraphArrays):
            assert isinstance(many._inputs, GraphArrays) and same_graphs(one._inputs, many._inputs)
        else:
            assert torch.equal(one._inputs, many._inputs)  # type: ignore[arg-type]


def test_ranges_over_parts_lie_in_one_memory(tmp_path: Path) -> None:
    rows = graph_rows(20)
    (tmp_path / "parts").mkdir()
    for part in range(2):
        own = slice(10 * part, 10 * part + 10)
        write(tmp_path / "parts" / f"part-{part:05d}.h5", GRAPHS, rows.take(own), np.zeros(10, np.uint8))
    found = Shards(tmp_path / "parts").read(np.arange(4, 17))
    assert found.ids == rows.ids[4:17] and isinstance(found.inputs, GraphArrays)
    assert isinstance(rows.inputs, GraphArrays) and same_graphs(found.inputs, rows.inputs.take(slice(4, 17)))
    with h5py.File(tmp_path / "parts" / "part-00001.h5", "r+") as file:
        file["/graph/edge_vector"][0] = np.inf
    with pytest.raises(DataError, match=r"part-00001\.h5: /graph/edge_vector row 0: inf is not finite"):
        Shards(tmp_path / "parts").read(np.arange(4, 17))


def test_sums_that_overflow_are_no_fault(tmp_path: Path) -> None:
    """Take huge numbers whose sum is infinite for what they are: finite."""
    rows = array_rows(4)
    huge = SampleRows(rows.ids, rows.targets, np.full_like(rows.inputs, 1.7e308))  # type: ignore[arg-type]
    write(tmp_path / "huge.h5", ARRAYS, huge, np.zeros(4, np.uint8))
    assert Dataset(tmp_path / "huge.h5", "train", parallel.SELF).count == 4


# ---------------------------------------------------------------------------------------------------- what is summed


@EVERY
@pytest.mark.parametrize("heavy", [0, 2, 22])
def test_loss_and_derivatives_do_not_depend_on_the_shares(shared_tmp_path: Path, comm: Comm, heavy: int) -> None:
    """Compare with one rank that has all samples; here one rank has little besides one large graph."""
    path = shared_tmp_path / "uneven.h5"
    on_root(comm, lambda: uneven_file(path, heavy))
    values = []
    for over in (parallel.SELF, comm, comm):
        data = Dataset(path, "train", over)
        model = build_model(
            "cgcnn", model_config("cgcnn", {}), "graph", (), 3, seed=1, dtype=torch.float64, device="cpu"
        )
        problem = hpcdeq.TrainingProblem(model, data, "cross_entropy", over, chunk_size=4)
        p = problem.initial()
        rows = np.random.default_rng(0).permutation(data.count)[:9]
        loss, gradient = problem.loss_and_gradient(p)
        part, part_gradient = problem.loss_and_gradient(p, rows)
        product = problem.gauss_newton_product(p, torch.ones_like(p))
        evaluation = problem.evaluate(p, Dataset(path, "test", over))
        numbers = torch.tensor([loss, part, evaluation.loss, evaluation.metric], dtype=torch.float64)
        values.append((numbers, gradient, part_gradient, product))
    for alone, shared, again in zip(*values, strict=True):
        assert float((alone - shared).norm()) <= 1e-12 * float(alone.norm())
        assert torch.equal(shared, again)
