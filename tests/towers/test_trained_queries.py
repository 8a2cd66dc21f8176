"""Queries without a training row: they are embedded like unknown queries."""

import pytest
import torch

from twotower.config.run import Config
from twotower.towers import build_towers

Q, N = 12, 20
TRAINED = torch.arange(Q) % 4 != 2
SEQUENCE = ["query_tower.history.sequence={kind: gru, blocks: 1, recency: 2}"]


def made(changes, trained=None):
    torch.manual_seed(0)
    config = Config.load(None, ["item_tower.dimension=8", "query_tower.id_embedding=true",
                                "query_tower.history.length=5", *changes])  # fmt: skip
    return build_towers(config, num_queries=Q, num_items=N, trained_queries=trained).eval()


@pytest.mark.parametrize("changes", [[], SEQUENCE], ids=["pooled", "sequence"])
def test_a_query_without_a_training_row_is_embedded_like_an_unknown_one(changes):
    towers, whole = made(changes, TRAINED), made(changes)
    queries, history = torch.arange(Q), torch.randint(-1, N, (Q, 5)).sort(1).values
    with torch.no_grad():
        found, expected = towers.embed_queries(queries, history), whole.embed_queries(queries, history)
        new = towers.embed_queries(torch.full((Q,), -1), history)
    assert torch.equal(found[TRAINED], expected[TRAINED])
    assert torch.equal(found[~TRAINED], new[~TRAINED])
    assert float((found - new).norm(dim=1)[TRAINED].min()) > 0.05


@pytest.mark.parametrize("changes", [[], SEQUENCE], ids=["pooled", "sequence"])
def test_all_queries_of_older_weights_count_as_trained(changes):
    towers = made(changes, TRAINED)
    saved = towers.state_dict()
    (name,) = [name for name in saved if name.startswith("query_tower.") and name.endswith("trained")]
    again = made(changes)
    again.load_state_dict(saved)
    assert torch.equal(again.trained_queries, TRAINED)
    del saved[name]
    again.load_state_dict(saved)
    assert bool(again.trained_queries.all())


def test_a_tower_without_ids_has_no_mask():
    towers = made(["query_tower.id_embedding=false"], TRAINED)
    assert towers.trained_queries is None and not any("trained" in name for name in towers.state_dict())
