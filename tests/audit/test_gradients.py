"""Tests of the gradient measurement, against the enumeration of every possible batch of a tiny catalog."""

import itertools
import math

import polars as pl
import pytest
import torch
from reference_study.catalogs import random_batches

from twotower.audit import AuditedRows, measure
from twotower.data import Interactions, KnownPositives
from twotower.errors import InputError
from twotower.negatives import Catalog, CountedFrequency, Head, InBatch, Pool, Sampled, Uniform, corrections
from twotower.objectives import BPR, Logistic, PositiveCorrectedSoftmax, RefinedLogQ, SampledSoftmax

COUNTS = [5, 3, 1, 1]
LOGITS = [0.3, -0.4, 1.1, 0.2]
POSITIVE = 1


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def exact_gradient(logits, positive):
    return [p - (j == positive) for j, p in enumerate(softmax(logits))]


def enumerated(draws, kappa):
    """Compute E[g_hat] and E||g_hat - E g_hat||^2 over every tuple of other rows, in plain Python."""
    p = [c / sum(COUNTS) for c in COUNTS]
    mean, square = [0.0] * len(p), 0.0
    for others in itertools.product(range(len(p)), repeat=draws):
        probability = math.prod(p[j] for j in others)
        negatives = [j for j in others if j != POSITIVE]
        weights = [math.exp(LOGITS[POSITIVE])] + [math.exp(LOGITS[j]) / kappa(j) for j in negatives]
        gradient = [0.0] * len(p)
        gradient[POSITIVE] = weights[0] / sum(weights) - 1.0
        for j, weight in zip(negatives, weights[1:], strict=True):
            gradient[j] += weight / sum(weights)
        mean = [m + probability * g for m, g in zip(mean, gradient, strict=True)]
        square += probability * sum(g * g for g in gradient)
    return mean, square - sum(m * m for m in mean)


def tiny(objective, draws, batch_size, positive=POSITIVE):
    rows = AuditedRows(torch.tensor([LOGITS, LOGITS], dtype=torch.float64), torch.tensor([positive, positive]))
    generator = torch.Generator().manual_seed(0)
    batches = random_batches(torch.tensor(COUNTS), batch_size, generator)
    return measure(objective, rows, batches, draws=draws, generator=generator)


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("correct", [True, False])
def test_bias_and_spread_equal_the_enumeration(batch_size, correct):
    p = [c / sum(COUNTS) for c in COUNTS]
    kappa = (lambda j: (batch_size - 1) * p[j]) if correct else (lambda j: 1.0)
    mean, variance = enumerated(batch_size - 1, kappa)
    exact = exact_gradient(LOGITS, POSITIVE)
    norm = math.sqrt(sum(g * g for g in exact))
    bias = math.sqrt(sum((m - g) ** 2 for m, g in zip(mean, exact, strict=True))) / norm
    correction = None if correct else corrections.NoCorrection()
    found = tiny(
        SampledSoftmax(Pool(InBatch(CountedFrequency(torch.tensor(COUNTS))), correction=correction)), 700, batch_size
    )
    value, error = found.corrected_bias()
    assert abs(value - bias) < 3 * max(error, float(found.noise.max())), (value, bias, error)
    assert bias > 0.05, "without a bias the comparison would test nothing"
    torch.testing.assert_close(found.spread, torch.full((2,), math.sqrt(variance) / norm).double(), rtol=0.05, atol=0)


def test_the_enumeration_distinguishes_right_from_wrong():
    p = [c / sum(COUNTS) for c in COUNTS]
    right, _ = enumerated(7, lambda j: 7 * p[j])
    wrong, _ = enumerated(7, lambda j: 1.0)
    exact = exact_gradient(LOGITS, POSITIVE)
    distance = [math.dist(one, exact) for one in (right, wrong)]
    assert distance[0] < 0.5 * distance[1]


