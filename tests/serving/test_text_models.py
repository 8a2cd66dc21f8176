"""Tests of saved models with a trained text encoder: files, requests with new texts, hostile folders, refusals."""

import json
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file

pytest.importorskip("transformers", reason="pip install 'twotower[text]'")
pytest.importorskip("peft", reason="pip install 'twotower[text]'")

from support.hostile_folders import edited, reseal, state, tensors
from support.tiny_text import WORDS, write_text_model
from twotower.config.run import Config
from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable, FeatureSet
from twotower.features.parsing import ErrorLocation
from twotower.serving import Retriever, SavedModel
from twotower.serving.export import export_query_tower
from twotower.towers import build_towers
from twotower.towers.text import text_transformers

ITEMS, QUERIES, WIDTH = 12, 6, 16
TITLES = [" ".join(WORDS[2 * n : 2 * n + 3]) for n in range(ITEMS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text") / "tiny")


def saved(folder, base, train):
    """Write a model whose encoder is no longer the pretrained one."""
    text = f"kind: text, model: {base}, train: {train}, lora_rank: 2"
    config = Config.load(
        None,
        [
            f"item_tower.features=[{{column: title, {text}}}]",
            f"query_tower.features=[{{column: words, {text}}}]",
            f"query_tower.context=[{{column: search, {text}}}]",
            *(f"{side}_tower.projection=false" for side in ("item", "query")),
            "item_tower.id_embedding=false",
            "query_tower.hidden=null",
            "query_tower.history=null",
            f"item_tower.dimension={WIDTH}",
        ],
    )
    made, ids = {}, {}
    for side, count, column in (("item", ITEMS, "title"), ("query", QUERIES, "words")):
        table = pl.DataFrame({"id": range(count), column: TITLES[:count]})
        section = config.item_tower if side == "item" else config.query_tower
        made[f"{side}_features"] = EncodedTable.fit(side, section.features, table, ids=table["id"])
        ids[side] = table.rename({"id": f"{side}_id"})
    rows = pl.DataFrame({"search": TITLES})
    context = FeatureSet.fit_rows("context", config.query_tower.context, rows, ErrorLocation("rows"))
    torch.manual_seed(0)
    towers = build_towers(
        config, num_queries=QUERIES, num_items=ITEMS, context=EncodedTable.of_requests(context), **made
    ).eval()
    (encoder,) = text_transformers(towers)
    with torch.no_grad():
        for one in encoder.parameters():
            if one.requires_grad:
                one.add_(0.1 * torch.randn_like(one))
    model = SavedModel(
        config=config,
        towers=towers,
        item_embeddings=towers.item_embeddings(),
        item_counts=torch.ones(ITEMS, dtype=torch.int64),
        queries=Vocabulary(ids["query"]["query_id"]),
        items=Vocabulary(ids["item"]["item_id"]),
        history_offsets=np.zeros(QUERIES + 1, dtype=np.int64),
        history_items=np.zeros(0, dtype=np.int32),
        item_table=ids["item"],
        metadata={"data": {"source": "nowhere", "fingerprint": "0"}},
    )
    model.save(folder)
    return model


@pytest.fixture(scope="module", params=["full", "lora"])
def model(request, tmp_path_factory, base):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return saved(folder, base, request.param), folder, request.param


def test_a_loaded_model_encodes_the_texts_of_requests_as_the_trained_one(model):
    trained, folder, _ = model
    loaded = SavedModel.load(folder)
    assert torch.equal(loaded.item_embeddings, trained.item_embeddings)
    assert torch.equal(loaded.towers.item_embeddings(), trained.item_embeddings)
    new = "ba ko : ta"
    for embed, row in (("embed_new_items", {"title": new}), ("embed_new_queries", {"words": new})):
        vectors = [getattr(one.towers, embed)([row]) for one in (trained, loaded)]
        assert torch.equal(*vectors)
        assert float(vectors[0].norm()) == pytest.approx(1, abs=1e-5)
    retriever = Retriever.load(folder)
    (found,) = retriever.recommend(features=[{"words": TITLES[7]}], k=1)["item"].to_list()
    assert found == 7, "the item with the text of the query"
    (found,) = retriever.recommend(features=[{"words": None}], context={"search": TITLES[9]}, k=1)["item"].to_list()
    assert found == 9
    retriever.catalog.add([{"item_id": 100, "title": new}])
    (found,) = retriever.recommend(features=[{"words": new}], k=1)["item"].to_list()
    assert found == 100, "a new item, encoded when it was added"


def test_the_files_have_the_weights_or_the_adapter_alone(model):
    _, folder, train = model
    names = load_file(folder / "towers.safetensors")
    texts = [name for name in names if ".texts." in name]
    assert texts and all((".lora_" in name) == (train == "lora") for name in texts)
    assert len({name.split(".texts.")[0] for name in texts}) == 1, "a shared encoder is stored once"
    described = json.loads((folder / "item_features.json").read_text())["features"][0]["state"]["model"]
    assert described["config"]["model_type"] == "bert" and len(described["sha256"]) == 64


def test_a_full_model_needs_no_other_files_and_an_adapter_its_own_base(base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "base")
    for train in ("full", "lora"):
        saved(tmp_path / train, str(moved), train)
    write_text_model(moved, seed=1)
    assert len(SavedModel.load(tmp_path / "full").items) == ITEMS
    with pytest.raises(InputError, match=r"has different weights .* put the original model there"):
        SavedModel.load(tmp_path / "lora")
    shutil.rmtree(moved)
    assert len(SavedModel.load(tmp_path / "full").items) == ITEMS
    with pytest.raises(InputError, match="no model with this name is in the cache of this machine"):
        SavedModel.load(tmp_path / "lora")


_FEATURES = "item_features.json"


def described(**changes):
    return edited(_FEATURES, lambda v: v["features"][0]["state"]["model"].update(changes))


def of_config(**changes):
    return edited(_FEATURES, lambda v: v["features"][0]["state"]["model"]["config"].update(changes))


HOSTILE = {
    "10^9 layers": of_config(num_hidden_layers=10**9),
    "a billion words": of_config(vocab_size=10**9),
    "wide": of_config(hidden_size=1 << 20, num_attention_heads=1),
    "more words": of_config(vocab_size=1 << 21),
    "a kind that downloads": of_config(model_type="timm_wrapper"),
    "no kind": of_config(model_type=["bert"]),
    "config deep": described(config={"model_type": "bert", "vocab_size": 9, "a": json.loads("[" * 50 + "]" * 50)}),
    "config is a list": described(config=[1]),
    "tokenizer is nothing": described(tokenizer="nonsense"),
    "tokenizer is a number": described(tokenizer=1),
    "tokenizer empty": described(tokenizer="{}"),
    "pooling unknown": described(pooling="exec"),
    "padding unknown": described(pad=-1),
    "no tokens": described(limit=0),
    "description missing": state(0, model=None),
    "rank of 10^6": edited(_FEATURES, lambda v: v["features"][0]["declared"].update(lora_rank=10**6)),
    "tokens unknown": tensors("item_features.safetensors", **{"0": lambda a: a + 1000}),
    "tokens negative": tensors("item_features.safetensors", **{"0": lambda a: a - 1000}),
    "tokens of another type": tensors("item_features.safetensors", **{"0": lambda a: a.astype(np.int64)}),
    "texts too long": tensors("item_features.safetensors", **{"0": lambda a: np.tile(a, 9)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_in_one_line(model, tmp_path, name):
    _, folder, _ = model
    copied = shutil.copytree(folder, tmp_path / "model")
    HOSTILE[name](copied)
    reseal(copied)
    with pytest.raises(InputError) as refused:
        SavedModel.load(copied)
    assert "\n" not in str(refused.value)


def test_settings_that_name_code_are_left_out(base, tmp_path, monkeypatch):
    saved(tmp_path / "model", base, "full")
    of_config(auto_map={"AutoModel": "evil/repository--evil.Model"}, attn_implementation="evil/kernels")(
        tmp_path / "model"
    )
    of_config(_attn_implementation="evil/kernels", quantization_config={"quant_method": "x"})(tmp_path / "model")
    reseal(tmp_path / "model")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    assert len(SavedModel.load(tmp_path / "model").items) == ITEMS


def test_an_export_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="an exported file cannot tokenise a text"):
        export_query_tower(model[1], tmp_path / "out")


@pytest.mark.slow
def test_a_served_model_needs_no_trainer(model):
    script = (
        "import sys, twotower.serving as s; r = s.Retriever.load(sys.argv[1]); "
        "r.recommend(features=[{'words': 'ba ko'}], k=2); "
        "print([m for m in sys.modules if m.startswith(('twotower.training', 'sentence_transformers', 'lightning'))])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(model[1])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
