"""Fixed points of networks and their exact derivatives."""

from hpcdeq.deq.fixed_point import FixedPoint, solve_fixed_point
from hpcdeq.deq.linear import LinearSolution
from hpcdeq.deq.solution import Solution
from hpcdeq.deq.work import Work

__all__ = ["FixedPoint", "LinearSolution", "Solution", "Work", "solve_fixed_point"]
