"""Tests of text encoders in the towers, with a tiny random transformer."""

import copy
import json
import shutil

import polars as pl
import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'twotower[text]'")
pytest.importorskip("peft", reason="pip install 'twotower[text]'")

from torch.nn import functional as F

from support.tiny_text import write_text_model
from twotower.config.features import NumericFeature, TextFeature
from twotower.config.run import Config
from twotower.config.towers import ItemTowerConfig, QueryTowerConfig
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.run.linear_start import refusal
from twotower.towers import FeatureInputs, build_towers
from twotower.towers.item_tower import ItemTower
from twotower.towers.tables import EmbeddingTable
from twotower.towers.text import TOKENS, text_transformers
from twotower.towers.two_tower import PooledHistory, QueryTower, TwoTower
from twotower.training.optimizer import TableOptimizer, parameter_groups

TEXTS = ["ba be bi", "ko", None, "ba be bi", "da de di do fa fe fi fo", "", "so: ta"]
WIDTH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text") / "tiny")


def declared(model, **settings):
    return TextFeature(column="title", model=model, **{"train": "full", **settings})


def table(model, side="item", texts=TEXTS, **settings):
    frame = pl.DataFrame({"id": range(len(texts)), "title": texts})
    return EncodedTable.fit(side, [declared(model, **settings)], frame, ids=frame["id"])


def alone(folder, text, pooling, prompt=""):
    """Encode one text without padding, with the packages themselves."""
    from tokenizers import Tokenizer
    from transformers import BertModel

    transformer = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    ids = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(prompt + text).ids
    states = transformer(input_ids=torch.tensor([ids])).last_hidden_state[0]
    pooled = {"mean": states.mean(0), "cls": states[0], "max": states.amax(0), "lasttoken": states[-1]}[pooling]
    return F.normalize(pooled, dim=0).detach()


@pytest.mark.parametrize(
    ("pooling", "train"), [("mean", "full"), ("cls", "lora"), ("max", "full"), ("lasttoken", "full")]
)
def test_vectors_equal_each_text_encoded_alone(tmp_path, monkeypatch, pooling, train):
    folder = write_text_model(tmp_path, pooling=pooling)
    inputs = FeatureInputs(table(folder, train=train, prompt="ba : "), WIDTH).eval()
    assert inputs.width == WIDTH + 1
    for most in (4096, 1, 20):  # texts of a step in one group, each in its own, and in several
        monkeypatch.setitem(TOKENS, "cpu", most)
        found = inputs(torch.tensor([0, 1, 2, 3, 4, 5, 6, -1])).detach()
        for place, text in enumerate([*TEXTS, None]):
            if not text:
                assert found[place].tolist() == [0.0] * WIDTH + [1.0]
            else:
                expected = alone(folder, text, pooling, prompt="ba : ")
                assert torch.allclose(found[place, :-1], expected, atol=1e-5), text
                assert found[place, -1] == 0


def test_each_distinct_text_is_encoded_once(model):
    inputs = FeatureInputs(table(model), WIDTH)
    seen = []
    text_transformers(inputs)[0].model.register_forward_hook(
        lambda module, args, options, output: seen.append(len(options["input_ids"])), with_kwargs=True
    )
    inputs(torch.tensor([0, 3, 0, 1, 1, 4, 2, 5]))
    assert sum(seen) == 3


def test_a_new_text_is_encoded_and_a_long_one_is_cut(model):
    inputs = FeatureInputs(table(model, max_tokens=8), WIDTH).eval()
    new, cut, long = inputs.embed(
        inputs.encode([{"title": t} for t in ("ko ko", "ba be bi bo da de", "ba be bi bo da de di " * 900)])
    )
    assert torch.allclose(new[:-1], alone(model, "ko ko", "mean"), atol=1e-5)
    assert torch.allclose(cut, long), "eight tokens, of which two are special"


