"""The model folder and the retriever: the same results after loading, and clear errors."""

import json
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

from planted import planted
from support.service_models import drawn
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.serving import Retriever, SavedModel


def test_a_loaded_model_ranks_and_recommends_the_same(model, folder, planted_split):
    loaded = Retriever.load(folder)
    test = planted_split.test
    assert np.array_equal(model.rank(test, 10, True), loaded.rank(test, 10, True))
    assert model.retriever.recommend(["u001", "u002"]).equals(loaded.recommend(["u001", "u002"]))


def test_recommend_returns_what_evaluate_ranks(folder, planted_split):
    """`rank` for a holdout and `recommend` for the same histories return the same ids."""
    loaded, test = Retriever.load(folder), planted_split.test
    ranked = loaded.rank(test, 10, True)
    queries = loaded.artifact.queries.decode(test.queries).to_list()
    histories = [
        loaded.artifact.items.decode(test.history_items[a:b].astype(np.int64)).to_list()
        for a, b in zip(test.history_offsets[:-1], test.history_offsets[1:], strict=True)
    ]
    found = loaded.recommend(queries, histories=histories, k=10)
    assert found["item"].to_list() == loaded.artifact.items.decode(ranked.reshape(-1)).to_list()
    assert found["rank"].to_list() == list(range(1, 11)) * len(queries)


def test_the_scores_are_the_dot_products_of_the_towers(model):
    found = model.retriever.recommend(["u003"], k=5)
    towers, artifact = model.artifact.towers, model.artifact
    code = artifact.queries.encode(["u003"])
    start, stop = artifact.history_offsets[code[0]], artifact.history_offsets[code[0] + 1]
    history = torch.full((1, 10), -1)
    recent = artifact.history_items[start:stop][-10:]
    history[0, -len(recent) :] = torch.from_numpy(np.array(recent, dtype=np.int64))
    with torch.no_grad():
        scores = (towers.embed_queries(torch.from_numpy(code.copy()), history) @ towers.item_embeddings().T)[0]
    scores[torch.from_numpy(np.array(artifact.history_items[start:stop], dtype=np.int64))] = -torch.inf
    best = scores.topk(5)
    assert found["item"].to_list() == artifact.items.decode(best.indices.numpy()).to_list()
    assert found["score"].to_list() == pytest.approx(best.values.tolist(), abs=1e-6)


def test_seen_items_are_left_out_or_kept(model):
    retriever = model.retriever
    seen = set(retriever.history("u004")["item"])
    assert not seen & set(retriever.recommend(["u004"], k=70)["item"])
    with pytest.raises(InputError, match="exclude_seen: expected True or False, found 'no'"):
        retriever.recommend(["u004"], exclude_seen="no")
    kept = retriever.recommend(["u004"], k=200, exclude_seen=False)
    assert seen < set(kept["item"]) and len(kept) == len(retriever.artifact.items)


def test_a_new_query_is_answered_by_its_history(model):
    found = model.retriever.recommend(histories=[[1, 3, 5, 7], [0, 2, 4, 99999]], k=5)
    assert found["query"].to_list() == [0] * 5 + [1] * 5
    assert [j % 2 for j in found["item"]] == [1] * 5 + [0] * 5, "unknown items are ignored, tastes do not mix"


def test_titles_and_similar(model):
    found = model.retriever.similar([4], k=6)
    assert 4 not in found["item"].to_list()
    assert found["title"].to_list() == [f"Item number {j}" for j in found["item"]]
    assert found["score"].is_sorted(descending=True)
    many = model.retriever.similar(list(range(40)), k=6)
    assert ((many["of"] - many["item"]) % 2 == 0).mean() > 0.7, "items of one taste are near each other"


def test_neighbours_of_text_ids_come_without_a_warning(tmp_path):
    data = Interactions.from_frame(planted().with_columns(item_id=pl.format("i{}", "item_id")))
    found = Retriever.load(drawn(data, tmp_path / "model"))
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch warns once per process, maybe already in another test
    try:
        assert "i4" not in found.similar(["i4"], k=6)["item"].to_list()
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.recommend(["nobody"]), "query 'nobody': unknown to this model"),
        (lambda r: r.recommend(), "expected query ids, text, histories, features or context; found none of them"),
        (lambda r: r.recommend(["u001"], k=0), "at least 1"),
        (lambda r: r.recommend(["u001"], histories=[[1], [2]]), "one for each query"),
        (lambda r: r.recommend(histories=[[99999]]), "none of its items is in the catalog"),
        (lambda r: r.similar([777]), "item 777: unknown to this model"),
        (lambda r: r.similar([1], k=-1), "at least 1"),
        (lambda r: r.recommend(["\ud800"]), r"query '\\ud800': unknown to this model"),
        (lambda r: r.similar(["\udcff"]), r"item '\\udcff': unknown to this model"),
        (lambda r: r.recommend(histories=[["\ud800"]]), "an id that is not valid Unicode"),
        (lambda r: r.recommend(["u001"], allow=["\ud800"]), "allow: none of its ids is in the catalog"),
        (lambda r: r.search_titles(5), "text: expected text, found 5"),
    ],
)
def test_invalid_requests_are_refused(model, ask, message):
    with pytest.raises(InputError, match=message):
        ask(model.retriever)


