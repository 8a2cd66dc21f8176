"""Tests of calibration and partition error against float64 loops and a model that is calibrated by construction."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.stand_ins import compressed
from twotower.audit import partition_error
from twotower.evaluation import calibration, softmax_calibration
from twotower.evaluation.calibration import refined_weights
from twotower.negatives import Catalog, CountedFrequency, InBatch, Pool, Sampled, Uniform
from twotower.negatives.corrections import NoCorrection


def slow_probabilities(query, items, temperature, excluded):
    logits = [sum(u * v for u, v in zip(query, item, strict=True)) / temperature for item in items]
    largest = max(value for j, value in enumerate(logits) if j not in excluded)
    weight = [0.0 if j in excluded else math.exp(value - largest) for j, value in enumerate(logits)]
    return [w / math.fsum(weight) for w in weight]


@st.composite
def problems(draw):
    n, e = draw(st.integers(2, 8)), draw(st.integers(1, 5))
    vectors = st.lists(st.floats(-2, 2), min_size=2, max_size=2)
    queries = draw(st.lists(vectors, min_size=e, max_size=e))
    items = draw(st.lists(vectors, min_size=n, max_size=n))
    item = st.integers(0, n - 1)
    targets = draw(st.lists(st.lists(item, max_size=4), min_size=e, max_size=e))
    excluded = [row[: n - 1] for row in draw(st.lists(st.lists(item, max_size=n), min_size=e, max_size=e))]
    return queries, items, targets, excluded, draw(st.sampled_from([0.5, 2.0])), draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_calibration_equals_slow_loops(problem):
    queries, items, targets, excluded, temperature, bins = problem
    wanted = [set(t) - set(x) for t, x in zip(targets, excluded, strict=True)]

    def measured():
        return softmax_calibration(
            torch.tensor(queries), torch.tensor(items), compressed(targets),
            temperature=temperature, exclude=compressed(excluded), bins=bins,
        )  # fmt: skip

    if not any(wanted):
        with pytest.raises(ValueError, match="nothing to calibrate"):
            measured()
        return
    evaluated = [e for e, left in enumerate(wanted) if left]
    # Rounded to float32, as in torch.
    rows, columns = torch.tensor(queries).double().tolist(), torch.tensor(items).double().tolist()
    p = {e: slow_probabilities(rows[e], columns, temperature, set(excluded[e])) for e in evaluated}
    found = measured()
    likelihood = np.mean([np.mean([math.log(p[e][j]) for j in wanted[e]]) for e in evaluated])
    assert found.num_queries == len(evaluated)
    assert found.log_likelihood == pytest.approx(likelihood)
    assert found.perplexity == pytest.approx(math.exp(-likelihood))
    pairs = [
        (p[e][j], 1 / len(wanted[e]) if j in wanted[e] else 0.0)
        for e in evaluated
        for j in range(len(items))
        if j not in excluded[e]
    ]
    assert sum(one.pairs for one in found.bins) == len(pairs)
    assert sum(one.targets for one in found.bins) == sum(map(len, wanted))
    assert sum(one.pairs * one.predicted for one in found.bins) == pytest.approx(len(evaluated))
    assert sum(one.pairs * one.observed for one in found.bins) == pytest.approx(len(evaluated))
    error = 0.0
    for one in found.bins:
        inside = [pair for pair in pairs if one.low * (1 - 1e-12) <= pair[0] <= one.high * (1 + 1e-12)]
        # A pair exactly between two bins is in only one of them.
        if len(inside) == one.pairs:
            assert one.predicted == pytest.approx(np.mean([x for x, _ in inside]))
            assert one.observed == pytest.approx(np.mean([y for _, y in inside]))
        error += abs(one.predicted - one.observed) * one.pairs
    assert found.expected_calibration_error == pytest.approx(error / len(evaluated))
    assert len(found.bins) <= bins
    json.dumps(found.to_dict(), allow_nan=False)


def world(seed=0, queries=4000, items=50):
    """Draw targets from the model's own softmax."""
    random = torch.Generator().manual_seed(seed)
    u, v = torch.randn(queries, 8, generator=random), torch.randn(items, 8, generator=random) * 0.8
    drawn = torch.multinomial(torch.softmax(u @ v.T, 1), 1, replacement=True, generator=random)
    return u, v, compressed(drawn.tolist())


