"""The report of a comparison or of one model: a single, self-contained HTML page."""

from twotower.report.page import render
from twotower.report.study import render_study

__all__ = [
    "render",
    "render_study",
]
