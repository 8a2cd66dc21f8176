"""Statements of the source documents in plain float64 loops, where no other test of an objective has them."""

import math

import numpy as np
import polars as pl
import pytest
import torch

import reference
from support.drawing import observe, standard_errors_off
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.objectives import Embedded
from twotower.objectives.build import build_objective

N, D, K = 9, 3, 4


@pytest.fixture(scope="module")
def train():
    """Rows of nine items, of which the last has none."""
    counts = [14, 9, 6, 5, 3, 2, 2, 1]
    items = np.repeat(np.arange(len(counts)), counts)
    frame = pl.DataFrame({"user": np.arange(len(items)) % 7, "item": items, "timestamp": np.arange(len(items))})
    return Interactions.from_frame(frame, items=pl.DataFrame({"item": range(N)}), catalog="table")


def build(train, *settings):
    return build_objective(Config.load(None, list(settings)), train)


def batch(train, rows, seed=0):
    rng = torch.Generator().manual_seed(seed)
    positives = torch.from_numpy(train.item_codes.astype(np.int64))[torch.randperm(len(train), generator=rng)[:rows]]
    query = torch.randn(rows, D, generator=rng, dtype=torch.float64)
    return positives, query, torch.randn(N, D, generator=rng, dtype=torch.float64)


def losses(objective, drawn, query, table):
    rows = None if drawn.row_items is None else table[drawn.row_items.clamp(min=0)]
    embedded = Embedded(query, table[drawn.positives], table[drawn.items], rows)
    return objective(embedded, drawn, temperature=1.0)


def share(train):
    counts = train.item_counts()
    return (counts / counts.sum()).tolist()


def test_weights_as_written_estimate_the_uncorrected_batch(train):
    """Document 000, last formula: draws from P with weights Q/P have the mean K E_Q[exp s], not that of the catalog."""
    settings = "objective.sources=[{uniform: {size: 12}}]"
    objective, plain = (build(train, f"objective.name={n}", settings) for n in ("uniform-importance", "expected-count"))
    positives, scores = torch.tensor([3]), torch.linspace(-1.0, 1.0, N, dtype=torch.float64)
    p = share(train)
    found = {}
    for name, one in (("weighted", objective), ("expected", plain)):
        rng = torch.Generator().manual_seed(5)
        found[name] = observe(lambda _, one=one, rng=rng: one.pool.draw(positives, generator=rng), 1200, N)
        found[name] = found[name].partition(scores, 3)
    own = float(scores[3].exp())
    as_batch = own + 12 * sum(p[j] * math.exp(float(scores[j])) for j in range(N) if j != 3)
    whole = float(scores.exp().sum())
    assert standard_errors_off(found["weighted"], as_batch) < 4 < 12 < standard_errors_off(found["weighted"], whole)
    assert standard_errors_off(found["expected"], whole) < 4


def test_weights_as_written_need_a_counted_frequency(train):
    with pytest.raises(InputError, match="set it to counted"):
        build(train, "objective.name=uniform-importance", "objective.frequency=streaming")


def test_importance_sampling_twice_is_the_form_with_a_corrected_positive(train):
    """Document 002: E_P[ds] with numerator and denominator both estimated by weights exp(s) / q, the positive a sample.

    The gradient of `in-batch-logq-all` is -ds_y + sum_i w_i ds_i / sum_i w_i over the positive and the other rows.
    """
    objective = build(train, "objective.name=in-batch-logq-all")
    positives, query, table = batch(train, 6)
    drawn, p = objective.draw(positives), share(train)
    leaf = table.clone().requires_grad_()
    losses(objective, drawn, query, leaf).sum().backward()
    expected = np.zeros((N, D))
    for row, y in enumerate(positives.tolist()):
        sampled = [y, *(j for j in positives.tolist() if j != y)]
        weights = [math.exp(reference.dot(query[row], table[j])) / p[j] for j in sampled]
        expected[y] -= query[row].numpy()
        for j, weight in zip(sampled, weights, strict=True):
            expected[j] += weight / sum(weights) * query[row].numpy()
    assert leaf.grad.flatten().tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-6)


def test_the_released_baseline_of_refined_logq_is_logq_of_distinct_items(train):
    """Its code removes duplicates, subtracts log p from the negatives and leaves the positive as it is."""
    objective = build(train, "objective.name=in-batch-logq", "objective.unique=true")
    positives, query, table = batch(train, 8)
    found = losses(objective, objective.draw(positives), query, table)
    p, expected = share(train), []
    for row, y in enumerate(positives.tolist()):
        score = reference.dot(query[row], table[y])
        distinct = set(positives.tolist()) - {y}
        total = math.exp(score) + sum(math.exp(reference.dot(query[row], table[j])) / p[j] for j in distinct)
        expected.append(-score + math.log(total))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    kept = build(train, "objective.name=in-batch-logq")
    assert losses(kept, kept.draw(positives), query, table).tolist() != pytest.approx(expected, rel=1e-3)


def test_word2vec_without_a_bias(train):
    """Document 000, method 1: -log sigmoid(s_y) - sum_k log sigmoid(-s_k), scores as they are."""
    objective = build(train, "objective.name=negative-sampling", f"objective.negatives={K}", "objective.bias=false")
    assert list(objective.parameters()) == []
    positives, query, table = batch(train, 5)
    drawn = objective.draw(positives, generator=torch.Generator().manual_seed(1))
    leaves = [query.clone().requires_grad_(), table.clone().requires_grad_()]
    found = losses(objective, drawn, *leaves)
    expected = []
    for row, y in enumerate(positives.tolist()):
        noise = [j for j in drawn.row_items[row].tolist() if j != y]
        value = -math.log(1 / (1 + math.exp(-reference.dot(query[row], table[y]))))
        expected.append(value - sum(math.log(1 / (1 + math.exp(reference.dot(query[row], table[j])))) for j in noise))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    embedded = Embedded(leaves[0], leaves[1][drawn.positives], leaves[1][drawn.items], leaves[1][drawn.row_items])
    tiled = objective.mean(embedded, drawn, temperature=1.0)
    assert float(tiled.detach()) == pytest.approx(sum(expected) / 5, rel=1e-6)
    one, other = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (found.mean(), tiled))
    for plain, fast in zip(one, other, strict=True):
        assert torch.allclose(plain, fast, atol=1e-7) and float(plain.abs().max()) > 1e-3
    with_bias = build(train, "objective.name=negative-sampling", f"objective.negatives={K}")
    assert float(with_bias.bias.detach()) == pytest.approx(-math.log(K))


def test_per_row_candidates_of_mixed_pools_are_counted_by_row(train):
    """Document 001 draws b' more negatives for each positive: Q of its second definition is 1 - (1 - 1/N)^b'."""
    sources = "objective.sources=[{in_batch: {}}, {uniform: {size: 5, per_row: true}}]"
    objective = build(train, "objective.name=mixed-by-source-batch-probability", sources)
    positives = batch(train, 6)[0]
    drawn = objective.draw(positives, generator=torch.Generator().manual_seed(2))
    p = share(train)
    assert drawn.row_log_expected_count.flatten().tolist() == pytest.approx([math.log(1 - (1 - 1 / N) ** 5)] * 30)
    expected = [math.log(1 - (1 - p[j]) ** 6) for j in drawn.items.tolist()]
    assert (drawn.log_expected_count + drawn.multiplicity.log()).tolist() == pytest.approx(expected, abs=1e-5)
