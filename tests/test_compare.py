"""Comparisons: what is planned, what is run and run again, and that the report's numbers are those of the runs."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import Run as Process

from hpcdeq import parallel, train
from hpcdeq.campaign.plan import parts_of, plan_variants, read_set, run_of, split_base
from hpcdeq.campaign.training import ComparedTraining
from hpcdeq.compare import main
from hpcdeq.errors import DataError, OptionError, UsageError
from hpcdeq.optim import Iterate
from hpcdeq.petsc.options import database_options, insert_options, only_options
from hpcdeq.record import HISTORY_COLUMNS, EvaluationWriter, Spacing
from hpcdeq.report import Comparison, Method, Run, Trial, best_of, group_runs, read_run, write_comparison
from hpcdeq.report.comparison import (
    BEST_VALIDATION,
    ITERATIONS,
    SECONDS,
    TEST,
    TRAIN,
    TRAIN_LOSS,
    VALIDATION,
    WORK,
    first,
    step,
)
from hpcdeq.report.comparison_figures import band
from hpcdeq.report.comparison_tables import end_rows, equal_rows, outcome_rows, reach_rows, run_rows
from hpcdeq.report.document import Document, Folded, Heading, Paragraph, Table, document_markdown
from hpcdeq.report.grouping import uneven
from hpcdeq.report.html import document_html
from hpcdeq.report.tables import Spread


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# ------------------------------------------------------------------------------------------- runs with known answers


def made(
    optimizer: str = "trgn",
    seed: int = 0,
    *,
    seconds: list[float],
    validation: list[float] | None = None,
    train: list[float] | None = None,
    test: dict[int, float] | None = None,
    gradients: list[float] | None = None,
    metric: str = "accuracy",
    status: str = "budget",
    settings: str = "",
    path: Path = Path("run"),
    **summary: object,
) -> Run:
    """Return a run with this history; ``test`` by row."""
    count = len(seconds)
    history = {name: np.full(count, np.nan) for name in HISTORY_COLUMNS}
    history["iteration"] = np.arange(float(count))
    history["wall_seconds"] = np.array(seconds, float)
    for name in ("losses", "gauss_newton_products", "hessian_products"):
        history[name] = np.zeros(count)
    history["gradients"] = np.array(gradients if gradients is not None else range(count), float)
    if validation is not None:
        history["validation_metric"] = np.array(validation, float)
    history["train_loss"] = np.array(train if train is not None else [1.0] * count, float)
    evaluations = {}
    if test is not None:
        evaluations = {
            "row": np.array(list(test), float),
            "test_metric": np.array(list(test.values())),
            "train_loss": 10.0 * history["train_loss"][list(test)],
            "train_metric": 0.5 * history["train_loss"][list(test)],
        }
    told = {
        "model": "mlp_deq",
        "optimizer": optimizer,
        "parameters": 5,
        "status": status,
        "reason": "DIVERGED_MAXITS",
        "message": "the iterations are used up",
        "iterations": count - 1,
        "wall_seconds": seconds[-1] if seconds else None,
        "seed": seed,
        "loss": {"train": 0.1, "validation": 0.2, "test": 0.3},
        "metric": {"name": metric, "train": 0.9, "validation": 0.8, "test": 0.7},
        "counts": {"gradients": 3},
        "ranks": 1,
        **summary,
    }
    return Run(path, f'optimizer = "{optimizer}"\nseed = {seed}\n{settings}', told, history, evaluations)


ADAM = made(
    "adam",
    seconds=[1, 2, 3, 4],
    validation=[0.5, 0.6, 0.7, 0.65],
    test={0: 0.4, 1: 0.55, 2: 0.6, 3: 0.9},
    train=[4, 3, 2, 1],
    gradients=[100, 200, 300, 400],
)
TRGN = made(
    "trgn",
    seconds=[0.5, 1.5, 2.5],
    validation=[0.2, 0.7, 0.8],
    test={0: 0.3, 1: 0.6, 2: 0.5},
    train=[8, 1.5, 0.5],
    gradients=[40, 640, 1240],
)
BOTH = Comparison([Method("trgn", [TRGN]), Method("adam", [ADAM])], "adam")


def test_the_test_metric_is_that_of_the_best_validation_so_far() -> None:
    np.testing.assert_array_equal(BOTH.values(ADAM, BEST_VALIDATION), [0.5, 0.6, 0.7, 0.7])
    np.testing.assert_array_equal(BOTH.values(ADAM, TEST), [0.4, 0.55, 0.6, 0.6])  # and not the 0.9 of the last iterate
    np.testing.assert_array_equal(BOTH.values(TRGN, TEST), [0.3, 0.6, 0.5])  # although it was better before
    np.testing.assert_array_equal(BOTH.values(ADAM, VALIDATION), [0.5, 0.6, 0.7, 0.65])
    np.testing.assert_array_equal(BOTH.values(ADAM, TRAIN_LOSS), [40, 30, 20, 10])  # evaluated, not the epoch's mean
    np.testing.assert_array_equal(BOTH.values(ADAM, TRAIN), [2, 1.5, 1, 0.5])


def test_a_smaller_error_is_a_better_metric() -> None:
    run = made(seconds=[1, 2, 3], validation=[0.5, 0.2, 0.4], test={0: 3, 1: 2, 2: 1}, metric="relative_error")
    alone = Comparison([Method("trgn", [run])], "trgn")
    np.testing.assert_array_equal(alone.values(run, BEST_VALIDATION), [0.5, 0.2, 0.2])
    np.testing.assert_array_equal(alone.values(run, TEST), [3, 2, 2])
    assert not alone.larger(TEST) and BOTH.larger(TEST) and not BOTH.larger(TRAIN_LOSS)


def test_an_iterate_counts_from_when_it_is_finished() -> None:
    x, values = np.array([1.0, 2.0, 3.0]), np.array([5.0, np.nan, 4.0])
    found = [step(x, values, at) for at in (0.9, 1.0, 2.0, 2.999, 3.0, 99.0)]
    np.testing.assert_array_equal(found, [np.nan, 5, 5, 5, 4, 4])
    assert first(x, values, 4.5, larger=False) == 3 and first(x, values, 4.5, larger=True) == 1
    assert first(x, values, 9.0, larger=True) == math.inf
    assert math.isnan(first(x, values, math.nan, larger=True))


def test_equal_time_and_equal_work() -> None:
    assert BOTH.budget is None
    assert BOTH.points(SECONDS) == [0.625, 1.25, 2.5]  # trgn ends first, at 2.5 s
    assert BOTH.points(WORK) == [100, 200, 400]  # adam ends first, after 400 gradients
    at = {(m.name, p): BOTH.at(m, TEST, SECONDS, p) for m in BOTH.methods for p in BOTH.points(SECONDS)}
    medians = {key: found and found.median for key, found in at.items()}
    assert medians == {
        ("trgn", 0.625): 0.3,
        ("trgn", 1.25): 0.3,
        ("trgn", 2.5): 0.5,
        ("adam", 0.625): None,
        ("adam", 1.25): 0.4,
        ("adam", 2.5): 0.55,
    }
    rows = equal_rows(BOTH, TRAIN_LOSS, WORK)
    assert [[str(row[name]) for name in ("100", "200", "400")] for row in rows] == [
        ["80", "80", "80"],
        ["**40**", "**30**", "**10**"],
    ]


def test_a_budget_sets_the_times_and_cuts_what_comes_after() -> None:
    settings = "max_seconds = 3.0\n"
    late = made(seconds=[1, 2.9, 3.5], validation=[0.1, 0.2, 0.9], test={0: 0.1, 1: 0.2, 2: 0.9}, settings=settings)
    stopped = made("lbfgs", seconds=[1, 2], validation=[0.3, 0.4], status="converged", settings=settings)
    comparison = Comparison([Method("trgn", [late]), Method("lbfgs", [stopped])], "lbfgs")
    assert comparison.budget == 3.0
    assert comparison.points(SECONDS) == [0.75, 1.5, 3.0]  # what converged at 2 s does not end the others
    assert comparison.final(late, TEST) == 0.2
    assert comparison.reaches(comparison.methods[0], BEST_VALIDATION, SECONDS)[0].median == math.inf  # at 3.5 s only
    short = made("lbfgs", seconds=[1, 2], settings=settings)
    comparison = Comparison([Method("trgn", [late]), Method("lbfgs", [short])], "lbfgs")
    assert comparison.points(SECONDS) == [0.75, 1.5, 2, 3.0]  # what ran out of iterations at 2 s is told apart


def test_time_to_reach_the_reference() -> None:
    times, slowness = BOTH.reaches(BOTH.methods[0], BEST_VALIDATION, SECONDS)
    assert (times.median, slowness.median) == (1.5, 0.5)  # adam is at its 0.7 after 3 s
    times, slowness = BOTH.reaches(BOTH.methods[0], BEST_VALIDATION, WORK)
    assert (times.median, slowness.median) == (640, 640 / 300)
    row = reach_rows(BOTH, BEST_VALIDATION)[0]
    assert row["adam / method, seconds"] == "2×" and row["adam / method, work"] == f"{300 / 640:.3g}×"
    itself = reach_rows(BOTH, TRAIN_LOSS)[1]
    assert str(itself["seconds"]) == "4" and itself["adam / method, seconds"] == "1×"


def test_a_seed_is_measured_against_the_reference_of_its_own_seed() -> None:
    adam = [made("adam", s, seconds=[1, 2], validation=[0.1, v]) for s, v in ((0, 0.5), (1, 0.7), (2, 0.9))]
    trgn = [made("trgn", s, seconds=[1, 4], validation=[0.1, 0.8]) for s in (0, 1, 2)]
    comparison = Comparison([Method("trgn", trgn), Method("adam", adam)], "adam")
    times, slowness = comparison.reaches(comparison.methods[0], BEST_VALIDATION, SECONDS)
    assert times == Spread(4, 4, math.inf, 2, 3)
    assert str(times) == "4 (4 – not reached), 2 of 3 seeds"
    assert slowness == Spread(2, 2, math.inf, 2, 3)
    assert reach_rows(comparison, BEST_VALIDATION)[0]["adam / method, seconds"] == "0.5× (not reached – 0.5×)"
    other = Comparison([Method("trgn", [made(seed=9, seconds=[3], validation=[0.7])]), Method("adam", adam)], "adam")
    assert other.reaches(other.methods[0], BEST_VALIDATION, SECONDS)[0].median == 3  # the median over adam's seeds: 0.7


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([3.0], "3"),
        ([1.0, 4.0, 2.0], "2 (1 – 4)"),
        ([1.0, 4.0], "2.5 (1 – 4)"),
        ([1.0, math.nan, 2.0], "1.5 (1 – 2), 2 of 3 seeds"),
        ([1.0, math.inf, math.inf], "not reached (1 – not reached), 1 of 3 seeds"),
        ([math.inf, math.inf], "not reached"),
        ([12345.6], "12,350"),
        ([math.nan], "None"),
        ([], "None"),
    ],
)
def test_medians_and_ranges(values: list[float], told: str) -> None:
    assert str(Spread.of(values)) == told


def test_curves_are_medians_over_seeds_at_every_iterate() -> None:
    runs = [made(seed=0, seconds=[1, 3], train=[8, 2]), made(seed=1, seconds=[2, 4, 6], train=[6, 4, 1])]
    comparison = Comparison([Method("trgn", runs)], "trgn")
    x, median, low, high = band(comparison, comparison.methods[0], TRAIN_LOSS, SECONDS)
    np.testing.assert_array_equal(x, [2, 3, 4, 6])
    np.testing.assert_array_equal(median, [7, 4, 3, 1.5])
    np.testing.assert_array_equal(low, [6, 2, 2, 1])
    np.testing.assert_array_equal(high, [8, 6, 4, 2])
    assert band(comparison, comparison.methods[0], VALIDATION, ITERATIONS) is None


def test_without_evaluations_the_test_metric_is_known_from_the_summary_s_iterate_on() -> None:
    run = made(seconds=[1, 2, 3, 4], validation=[0.1, 0.5, 0.8, 0.7], evaluated_iteration=2)
    comparison = Comparison([Method("trgn", [run])], "trgn")
    np.testing.assert_array_equal(comparison.values(run, TEST), [np.nan, np.nan, 0.7, 0.7])
    assert np.isnan(comparison.values(run, TRAIN)).all()


def test_the_best_run_of_a_scan() -> None:
    def scanned(*runs: Run) -> int:
        return best_of(Comparison([Method("adam", runs)], "adam"))

    low, high = (made("adam", seconds=[1, 2], validation=[0.1, v]) for v in (0.3, 0.6))
    assert scanned(low, high) == 1 and scanned(high, low) == 0
    lost = made("adam", seconds=[], status="diverged")
    assert scanned(lost, low) == 1
    blind = [made("adam", seconds=[1, 2], train=[3, t], metric="relative_error") for t in (0.5, 0.2, 0.4)]
    assert scanned(*blind) == 1


def test_runs_that_differ_in_more_than_the_seed_are_methods_of_their_own() -> None:
    runs = [
        made("adam", 0, seconds=[1], settings="learning_rate = 0.001\n"),
        made("trgn", 0, seconds=[1]),
        made("adam", 1, seconds=[1], settings="learning_rate = 0.01\n"),
        made("adam", 0, seconds=[1], settings="learning_rate = 0.01\n"),
        made("trgn", 1, seconds=[1]),
    ]
    found = {method.name: [run.summary["seed"] for run in method.runs] for method in group_runs(runs)}
    assert found == {"adam learning_rate=0.001": [0], "trgn": [0, 1], "adam learning_rate=0.01": [1, 0]}


def test_what_makes_a_comparison_uneven_is_told() -> None:
    def run(settings: str, weights: str, ranks: int) -> Run:
        return made(seconds=[1], settings=settings, initial_weights=weights, ranks=ranks)

    same = [run('data = "a.h5"\n', "x", 1)] * 2
    assert uneven(same) == []
    told = uneven([run('data = "a.h5"\n', "x", 1), run('data = "b.h5"\n', "y", 2)])
    assert told == [
        "The runs differ in data: a.h5; b.h5.",
        "The runs differ in ranks: 1; 2.",
        "The runs of seed 0 began at different weights.",
    ]


def test_runs_with_different_metrics_are_refused() -> None:
    with pytest.raises(DataError, match="the metric is accuracy in run, relative_error in run"):
        Comparison([Method("a", [TRGN]), Method("b", [made(seconds=[1], metric="relative_error")])], "a")


def test_a_run_that_failed_at_once_is_a_row_like_any_other(tmp_path: Path) -> None:
    lost = made("newton", seconds=[], status="diverged", message="no fixed point | anywhere")
    comparison = Comparison([*BOTH.methods, Method("newton", [lost])], "adam")
    assert comparison.points(SECONDS) == [0.625, 1.25, 2.5]
    write_comparison(comparison, tmp_path)
    (row,) = (r for r in rows_of(tmp_path / "comparison.csv") if r["method"] == "newton")
    assert (row["status"], row["work"], row["message"]) == ("diverged", "", "no fixed point | anywhere")
    assert "no fixed point \\| anywhere" in (tmp_path / "comparison.md").read_text()


def test_tables_hold_what_the_runs_say() -> None:
    phases = {"forward": 3.0, "reduction": 1.0}
    runs = [
        made(seed=s, seconds=[1, 2 + s], status=t, phases=phases, products_per_iteration=4.0 + s)
        for s, t in ((0, "budget"), (1, "converged"))
    ]
    comparison = Comparison([Method("trgn", runs), Method("adam", [ADAM])], "adam")
    (ours, adam) = outcome_rows(comparison)
    assert ours["status"] == "budget (1 of 2 seeds); converged (1 of 2 seeds)"
    assert (
        str(ours["curvature products an iteration"]) == "4.5 (4 – 5)"
        and adam["curvature products an iteration"] is None
    )
    assert (str(ours["% forward"]), str(ours["% reduction"]), adam["% forward"]) == ("75", "25", None)
    assert str(end_rows(comparison)[0]["seconds"]) == "2.5 (2 – 3)"
    rows = run_rows(
        Comparison(BOTH.methods, "adam", [Trial("adam", 0.1, TRGN, False), Trial("adam", 1.0, runs[0], True)])
    )
    assert [(row["method"], row["part"], row["seed"]) for row in rows] == [
        ("trgn", "comparison", 0),
        ("adam", "comparison", 0),
        ("adam", "learning-rate scan", 0),
    ]
    assert rows[0]["seconds forward"] is None and rows[2]["seconds forward"] == 3.0


# ------------------------------------------------------------------------------------------------------ documents


class Reader(HTMLParser):
    """Checks that tags are closed in order, and notes what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.count: dict[str, int] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_document_is_escaped_and_marked() -> None:
    document = Document(
        "a < b",
        [
            Heading("one"),
            Paragraph("**bold** and `x < y`"),
            Table([{"name": "<i>", "value": Spread(1, 1, 1, 1, 1, best=True)}]),
            Folded("more", "if a < b & c:"),
            Paragraph("mind", warning=True),
        ],
    )
    html = document_html(document, Path())
    assert "<title>a &lt; b</title>" in html and "<strong>bold</strong> and <code>x &lt; y</code>" in html
    assert '<td>&lt;i&gt;</td><td class="right"><strong>1</strong></td>' in html
    assert "<pre>if a &lt; b &amp; c:</pre>" in html and '<p class="warning">mind</p>' in html
    text = document_markdown(document)
    assert "## one" in text and "| <i> | **1** |" in text and "````text\nif a < b & c:\n````" in text


