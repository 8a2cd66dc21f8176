"""Adding, changing and removing items: results match inner products computed by hand, and other items do not move."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from support.postgres import postgres
from support.service_models import client
from twotower.cli import main as cli
from twotower.config.run import Config
from twotower.data.schema.vocabulary import Vocabulary
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.index.approximate.pgvector import DATABASE
from twotower.serving import Retriever, SavedModel, build_stored_index, save_changes
from twotower.serving.catalog_changes import GrownVocabulary
from twotower.serving.shards import SharedRetriever
from twotower.towers import build_towers

EVERYTHING = 400


@pytest.fixture(scope="module")
def url():
    with postgres() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATABASE, address)
        yield address


@pytest.fixture(params=["exact", "hnsw", "ivfpq", "int8", "binary", "pgvector"])
def loaded(request, folder, planted_data, tmp_path):
    """A model in its own folder, with each kind of index; IVF-PQ needs a catalog of a thousand items."""
    kind = request.param
    if kind not in ("exact", "pgvector"):
        pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")
    run = tmp_path / "run"
    if kind == "ivfpq":
        large(run / "model")
    else:
        shutil.copytree(folder, run / "model")
    settings = {"url": request.getfixturevalue("url")} if kind == "pgvector" else None
    if kind != "exact":
        build_stored_index(run, kind, k=10, queries=20, settings=settings)
    retriever = Retriever.load(run)
    assert retriever.index.kind == kind
    return run, retriever


def large(folder, items=1200):
    rng = np.random.default_rng(0)
    config = Config.load(None, ["item_tower.dimension=16", "query_tower.history.length=10"])
    torch.manual_seed(0)
    towers = build_towers(config, num_queries=40, num_items=items).eval()
    titles = pl.DataFrame({"title": [f"Item number {j}" for j in range(items)]})
    return SavedModel(
        config=config,
        towers=towers,
        item_embeddings=towers.item_embeddings(),
        item_counts=torch.from_numpy(rng.integers(0, 30, items)),
        queries=Vocabulary([f"u{q:03d}" for q in range(40)]),
        items=Vocabulary(pl.Series("id", range(items))),
        history_offsets=np.arange(41) * 8,
        history_items=rng.integers(0, items, 320).astype(np.int32),
        item_table=titles,
        metadata={"data": {"source": "nowhere"}},
    ).save(folder)


def embedded(retriever, query):
    """Embed a known query: u(x) in float64."""
    artifact = retriever.artifact
    code = artifact.queries.encode([query])
    start, stop = artifact.history_offsets[code[0]], artifact.history_offsets[code[0] + 1]
    history = np.asarray(artifact.history_items[start:stop])
    return retriever.ranker.embed(code, (np.array([0, len(history)]), history))[0].double()


def catalog_of(retriever):
    """Map each item id to its vector."""
    return dict(zip(retriever.artifact.items.ids.to_list(), retriever.artifact.item_embeddings.double(), strict=True))


def best(catalog, query, k):
    return sorted(catalog, key=lambda item: -float(query @ catalog[item]))[:k]


def found(retriever, query, k=EVERYTHING, **asked):
    return retriever.recommend([query], k=k, exclude_seen=False, **asked)


QUERIES = ("u001", "u002", "u017", "u030")


def test_items_are_added_changed_and_removed_and_the_rest_stays(loaded):
    """For every kind of index; all items are requested, so that approximate indexes must find each one."""
    run, retriever = loaded
    catalog = catalog_of(retriever)
    dim = retriever.artifact.item_embeddings.shape[1]
    before = {query: found(retriever, query) for query in QUERIES}
    k = len(before["u001"])
    assert before["u001"]["item"].to_list() == best(catalog, embedded(retriever, "u001"), k)

    # Add the best possible item for u001.
    retriever.catalog.add([{"item_id": 5000, "title": "Brand new"}], embeddings=[embedded(retriever, "u001").tolist()])
    catalog[5000] = torch.nn.functional.normalize(embedded(retriever, "u001"), dim=0)
    for query in QUERIES:
        now = found(retriever, query, k=len(catalog))
        rest = now.filter(pl.col("item") != 5000)
        assert len(now) == min(len(catalog), k + 1) or len(now) == len(catalog)
        assert rest["item"].to_list()[:k] == before[query]["item"].to_list()
        assert rest["score"].to_list()[:k] == pytest.approx(before[query]["score"].to_list(), abs=1e-6)
        assert now["item"].to_list()[:k] == best(catalog, embedded(retriever, query), len(now))[:k]
    assert found(retriever, "u001", k=1).row(0)[2:] == (5000, pytest.approx(1.0), "Brand new")
    assert found(retriever, "u001", filter="title = 'Brand new'")["item"].to_list() == [5000]
    assert retriever.search_titles("brand")["item"].to_list() == [5000]

    # Remove the two best items of u002.
    gone = [item for item in found(retriever, "u002", k=3)["item"] if item != 5000][:2]
    retriever.catalog.remove(gone)
    for item in gone:
        del catalog[item]
    for query in QUERIES:
        ids = found(retriever, query, k=len(catalog) + 2)["item"].to_list()
        assert ids == best(catalog, embedded(retriever, query), len(catalog))
        assert not set(gone) & set(found(retriever, query, k=50, popularity=0.3)["item"])
    assert not set(gone) & set(retriever.similar([next(iter(catalog))], k=len(catalog))["item"])
    assert not set(gone) & set(retriever.search_titles("item number", k=EVERYTHING)["item"])

    # Change an item in the middle of the list of u017 so that it comes first.
    moved = found(retriever, "u017")["item"].to_list()[20]
    retriever.catalog.update([{"item_id": moved}], embeddings=embedded(retriever, "u017")[None].numpy())
    catalog[moved] = torch.nn.functional.normalize(embedded(retriever, "u017"), dim=0)
    for query in QUERIES:
        now = found(retriever, query, k=len(catalog))
        assert now["item"].to_list() == best(catalog, embedded(retriever, query), len(catalog))
    assert retriever.describe([moved])["title"][0] == f"Item number {moved}"

    # Add a removed item again with its own title, and save all changes in the folder.
    retriever.catalog.add(
        pl.DataFrame({"item_id": [gone[0]], "title": ["Back"], "embedding": [[1.0] + [0.0] * (dim - 1)]})
    )
    catalog[gone[0]] = torch.eye(dim, dtype=torch.float64)[0]
    counts = save_changes(retriever.catalog, run)
    assert counts == {"joined": 1, "changed": 2, "left": 1}
    again = Retriever.load(run)
    assert again.index.kind == retriever.index.kind
    for query in QUERIES:
        for asked in ({}, {"popularity": 0.0}, {"filter": "title <> 'Item number 3'"}):
            one, two = found(retriever, query, **asked), found(again, query, **asked)
            assert one.equals(two)
        assert found(again, query, k=len(catalog))["item"].to_list() == best(
            catalog, embedded(again, query), len(catalog)
        )
    # Change the loaded catalog once more.
    again.catalog.remove([5000])
    assert save_changes(again.catalog, run) == {"joined": 1, "changed": 2, "left": 2}
    assert 5000 not in found(Retriever.load(run), "u001")["item"]
    for one in (retriever, again):
        if one.index.kind == "pgvector":
            one.index.engine.close()


def test_histories_may_have_items_that_the_tower_does_not_know(folder):
    retriever = Retriever.load(folder)
    plain = retriever.recommend(histories=[[3, 5, 9]], k=30)
    retriever.catalog.add([{"item_id": 5000}], embeddings=[embedded(retriever, "u001").tolist()])
    with_it = retriever.recommend(histories=[[3, 5000, 5, 9]], k=30)
    assert 5000 not in with_it["item"] and 5000 in retriever.recommend(histories=[[3, 5, 9]], k=101)["item"]
    assert with_it["item"].to_list() == [item for item in plain["item"] if item != 5000]
    explanation = retriever.explain(item=5000, history=[3, 5000, 9])
    assert dict(zip(explanation.history["item"], explanation.history["contribution"], strict=True))[
        5000
    ] == pytest.approx(0, abs=1e-6)


def test_evaluation_ranks_trained_items_only(folder, planted_split, model):
    retriever = Retriever.load(folder)
    before = retriever.rank(planted_split.test, 10, True)
    retriever.catalog.add([{"item_id": 5000}], embeddings=[embedded(retriever, "u001").tolist()])
    assert np.array_equal(retriever.rank(planted_split.test, 10, True), before)


def test_ranks_together_leave_out_removed_items(folder, planted_split):
    """As `Retriever.rank`; ranks that search their own part of the items would rank removed ones too."""
    retriever = Retriever.load(folder)
    before = retriever.rank(planted_split.test, 10, True)
    retriever.catalog.remove(retriever.artifact.items.decode(np.unique(before[:, 0])))
    alone = retriever.rank(planted_split.test, 10, True)
    assert not np.isin(alone, before[:, 0]).any()
    together = SharedRetriever(retriever, Communicator()).rank(planted_split.test, 10, True)
    assert np.array_equal(together, alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.add([{"item_id": 3}], embeddings=[[1.0] * 16]), "3 is in the catalog already; update it"),
        (lambda c: c.update([{"item_id": 777}], embeddings=[[1.0] * 16]), "777 is not in the catalog; add it"),
        (lambda c: c.remove([3, 777]), "777 is not in the catalog"),
        (lambda c: c.remove([]), "expected a list of item ids"),
        (lambda c: c.add([{"item_id": 777}]), "represents items by their id alone.*column 'embedding' with 16 numbers"),
        (lambda c: c.add([{"item_id": 777}], embeddings=[[1.0] * 15]), r"expected shape \[1, 16\], found \[1, 15\]"),
        (lambda c: c.add([{"item_id": 777}], embeddings=[[np.nan] * 16]), "its embedding is zero, or not finite"),
        (lambda c: c.add([{"item_id": 777}], embeddings=[[0.0] * 16]), "its embedding is zero, or not finite"),
        (lambda c: c.add([{"item_id": 7.5}], embeddings=[[1.0] * 16]), "floats cannot represent every integer above"),
        (lambda c: c.add([{"item_id": "x"}], embeddings=[[1.0] * 16]), "not an integer"),
        (lambda c: c.add([{"title": "x"}], embeddings=[[1.0] * 16]), "expected a column of item ids"),
        (lambda c: c.add([{"item_id": 1}, {"item_id": 1}], embeddings=[[1.0] * 16] * 2), "every id once"),
        (lambda c: c.add([], embeddings=[]), "expected at least one"),
    ],
)
def test_refusals_change_nothing(folder, change, message):
    retriever = Retriever.load(folder)
    before = found(retriever, "u001")
    with pytest.raises(InputError, match=message):
        change(retriever.catalog)
    assert found(retriever, "u001").equals(before) and retriever.catalog.changes.to_dict()["joined"] == 0


FEATURES = ["item_tower.features=[{column: colour, kind: categorical}, {column: price, kind: numeric}]"]


def test_an_added_item_has_the_embedding_of_an_item_with_the_same_features(planted_data, tmp_path):
    """Without id embeddings, same features mean same embedding; with them, an update keeps the item's own part."""
    ids = planted_data.items.ids
    table = pl.DataFrame(
        {"colour": [("red", "blue")[j % 2] for j in range(100)], "price": [float(j) for j in range(100)]}
    )
    for with_ids in (False, True):
        config = Config.load(
            None, [*FEATURES, "item_tower.dimension=16", f"item_tower.id_embedding={str(with_ids).lower()}",
                   "query_tower.history.share_table=false"]
        )  # fmt: skip
        fitted = EncodedTable.fit("item", config.item_tower.features, table, ids=ids)
        torch.manual_seed(0)
        towers = build_towers(config, num_queries=60, num_items=100, item_features=fitted).eval()
        if with_ids:
            torch.nn.init.normal_(towers.item_tower.no_id)
        artifact = SavedModel(
            config, towers, towers.item_embeddings(), torch.ones(100, dtype=torch.int64), planted_data.queries,
            planted_data.items, planted_data.offsets, planted_data.item_codes, table,
        )  # fmt: skip
        retriever = Retriever.load(artifact.save(tmp_path / f"{with_ids}" / "model"))
        retriever.catalog.add([{"id": 900, "colour": "blue", "price": 7.0}])
        now = catalog_of(retriever)
        assert torch.allclose(now[900], now[7], atol=1e-6) is not with_ids
        retriever.catalog.update([{"id": 8, "price": 50.0}])  # its colour stays
        moved = catalog_of(retriever)[8]
        assert retriever.describe([8])["colour"][0] == "red" and retriever.describe([8])["price"][0] == 50.0
        assert torch.allclose(moved, now[50], atol=1e-6) is not with_ids
        assert not torch.allclose(moved, now[8], atol=1e-4)
        retriever.catalog.update([{"id": 8, "price": 8.0}])
        assert torch.allclose(catalog_of(retriever)[8], now[8], atol=1e-6), "the original embedding is restored"
        with pytest.raises(InputError, match="colour"):
            retriever.catalog.add(pl.DataFrame({"id": [901], "colour": [[1]], "price": [1.0]}))