def test_only_the_true_model_is_calibrated():
    u, v, targets = world()
    right = softmax_calibration(u, v, targets)
    # Sampling error: each of ten bins has 400 of 4,000 targets, with a standard deviation of about sqrt(400).
    assert right.expected_calibration_error < 10 * math.sqrt(400) / 4000
    for one in right.bins:
        error = math.sqrt(one.targets) / one.pairs
        assert abs(one.predicted - one.observed) < 4.5 * error
    wrong = [softmax_calibration(u, v, targets, temperature=t) for t in (0.5, 2.0)]
    for found in wrong:
        assert found.expected_calibration_error > 3 * right.expected_calibration_error
        assert found.perplexity > right.perplexity
    # Overconfident: its most likely items occur less often than predicted.
    assert wrong[0].bins[-1].observed < wrong[0].bins[-1].predicted
    assert wrong[1].bins[-1].observed > wrong[1].bins[-1].predicted
    # A constant per query changes nothing: scores are compared within a query.
    shifted = softmax_calibration(
        torch.cat([u, 5 * torch.ones(4000, 1)], 1), torch.cat([v, torch.ones(50, 1)], 1), targets
    )
    assert shifted.log_likelihood == pytest.approx(right.log_likelihood)


def test_uniform_predictions():
    found = softmax_calibration(torch.zeros(3, 2), torch.rand(8, 2), compressed([[0], [1, 2], []]))
    assert found.perplexity == pytest.approx(8) and found.num_queries == 2
    assert len(found.bins) == 1 and found.bins[0].pairs == 16
    assert found.expected_calibration_error == pytest.approx(0)


def test_calibration_does_not_depend_on_blocks(monkeypatch):
    u, v, targets = world(queries=300)
    whole = softmax_calibration(u, v, targets)
    monkeypatch.setattr(calibration, "_BLOCK", 700)
    split = softmax_calibration(u, v, targets)
    assert split.log_likelihood == pytest.approx(whole.log_likelihood)
    assert split.expected_calibration_error == pytest.approx(whole.expected_calibration_error)


