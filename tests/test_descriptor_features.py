"""Descriptors beside what a network makes of a graph: standardised by the training samples, whatever the ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpcdeq import parallel
from hpcdeq.builders.neighbours import neighbours_of
from hpcdeq.config import TrainConfig
from hpcdeq.data import Dataset
from hpcdeq.data.batches import graph_batch
from hpcdeq.data.descriptors import VALENCE, graph_descriptors, valence_electrons
from hpcdeq.data.graphs import GraphArrays, join_graphs
from hpcdeq.data.rows import HEAVIEST, SampleRows
from hpcdeq.data.schema import Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.models.descriptors import FARTHEST, DescriptorFeatures
from hpcdeq.tasks import make_problem


def crystal(a: int, b: int, cell: float) -> GraphArrays:
    """The caesium chloride structure of two elements."""
    return neighbours_of(np.eye(3) * cell, np.array([a, b]), np.array([[0.0] * 3, [0.5] * 3]), 8)


PAIRS = [(55, 17, 4.1), (11, 17, 3.5), (3, 9, 2.8), (28, 13, 2.9), (22, 28, 3.0), (26, 26, 2.9), (12, 8, 3.1)]


def graphs() -> GraphArrays:
    return join_graphs([crystal(*pair) for pair in PAIRS])


def test_valence_electrons_by_hand() -> None:
    table = valence_electrons()
    assert table.shape == (119, len(VALENCE)) == (119, 8)
    assert table[1].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert table[8].tolist() == [2, 4, 0, 0, 0, 2, 0, 0]  # 2s2 2p4
    assert table[26].tolist() == [2, 0, 6, 0, 0, 0, 4, 0]  # 4s2 3d6
    assert table[64].tolist() == [2, 0, 1, 7, 0, 0, 9, 7]  # 6s2 5d1 4f7
    names = graph_descriptors(graphs()).names
    values = graph_descriptors(graphs()).values
    odd = values[:, names.index("odd electrons")]
    assert odd.tolist() == [float((a + b) % 2) for a, b, _ in PAIRS]
    open_shells = values[:, names.index("open d or f shells")]
    assert open_shells.tolist() == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 0.0]


def test_features_are_of_standardised_descriptors() -> None:
    torch.manual_seed(0)
    layer = DescriptorFeatures(3, 0.0).double()
    values = graph_descriptors(graphs()).values
    known = np.isfinite(values)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0).sum(axis=0) / count
    deviation = np.sqrt(np.where(known, np.square(values - mean), 0).sum(axis=0) / count)
    layer.set(torch.from_numpy(mean), torch.from_numpy(deviation))
    batch = graph_batch(graphs(), slice(0, 7))
    scaled = np.zeros_like(values)
    for column in range(values.shape[1]):
        if deviation[column] > 1e-9 * (1 + abs(mean[column])):
            scaled[:, column] = (values[:, column] - mean[column]) / deviation[column]
    scaled = np.clip(np.nan_to_num(scaled), -FARTHEST, FARTHEST)
    present = np.zeros((len(values), HEAVIEST))
    for row, (a, b, _) in enumerate(PAIRS):
        present[row, [a - 1, b - 1]] = 1.0
    expected = layer.last(torch.nn.functional.silu(layer.hidden(torch.from_numpy(np.hstack([scaled, present])))))
    torch.testing.assert_close(layer(batch), expected)
    alone = layer(graph_batch(graphs(), np.array([4])))
    torch.testing.assert_close(alone[0], layer(batch)[4], rtol=0, atol=1e-12)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("model", ["graph_deq", "graph_unrolled", "cgcnn"])
def test_a_model_takes_the_training_samples_statistics(model: str, comm: parallel.Comm, tmp_path: Path) -> None:
    path = Path(parallel.from_root(comm, str(tmp_path))) / "d.h5"
    with parallel.agreement(comm):
        if comm.rank == 0:
            schema = Schema("classification", "graph", classes=("a", "b"))
            rows = SampleRows([str(k) for k in range(7)], np.arange(7) % 2, graphs())
            with DatasetWriter(path, schema) as writer:
                writer.append(rows, np.array([0, 0, 0, 0, 0, 2, 2], np.uint8))
    settings = {"width": 8, "head": 8, "descriptors": 4}
    config = TrainConfig(data=str(path), model=model, model_settings=settings)
    _, problem = make_problem(config, Dataset(path, "train", comm), comm)
    layer = next(module for module in problem.model.modules() if isinstance(module, DescriptorFeatures))
    train = graph_descriptors(graphs().take(slice(0, 5)))
    column = train.names.index("distance mean")
    assert float(layer.mean[column]) == pytest.approx(train.values[:, column].mean())
    assert float(layer.inverse[column]) == pytest.approx(1 / train.values[:, column].std())
    p = problem.initial()
    gradient = problem.gradient(p)
    step = torch.zeros_like(p)
    step[int(gradient.abs().argmax())] = 1e-5
    slope = (problem.loss(p + step) - problem.loss(p - step)) / 2e-5
    assert slope == pytest.approx(float(gradient.abs().max() * gradient[int(gradient.abs().argmax())].sign()), rel=1e-5)
