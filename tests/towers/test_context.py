"""Tower inputs other than items: request context, query ids and features with a sequence, time gaps."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from twotower.config.run import Config
from twotower.data import Interactions, leave_last_out
from twotower.data.loading.gaps import GAP_CODES, gap_codes
from twotower.data.loading.packing import pack
from twotower.errors import InputError
from twotower.features import text as texts
from twotower.features.from_config import encode_context, encode_features
from twotower.features.parsing import ErrorLocation
from twotower.features.requests import given_gaps
from twotower.ranking.tower_ranker import TowerRanker, holdout_marks
from twotower.run import make_batches, row_gaps
from twotower.towers import ContextInputs, SequenceTower, SideInputs, build_towers
from twotower.training import compute_loss, embedding
from twotower.training.embedding import embed_rows

CONTEXT = "[{column: device, kind: categorical}, {column: tags, kind: multi}, {column: price, kind: numeric}]"
SMALL = [
    "training.batch_size=60",
    "item_tower.dimension=16",
    "query_tower.history.length=5",
    "query_tower.hidden=[12]",
    "objective.sources=[{uniform: {size: 9}}]",
]
SEQUENCE = "query_tower.history.sequence={kind: transformer, blocks: 1, dropout: 0.3, recency: 2}"
BESIDE = ["query_tower.id_embedding=true", "query_tower.features=[{column: age, kind: numeric}]"]


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    rows = 300
    frame = pl.DataFrame({
        "user_id": [f"u{q:02d}" for q in rng.integers(0, 25, rows)],
        "item_id": rng.integers(0, 40, rows),
        "timestamp": 1_600_000_000 + np.cumsum(2.0 ** rng.integers(0, 20, rows)).astype(int),
        "device": [["phone", "desk", None][d] for d in rng.integers(0, 3, rows)],
        "tags": [["a", "b", "c"][: int(n)] for n in rng.integers(0, 4, rows)],
        "price": rng.random(rows),
    })  # fmt: skip
    people = pl.DataFrame({"user_id": [f"u{q:02d}" for q in range(25)], "age": np.arange(25.0)})
    return Interactions.from_frame(frame, queries=people, context=["device", "tags", "price"])


def made(data, *changes):
    """Build towers, the first batch and the split, with all declared features encoded."""
    config = Config.load(None, [*SMALL, *changes]).resolved(len(data))
    split = leave_last_out(data)
    torch.manual_seed(0)
    features = encode_features(config, split.train)
    towers = build_towers(
        config,
        num_queries=data.num_queries,
        num_items=data.num_items,
        query_features=features.get("query"),
        context=features.get("context"),
    )
    with torch.no_grad():  # weights at which every part matters
        for parameter in towers.query_tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return towers, next(iter(make_batches(config, split.train, context=features.get("context")))), split


def test_a_whole_context_is_hidden_at_the_configured_rate(data):
    towers, batch, _ = made(data, f"query_tower.context={CONTEXT}", "query_tower.context_dropout=0.25")
    inputs = towers.query_tower.context
    assert isinstance(inputs, ContextInputs)
    rows = torch.arange(len(batch)).repeat(100)
    many = [one[rows] for one in batch.context]
    inputs.eval()
    known, nothing = inputs(many, len(rows)), inputs(None, 1)
    assert torch.equal(inputs(None, 3), nothing.expand(3, -1))
    inputs.train()
    found = inputs(many, len(rows))
    hidden = (found == nothing).all(1)
    assert torch.equal(found[~hidden], known[~hidden])
    shown_as_nothing = (known == nothing).all(1)  # rows with an entirely unknown context
    share = float(hidden[~shown_as_nothing].float().mean())
    spread = math.sqrt(0.25 * 0.75 / int((~shown_as_nothing).sum()))
    assert abs(share - 0.25) < 4.5 * spread


def test_a_pooled_tower_equals_its_formula(data):
    """The context is an input of the MLP, like the history, and is not part of the sum."""
    towers, batch, _ = made(data, f"query_tower.context={CONTEXT}")
    tower = towers.query_tower.eval()
    with torch.no_grad():
        pooled = tower.history(batch.history, tower.history_items)
        device, tags, price = batch.context
        vectors = tower.context.inputs.embeddings
        bags = torch.stack([vectors["1"].weight[row[row > 0]].sum(0) / max(int((row > 0).sum()), 1) for row in tags])
        joined = torch.cat([pooled.flatten(1), vectors["0"].weight[device.long()], bags, price], 1)
        expected = tower.mlp(joined) + pooled.mean(1)
        found = tower(batch.queries, batch.history, context=batch.context)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found, tower(batch.queries, batch.history).detach(), atol=1e-3)


@pytest.mark.parametrize("beside", [(), BESIDE], ids=["context", "context, ids, features"])
def test_with_side_inputs_every_position_equals_its_prefix_alone(data, beside):
    """Compare outputs of whole sequences with every prefix as a history with its own context, and with the formula."""
    towers, batch, split = made(data, SEQUENCE, f"query_tower.context={CONTEXT}", *beside)
    towers.eval()
    tower = towers.query_tower
    assert isinstance(tower, SequenceTower) and isinstance(tower.beside, SideInputs)
    offsets, items = split.train.offsets, split.train.item_codes
    with torch.no_grad():
        together = embed_rows(towers, batch)
        state = tower._outputs(batch.sequences)
        parts = [state]
        total = state
        if beside:
            parts.append(tower.beside.ids.weight[batch.queries])
            total = state + parts[1]
            parts.append(tower.beside.features(batch.queries))
        parts.append(tower.beside.context(batch.context, len(batch)))
        formula = torch.nn.functional.normalize(tower.beside.mlp(torch.cat(parts, 1)) + total, dim=1)
        torch.testing.assert_close(together, formula, atol=1e-6, rtol=1e-5)
        first = batch.sequences.positions[batch.sequences.rows]  # how many items of its window a row has seen
        for place in range(0, len(batch), 7):
            row, query = int(batch.rows[place]), batch.queries[place : place + 1]
            seen = items[row - int(first[place]) : row].astype(np.int64)
            assert row - int(first[place]) >= offsets[int(query)]
            own = [one[place : place + 1] for one in batch.context]
            alone = towers.embed_queries(query, torch.from_numpy(seen)[None], context=own)
            torch.testing.assert_close(alone[0], together[place], atol=1e-5, rtol=1e-4)
    assert len(together) == len(batch) == len(batch.sequences.rows)


def test_a_sequence_tower_without_side_inputs_returns_its_state(data):
    """Without side inputs the tower has no extra parameters, and its output is the state itself."""
    towers, batch, _ = made(data, SEQUENCE)
    assert towers.query_tower.beside is None and towers.query_tower.gaps is None
    assert not any("beside" in name or "gaps" in name for name, _ in towers.named_parameters())
    assert batch.context is None and batch.sequences.gaps is None
    towers.eval()
    state = towers.query_tower._outputs(batch.sequences)
    assert torch.equal(towers.query_tower.embed(batch.sequences), state)


def step(towers, batch, objective, micro_batch):
    torch.manual_seed(5)
    towers.zero_grad()
    generator = torch.Generator().manual_seed(1)
    loss, _, _ = compute_loss(towers, objective, batch, micro_batch=micro_batch, generator=generator)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in towers.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, float(torch.rand(()))


KINDS = {
    "transformer": [SEQUENCE],
    "everything": [SEQUENCE, "query_tower.history.sequence.gaps=true", f"query_tower.context={CONTEXT}", *BESIDE],
    "gru, items by their tower": [
        "query_tower.history.sequence={kind: gru, blocks: 2, dropout: 0.3}",
        "query_tower.history.item_features=true",
        "item_tower={dimension: 16, hidden: [8], dropout: 0.2}",
    ],
    "pooled": [f"query_tower.context={CONTEXT}", *BESIDE],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [7, 23])
def test_the_gradient_cache_is_exact_with_dropout(data, kind, chunk, monkeypatch):
    """Compare with the same parts without the cache: loss, gradients, and the subsequent random numbers."""
    from twotower.objectives.build import build_objective

    towers, batch, split = made(data, *KINDS[kind])
    objective = build_objective(Config.load(None, [*SMALL, *KINDS[kind]]), split.train)
    towers.train()
    value, gradients, following = step(towers, batch, objective, chunk)
    assert min(float(g.abs().max()) for name, g in gradients.items() if "query_tower" in name) > 1e-9
    calls = []

    def kept(embed, parts, *, anchor):
        calls.append(len(parts))
        return torch.cat([embed(*part) for part in parts])

    monkeypatch.setattr(embedding, "cached_parts", kept)
    monkeypatch.setattr("twotower.training.embedding.cached_parts", kept)
    expected, expected_gradients, expected_following = step(towers, batch, objective, chunk)
    assert max(calls) >= 3
    assert value == pytest.approx(expected, rel=1e-6) and following == expected_following
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n} {text}"
        )
    # Restoring the random state matters: another dropout mask would give other gradients.
    monkeypatch.undo()
    monkeypatch.setattr(embedding, "_restore", lambda states: None)
    _, other, _ = step(towers, batch, objective, chunk)
    assert any(not torch.allclose(other[n], g, atol=1e-4, rtol=1e-2) for n, g in expected_gradients.items())


def test_without_dropout_parts_equal_the_whole_batch(data):
    """In evaluation mode the gradient with parts equals that of one pass over all sequences."""
    from twotower.objectives.build import build_objective

    towers, batch, split = made(data, *KINDS["everything"])
    objective = build_objective(Config.load(None, [*SMALL, *KINDS["everything"]]), split.train)
    towers.eval()
    one, other = step(towers, batch, objective, None), step(towers, batch, objective, 17)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, atol=2e-6, rtol=1e-3)


def test_parts_of_a_pack_contain_its_sequences_in_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 13)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    codes = rng.integers(0, 40, lengths.sum())
    packed, _, _ = pack(starts, lengths, codes, last_only=False, gaps=rng.integers(0, 9, len(codes)))
    for tokens in (1, 10, 1000):
        parts = packed.parts(tokens)
        assert torch.cat([p.tokens for p in parts]).equal(packed.tokens)
        assert torch.cat([p.gaps for p in parts]).equal(packed.gaps)
        assert torch.cat([p.tokens[p.rows] for p in parts]).equal(packed.tokens[packed.rows])
        assert all(len(p.tokens) <= tokens or p.shapes[0][0] == 1 for p in parts)
        assert len(parts) >= len(packed.shapes)
    assert len(packed.parts(1)) == len(lengths)


def test_gap_codes_are_powers_of_two():
    offsets = np.array([0, 4, 4, 6])
    seconds = np.array([100, 100, 101, 109, 50, 49])
    found = gap_codes(offsets, seconds * 1_000_000)
    assert found.tolist() == [0, 1, 1 + math.floor(math.log2(2)), 1 + math.floor(math.log2(9)), 0, 1]
    assert gap_codes(np.array([0, 2]), np.array([0, 2**62])).max() == GAP_CODES - 1
    assert gap_codes(np.array([0, 0]), np.zeros(0, dtype=np.int64)).tolist() == []
    texts = ["2024-05-01 10:00:00", "2024-05-01 10:00:08"]
    assert given_gaps(texts, 2).tolist() == given_gaps([1_714_557_600, 1_714_557_608], 2).tolist() == [0, 4]
    assert given_gaps(None, 2).tolist() == [0, 0]
    with pytest.raises(InputError, match="times: expected 3, one per item of the history; found 2"):
        given_gaps(texts, 3)
    with pytest.raises(InputError, match="unix time or ISO text"):
        given_gaps(["a", "b"], 2)


@pytest.mark.parametrize("encoder", ["transformer", "gru"])
def test_gaps_are_the_same_in_training_and_in_ranking(data, encoder):
    """By hand: the encoder reads the item's vector plus that of the gap before it, none for a window's first item."""
    settings = f"query_tower.history.sequence={{kind: {encoder}, blocks: 1, dropout: 0, gaps: true}}"
    towers, batch, split = made(data, settings)
    towers.eval()
    tower, train = towers.query_tower, split.train
    codes = gap_codes(train.offsets, train.timestamps)
    assert len(set(codes.tolist())) > 8
    seen = {}
    forward = tower.encoder.forward

    def noted(x, positions, shapes):
        seen["x"] = x.clone()
        return forward(x, positions, shapes)

    tower.encoder.forward = noted
    with torch.no_grad():
        together = embed_rows(towers, batch)
        sequences = batch.sequences
        first = sequences.positions[sequences.rows]
        for place in range(0, len(batch), 5):
            row, before = int(batch.rows[place]), int(first[place])
            if before == 0:
                expected = tower.start * 4.0 + tower.gaps.weight[0]
            else:
                gap = int(codes[row - 1]) if before > 1 else 0
                expected = tower.history_items.weight[int(train.item_codes[row - 1])] * 4.0 + tower.gaps.weight[gap]
            torch.testing.assert_close(seen["x"][sequences.rows[place]], expected, atol=1e-5, rtol=1e-5)
        rows = batch.rows.numpy()
        starts = rows - first.numpy()
        history = (
            np.concatenate([[0], np.cumsum(first.numpy())]).astype(np.int64),
            np.concatenate([train.item_codes[a:b] for a, b in zip(starts, rows, strict=True)]),
        )
        gaps = np.concatenate([codes[a:b] for a, b in zip(starts, rows, strict=True)])
        ranker = TowerRanker(towers, 5)
        alone = ranker.embed(batch.queries.numpy(), history, marks=gaps)
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)
        without = ranker.embed(batch.queries.numpy(), history)
        assert not torch.allclose(without, together, atol=1e-3)
        # Items before the newest L, and the gap before the first of these, have no effect.
        longer = (np.array([0, 7]), np.array([1, 2, 3, 4, 5, 6, 7], dtype=np.int32))
        some = [np.array([0, 9, far, 3, 4, 5, 6], dtype=np.int8) for far in (2, 20)]
        one, other = (ranker.embed(np.array([-1]), longer, marks=g) for g in some)
        assert torch.equal(one, other)
        rectangle = torch.tensor([[-1, 3, 4, 5, 6], [1, 2, 3, 4, 5]])
        between = torch.tensor([[0, 9, 3, 4, 5], [7, 9, 2, 3, 4]])
        exported = tower._rectangle(rectangle, between)
        torch.testing.assert_close(
            exported, tower(torch.tensor([-1, -1]), rectangle, gaps=between), atol=1e-5, rtol=1e-4
        )
    assert len(holdout_marks(split.test, ranker.towers)) == len(split.test.history_items)
    config = Config.load(None, [*SMALL, settings])
    assert np.array_equal(row_gaps(config, train), codes) and row_gaps(Config(), train) is None


def test_gaps_need_times(data):
    bare = Interactions(data.queries, data.items, data.offsets, data.item_codes)
    config = Config.load(None, [*SMALL, "query_tower.history.sequence={gaps: true}"]).resolved(len(bare))
    with pytest.raises(InputError, match="gaps: the data has no timestamps"):
        make_batches(config, bare)


def test_a_text_of_many_rows_is_encoded_and_stored_once(data, monkeypatch):
    asked = []

    def vectors(names, model):
        asked.append(names.to_list())
        return np.stack([np.random.default_rng(list(name.encode())).normal(size=5) for name in names]).astype("f4")

    monkeypatch.setattr(texts, "embed_texts", vectors)
    monkeypatch.setattr(texts, "_model", lambda name: SimpleNamespace(get_embedding_dimension=lambda: 5))
    words = pl.Series("device", [("phone", " tablet", None, "")[row % 4] for row in range(len(data))])
    data = replace(data, context=data.context.with_columns(words))
    config = Config.load(None, [*SMALL, "query_tower.context=[{column: device, kind: text, model: m}]"])
    context = encode_features(config, data)["context"]
    encoded = encode_context(context.features, data)[0]
    assert asked == [["phone", "tablet"]] and encoded.values.shape == (3, 6) and len(encoded) == len(data)
    wanted = context.features.encode_rows(data.context, ErrorLocation("rows"))[0]
    assert np.array_equal(encoded[np.arange(len(data))], wanted)
    batch = next(iter(make_batches(config.resolved(len(data)), data, context=context)))
    assert np.array_equal(batch.context[0].numpy(), wanted[batch.rows.numpy()])


def test_contexts_belong_to_their_rows_in_any_order(data):
    """The first batch's encoded context belongs to its rows, also for a selection of rows."""
    config = Config.load(None, [*SMALL, f"query_tower.context={CONTEXT}"]).resolved(len(data))
    train = leave_last_out(data).train
    features = encode_features(config, train)["context"]
    encoded = encode_context(features.features, train)
    batch = next(iter(make_batches(config, train, rows=np.arange(3, 150, 2), context=features)))
    for own, whole in zip(batch.context, encoded, strict=True):
        assert np.array_equal(own.numpy(), whole[batch.rows.numpy()])
