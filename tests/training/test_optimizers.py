"""The optimizer against torch's own: dense rows as AdamW, sparse rows as SparseAdam."""

import copy

import pytest
import torch

from twotower.training import TableAdamW
from twotower.training.optimizers import parameter_groups


def steps(optimizer, table, target, count=12):
    for _ in range(count):
        rows = torch.tensor([1, 3, 3, 5])
        loss = ((table(rows) - target) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def tables(sparse):
    torch.manual_seed(0)
    weight = torch.randn(7, 4)
    return [torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=sparse) for _ in range(2)]


def test_dense_gradients_equal_adamw():
    ours, theirs = tables(sparse=False)
    target = torch.randn(4, 4)
    steps(TableAdamW(ours.parameters(), lr=0.1, weight_decay=0.05), ours, target)
    steps(torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.05), theirs, target)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_sparse_gradients_equal_sparse_adam():
    ours, theirs = tables(sparse=True)
    before = ours.weight.detach().clone()
    target = torch.randn(4, 4)
    steps(TableAdamW(ours.parameters(), lr=0.1), ours, target)
    steps(torch.optim.SparseAdam(theirs.parameters(), lr=0.1), theirs, target)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
    assert torch.equal(ours.weight[[0, 2, 4, 6]], before[[0, 2, 4, 6]]), "untouched rows must not move"
    assert not torch.equal(ours.weight[3], before[3])


def test_state_round_trip_continues_alike():
    ours, other = tables(sparse=True)
    target = torch.randn(4, 4)
    first = TableAdamW(ours.parameters(), lr=0.1)
    steps(first, ours, target, 5)
    other.load_state_dict(ours.state_dict())
    second = TableAdamW(other.parameters(), lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(first, ours, target, 5)
    steps(second, other, target, 5)
    assert torch.equal(ours.weight, other.weight)


def test_tables_biases_and_scalars_do_not_decay():
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 2), "layer": torch.nn.Linear(2, 3)})
    decayed, rest = parameter_groups(model, 0.1)
    assert [p is model["layer"].weight for p in decayed["params"]] == [True]
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert len(rest["params"]) == 2


@pytest.mark.parametrize("sparse", [True, False])
def test_a_parameter_without_gradient_stays(sparse):
    ours, _ = tables(sparse)
    before = ours.weight.detach().clone()
    TableAdamW(ours.parameters(), lr=0.1).step()
    assert torch.equal(ours.weight, before)
