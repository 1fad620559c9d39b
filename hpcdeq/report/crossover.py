"""What a study of Anderson's window and mixing found, as table and text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hpcdeq.report.tables import Row
from hpcdeq.tuning import Crossover, Measured

SHOWN = 12  # settings in the printed table; the file has all


def crossover_rows(measured: Iterable[Measured], found: Crossover) -> list[Row]:
    """Return a row for each setting, in the given order; None for what was not reached.

    Not collective. ``times_forward`` is the time of forward iteration over that of the setting.
    """
    rows: list[Row] = []
    for entry in measured:
        seconds = [solve.seconds for solve in entry.solves]
        done = entry.converged
        rows.append(
            {
                "window": entry.setting.window,
                "mixing": entry.setting.mixing,
                "method": "forward" if entry.setting.window == 0 else "anderson",
                "best": int(entry is found.best),
                "converged": int(done),
                "reason": entry.solves[0].reason,
                "solves": len(seconds),
                "clock": found.clock,
                "seconds_median": entry.seconds if done else None,
                "seconds_min": min(seconds) if done else None,
                "seconds_max": max(seconds) if done else None,
                "times_forward": found.forward.seconds / entry.seconds if done and found.forward.converged else None,
                "evaluations": entry.evaluations,
                "iterations_max": entry.solves[0].iterations,
                "seconds_per_evaluation": entry.seconds_per_evaluation,
                "residual": entry.solves[0].residual,
            }
        )
    return rows


def residual_rows(measured: Iterable[Measured]) -> list[Row]:
    """Return the residuals of each setting's typical solve, a row for each iteration. Not collective."""
    return [
        {
            "window": entry.setting.window,
            "mixing": entry.setting.mixing,
            "evaluations": evaluations,
            "seconds": seconds,
            "residual": residual,
        }
        for entry in measured
        for evaluations, seconds, residual in entry.typical.history
    ]


def crossover_text(measured: Sequence[Measured], found: Crossover) -> str:
    """Return the table for a terminal, best first, and what it says. Not collective."""
    header = (
        "window",
        "mixing",
        "CPU seconds" if found.clock == "cpu" else "seconds",
        "× forward",
        "evaluations",
        "ms/evaluation",
        "solves",
    )
    chosen = [entry for entry in measured if entry.converged]
    shown = [e for place, e in enumerate(chosen) if place < SHOWN or e is found.best or e is found.forward]
    lines = [header, *(_cells(entry, found) for entry in shown)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if len(shown) < len(chosen):
        table.append(f"and {len(chosen) - len(shown)} slower ones")
    failed = [entry for entry in measured if not entry.converged]
    if failed:
        told = "; ".join(f"{entry.setting} ({entry.solves[0].reason})" for entry in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        table.append(f"not converged: {told}{more}")
    return "\n".join([*table, "", *conclusions(found)])


def _cells(entry: Measured, found: Crossover) -> tuple[str, ...]:
    times = f"{found.forward.seconds / entry.seconds:.2f}" if found.forward.converged else "–"
    return (
        "forward" if entry.setting.window == 0 else str(entry.setting.window),
        f"{entry.setting.mixing:g}",
        f"{entry.seconds:.4g}",
        times,
        f"{entry.evaluations:.1f}",
        f"{1e3 * entry.seconds_per_evaluation:.3g}",
        str(len(entry.solves)),
    )


def conclusions(found: Crossover) -> list[str]:
    """Return what the measurement says, a sentence a line. Not collective."""
    best, forward, longer = found.best, found.forward, found.longer
    if best is forward:
        return [f"best: forward iteration, {forward.seconds:.4g} s: no window pays for itself here"]
    against = "forward iteration does not converge here"
    if found.speedup is not None:
        against = f"{found.speedup:.2f} times as fast as forward iteration ({forward.seconds:.4g} s)"
    lines = [f"best: {best.setting}, {best.seconds:.4g} s, {against}"]
    if longer is None and found.failed:
        windows = ", ".join(map(str, found.failed))
        lines.append(
            f"crossover: at window {best.setting.window}; with this mixing, windows of {windows} do not converge"
        )
    elif longer is None:
        lines.append("crossover: not reached, the best window is the longest that was tried; try longer --windows")
    else:
        saved = 1.0 - longer.evaluations / best.evaluations
        dearer = longer.seconds_per_evaluation / best.seconds_per_evaluation - 1.0
        lines.append(
            f"crossover: at window {best.setting.window}. A window of {longer.setting.window}"
            f" {'saves' if saved >= 0 else 'adds'} {abs(saved):.1%} of the evaluations, and one of its evaluations takes"
            f" {abs(dearer):.1%} {'more' if dearer >= 0 else 'less'} time"
        )
    if found.overtaking is None:
        lines.append("forward iteration is ahead of it at any time")
    else:
        seconds, residual = found.overtaking
        lines.append(f"ahead of forward iteration from {seconds:.3g} s and a residual of {residual:.2g} on")
    return lines
