"""The report of a comparison: comparison.csv, comparison.md, comparison.html and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcdeq.errors import HpcdeqError
from hpcdeq.methods import MINIBATCH
from hpcdeq.record.atomic import replaced
from hpcdeq.report.comparison import SECONDS, TEST, TRAIN, TRAIN_LOSS, VALIDATION, WORK, Comparison
from hpcdeq.report.comparison_figures import write_comparison_figures
from hpcdeq.report.comparison_tables import (
    QUANTITIES,
    end_rows,
    equal_rows,
    outcome_rows,
    reach_rows,
    run_rows,
    title_of,
    trial_rows,
    weight_rows,
)
from hpcdeq.report.document import (
    Block,
    Document,
    Figure,
    Folded,
    Heading,
    Paragraph,
    Table,
    document_markdown,
)
from hpcdeq.report.grouping import uneven
from hpcdeq.report.html import document_html
from hpcdeq.report.runs import Run
from hpcdeq.report.tables import Row, Spread, to_csv

HOW = """\
The clock of a run counts the optimisation alone: evaluations on validation, test and training data after an iterate are not \
in it, and are the same for all methods. A method is worth, at a time or at some work, what its last iterate finished by then \
is worth; nothing is interpolated. Work is counted by the same counters for all methods, in gradients of one sample: gradients \
+ losses / 3 + 2 × curvature products. The training loss is that of the data at the iterate itself, also for minibatch \
methods. The test metric is that of the iterate with the best validation metric so far, as early stopping would give it out. \
Numbers are medians over seeds with the range in brackets; bold is the best median of a column."""


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the report of a comparison; each file is replaced in one step.

    Not collective: one rank writes.

    Raises
    ------
    HpcdeqError
        A file cannot be written.
    DataError
        The runs do not fit together.
    """
    try:
        figures = write_comparison_figures(comparison, folder / "figures")
        document = comparison_document(comparison, {name: f"figures/{path.name}" for name, path in figures.items()})
        texts = {
            "comparison.csv": to_csv(run_rows(comparison)),
            "comparison.md": document_markdown(document),
            "comparison.html": document_html(document, folder),
        }
        for name, text in texts.items():
            with replaced(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HpcdeqError(
            f"cannot write the report in {folder}: {error.strerror}; is the disk or the quota full?"
        ) from error


def comparison_document(comparison: Comparison, figures: Mapping[str, str]) -> Document:
    """Return the report.

    Not collective.

    Parameters
    ----------
    figures
        Paths of the figures, relative to the report's folder, by quantity.
    """
    names = ", ".join(method.name for method in comparison.methods)
    blocks: list[Block] = [
        *_overview(comparison),
        *_figures(comparison, figures),
        *_equal(comparison),
        *_reach(comparison),
        *_trials(comparison),
        Heading("How the runs ended, and where their time went"),
        Table(outcome_rows(comparison)),
        *_configurations(comparison),
    ]
    return Document(f"Comparison of {names}", blocks)


def _overview(comparison: Comparison) -> list[Block]:
    runs = comparison.runs
    found: list[Block] = []
    if comparison.missing:
        found.append(Paragraph(f"Not all is there: {comparison.missing} runs are still to come.", warning=True))
    found += [Paragraph(line, warning=True) for line in uneven(runs)]
    found += [
        Paragraph(f"One learning rate only was tried: {told}. `--learning-rates` tries several.", warning=True)
        for told in _untuned(comparison)
    ]
    rows: list[Row] = [{"": name, "value": value} for name, value in _facts(comparison) if value]
    weights = weight_rows(comparison)
    found += [Heading("What was compared"), Table(rows), Paragraph(HOW)]
    if any(value for row in weights for name, value in row.items() if name != "seed"):
        told = "Fingerprints of the initial weights (SHA-256): runs of one seed begin at the same point."
        found += [Paragraph(told), Table(weights)]
    return found


def _untuned(comparison: Comparison) -> list[str]:
    """Return the methods on minibatches that were tried with one learning rate only, and the rate."""
    rates: dict[str, set[float | None]] = {}
    runs = [*comparison.runs, *(trial.run for trial in comparison.trials)]
    for run in runs:
        rates.setdefault(str(run.settings.get("optimizer")), set()).add(run.settings.get("learning_rate"))
    return [
        f"{name} at {next(iter(found)) or 'its default'}"
        for name, found in rates.items()
        if name in MINIBATCH and len(found) == 1
    ]


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what the runs have in common, and each value where they differ."""
    runs = comparison.runs
    environments = [run.environment for run in runs]

    def each(values: Sequence[Any]) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in values if value not in (None, "", {})))

    def versions(environment: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in environment.get("versions", {}).items() if value)

    def samples(run: Run) -> str:
        found = run.summary.get("samples") or {}
        return ", ".join(f"{count:,} {split}" for split, count in found.items())

    seconds = comparison.budget
    iterations = [run.settings.get("max_iterations") for run in runs]
    return [
        ("data", each([run.settings.get("data") for run in runs])),
        ("samples", each([samples(run) for run in runs])),
        ("task", each([f"{run.summary.get('task')}, metric {run.summary['metric']['name']}" for run in runs])),
        ("model", each([f"{run.summary.get('model')}, {run.summary.get('parameters'):,} weights" for run in runs])),
        (
            "model settings",
            each([", ".join(f"{k} {v}" for k, v in run.settings.get("model_settings", {}).items()) for run in runs]),
        ),
        ("precision, device", each([f"{run.summary.get('dtype')}, {run.summary.get('device')}" for run in runs])),
        ("seeds", ", ".join(str(seed) for seed in sorted({run.summary["seed"] for run in runs}))),
        (
            "budget",
            f"{seconds:g} s of optimisation a run" if seconds is not None else f"{each(iterations)} iterations a run",
        ),
        ("reference", comparison.reference),
        ("ranks × threads", each([f"{run.summary.get('ranks')} × {run.summary.get('threads')}" for run in runs])),
        ("machine", each([e.get("host") for e in environments])),
        ("system", each([f"{e.get('platform')}, {e.get('cpu_count')} logical CPUs" for e in environments if e])),
        ("versions", each([versions(e) for e in environments])),
        ("MPI", each([e.get("mpi_library") for e in environments])),
        ("commit", each([e.get("commit") for e in environments])),
        ("first run started", min((e["started"] for e in environments if "started" in e), default="")),
    ]


def _figures(comparison: Comparison, figures: Mapping[str, str]) -> list[Block]:
    metric = comparison.metric.replace("_", " ")
    better = "higher is better" if comparison.larger_is_better else "lower is better"
    budget = "; dotted: the budget" if comparison.budget is not None else ""
    captions = {
        TRAIN_LOSS: "Training loss",
        TRAIN: f"Training {metric} ({better})",
        VALIDATION: f"Validation {metric} at each iterate ({better})",
        TEST: f"Test {metric} of the iterate with the best validation {metric} so far ({better})",
    }
    how = f" against wall time, work and iterations. Lines: median over seeds; bands: range{budget}."
    drawn = [Figure(figures[name], caption + how) for name, caption in captions.items() if name in figures]
    return [Heading("Progress"), *drawn] if drawn else []


def _equal(comparison: Comparison) -> list[Block]:
    found: list[Block] = [Heading("At the end"), Table(end_rows(comparison))]
    for title, kind in (("At equal time", SECONDS), ("At equal work", WORK)):
        found.append(Heading(title))
        for quantity in QUANTITIES:
            rows = equal_rows(comparison, quantity, kind)
            if any(isinstance(value, Spread) for row in rows for value in row.values()):
                found += [Paragraph(_capital(title_of(comparison, quantity))), Table(rows)]
    return found


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _reach(comparison: Comparison) -> list[Block]:
    reference = comparison.reference
    found: list[Block] = [
        Heading(f"Time to reach {reference}"),
        Paragraph(
            f"When each method is first as good as {reference} is at the end, seed by seed, in seconds and in work, and how"
            f" many times sooner than {reference} itself got there. Above 1× a method is faster than {reference}."
        ),
    ]
    for quantity in QUANTITIES:
        rows = reach_rows(comparison, quantity)
        if any(isinstance(row["seconds"], Spread) for row in rows):
            found += [Paragraph(_capital(title_of(comparison, quantity))), Table(rows)]
    return found


def _trials(comparison: Comparison) -> list[Block]:
    if not comparison.trials:
        return []
    return [
        Heading("Scan of learning rates"),
        Paragraph(
            "Each learning rate ran with the first seed and the full budget; the best validation metric (without validation"
            " data: the training loss) chose the one for the other seeds. The time of the scan is not counted against the"
            " method."
        ),
        Table(trial_rows(comparison)),
    ]


def _configurations(comparison: Comparison) -> list[Block]:
    found: list[Block] = [
        Heading("Configurations"),
        Paragraph("`python -m hpcdeq.train config.toml --out DIR` repeats a run; every run directory has its own."),
    ]
    shown: set[int] = set()
    for method in comparison.methods:
        for run in method.runs:
            shown.add(id(run))
            found.append(Folded(f"{method.name}, seed {run.summary['seed']} ({run.path.name})", run.config))
    for trial in comparison.trials:
        if id(trial.run) not in shown:
            found.append(Folded(f"scan: {trial.run.path.name}", trial.run.config))
    return found
