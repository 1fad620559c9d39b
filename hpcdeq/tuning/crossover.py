"""Where a longer window of Anderson mixing stops paying, and where mixing overtakes forward iteration.

A vector more in the window costs time in every iteration (the mixing penalty: Gram matrix, small solve, the combination)
and saves fewer and fewer iterations. The crossover is the window where the one outweighs the other. In a diagram of
residual against time, the penalty also shows as the point up to which forward iteration is ahead (Anderson extrapolation
on GPUs, arXiv 2410.19460).
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcdeq.errors import ConvergenceError
from hpcdeq.tuning.measure import FORWARD, Measured, Measurement, Solve


@dataclass(frozen=True)
class Crossover:
    """What was found.

    Attributes
    ----------
    best
        The setting with the least median time among the finalists.
    forward
        Forward iteration.
    family
        Every window measured with the best's mixing that converges, shortest first.
    longer
        The next longer window of them; None where the best is the longest.
    failed
        Longer windows with the best's mixing that do not converge.
    overtaking
        Seconds and residual from which on the best is ahead of forward iteration; None where it never is for good.
    clock
        ``wall`` or ``cpu``: what seconds are of.
    """

    best: Measured
    forward: Measured
    family: tuple[Measured, ...]
    longer: Measured | None
    failed: tuple[int, ...]
    overtaking: tuple[float, float] | None
    clock: str

    @property
    def speedup(self) -> float | None:
        """Time of forward iteration over that of the best; None where forward iteration does not converge."""
        return self.forward.seconds / self.best.seconds if self.forward.converged else None


def find_crossover(measurement: Measurement, tolerance: float) -> Crossover:
    """Choose the best setting and say what a longer window would do.

    Not collective.

    Parameters
    ----------
    measurement
        As `measure_settings` returns it.
    tolerance
        That the solves were to reach.

    Raises
    ------
    ConvergenceError
        No setting reached the tolerance.
    """
    measured = measurement.entries
    finalists = [entry for entry in measured if entry.finalist]
    forward = next(entry for entry in measured if entry.setting == FORWARD)
    if not finalists:
        nearest = min(measured, key=lambda entry: _or_infinite(entry.solves[0].residual))
        raise ConvergenceError(
            f"no setting reached the tolerance {tolerance:g}; {nearest.setting} came nearest: largest relative residual"
            f" {nearest.solves[0].residual:.2g} after {nearest.solves[0].iterations} iterations"
            f" ({nearest.solves[0].reason}).\nLikely fix: a larger --tolerance (float32 reaches about 1e-5), longer --windows,"
            " or more iterations (-deq_snes_max_it 2000)."
        )
    best = min(finalists, key=lambda entry: entry.seconds)
    same = sorted((e for e in measured if e.setting.mixing == best.setting.mixing), key=lambda e: e.setting)
    family = tuple(entry for entry in same if entry.converged)
    beyond = [entry for entry in same if entry.setting > best.setting]
    longer = next((entry for entry in beyond if entry.converged), None)
    failed = tuple(entry.setting.window for entry in beyond if not entry.converged)
    ahead = None if best is forward else overtaking(best.typical, forward.typical)
    return Crossover(best, forward, family, longer, failed, ahead, measurement.clock)


def _or_infinite(residual: float) -> float:
    return residual if residual == residual else float("inf")


def overtaking(solve: Solve, other: Solve) -> tuple[float, float] | None:
    """Return seconds and residual of the first iterate from which on a solve is ahead of another at equal time.

    Not collective. Ahead: a smaller residual than the other's latest at that moment. None where it is not at the end.
    """
    ahead: tuple[float, float] | None = None
    place = 0
    for _, seconds, residual in solve.history:
        while place + 1 < len(other.history) and other.history[place + 1][1] <= seconds:
            place += 1
        known = bool(other.history) and other.history[place][1] <= seconds
        if known and not residual < other.history[place][2]:
            ahead = None
        elif ahead is None:
            ahead = (seconds, residual)
    return ahead
