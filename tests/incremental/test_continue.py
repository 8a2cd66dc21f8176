"""Tests of incremental training: growing changes no retained row, knowledge stays, new items are learnt."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import twotower as tt
from twotower.config.run import Config
from twotower.data import Holdout, Interactions, TrainingBatches
from twotower.errors import InputError, Interrupted
from twotower.incremental import ParentModel
from twotower.incremental.warm_start import (
    CodeMaps,
    continue_streaming,
    extend_features,
    grow,
    load_parent_state,
    named_tables,
    row_maps,
)
from twotower.negatives import StreamingFrequency
from twotower.objectives.build import build_objective
from twotower.run import model as run_model
from twotower.run import reread
from twotower.run.validation import Validator
from twotower.serving import Retriever
from twotower.towers import build_towers
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.module import TrainingModule

SMALL = [
    "training.batch_size=64",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "training.logger=none",
    "item_tower.dimension=16",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
]
KINDS = {
    "default": ["training.learning_rate=0.01", "query_tower.history.length=10"],
    "mf": [
        "query_tower={history: null, id_embedding: true, hidden: [], dropout: 0}",
        "objective.similarity=dot",
        "objective.temperature=1.0",
        "training.learning_rate=0.03",
    ],
    "dnn": [
        "training.learning_rate=0.01",
        "query_tower={hidden: [32], features: auto, history: {length: 10, item_features: true}}",
        "item_tower={dimension: 16, hidden: [32], layer_norm: true, residual: true, features: auto, id_dropout: 0.3}",
        "objective.sources=[{in_batch: {}}, {frequency: {size: 20, power: 0}}]",
    ],
    "sequence": [
        "training.learning_rate=0.01",
        "query_tower={hidden: [], history: {length: 20, dropout: 0.1, "
        "sequence: {kind: gru, blocks: 1, recency: 2, dropout: 0.1}}}",
        "objective.sources=[{frequency: {size: 40, power: 0.5}}]",
    ],
}
#: Numbers of items and queries in the old data and in the new data.
OLD_ITEMS, ITEMS, OLD_QUERIES, QUERIES = 60, 80, 60, 80
WITHDRAWN = [0, 1, 2, 3]


def config(kind, *changes):
    return Config.load(None, [*SMALL, *KINDS[kind], "training.max_epochs=12", "training.recent_prior=false", *changes])


def table(first, last):
    """Build the item table: items have the colour of their taste; the new data has one new colour."""
    colours = ["red", "blue"] if last <= OLD_ITEMS else ["red", "blue", "red", "azure"]
    return pl.DataFrame(
        {"item_id": range(first, last), "colour": [colours[j % len(colours)] for j in range(first, last)]}
    )


def people(first, last):
    return pl.DataFrame(
        {"user_id": [f"u{q:02d}" for q in range(first, last)], "age": [20.0 + q for q in range(first, last)]}
    )


def tastes(queries, items, start, seed, rows=14):
    """Draw interactions: even queries take even items, odd queries odd items."""
    rng = np.random.default_rng(seed)
    found = []
    for q in queries:
        pool = np.arange(items[0] + (q - items[0]) % 2, items[1], 2)
        for place, item in enumerate(rng.choice(pool, size=min(rows, len(pool)), replace=False)):
            found.append((f"u{q:02d}", int(item), start + 1000 * place + int(rng.integers(900))))
    return pl.DataFrame(found, schema=["user_id", "item_id", "timestamp"], orient="row")


OLD = tastes(range(OLD_QUERIES), (0, OLD_ITEMS), 1_600_000_000, 0)
#: Held out from the old data and never trained on.
HELD = OLD.group_by("user_id", maintain_order=True).last()
PAST = OLD.join(HELD, on=["user_id", "item_id"], how="anti")
#: In the new data only even queries are active: what the model knows of odd ones was learnt before.
NEW = tastes(range(0, QUERIES, 2), (20, ITEMS), 1_700_000_000, 1)


def interactions(frame, first, last, queries):
    items, users = table(first, last), people(*queries)
    return Interactions.from_frame(frame, items=items, queries=users)


@pytest.fixture(scope="module", params=[*list(KINDS)[:3], pytest.param("sequence", marks=pytest.mark.slow)])
def parent(request, tmp_path_factory):
    """Train a model on the old data; return kind, run folder and model."""
    folder = tmp_path_factory.mktemp(request.param)
    data = interactions(PAST, 0, OLD_ITEMS, (0, OLD_QUERIES))
    split = tt.splits.leave_last_out(data)
    model = tt.fit(split, config(request.param), directory=folder, progress=False)
    model.save(folder / "model")
    return request.param, folder, model


@pytest.fixture(scope="module")
def days(parent):
    kind, folder, _ = parent
    new = interactions(NEW, 0, ITEMS, (0, QUERIES))
    return tt.continue_with(folder, new, config(kind), withdrawn=WITHDRAWN)


@pytest.fixture(scope="module")
def child(parent, days):
    kind, folder, _ = parent
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        measure = Validator.__call__
        patch.setattr(run_model, "move_to_tables", lambda towers: calls.append("move"))
        patch.setattr(Validator, "__call__", lambda self, model: calls.append("validate") or measure(self, model))
        model = tt.fit(days, config(kind, "training.max_epochs=6"), warm_start=folder, progress=False)
    assert calls[:2] == ["move", "validate"], "layers are on the device of the tables before the parent is validated"
    return model


def grown_towers(parent, days):
    """Return the parent's towers with more rows, before any training."""
    _, folder, _ = parent
    known = ParentModel.load(folder)
    growth = extend_features(known, days)
    trained = torch.from_numpy(days.train.item_counts() > 0)
    towers = build_towers(
        known.artifact.config,
        num_queries=days.train.num_queries,
        num_items=days.train.num_items,
        item_features=growth.features.get("item"),
        query_features=growth.features.get("query"),
        trained_items=trained,
    )
    objective = build_objective(known.artifact.config, days.train)
    optimizer = load_parent_state(known, known.artifact.config, growth, towers=towers, objective=objective)
    return towers.eval(), optimizer


