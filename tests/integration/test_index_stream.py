"""The index stream: items of the whole corpus, drawn uniformly, embedded by features, joining and leaving."""

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

import twotower as tt
from support.drawing import observe, standard_errors_off
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.negatives import DrawRequest
from twotower.objectives.build import build_objective

#: Items 0 to 9 have rows; 10 to 13 are in the item table only; 8 and 9 are no longer in the item table.
TABLE = [*range(8), 10, 11, 12, 13]
SETTINGS = [
    "data.catalog=table",
    "item_tower.features=auto",
    "objective.sources=[{in_batch: {}}, {index_stream: {size: 6}}]",
]


def rows(first=1_600_000_000, users=12, items=10, seed=0):
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.geometric(0.3, 150) - 1, items - 1)
    item[:items] = np.arange(items)
    when = first + np.sort(rng.integers(0, 10_000_000, 150))
    return pl.DataFrame({"user_id": rng.integers(0, users, 150), "item_id": item, "timestamp": when})


def table(items=TABLE):
    return pl.DataFrame({"item_id": items, "colour": [("red", "green", "blue")[j % 3] for j in items]})


@pytest.fixture(scope="module")
def data():
    return Interactions.from_frame(rows(), items=table(), catalog="table")


def build(data, *changes):
    return build_objective(Config.load(None, [*SETTINGS, *changes]), data)


def test_every_item_of_the_table_is_drawn_alike_and_no_other(data):
    stream = build(data, "objective.sources=[{index_stream: {size: 20000}}]").pool.members()[0]
    request = DrawRequest(torch.zeros(2, dtype=torch.int64))
    counts = torch.bincount(stream.draw(request), minlength=14)
    ids = data.items.ids.to_list()
    assert ids == list(range(14)) and [j for j in ids if counts[j]] == TABLE
    assert stats.chisquare(counts[TABLE].numpy()).pvalue > 1e-3
    claimed = stream.proposal.log_prob(torch.arange(14)).exp()
    assert claimed.tolist() == pytest.approx([1 / 12 if j in TABLE else 0.0 for j in range(14)])


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("head", [0, 3])
def test_the_partition_is_that_of_the_whole_catalog(data, unique, head):
    """Items that left the item table still arrive with the batch, and those without rows only with the stream."""
    sources = "{in_batch: {}}, {index_stream: {size: 6}}" + f", {{head: {{size: {head}}}}}" * (head > 0)
    objective = build(data, f"objective.sources=[{sources}]", f"objective.unique={str(unique).lower()}")
    codes = torch.from_numpy(data.item_codes.astype(np.int64))
    scores = torch.linspace(-1.0, 1.0, 14, dtype=torch.float64)[torch.randperm(14)]
    first, rng = int((codes == 2).nonzero()[0]), torch.Generator().manual_seed(3)
    rest = torch.cat([codes[:first], codes[first + 1 :]])

    def draw(_):
        others = rest[torch.randperm(len(rest), generator=rng)[:19]]
        return objective.pool.draw(torch.cat([codes[first, None], others]), generator=rng)

    estimates = observe(draw, 800, 14).partition(scores, 2)
    assert standard_errors_off(estimates, float(scores.exp().sum())) < 4
    seen = float(scores[:10].exp().sum())
    assert standard_errors_off(estimates, seen) > 10, "without the stream, items that have no rows would be missing"


def test_items_join_and_leave_between_runs():
    """With new rows and a new item table, the stream has the items that joined and none of those that left."""
    settings = [
        *SETTINGS,
        "training.max_epochs=1",
        "training.batch_size=32",
        "training.logger=none",
        "training.question=next",
        "training.recent_prior=false",
        "evaluation.exclude_seen=false",
        "item_tower.dimension=8",
    ]
    first = Interactions.from_frame(rows(), items=table(), catalog="table")
    config = Config.load(None, settings)
    parent = tt.fit(tt.splits.by_time(first, 0.1, 0.1), config, progress=False)
    later = Interactions.from_frame(
        rows(1_620_000_000, items=7, seed=1), items=table([*range(7), 11, 12, 20, 21]), catalog="table"
    )
    split = tt.continue_with(parent, later, config, withdrawn=[3])
    objective = build_objective(config, split.train)
    ids = split.train.items.ids.to_list()
    assert ids == [0, 1, 2, 4, 5, 6, 11, 12, 20, 21]
    stream = objective.pool.members()[1]
    drawn = stream.draw(DrawRequest(torch.zeros(2, dtype=torch.int64)))
    for _ in range(200):
        drawn = torch.cat([drawn, stream.draw(DrawRequest(torch.zeros(2, dtype=torch.int64)))])
    assert {ids[j] for j in drawn.tolist()} == set(ids)
    continued = tt.fit(split, config, warm_start=parent, progress=False)
    assert continued.artifact.items.ids.to_list() == ids and len(continued.artifact.item_embeddings) == len(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.catalog=interactions", "set data.catalog=table and pass the item table with --items FILE"),
        ("item_tower.features=none", "set item_tower.features=auto, or use uniform"),
        ("objective.sources=[{index_stream: {}}]", "setting 'size' is missing"),
    ],
)
def test_what_it_needs(data, change, message):
    with pytest.raises(InputError, match=message):
        build(data, change)
