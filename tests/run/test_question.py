"""What training asks: chosen from the split, with the towers that suit it, and one embedding for several targets."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from twotower import fit
from twotower.config.run import Config
from twotower.data import Interactions, KnownPositives, by_time, held_out_queries, random_rows
from twotower.data.loading.questions import QuestionBatches
from twotower.errors import InputError
from twotower.objectives.build import build_objective, needs_known_positives
from twotower.run.batches import make_batches
from twotower.run.question import DAY, resolve_question, rule_of
from twotower.towers import build_towers
from twotower.training.step import compute_loss


def configured(*settings):
    return Config.load(None, list(settings))


def test_a_split_by_time_asks_for_a_horizon_with_linear_towers(planted_time_split):
    said = []
    config = resolve_question(Config(), planted_time_split, said.append)
    assert config.training.question == "horizon"
    times = planted_time_split.data.timestamps
    span = int(times.max()) - int(planted_time_split.test.query_times.min())
    assert config.training.horizon == pytest.approx(span / DAY)
    assert rule_of(config).horizon == span
    assert config.query_tower.hidden is None and config.query_tower.history.heads == 1
    assert not config.query_tower.history.share_table
    assert config.item_tower.bias and config.objective.similarity == "dot"
    assert "horizon" in said[0] and "linear" in said[0]
    # What was used trains the same model again.
    assert resolve_question(Config.model_validate(config.model_dump()), planted_time_split) == config


def test_leave_last_out_asks_for_the_next_item_with_the_towers_as_they_are(planted_split):
    config = resolve_question(Config(), planted_split)
    assert config.training.question == "next" and rule_of(config) is None
    assert config.query_tower == Config().query_tower and config.item_tower == Config().item_tower


def test_splits_without_time_ask_for_hidden_items(planted_data):
    data = replace(planted_data, timestamps=None)
    config = resolve_question(Config(), held_out_queries(data))
    assert config.training.question == "set"


@pytest.mark.parametrize(("single", "question"), [(8, "set"), (11, "next")])
def test_pairs_of_a_query_and_one_item_are_not_asked_for_hidden_items(single, question):
    """Rows that are alone in their query would be left out of `set`, and the query's features learn from them."""
    queries = [*range(single), *(100 + row // 5 for row in range(10))]
    words = pl.DataFrame({"user_id": sorted(set(queries)), "words": [f"w{q}" for q in sorted(set(queries))]})
    frame = pl.DataFrame({"user_id": queries, "item_id": [row % 5 for row in range(len(queries))]})
    split = random_rows(Interactions.from_frame(frame, queries=words), 0.0, 0.2, seed=1)
    sizes = np.diff(split.train.offsets)
    assert (sizes[sizes == 1].sum() > sizes.sum() / 2) == (question == "next")
    said, features = [], "query_tower.features=[{column: words, kind: text}]"
    config = resolve_question(configured(features, "data.split=random"), split, said.append)
    assert config.training.question == question
    assert ("the only row of their query" in said[0]) == (question == "next")
    assert resolve_question(configured("data.split=random"), split).training.question == "set"


def test_sequences_and_groups_ask_for_the_next_item_and_refuse_others(planted_time_split):
    sequence = "query_tower.history.sequence={}"
    assert resolve_question(configured(sequence), planted_time_split).training.question == "next"
    with pytest.raises(InputError, match="sequence tower"):
        resolve_question(configured(sequence, "training.question=horizon"), planted_time_split)
    with pytest.raises(InputError, match="several groups"):
        resolve_question(configured("objective.frequency=grouped", "training.question=set"), planted_time_split)
    with pytest.raises(InputError, match="needs timestamps"):
        split = planted_time_split
        without = replace(split, train=replace(split.train, timestamps=None))
        resolve_question(configured("training.question=horizon"), without)


@pytest.mark.parametrize("setting", ["query_tower.hidden=[32]", "objective.similarity=cosine", "item_tower.bias=false"])
def test_settings_of_the_towers_keep_the_towers(planted_time_split, setting):
    config = resolve_question(configured(setting), planted_time_split)
    assert config.training.question == "horizon"
    assert config.query_tower.history.heads == 4


def test_settings_that_leave_the_structure_are_kept(planted_time_split):
    config = resolve_question(
        configured("item_tower.dimension=24", "query_tower.history.length=7", "objective=full-softmax"),
        planted_time_split,
    )
    assert config.item_tower.dimension == 24 and config.query_tower.history.length == 7
    assert config.query_tower.history.heads == 1 and config.objective.sources is None


@pytest.mark.parametrize("question", ["horizon", "set"])
@pytest.mark.parametrize("towers_like", ["linear", "pooled"])
def test_rows_that_share_a_question_have_the_loss_of_rows_of_their_own(planted_time_split, question, towers_like):
    """One embedding and one line of logits for several targets: value and gradients of the plain rows."""
    settings = [f"training.question={question}", "query_tower.history.dropout=0.0"]
    if towers_like == "pooled":
        settings += ["query_tower.hidden=[16]", "query_tower.dropout=0.0"]
    config = resolve_question(configured(*settings), planted_time_split).resolved(1000)
    train = planted_time_split.train
    batches = make_batches(config, train)
    assert isinstance(batches, QuestionBatches)
    towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items)
    objective = build_objective(config, train, learnt=batches)
    known = KnownPositives(train) if needs_known_positives(config) else None
    assert known is not None
    batch = next(iter(batches))
    history = batch.history[batch.asked.of]
    alone = replace(batch, asked=replace_queries(batch), history=history)
    found = []
    for one in (batch, alone):
        towers.zero_grad()
        generator = torch.Generator().manual_seed(0)
        loss = compute_loss(towers, objective, one, known_positives=known, generator=generator)[0]
        loss.backward()
        found.append((loss.detach(), [p.grad.to_dense().clone() for p in towers.parameters() if p.grad is not None]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert any(float(a.abs().max()) > 1e-4 for a in found[0][1])


def replace_queries(batch):
    """Each row as a question of its own, drawn like the batch."""
    return replace(batch.asked, queries=batch.queries, of=torch.arange(len(batch)))


def test_a_default_run_beats_popularity_and_is_reproduced(planted_time_split):
    runs = [fit(planted_time_split, configured("training.max_epochs=2"), progress=False) for _ in range(2)]
    ranked = [run.rank(planted_time_split.test, 5, True) for run in runs]
    assert np.array_equal(*ranked)
    codes = planted_time_split.train.items.ids.to_numpy()
    parity = codes[ranked[0]] % 2 == (planted_time_split.test.queries % 2)[:, None]
    assert parity.mean() > 0.9


def test_a_time_split_of_baskets_asks_for_whole_baskets(planted_data):
    split = by_time(planted_data, 0.1, 0.15)
    config = resolve_question(Config(), split).resolved(1000)
    for batch in make_batches(config, split.train):
        assert (batch.history >= 0).any(1).all()
