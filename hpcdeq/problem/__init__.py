"""A training task as an optimisation problem: loss, gradient and curvature products over MPI."""

from hpcdeq.problem.least_squares import LeastSquares
from hpcdeq.problem.losses import LOSSES, CrossEntropy, Loss, MeanSquare
from hpcdeq.problem.parameters import ParameterLayout
from hpcdeq.problem.solves import describe_solves
from hpcdeq.problem.training import TrainingProblem

__all__ = [
    "LOSSES",
    "CrossEntropy",
    "LeastSquares",
    "Loss",
    "MeanSquare",
    "ParameterLayout",
    "TrainingProblem",
    "describe_solves",
]
