"""Feedback in real steps: the reweighted softmax in every pool, and the losses on slates, in all kinds of batches.

As `test_conformance.py`: the candidates and gradients of training steps against float64 sums over the catalog.
"""

import pytest

from integration.test_conformance import FEW, faults, measured
from support.conformance import Cell

FORMS = ("softmax", "logistic", "pairwise")
GATE = [
    Cell("catalog", feedback="softmax"),
    Cell("in-batch + uniform", known=True, duplicates="unique", feedback="softmax"),
    Cell("in-batch + uniform", batches="whole sequences", known=True, duplicates="unique", feedback="logistic"),
    Cell("in-batch + uniform", batches="horizon questions", known=True, feedback="pairwise"),
]
MORE = [
    *(
        Cell(sources, known=known, duplicates=duplicates, feedback="softmax")
        for sources in (
            "uniform",
            "uniform per row",
            "frequency^0.75",
            "log-uniform",
            "head + frequency^0.75",
            "in-batch",
            "memory",
            "in-batch + memory + uniform",
            "head + in-batch + uniform",
            "observed + in-batch + uniform",
            "mined + in-batch + uniform",
            "in-batch + uniform per row",
        )
        for known, duplicates in ((False, "kept"), (True, "unique"))
    ),
    *(
        Cell("in-batch + uniform", frequency, batches, known=True, feedback=form)
        for form in FORMS
        for frequency, batches in (
            ("counted", "rows on 2 ranks"),
            ("counted", "rows in blocks of 9"),
            ("counted", "rows of a continued model"),
            ("counted", "whole sequences"),
            ("counted", "whole sequences on 2 ranks"),
            ("counted", "horizon questions"),
            ("counted", "set questions"),
            ("grouped", "rows within groups"),
        )
    ),
    *(Cell("catalog", batches=batches, feedback=form) for form in FORMS for batches in ("rows", "set questions")),
]


def name(cell):
    return f"{cell.feedback}-{cell.sources}-{cell.frequency}-{cell.batches}-{cell.known}-{cell.duplicates}"


@pytest.mark.parametrize("cell", GATE, ids=name)
def test_steps_with_feedback_have_the_defined_target(cell):
    assert faults(measured(cell, FEW), 0.0) == []


@pytest.mark.slow
@pytest.mark.parametrize("cell", MORE, ids=name)
def test_feedback_in_every_pool_and_every_kind_of_batch(cell):
    assert faults(measured(cell, 2 * FEW), 0.0) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_measurement_finds_a_slate_that_counts_wrongly(form):
    """Half of the weight."""

    def halve(objective):
        objective.feedback.weight = 1.5

    assert faults(measured(Cell("catalog", feedback=form), FEW, change=halve), 0.0) != []
