"""A model with nested widths: evaluated, indexed and served at each of them."""

import json

import numpy as np
import polars as pl
import pytest
import torch

import twotower as tt
from serving.conftest import SETTINGS
from twotower.comparison import evaluate_folder
from twotower.config.run import Config
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.evaluation import evaluate
from twotower.index.approximate.build import build_index
from twotower.index.prefix import Prefix
from twotower.ranking.distributed import ShardedRanker
from twotower.serving import Retriever, build_stored_index, read_index_report
from twotower.serving.model_folder import SavedModel

MORE = ["item_tower.nested=[4, 8]", "item_tower.bias=true", "training.max_epochs=2"]


@pytest.fixture(scope="module")
def nested(planted_split):
    return tt.fit(planted_split, Config.load(None, [*SETTINGS, *MORE]), progress=False)


@pytest.fixture
def copy(nested, tmp_path):
    return nested.save(tmp_path / "run" / "model").parent


def shortened(embedded, width, dimension=16):
    """Shorten embeddings in float64; they have length 1."""
    first = embedded.double()[:, :width]
    first = first / first.norm(dim=1, keepdim=True) if width < dimension else first
    return torch.cat([first, embedded.double()[:, dimension:]], 1)


def test_the_metrics_of_each_width_are_those_of_its_coordinates(nested, planted_split):
    """Compared with a ranking by float64 scores of embeddings that are cut here."""
    test = planted_split.test
    measured = tt.evaluate(nested, test, ks=(5, 10), baselines=False)
    assert list(measured.widths.values) == [4, 8, 16]
    embedded = nested.retriever.ranker.embed_holdout(test)
    items = nested.artifact.item_embeddings
    assert items.shape[1] == 17
    for width, values in measured.widths.values.items():
        scores = shortened(embedded, width) @ shortened(items, width).T
        for row, (start, stop) in enumerate(zip(test.history_offsets[:-1], test.history_offsets[1:], strict=True)):
            scores[row, torch.from_numpy(test.history_items[start:stop].astype(np.int64))] = -torch.inf
        ranked = scores.topk(10).indices.numpy()

        class Fixed:
            def rank(self, holdout, k, exclude_seen, ranked=ranked):
                return ranked[:, :k]

        row = evaluate(Fixed(), test, train=planted_split.train, ks=(5, 10), baselines=False).rows[0]
        assert values == {name: pytest.approx(row.values[name]) for name in measured.widths.metrics}
    different = {values["NDCG@10"] for values in measured.widths.values.values()}
    assert len(different) > 1
    text = str(measured)
    assert "width  Recall@5  NDCG@5  Recall@10  NDCG@10" in text and "by width: ranked by the first coordinates" in text


def test_parts_of_a_sharded_catalog_rank_as_one(nested, planted_split):
    towers = nested.artifact.towers
    ranker = ShardedRanker(towers, 10, Communicator(), width=8)
    expected = nested.at_width(8).rank(planted_split.test, 10, True)
    assert np.array_equal(ranker.rank(planted_split.test, 10, True), expected)
    assert ranker.embeddings_of(np.array([3, 1])).shape == (2, 8)


def test_results_and_report_have_a_row_for_each_width(copy, nested, planted_split, monkeypatch):
    measured = tt.evaluate(nested, planted_split.test, baselines=False)
    rows = json.loads(json.dumps(measured.to_dict()))["widths"]["rows"]
    assert [row["width"] for row in rows] == [4, 8, 16]
    assert rows[0]["intervals"]["Recall@10"]["low"] <= rows[0]["values"]["Recall@10"]
    folder = "twotower.comparison.single_model"
    monkeypatch.setattr(f"{folder}.reread", lambda *_: (SavedModel.load(copy), planted_split))
    found = evaluate_folder(copy, page=copy / "report.html")
    assert found.widths.values == measured.widths.values
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "By width of the embeddings" in page and "of the full Recall@10" in page


