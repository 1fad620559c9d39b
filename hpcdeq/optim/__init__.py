"""Optimisers of a `TrainingProblem`: TAO's, and Adam beside them under the same interface."""

from hpcdeq.optim.base import Iterate, Result
from hpcdeq.optim.minimize import METHODS, minimize, resolved_options

__all__ = ["METHODS", "Iterate", "Result", "minimize", "resolved_options"]
