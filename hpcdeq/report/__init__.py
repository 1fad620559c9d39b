"""Run directories read back, and measurements: comparison tables and figures."""

from hpcdeq.report.crossover import crossover_rows, crossover_text, residual_rows
from hpcdeq.report.crossover_figure import write_crossover_figure
from hpcdeq.report.plots import write_figures
from hpcdeq.report.runs import Run, read_run
from hpcdeq.report.tables import comparison_table, to_csv, to_markdown

__all__ = [
    "Run",
    "comparison_table",
    "crossover_rows",
    "crossover_text",
    "read_run",
    "residual_rows",
    "to_csv",
    "to_markdown",
    "write_crossover_figure",
    "write_figures",
]