@pytest.mark.parametrize("kind", ["hnsw", "int8"])
def test_an_index_at_a_width_is_found_and_scored_again_at_the_full_width(copy, kind):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")
    full = build_stored_index(copy, kind, k=10, queries=30)
    report = build_stored_index(copy, kind, k=10, min_recall=0.9, queries=30, width=8)
    assert report.settings["width"] == 8 and min(report.recall.values()) >= 0.9 and report.bytes < full.bytes
    loaded, exact = Retriever.load(copy), Retriever.load(copy, exact=True)
    assert loaded.search.approximate.engine.prefix == Prefix(8, 16, cosine=True)
    for popularity in (1.0, 0.4):
        found, expected = (
            one.recommend(["u001", "u002"], k=10, popularity=popularity, exclude_seen=False) for one in (loaded, exact)
        )
        scores = dict(zip(zip(expected["query"], expected["item"], strict=True), expected["score"], strict=True))
        shared = [(q, i) for q, i in zip(found["query"], found["item"], strict=True) if (q, i) in scores]
        assert len(shared) >= 16
        for query, item, score in found.select("query", "item", "score").rows():
            if (query, item) in scores:
                assert score == pytest.approx(scores[query, item], abs=1e-5)
    best = exact.artifact.item_embeddings[3].tolist()
    loaded.catalog.add([{"item_id": 5000, "title": "new"}], embeddings=[best])
    neighbours = loaded.recommend(["u001"], k=len(loaded.artifact.items), exclude_seen=False)["item"].to_list()
    assert 5000 in neighbours


def test_an_embedder_gives_the_first_coordinates(copy, nested):
    ids = pl.DataFrame({"item": [*nested.artifact.items.ids[:3].to_list(), 987_654]})
    found = tt.serving.Embedder(copy, "items", width=8)(ids)["embedding"]
    assert found.dtype.size == 9 and found[3] is None
    expected = shortened(nested.artifact.item_embeddings[:3], 8)
    torch.testing.assert_close(torch.tensor(found[:3].to_list(), dtype=torch.float64), expected, rtol=1e-5, atol=1e-6)
    query = tt.serving.Embedder(copy, width=4)(pl.DataFrame({"query": ["u001"]}))["embedding"].to_numpy()
    assert query.shape == (1, 5) and np.linalg.norm(query[0, :4]) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(InputError, match="not trained at width 5"):
        tt.serving.Embedder(copy, "items", width=5)(ids)


def test_what_cannot_be_indexed_is_refused(copy, nested):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")
    with pytest.raises(InputError, match="not trained at width 5, only at 4, 8, 16; choose one"):
        build_stored_index(copy, "hnsw", k=5, queries=10, width=5)
    with pytest.raises(InputError, match="exact search uses all 16 coordinates; for an index at width 8"):
        build_stored_index(copy, "exact", width=8)
    with pytest.raises(InputError, match="fetch must be a number in 1 .. 4,096, found 0.5"):
        build_stored_index(copy, "hnsw", k=5, queries=10, width=8, settings={"fetch": 0.5})
    with pytest.raises(InputError, match="unknown setting for hnsw"):
        build_stored_index(copy, "hnsw", k=5, queries=10, settings={"fetch": 2})
    assert build_stored_index(copy, "hnsw", k=5, queries=10, width=16).settings.get("width") is None
    with pytest.raises(InputError, match="expected a number from 1 to 16"):
        nested.retriever.rank(nested.split.test, 5, True, width=17)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 7}, "not trained at width 7"),
        ({"width": True}, "expected an integer, found True"),
        ({"width": "8"}, "expected an integer, found '8'"),
        ({"width": 4}, "not readable|built|fails|width|error"),
        ({"fetch": 1e9}, "fetch must be a number"),
        ({"fetch": None}, "fetch must be a number"),
    ],
)
def test_a_changed_description_of_an_index_is_refused(copy, change, message):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")
    build_stored_index(copy, "hnsw", k=5, queries=10, width=8)
    where = copy / "model" / "index"
    description = json.loads((where / "index.json").read_text())
    description["settings"] |= change
    (where / "SHA256SUMS").unlink(missing_ok=True)
    (where / "index.json").write_text(json.dumps(description))
    assert read_index_report(copy / "model")["settings"] == description["settings"]
    with pytest.raises(InputError, match=message):
        Retriever.load(copy)


def test_a_higher_effort_fetches_more_at_a_smaller_width():
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")
    rng = torch.Generator().manual_seed(0)
    items, queries = torch.randn(3000, 32, generator=rng), torch.randn(40, 32, generator=rng)
    low, floor = (
        build_index("hnsw", items, {"all": queries}, k=10, min_recall=least, prefix=Prefix(16, 32, cosine=False))[1]
        for least in (None, 0.95)
    )
    assert low.recall["all"] < 0.9 and floor.recall["all"] >= 0.95
    assert floor.settings["fetch"] > low.settings["fetch"] == 4.0
