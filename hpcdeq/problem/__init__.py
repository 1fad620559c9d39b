"""A training task as an optimisation problem: loss, gradient and curvature products over MPI."""

from hpcdeq.problem.least_squares import LeastSquares
from hpcdeq.problem.losses import LOSSES, CrossEntropy, Loss, MeanSquare
from hpcdeq.problem.parameters import ParameterLayout
from hpcdeq.problem.phases import Phases
from hpcdeq.problem.rebalancing import Rebalancing
from hpcdeq.problem.solves import describe_solves
from hpcdeq.problem.terms import L1, L2, JacobianPenalty, SampleTerm, WeightTerm
from hpcdeq.problem.training import TrainingProblem

__all__ = [
    "LOSSES",
    "L1",
    "L2",
    "CrossEntropy",
    "JacobianPenalty",
    "LeastSquares",
    "Loss",
    "MeanSquare",
    "ParameterLayout",
    "Phases",
    "Rebalancing",
    "SampleTerm",
    "TrainingProblem",
    "WeightTerm",
    "describe_solves",
]
