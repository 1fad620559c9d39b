"""Evaluation of classifiers: scores against hand and scikit-learn, descriptors, baselines, and the command."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run

from hpcdeq import parallel
from hpcdeq.builders.neighbours import neighbours_of
from hpcdeq.data import Dataset
from hpcdeq.data.descriptors import PROPERTIES, Descriptors, descriptors_of, element_properties, segment_statistics
from hpcdeq.data.graphs import GraphArrays, join_graphs
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import DataError, HpcdeqError, OptionError, ShapeError, UsageError
from hpcdeq.evaluate import main
from hpcdeq.petsc.options import only_options
from hpcdeq.record import RunDirectory
from hpcdeq.record.restore import load
from hpcdeq.report.baselines import MISSING, Baseline, Labelled, gradient_boosting, majority_class
from hpcdeq.report.classification import calibration_bins, class_scores, roc_auc, wilson_interval
from hpcdeq.report.evaluation import Evaluated, write_evaluation

RANDOM = np.random.default_rng(7)

# ----------------------------------------------------------------------------------------------------------- scores

# Four classes, of which the last neither occurs nor is predicted. Predicted: 0 1 1 1 0 2.
LABELS = np.array([0, 0, 1, 1, 2, 2])
PROBABILITIES = np.array(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.2, 0.5, 0.2, 0.1],
        [0.1, 0.8, 0.1, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.4, 0.3, 0.2, 0.1],
        [0.1, 0.1, 0.6, 0.2],
    ]
)


def test_scores_by_hand() -> None:
    found = class_scores(LABELS, PROBABILITIES)
    assert found.count == 6 and found.accuracy == pytest.approx(4 / 6)
    assert found.confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found.recall, [1 / 2, 1, 1 / 2, np.nan])
    np.testing.assert_allclose(found.precision, [1 / 2, 2 / 3, 1, np.nan])
    np.testing.assert_allclose(found.f1, [1 / 2, 4 / 5, 2 / 3, np.nan])
    assert found.balanced_accuracy == pytest.approx(2 / 3)
    assert found.macro_f1 == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    told = np.array([0.7, 0.2, 0.8, 1.0, 0.2, 0.6])
    assert found.log_loss == pytest.approx(-np.log(told).mean())
    # Row by row: (1 - p)² and the squares of the other three.
    squares = [0.09 + 0.03, 0.64 + 0.25 + 0.04 + 0.01, 0.04 + 0.02, 0.0, 0.64 + 0.16 + 0.09 + 0.01, 0.16 + 0.02 + 0.04]
    assert found.brier == pytest.approx(sum(squares) / 6)
    # Confidences 0.7 ✓, 0.5 ✗, 0.8 ✓, 1.0 ✓, 0.4 ✗, 0.6 ✓, each alone in its bin.
    assert found.calibration_error == pytest.approx((0.3 + 0.5 + 0.2 + 0.0 + 0.4 + 0.4) / 6)
    assert math.isnan(found.roc_auc)


def test_a_class_that_is_predicted_but_does_not_occur_counts_in_f1_alone() -> None:
    found = class_scores(np.array([0, 0, 1]), np.array([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]]))
    assert found.balanced_accuracy == pytest.approx((1 / 2 + 1) / 2)
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_probability_of_zero_costs_a_finite_amount() -> None:
    found = class_scores(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert found.log_loss == pytest.approx(-math.log(np.finfo(float).eps) / 2)


def random_case(classes: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    probabilities = RANDOM.dirichlet(np.full(classes, 0.5), count)
    return np.array([RANDOM.choice(classes, p=row) for row in probabilities]), probabilities


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels, p = random_case(classes)
    labels[labels == classes - 1] = 0 if classes > 2 else labels[labels == classes - 1]  # the last class does not occur
    found, predicted = class_scores(labels, p), p.argmax(axis=1)
    every = list(range(classes))
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, predicted))
    recalls = metrics.recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
    assert found.balanced_accuracy == pytest.approx(recalls)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    np.testing.assert_array_equal(found.confusion, metrics.confusion_matrix(labels, predicted, labels=every))
    told = metrics.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=np.nan)
    np.testing.assert_allclose(found.precision, told[0])
    np.testing.assert_allclose(found.recall, told[1])
    np.testing.assert_allclose(found.f1, told[2])
    assert found.log_loss == pytest.approx(metrics.log_loss(labels, p, labels=every))
    assert found.brier == pytest.approx(metrics.brier_score_loss(labels, p, labels=every, scale_by_half=False))
    if classes == 2:
        assert found.roc_auc == pytest.approx(metrics.roc_auc_score(labels, p[:, 1]))


def test_the_area_under_the_curve_counts_pairs_and_ties_half() -> None:
    labels, scores = RANDOM.integers(0, 2, 60), RANDOM.integers(0, 8, 60) / 8
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert roc_auc(labels, scores) == pytest.approx(np.mean(pairs))
    assert roc_auc(np.array([0, 1]), np.array([0.3, 0.3])) == 0.5
    assert roc_auc(np.array([0, 0, 1]), np.array([0.1, 0.2, 0.9])) == 1.0
    assert math.isnan(roc_auc(np.array([1, 1]), np.array([0.1, 0.2])))


@pytest.mark.parametrize(("successes", "count"), [(1, 3), (8, 10), (43, 47), (500, 1000)])
def test_the_interval_is_that_of_the_score_test(successes: int, count: int) -> None:
    fraction = successes / count
    for end in wilson_interval(successes, count):
        assert abs(fraction - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-5)
    low, high = wilson_interval(successes, count)
    assert low < fraction < high


def test_the_interval_of_none_and_of_all_ends_at_zero_and_one() -> None:
    assert wilson_interval(0, 9)[0] == 0.0 and wilson_interval(9, 9)[1] == 1.0
    assert wilson_interval(0, 9)[1] == pytest.approx(1 - wilson_interval(9, 9)[0])
    np.testing.assert_allclose(wilson_interval(8, 10), (0.4902, 0.9433), atol=1e-4)


def test_a_bin_owns_its_upper_end() -> None:
    found = calibration_bins(np.array([0.25, 0.5, 0.500001, 1.0, 1.0]), np.array([True, False, True, True, False]), 4)
    assert [item.count for item in found] == [1, 1, 1, 2]
    assert [item.accuracy for item in found] == [1.0, 0.0, 1.0, 0.5] and found[3].confidence == 1.0
    assert (found[1].low, found[1].high) == (0.25, 0.5)
    assert math.isnan(calibration_bins(np.array([0.9]), np.array([True]), 2)[0].accuracy)


def test_calibrated_probabilities_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    labels, p = random_case(3, 4000)
    assert class_scores(labels, p).calibration_error < 0.03
    sharp = p**3 / (p**3).sum(axis=1, keepdims=True)
    found = class_scores(labels, sharp)
    gap = sharp.max(axis=1).mean() - (sharp.argmax(axis=1) == labels).mean()
    assert found.calibration_error == pytest.approx(gap, abs=0.02) and gap > 0.1


@pytest.mark.parametrize(
    ("labels", "p", "kind", "told"),
    [
        ([0, 1], [[1.0, 0.0]], ShapeError, "labels have shape (2,), probabilities (1, 2)"),
        ([], np.zeros((0, 2)), DataError, "no samples"),
        ([2], [[1.0, 0.0]], DataError, "from 0 to 1"),
        ([0.0], [[1.0, 0.0]], DataError, "whole numbers"),
        ([0, 0], [[1.0, 0.0], [0.5, 0.4]], DataError, "row 1: [0.5, 0.4] are no probabilities"),
        ([0], [[np.nan, 1.0]], DataError, "row 0"),
        ([0], [[1.5, -0.5]], DataError, "row 0"),
    ],
)
def test_what_is_no_prediction_is_refused(labels: list, p: list, kind: type[HpcdeqError], told: str) -> None:
    with pytest.raises(kind, match=re.escape(told)):
        class_scores(np.array(labels), np.array(p))


# ------------------------------------------------------------------------------------------------------- descriptors


def value(found: Descriptors, name: str, row: int = 0) -> float:
    return float(found.values[row, found.names.index(name)])


def graph(numbers: list[int], edges: list[tuple[int, int, list[float], int]], charges: list[int]) -> GraphArrays:
    """Return a graph of edges (source, target, vector, bond)."""
    return GraphArrays(
        np.array([0, len(numbers)]),
        np.array(numbers, np.uint8),
        np.array([0, len(edges)]),
        np.array([e[0] for e in edges], np.int32),
        np.array([e[1] for e in edges], np.int32),
        np.array([e[2] for e in edges], float).reshape(-1, 3),
        np.array([e[3] for e in edges], np.uint8),
        np.array(charges, np.int8),
    )


def both_ways(pairs: list[tuple[int, int, list[float], int]]) -> list[tuple[int, int, list[float], int]]:
    return [e for i, j, v, bond in pairs for e in ((j, i, v, bond), (i, j, [-x for x in v], bond))]


# Carbon dioxide, its far atoms an edge too; then a lone helium atom; then salt of two atoms without coordinates.
DIOXIDE = graph(
    [6, 8, 8], both_ways([(0, 1, [1.2, 0, 0], 2), (0, 2, [-1.5, 0, 0], 2), (1, 2, [-2.7, 0, 0], 0)]), [0] * 3
)
HELIUM = graph([2], [], [0])
SALT = graph([11, 17], both_ways([(0, 1, [0, 0, 0], 1)]), [1, -1])


def test_descriptors_of_a_molecule_by_hand() -> None:
    found = descriptors_of(DIOXIDE)
    assert value(found, "atoms") == 3 and value(found, "elements") == 2
    assert value(found, "fraction of element 8") == pytest.approx(2 / 3)
    assert value(found, "fraction of element 6") == pytest.approx(1 / 3)
    masses = np.array([12.0107, 15.9994, 15.9994])
    for kind, expected in zip(
        ("mean", "least", "largest", "deviation"), (masses.mean(), 12.0107, 15.9994, masses.std()), strict=True
    ):
        assert value(found, f"atomic mass {kind}") == pytest.approx(expected)
    assert value(found, "nearest distance mean") == pytest.approx((1.2 + 1.2 + 1.5) / 3)
    assert value(found, "distance largest") == pytest.approx(2.7) and value(found, "distance mean") == pytest.approx(
        1.8
    )
    # The carbon's shell reaches to 1.44: its far oxygen is not in it, although it is in that one's, which reaches to 1.8.
    assert value(found, "first shell mean") == 1 and value(found, "first shell largest") == 1
    assert value(found, "electronegativity difference mean") == pytest.approx(3.44 - 2.55)
    expected = np.mean([3 / (4 / 3 * math.pi * r**3) for r in (1.5, 2.7, 2.7)])
    assert value(found, "density mean") == pytest.approx(expected)
    assert value(found, "double bonds") == 2 and value(found, "double bonds an atom") == pytest.approx(2 / 3)
    assert value(found, "single bonds") == 0 and value(found, "charged atoms") == 0


def test_what_a_sample_does_not_have_is_no_number() -> None:
    found = descriptors_of(join_graphs([HELIUM, SALT]))
    assert math.isnan(value(found, "nearest distance mean")) and math.isnan(value(found, "electronegativity mean"))
    assert value(found, "ionization energy mean") == pytest.approx(24.587, abs=1e-3)
    assert value(found, "single bonds an atom") == 0
    assert math.isnan(value(found, "nearest distance mean", 1)) and math.isnan(value(found, "first shell mean", 1))
    assert value(found, "single bonds", 1) == 1 and value(found, "single bonds an atom", 1) == 0.5
    assert value(found, "charge", 1) == 0 and value(found, "charged atoms", 1) == 2


def test_descriptors_depend_on_no_other_sample() -> None:
    graphs = [DIOXIDE, HELIUM, SALT, DIOXIDE]
    together = descriptors_of(join_graphs(graphs))
    for row, single in enumerate(graphs):
        np.testing.assert_allclose(together.values[row], descriptors_of(single).values[0])
    # A slice of ragged arrays, and no samples at all.
    np.testing.assert_allclose(descriptors_of(join_graphs(graphs).take(slice(2, 4))).values, together.values[2:])
    assert descriptors_of(join_graphs(graphs).take(slice(0, 0))).values.shape == (0, len(together.names))


def test_a_simple_cubic_crystal_has_six_neighbours() -> None:
    found = descriptors_of(neighbours_of(np.eye(3) * 3.35, np.array([84]), np.zeros((1, 3)), 12))
    assert value(found, "first shell mean") == 6 and value(found, "nearest distance mean") == pytest.approx(3.35)
    assert value(found, "distance largest") == pytest.approx(3.35 * math.sqrt(2))
    assert value(found, "density mean") == pytest.approx(13 / (4 / 3 * math.pi * (3.35 * math.sqrt(2)) ** 3))


def test_element_properties_are_those_of_the_table() -> None:
    table = element_properties()
    names = list(PROPERTIES)
    assert table.shape == (119, len(names))
    iron = dict(zip(names, table[26], strict=True))
    assert (iron["period"], iron["group"], iron["electronegativity"]) == (4, 8, 1.83)
    assert (
        iron["melting point"] == 1811
        and np.isnan(table[0]).all()
        and np.isnan(table[2, names.index("electronegativity")])
    )


def test_segments_against_a_loop() -> None:
    owner, values = RANDOM.integers(0, 6, 50), RANDOM.normal(size=50)
    owner[owner == 3] = 4
    values[:5] = np.nan
    found = segment_statistics(values, owner, 6)
    for number in range(6):
        own = values[(owner == number) & ~np.isnan(values)]
        expected = [own.mean(), own.min(), own.max(), own.std()] if own.size else [np.nan] * 4
        np.testing.assert_allclose(found[number], expected)
    assert np.isnan(found[3]).all()


def test_descriptors_of_images_and_lines() -> None:
    x = RANDOM.normal(size=(3, 2, 9, 6))
    found = descriptors_of(x)
    assert len(found.names) == found.values.shape[1] == 2 * (4 + 16)
    assert value(found, "channel 1 mean", 2) == pytest.approx(x[2, 1].mean())
    assert value(found, "channel 0 deviation", 1) == pytest.approx(x[1, 0].std())
    assert value(found, "channel 0 least", 1) == x[1, 0].min() and value(found, "channel 1 largest") == x[0, 1].max()
    # Nine rows are cut at 0, 2, 4, 6; six columns at 0, 1, 3, 4.
    assert value(found, "channel 1 patch 3 2", 2) == pytest.approx(x[2, 1, 6:9, 3:4].mean())
    assert value(found, "channel 0 patch 1 1") == pytest.approx(x[0, 0, 2:4, 1:3].mean())
    line = descriptors_of(x.reshape(3, -1)[:, :32])
    assert line.values.shape == (3, 4 + 16)
    assert value(line, "channel 0 patch 0 15", 1) == pytest.approx(x.reshape(3, -1)[1, 30:32].mean())
    assert descriptors_of(np.zeros((2, 3))).values.shape == (2, 4 + 3)  # shorter than its pieces
    assert descriptors_of(np.zeros((2, 9, 6))).values.shape == (2, 4 + 16)


# --------------------------------------------------------------------------------------------------------- baselines


def test_the_majority_class_is_that_of_the_training_samples() -> None:
    found = majority_class(np.array([2, 0, 2, 2]), 4, 3)
    np.testing.assert_array_equal(found.probabilities, [[0.25, 0, 0.75, 0]] * 3)
    assert majority_class(np.array([], int), 2, 3).probabilities is None


def checkerboard(count: int) -> Labelled:
    """Return points of the plane in classes 0 and 2 that no line divides, with a column that says nothing."""
    x = RANDOM.uniform(-1, 1, (count, 2))
    return Labelled(
        np.column_stack([x, np.full(count, np.nan)]), np.where((x > 0).all(axis=1) | (x < 0).all(axis=1), 2, 0)
    )


def test_boosting_learns_what_descriptors_tell() -> None:
    pytest.importorskip("sklearn")
    train, validation, test = checkerboard(400), checkerboard(100), checkerboard(200)
    found = gradient_boosting(train, validation, test.values, 4)
    assert found.probabilities is not None and found.probabilities.shape == (200, 4)
    assert (found.probabilities[:, [1, 3]] == 0).all()  # never seen in training
    assert class_scores(test.labels, found.probabilities).accuracy > 0.9
    assert re.fullmatch(
        r"2 descriptors, \d+ rounds on 400 training samples, stopped by 100 validation samples", found.told
    )
    rounds = int(found.told.split()[2])
    assert 20 < rounds < 500
    # A class that only validation samples have is of no use, and no error.
    strange = replace(validation, labels=np.where(validation.labels == 2, 2, 3))
    assert "stopped by" in gradient_boosting(train, strange, test.values, 4).told
    none = Labelled(np.zeros((0, 3)), np.zeros(0, int))
    assert gradient_boosting(train, none, test.values, 4).told == "2 descriptors, 100 rounds on 400 training samples"


def test_boosting_says_why_it_was_not_fitted() -> None:
    pytest.importorskip("sklearn")
    train = checkerboard(40)
    alone = Labelled(train.values, np.zeros(40, int))
    same = Labelled(np.full((40, 2), np.nan), train.labels)
    assert "of 1 classes: there is nothing to fit" in gradient_boosting(alone, alone, train.values, 2).told
    assert "are the same: there is nothing to fit" in gradient_boosting(same, same, same.values, 3).told


def test_boosting_without_scikit_learn_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    train = checkerboard(40)
    found = gradient_boosting(train, train, train.values, 3)
    assert (found.told, found.probabilities) == (MISSING, None)
    assert MISSING == "scikit-learn is not installed: pip install hpcdeq[baselines]"


# ------------------------------------------------------------------------------------------------------------ report


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def evaluated(**changes: object) -> Evaluated:
    p = PROBABILITIES.copy()
    p[5] = np.nan
    made = Evaluated(
        "mlp_deq",
        ("metal", "semiconductor", "wide | gap", "none"),
        [f"s{n}" for n in range(6)],
        LABELS,
        p,
        np.array([True, True, True, True, False, True]),
        [majority_class(np.array([1, 1, 0]), 4, 6), Baseline("gradient boosting", MISSING)],
        {"data": "d.h5", "split": "test"},
    )
    return replace(made, **changes)


def test_samples_without_an_answer_are_told_and_left_out(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "e") as directory:
        directory.create(parallel.SELF)
        printed = write_evaluation(evaluated(), directory)
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert (found["samples"], found["unconverged"], found["without_answer"]) == (6, 1, 2)
    assert found["scores"]["count"] == 4 and found["scores"]["accuracy"] == pytest.approx(3 / 4)
    assert found["accuracy_without_answer_wrong"] == pytest.approx(3 / 6)
    assert found["scores"]["roc_auc"] is None and found["scores"]["recall"] == [0.5, 1.0, None, None]
    majority = found["baselines"]["majority class"]["scores"]
    assert majority["count"] == 4 and majority["accuracy"] == pytest.approx(2 / 4)  # of the same samples
    assert found["baselines"]["gradient boosting"] == {"told": MISSING, "scores": None}
    rows = table_of(tmp_path / "e" / "predictions.csv")
    assert rows[0] == {
        "id": "s0", "label": "metal", "predicted": "metal", "p_metal": "0.7", "p_semiconductor": "0.1", "p_wide | gap": "0.1",
        "p_none": "0.1", "converged": "true",
    }  # fmt: skip
    assert rows[4]["converged"] == "false" and rows[4]["predicted"] == "metal"
    assert rows[5]["predicted"] == rows[5]["p_metal"] == ""
    told = (tmp_path / "e" / "evaluation.md").read_text()
    assert (
        "2 of 6 samples have no fixed point" in told and "counted as wrong, the accuracy of mlp_deq is 0.5000" in told
    )
    assert "| mlp_deq | 0.75 | 0.301 – 0.954 |" in told and f"gradient boosting: {MISSING}." in told
    assert "| metal | 1 | 1 | 0 | 0 |" in told and "wide \\| gap" in told
    assert printed.splitlines()[1].split()[:2] == ["mlp_deq", "0.750"]
    assert printed.splitlines()[3].split("  ")[0] == "gradient boosting" and MISSING in printed.splitlines()[3]
    for name in ("confusion.png", "calibration.png"):
        assert (tmp_path / "e" / "figures" / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "e" / "figures" / name).stat().st_size > 10_000
    assert not list((tmp_path / "e").rglob("*.partial"))


def test_no_answer_at_all_is_a_failure(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path / "e") as directory,
        pytest.raises(HpcdeqError, match="none of the 6 samples has an answer") as caught,
    ):
        directory.create(parallel.SELF)
        write_evaluation(evaluated(converged=np.zeros(6, bool)), directory)
    assert caught.value.exit_code == 1


# ----------------------------------------------------------------------------------------------------------- command


def points(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points around three centres of the plane, and which."""
    labels = np.arange(count) % 3
    centres = np.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    return centres[labels] + RANDOM.normal(size=(count, 2)), labels


