"""Fixed points of networks and their exact derivatives."""

from hpcdeq.deq.equilibrium import Help
from hpcdeq.deq.fixed_point import FixedPoint, solve_fixed_point
from hpcdeq.deq.linear import LinearSolution
from hpcdeq.deq.solution import Solution
from hpcdeq.deq.warm import Guesses, StateCache
from hpcdeq.deq.work import Work

__all__ = ["FixedPoint", "Guesses", "Help", "LinearSolution", "Solution", "StateCache", "Work", "solve_fixed_point"]
