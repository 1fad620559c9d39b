"""Loss and metric on the training and test sets along a run, which a fair comparison needs: evaluations.csv."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

from hpcdeq.problem.training import Evaluation
from hpcdeq.record.atomic import cannot_write, cut_table

# The row is that of history.csv, from 0.
EVALUATION_COLUMNS = ("row", "train_loss", "train_metric", "test_loss", "test_metric")
# Between iterates that are not the best so far, the clock has to move on by this factor: curves on a logarithmic axis need
# no more points, and cheap iterations would otherwise wait for their evaluation.
SPACING = 1.01


class EvaluationWriter:
    """Writes evaluations.csv, a row at a time.

    Not collective: rank 0 makes one.

    Parameters
    ----------
    path
        The file to make, with its header.
    rows
        None; or the rows of an existing file that stay, and are gone on from.

    Raises
    ------
    HpcdeqError
        The file cannot be written; also raised by `write`.
    """

    def __init__(self, path: str | os.PathLike[str], rows: int | None = None) -> None:
        self.path = Path(path)
        if rows is None:
            self._append("w", EVALUATION_COLUMNS)
        else:
            cut_table(self.path, rows)

    def write(self, row: int, train: Evaluation, test: Evaluation | None) -> None:
        """Append the evaluation of an iterate, by its row in history.csv; an empty field for NaN. Not collective."""
        values = [train.loss, train.metric, *((test.loss, test.metric) if test else (math.nan, math.nan))]
        self._append("a", (str(row), *("" if math.isnan(value) else repr(float(value)) for value in values)))

    def _append(self, mode: str, fields: tuple[str, ...]) -> None:
        try:
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(fields)
        except OSError as error:
            raise cannot_write(self.path, error) from error


class Spacing:
    """Chooses the iterates to evaluate: the best so far, and others evenly on a logarithmic clock. Not collective.

    Parameters
    ----------
    due
        Seconds at which the next one is due in any case.
    """

    def __init__(self, due: float = 0.0) -> None:
        self.next = due

    def due(self, seconds: float, improved: bool) -> bool:
        """Say whether to evaluate the iterate at this time. Not collective."""
        if seconds < self.next and not improved:
            return False
        self.next = SPACING * seconds
        return True
