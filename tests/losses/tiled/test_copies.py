"""Copies of an item are merged before the loss, and no operation of a loss synchronizes with an accelerator."""

from dataclasses import replace

import pytest
import torch

from twotower.errors import InputError
from twotower.losses import (
    bpr,
    candidate_logits,
    gbce,
    logistic,
    sampled_softmax,
    tiled_bpr,
    tiled_logistic,
    tiled_softmax,
)
from twotower.negatives import Candidates, NegativeMask

B, M, D = 9, 40, 5


def candidates(*, seed=0, by_source=False, empty=False):
    """Make copies of a dozen items, unordered; each item has one log count, or one per source; a few empty slots."""
    rng = torch.Generator().manual_seed(seed)
    items = torch.randint(12, (M,), generator=rng)
    counts = torch.randn(2, 12, generator=rng)
    source = torch.arange(M) // (M // 2)
    log_count = counts[source if by_source else 0, items]
    is_empty = torch.zeros(M, dtype=torch.bool)
    if empty:
        is_empty[[0, 7, 8]] = True
        items[is_empty] = 0
    pairs = [(torch.arange(B), items[:B]), (torch.randint(B, (20,), generator=rng), torch.randint(15, (20,)))]
    return Candidates(
        items=items,
        log_expected_count=log_count.masked_fill(is_empty, torch.inf),
        negative_mask=NegativeMask(pairs, rows=B, items=items, size=M, empty=is_empty if empty else None),
        multiplicity=(~is_empty).long(),
        source=source,
        positives=items[:B],
        positive_log_count=torch.zeros(B),
    )


def loss(form, leaves, drawn, *, is_tiled):
    """Compute the mean loss of candidates, with their multiplicity in the losses that need it."""
    embedded = (leaves["query"], leaves["positive"], leaves["table"][drawn.items], drawn.log_expected_count)
    options = {"temperature": 0.4}
    if form == "softmax":
        if is_tiled:
            return tiled_softmax(*embedded, mask=drawn.negative_mask, **options)
        return sampled_softmax(*embedded, mask=drawn.mask, **options).mean()
    if is_tiled:
        options |= {"mask": drawn.negative_mask, "multiplicity": drawn.multiplicity}
        if form == "bpr":
            return tiled_bpr(*embedded, **options)
        return tiled_logistic(*embedded, beta=0.3 if form == "gbce" else 1.0, **options)
    logits = candidate_logits(*embedded, mask=drawn.mask, **options)
    if form == "gbce":
        return gbce(*logits, beta=0.3, multiplicity=drawn.multiplicity).mean()
    return {"logistic": logistic, "bpr": bpr}[form](*logits, multiplicity=drawn.multiplicity).mean()


@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.parametrize("case", ["one count", "counted by source", "empty slots"])
@pytest.mark.parametrize("form", ["softmax", "logistic", "gbce", "bpr"])
def test_merged_copies_change_neither_value_nor_gradients(form, case, is_tiled):
    """Also if copies have different log counts, and, as on an accelerator, if some slots are empty."""
    for seed in range(3):
        drawn = candidates(seed=seed, by_source=case == "counted by source", empty=case == "empty slots")
        merged = drawn.collapse(sum_weights=form == "softmax")
        live = int((drawn.multiplicity > 0).sum())
        assert int(merged.multiplicity.sum()) == live
        assert len(merged.items) < live
        rng = torch.Generator().manual_seed(seed)
        shapes = {"query": B, "positive": B, "table": 12}
        found = []
        for one, tiled_form in ((drawn, False), (merged, is_tiled)):
            rng.manual_seed(seed)
            normal = {name: torch.randn(size, D, generator=rng, dtype=torch.float64) for name, size in shapes.items()}
            leaves = {name: tensor.requires_grad_() for name, tensor in normal.items()}
            value = loss(form, leaves, one, is_tiled=tiled_form)
            found.append((value, *torch.autograd.grad(value, list(leaves.values()))))
        for one, other in zip(*found, strict=True):
            assert other.abs().max() > 1e-3
            assert torch.allclose(one, other, atol=2e-6 if form == "softmax" else 1e-12)  # log counts are float32
    if form != "softmax":  # a loss that forgets the copies is noticed
        forgotten = loss(
            form, leaves, replace(merged, multiplicity=merged.multiplicity.clamp(max=1)), is_tiled=is_tiled
        )
        assert abs(forgotten.item() - value.item()) > 1e-3


def test_each_product_is_computed_once(monkeypatch):
    drawn = candidates()
    merged = drawn.collapse(sum_weights=False)
    assert torch.equal(merged.items, drawn.items.unique())
    leaves = {"query": torch.randn(B, D), "positive": torch.randn(B, D), "table": torch.randn(12, D)}
    widths = []
    multiply = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda one, other, **kwargs: widths.append(other.shape[1]) or multiply(one, other, **kwargs)
    )
    loss("logistic", leaves, merged, is_tiled=True)
    assert sum(widths) == len(merged.items) < M


def test_multiplicity_of_another_shape_is_refused():
    drawn = candidates()
    leaves = {"query": torch.randn(B, D), "positive": torch.randn(B, D), "table": torch.randn(12, D)}
    with pytest.raises(InputError, match=r"multiplicity: expected \[40\], found \[3\]"):
        loss("bpr", leaves, replace(drawn, multiplicity=torch.ones(3)), is_tiled=True)


def test_masks_for_an_accelerator_equal_the_matrix():
    for seed in range(4):
        drawn = candidates(seed=seed)
        mask, items = drawn.negative_mask, drawn.items
        starts = [0, 2, 3, 3, B]
        assert torch.equal(torch.cat(list(mask.matrices(starts))), mask.dense())
        places = NegativeMask.of(mask.dense())
        assert torch.equal(torch.cat(list(places.matrices(starts))), mask.dense())
        none = NegativeMask([], rows=B, items=items, size=M)
        assert not torch.cat(list(none.matrices(starts))).any()


@pytest.mark.parametrize("form", [tiled_softmax, tiled_logistic, tiled_bpr])
def test_no_operation_synchronizes_with_an_accelerator(form):
    """Meta tensors replace tensors on a device: reading one of their values, or a size that depends on it, fails."""
    drawn = candidates()
    log_count, mask = drawn.log_expected_count, drawn.negative_mask
    shapes = {"query": B, "positive": B, "candidates": M}
    leaves = {name: torch.randn(rows, D, device="meta").requires_grad_() for name, rows in shapes.items()}
    options = {} if form is tiled_softmax else {"multiplicity": drawn.multiplicity.to("meta")}
    temperature = torch.tensor(0.4, device="meta", requires_grad=True)
    value = form(
        **leaves, log_expected_count=log_count.to("meta"), mask=mask.to("meta"), temperature=temperature, **options
    )
    found = torch.autograd.grad(2.0 * value, [*leaves.values(), temperature])
    assert [one.shape for one in found] == [leaf.shape for leaf in [*leaves.values(), temperature]]
    with pytest.raises(Exception, match="meta"):  # the assumption behind this test
        value.item()
    with pytest.raises(Exception, match="meta|dynamic|nonzero"):
        (log_count.to("meta") > 0).nonzero()
