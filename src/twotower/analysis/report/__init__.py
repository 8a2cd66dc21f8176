"""The report of a comparison or of one model: a single self-contained HTML page."""

from twotower.analysis.report.page import render

__all__ = ["render"]