def test_growing_changes_no_retained_row(parent, days):
    _, _, model = parent
    towers, _ = grown_towers(parent, days)
    old = model.artifact.towers
    kept = np.flatnonzero(days.item_map >= 0)
    assert set(np.flatnonzero(days.item_map < 0)) == set(WITHDRAWN)
    assert torch.equal(towers.item_embeddings()[days.item_map[kept]], model.artifact.item_embeddings[kept])
    queries = torch.arange(len(days.query_map))
    history = torch.from_numpy(np.random.default_rng(0).choice(kept, size=(len(queries), 10)))
    moved = torch.from_numpy(days.item_map)[history]
    with torch.no_grad():
        now = towers.embed_queries(torch.from_numpy(days.query_map.copy()), moved)
        assert torch.equal(now, old.embed_queries(queries, history))
        assert now.std() > 0
    if towers.item_tower.features is None:
        fresh = np.setdiff1d(np.arange(days.train.num_items), days.item_map)
        rows = towers.item_tower.ids.weight[fresh].detach()
        assert len(rows) == (ITEMS - OLD_ITEMS) // 2  # odd items occur in no row
        assert float(rows.std()) == pytest.approx(16**-0.5, rel=0.15)  # as in a fresh table


def test_the_optimizer_state_is_transferred_row_by_row(parent, days):
    _, folder, model = parent
    towers, start = grown_towers(parent, days)
    objective = build_objective(model.artifact.config, days.train)
    module = TrainingModule(towers, objective, model.artifact.config.training, total_steps=10)
    optimizer = module.configure_optimizers()["optimizer"]

    class Trainer:
        optimizers = (optimizer,)

    start.on_fit_start(Trainer(), module)
    saved = SafeCheckpointIO().load_checkpoint(folder / "checkpoints" / "best.ckpt")["optimizer_states"][0]
    named = dict(towers.named_parameters())
    names = {id(value): name for name, value in named.items()}
    old = dict(model.artifact.towers.named_parameters())
    looked = 0
    for group, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], theirs["params"], strict=True):
            state = optimizer.state[parameter]
            assert float(state["step"]) == float(saved["state"][number]["step"]) > 0
            name = names[id(parameter)]
            is_table = towers.item_tower.ids is not None and parameter is towers.item_tower.ids.weight
            assert saved["state"][number]["mean"].shape == old[name].shape
            if is_table:
                looked += 1
                for code, new in enumerate(days.item_map):
                    if new >= 0:
                        assert torch.equal(state["variance"][new], saved["state"][number]["variance"][code])
                fresh = np.setdiff1d(np.arange(days.train.num_items), days.item_map)
                assert float(state["mean"][fresh].abs().max()) == 0.0
            elif state["mean"].shape == old[name].shape:
                assert torch.equal(state["mean"], saved["state"][number]["mean"])
    assert looked == 1