@pytest.mark.parametrize("single", ["12", b"12", 12, 1.5, None, {"a": 1}, np.int64(12), np.array(12), iter([1])])
def test_a_single_id_is_no_list(model, single):
    """Text would be split into characters: "12" would be the two users 1 and 2."""
    message = "expected a list of (lists of item )?ids, found"
    calls = [lambda r: r.similar(single), lambda r: r.describe(single), lambda r: r.recommend(histories=[single])]
    if single is not None:  # None is "not given"
        calls += [lambda r: r.recommend(single), lambda r: r.recommend(histories=single)]
        calls += [lambda r: r.recommend(["u001"], allow=single), lambda r: r.recommend(["u001"], deny=single)]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call(model.retriever)


@pytest.mark.parametrize("several", [list, tuple, set, np.array, pl.Series])
def test_every_kind_of_list_and_integer_is_taken(model, several):
    expected = model.retriever.recommend(["u001"], k=3)
    for k in (3, np.int64(3), np.uint8(3)):
        assert model.retriever.recommend(several(["u001"]), k=k).equals(expected)
    assert model.retriever.similar(several([4]), k=2)["of"].to_list() == [4, 4]
    assert len(model.retriever.recommend(histories=[several([1, 3])], k=2)) == 2
    for k in (True, 3.0, "3", None, 0, -(10**30)):
        with pytest.raises(InputError, match="k: expected an integer of at least 1"):
            model.retriever.recommend(["u001"], k=k)
    assert len(model.retriever.recommend(["u001"], k=10**30, exclude_seen=False)) == 100


def damaged(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def flip_last_bit(name):
    def flip(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return flip


def edit_metadata(change):
    def edit(folder):
        path = folder / "metadata.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        path.with_name("SHA256SUMS").unlink()  # as in older versions

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "towers.safetensors").write_bytes(b"x"), "towers.safetensors: incomplete safetensors file"),
        (flip_last_bit("towers.safetensors"), "towers.safetensors: its checksum differs"),
        (lambda f: (f / "items.parquet").unlink(), "items.parquet: missing"),
        (lambda f: (f / "metadata.json").write_text("{"), "not readable"),
        (lambda f: (f / "metadata.json").unlink(), "no model in this folder"),
        (edit_metadata(lambda v: v.update(schema_version=99)), "schema version 99, but this twotower reads 1"),
        (edit_metadata(lambda v: v["config"].update(nonsense=1)), "are inconsistent"),
        (edit_metadata(lambda v: v.update(num_items=3)), "are inconsistent"),
    ],
)
def test_a_damaged_folder_is_refused(folder, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        SavedModel.load(damaged(folder, tmp_path, change))
    with pytest.raises(InputError, match="no such folder"):
        SavedModel.load(tmp_path / "nowhere")


def test_saving_replaces_the_folder_and_leaves_nothing_else(model, tmp_path):
    first = model.save(tmp_path / "m")
    (first / "stale.txt").write_text("from an older model")
    model.save(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not (first / "stale.txt").exists()


def test_a_failed_save_keeps_the_old_model(model, tmp_path, monkeypatch):
    target = model.save(tmp_path / "m")
    before = sorted(path.name for path in target.iterdir())

    def full(self, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(model.artifact.queries), "write", full)
    with pytest.raises(InputError, match="the disk is full"):
        model.save(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert sorted(path.name for path in target.iterdir()) == before


#: Packages for training, evaluation and reports; serving works without any of them installed.
NOT_FOR_SERVING = (
    *("twotower.training", "twotower.audit", "twotower.run", "twotower.objectives.build", "twotower.comparison"),
    *("pytorch_lightning", "lightning", "torchmetrics", "scipy", "pooch", "sklearn", "pandas", "pyarrow", "matplotlib"),
)


def test_serving_loads_no_trainer(folder):
    """Retriever and service run although the training packages cannot be imported."""
    code = f"""
import sys
for name in {NOT_FOR_SERVING!r}:
    if "." not in name:
        sys.modules[name] = None  # importing it is an ImportError
from starlette.testclient import TestClient
from twotower.serving import Retriever
from twotower.serving.http.app import create_app
assert len(Retriever.load({str(folder)!r}).recommend(["u001"], k=3)) == 3
with TestClient(create_app([{str(folder)!r}])) as service:
    assert len(service.post("/recommend", json={{"query_id": "u001"}}).json()["items"]) == 10
found = [name for name in sys.modules if name.startswith({NOT_FOR_SERVING!r}) and sys.modules[name] is not None]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
