"""The progress of a run on the terminal: a line an iterate, at most about one a second."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TextIO

from hpcdeq.optim.base import Iterate, Result
from hpcdeq.problem.training import Evaluation


class Progress:
    """Prints a header and compact lines in aligned columns. Work is in samples: 12k is 12,000 samples.

    Not collective: rank 0 makes one.

    Parameters
    ----------
    metric_name
        What the validation metric is; heads its column.
    quiet
        Print nothing.
    interval
        Least time between two lines in s. The first and the last iterate are always printed.
    stream
        Where to; default: the standard output at the time.
    """

    def __init__(
        self, metric_name: str, *, quiet: bool = False, interval: float = 1.0, stream: TextIO | None = None
    ) -> None:
        self.metric_name = metric_name
        self.quiet = quiet
        self.interval = interval
        self.stream = stream
        self._printed: float | None = None
        self._held: str | None = None

    def write(self, iterate: Iterate, validation: Evaluation | None) -> None:
        """Show an iterate; hold it back where the last line is fresh. Not collective."""
        line = self._line(iterate, validation)
        now = time.monotonic()
        if self._printed is None:
            self._print(self._header(iterate))
        elif now - self._printed < self.interval:
            self._held = line
            return
        self._print(line)
        self._printed = now
        self._held = None

    def finish(
        self,
        result: Result,
        *,
        train: Evaluation | None,
        validation: Evaluation | None,
        test: Evaluation | None,
        wall_seconds: float,
        run_directory: Path | None,
    ) -> None:
        """Show how the run ended.

        Not collective.

        Parameters
        ----------
        train, validation, test
            Loss and metric on the three sets; None for a set that is not there.
        wall_seconds
            Wall time of the run.
        run_directory
            Where its files are; None if there are none.
        """
        if self._held is not None:
            self._print(self._held)
            self._held = None
        self._print(
            f"\n{result.status} after {result.iterations} iterations and {wall_seconds:.1f} s: {result.reason}"
            f"\n  {result.message}"
        )
        for name, found in (("train", train), ("validation", validation), ("test", test)):
            if found is not None:
                metric = f"{self.metric_name} {_number(found.metric, 10)}"
                missing = f"   {found.left_out} without fixed point" if found.left_out else ""
                self._print(f"  {name:<11} loss {_number(found.loss, 10)}   {metric}{missing}")
        if run_directory is not None:
            self._print(f"  files       {run_directory}")

    def _header(self, iterate: Iterate) -> str:
        fixed_point = f"{'fixed point':>15}" if iterate.fixed_point else ""
        metric = "val. " + self.metric_name.removeprefix("relative_")
        work = f"{'gradients':>11}{'products':>10}"
        return f"{'it':>6}{'seconds':>10}{'loss':>13}{'|gradient|':>12}{metric:>16}{fixed_point}{work}"

    def _line(self, iterate: Iterate, validation: Evaluation | None) -> str:
        counts = iterate.counts
        fixed_point = ""
        if iterate.fixed_point:
            found = iterate.fixed_point
            failed = f" !{found.unconverged}" if found.unconverged else ""
            fixed_point = f"{f'{found.mean_iterations:.1f}/{found.max_iterations}{failed}':>15}"
        return (
            f"{iterate.iteration:>6}{iterate.seconds:>10.1f}{_number(iterate.loss, 13)}{iterate.gradient_norm:>12.2e}"
            f"{_number(None if validation is None else validation.metric, 16)}{fixed_point}"
            f"{_samples(counts.gradients):>11}{_samples(counts.gauss_newton_products + counts.hessian_products):>10}"
        )

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(text, file=self.stream or sys.stdout, flush=True)


def _number(value: float | None, width: int) -> str:
    if value is None or math.isnan(value):
        return f"{'-':>{width}}"
    return f"{value:>{width}.6g}"


def _samples(count: int) -> str:
    """Return a count in four significant digits at most: 9999, 12k, 3.46M."""
    if count < 10_000:
        return str(count)
    for unit, name in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}" if count < 1000 * unit else f"{count // unit}{name}"
    return str(count)