def old_questions(model):
    """Return the held-out old interactions of queries that are inactive in the new data, in a model's codes."""
    items, queries = model.artifact.items, model.artifact.queries
    asked = HELD.filter(
        ~pl.col("item_id").is_in(WITHDRAWN) & ~pl.col("user_id").is_in(NEW["user_id"].unique().implode())
    )
    past = {q: rows["item_id"].to_list() for (q,), rows in PAST.sort("timestamp").group_by("user_id")}
    codes = queries.encode(asked["user_id"])
    order = np.argsort(codes)
    histories = [[j for j in items.encode(past[q]) if j >= 0] for q in asked["user_id"].gather(order)]
    return Holdout(
        "old", codes[order], np.concatenate([[0], np.cumsum([len(h) for h in histories])]),
        np.concatenate(histories).astype(np.int32), np.arange(len(asked) + 1),
        items.encode(asked["item_id"])[order].astype(np.int32),
    )  # fmt: skip


def right_taste(model, holdout, k=10):
    """Return the share of the top k items that match their query's taste; chance is a half."""
    best = model.rank(holdout, k, True)
    item = model.artifact.items.ids.to_numpy()[best] % 2
    query = np.array([int(q[1:]) % 2 for q in model.artifact.queries.decode(holdout.queries)])
    return float((item == query[:, None]).mean())


#: How much of this share may be lost: the documented bound.
BOUND = 0.05


def test_old_knowledge_stays_and_is_lost_when_training_from_scratch(parent, days, child):
    kind, _, model = parent
    before, after = (right_taste(one, old_questions(one)) for one in (model, child))
    assert before > 0.85
    assert after > before - BOUND
    if kind == "dnn":
        return  # a fresh model learns the tastes of inactive queries from colours too
    new = days.train.select(~days.learnt)
    alone = tt.data.Split(new, days.validation, days.test, days.account, days.name, days.settings, days.data)
    scratch = tt.fit(alone, config(kind, "training.max_epochs=6"), progress=False)
    assert right_taste(scratch, old_questions(scratch)) < before - 2 * BOUND


def test_the_new_data_is_learnt(parent, days, child):
    assert right_taste(child, days.test) > 0.8
    best = child.rank(days.test, 10, True)
    ids = child.artifact.items.ids.to_numpy()[best]
    assert (ids >= OLD_ITEMS).mean() > 0.1


def test_withdrawn_items_never_come_back(parent, days, child, tmp_path):
    retriever = Retriever.load(child.save(tmp_path / "model"))
    found = retriever.recommend([f"u{q:02d}" for q in range(0, QUERIES, 2)], k=days.train.num_items, exclude_seen=False)
    assert not set(found["item"]) & set(WITHDRAWN)
    assert set(found["item"]) == set(range(4, ITEMS)) & set(retriever.artifact.items.ids)
    assert (retriever.artifact.items.encode(WITHDRAWN) == -1).all()
    pool = build_objective(child.artifact.config, days.train).pool
    drawn = torch.cat([pool.draw(torch.zeros(64, dtype=torch.int64)).items for _ in range(50)])
    assert int(drawn.max()) < days.train.num_items
    with pytest.raises(InputError, match="item 2: unknown to this model"):
        retriever.similar([2])


def test_items_removed_from_the_catalog_are_withdrawn(parent, days):
    kind, folder, _ = parent
    if kind != "default":
        pytest.skip("one kind is enough")
    known = ParentModel.load(folder)
    assert known.removed is None
    removed = replace(known, removed=pl.Series("id", [5]))
    new = interactions(NEW, 0, ITEMS, (0, QUERIES))
    split = tt.continue_with(removed, new, config(kind), withdrawn=WITHDRAWN)
    assert set(np.flatnonzero(split.item_map < 0)) == {*WITHDRAWN, 5}


