"""Copies of an item are computed once in every loss, and no operation synchronizes with an accelerator."""

import pytest
import torch

from twotower.losses import bpr, candidate_logits, logistic, sampled_softmax, tiled_bpr, tiled_logistic, tiled_softmax
from twotower.losses.tiled.copies import find_copies
from twotower.negatives import NegativeMask

B, M, D = 9, 40, 5


def batch(*, seed=0):
    """Make float64 leaves, log counts and hits for candidates that are copies of a dozen items, unordered."""
    rng = torch.Generator().manual_seed(seed)
    items = torch.randint(12, (M,), generator=rng)
    table, counts = torch.randn(12, D, generator=rng, dtype=torch.float64), torch.randn(12, generator=rng)
    leaves = {
        "query": torch.randn(B, D, generator=rng, dtype=torch.float64),
        "positive": torch.randn(B, D, generator=rng, dtype=torch.float64),
        "candidates": table[items],
    }
    pairs = [(torch.arange(B), items[:B]), (torch.randint(B, (20,), generator=rng), torch.randint(15, (20,)))]
    return leaves, counts[items].double(), NegativeMask(pairs, rows=B, items=items, size=M), items


def plain(form, leaves, log_count, dense):
    """Compute the mean of the plain loss."""
    if form is tiled_softmax:
        return sampled_softmax(*leaves.values(), log_count, mask=dense, temperature=0.4).mean()
    logits = candidate_logits(*leaves.values(), log_count, mask=dense, temperature=0.4)
    return (logistic if form is tiled_logistic else bpr)(*logits).mean()


@pytest.mark.parametrize("form", [tiled_softmax, tiled_logistic, tiled_bpr])
@pytest.mark.parametrize("case", ["merged", "embedded one by one", "counted by source"])
def test_merged_copies_equal_the_plain_form(form, case):
    """Value, and the gradient of every single copy; also if copies differ and cannot be merged."""
    for seed in range(3):
        leaves, log_count, mask, _ = batch(seed=seed)
        if case == "embedded one by one":
            leaves["candidates"] = leaves["candidates"] + torch.randn(M, D, dtype=torch.float64)
        if case == "counted by source":
            log_count = log_count + torch.randn(M, dtype=torch.float64)
        assert (find_copies(leaves["candidates"], log_count, mask) is not None) == (case == "merged")
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        found = form(**leaves, log_expected_count=log_count, mask=mask, temperature=0.4)
        expected = plain(form, leaves, log_count, mask.dense())
        assert torch.allclose(found, expected, atol=1e-12)
        pair = [torch.autograd.grad(value, list(leaves.values())) for value in (found, expected)]
        for one, other in zip(*pair, strict=True):
            assert other.abs().max() > 1e-3
            assert torch.allclose(one, other, atol=1e-12)


def test_each_product_is_computed_once(monkeypatch):
    leaves, log_count, mask, items = batch()
    widths = []
    multiply = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda one, other, **kwargs: widths.append(other.shape[1]) or multiply(one, other, **kwargs)
    )
    tiled_logistic(**leaves, log_expected_count=log_count, mask=mask)
    assert sum(widths) == len(items.unique()) < M


def test_masks_for_an_accelerator_equal_the_matrix():
    for seed in range(4):
        _, _, mask, items = batch(seed=seed)
        starts = [0, 2, 3, 3, B]
        assert torch.equal(torch.cat(list(mask.matrices(starts))), mask.dense())
        places = NegativeMask.of(mask.dense())
        assert torch.equal(torch.cat(list(places.matrices(starts))), mask.dense())
        none = NegativeMask([], rows=B, items=items, size=M)
        assert not torch.cat(list(none.matrices(starts))).any()


@pytest.mark.parametrize("form", [tiled_softmax, tiled_logistic, tiled_bpr])
def test_no_operation_synchronizes_with_an_accelerator(form):
    """Meta tensors replace tensors on a device: reading one of their values, or a size that depends on it, fails."""
    leaves, log_count, mask, _ = batch()
    leaves = {name: leaf.float().to("meta").requires_grad_() for name, leaf in leaves.items()}
    temperature = torch.tensor(0.4, device="meta", requires_grad=True)
    value = form(**leaves, log_expected_count=log_count.to("meta"), mask=mask.to("meta"), temperature=temperature)
    found = torch.autograd.grad(2.0 * value, [*leaves.values(), temperature])
    assert [one.shape for one in found] == [leaf.shape for leaf in [*leaves.values(), temperature]]
    with pytest.raises(Exception, match="meta"):  # the assumption behind this test
        value.item()
    with pytest.raises(Exception, match="meta|dynamic|nonzero"):
        (log_count.to("meta") > 0).nonzero()
