"""Run directories read back: comparison tables and figures."""

from hpcdeq.report.plots import write_figures
from hpcdeq.report.runs import Run, read_run
from hpcdeq.report.tables import comparison_table, to_csv, to_markdown

__all__ = ["Run", "comparison_table", "read_run", "to_csv", "to_markdown", "write_figures"]
