"""Numbers learned beside the targets: from the source's columns to a loss that a dense computation repeats."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.builders.labelling import Labelling
from hpcdeq.config import TrainConfig
from hpcdeq.data import Dataset, TensorDataset
from hpcdeq.errors import DataError, OptionError, ShapeError
from hpcdeq.problem import LOSSES, TrainingProblem
from hpcdeq.problem.auxiliary import AuxiliarySource, WithAuxiliary, standardisation
from hpcdeq.tasks import resolved

WEIGHT = 0.7
COUNT, BESIDE, CLASSES = 11, 2, 3


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and numbers beside them, two of which are not known."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(COUNT, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    numbers = torch.randn(COUNT, BESIDE, generator=generator, dtype=torch.float64)
    numbers[1, 0] = numbers[7, 1] = math.nan
    return inputs, labels, numbers


def network(outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def problem_on(comm: parallel.Comm, task: str) -> TrainingProblem:
    inputs, labels, numbers = drawn()
    targets = labels if task == "classification" else inputs[:, :2].sin()
    own = parallel.own_slice(COUNT, comm.rank, comm.size)
    if comm.size == 3:  # one of them empty
        own = (slice(0, 5), slice(5, 5), slice(5, COUNT))[comm.rank]
    source = TensorDataset(inputs[own], targets[own], comm, classes=CLASSES if task == "classification" else None)
    base = LOSSES["cross_entropy" if task == "classification" else "mse"]
    loss = WithAuxiliary(base, BESIDE, WEIGHT)
    return TrainingProblem(
        network(source.output_size + BESIDE), AuxiliarySource(source, numbers[own]), loss, comm, chunk_size=4
    )


def expected(p: Tensor, task: str) -> Tensor:
    """The loss, sample by sample and term by term."""
    inputs, labels, numbers = drawn()
    outputs_of_targets = CLASSES if task == "classification" else 2
    model = network(outputs_of_targets + BESIDE)
    names = [name for name, _ in model.named_parameters()]
    pieces = dict(zip(names, p.split([q.numel() for q in model.parameters()]), strict=True))
    pieces = {name: pieces[name].view_as(q) for name, q in model.named_parameters()}
    outputs = torch.func.functional_call(model, pieces, (inputs,))
    total = torch.zeros((), dtype=torch.float64)
    for row in range(COUNT):
        y = outputs[row]
        if task == "classification":
            total = total - torch.log_softmax(y[:CLASSES], 0)[labels[row]]
        else:
            total = total + 0.25 * (y[:2] - inputs[row, :2].sin()).square().sum()
        for k in range(BESIDE):
            if not math.isnan(float(numbers[row, k])):
                total = total + WEIGHT / BESIDE * 0.5 * (y[outputs_of_targets + k] - numbers[row, k]) ** 2
    return total / COUNT


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_loss_and_derivatives_are_those_of_a_plain_computation(task: str, comm: parallel.Comm) -> None:
    problem = problem_on(comm, task)
    p = problem.initial()
    v = torch.linspace(-1, 1, len(p), dtype=torch.float64)
    loss, gradient = problem.loss_and_gradient(p)
    q = p.clone().requires_grad_()
    value = expected(q, task)
    (own,) = torch.autograd.grad(value, q)
    assert loss == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, own, rtol=0, atol=1e-12)
    hessian = torch.autograd.functional.hessian(lambda p: expected(p, task), p)
    torch.testing.assert_close(problem.hessian_product(p, v), hessian @ v, rtol=0, atol=1e-10)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_gauss_newton_products_are_those_of_dense_matrices(task: str) -> None:
    problem = problem_on(parallel.SELF, task)
    p = problem.initial()
    inputs, _, numbers = drawn()
    targets = problem.dataset.targets
    model = problem.model
    shapes = {name: q for name, q in model.named_parameters()}

    def outputs(p: Tensor) -> Tensor:
        pieces = p.split([q.numel() for q in shapes.values()])
        named = {name: piece.view_as(q) for (name, q), piece in zip(shapes.items(), pieces, strict=True)}
        return torch.func.functional_call(model, named, (inputs,))

    jacobian = torch.autograd.functional.jacobian(outputs, p)  # (N, c, n)
    loss = problem.loss_function
    dense = torch.zeros(len(p), len(p), dtype=torch.float64)
    for row in range(COUNT):
        y = outputs(p)[row : row + 1].detach()
        curvature = torch.autograd.functional.hessian(lambda y, r=row: loss.total(y, targets[r : r + 1]), y)
        width = y.shape[1]
        dense += jacobian[row].T @ curvature.reshape(width, width) @ jacobian[row] / COUNT
    v = torch.linspace(-1, 1, len(p), dtype=torch.float64)
    torch.testing.assert_close(problem.gauss_newton_product(p, v), dense @ v, rtol=0, atol=1e-10)
    y = outputs(p).detach()
    columns = [
        torch.stack([loss.curvature_root(y, targets, e.expand_as(y)) for e in torch.eye(y.shape[1]).double()], dim=2)
    ]
    root = columns[0]
    for k, e in enumerate(torch.eye(y.shape[1]).double()):
        product = loss.curvature(y, targets, e.expand_as(y))
        torch.testing.assert_close((root @ root.transpose(1, 2))[:, :, k], product, rtol=0, atol=1e-12)


@pytest.mark.parallel([1, 2, 3])
def test_numbers_are_standardised_over_all_ranks(comm: parallel.Comm) -> None:
    numbers = drawn()[2] * 3 + 7
    numbers = torch.cat([numbers, torch.full((COUNT, 1), 2.5, dtype=torch.float64)], dim=1)
    own = parallel.own_slice(COUNT, comm.rank, comm.size)
    found = standardisation(numbers[own], comm)(numbers[own])
    whole = numbers.numpy()
    mean, deviation = np.nanmean(whole, axis=0), np.nanstd(whole, axis=0)
    deviation[2] = 1.0  # the constant one
    np.testing.assert_allclose(found.numpy(), ((whole - mean) / deviation)[own], atol=1e-12)
    assert bool((found[:, 2] == 0).all())


def test_a_model_without_room_for_them_is_refused() -> None:
    inputs, labels, numbers = drawn()
    source = AuxiliarySource(TensorDataset(inputs, labels, parallel.SELF, classes=CLASSES), numbers)
    loss = WithAuxiliary(LOSSES["cross_entropy"], BESIDE, WEIGHT)
    with pytest.raises(ShapeError, match="2 auxiliary numbers need outputs of shape"):
        TrainingProblem(network(2), source, loss, parallel.SELF).loss(network(2)[0].weight.new_zeros(37))


def test_values_of_a_row() -> None:
    labels = Labelling("mu", (2.5,), ("weak", "strong"), auxiliary=("homo", "gap"))
    assert labels.auxiliary_values({"homo": "-6.5", "gap": 7}.get) == (-6.5, 7.0)
    for missing in (None, "", " NaN", "none", math.nan):
        found = labels.auxiliary_values({"homo": missing, "gap": 7}.get)
        assert math.isnan(found[0]) and found[1] == 7.0
    with pytest.raises(ValueError, match="gap is 'wide', not a number"):
        labels.auxiliary_values({"gap": "wide"}.get)
    with pytest.raises(ValueError, match="gap is inf, not finite"):
        labels.auxiliary_values({"gap": "inf"}.get)
    with pytest.raises(OptionError, match="--auxiliary homo,homo: name every property once"):
        Labelling("mu", (2.5,), ("weak", "strong"), auxiliary=("homo", "homo"))


def table(path: Path, rows: int = 24) -> Path:
    """Small alcohols whose property and numbers beside it follow from the chain's length."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "smiles", "mu", "homo", "gap"])
        for row in range(rows):
            length = 1 + row % 6
            gap = "" if row == 3 else f"{7 + 0.1 * length}"
            writer.writerow([f"m{row}", "C" * length + "O" * (1 + row % 2), 1.0 + 0.5 * (row % 6), -6.0 - row, gap])
    return path


