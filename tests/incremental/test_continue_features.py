"""Tests of features with new values in incremental training: the width of their embeddings does not change."""

import hashlib
import json

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import twotower as tt
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.features.requests import EncodedContext
from twotower.incremental import ParentModel
from twotower.incremental.warm_start import extend_features, load_parent_state
from twotower.objectives.build import build_objective
from twotower.serving import Retriever
from twotower.towers import build_towers

FEATURES = """[{column: brand, kind: categorical}, {column: tags, kind: multi, separator: "|"},
    {column: title, kind: text, model: words}, {column: price, kind: numeric, scale: quantiles, bins: 4}]"""
CONTEXT = "[{column: device, kind: categorical}, {column: search, kind: text, model: words}]"
SETTINGS = Config.load(None, [
    "training={max_epochs: 1, batch_size: 128, accelerator: cpu, logger: none, recent_prior: false}",
    f"item_tower={{dimension: 16, features: {FEATURES}}}",
    f"query_tower={{id_embedding: true, context: {CONTEXT}, history: {{length: 5}}}}",
])  # fmt: skip
#: Values of each vocabulary: with missing and unknown 9 rows, ceil(2 sqrt(9)) = 6 wide; one more would give 7.
VALUES = 7


def days(start, values, seed):
    """Build rows of 30 queries and 40 items whose features and contexts take `values` values."""
    rng = np.random.default_rng(seed)
    rows = 400
    log = pl.DataFrame({
        "user_id": rng.integers(0, 30, rows), "item_id": rng.integers(0, 40, rows),
        "timestamp": start + np.sort(rng.integers(0, 86_400 * 30, rows)),
        "device": [f"d{row % values}" for row in range(rows)], "search": [f"s{row % values}" for row in range(rows)],
    })  # fmt: skip
    items = pl.DataFrame({
        "item_id": range(40), "brand": [f"b{j % values}" for j in range(40)],
        "tags": [f"t{j % values}|t{(j + 1) % values}" for j in range(40)],
        "title": [f"w{j % values}" for j in range(40)], "price": [float(j) for j in range(40)],
    })  # fmt: skip
    return Interactions.from_frame(log, items=items, context=["device", "search"])


@pytest.fixture(scope="module")
def model():
    made = tt.fit(tt.splits.by_time(days(1_600_000_000, VALUES, 0)), SETTINGS, progress=False)
    assert made.artifact.towers.trained_queries.all()
    made.artifact.towers.trained_queries[::3] = False
    return made


@pytest.fixture(params=["today", "an older version"])
def folder(model, request, tmp_path):
    """Return the model as saved now, or as older versions did: without vector widths and masks of trained rows."""
    written = model.save(tmp_path / "model")
    if request.param == "today":
        return written
    metadata = json.loads((written / "metadata.json").read_text())
    weights = load_file(written / "towers.safetensors")
    assert not weights.pop("query_tower.trained").all()
    with safe_open(written / "towers.safetensors", "pt") as opened:
        save_file(weights, written / "towers.safetensors", opened.metadata())  # with the names of tied tensors
    changed = [written / "towers.safetensors"]
    for side in ("item", "context"):
        path = written / f"{side}_features.json"
        features = json.loads(path.read_text())
        assert features.pop("widths")[:3] == [6, 6, 6][: len(features["features"])]
        path.write_text(json.dumps(features))
        changed.append(path)
    for path in changed:
        metadata["checksums"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (written / "metadata.json").write_text(json.dumps(metadata))
    (written / "SHA256SUMS").unlink()  # as in older versions
    return written


def test_one_more_value_changes_no_vector(model, folder):
    parent, split = ParentModel.load(folder), tt.continue_with(folder, days(1_700_000_000, VALUES + 1, 1), SETTINGS)
    growth = extend_features(parent, split)
    sizes = {side: [one.size for one in table.features.encoders] for side, table in growth.features.items()}
    assert sizes == {"item": [10, 10, 10, 5], "context": [10, 10]}
    towers = build_towers(
        SETTINGS, num_queries=split.train.num_queries, num_items=split.train.num_items,
        item_features=growth.features["item"], context=growth.features["context"],
        trained_queries=torch.arange(split.train.num_queries) == 3,
    ).eval()  # fmt: skip
    load_parent_state(parent, SETTINGS, growth, towers=towers, objective=build_objective(SETTINGS, split.train))
    known = torch.arange(len(model.artifact.queries)) % 3 != 0
    if "query_tower.trained" not in load_file(folder / "towers.safetensors"):
        known[:] = True
    known[split.query_map == 3] = True
    assert torch.equal(towers.trained_queries[split.query_map], known) and (int(known.sum()) in (21, 30))
    rows = [{"brand": f"b{j % 7}", "tags": f"t{j % 7}|t3", "title": f"w{j % 7} w1", "price": j} for j in range(14)]
    before, now = (one.embed_new_items(pl.DataFrame(rows)) for one in (model.artifact.towers, towers))
    assert torch.equal(before, now) and now.std() > 0.01
    asked = [{"device": f"d{row}", "search": f"s{6 - row}"} for row in range(7)]
    embedded = []
    for one in (model.artifact.towers, towers):
        context = [torch.from_numpy(array) for array in EncodedContext.of(one.context_features, asked).arrays]
        unknown = torch.full((7, 1), -1)
        embedded.append(one.embed_queries(unknown[:, 0], unknown, None, context))
    assert torch.equal(*embedded) and embedded[0].std() > 0.01


def test_a_model_can_be_continued_repeatedly(folder, tmp_path):
    for step in (1, 2):
        split = tt.continue_with(folder, days(1_650_000_000 + step * 50_000_000, VALUES + 4 * step, step), SETTINGS)
        child = tt.fit(split, SETTINGS, warm_start=folder, progress=False)
        folder = child.save(tmp_path / f"child{step}")
    tables = child.artifact.towers.item_tower.features.embeddings
    assert [table.weight.shape for table in tables.values()] == [(17, 6)] * 3 + [(5, 5)]
    found = Retriever.load(folder).recommend([3], context={"device": "d14", "search": "s14"}, k=5)
    again = child.retriever.recommend([3], context={"device": "d14", "search": "s14"}, k=5)
    assert found["item"].to_list() == again["item"].to_list()