def test_full_softmax_has_neither_bias_nor_spread():
    found = tiny(SampledSoftmax(Pool(Catalog(4))), 3, 5)
    assert float(found.bias.max()) < 1e-12 and float(found.spread.max()) < 1e-6
    assert found.distinct.tolist() == [3.0, 3.0]
    weights = [math.exp(LOGITS[j]) for j in (0, 2, 3)]
    assert float(found.effective[0]) == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights))


def test_known_positives_are_excluded_from_the_target():
    known = (torch.tensor([0]), torch.tensor([2]))
    logits = torch.tensor([LOGITS], dtype=torch.float64)
    rows = AuditedRows(logits, torch.tensor([POSITIVE]), torch.tensor([0]), known=known)
    probability = softmax([LOGITS[j] for j in (0, 1, 3)])
    expected = torch.tensor([probability[0], probability[1] - 1.0, 0.0, probability[2]], dtype=torch.float64)
    torch.testing.assert_close(rows.exact_gradient()[0], expected)
    batches = random_batches(torch.tensor(COUNTS), 2, torch.Generator())
    of_query = KnownPositives(
        Interactions.from_frame(pl.DataFrame({"query_id": [0, 0, 1, 1], "item_id": [1, 2, 0, 3]}))
    )
    found = measure(SampledSoftmax(Pool(Catalog(4))), rows, batches, draws=2, known_positives=of_query)
    assert float(found.bias.max()) < 1e-12
    assert float(measure(SampledSoftmax(Pool(Catalog(4))), rows, batches, draws=2).bias.max()) > 0.1


def study_rows(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 0.5 * counts.double().log() + torch.randn(1, len(counts), generator=generator, dtype=torch.float64)
    logits = logits.repeat(2, 1)
    positives = torch.tensor([2, 150])
    rows = torch.arange(2)
    logits[rows, positives] = -torch.inf
    logits[rows, positives] = torch.logsumexp(logits, 1)
    return AuditedRows(logits, positives)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_pools_with_head_and_row_candidates_are_unbiased(unique, per_row):
    counts = torch.arange(200, 0, -1)
    pool = Pool(
        InBatch(CountedFrequency(counts)),
        Sampled(Uniform(200), 40, per_row=per_row),
        Head(counts, 10),
        unique=unique,
    )
    generator = torch.Generator().manual_seed(1)
    found = measure(SampledSoftmax(pool), study_rows(counts), random_batches(counts, 64, generator), draws=300)
    assert found.corrected_bias()[0] < 0.03
    assert float(found.noise.max()) < 0.02
    assert float(found.spread.min()) > 0.01


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda f: SampledSoftmax(Pool(InBatch(f), correction=corrections.NoCorrection())), 0.1),
        (lambda f: PositiveCorrectedSoftmax(Pool(InBatch(f), correction=corrections.Probability())), 0.3),
        (lambda f: SampledSoftmax(Pool(InBatch(f), correction=corrections.Probability())), 0.9),
    ],
    ids=["in-batch", "in-batch-logq-all", "in-batch-logq"],
)
def test_biased_forms_are_measured_as_biased(make, least):
    counts = torch.arange(200, 0, -1)
    generator = torch.Generator().manual_seed(1)
    found = measure(
        make(CountedFrequency(counts)), study_rows(counts), random_batches(counts, 64, generator), draws=100
    )
    value, _ = found.corrected_bias()
    assert value > least and value > 5 * float(found.noise.max())


def test_the_refined_form_is_unbiased():
    counts = torch.arange(200, 0, -1)
    generator = torch.Generator().manual_seed(1)
    objective = RefinedLogQ(Pool(InBatch(CountedFrequency(counts)), correction=corrections.Probability()))
    found = measure(objective, study_rows(counts), random_batches(counts, 64, generator), draws=400)
    assert found.corrected_bias()[0] < 0.03