def test_the_command_and_a_service_that_reloads(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    direction = embedded(Retriever.load(run), "u001").tolist()
    pl.DataFrame({"item_id": [5000], "title": ["Brand new"], "embedding": [direction]}).write_parquet(
        tmp_path / "a.parquet"
    )
    ask = CliRunner()
    with client(run, watch_seconds=0) as service:
        first = service.post("/recommend", json={"query_id": "u001", "k": 2}).json()
        result = ask.invoke(
            cli.app, ["items", str(run), "--add", str(tmp_path / "a.parquet"), "--remove", "3,4", "--json"]
        )
        assert json.loads(result.stdout) == {"joined": 1, "changed": 0, "left": 2}, result
        assert service.app.state.service.models.refresh() == {"run": "swapped"}
        second = service.post("/recommend", json={"query_id": "u001", "k": 100}).json()
        ids = [row["item"] for row in second["items"]]
        assert ids[0] == 5000 and second["items"][0]["title"] == "Brand new" and not {3, 4} & set(ids)
        assert second["version"] != first["version"] and second["items"][0]["interactions"] == 0
        assert service.get("/items/5000").json()["title"] == "Brand new"
        assert service.get("/page/map").status_code == 200
    with pytest.raises(InputError, match="found none of them"):
        ask.invoke(cli.app, ["items", str(run)], catch_exceptions=False)
    with pytest.raises(InputError, match="none.csv: no such file"):
        ask.invoke(cli.app, ["items", str(run), "--add", str(tmp_path / "none.csv")], catch_exceptions=False)


def test_changes_that_do_not_match_are_refused(folder, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    build_stored_index(run, "hnsw", k=5)
    index_before = (run / "model" / "index" / "index.json").read_text()
    exact = Retriever.load(run, exact=True)
    exact.catalog.remove([3])
    with pytest.raises(InputError, match="load the model with its index"):
        save_changes(exact.catalog, run)
    retriever = Retriever.load(run)
    retriever.catalog.remove([3])
    save_changes(retriever.catalog, run)
    (run / "model" / "index" / "index.json").write_text(index_before)
    (run / "model" / "index" / "SHA256SUMS").unlink()  # as in older versions
    with pytest.raises(InputError, match="a different state of the catalog"):
        Retriever.load(run)
    build_stored_index(run, "hnsw", k=5)  # as the message advises
    assert 3 not in found(Retriever.load(run), "u001")["item"]
    (run / "model" / "changes" / "joined.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"joined.parquet: its checksum differs"):
        Retriever.load(run)
    SavedModel.load(run).save(run / "model")  # saved again: the changes belonged to the old catalog
    assert 3 in found(Retriever.load(run), "u001")["item"]
    with pytest.raises(InputError, match="now contains a different model"):
        save_changes(retriever.catalog, drawn_elsewhere(tmp_path, folder))


def drawn_elsewhere(tmp_path, folder):
    other = SavedModel.load(folder)
    other.item_embeddings.add_(1.0)
    return other.save(tmp_path / "other" / "model")


def test_ids_added_to_a_vocabulary():
    first = Vocabulary(["a", "c"])
    both = GrownVocabulary(first, ["b", "d"])
    assert both.encode(["a", "b", "c", "d", "e"]).tolist() == [0, 2, 1, 3, -1] and len(both) == 4
    assert both.decode([3, 0, -1]).to_list() == ["d", "a", None]
    with pytest.raises(InputError, match="an added id already exists"):
        GrownVocabulary(first, ["c"])
    numbers = GrownVocabulary(Vocabulary([5, 1]), ["7"])
    assert numbers.encode(["7", "1"]).tolist() == [2, 1] and numbers.ids.dtype == pl.Int64
