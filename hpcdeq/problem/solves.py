"""How the fixed points of a training problem were solved for, in words."""

from __future__ import annotations

from hpcdeq.problem.training import TrainingProblem


def describe_solves(problem: TrainingProblem) -> str:
    """Say how fixed points and their derivatives were solved for so far; empty without fixed points. Not collective."""
    lines = problem.guidance.describe()
    if problem.accuracy is not None and problem.accuracy.measured:
        lines.append(problem.accuracy.describe())
    return "\n".join(lines)
