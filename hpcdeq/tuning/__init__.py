"""Solver settings chosen by measurement on a batch of a model."""

from hpcdeq.tuning.cases import Case, fresh_case, layer_case, stiff_case, trained_case
from hpcdeq.tuning.crossover import Crossover, find_crossover, overtaking
from hpcdeq.tuning.measure import FORWARD, Measured, Measurement, Setting, Solve, measure_settings, solver_of

__all__ = [
    "FORWARD",
    "Case",
    "Crossover",
    "Measured",
    "Measurement",
    "Setting",
    "Solve",
    "find_crossover",
    "fresh_case",
    "layer_case",
    "measure_settings",
    "overtaking",
    "solver_of",
    "stiff_case",
    "trained_case",
]
