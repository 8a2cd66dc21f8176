"""Tests of training text encoders: gradient cache, resuming and continuing, with a tiny random transformer."""

import numpy as np
import polars as pl
import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'twotower[text]'")
pytest.importorskip("peft", reason="pip install 'twotower[text]'")

import twotower as tt
from support.interruption import stopped_after_first_epoch
from support.tiny_text import WORDS, write_text_model
from support.towers import towers_of
from twotower.data import Batch, Holdout, Split
from twotower.negatives import CountedFrequency, InBatch, Pool
from twotower.objectives import SampledSoftmax
from twotower.run.data import split_data
from twotower.towers.text import text_transformers
from twotower.training import compute_loss, embedding
from twotower.training.memory_plan import of_texts

ITEMS, WIDTH = 24, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text") / "tiny", dropout=0.3)


@pytest.fixture(scope="module")
def data():
    """Two queries for every item, whose texts share its topic; some queries and items have the same text or none."""
    random = np.random.default_rng(0)
    topics = [random.choice(WORDS, 3).tolist() for _ in range(ITEMS)]
    titles = [" ".join(topic) for topic in topics]
    asked = [" ".join(random.permutation(topics[q // 2])[: 1 + q % 2]) for q in range(2 * ITEMS)]
    titles[3], titles[4], asked[5], asked[7] = titles[2], None, asked[6], None
    frame = pl.DataFrame({"query_id": range(2 * ITEMS), "item_id": np.arange(2 * ITEMS) // 2})
    frame = pl.concat([frame, frame.head(10).with_columns(item_id=pl.col("item_id") + 1)])
    return tt.Interactions.from_frame(
        frame,
        items=pl.DataFrame({"item_id": range(ITEMS), "title": titles}),
        queries=pl.DataFrame({"query_id": range(2 * ITEMS), "words": asked}),
    )


def config(model, train="full", *more, **settings):
    text = "".join(f", {name}: {value}" for name, value in settings.items())
    return tt.Config.load(
        None,
        [
            f"item_tower.features=[{{column: title, kind: text, model: {model}, train: {train}{text}}}]",
            f"query_tower.features=[{{column: words, kind: text, model: {model}, train: {train}{text}}}]",
            "item_tower.projection=false",
            "item_tower.id_embedding=false",
            "query_tower.projection=false",
            "query_tower.hidden=null",
            "query_tower.history=null",
            f"item_tower.dimension={WIDTH}",
            "objective.sources=[{in_batch: {}}]",
            "training.question=next",
            "training.batch_size=16",
            "training.max_epochs=3",
            "training.logger=none",
            "training.recent_prior=false",
            "training.encoder_learning_rate=1e-3",
            "data.split=leave-last-out",
            *more,
        ],
    )


def built(config, data):
    torch.manual_seed(0)
    return towers_of(config, data).train()


def step(towers, data, micro_batch):
    """Return (loss, gradients, the next random number) of a batch with repeated queries and items."""
    torch.manual_seed(5)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 13, 14, 15, 0, 1])
    queries = np.repeat(np.arange(data.num_queries), np.diff(data.offsets))
    items = torch.from_numpy(data.item_codes.astype(np.int64))[rows]
    batch = Batch(rows, torch.from_numpy(queries)[rows], items, torch.empty(len(rows), 0, dtype=torch.int64))
    objective = SampledSoftmax(Pool(InBatch(CountedFrequency(torch.ones(data.num_items)))))
    towers.zero_grad()
    loss, _, _ = compute_loss(towers, objective, batch, micro_batch=micro_batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in towers.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, float(torch.rand(()))


def assert_equal_steps(found, expected, gradients=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert torch.allclose(found[1][name], grad, rtol=gradients, atol=1e-6), name
    assert found[2] == expected[2], "the generator continues as after a plain step"


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_gradient_cache_is_exact_with_dropout(model, data, monkeypatch, train):
    towers = built(config(model, train), data)
    if train == "lora":  # B starts at zero, and A would have no gradient
        for name, one in towers.named_parameters():
            torch.nn.init.normal_(one, std=0.1) if ".lora_B" in name else None
    found = step(towers, data, 4)
    trained = [name for name, _ in text_transformers(towers)[0].named_parameters() if _.requires_grad]
    used = [name for name in trained if not name.endswith("key.bias")]  # which a softmax of the scores ignores
    assert all(any(name.endswith(one) and grad.abs().max() > 1e-7 for name, grad in found[1].items()) for one in used)
    # The plain step, in the same parts, keeps all activations: each distinct query and item once.
    monkeypatch.setattr(
        embedding, "cached_parts", lambda embed, parts, anchor: torch.cat([embed(*part) for part in parts])
    )
    assert_equal_steps(found, step(towers, data, 4))
    other = step(towers, data, None)
    assert found[0] != pytest.approx(other[0], rel=1e-6), "there is dropout, which differs with other parts"


def test_without_dropout_the_gradient_cache_equals_the_whole_batch(tmp_path, data):
    towers = built(config(write_text_model(tmp_path, dropout=0.0)), data)
    assert_equal_steps(step(towers, data, 4), step(towers, data, None), gradients=1e-4)


def test_gradient_checkpointing_changes_nothing(model, data):
    plain = step(built(config(model), data), data, None)
    towers = built(config(model, gradient_checkpointing=True), data)
    assert_equal_steps(step(towers, data, None), plain)
    cached = step(towers, data, 4)
    assert_equal_steps(cached, step(built(config(model), data), data, 4))


def test_half_precision_is_that_of_the_trainer(model, data):
    towers = built(config(model), data)
    expected, gradients, _ = step(towers, data, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, halved, _ = step(towers, data, None)
    assert found != expected and found == pytest.approx(expected, rel=0.05)
    assert halved.keys() == gradients.keys() and all(grad.dtype == torch.float32 for grad in halved.values())


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_plan_has_the_activations_that_are_stored(tmp_path, data, train):
    towers = built(config(write_text_model(tmp_path, width=64), train, "item_tower.dimension=64"), data)
    weights, stored = {p.data_ptr() for p in towers.parameters()}, {}

    def look(tensor):
        if tensor.data_ptr() not in weights:
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        kept = towers.embed_items(torch.arange(ITEMS)), towers.embed_queries(torch.arange(2 * ITEMS), None)
    planned = of_texts(towers, None, rows=2 * ITEMS, items=ITEMS)
    assert len(kept) == 2 and 0.5 * planned < sum(stored.values()) < 1.1 * planned
    assert of_texts(towers, 4, rows=2 * ITEMS, items=ITEMS) < planned / 8


def split_of(data):
    """Hold out no rows: the texts of training are asked again."""
    rows = np.arange(data.num_queries)
    histories, targets = np.zeros(len(rows) + 1, dtype=np.int64), data.offsets
    asked = Holdout("validation", rows, histories, np.zeros(0, np.int32), targets, data.item_codes)
    return Split(data, asked, Holdout.empty("test"), data.account, "all rows", {}, data)


@pytest.mark.parametrize("train", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_an_interrupted_run_resumes_to_the_same_model(model, data, tmp_path, train):
    settings = config(model, train, "training.weight_average=0.5", "training.micro_batch=8")
    whole = tt.fit(split_of(data), settings, directory=tmp_path / "whole", progress=False)
    with stopped_after_first_epoch():
        tt.fit(split_of(data), settings, directory=tmp_path / "cut", progress=False)
    resumed = tt.fit(split_of(data), settings, directory=tmp_path / "cut", resume=True, progress=False)
    assert whole.fit.history == resumed.fit.history
    weights = [one.artifact.towers.state_dict() for one in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert torch.equal(whole.artifact.item_embeddings, resumed.artifact.item_embeddings)


def test_a_trained_encoder_finds_the_items_of_its_texts(tmp_path, data):
    model = write_text_model(tmp_path, dropout=0.0)
    settings = config(model, "full", "training.encoder_learning_rate=3e-3", "training.max_epochs=10")
    history = tt.fit(split_of(data), settings, progress=False).fit.history
    assert history[-1]["NDCG@10"] > history[0]["NDCG@10"] + 0.2


@pytest.mark.parametrize("train", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_continued_model_starts_with_the_trained_encoder(model, tmp_path, train):
    random = np.random.default_rng(1)
    texts = [" ".join(random.choice(WORDS, 3)) for _ in range(ITEMS + 4)]

    def days(first, last, items):
        rows, day = 40 * (last - first), 86_400
        return tt.Interactions.from_frame(
            pl.DataFrame({
                "query_id": random.integers(0, 20, rows),
                "item_id": np.r_[np.arange(items), random.integers(0, items, rows - items)],
                "timestamp": 1_600_000_000 + np.sort(random.integers(day * first, day * last, rows)),
            }),
            items=pl.DataFrame({"item_id": range(items), "title": texts[:items]}),
            queries=pl.DataFrame({"query_id": range(20), "words": texts[:20]}),
        )  # fmt: skip

    settings = config(model, train, "training.max_epochs=1", "data.split=time", "training.learning_rate=1e-12")
    split = split_data(days(0, 10, ITEMS), settings.data)
    parent = tt.fit(split, settings, directory=tmp_path / "parent", progress=False)
    parent.save(tmp_path / "parent" / "model")
    # A rate of almost 0 changes nothing, so the continued model has to embed every text as its parent does.
    still = settings.changed("training", encoder_learning_rate=1e-12)
    more = tt.continue_with(tmp_path / "parent", days(10, 14, ITEMS + 4), still)
    messages = []
    child = tt.fit(more, still, warm_start=tmp_path / "parent", progress=False, on_message=messages.append)
    assert not [one for one in messages if "start without state" in str(one) or "only weights" in str(one)]
    items = child.artifact.items.ids.to_list()
    expected = parent.artifact.towers.embed_new_items([{"title": texts[item]} for item in items])
    assert len(items) == ITEMS + 4
    assert torch.allclose(child.artifact.item_embeddings, expected, atol=1e-4)
    pretrained = built(settings, split.train).eval().embed_new_items([{"title": texts[item]} for item in items])
    assert not torch.allclose(expected, pretrained, atol=1e-2), "the parent's encoder was trained"
