"""Mined negatives of a run: windows and limits by the scores of its towers, when they are mined, what is rejected."""

import numpy as np
import polars as pl
import pytest
import torch

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.negatives import DrawRequest
from twotower.objectives.build import build_objective, build_pool
from twotower.run.mining import make_mining
from twotower.towers import build_towers

LIMITED = "margin: 0.1, relative_margin: 0.3, max_score: 0.5, ranks: [2, 6], size: 2, sampling: random"


@pytest.fixture(scope="module")
def train():
    random = np.random.default_rng(0)
    rows = [(query, int(item)) for query in range(12) for item in random.choice(15, 4, replace=False)]
    return Interactions.from_frame(pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row"))


def settings(*sources, more=()):
    tower = ["query_tower.history=null", "query_tower.id_embedding=true", "item_tower.dimension=4"]
    return Config.load(None, [*tower, f"objective.sources=[{', '.join(sources)}]", *more])


def towers_of(config, train):
    torch.manual_seed(3)
    towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items)
    for parameter in towers.parameters():
        torch.nn.init.normal_(parameter)
    return towers.eval()


def test_limits_follow_from_the_scores_of_the_towers(train, monkeypatch):
    monkeypatch.setattr("twotower.run.mining._PRODUCTS", 30)
    monkeypatch.setattr("twotower.negatives.hard_negatives._PAIRS", 7)
    monkeypatch.setattr("twotower.run.mining.MINING_BLOCK", 5)
    config = settings(f"{{mined: {{{LIMITED}}}}}", "{uniform: {size: 4}}")
    objective, towers = build_objective(config, train), towers_of(config, train)
    make_mining(objective, config, train, towers)(towers)
    with torch.no_grad():
        queries = towers.embed_queries(torch.arange(12), torch.zeros(12, 0, dtype=torch.int64)).double()
        scores = (queries @ towers.embed_items(torch.arange(train.num_items)).double().T).numpy()
    kinds = set()
    for query in range(12):
        own = train.item_codes[train.offsets[query] : train.offsets[query + 1]].tolist()
        ranked = [j for j in np.argsort(-scores[query]).tolist() if j not in own][1:6]
        for item in own:
            s = scores[query, item]
            limit = min(s - 0.1, s - 0.3 * abs(s), 0.5)
            wanted = [j for j in ranked if scores[query, j] <= limit]
            request = DrawRequest(torch.tensor([item]), torch.tensor([query]))
            found = objective.pool.members()[0].stratum(request)
            assert [j for j in found.items[0].tolist() if j >= 0] == wanted
            kinds.add(len(wanted))
    assert len(kinds) > 2, "the limits must differ between the rows"


def test_a_source_is_mined_when_it_is_due(train):
    config = settings("{mined: {size: 2, after: 0}}", "{mined: {size: 2, after: 2}}", "{uniform: {size: 4}}")
    objective, towers = build_objective(config, train), towers_of(config, train)
    mine = make_mining(objective, config, train, towers)
    first, later, _ = objective.pool.members()
    for epoch, filled in enumerate([(True, False), (True, False), (True, True)]):
        mine(towers, epoch=epoch)
        assert (bool((first.items >= 0).all()), bool((later.items >= 0).all())) == filled


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("size: 2, ranks: 5", "ranks: expected the first and the last rank"),
        ("size: 2, ranks: [1.5, 5]", "ranks: expected the first and the last rank"),
        ("size: 2, sampling: hardest", "sampling: expected top or random, found 'hardest'"),
        ("size: 2, skipped: drop", "skipped: expected keep or mask"),
        ("size: 2, margin: wide", "margin: expected a number, found 'wide'"),
        ("size: 2, after: -1", "after: expected a number of epochs >= 0"),
        ("size: 9, ranks: [2, 9]", "mined: ranks: .* at least size=9 items"),
    ],
)
def test_wrong_settings_are_named(train, source, message):
    with pytest.raises(InputError, match=message) as error:
        build_pool(settings(f"{{mined: {{{source}}}}}").objective, train)
    assert "\n" not in str(error.value)


def test_a_text_beside_ids_has_no_ranking_of_its_query(train):
    text = ["data.query_text=text", "data.columns.query=user_id"]
    config = settings("{mined: {size: 2}}", more=text)
    plain = settings("{mined: {size: 2}}")
    towers = towers_of(plain, train)
    with pytest.raises(InputError, match="a text belongs to a row"):
        make_mining(build_objective(plain, train), config, train, towers)