def check_report(folder: Path, methods: int, runs: int) -> Reader:
    """Check what every report has, and return what was read of its HTML."""
    from matplotlib.image import imread

    html = (folder / "comparison.html").read_text()
    reader = Reader()
    reader.feed(html)
    assert reader.open == [] and "script" not in reader.count
    assert not re.search(r"https?://|@import|url\(", html)
    assert all(place.startswith("data:image/png;base64,") for place in reader.loaded)
    pictures = sorted((folder / "figures").iterdir())
    assert reader.count["img"] == len(pictures) == len(re.findall(r"!\[", (folder / "comparison.md").read_text()))
    for path in pictures:
        picture = imread(path)[..., :3]
        assert min(picture.shape[:2]) > 400 and picture.std() > 0.03
        colours = {tuple(c) for c in np.round(picture.reshape(-1, 3) * 255).astype(int)}
        lines = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)]
        assert sum(line in colours for line in lines) >= min(methods, 2)
    assert len(rows_of(folder / "comparison.csv")) == runs
    assert reader.count["details"] >= runs
    return reader


# -------------------------------------------------------------------------------------------------------- planning


def test_settings_come_from_the_file_then_the_command_line_then_the_method() -> None:
    base = {
        "data": "a.h5",
        "batch_size": 32,
        "dtype": "float32",
        "petsc": {"tao_gatol": "1e-3", "deq_snes_rtol": "1e-4"},
    }
    tables = {"wide": {"optimizer": "trgn", "petsc": {"tao_trust0": 10}}, "adam": {"batch_size": 8}}
    own = read_set(["wide:-tao_gatol=1e-9", "adam:learning-rate=0.5", "adam:schedule=constant"])
    trgn, wide, adam, adamw = plan_variants(["trgn", "wide", "adam", "adamw"], base, (tables, own), (1e-3, 1e-2))
    assert (trgn.config.optimizer, wide.config.optimizer) == ("trgn", "trgn")
    assert trgn.config.batch_size is None and adam.config.batch_size == 8 and adamw.config.batch_size == 32
    assert trgn.config.petsc["tao_gatol"] == "1e-3"
    assert {"tao_gatol": "1e-9", "deq_snes_rtol": "1e-4", "tao_trust0": "10"}.items() <= wide.config.petsc.items()
    assert (adam.config.learning_rate, adam.config.schedule, adam.rates) == (0.5, "constant", ())
    assert adamw.rates == (1e-3, 1e-2)
    assert all(variant.config.dtype == "float32" for variant in (trgn, wide, adam, adamw))