def test_missing_texts_have_a_gradient_of_zero(model):
    inputs = FeatureInputs(table(model), WIDTH).train()
    inputs(torch.tensor([2, 5])).sum().backward()
    gradients = [p.grad for p in inputs.parameters()]
    assert all(grad is not None and not grad.any() for grad in gradients)


def test_lora_stores_the_adapter_alone_and_keeps_the_pretrained_weights(model):
    inputs = FeatureInputs(table(model, train="lora", lora_rank=2), WIDTH).train()
    stored = inputs.state_dict()
    assert stored and all(".lora_" in name for name in stored)
    before = {name: value.clone() for name, value in inputs.named_parameters()}
    groups = parameter_groups(inputs, 0.01, lr=1.0)
    optimizer = TableOptimizer(groups, lr=1.0)
    first = inputs.eval()(torch.arange(5)).detach()
    inputs.train()(torch.arange(5)).pow(3).sum().backward()
    optimizer.step()
    changed = {name for name, value in inputs.named_parameters() if not torch.equal(value, before[name])}
    assert changed and changed <= stored.keys()
    other = FeatureInputs(table(model, train="lora", lora_rank=2), WIDTH).eval()
    assert torch.equal(other(torch.arange(5)), first)
    other.load_state_dict(inputs.state_dict())
    assert torch.equal(other(torch.arange(5)), inputs.eval()(torch.arange(5)))
    assert not torch.allclose(other(torch.arange(5)), first, atol=1e-4)
    twin = copy.deepcopy(inputs)
    twin.load_state_dict(stored)
    assert twin.table.features.encoders[0] is inputs.table.features.encoders[0]


def towers_of(model, item=(), query=(), dimension=WIDTH):
    features = {"item": f"[{{column: title, kind: text, model: {model}, train: full{''.join(item)}}}]"}
    features["query"] = f"[{{column: title, kind: text, model: {model}, train: full{''.join(query)}}}]"
    config = Config.load(
        None,
        [
            *(f"{side}_tower.features={features[side]}" for side in features),
            *(f"{side}_tower.projection=false" for side in features),
            "item_tower.id_embedding=false",
            "query_tower.hidden=null",
            "query_tower.history=null",
            f"item_tower.dimension={dimension}",
        ],
    )
    made = {}
    for side, section in (("item", config.item_tower), ("query", config.query_tower)):
        frame = pl.DataFrame({"id": range(len(TEXTS)), "title": TEXTS})
        made[f"{side}_features"] = EncodedTable.fit(side, section.features, frame, ids=frame["id"])
    return build_towers(config, num_queries=len(TEXTS), num_items=len(TEXTS), **made)


@pytest.mark.parametrize(
    ("item", "query", "count"),
    [("", "", 1), (", share: false", "", 2), (", share: false", ", share: false", 2), ("", ", train: lora", 2)],
)
def test_encoders_are_shared_by_model_and_settings(model, item, query, count):
    towers = towers_of(model, item, query)
    assert len(text_transformers(towers)) == count
    same = torch.allclose(towers.eval().embed_items(torch.arange(2)), towers.embed_queries(torch.arange(2), None))
    assert same, "both start from the same model"


def test_without_a_projection_an_embedding_is_the_sum_of_its_vectors(model):
    towers = towers_of(model).eval()
    assert towers.item_tower.mlp is None and towers.query_tower.mlp is None
    assert not towers.is_linear and towers.encodes_text
    assert torch.allclose(towers.embed_items(torch.tensor([1]))[0], alone(model, "ko", "mean"), atol=1e-5)
    inputs = FeatureInputs(table(model), WIDTH)
    tower = ItemTower(len(TEXTS), WIDTH, features=inputs, projection=False).eval()
    ids = tower.ids(torch.arange(2)) + inputs(torch.arange(2))[:, :-1]
    assert torch.allclose(tower(torch.arange(2)), ids)
    new = tower.embed_features(inputs.encode([{"title": "ko"}]))
    assert torch.allclose(new[0], alone(model, "ko", "mean"), atol=1e-5)