@pytest.mark.slow
def test_the_refined_weight_equals_the_enumeration():
    """Enumerate the other row of a batch of two: 1 - P_hat(y) with q of the batch, and 0 if no candidate is left."""
    p = [c / sum(COUNTS) for c in COUNTS]
    expected = 0.0
    for j, logit in enumerate(LOGITS):
        if j != POSITIVE:
            rest = math.exp(logit) * (1 - p[POSITIVE]) / p[j]
            expected += p[j] * rest / (math.exp(LOGITS[POSITIVE]) + rest)
    pool = Pool(InBatch(CountedFrequency(torch.tensor(COUNTS))), correction=corrections.Probability())
    found = tiny(RefinedLogQ(pool), 2000, 2)
    assert found.mean("weight") == pytest.approx(expected, abs=0.03) and expected > 0.5
    assert tiny(SampledSoftmax(pool), 2, 2).weight is None


@pytest.mark.slow
def test_the_partition_sum_is_right_however_few_the_candidates_are():
    counts = CountedFrequency(torch.tensor(COUNTS), replacement=True)
    found = tiny(SampledSoftmax(Pool(InBatch(counts))), 1500, 2)
    value, error = found.mean_partition()
    assert found.corrected_bias()[0] > 0.05, "one candidate has a bias of 1/n"
    assert abs(value - 1) < 4 * error < 0.2
    none = tiny(SampledSoftmax(Pool(InBatch(counts), correction=corrections.NoCorrection())), 1500, 4)
    value, error = none.mean_partition()
    assert abs(value - 1) > 8 * error


@pytest.mark.slow
def test_rows_of_a_question_share_their_candidates():
    """The spread of a question is that of the sum of its rows; of independent rows it would be smaller."""
    logits = torch.tensor([LOGITS] * 4, dtype=torch.float64)
    positives, weights = torch.tensor([1, 2, 1, 3]), torch.tensor([1.0, 3.0, 1.0, 1.0])
    alone = AuditedRows(logits, positives)
    together = AuditedRows(logits, positives, questions=torch.tensor([0, 0, 1, 1]), weights=weights)
    pool = Pool(Sampled(Uniform(4), 3))
    batches = itertools.repeat(next(random_batches(torch.tensor(COUNTS), 2, torch.Generator())))
    found = measure(SampledSoftmax(pool), together, batches, draws=1500, generator=torch.Generator().manual_seed(0))
    single = measure(SampledSoftmax(pool), alone, batches, draws=1500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.spread, single.spread, rtol=0.1, atol=0)
    # By enumeration: the mean and the variance of 1/4 g_1 + 3/4 g_2 over all draws of three items.
    mean, square = torch.zeros(4, dtype=torch.float64), 0.0
    exact = sum(w * torch.tensor(exact_gradient(LOGITS, y)).double() for w, y in ((0.25, 1), (0.75, 2)))
    for drawn in itertools.product(range(4), repeat=3):
        gradient = torch.zeros(4, dtype=torch.float64)
        for share, y in ((0.25, 1), (0.75, 2)):
            negatives = [j for j in drawn if j != y]
            each = [math.exp(LOGITS[y])] + [math.exp(LOGITS[j]) * 4 / 3 for j in negatives]
            gradient[y] += share * (each[0] / sum(each) - 1)
            for j, weight in zip(negatives, each[1:], strict=True):
                gradient[j] += share * weight / sum(each)
        mean, square = mean + gradient / 64, square + float(gradient @ gradient) / 64
    assert found.together is not None
    spread = math.sqrt(square - float(mean @ mean)) / float(exact.norm())
    assert float(found.together.spread[0]) == pytest.approx(spread, rel=0.06)
    assert float(found.together.bias[0]) == pytest.approx(float((mean - exact).norm() / exact.norm()), abs=0.03)


@pytest.mark.parametrize("form", [Logistic, BPR])
def test_another_target_is_refused(form):
    with pytest.raises(InputError, match="different target"):
        tiny(form(Pool(Sampled(Uniform(4), 2))), 2, 2)


def test_measuring_does_not_change_state():
    counts = torch.tensor(COUNTS)
    objective = SampledSoftmax(Pool(InBatch(CountedFrequency(counts))))
    tiny(objective, 2, 2)
    assert objective.training
    with pytest.raises(InputError, match="draws"):
        tiny(objective, 1, 2)
