"""The sampled softmax compared with slow float64 loops: value, gradient, limits."""

import math

import pytest
import torch

from reference import epoch_absence, finite_difference
from reference import sampled_softmax as slow_sampled_softmax
from twotower.errors import InputError
from twotower.losses import full_softmax, sampled_softmax
from twotower.negatives import CountedFrequency, InBatch, Pool, Sampled, Uniform


def case(rows=4, candidates=7, width=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    query, positive = (torch.randn(rows, width, generator=rng, dtype=torch.float64) for _ in range(2))
    items = torch.randn(candidates, width, generator=rng, dtype=torch.float64)
    log_kappa = torch.randn(candidates, generator=rng, dtype=torch.float64)
    mask = torch.rand(rows, candidates, generator=rng) < 0.3
    return query, positive, items, log_kappa, mask


@pytest.mark.parametrize("shape", [(4, 7, 3), (1, 1, 1), (3, 0, 2), (5, 2, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_value_equals_the_slow_reference(shape, temperature):
    query, positive, items, log_kappa, mask = case(*shape)
    found = sampled_softmax(query, positive, items, log_kappa, mask=mask, temperature=temperature)
    expected = slow_sampled_softmax(
        query.tolist(), positive.tolist(), items.tolist(), log_kappa.tolist(), mask.tolist(), temperature
    )
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_gradient_equals_finite_differences_of_the_slow_reference():
    query, positive, items, log_kappa, mask = case(2, 4, 3)
    inputs = [query, positive, items]
    sizes = [tensor.numel() for tensor in inputs]

    def total(flat):
        parts = torch.tensor(flat, dtype=torch.float64).split(sizes)
        q, p, c = (part.reshape(tensor.shape).tolist() for part, tensor in zip(parts, inputs, strict=True))
        return sum(slow_sampled_softmax(q, p, c, log_kappa.tolist(), mask.tolist(), 0.5))

    expected = finite_difference(total, torch.cat([tensor.flatten() for tensor in inputs]).tolist())
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    sampled_softmax(*leaves, log_kappa, mask=mask, temperature=0.5).sum().backward()
    found = torch.cat([leaf.grad.flatten() for leaf in leaves]).tolist()
    assert max(abs(value) for value in found) > 0.01
    assert found == pytest.approx(expected, abs=1e-7)


def test_the_whole_catalog_once_is_the_full_softmax():
    query, _, items, _, _ = case(5, 9, 4)
    target = torch.tensor([0, 3, 3, 8, 1])
    grads = []
    for loss in (
        lambda q, v: sampled_softmax(q, v[target], v, torch.zeros(9), mask=target[:, None] == torch.arange(9)),
        lambda q, v: full_softmax(q, target, v),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, items)]
        value = loss(*leaves)
        value.sum().backward()
        grads.append((value.detach(), *[leaf.grad for leaf in leaves]))
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


def test_a_constant_on_every_logit_changes_nothing():
    query, positive, items, log_kappa, mask = case()
    base = sampled_softmax(query, positive, items, log_kappa, mask=mask)
    # The positive's logit is raised by appending a coordinate; the candidates' by lowering log kappa.
    ones = torch.ones(len(query), 1, dtype=torch.float64)
    shifted = sampled_softmax(
        torch.cat([query, ones], 1),
        torch.cat([positive, 2.5 * ones], 1),
        torch.cat([items, torch.zeros(len(items), 1, dtype=torch.float64)], 1),
        log_kappa - 2.5,
        mask=mask,
    )
    assert torch.allclose(base, shifted, atol=1e-12)
    # Without shifting the positive the loss does change: kappa does not correct the positive.
    assert not torch.allclose(base, sampled_softmax(query, positive, items, log_kappa - 2.5, mask=mask))


def test_temperature_divides_the_score_and_not_the_correction():
    query, positive, items, log_kappa, mask = case()
    found = sampled_softmax(query, positive, items, log_kappa, mask=mask, temperature=0.2)
    right = sampled_softmax(query / 0.2, positive, items, log_kappa, mask=mask)
    wrong = sampled_softmax(query / 0.2, positive, items, log_kappa / 0.2, mask=mask)
    assert torch.allclose(found, right, atol=1e-12)
    assert not torch.allclose(found, wrong, atol=1e-3)


def test_row_candidates_join_the_same_sum():
    query, positive, items, log_kappa, mask = case()
    shared = sampled_softmax(query, positive, items, log_kappa, mask=mask)
    by_row = sampled_softmax(
        query,
        positive,
        items[:3],
        log_kappa[:3],
        mask=mask[:, :3],
        row_candidates=items[3:].expand(len(query), -1, -1),
        row_log_expected_count=log_kappa[3:].expand(len(query), -1),
        row_mask=mask[:, 3:],
    )
    assert torch.allclose(shared, by_row, atol=1e-12)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(size):
    query = torch.tensor([[1.0]], requires_grad=True)
    items = torch.tensor([[size], [-size], [0.0]], requires_grad=True)
    kappa = torch.tensor([1e-12, 1.0, 1e12]).log()
    loss = sampled_softmax(query, torch.tensor([[0.0]]), items, kappa)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(query.grad).all() and torch.isfinite(items.grad).all()
    assert loss.item() == pytest.approx(1e4 + (12 * math.log(10) if size > 0 else 0.0), rel=1e-3)


def test_every_candidate_masked_gives_zero_loss_and_no_gradient():
    query, positive, items, log_kappa, _ = case()
    leaves = [tensor.clone().requires_grad_() for tensor in (query, positive, items)]
    loss = sampled_softmax(*leaves, log_kappa, mask=torch.ones(4, 7, dtype=torch.bool))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0] * 4)
    assert all(float(leaf.grad.abs().max()) == 0.0 for leaf in leaves)


def test_bfloat16_inputs_are_accumulated_in_float32():
    query, positive, items, log_kappa, mask = case(8, 50, 16)
    low = [tensor.to(torch.bfloat16) for tensor in (query, positive, items)]
    found = sampled_softmax(*low, log_kappa.float(), mask=mask if mask.shape == (8, 50) else None)
    exact = sampled_softmax(*[tensor.double() for tensor in low], log_kappa, mask=mask)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, atol=1e-4)


