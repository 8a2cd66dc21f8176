"""Tests of the reference study: coverage of all objectives, and in a slow test the claimed bounds."""

import json

import pytest
from reference_study.forms import FORMS, build_form
from reference_study.study import study

from twotower.audit.gradients import estimates_softmax
from twotower.objectives.build import OBJECTIVES


def test_every_softmax_objective_is_in_the_study(planted_split):
    named = {form.objective for form in FORMS}
    for form in FORMS:
        assert estimates_softmax(build_form(form, planted_split.train)), form.name
    others = set(OBJECTIVES) - named
    assert others == {
        "negative-sampling", "logistic-observed", "logistic-popular", "sampled-logistic", "nce", "gbce", "bpr",
    }  # fmt: skip


@pytest.mark.slow
def test_the_claims_hold():
    found = study(draws=1500)
    json.dumps(found.to_dict())
    for row in found.forms:
        assert row.within == row.claims_unbiased, row
        assert row.noise < 0.006 or not row.claims_unbiased, row
        assert row.claims_unbiased or row.corrected > 5 * row.bound, row
    cells = {(row.name, row.catalog, row.equal): row for row in found.pools}
    # At equal draws, if the head has half of the mass: 1.3 times less spread than in-batch candidates.
    for catalog in [(1.0, 1.0), (1.0, 2.0)]:
        row = cells["head + frequency", catalog, None]
        assert row.head_mass > 0.45
        assert row.gain + row.gain_error >= 1.3, row
    assert cells["head + frequency", (1.0, 1.0), None].gain > 1.3
    # No pool is best on every catalog at equal numbers of distinct candidates.
    for name in {row.name for row in found.pools} - {"in-batch"}:
        verdicts = {row.verdict for row in found.pools if row.name == name and row.equal is not None}
        assert verdicts != {"better"}, name
    for row in found.pools:
        if row.equal is not None:
            assert abs(row.distinct - row.equal) < 4, row
            if row.verdict == "better":
                assert row.gain > 1 + 2 * row.gain_error
