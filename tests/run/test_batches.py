"""The batches of a configuration: each row has candidates, or the run is rejected before it starts."""

import re
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch

from twotower.config.run import Config
from twotower.data import Interactions, KnownPositives
from twotower.errors import InputError
from twotower.objectives.build import build_objective
from twotower.run import make_batches
from twotower.towers import build_towers
from twotower.training import compute_loss

IN_BATCH, MIXED = "objective.sources=[{in_batch: {}}]", "objective.sources=[{in_batch: {}}, {uniform: {size: 6}}]"
TOWERS = (
    "query_tower.history=null",
    "query_tower.id_embedding=true",
    "training.question=next",
    "item_tower.dimension=4",
)
SEQUENCE = "query_tower.history={length: 4, sequence: {kind: gru, blocks: 1}}"


def interactions(sizes=(40,), queries=20):
    """Make rows of markets of these sizes."""
    rng = np.random.default_rng(0)
    market = np.repeat(np.arange(len(sizes)), sizes)
    frame = pl.DataFrame(
        {"user_id": rng.integers(0, queries, len(market)), "item_id": rng.integers(0, 9, len(market)), "market": market}
    )
    return Interactions.from_frame(frame, columns={"group": "market"})


def config(train, *changes):
    return Config.load(None, [*TOWERS, *changes]).resolved(len(train))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("training.batch_size=1",), "training.batch_size: 1; a batch of one row has no other rows"),
        (("training.batch_size=8", "objective.rows_per_draw=1"), "objective.rows_per_draw: 1; a block of one row"),
        (("training.batch_size=1", SEQUENCE), "training.batch_size: 1; a batch has one sequence"),
    ],
)
def test_in_batch_alone_is_rejected_before_training_if_a_draw_has_no_other_rows(changes, message):
    """The sequences were trained on no candidates at all, with loss 0, without a message."""
    train = interactions()
    with pytest.raises(InputError, match=re.escape(message)) as error:
        make_batches(config(train, IN_BATCH, *changes), train)
    assert "in_batch alone gives it no candidates; use larger batches, or add a source such as uniform" in str(
        error.value
    )
    make_batches(config(train, MIXED, *changes), train)


@pytest.mark.parametrize("size", [1, 8])
def test_at_least_two_questions_share_a_batch(size):
    """Fewer than 100 questions had one a batch, so that an epoch has 50 batches: in-batch alone had loss 0."""
    train = interactions()
    settings = config(train, IN_BATCH, f"training.batch_size={size}", "training.question=set")
    batches = make_batches(settings, train)
    assert batches.questions_per_batch == 2
    objective = build_objective(settings, train, learnt=batches)
    towers = build_towers(settings, num_queries=train.num_queries, num_items=train.num_items)
    losses = [
        float(compute_loss(towers, objective, batch, known_positives=KnownPositives(train))[0].detach())
        for batch in batches
    ]
    assert max(losses) > 0


def test_one_row_to_train_on_is_rejected_with_in_batch_alone():
    train = interactions()
    with pytest.raises(InputError, match="a batch of one row has no other rows"):
        make_batches(config(train, IN_BATCH, "training.batch_size=64"), train, rows=np.array([3]))


@pytest.mark.parametrize("sources", [IN_BATCH, MIXED])
def test_a_last_block_of_one_row_joins_the_block_before(sources):
    """Batches of 13 rows in blocks of 4: with in-batch alone, the last row has nothing to be drawn from."""
    train = interactions()
    settings = config(train, sources, "training.batch_size=13", "objective.rows_per_draw=4")
    objective = build_objective(settings, train)
    sizes, draw = [], objective.draw
    objective.draw = lambda request: sizes.append(len(request.positives)) or draw(request)
    towers = build_towers(settings, num_queries=train.num_queries, num_items=train.num_items)
    for batch in make_batches(settings, train):
        loss = compute_loss(towers, objective, batch)[0]
        assert float(loss.detach()) > 0
    assert sizes == [4, 4, 5] * 3


@pytest.mark.parametrize("blocks", ["null", "3"])
def test_every_row_of_a_group_smaller_than_a_batch_is_trained_in_every_epoch(blocks):
    """Groups of 5, 3 and 1 rows with batches of 8; the row that is alone has the uniform candidates."""
    train = interactions((21, 5, 1, 3, 1))
    settings = config(
        train, MIXED, "training.batch_size=8", "objective.frequency=grouped", f"objective.rows_per_draw={blocks}"
    )
    batches, objective = make_batches(settings, train), build_objective(settings, train)
    towers = build_towers(settings, num_queries=train.num_queries, num_items=train.num_items)
    small = np.flatnonzero(np.asarray(train.groups) > 0).tolist()
    for _ in range(3):
        met = Counter()
        for batch in batches:
            met.update(batch.rows.tolist())
            (gradient,) = torch.autograd.grad(
                compute_loss(towers, objective, batch)[0], towers.query_tower.ids.weight, allow_unused=True
            )
            moved = gradient.to_dense().abs().sum(1) > 0
            assert bool(moved[batch.queries].all()), "each row has a gradient"
        assert [met[row] for row in small] == [1] * 10
        assert sum(met.values()) == 16 + 10


def test_rows_that_are_alone_in_their_group_have_nothing_to_learn_from_in_batch_alone(caplog):
    """The softmax over the items of a group with one item is 1: such rows are omitted, and reported."""
    train = interactions((21, 5, 1, 3, 1))
    settings = config(train, IN_BATCH, "training.batch_size=8", "objective.frequency=grouped")
    batches = make_batches(settings, train)
    assert "2 rows are not used for training" in caplog.text
    assert "in_batch alone gives it no candidates; add a source such as uniform" in caplog.text
    rows = [row for batch in batches for row in batch.rows.tolist()]
    groups = np.asarray(train.groups)[rows]
    assert np.bincount(groups, minlength=5).tolist() == [16, 5, 0, 3, 0]
