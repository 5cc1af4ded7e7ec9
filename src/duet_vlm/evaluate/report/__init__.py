"""Tables, plots and one page from result files."""

from duet_vlm.evaluate.report.write import render, write

__all__ = ["render", "write"]
