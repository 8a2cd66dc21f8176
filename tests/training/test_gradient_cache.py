"""Tests of the gradient cache against the plain step: same loss and gradients, including dropout."""

import pytest
import torch

from twotower.data import Batch
from twotower.negatives import CountedFrequency, InBatch, Pool, Sampled, Uniform
from twotower.objectives import SampledSoftmax
from twotower.towers.two_tower import ItemTower, PooledHistory, QueryTower, TwoTower
from twotower.training import compute_loss, embedding

N, D, ROWS, CHUNK = 30, 8, 21, 5


@pytest.fixture(params=[0.0, 0.4])
def towers(request):
    torch.manual_seed(0)
    items = ItemTower(N, D, hidden=[12], dropout=request.param)
    history = PooledHistory(4, 2, dropout=request.param)
    query = QueryTower(6, D, history=history, history_items=items.ids, hidden=[16], dropout=request.param)
    return TwoTower(query, items).train()


def batch():
    rng = torch.Generator().manual_seed(1)
    items = torch.randint(N, (ROWS,), generator=rng)
    history = torch.randint(-1, N, (ROWS, 4), generator=rng)
    return Batch(rows=items, queries=torch.randint(6, (ROWS,), generator=rng), items=items, history=history)


def step(towers, micro_batch):
    """Return (loss, gradients, the next random number)."""
    torch.manual_seed(5)
    pool = Pool(InBatch(CountedFrequency(torch.ones(N))), Sampled(Uniform(N), 9), unique=True)
    towers.zero_grad()
    loss, _, _ = compute_loss(towers, SampledSoftmax(pool), batch(), micro_batch=micro_batch)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in towers.named_parameters()}, float(torch.rand(()))


def in_chunks(towers, monkeypatch):
    """Run the plain step with chunked embedding and all activations kept, which the cache must reproduce."""
    for name in ("embed_queries", "embed_items"):
        plain = getattr(towers, name)

        def chunked(*inputs, plain=plain):
            return torch.cat([plain(*part) for part in zip(*(one.split(CHUNK) for one in inputs), strict=True)])

        monkeypatch.setattr(towers, name, chunked)
    return step(towers, None)


def test_loss_and_gradients_equal_the_plain_step(towers, monkeypatch):
    value, grads, following = step(towers, CHUNK)
    assert min(float(grad.abs().max()) for grad in grads.values()) > 1e-6
    expected, expected_grads, expected_following = in_chunks(towers, monkeypatch)
    assert value == pytest.approx(expected, rel=1e-6)
    for name, grad in expected_grads.items():
        assert torch.allclose(grads[name], grad, rtol=1e-5, atol=1e-7), name
    assert following == expected_following, "the generator continues as after a plain step"


def test_without_the_same_dropout_the_gradients_differ(towers, monkeypatch):
    if towers.query_tower.history.dropout == 0:
        pytest.skip("nothing random in these towers")
    monkeypatch.setattr(embedding, "_restore", lambda states: None)
    _, grads, _ = step(towers, CHUNK)
    _, expected, _ = in_chunks(towers, monkeypatch)
    assert not all(torch.allclose(grads[name], grad, rtol=1e-3, atol=1e-4) for name, grad in expected.items())


def test_a_batch_of_one_chunk_equals_the_plain_step(towers):
    one, other = step(towers, ROWS + 100), step(towers, None)
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], grad) for name, grad in other[1].items())


def test_only_one_chunk_of_activations_is_kept(towers):
    """Between the forward and the backward pass no activation of all rows is in memory."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        query = embedding.cached_embedding(
            towers.embed_queries, batch().queries, batch().history, chunk=CHUNK, anchor=towers.log_temperature
        )
    assert kept == []
    assert query.requires_grad
    assert query.shape == (ROWS, D)


def test_sparse_tables_gather_their_rows():
    table = torch.nn.Embedding(10, 3, sparse=True)
    codes = torch.tensor([1, 2, 1, 9, 4])
    expected = torch.nn.Embedding(10, 3, sparse=True, _weight=table.weight.detach().clone())
    embedding.cached_embedding(table, codes, chunk=2, anchor=table.weight).pow(2).sum().backward()
    expected(codes).pow(2).sum().backward()
    assert torch.allclose(table.weight.grad.to_dense(), expected.weight.grad.to_dense())
