"""The report of runs: one HTML file without external resources, readable without JavaScript, drawn from ``run.json`` alone."""

from edgecl.report.page import write_report

__all__ = ["write_report"]
