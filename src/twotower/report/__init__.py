"""The report of a comparison or of one model: a single page of HTML that needs nothing else."""

from twotower.report.page import render

__all__ = [
    "render",
]
