"""The report of a comparison or of one model: a single page of HTML that needs nothing else."""

from twotower.report.page import render
from twotower.report.study import render_study

__all__ = [
    "render",
    "render_study",
]
