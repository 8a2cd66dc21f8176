"""Tests of embedding lists of items together: each distinct item once, and no needless copies."""

import pytest
import torch

from twotower.training.embedding import embed_parts


class Tower(torch.nn.Module):
    """A table that records the requested codes."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(30, 4)
        self.asked = []

    def embed_items(self, items):
        """Embed codes, [M] -> [M, D]."""
        self.asked.append(items)
        return self.table(items) ** 2


@pytest.mark.parametrize(
    ("few", "many"),
    [([4, 2, 4], [1, 2, 4, 9]), ([4, 2, 4], [9, 4, 2, 1]), ([4, 3], [1, 2, 4, 9]), ([4, 2], [2, 4, 4]), ([4], [])],
    ids=["held in order", "no order", "not held", "copies", "nothing"],
)
def test_parts_equal_lists_embedded_one_by_one(few, many):
    parts = [torch.tensor(few), torch.tensor(many, dtype=torch.int64)]
    tower = Tower()
    found = embed_parts(tower, parts)
    assert [len(one.unique()) for one in tower.asked] == [len(one) for one in tower.asked]
    weights = [torch.randn(len(part), 4) for part in parts]
    gradients = []
    for vectors in (found, [tower.table(part) ** 2 for part in parts]):
        total = sum((weight * one).sum() for weight, one in zip(weights, vectors, strict=True))
        gradients.append(torch.autograd.grad(total, tower.table.weight)[0])
    assert gradients[1].abs().max() > 0.1
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_sorted_catalog_is_not_copied():
    tower = Tower()
    catalog = torch.arange(30)
    embed_parts(tower, [torch.tensor([7, 7, 3]), catalog])
    assert len(tower.asked) == 1
    assert tower.asked[0] is catalog