PREPARE = ["-m", "hpcdeq.prepare", "molecules"]


def test_from_a_table_to_predictions(run: Run, tmp_path: Path) -> None:
    source = table(tmp_path / "m.csv")
    done = run(*PREPARE, str(source), "--out", "m.h5", "--auxiliary", "homo,gap", "--processes", "1", "--quiet")
    assert done.returncode == 0, done.stderr
    data = Dataset(tmp_path / "m.h5", "train", parallel.SELF)
    assert data.schema.auxiliary == ("homo", "gap") and data.auxiliary.shape == (len(data), 2)
    for name, (homo, gap) in zip(data.ids, data.auxiliary.tolist(), strict=True):
        row = int(name[1:])
        assert homo == -6.0 - row
        assert math.isnan(gap) if row == 3 else gap == pytest.approx(7 + 0.1 * (1 + row % 6))
    train = ["train", "--data", "m.h5", "--model", "graph_deq", "--model-settings", "width=8,head=8"]
    words = [*train, "--optimizer", "adam", "--max-iterations", "2", "--quiet"]
    done = run("-m", "hpcdeq." + words[0], *words[1:], "--out", "r", ranks=2)
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "r" / "config.toml").read_text()
    assert "auxiliary_weight = 0.3" in config and '"auxiliary" = 2' in config
    done = run("-m", "hpcdeq.predict", "r", str(source), "--out", "p.csv", "--quiet")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "p.csv").open() as file:
        found = list(csv.DictReader(file))
    probabilities = [name for name in found[0] if name.startswith("p(") or "polar" in name]
    assert len(found) == 24 and len(probabilities) == 2, found[0]
    done = run("-m", "hpcdeq.evaluate", "r", "--no-baselines", timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    evaluation = json.loads((tmp_path / "r" / "evaluation" / "evaluation.json").read_text())
    assert evaluation["scores"]["accuracy"] == pytest.approx(summary["metric"]["test"])
    done = run("-m", "hpcdeq.train", *words[1:], "--auxiliary-weight", "0", "--out", "z")
    assert done.returncode == 0 and '"auxiliary" = 0' in (tmp_path / "z" / "config.toml").read_text(), done.stderr


def test_a_name_that_no_row_has(run: Run, tmp_path: Path) -> None:
    source = table(tmp_path / "m.csv")
    done = run(*PREPARE, str(source), "--out", "m.h5", "--auxiliary", "homo,lumo", "--processes", "1")
    assert done.returncode == 2 and "no row has lumo; give --auxiliary names of numbers" in done.stderr, done.stderr
    assert not (tmp_path / "m.h5").exists()


def test_a_weight_without_numbers_is_refused(tmp_path: Path) -> None:
    inputs, labels, _ = drawn()
    data = TensorDataset(inputs, labels, parallel.SELF, classes=CLASSES)
    data.usual_chunk_size = 512  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="the data have no auxiliary numbers: prepare them with --auxiliary NAME"):
        resolved(TrainConfig(data="d.h5", model="mlp_deq", auxiliary_weight=0.5), data)  # type: ignore[arg-type]
    assert resolved(TrainConfig(data="d.h5", model="mlp_deq"), data).auxiliary_weight == 0.0  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="auxiliary_weight is -1.0"):
        TrainConfig(auxiliary_weight=-1.0)


def test_an_infinite_number_is_refused(tmp_path: Path) -> None:
    from hpcdeq.data.rows import SampleRows
    from hpcdeq.data.schema import Schema
    from hpcdeq.data.writer import DatasetWriter

    schema = Schema("classification", "array", classes=("a", "b"), sample_shape=(2,), auxiliary=("gap",))
    rows = SampleRows(["x", "y"], np.array([0, 1]), np.zeros((2, 2)), np.array([[1.0], [np.inf]]))
    with pytest.raises(DataError, match="/sample/auxiliary row 1: inf is infinite"):
        with DatasetWriter(tmp_path / "d.h5", schema) as writer:
            writer.append(rows, np.zeros(2, np.uint8))
    with pytest.raises(DataError, match=r"auxiliary numbers of shape \(2, 0\)"):
        with DatasetWriter(tmp_path / "d.h5", schema) as writer:
            writer.append(SampleRows(["x", "y"], np.array([0, 1]), np.zeros((2, 2))), np.zeros(2, np.uint8))