def test_runs_are_named_by_method_rate_and_seed() -> None:
    blmvm, adam = plan_variants(["tao:blmvm", "adam"], {"data": "a.h5"}, (), (1e-3,))
    assert run_of(blmvm, 3).name == "tao-blmvm-3" and run_of(blmvm, 3).config.seed == 3
    scanned = run_of(adam, 0, 1e-3)
    assert scanned.name == "adam-lr0.001-0" and scanned.config.learning_rate == 1e-3


def test_parts_are_all_runs_once_and_a_scan_stays_together() -> None:
    variants = plan_variants(["trgn", "adam", "lbfgs"], {"data": "a.h5"}, (), (1e-3, 1e-2))
    parts = [(variant.label, list(seeds)) for variant, seeds in parts_of(variants, range(4, 6))]
    assert parts == [("adam", [4, 5]), ("trgn", [4]), ("lbfgs", [4]), ("trgn", [5]), ("lbfgs", [5])]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--optimizers trgn,adm", "unknown optimizer 'adm': did you mean adam?"),
        ("--optimizers tao:lmvn", "unknown TAO type 'lmvn': did you mean tao:lmvm?"),
        ("--optimizers trgn,trgn", "has trgn twice"),
        ("--optimizers a/b", "'a/b' cannot be the name of a method"),
        ("--optimizers trgn --learning-rates 1e-3", "--learning-rates is for adam"),
        ("--optimizers trgn --batch-size 4", "--batch-size is an option of adam"),
        ("--optimizers trgn,adam --batch-size 0", "batch_size is 0: give 1 or more"),
        ("--optimizers trgn --set trng:tao_trust0=1", "settings for trng, which is not compared: did you mean trgn?"),
        ("--optimizers trgn --set trgn:tao_trusst0=1", "unknown PETSc option -tao_trusst0: did you mean -tao_trust0?"),
        ("--optimizers trgn --set trgn:seed=1", "seed is the same for all methods"),
        ("--optimizers trgn --set tao_trust0=1", "give METHOD:SETTING=VALUE"),
        ("--set adam:learning_rat=3", "unknown setting 'learning_rat': did you mean learning_rate?"),
        ("--set adam:batch_size=x", "batch_size is 'x', which is no int"),
        ("--optimizers trgn,adam --reference adma", "--reference adma is not compared: did you mean adam?"),
        ("-tao_gatoll 3", "unknown PETSc option -tao_gatoll: did you mean -tao_gatol?"),
        ("-deq_snes_type andersn", "did you mean anderson?"),
        ("--model mlp_dec", "unknown model 'mlp_dec': did you mean mlp_deq?"),
        ("--model graph_deq", "model graph_deq takes data as graph"),
        ("--data none.h5", "none.h5: no such file"),
        ("none.toml", "configuration none.toml cannot be read"),
        ("one.toml two.toml", "one CONFIG.toml at most"),
        ("run one.toml", "one.toml: runs that have ended are compared as they are"),
        ("run --seeds 2", "--seeds: runs that have ended are compared as they are"),
        ("run -tao_gatol 1", "-tao_gatol: runs that have ended are compared as they are"),
        ("run", "run: no such run directory"),
        ("--optimizers trgn,adam --part 1/5", "--part 1/5: this comparison has 6 parts; in Slurm, sbatch --array=0-5"),
        ("run --part 0/1", "--part: runs that have ended are compared as they are"),
    ],
)
@pytest.mark.parallel([1, 2])
def test_what_is_wrong_is_told_before_anything_is_run(
    burgers: Path, shared_tmp_path: Path, comm: parallel.Comm, arguments: str, told: str
) -> None:
    out = shared_tmp_path / "out"
    with pytest.raises(UsageError, match=re.escape(told)) as caught:
        main(
            ["--data", str(burgers), *arguments.split(), "--out", str(out)]
            if "run" not in arguments.split()
            else [*arguments.split(), "--out", str(out)]
        )
    assert caught.value.agreed and caught.value.exit_code == 2
    parallel.any_rank(comm, False)  # rank 0 cleans up
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("--seeds 0", "'0': give how many, 1 or more"),
        ("--learning-rates 1,x", "'1,x': give numbers above 0"),
        ("--learning-rates 0", "'0': give numbers above 0"),
        ("--optimizers trgn,", "'trgn,': give names with commas between"),
        ("--sees 3", "unknown option --sees: did you mean --seeds?"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2(text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*text.split(), "--out", "x"])
    assert caught.value.code == 2 and told in capsys.readouterr().err