def test_what_a_sum_needs(model):
    with pytest.raises(InputError, match="vectors of width 16, but item_tower.dimension is 8"):
        towers_of(model, dimension=8)
    frame = pl.DataFrame({"id": [0, 1], "price": [1.0, 2.0]})
    prices = EncodedTable.fit("item", [NumericFeature(column="price")], frame, ids=frame["id"])
    with pytest.raises(InputError, match="'price' of kind numeric has no vector, which projection: false needs"):
        ItemTower(2, 1, features=FeatureInputs(prices, 1), projection=False)
    with pytest.raises(ValueError, match="expected hidden=null"):
        QueryTowerConfig(projection=False)
    with pytest.raises(ValueError, match=r"expected hidden=\[\]"):
        ItemTowerConfig(projection=False, hidden=[8])
    with pytest.raises(ValueError, match="projection=true"):
        QueryTowerConfig(projection=False, hidden=None, history={"sequence": {}})
    with pytest.raises(ValueError, match="need a text model"):
        TextFeature(column="a", train="lora")


def test_encoders_have_groups_of_their_own(model):
    towers = towers_of(model, query=", train: lora")
    groups = parameter_groups(towers, 0.1, lr=1e-2, table_rule="rowwise-adagrad", table_lr=1e-1)
    ours = groups[3:]
    assert [group["lr"] for group in ours] == [2e-4, 2e-4, 2e-5, 2e-5]
    assert [group["weight_decay"] for group in ours] == [0.1, 0.0] * 2
    assert {group["rule"] for group in ours} == {"adam"}, "word vectors are not tables"
    trained = {id(p) for p in towers.parameters() if p.requires_grad}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == trained
    assert {g["lr"] for g in parameter_groups(towers, 0.1, lr=1e-2, encoder_lr=3e-6)[3:]} == {3e-6}


def changed(model, tmp_path, name, **values):
    folder = shutil.copytree(model, tmp_path / "changed")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values} if isinstance(content, dict) else values["modules"]))
    return str(folder)


def test_models_that_cannot_be_trained_are_refused(model, tmp_path):
    for name, values, message in (
        ("config.json", {"model_type": "t5"}, "kind t5; expected one of albert, bert"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling weightedmean; expected one of mean"),
        ("1_Pooling/config.json", {"include_prompt": False}, "leaves out the prompt"),
        (
            "modules.json",
            {"modules": [{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": ""}]},
            "Dense",
        ),
        *(
            (
                "modules.json",
                {"modules": [{"type": "a.Transformer", "path": path}]},
                "not the name of a folder in the model",
            )
            for path in ("../other", "/etc", "..", "a/b", "a\n", "C:x", 3)
        ),
        ("config.json", {"vocab_size": 20}, "its tokenizer has 54 tokens, but the model 20"),
    ):
        with pytest.raises(InputError, match=message):
            table(changed(model, tmp_path, name, **values))
        shutil.rmtree(tmp_path / "changed")
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model.safetensors; other formats"):
        table(str(bare))
    with pytest.raises(InputError, match="no such folder, and no model with this name"):
        table(str(tmp_path / "nowhere"))


def test_a_linear_start_is_refused(model):
    inputs = FeatureInputs(table(model), WIDTH)
    history = {"history": PooledHistory(5, 1), "history_items": EmbeddingTable(len(TEXTS), WIDTH)}
    query = QueryTower(0, WIDTH, hidden=None, **history)
    assert refusal(TwoTower(query, ItemTower(len(TEXTS), WIDTH), cosine=False)) is None
    item = ItemTower(len(TEXTS), WIDTH, features=inputs, projection=False)
    assert "vectors of features are added" in refusal(TwoTower(query, item, cosine=False))
    query = QueryTower(0, WIDTH, hidden=None, features=inputs, projection=False, **history)
    assert "vectors of features are added" in refusal(TwoTower(query, ItemTower(len(TEXTS), WIDTH), cosine=False))