def test_the_model_records_its_lineage(parent, days, child):
    kind, folder, model = parent
    first, second = child.artifact.metadata["data"]["lineage"]
    assert first["parent"] is None and first["rows_learnt"] == len(model.split.train)
    assert second["parent"] == {"model": str(folder.resolve()), "fingerprint": model.split.data.fingerprint}
    assert second["rows_learnt"] == int((~days.learnt).sum()) and second["items_withdrawn"] == len(WITHDRAWN)
    replayed = min(second["rows_learnt"], int(days.learnt.sum()))
    if kind == "sequence":  # whole queries
        assert second["rows_replayed"] >= replayed
    else:
        assert second["rows_replayed"] == replayed
    assert second["first"].startswith("2023-11") and first["first"].startswith("2020-09")
    assert child.artifact.metadata["data"]["fingerprint"] != first


def test_counted_frequency_is_that_of_the_rows_in_the_batches(parent, days):
    kind, _, _ = parent
    if kind == "sequence":
        pytest.skip("no in-batch candidates, no frequency")
    rows = days.rows_to_learn(0.5, seed=3)
    batches = TrainingBatches(days.train, 7, seed=1, drop_last=False, rows=rows)
    seen, numbers = np.zeros(days.train.num_items), []
    for batch in batches:
        np.add.at(seen, batch.items.numpy(), 1)
        numbers += batch.rows.tolist()
    assert sorted(numbers) == rows.tolist()
    objective = build_objective(config(kind), days.train, learnt=days.train.select(rows))
    (frequency,) = {id(one): one for one in objective.pool.frequencies()}.values()
    counted = frequency.log_prob(torch.arange(days.train.num_items)).exp().numpy()
    assert np.allclose(counted, seen / seen.sum())
    assert not np.allclose(counted, days.train.item_counts() / len(days.train))  # the frequency over all rows


def test_streaming_frequency_is_transferred_with_its_items():
    old, new = StreamingFrequency(6, rate=0.1), StreamingFrequency(7, rate=0.1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0, 1.0])
    for _ in range(200):
        old.observe(torch.multinomial(weights, 32, replacement=True, generator=generator))
    items = torch.tensor([0, 2, -1, 3, 5, 6])
    continue_streaming(new, {key: getattr(old, key) for key in ("gap", "last", "gaps", "clock")}, items)
    kept = items >= 0
    assert torch.equal(new.log_prob(items[kept]), old.log_prob(torch.arange(6)[kept]))
    assert new.log_prob(torch.tensor([1, 4])).exp().max() < 1e-3  # never seen: only its open gap counts
    new.observe(torch.tensor([1] * 16 + [0] * 16))
    assert new.log_prob(torch.tensor([1])) > -8


def test_a_new_item_is_right_after_a_few_occurrences():
    """It is 4 % of the new rows, after a million old ones: its weight was 314 times too large after 4 occurrences."""
    weights = []
    for seed in range(60):
        old, new = StreamingFrequency(2), StreamingFrequency(3)
        old.observe(torch.zeros(1_000_000, dtype=torch.int64))
        saved = {key: getattr(old, key) for key in ("gap", "last", "clock")}  # as saved before gaps were counted
        continue_streaming(new, saved, torch.tensor([0, 1]))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            is_new = torch.rand(32, generator=generator) < 0.04
            new.observe(torch.where(is_new, 2, 0))
            if int(new.gaps[0, 2]) >= 4:
                break
        weights.append(0.04 / float(new.log_prob(torch.tensor([2])).exp()))
        assert 0.2 < weights[-1] < 5.0
    assert sum(weights) / len(weights) == pytest.approx(1.0, abs=0.2)


class Odd(nn.Module):
    """A tower unknown to the code: two item tables with other names, one with a padding row, and a layer."""

    def __init__(self, num_queries, num_items):
        super().__init__()
        self.people = nn.Embedding(num_queries, 3)
        self.input = nn.Embedding(num_items + 1, 4)
        self.output = nn.Linear(4, num_items, bias=False)
        self.mix = nn.Linear(4, 4)