def molecules(count: int) -> tuple[GraphArrays, np.ndarray]:
    """Return molecules of two atoms: long ones, and short ones."""
    labels = np.arange(count) % 2
    lengths = np.where(labels, 1.6, 1.1) + RANDOM.normal(size=count) * 0.1
    return join_graphs([graph([6, 8], both_ways([(0, 1, [r, 0, 0], 2)]), [0, 0]) for r in lengths]), labels


def write_dataset(path: Path, kind: str, classes: tuple[str, ...], counts: tuple[int, int, int]) -> None:
    inputs, labels = points(sum(counts)) if kind == "array" else molecules(sum(counts))
    shape = inputs.shape[1:] if isinstance(inputs, np.ndarray) else ()
    ids = [f"s{n:03d}" for n in range(sum(counts))]
    with DatasetWriter(path, Schema("classification", kind, classes, sample_shape=shape)) as writer:
        writer.append(SampleRows(ids, labels, inputs), np.repeat([0, 1, 2], counts))


CLASSES = {"array": ("red", "green", "blue"), "graph": ("short", "long")}


def train(data: Path, out: Path, *more: str) -> None:
    """Train a little, and leave no options in PETSc's database."""
    from hpcdeq import train as command

    with only_options({}, ("tao_", "deq_")):
        assert command.main(["--data", str(data), "--max-iterations", "4", "--out", str(out), "--quiet", *more]) == 0


