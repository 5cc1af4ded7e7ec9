"""Tables, plots and one page from result files."""

from duet_vlm.evaluation.report.write import render, write

__all__ = ["render", "write"]