def test_tables_of_any_tower_are_found_and_grow():
    assert named_tables(Odd, 5, 5) == {"people.weight": "queries", "input.weight": "items", "output.weight": "items"}
    old, new = Odd(5, 5), Odd(6, 6)
    maps = CodeMaps(torch.tensor([0, 1, 3, 4, 5]), torch.tensor([1, 0, -1, 5, 2]))
    before = {name: value.clone() for name, value in new.state_dict().items()}
    grow(new, old.state_dict(), row_maps(new, named_tables(Odd, 6, 6), maps))
    assert torch.equal(new.input.weight[[1, 0, 5, 2, 6]], old.input.weight[[0, 1, 3, 4, 5]])  # 6 and 5: padding
    assert torch.equal(new.input.weight[[3, 4]], before["input.weight"][[3, 4]])
    assert torch.equal(new.output.weight[[1, 0, 5, 2]], old.output.weight[[0, 1, 3, 4]])
    assert torch.equal(new.people.weight[[0, 1, 3, 4, 5]], old.people.weight)
    assert torch.equal(new.mix.weight, old.mix.weight)
    with pytest.raises(InputError, match=r"mix\.weight is \[4, 4\] in the saved weights and \[2, 4\] here"):
        new.mix = nn.Linear(4, 2)
        grow(new, old.state_dict(), row_maps(new, named_tables(Odd, 6, 6), maps))


def test_an_interrupted_incremental_run_resumes_to_the_same_model(parent, days, tmp_path, monkeypatch):
    kind, folder, _ = parent
    if kind == "mf":
        pytest.skip("the towers make no difference here: two kinds are enough")
    settings = config(kind, "training.max_epochs=2", "objective.frequency=streaming")
    whole = tt.fit(days, settings, warm_start=folder, progress=False)
    original, steps = TrainingModule.training_step, []

    def step(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", step)
    with pytest.raises(Interrupted):
        tt.fit(days, settings, warm_start=folder, directory=tmp_path, progress=False)
    monkeypatch.setattr(TrainingModule, "training_step", original)
    resumed = tt.fit(days, settings, warm_start=folder, directory=tmp_path, resume=True, progress=False)
    for name, value in whole.artifact.towers.state_dict().items():
        assert torch.equal(value, resumed.artifact.towers.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("item_tower.dimension=32", "item_tower.dimension: 16 in the model, 32 here"),
        ("query_tower.residual=true", "query_tower.residual: False in the model, True here"),
        ("objective.temperature=0.5", "objective.temperature"),
    ],
)
def test_other_towers_are_refused(parent, days, change, message):
    kind, folder, _ = parent
    if kind != "default":
        pytest.skip("one kind is enough")
    with pytest.raises(InputError, match=message):
        tt.fit(days, config(kind, change), warm_start=folder, progress=False)


def test_a_split_is_accepted_only_with_its_model(parent, days):
    _, folder, model = parent
    with pytest.raises(InputError, match="continue_with"):
        tt.fit(days, progress=False)
    with pytest.raises(InputError, match="continue_with"):
        tt.fit(model.split, warm_start=folder, progress=False)


def test_new_data_without_a_feature_of_the_model_is_refused(parent, tmp_path):
    kind, folder, _ = parent
    if kind != "dnn":
        pytest.skip("needs features")
    data = Interactions.from_frame(NEW, items=table(0, ITEMS).rename({"colour": "tint"}), queries=people(0, QUERIES))
    days = tt.continue_with(folder, data)
    with pytest.raises(InputError, match="column 'colour', a feature of the model, does not exist"):
        tt.fit(days, warm_start=folder, progress=False)
    days = tt.continue_with(folder, Interactions.from_frame(NEW))
    with pytest.raises(InputError, match="needs the item table of the new data"):
        tt.fit(days, warm_start=folder, progress=False)


def test_the_model_folder_reproduces_its_evaluation(parent, days, child, tmp_path):
    child.save(tmp_path / "run" / "model")
    _, split = reread(tmp_path / "run")
    assert np.array_equal(split.test.queries, days.test.queries)
    assert np.array_equal(split.test.history_items, days.test.history_items)
    assert np.array_equal(split.test.target_items, days.test.target_items)
    assert np.array_equal(split.train.item_codes, days.train.item_codes)
    again = tt.evaluate(Retriever.load(tmp_path / "run"), split.test, train=split.train)
    assert again["model"].values == tt.evaluate(child, days.test)["model"].values
    metadata = json.loads((tmp_path / "run" / "model" / "metadata.json").read_text())
    assert len(metadata["data"]["lineage"]) == 2