def test_a_batch_of_the_default_pool_equals_the_reference():
    """The training loss: pooled, deduplicated, corrected, masked."""
    counts = torch.tensor([9, 7, 5, 4, 3, 2, 1, 0])
    pool = Pool(InBatch(CountedFrequency(counts)), Sampled(Uniform(8), 6), unique=True)
    rng = torch.Generator().manual_seed(4)
    positives = torch.tensor([0, 1, 1, 4, 6])
    drawn = pool.draw(positives, generator=rng).collapse()
    query = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    table = torch.randn(8, 3, generator=rng, dtype=torch.float64)
    found = sampled_softmax(
        query, table[positives], table[drawn.items], drawn.log_expected_count, mask=drawn.mask, temperature=0.3
    )
    items = drawn.items.tolist()
    assert sorted(set(items)) == items
    kappa = [1 - float(epoch_absence(4, int(counts[j]), 30)) * (1 - 1 / 8) ** 6 for j in items]
    expected = slow_sampled_softmax(
        query.tolist(),
        table[positives].tolist(),
        table[items].tolist(),
        [math.log(value) for value in kappa],
        [[j == int(y) for j in items] for y in positives],
        0.3,
    )
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": torch.zeros(3, 3)}, "positive"),
        ({"candidates": torch.zeros(7, 2)}, "candidates"),
        ({"log_expected_count": torch.zeros(6)}, "log_expected_count"),
        ({"mask": torch.zeros(4, 6, dtype=torch.bool)}, "mask"),
        ({"mask": torch.zeros(4, 7)}, "mask"),
        ({"row_candidates": torch.zeros(4, 2)}, "row_candidates"),
        ({"row_candidates": torch.zeros(4, 2, 3), "row_log_expected_count": torch.zeros(2)}, "row_log_expected_count"),
        ({"row_candidates": torch.zeros(4, 2, 3), "row_mask": torch.zeros(4, 2)}, "row_mask"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    query, positive, items, log_kappa, mask = case()
    given = {
        "query": query,
        "positive": positive,
        "candidates": items,
        "log_expected_count": log_kappa,
        "mask": mask,
    } | change
    with pytest.raises(InputError, match=f"^{message}: expected"):
        sampled_softmax(**given)