def test_tables_of_a_file_are_checked() -> None:
    with pytest.raises(OptionError, match=r"f \[optimizers.adam\]: unknown setting 'rate'"):
        split_base({"optimizers": {"adam": {"rate": 1}}}, "f")
    with pytest.raises(OptionError, match="f: optimizers holds a table for each method"):
        split_base({"optimizers": "adam"}, "f")


# --------------------------------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def burgers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset, the same file on all ranks."""
    from hpcdeq.builders.fields import prepare_burgers

    own = tmp_path_factory.mktemp("data") / "b.h5" if parallel.WORLD.rank == 0 else None
    path = parallel.from_root(parallel.WORLD, own)
    prepare_burgers(path, 60)
    return path


@pytest.fixture(autouse=True)
def options_left_alone() -> Iterator[None]:
    """Check that no run leaves options behind in PETSc's database."""
    before = database_options()
    yield
    assert database_options() == before


SMALL = ["--optimizers", "trgn,adam", "--seeds", "2", "--max-iterations", "3", "--set", "adam:batch_size=16"]


@pytest.mark.timeout(600)
@pytest.mark.parallel([1, 2])
def test_a_comparison_from_beginning_to_end(
    burgers: Path, shared_tmp_path: Path, comm: parallel.Comm, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shared_tmp_path / "out"
    arguments = ["--data", str(burgers), *SMALL, "--out", str(out), "--set", "trgn:tao_trust0=0.5"]
    assert main(arguments) == 0
    names = ["trgn-0", "adam-0", "trgn-1", "adam-1"]
    printed = capsys.readouterr().out
    with parallel.agreement(comm):
        if comm.rank == 0:
            assert [line.split()[1] for line in printed.splitlines() if line.startswith("[")] == names
            assert "run 2 of 4: adam-0" in printed and "to go" in printed
            runs = {name: read_run(out / "runs" / name) for name in names}
            weights = {name: run.summary["initial_weights"] for name, run in runs.items()}
            assert weights["trgn-0"] == weights["adam-0"] != weights["trgn-1"] == weights["adam-1"]
            assert {run.summary["ranks"] for run in runs.values()} == {comm.size}
            # An option of one method is not one of the others.
            assert "-tao_trust0 0.5" in (out / "runs" / "trgn-1" / "petsc_options.txt").read_text()
            assert "tao_trust0" not in (out / "runs" / "adam-1" / "petsc_options.txt").read_text()
            for run in runs.values():
                check_evaluations(run)
            reader = check_report(out, methods=2, runs=4)
            for word in (
                "Comparison of trgn, adam",
                "b.h5",
                "48 train, 6 validation, 6 test",
                "Time to reach adam",
                "tao_trust0",
            ):
                assert word in reader.text, word
            assert "differ" not in reader.text and "still to come" not in reader.text
            assert "One learning rate only was tried: adam at 0.001" in reader.text

    # What is there is not run again; what was stopped is, and goes on where it left a checkpoint.
    with parallel.agreement(comm):
        if comm.rank == 0:
            for name in ("summary.json", "checkpoint.h5", "checkpoint-previous.h5"):
                (out / "runs" / "adam-0" / name).unlink(missing_ok=True)
            (out / "runs" / "trgn-1" / "summary.json").unlink()
            ended = (out / "runs" / "trgn-1" / "history.csv").read_text()
            marks = {
                name: (out / "runs" / name / "summary.json").stat().st_mtime_ns
                for name in names
                if name not in ("adam-0", "trgn-1")
            }
    assert main([*arguments, "--quiet"]) == 0
    printed = capsys.readouterr().out
    with parallel.agreement(comm):
        if comm.rank == 0:
            assert [
                name for name in names if (out / "runs" / name / "summary.json").stat().st_mtime_ns != marks.get(name)
            ] == ["adam-0", "trgn-1"]
            assert printed.count("done before") == 2 and "run 2 of" not in printed
            assert (out / "runs" / "trgn-1" / "history.csv").read_text() == ended
            assert not (out / "runs" / "trgn-1.unfinished").exists()
            check_evaluations(read_run(out / "runs" / "trgn-1"))
            assert (out / "runs" / "adam-0.unfinished" / "history.csv").exists()
            again = read_run(out / "runs" / "adam-0")
            np.testing.assert_allclose(again.history["train_loss"], runs["adam-0"].history["train_loss"], rtol=1e-8)

    # Other settings under the same name are refused, before anything runs.
    with pytest.raises(
        OptionError, match=r"trgn-0 has been run with other settings: max_iterations 3 there and 4 here\. Repeat"
    ):
        main([*arguments, "--max-iterations", "4"])
    with pytest.raises(OptionError, match=r"petsc\.tao_trust0 0\.5 there and 0\.7 here"):
        main([*arguments, "--set", "trgn:tao_trust0=0.7"])


@pytest.mark.parallel([1, 2])
def test_a_comparison_that_is_interrupted_goes_on_within_the_run(
    burgers: Path, shared_tmp_path: Path, comm: parallel.Comm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Send one rank a signal in the second run: it is left with a checkpoint, and the same command ends as if undisturbed."""
    given = ["--data", str(burgers), "--optimizers", "lbfgs,adam", "--seeds", "1", "--max-iterations", "4", "--quiet"]
    assert main([*given, "--out", str(shared_tmp_path / "whole")]) == 0
    record = ComparedTraining._record

    def disturbed(self: ComparedTraining, iterate: Iterate) -> None:
        record(self, iterate)
        if self.config.optimizer == "adam" and iterate.iteration == 2 and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(ComparedTraining, "_record", disturbed)
    out = shared_tmp_path / "parts"
    assert main([*given, "--out", str(out)]) == 75
    monkeypatch.undo()
    if comm.rank == 0:
        summary = json.loads((out / "runs" / "adam-0" / "summary.json").read_text())
        assert (summary["status"], summary["iterations"]) == ("interrupted", 2)
    parallel.any_rank(comm, False)
    assert main([*given, "--out", str(out)]) == 0
    with parallel.agreement(comm):
        if comm.rank == 0:
            one, two = (read_run(shared_tmp_path / name / "runs" / "adam-0") for name in ("whole", "parts"))
            for name in ("iteration", "train_loss", "validation_metric", "gradients"):
                assert one.history[name].tolist() == two.history[name].tolist(), name
            assert two.summary["status"] == "budget"
            check_evaluations(two)


def check_evaluations(run: Run) -> None:
    """Check evaluations.csv against history and summary, which are computed elsewhere."""
    found = run.evaluations
    count = len(run.history["iteration"])
    assert set(found["row"]) == set(range(count))
    best = int(np.argmin(run.history["validation_metric"]))
    row = list(found["row"]).index(best)
    assert found["test_metric"][row] == pytest.approx(run.summary["metric"]["test"], rel=1e-6)
    assert found["train_loss"][row] == pytest.approx(run.summary["loss"]["train"], rel=1e-6)
    if run.summary["optimizer"] == "trgn":
        np.testing.assert_allclose(found["train_loss"], run.history["train_loss"], rtol=0.02)
    else:  # the mean over an epoch's batches lags behind
        assert (found["train_loss"][1:] < run.history["train_loss"][1:]).all()


@pytest.mark.parallel([1, 2])
def test_a_scan_of_learning_rates_chooses_by_validation(
    burgers: Path, shared_tmp_path: Path, comm: parallel.Comm, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shared_tmp_path / "out"
    if comm.rank == 0:
        (shared_tmp_path / "c.toml").write_text("max_iterations = 2\n[optimizers.adam]\nbatch_size = 16\n")
    arguments = [str(shared_tmp_path / "c.toml"), "--data", str(burgers), "--seeds", "2", "--out", str(out)]
    assert main([*arguments, "--learning-rates", "1e-2,1e-9", "--quiet"]) == 0
    with parallel.agreement(comm):
        if comm.rank == 0:
            assert sorted(path.name for path in (out / "runs").iterdir()) == [
                "adam-lr0.01-0",
                "adam-lr0.01-1",
                "adam-lr1e-09-0",
            ]
            assert "One learning rate only" not in (out / "comparison.md").read_text()
            scan = (out / "comparison.md").read_text().partition("## Scan of learning rates")[2]
            assert re.search(r"\| adam \| 0.01 \| 0 \|.*\*\*yes\*\*", scan) and not re.search(r"\| 1e-09 \|.*yes", scan)
            rows = rows_of(out / "comparison.csv")
            assert [(row["learning rate"], row["part"], row["seed"]) for row in rows] == [
                ("0.01", "comparison", "0"),
                ("0.01", "comparison", "1"),
                ("1e-09", "learning-rate scan", "0"),
            ]
            check_report(out, methods=1, runs=3)
            assert capsys.readouterr().out.count("\n") == 4  # a line a run, and where the report is


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_one_rank_reads_the_configuration(
    burgers: Path, shared_tmp_path: Path, comm: parallel.Comm, command: str
) -> None:
    """Ranks that read different files would run different methods, and hang."""
    file, out = shared_tmp_path / "c.toml", shared_tmp_path / "out"
    if comm.rank == 0:
        file.write_text("max_iterations = 1\nmax_seconds = 60\n")
    run_command = {"train": train.main, "compare": main}[command]
    elsewhere = file if comm.rank == 0 else Path("nowhere.toml")
    words = ["--seed", "7"] if command == "train" else ["--optimizers", "lbfgs", "--seeds", "1"]
    arguments = [str(elsewhere), "--data", str(burgers), *words, "--out", str(out), "--quiet"]
    with only_options({}, ("tao_", "deq_")):
        assert run_command(arguments) == 0
    with parallel.agreement(comm):
        if comm.rank == 0:
            summary = json.loads((out / ("" if command == "train" else "runs/lbfgs-0") / "summary.json").read_text())
            assert (summary["iterations"], summary["ranks"]) == (1, comm.size)
    with pytest.raises(OptionError, match=r"none\.toml cannot be read") as caught:
        run_command(["none.toml" if comm.rank == 0 else str(file), *arguments[1:]])
    assert caught.value.agreed


@pytest.mark.parallel([1, 2])
def test_a_run_that_fails_is_a_row_and_not_the_end(burgers: Path, shared_tmp_path: Path, comm: parallel.Comm) -> None:
    out = shared_tmp_path / "out"
    arguments = [
        "--data",
        str(burgers),
        "--optimizers",
        "trgn,lbfgs",
        "--seeds",
        "1",
        "--max-iterations",
        "2",
        "--out",
        str(out),
    ]
    assert main([*arguments, "--set", "trgn:deq_snes_max_it=1", "--quiet"]) == 0
    with parallel.agreement(comm):
        if comm.rank == 0:
            rows = {row["method"]: row for row in rows_of(out / "comparison.csv")}
            assert (
                rows["trgn"]["status"] == "diverged" and "DIVERGED_MAX_IT after 1 iterations" in rows["trgn"]["message"]
            )
            assert rows["lbfgs"]["status"] == "budget" and float(rows["lbfgs"]["test metric"]) > 0
    assert main([*arguments, "--set", "trgn:deq_snes_max_it=1", "--quiet"]) == 0  # and is not tried again
    only = [word.replace("trgn,lbfgs", "trgn") for word in arguments]
    assert main([*only, "--set", "trgn:deq_snes_max_it=1", "--quiet"]) == 1


def test_a_method_that_does_not_fit_the_task_is_told_before_the_first_run(shared_tmp_path: Path, burgers: Path) -> None:
    out = shared_tmp_path / "out"
    inexact = ["--set", "trgn:deq_ksp_type=jfb"]
    with pytest.raises(OptionError, match="trgn needs exact derivatives"):
        main(["--data", str(burgers), *SMALL, *inexact, "--optimizers", "adam,trgn", "--out", str(out)])
    assert not (out / "runs").exists()


def test_finished_runs_are_compared_as_they_are(burgers: Path, tmp_path: Path) -> None:
    for optimizer, seed in (("lbfgs", 0), ("lbfgs", 1), ("trgn", 0)):
        given = [
            "--data",
            str(burgers),
            "--optimizer",
            optimizer,
            "--seed",
            str(seed),
            "--max-iterations",
            "3",
            "--quiet",
        ]
        with only_options({}, ("tao_", "deq_")):
            assert train.main([*given, "--out", str(tmp_path / f"{optimizer}{seed}")]) == 0
    lbfgs0, lbfgs1, trgn0 = (str(tmp_path / name) for name in ("lbfgs0", "lbfgs1", "trgn0"))
    report = tmp_path / "report"
    assert main([lbfgs0, lbfgs1, trgn0, "--out", str(report), "--reference", "lbfgs"]) == 0
    reader = check_report(report, methods=2, runs=3)
    assert "Comparison of lbfgs, trgn" in reader.text and "Time to reach lbfgs" in reader.text
    rows = {row["run"]: row for row in rows_of(report / "comparison.csv")}
    assert set(rows) == {"lbfgs0", "lbfgs1", "trgn0"}
    for name, row in rows.items():
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert (
            float(row["test metric"]) == summary["metric"]["test"] and int(row["iterations"]) == summary["iterations"]
        )
    # The folder of a comparison stands for its runs.
    for name in ("lbfgs0", "trgn0"):
        shutil.copytree(tmp_path / name, tmp_path / "old" / "runs" / name)
    assert main([str(tmp_path / "old"), "--out", str(tmp_path / "again")]) == 0
    assert {row["run"] for row in rows_of(tmp_path / "again" / "comparison.csv")} == {"lbfgs0", "trgn0"}
    with pytest.raises(OptionError, match="lbfgs0 is given twice"):
        main([lbfgs0, lbfgs0, "--out", str(tmp_path / "third")])


def test_a_run_that_has_not_ended_is_refused_on_all_ranks(run: Process, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "history.csv").touch()
    done = run("-m", "hpcdeq.compare", "begun", "--out", "report", ranks=2)
    assert done.returncode == 2 and not (tmp_path / "report").exists(), done.stderr
    assert done.stderr.count("DataError: begun has no summary.json: the run has not finished, or was killed") == 1


# ----------------------------------------------------------------------------------------------------------- pieces


def test_options_of_a_run_do_not_outlive_it() -> None:
    insert_options({"tao_gatol": "1e-3", "deq_snes_monitor": "", "a_note": ""})
    before = database_options()
    with only_options({"tao_trust0": "2", "another": ""}, ("tao_", "deq_")):
        inside = database_options()
        insert_options({"deq_ksp_rtol": "1e-2"})
    assert inside.keys() == {*before, "tao_trust0", "another"} - {"tao_gatol", "deq_snes_monitor"}
    assert database_options() == before
    with only_options({}, ("tao_", "deq_")), pytest.raises(ZeroDivisionError):
        1 / 0  # noqa: B018
    assert database_options() == before
    from hpcdeq.petsc import PETSc

    for name in ("tao_gatol", "deq_snes_monitor", "a_note"):
        PETSc.Options().delValue(name)


@pytest.mark.parallel([1, 2, 3])
def test_what_rank_0_raises_is_raised_everywhere(comm: parallel.Comm) -> None:
    assert parallel.only_root(comm, lambda: comm.rank + 5) == 5

    def fail() -> int:
        raise DataError("no such file")

    with pytest.raises(DataError, match="^no such file$") as caught:
        parallel.only_root(comm, fail)
    assert caught.value.agreed


def test_iterates_are_evaluated_evenly_on_a_logarithmic_clock() -> None:
    spacing = Spacing()
    times = np.linspace(0.001, 10, 10_000)
    due = [t for t in times if spacing.due(t, False)]
    assert due[0] == times[0] and 500 < len(due) < 950
    assert max(np.diff(np.log(due))) < 0.7  # of the first ones; no gap later
    assert max(np.diff(np.log(due[50:]))) < 0.02
    assert spacing.due(10.0, True)


def test_evaluations_come_back_as_written(tmp_path: Path) -> None:
    from hpcdeq.problem.training import Evaluation
    from hpcdeq.report.runs import _columns

    writer = EvaluationWriter(tmp_path / "e.csv")
    writer.write(0, Evaluation(1 / 3, 0.5), None)
    writer.write(7, Evaluation(0.1, math.nan), Evaluation(0.2, 0.3))
    found = _columns(tmp_path / "e.csv", ("row", "test_metric"))
    np.testing.assert_array_equal(found["row"], [0, 7])
    np.testing.assert_array_equal(found["train_loss"], [1 / 3, 0.1])
    np.testing.assert_array_equal(found["train_metric"], [0.5, np.nan])
    np.testing.assert_array_equal(found["test_metric"], [np.nan, 0.3])
