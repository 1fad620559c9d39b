"""Fixed points of networks and their exact derivatives."""

from hpcdeq.deq.equilibrium import Help
from hpcdeq.deq.fixed_point import FixedPoint, solve_fixed_point
from hpcdeq.deq.linear import LinearSolution
from hpcdeq.deq.penalty import jacobian_penalty
from hpcdeq.deq.solution import Solution
from hpcdeq.deq.spectrum import contraction, spectral_radius
from hpcdeq.deq.warm import Guesses, StateCache
from hpcdeq.deq.work import Work

__all__ = [
    "FixedPoint",
    "Guesses",
    "Help",
    "LinearSolution",
    "Solution",
    "StateCache",
    "Work",
    "contraction",
    "jacobian_penalty",
    "solve_fixed_point",
    "spectral_radius",
]