def test_calibration_settings_are_checked():
    u, v, targets = world(queries=5)
    for call, message in [
        (lambda: softmax_calibration(u, v, targets, bins=0), "bins"),
        (lambda: softmax_calibration(u[:3], v, targets), "offsets"),
        (lambda: softmax_calibration(u, v[:1], (targets[0], targets[1] + 50)), "item codes"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


COUNTS = torch.tensor([40, 20, 10, 5, 5, 3, 2, 1, 1, 1])


def batch(seed=0, rows=6):
    random = torch.Generator().manual_seed(seed)
    u, v = torch.randn(rows, 4, generator=random), torch.randn(len(COUNTS), 4, generator=random)
    return u, v, torch.multinomial(COUNTS.double(), rows, replacement=True, generator=random)


def test_the_full_catalog_has_no_error():
    u, v, positives = batch()
    found = partition_error(u, v, positives, Pool(Catalog(len(COUNTS))), temperature=0.3)
    np.testing.assert_allclose(found.per_row_mean, 0.0, atol=1e-6)
    assert abs(found.mean) < 1e-6 and found.std < 1e-6 and np.isnan(found.per_row_std).all()


def test_the_error_equals_a_loop_and_its_estimate_is_unbiased():
    u, v, positives = batch()
    pool = Pool(Sampled(Uniform(len(COUNTS)), 5))
    draws, temperature = 500, 0.7
    found = partition_error(
        u, v, positives, pool, temperature=temperature, draws=draws, generator=torch.Generator().manual_seed(1)
    )
    random, rows = torch.Generator().manual_seed(1), []
    scores = (u.double() @ v.double().T / temperature).tolist()
    for _ in range(draws):
        drawn = torch.randint(len(COUNTS), (5,), generator=random).tolist()  # what the proposal draws
        rows.append([
            math.log(
                math.exp(row[y]) + math.fsum(math.exp(row[j]) / (5 / len(COUNTS)) for j in drawn if j != y)
            ) - math.log(math.fsum(map(math.exp, row)))
            for row, y in zip(scores, positives.tolist(), strict=True)
        ])  # fmt: skip
    rows = np.array(rows)
    np.testing.assert_allclose(found.per_row_mean, rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.per_row_std, rows.std(axis=0, ddof=1), atol=1e-6)
    assert found.mean == pytest.approx(rows.mean(), abs=1e-6) and found.std == pytest.approx(rows.std(), abs=1e-6)
    # Z_hat / Z has mean 1; the mean of its log is below 0.
    ratio = np.exp(rows)
    assert (np.abs(ratio.mean(axis=0) - 1) < 4 * ratio.std(axis=0) / math.sqrt(draws)).all()
    assert found.mean < 0
    json.dumps(found.to_dict(), allow_nan=False)


def test_more_candidates_err_less_and_no_correction_errs_more():
    u, v, positives = batch(rows=32)
    frequency = CountedFrequency(COUNTS)

    def error(*sources, correction=None):
        pool = Pool(*sources, correction=correction)
        return partition_error(u, v, positives, pool, draws=100, generator=torch.Generator().manual_seed(2))

    few, many = (error(Sampled(Uniform(len(COUNTS)), size)) for size in (4, 64))
    assert many.std < few.std / 2 and abs(many.mean) < abs(few.mean) / 4
    mixed = error(InBatch(frequency), Sampled(Uniform(len(COUNTS)), 64))
    without = error(InBatch(frequency), Sampled(Uniform(len(COUNTS)), 64), correction=NoCorrection())
    assert abs(without.mean) > 1 > 10 * abs(mixed.mean)


def test_per_row_candidates_and_the_mode_of_the_pool():
    u, v, positives = batch()
    pool = Pool(Sampled(Uniform(len(COUNTS)), 400, per_row=True))
    found = partition_error(u, v, positives, pool, draws=20, generator=torch.Generator().manual_seed(3))
    assert pool.training and abs(found.mean) < 0.05
    with pytest.raises(ValueError, match="at least 1 draw"):
        partition_error(u, v, positives, pool, draws=0)


def test_refined_weights_equal_a_loop():
    rng = np.random.default_rng(0)
    queries, items = torch.tensor(rng.normal(size=(5, 3))), torch.tensor(rng.normal(size=(7, 3)))
    targets = np.array([0, 2, 2, 3, 5, 6]), np.array([4, 1, 6, 0, 3, 2])
    seen = np.array([0, 1, 1, 1, 2, 4]), np.array([5, 3, 0, 1])
    query, item, weight = refined_weights(queries, items, targets, temperature=0.5, exclude=seen)
    expected = []
    for row in range(5):
        left_out = set(seen[1][seen[0][row] : seen[0][row + 1]].tolist())
        scores = {j: math.exp(float(queries[row] @ items[j]) / 0.5) for j in range(7) if j not in left_out}
        own = sorted(set(targets[1][targets[0][row] : targets[0][row + 1]].tolist()) - left_out)
        expected += [(row, y, 1 - scores[y] / sum(scores.values())) for y in own]
    assert len(expected) == 5, "one target is in the history"
    assert list(zip(query.tolist(), item.tolist(), strict=True)) == [pair[:2] for pair in expected]
    np.testing.assert_allclose(weight, [pair[2] for pair in expected], rtol=1e-12)
