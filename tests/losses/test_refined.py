"""Refined logQ and expected-count are one estimator: the identity of docs/theory.md, section 3, in float64."""

import math

import pytest
import torch

import reference
from twotower.losses import refined_logq, sampled_softmax
from twotower.negatives import CountedFrequency, InBatch, Pool, corrections
from twotower.objectives import Embedded, RefinedLogQ


def case(seed, rows=9, candidates=40, width=6, temperature=2.0):
    rng = torch.Generator().manual_seed(seed)
    q = torch.rand(60, generator=rng, dtype=torch.float64) ** 4
    q /= q.sum()
    table = torch.randn(60, width, generator=rng, dtype=torch.float64)
    query = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    positives = torch.multinomial(q, rows, generator=rng)
    items = torch.multinomial(q, candidates, replacement=True, generator=rng)
    mask = items == positives[:, None]
    left = (~mask).sum(1).double()
    return q, table, query, positives, items, mask, left.log(), -torch.log1p(-q[positives]), temperature


def gradients(loss, query, table):
    leaves = [query.clone().requires_grad_(), table.clone().requires_grad_()]
    loss(*leaves).sum().backward()
    return torch.cat([leaf.grad.flatten() for leaf in leaves])


@pytest.mark.parametrize("seed", range(5))
def test_the_gradients_are_the_same_to_float64(seed):
    q, table, query, positives, items, mask, log_left, offset, temperature = case(seed)

    def refined(u, v):
        return refined_logq(
            u,
            v[positives],
            v[items],
            q[items].log(),
            mask=mask,
            log_left=log_left,
            row_offset=log_left + offset,
            temperature=temperature,
        )[0]

    def expected_count(u, v, offset=offset):
        return sampled_softmax(
            u, v[positives], v[items], q[items].log(), mask=mask, temperature=temperature, row_offset=log_left + offset
        )

    first, second = gradients(refined, query, table), gradients(expected_count, query, table)
    difference = float((first - second).abs().max())
    print(f"largest gradient {float(first.abs().max()):.3f}, largest difference {difference:.1e}")
    assert float(first.abs().max()) > 0.1
    assert difference <= 1e-12
    # Unconditional counts, n' q_j without 1 - q_y, give a different gradient: the comparison can detect it.
    other = gradients(lambda u, v: expected_count(u, v, 0.0 * offset), query, table)
    assert float((first - other).abs().max()) > 1e-6
    assert not torch.allclose(refined(query, table), expected_count(query, table)), "the values do differ"


def test_value_and_weight_equal_the_formulas_of_the_paper():
    q, table, query, positives, items, mask, log_left, offset, temperature = case(7)
    loss, weight = refined_logq(
        query,
        table[positives],
        table[items],
        q[items].log(),
        mask=mask,
        log_left=log_left,
        row_offset=log_left + offset,
        temperature=temperature,
    )
    for row, y in enumerate(positives.tolist()):
        live = [j for j in items.tolist() if j != y]
        scores = [reference.dot(query[row], table[j]) / temperature for j in live]
        own = reference.dot(query[row], table[y]) / temperature
        # P_hat has 1/n' before its sum; the loss has none.
        total = sum(math.exp(s) * (1 - float(q[y])) / float(q[j]) for s, j in zip(scores, live, strict=True))
        p_hat = math.exp(own) / (math.exp(own) + total / len(live))
        assert float(weight[row]) == pytest.approx(1 - p_hat, rel=1e-12)
        assert float(loss[row]) == pytest.approx(-(1 - p_hat) * math.log(math.exp(own) / total), rel=1e-12)


def test_the_weight_is_available_and_has_no_gradient():
    counts = torch.tensor([9, 7, 5, 2])
    pool = Pool(InBatch(CountedFrequency(counts)), correction=corrections.Probability())
    objective = RefinedLogQ(pool)
    drawn = objective.draw(torch.tensor([0, 0, 1, 2, 3, 0]))
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    query = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    embedded = Embedded(query, table[drawn.positives], table[drawn.items])
    weight = objective.row_weight(embedded, drawn, temperature=1.0)
    assert not weight.requires_grad
    assert bool(((weight > 0) & (weight < 1)).all())
    # The weight is one minus the softmax of expected-count with the conditional count.
    objective(embedded, drawn, temperature=1.0).sum().backward()
    softmax = 1 - torch.exp(
        -sampled_softmax(
            query,
            table[drawn.positives],
            table[drawn.items],
            drawn.log_expected_count,
            mask=drawn.mask,
            row_offset=torch.tensor(
                [math.log(n) - math.log(1 - c / 23) for n, c in ((3, 9), (3, 9), (5, 7), (5, 5), (5, 2), (3, 9))]
            ),
        )
    )
    assert torch.allclose(weight, softmax, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength_scales_the_whole_count(strength):
    """Strength 0 gives the gradient of the uncorrected softmax, not a zero gradient."""
    counts = torch.tensor([9, 7, 5, 2])
    objective = RefinedLogQ(
        Pool(InBatch(CountedFrequency(counts)), correction=corrections.Probability()), strength=strength
    )
    positives = torch.tensor([0, 0, 1, 2, 3, 0])
    drawn = objective.draw(positives)
    query = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = counts.double() / counts.sum()
    mask = positives == positives[:, None]
    left = (~mask).sum(1).double()

    def same(u, v):
        log_kappa = left.log()[:, None] + p[positives].log() - torch.log1p(-p[positives])[:, None]
        logits = (u @ v[positives].T - strength * log_kappa).masked_fill(mask, -torch.inf)
        own = (u * v[positives]).sum(1)
        return torch.logsumexp(torch.cat([own[:, None], logits], 1), 1) - own

    found = gradients(
        lambda u, v: objective(Embedded(u, v[positives], v[drawn.items]), drawn, temperature=1.0), query, table
    )
    assert torch.allclose(found, gradients(same, query, table), atol=1e-6)
    assert float(found.abs().max()) > 0.1
