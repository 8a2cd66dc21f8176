"""One training step: blocks of rows, weights, and what is embedded, compared with the same computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twotower.config.run import Config
from twotower.data import Batch, KnownPositives, SequenceBatches, TrainingBatches
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.losses.tiled import autograd
from twotower.objectives import Embedded
from twotower.objectives.build import build_objective
from twotower.towers import build_towers
from twotower.training import compute_loss
from twotower.training.step import _row_weights

IDS = ("query_tower.history=null", "query_tower.id_embedding=true")


def parts(train, *changes):
    """Build towers and objective of a small configuration."""
    config = Config.load(None, ["item_tower.dimension=8", "item_tower.hidden=[]", "query_tower.hidden=[]", *changes])
    torch.manual_seed(0)
    towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items)
    return towers.double(), build_objective(config, train).double()


def batch(train, rows=23, *, weighted=False):
    """Make a batch of rows that repeats queries and items."""
    place = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:rows]
    place[-4:] = place[:4]
    items, queries = (
        torch.from_numpy(codes.astype("int64"))[place] for codes in (train.item_codes, train.query_codes())
    )
    weights = torch.linspace(0.1, 2.0, rows, dtype=torch.float64) if weighted else None
    history = items[:, None].expand(-1, 5)
    return Batch(rows=place, queries=queries, items=items, history=history, weights=weights, mean_weight=0.8)


def gradients(loss, *modules):
    return torch.autograd.grad(loss, [p for module in modules for p in module.parameters()], allow_unused=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("each", [None, 1, 7, 100])
@pytest.mark.parametrize("name", ["expected-count", "in-batch-logq", "sampled-logistic", "bpr"])
def test_the_loss_equals_the_plain_losses_of_its_blocks(planted_split, name, each, weighted):
    """Every block of `each` rows draws in turn; each row is weighted by its share of all rows."""
    train = planted_split.train
    each = 3 if each == 1 and name == "in-batch-logq" else each  # a block of one row has no in-batch candidates
    towers, objective = parts(train, *IDS, f"objective.name={name}", f"objective.rows_per_draw={each or 'null'}")
    rows, known = batch(train, weighted=weighted), KnownPositives(train)
    options = {"known_positives": known, "generator": torch.Generator().manual_seed(3)}
    loss, embedded, drawn = compute_loss(towers, objective, rows, **options)
    rng = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    weights = torch.ones(len(rows), dtype=torch.float64) if rows.weights is None else rows.weights
    for start in range(0, len(rows), each or len(rows)):
        part = slice(start, start + (each or len(rows)))
        expected = objective.draw(
            rows.items[part], known_positives=known.pairs(rows.queries[part]), queries=rows.queries[part], generator=rng
        )
        vectors = Embedded(
            towers.embed_queries(rows.queries[part], None),
            towers.embed_items(rows.items[part]),
            towers.embed_items(expected.items),
            None if expected.row_items is None else towers.embed_items(expected.row_items.clamp(min=0)),
        )
        losses = objective(vectors, expected, temperature=towers.temperature)
        total = total + (losses * weights[part]).sum() / (len(rows) * (0.8 if weighted else 1.0))
    assert torch.equal(drawn.items, expected.items)
    assert torch.allclose(embedded.query, vectors.query)
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    for one, other in zip(gradients(loss, towers, objective), gradients(total, towers, objective), strict=True):
        assert torch.allclose(one, other, atol=1e-9)
        assert other.abs().max() > 1e-4


def test_a_batch_whose_rows_all_weigh_nothing_has_no_loss_and_no_gradient(planted_split):
    for name in ("expected-count", "refined-logq", "bpr"):
        towers, objective = parts(planted_split.train, *IDS, f"objective.name={name}")
        rows = batch(planted_split.train)
        rows = replace(rows, weights=torch.zeros(len(rows)), mean_weight=0.01)
        loss = compute_loss(towers, objective, rows)[0]
        assert loss.item() == 0.0
        for gradient in gradients(loss, towers, objective):
            assert gradient is None or float(gradient.abs().max()) == 0.0


def test_heavy_rows_count_as_their_weight_says(planted_split):
    """A tenth of the rows weighs 10: over an epoch they hold 10 / 19 of the loss, at any size of a batch."""
    train = planted_split.train
    weights = np.where(np.random.default_rng(0).permutation(len(train)) % 10 == 0, 10.0, 1.0).astype(np.float32)
    share = float(weights[weights > 1].sum() / weights.sum())
    for size in (4, 64):
        batches = TrainingBatches(replace(train, weights=weights), size, drop_last=False)
        total = {1.0: 0.0, 10.0: 0.0}
        for one in batches:
            found = _row_weights(one, len(one)) * len(one)
            for weight in total:
                total[weight] += float(found[one.weights == weight].sum())
        assert total[10.0] / sum(total.values()) == pytest.approx(share, rel=1e-5)
        assert sum(total.values()) == pytest.approx(len(train), rel=1e-5)


def test_data_whose_rows_all_weigh_nothing_is_refused(planted_split):
    train = replace(planted_split.train, weights=np.zeros(len(planted_split.train), dtype=np.float32))
    with pytest.raises(InputError, match="weights of all training rows are 0"):
        TrainingBatches(train, 8)
    with pytest.raises(InputError, match="weights of all training rows are 0"):
        SequenceBatches(train, 8, history_length=3)


def test_a_communicator_of_one_process_changes_nothing(planted_split):
    towers, objective = parts(planted_split.train, *IDS)
    rows = batch(planted_split.train)
    found = [
        compute_loss(towers, objective, rows, *one, generator=torch.Generator().manual_seed(0))[0]
        for one in ((), (Communicator(),))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changes", "repeats"),
    [
        (IDS, True),
        ((*IDS, "query_tower.hidden=[8]", "query_tower.dropout=0"), True),
        ((*IDS, "query_tower.hidden=[8]", "query_tower.dropout=0.1"), False),
        (("query_tower.history={length: 5}",), False),
        (("query_tower.history={length: 5, sequence: {kind: gru, blocks: 1}}",), False),
    ],
)
def test_repeated_queries_are_looked_for_only_where_the_tower_can_repeat(planted_split, monkeypatch, changes, repeats):
    towers, objective = parts(planted_split.train, *changes)
    assert towers.repeats_queries == repeats
    looked = []
    find = autograd.find_repeated
    monkeypatch.setattr(autograd, "find_repeated", lambda *inputs: looked.append(1) or find(*inputs))
    if "sequence" not in changes[0]:
        compute_loss(towers, objective, batch(planted_split.train))[0].backward()
        assert bool(looked) == repeats
