"""Propagation of id tables over the graph of training pairs: against a dense float64 matrix, and once per step."""

import copy

import pytest
import torch

from twotower.config.run import Config
from twotower.errors import InputError
from twotower.towers import build_towers
from twotower.towers.propagation import Propagation, fold, propagate_over

QUERIES, ITEMS, D = 7, 5, 4
#: Query 6 and item 4 have no pair.
PAIRS = torch.tensor([[0, 0, 1, 2, 2, 2, 3, 4, 5], [0, 1, 1, 0, 2, 3, 3, 2, 0]])
SETTINGS = ["query_tower.id_embedding=true", "query_tower.history=null", "query_tower.hidden=null"]


def towers(*more):
    torch.manual_seed(0)
    config = Config.load(None, [*SETTINGS, f"item_tower.dimension={D}", "objective.similarity=dot", *more])
    return build_towers(config, num_queries=QUERIES, num_items=ITEMS)


def dense(queries, items, layers):
    """The mean of the powers of D^-1/2 A D^-1/2, as one matrix over queries and items, float64."""
    size = QUERIES + ITEMS
    adjacency = torch.zeros(size, size, dtype=torch.float64)
    for query, item in PAIRS.T.tolist():
        adjacency[query, QUERIES + item] = adjacency[QUERIES + item, query] = 1.0
    degree = adjacency.sum(1).clamp(min=1)
    adjacency = adjacency / (degree[:, None] * degree).sqrt()
    both, power = torch.cat([queries, items]).double(), torch.eye(size, dtype=torch.float64)
    total = torch.zeros_like(both)
    for _ in range(layers + 1):
        total = total + power @ both
        power = power @ adjacency
    total = total / (layers + 1)
    return total[:QUERIES], total[QUERIES:]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_lookups_are_the_mean_of_the_powers_of_the_adjacency_matrix(layers):
    model = towers()
    tables = model.query_tower.ids.weight.detach(), model.item_tower.ids.weight.detach()
    propagate_over(model, PAIRS, layers)
    queries, items = dense(*tables, layers)
    codes = torch.tensor([6, 0, 3, 0])
    assert torch.allclose(model.embed_queries(codes, None).double(), queries[codes], atol=1e-6)
    assert torch.allclose(model.item_embeddings().double(), items, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_are_those_of_the_dense_matrix(layers):
    model = towers()
    reference = [
        table.weight.detach().double().requires_grad_() for table in (model.query_tower.ids, model.item_tower.ids)
    ]
    propagate_over(model, PAIRS, layers)
    codes = torch.tensor([2, 5, 2])
    for _ in range(2):  # the second step must not use the freed graph of the first
        model.zero_grad()
        scores = model.embed_queries(codes, None) @ model.embed_items(torch.arange(ITEMS)).T
        (scores**2).sum().backward()
    queries, items = dense(*reference, layers)
    ((queries[codes] @ items.T) ** 2).sum().backward()
    for table, expected in zip((model.query_tower.ids, model.item_tower.ids), reference, strict=True):
        assert torch.allclose(table.weight.grad.double(), expected.grad, atol=1e-5)


def test_tables_are_propagated_once_per_step_and_again_after_a_change(monkeypatch):
    model = towers()
    propagate_over(model, PAIRS, 2)
    calls = []
    whole = Propagation.propagate
    monkeypatch.setattr(Propagation, "propagate", lambda self, *rows: calls.append(1) or whole(self, *rows))
    before = model.embed_queries(torch.tensor([0]), None)
    model.embed_items(torch.tensor([1]))
    assert len(calls) == 1
    with torch.no_grad():
        model.item_tower.ids.weight.mul_(2.0)
    after = model.embed_queries(torch.tensor([0]), None)
    assert len(calls) == 2 and not torch.equal(before, after)


def test_folded_tables_are_ordinary_and_have_the_same_vectors():
    model = towers("query_tower.propagation=2", "item_tower.popularity=0.5")
    model.set_popularity(torch.tensor([5, 1, 0, 2, 9]))
    propagate_over(model, PAIRS, 2)
    codes = torch.arange(QUERIES)
    queries, items = model.embed_queries(codes, None).detach(), model.item_embeddings()
    fold(model)
    assert torch.equal(model.embed_queries(codes, None), queries) and torch.equal(model.item_embeddings(), items)
    plain = towers("query_tower.propagation=2", "item_tower.popularity=0.5")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.item_embeddings(), items)


def test_a_copy_propagates_its_own_tables():
    model = towers()
    propagate_over(model, PAIRS, 1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.item_tower.ids.weight.zero_()
        model.query_tower.ids.weight.zero_()
    assert not model.item_embeddings().any()
    assert other.item_embeddings().any()


def test_the_score_has_a_share_of_log_popularity():
    counts = torch.tensor([5, 1, 0, 2, 9])
    model = towers("item_tower.popularity=0.6", "objective.temperature=0.2")
    model.set_popularity(counts)
    log_p = ((counts + 1) / (counts.sum() + ITEMS)).log()
    vectors = model.query_tower.ids.weight[:2] @ model.item_tower.ids.weight.T / 0.2
    scores = model.embed_queries(torch.tensor([0, 1]), None) @ model.item_embeddings().T / model.temperature
    assert torch.allclose(scores, vectors + 0.6 * (log_p - log_p.mean()), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["query_tower.hidden=[8]"], "must be id tables"),
        (["query_tower.history={length: 5}"], "must be id tables"),
        (["item_tower.hidden=[8]"], "must be id tables"),
        (["item_tower.table_precision=bfloat16"], "float32"),
    ],
)
def test_other_towers_cannot_be_propagated(settings, words):
    with pytest.raises(InputError, match=words):
        propagate_over(towers(*settings), PAIRS, 2)
