"""Types of events in the towers: pooled histories and item coordinates by type, against loops in float64."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from twotower import run
from twotower.config.run import Config
from twotower.data import Interactions, by_time, with_events
from twotower.data.loading.event_codes import event_codes
from twotower.errors import InputError
from twotower.negatives import HardNegatives
from twotower.objectives.build import build_objective
from twotower.ranking.tower_ranker import TowerRanker, holdout_marks
from twotower.run import make_batches
from twotower.run.mining import refresh_hard_negatives
from twotower.serving import Retriever
from twotower.towers.two_tower import PRIOR_ROWS, PooledHistory
from twotower.training.embedding import embed_rows

TYPES = {"click": 1.0, "buy": 3.0}
SMALL = [
    "training={max_epochs: 1, batch_size: 64, question: next, recent_prior: false, logger: none}",
    "item_tower.dimension=8",
    "query_tower={history: {length: 6, heads: 2, dropout: 0, event_weights: true}, dropout: 0}",
    "data.events={column: event, weights: {click: 1, buy: 3}}",
]


def log(rows=900, seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 40, rows),
            "item_id": rng.integers(0, 25, rows),
            "timestamp": 1_600_000_000 + 600 * np.arange(rows),
            "event": rng.choice(list(TYPES), rows, p=[0.7, 0.3]),
        }
    )


@pytest.fixture(scope="module")
def model():
    data = with_events(Interactions.from_frame(log(), context=["event"]), "event", TYPES)
    return run.fit(by_time(data, 0.1, 0.2), Config.load(None, SMALL), progress=False)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("types") / "model")


def _batches(model):
    inputs = model.artifact.towers.query_tower.context.inputs
    return make_batches(model.artifact.config, model.split.train, context=inputs.table)


def pooled_by_loops(weights, by_type, history, events, asked, table):
    """The averages of every head for every row, one item at a time; type -1 is the last row and column of g."""
    found = []
    for row, items in enumerate(history):
        heads = []
        for head, by_step in enumerate(weights):
            sums, total = [0.0] * len(table[0]), 0.0
            for place, item in enumerate(items):
                if item < 0:
                    continue
                weight = math.exp(by_step[place] + by_type[head][asked[row]][events[row][place]])
                total += weight
                sums = [one + weight * value for one, value in zip(sums, table[item], strict=True)]
            heads.append([one / total for one in sums] if total else sums)
        found.append(heads)
    return found


def test_negatives_are_mined_for_the_default_type(model):
    train, config = model.split.train, Config.load(None, [*SMALL, "objective.sources=[{mined: {size: 4}}]"])
    objective = build_objective(config, train)
    refresh_hard_negatives(objective, train, 6, events=config.data.events)(model.artifact.towers)
    mined = next(one for one in objective.pool.members() if isinstance(one, HardNegatives)).items.numpy()
    ranker, queries = TowerRanker(model.artifact.towers, 6), np.arange(train.num_queries)
    marks, best = event_codes(train.event_types(), tuple(TYPES)), {}
    for event in TYPES:
        context = [{"event": event}] * len(queries)
        embedded = ranker.embed(queries, (train.offsets, train.item_codes), context=context, marks=marks)
        scores = embedded @ ranker.item_embeddings.T
        scores[train.query_codes(), train.item_codes] = -torch.inf
        best[event] = scores.topk(4).indices.numpy()
    assert np.array_equal(mined, best["buy"]) and not np.array_equal(mined, best["click"])


@pytest.mark.parametrize("heads", [1, 3])
def test_a_history_is_pooled_by_the_type_asked_for_and_the_types_of_its_items(heads):
    rng = torch.Generator().manual_seed(heads)
    history = torch.tensor([[-1, 4, 2, 0], [1, 1, 3, 5], [-1, -1, -1, -1], [-1, -1, -1, 2]])
    events = torch.tensor([[-1, 0, 1, -1], [1, 0, 0, 1], [-1, -1, -1, -1], [-1, -1, -1, 1]])
    asked = torch.tensor([1, 0, 1, -1])
    pooled = PooledHistory(4, heads, event_types=2)
    with torch.no_grad():
        pooled.event_weight.add_(torch.randn(pooled.event_weight.shape, generator=rng))
    table = torch.nn.Embedding(6, 3)
    found = pooled(history, table, events, asked)
    arguments = pooled.log_weight.tolist(), pooled.event_weight.tolist()
    expected = pooled_by_loops(*arguments, history.tolist(), events.tolist(), asked.tolist(), table.weight.tolist())
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    # Gradients by finite differences, of every weight of a pair of types.
    found.pow(2).sum().backward()
    gradient, weight = pooled.event_weight.grad, pooled.event_weight.detach()
    for place in np.ndindex(*weight.shape):
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                weight[place] += step
                values.append(float(pooled(history, table, events, asked).double().pow(2).sum()))
                weight[place] -= step
        assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-2, abs=2e-3)
    # Without types, everything is unknown; this is different here.
    unknown = pooled(history, table)
    torch.testing.assert_close(unknown, pooled(history, table, torch.full_like(events, -1), torch.full((4,), -1)))
    assert not torch.allclose(unknown[:2], found[:2], atol=1e-3)


def test_the_share_of_an_item_among_the_rows_of_a_type_is_added_to_its_score(model):
    train, towers = model.split.train, model.artifact.towers
    rows = [(int(item), kind) for item, kind in zip(train.item_codes, train.context["event"], strict=True)]
    names = list(TYPES)
    share = [(sum(kind == name for _, kind in rows) + 1) / (len(rows) + 2) for name in names]
    expected = []
    for item in range(train.num_items):
        own = [kind for code, kind in rows if code == item]
        expected.append(
            [
                math.log((sum(kind == name for kind in own) + PRIOR_ROWS * p) / (len(own) + PRIOR_ROWS) / p)
                for name, p in zip(names, share, strict=True)
            ]
        )
    assert towers.by_event.numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert towers.width == 10
    # The score is that of the first D coordinates, and the coordinate of the type that is asked for.
    ranker, history = TowerRanker(towers, 6), (np.array([0, 2, 4]), np.array([3, 4, 3, 4], dtype=np.int32))
    queries = ranker.embed(np.array([-1, -1]), history, context=[{"event": "buy"}, {"event": "click"}])
    items = ranker.item_embeddings
    scores = queries @ items.T / towers.temperature
    plain = queries[:, :8] @ items[:, :8].T / towers.temperature
    added = torch.tensor([[row[1] for row in expected], [row[0] for row in expected]])
    torch.testing.assert_close(scores, plain + added, atol=1e-4, rtol=1e-4)
    unknown = ranker.embed(np.array([-1]), (np.array([0, 2]), history[1][:2]))
    assert unknown[0, 8:].tolist() == [0.0, 0.0]
    new = towers._of_items(torch.ones(1, 8), torch.tensor([-1]))
    assert new[0, 8:].tolist() == [0.0, 0.0], "an item without training rows"


def test_the_type_is_never_hidden_in_training(model):
    inputs = model.artifact.towers.query_tower.context
    inputs.train()
    inputs.dropout = 0.9
    encoded = [torch.full((200,), 2)]
    assert torch.equal(inputs(encoded, 200), inputs.inputs.embed(encoded))
    inputs.eval()


def test_batches_rankings_and_requests_read_the_same_types(model, folder):
    split, towers = model.split, model.artifact.towers
    train = split.train
    batches = _batches(model)
    batch = batches.part(np.arange(5, 60))
    codes = event_codes(train.event_types(), list(TYPES))
    names = train.context["event"].to_list()
    assert [list(TYPES)[code] for code in codes] == names
    for row, history, events in zip(batch.rows.tolist(), batch.history, batch.history_events, strict=True):
        kept = history >= 0
        assert events[kept].tolist() == codes[row - int(kept.sum()) : row].tolist()
        assert (events[~kept] == -1).all()
    towers.eval()
    with torch.no_grad():
        by_batch = embed_rows(towers, batch)
        in_chunks = embed_rows(towers, batch, chunk=7)
    torch.testing.assert_close(in_chunks, by_batch, atol=1e-5, rtol=1e-4)
    starts = train.offsets[batch.queries.numpy()]
    spans = list(zip(starts.tolist(), batch.rows.tolist(), strict=True))
    offsets = np.concatenate([[0], np.cumsum([end - start for start, end in spans])])
    items = np.concatenate([train.item_codes[start:end] for start, end in spans])
    marks = np.concatenate([codes[start:end] for start, end in spans])
    asked = [{"event": names[row]} for row in batch.rows.tolist()]
    ranker = TowerRanker(towers, 6)
    by_ranker = ranker.embed(batch.queries.numpy(), (offsets, items), context=asked, marks=marks)
    torch.testing.assert_close(by_ranker, by_batch, atol=1e-5, rtol=1e-4)
    # What is held out has the types of its histories, and a saved model those of all rows.
    test = split.test
    first = slice(test.history_offsets[0], test.history_offsets[1])
    start = int(split.data.offsets[test.queries[0]])
    every = event_codes(split.data.event_types(), list(TYPES))
    assert holdout_marks(test, towers)[first].tolist() == every[start : start + first.stop].tolist()
    retriever = Retriever.load(folder)
    assert np.array_equal(retriever.artifact.history_events, every)
    assert np.array_equal(retriever.rank(test, 5, True), model.rank(test, 5, True))


def test_a_request_gives_the_types_of_its_history(folder):
    retriever = Retriever.load(folder)
    items, kinds = [3, 4, 5], ["click", "buy", "click"]
    given = retriever.recommend(histories=[items], history_events=[kinds], event="click")
    batch = retriever.embed(
        np.array([-1]),
        (np.array([0, 3]), retriever.artifact.items.encode(items).astype(np.int32)),
        context=[{"event": "click"}],
        marks=np.array([0, 1, 0], dtype=np.int8),
    )
    scores = (batch @ retriever.artifact.item_embeddings.T)[0]
    assert given["score"].to_numpy() == pytest.approx(
        [float(scores[retriever.artifact.items.encode([item])[0]]) for item in given["item"]], abs=1e-5
    )
    # Without types, those of a request: buy has the largest weight.
    as_default = retriever.recommend(histories=[items], history_events=[["buy"] * 3], event="click")
    assert retriever.recommend(histories=[items], event="click").equals(as_default)
    assert not as_default["score"].equals(given["score"])
    for events, message in (
        ([["click"]], "expected a list with one type per item of the history, 3; found 1"),
        ([["click", "refund", "click"]], "'refund'; expected 'click', 'buy'"),
        (["click"], "expected a list with one type per item"),
        ([kinds, kinds], "expected one row of history_events for each history"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.recommend(histories=[items], history_events=events)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["query_tower.history={event_weights: true, sequence: {}}"], "a sequence tower does not read the types"),
        (["query_tower.history.event_weights=true"], "event_weights: true: the rows have no event types"),
        (["item_tower.event_share=0.5"], "event_share: 0.5: the rows have no event types"),
    ],
)
def test_what_cannot_read_types_says_so(changes, message):
    with pytest.raises(InputError, match=message):
        config = Config.load(None, [*SMALL[:2], *changes])
        run.fit(by_time(Interactions.from_frame(log()), 0.1, 0.2), config, progress=False)


def test_a_column_of_types_with_buckets_is_rejected():
    data = with_events(Interactions.from_frame(log(), context=["event"]), "event", TYPES)
    hashed = "query_tower.context=[{column: event, kind: categorical, buckets: 4}]"
    with pytest.raises(InputError, match="each type needs its own value; remove buckets"):
        run.fit(by_time(data, 0.1, 0.2), Config.load(None, [*SMALL, hashed]), progress=False)


def test_sequence_towers_add_the_share_of_the_type(folder):
    del folder
    data = with_events(Interactions.from_frame(log(), context=["event"]), "event", TYPES)
    changes = [SMALL[0], SMALL[1], SMALL[3], "query_tower.history={length: 6, sequence: {kind: gru, blocks: 1}}"]
    model = run.fit(by_time(data, 0.1, 0.2), Config.load(None, changes), progress=False)
    towers = model.artifact.towers
    assert towers.width == 10 and towers.history_marks is None
    asked = TowerRanker(towers, 6).embed_holdout(model.split.test)[:, 8:]
    kinds = model.split.test.context["event"].to_list()
    assert asked.tolist() == [[float(kind == name) for name in TYPES] for kind in kinds]
    with torch.no_grad():
        batches = make_batches(
            model.artifact.config, model.split.train, context=towers.query_tower.context.inputs.table
        )
        batch = next(iter(batches))
        embedded = embed_rows(towers, batch)
    names = model.split.train.context["event"]
    assert embedded[:, 8:].argmax(1).tolist() == [list(TYPES).index(names[row]) for row in batch.rows.tolist()]
