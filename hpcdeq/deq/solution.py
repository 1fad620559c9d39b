"""What a forward solve returns, and how it says that it failed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from hpcdeq.petsc.solves import SolveRecord

Trail = list[tuple[float, float, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Solution:
    """A fixed point and how it was found.

    Attributes
    ----------
    value
        z, in the shape of the state.
    reason
        PETSc's name of the reason why the solver stopped.
    iterations
        ``(B,)`` iterations after which each sample had converged for good.
    residual
        ``(B,)`` true residual norms ‖f(z_i) - z_i‖, computed afresh at ``value``.
    converged
        ``(B,)`` whether each sample's residual satisfies the tolerance.
    evaluations
        Evaluations of the cell, a sample in the mean.
    record
        PETSc's record of the solve.
    trail
        Per iteration: evaluations so far (a sample in the mean), seconds, norms of f(z_i) - z_i and of f(z_i) of the
        samples at work.
    attempts
        What was tried, one line a solver: more than one where the first failed and a fallback went on.
    """

    value: Tensor
    reason: str
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    evaluations: float
    record: SolveRecord
    trail: Trail = field(default_factory=list, repr=False)
    attempts: list[str] = field(default_factory=list)

    @property
    def history(self) -> list[tuple[float, float, float]]:
        """Per iteration: evaluations so far (a sample in the mean), seconds, largest ‖f(z_i) - z_i‖ / ‖f(z_i)‖."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return [(e, s, float(np.where(r == 0, 0.0, r / size).max())) for e, s, r, size in self.trail]


def explain(solution: Solution) -> str:
    """Say which samples did not converge, why, and what to type. Not collective."""
    count = len(solution.converged)
    bad = (~solution.converged).nonzero().flatten().tolist() or list(range(count))
    worst = max(bad, key=lambda i: float(solution.residual[i].nan_to_num(float("inf"), float("inf"))))
    record = solution.record
    named = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
    reason = record.reason if not record.converged else f"{record.reason}, but the residual says otherwise"
    tried = "".join(f"\nTried: {line}." for line in solution.attempts) if len(solution.attempts) > 1 else ""
    return (
        f"fixed point of {len(bad)} of {count} samples (sample {named}) not reached by {record.solver}: {reason}"
        f" after {record.iterations} iterations, ||f(z) - z|| = {float(solution.residual[worst]):.3g} in sample {worst}."
        f"{tried}\n"
        f"Likely fix: {record.remedy()}.\n"
        f"History: add -{record.prefix}snes_monitor -{record.prefix}snes_converged_reason."
    )
