"""Run directories read back, and measurements: comparison tables and figures."""

from hpcdeq.report.comparison import Comparison, Method, Trial, best_of
from hpcdeq.report.comparison_report import write_comparison
from hpcdeq.report.crossover import crossover_rows, crossover_text, residual_rows
from hpcdeq.report.crossover_figure import write_crossover_figure
from hpcdeq.report.grouping import flat, group_runs
from hpcdeq.report.plots import write_figures
from hpcdeq.report.runs import Run, read_run
from hpcdeq.report.tables import comparison_table, to_csv, to_markdown

__all__ = [
    "Comparison",
    "Method",
    "Run",
    "Trial",
    "best_of",
    "comparison_table",
    "crossover_rows",
    "crossover_text",
    "flat",
    "group_runs",
    "read_run",
    "residual_rows",
    "to_csv",
    "to_markdown",
    "write_comparison",
    "write_crossover_figure",
    "write_figures",
]