@pytest.fixture(scope="module", params=["array", "graph"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a run on it, the same on all ranks."""
    own = tmp_path_factory.mktemp(request.param) if parallel.WORLD.rank == 0 else None
    folder = parallel.from_root(parallel.WORLD, own)
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            write_dataset(folder / "d.h5", request.param, CLASSES[request.param], (60, 20, 31))
    train(folder / "d.h5", folder / "r")
    return folder


@pytest.mark.parallel([1, 2, 3])
def test_the_command_from_beginning_to_end(
    trained: Path, shared_tmp_path: Path, comm: parallel.Comm, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shared_tmp_path / "e"
    assert main([str(trained / "r"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with parallel.agreement(comm):
        if comm.rank == 0:
            check_report(trained, out, printed)
    assert (comm.rank == 0) == bool(printed)


def check_report(folder: Path, out: Path, printed: str) -> None:
    """Compare a report with the run's own summary, and with the model evaluated here, all samples at once."""
    found = json.loads((out / "evaluation.json").read_text())
    summary = json.loads((folder / "r" / "summary.json").read_text())
    scores = found["scores"]
    assert (found["samples"], found["split"], found["unconverged"], found["model"]) == (31, "test", 0, summary["model"])
    assert scores["accuracy"] == pytest.approx(summary["metric"]["test"]) and scores["accuracy"] > 0.7
    assert scores["log_loss"] == pytest.approx(summary["loss"]["test"], rel=1e-5)
    data = Dataset(folder / "d.h5", "test", parallel.SELF)
    inputs, labels = data.batch(slice(None))
    with torch.no_grad():
        p = torch.softmax(load(folder / "r")(inputs), dim=1).numpy()
    rows = table_of(out / "predictions.csv")
    names = found["classes"]
    assert [row["id"] for row in rows] == data.ids and [row["label"] for row in rows] == [names[k] for k in labels]
    np.testing.assert_allclose([[float(row[f"p_{name}"]) for name in names] for row in rows], p, atol=1e-6)
    assert [row["predicted"] for row in rows] == [names[k] for k in p.argmax(axis=1)]
    expected = class_scores(labels.numpy(), p)
    assert scores["brier"] == pytest.approx(expected.brier, rel=1e-5)
    assert scores["confusion"] == expected.confusion.tolist()
    assert np.isfinite(expected.roc_auc) == (len(names) == 2)
    assert scores["roc_auc"] == (pytest.approx(expected.roc_auc) if len(names) == 2 else None)
    frequency = np.bincount(Dataset(folder / "d.h5", "train", parallel.SELF).targets.numpy()) / 60
    majority = found["baselines"]["majority class"]["scores"]
    assert majority["accuracy"] == pytest.approx((labels == int(frequency.argmax())).double().mean().item())
    boosting = found["baselines"]["gradient boosting"]
    assert boosting["told"] == MISSING or boosting["scores"]["accuracy"] > 0.7
    assert printed.startswith(f"31 test samples of {folder / 'd.h5'}\n") and "gradient boosting" in printed
    assert {p.name for p in out.rglob("*.*")} == {
        "evaluation.json", "evaluation.md", "predictions.csv", "confusion.png", "calibration.png",
    }  # fmt: skip


@pytest.mark.parallel([1, 2])
def test_another_split_and_no_baselines(trained: Path, comm: parallel.Comm) -> None:
    arguments = [str(trained / "r"), "--split", "validation", "--no-baselines", "--data", str(trained / "d.h5")]
    assert main(arguments) == 0 and main(arguments) == 0  # the second time over the first
    with parallel.agreement(comm):
        found = json.loads((trained / "r" / "evaluation" / "evaluation.json").read_text())
        assert (found["samples"], found["split"], found["baselines"]) == (20, "validation", {})
        summary = json.loads((trained / "r" / "summary.json").read_text())
        assert found["scores"]["accuracy"] == pytest.approx(summary["metric"]["validation"])


def test_unconverged_samples_are_counted(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.h5", "array", CLASSES["array"], (60, 20, 31))
    train(tmp_path / "d.h5", tmp_path / "r")
    with only_options({}, ("deq_",)):
        assert (
            main([str(tmp_path / "r"), "--out", str(tmp_path / "e"), "-deq_snes_rtol", "0.02", "-deq_snes_max_it", "3"])
            == 0
        )
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    rows = table_of(tmp_path / "e" / "predictions.csv")
    lost = sum(row["converged"] == "false" for row in rows)
    assert found["unconverged"] == lost and 0 < lost < 31
    assert found["scores"]["count"] == found["baselines"]["majority class"]["scores"]["count"] == 31 - lost
    right = sum(row["converged"] == "true" and row["label"] == row["predicted"] for row in rows)
    assert found["accuracy_without_answer_wrong"] == pytest.approx(right / 31)


@pytest.mark.timeout(600)
def test_the_number_of_ranks_changes_nothing(run: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.h5", "array", CLASSES["array"], (30, 9, 9))
    train(tmp_path / "d.h5", tmp_path / "r", "--model", "mlp")
    found = []
    for ranks in (1, 2):
        done = run("-m", "hpcdeq.evaluate", "r", "--out", f"e{ranks}", ranks=ranks, timeout=280)
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith(f"report     e{ranks}/evaluation.md")
        found.append((tmp_path / f"e{ranks}" / "evaluation.json").read_text())
    first, second = (flat(json.loads(text)) for text in found)
    assert first.keys() == second.keys()
    for name, number in first.items():
        same = pytest.approx(number, rel=1e-9) if isinstance(number, float) else number
        assert second[name] == same, name


def flat(numbers: object, name: str = "") -> dict[str, object]:
    """Return the leaves of nested objects by their paths."""
    if isinstance(numbers, (dict, list)):
        items = numbers.items() if isinstance(numbers, dict) else enumerate(numbers)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}/{key}").items()}
    return {name: numbers}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        ("none", DataError, "none: no such run directory"),
        ("r --data none.h5", DataError, "none.h5: no such file"),
        ("r --data other.h5", DataError, "other.h5 does not fit the model in r: classes is ('a', 'b', 'c') there"),
        ("r --data few.h5", DataError, "few.h5 has no test samples: choose another --split"),
        ("r --out r", UsageError, "r holds a run already"),
        ("r -deq_snes_rtoll 1", OptionError, "did you mean -deq_snes_rtol?"),
        ("r -tao_gatol 1", OptionError, "-tao_gatol is not for an evaluation"),
        (
            "g",
            OptionError,
            "g is a regression: hpcdeq.evaluate is for classifications; its errors are in g/summary.json",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    refused: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, kind: type[HpcdeqError], told: str
) -> None:
    monkeypatch.chdir(refused)
    with pytest.raises(kind, match=re.escape(told)) as caught:
        main(arguments.split())
    assert caught.value.agreed and caught.value.exit_code == 2
    assert not (refused / "r" / "evaluation").exists()


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classification, a regression, and datasets that do not fit."""
    from hpcdeq.builders.fields import prepare_burgers

    own = tmp_path_factory.mktemp("refused") if parallel.WORLD.rank == 0 else None
    folder = parallel.from_root(parallel.WORLD, own)
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            write_dataset(folder / "d.h5", "array", CLASSES["array"], (30, 9, 9))
            write_dataset(folder / "other.h5", "array", ("a", "b", "c"), (3, 3, 3))
            write_dataset(folder / "few.h5", "array", CLASSES["array"], (3, 3, 0))
    prepare_burgers(folder / "b.h5", 40)
    train(folder / "d.h5", folder / "r", "--model", "mlp", "--max-iterations", "1")
    train(folder / "b.h5", folder / "g", "--model", "mlp", "--max-iterations", "1")
    return folder


def test_a_run_whose_data_are_gone_says_where_to_name_them(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.h5", "array", CLASSES["array"], (30, 9, 9))
    train(tmp_path / "d.h5", tmp_path / "r", "--model", "mlp", "--max-iterations", "1")
    (tmp_path / "d.h5").rename(tmp_path / "moved.h5")
    with pytest.raises(DataError, match="are not there; say where they are with --data FILE.h5"):
        main([str(tmp_path / "r")])
    assert main([str(tmp_path / "r"), "--data", str(tmp_path / "moved.h5"), "--no-baselines"]) == 0
