"""Embeddings in batches: those of the model folder, from every kind of table, also in other processes."""

import multiprocessing
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.serving import Embedder, Retriever, embedder, save_changes
from twotower.serving.queries import QueryBatch

HOW_TO = Path(__file__).parents[2] / "docs/how-to/embed-in-other-engines.md"
USERS = [f"u{q:02d}" for q in range(40)]
SMALL = [
    "training.max_epochs=1",
    "training.batch_size=64",
    "training.learning_rate=0.02",
    "training.accelerator=cpu",
    "item_tower.dimension=8",
]
CASES = {
    "pooled history": ["query_tower.history.length=5"],
    "sequence": ["query_tower.history.length=5", "query_tower.history.sequence={kind: gru, blocks: 1, dropout: 0}"],
    "features and context": [
        "query_tower.history.length=5",
        "query_tower.features=[{column: taste, kind: categorical}, {column: tags, kind: multi}]",
        "query_tower.context=[{column: device, kind: categorical}]",
        "item_tower.features=[{column: colour, kind: categorical}, {column: price, kind: numeric}]",
        "item_tower.hidden=[8]",
    ],
    "propagated ids": [
        "query_tower.id_embedding=true",
        "query_tower.history=null",
        "query_tower.hidden=null",
        "query_tower.propagation=2",
        "item_tower.popularity=0.6",
        "objective.name=full-softmax",
        "objective.temperature=0.1",
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders, {case: folder}."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("embedded")
    rows = [
        (user, int(item), 1_600_000_000 + 3600 * hour, ["phone", "desk"][(item + hour) % 2])
        for q, user in enumerate(USERS)
        for hour, item in enumerate(rng.choice(np.arange(q % 2, 30, 2), size=10, replace=False))
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "device"], orient="row")
    people = pl.DataFrame({
        "user_id": USERS, "taste": [["even", "odd"][q % 2] for q in range(40)],
        "tags": [[str(q % 3), "x"][: 1 + q % 2] for q in range(40)],
    })  # fmt: skip
    goods = pl.DataFrame({
        "item_id": np.arange(30), "colour": ["red", "blue", "green"] * 10, "price": np.arange(30) * 0.5,
    })  # fmt: skip
    found = {}
    for name, settings in CASES.items():
        config = Config.load(None, [*SMALL, *settings])
        tables = {"queries": people, "items": goods, "context": ["device"]} if name == "features and context" else {}
        data = tt.Interactions.from_frame(log, **tables)
        model = tt.fit(tt.splits.leave_last_out(data), config, progress=False)
        found[name] = model.save(root / name.replace(" ", "-"))
    return found


def batch_of(case, users=USERS):
    """Queries of a case with what its model reads beside ids: features and a context in every row."""
    frame = pl.DataFrame({"user_id": users})
    if case != "features and context":
        return frame, {}
    given = {
        "features": [{"taste": ["odd", "even"][j % 2], "tags": ["x"]} for j in range(len(users))],
        "context": [{"device": ["desk", "phone", None][j % 3]} for j in range(len(users))],
    }
    return pl.concat([frame, *(pl.DataFrame(rows) for rows in given.values())], how="horizontal"), given


def by_retriever(folder, users, given):
    """The embeddings that the retriever searches with, from lists in place of tables."""
    retriever = Retriever.load(folder)
    batch = QueryBatch.of(retriever.artifact, users, None, given.get("features"), context=given.get("context"))
    embedded = retriever.embed(batch.codes, batch.histories, batch.features, context=batch.context, marks=batch.marks)
    return embedded.numpy()


@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_those_of_the_folder(folders, case):
    frame, given = batch_of(case)
    found = Embedder(folders[case])(frame)
    assert found.columns == [*frame.columns, "embedding"] and found.drop("embedding").equals(frame)
    queries = found["embedding"].to_numpy()
    assert np.array_equal(queries, by_retriever(folders[case], USERS, given))
    assert len(np.unique(queries.round(6), axis=0)) > 10, "queries with different inputs differ"
    retriever = Retriever.load(folders[case])
    items = Embedder(folders[case], "items")(pl.DataFrame({"item_id": np.arange(30)[::-1]}))
    stored = retriever.artifact.item_embeddings.numpy()
    codes = retriever.artifact.items.encode(items["item_id"])
    assert items.schema["embedding"] == pl.Array(pl.Float32, stored.shape[1])
    assert np.array_equal(items["embedding"].to_numpy(), stored[codes])
    best = np.argmax(queries @ items["embedding"].to_numpy().T, axis=1)
    recommended = retriever.recommend(USERS, k=1, exclude_seen=False, **given)
    assert items["item_id"].gather(best).to_list() == recommended["item"].to_list()


def test_processes_have_the_same_embeddings(folders):
    """Each batch goes with a copy of the embedder, as engines send it; spawned processes share nothing else."""
    work = []
    for case in CASES:
        frame, given = batch_of(case)
        for part in (slice(0, 25), slice(25, 40)):
            rows = {name: values[part] for name, values in given.items()}
            work.append((folders[case], frame[part], by_retriever(folders[case], USERS[part], rows)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(Embedder(folder), frame) for folder, frame, _ in work]
        for future, (_, frame, expected) in zip(running, work, strict=True):
            found = future.result(timeout=120)
            assert found.drop("embedding").equals(frame)
            assert np.array_equal(found["embedding"].to_numpy(), expected)


def test_it_is_pickled_as_a_path_and_opened_once(folders, monkeypatch):
    embedder._opened.cache_clear()
    opened, load = [], Retriever.load
    monkeypatch.setattr(Retriever, "load", lambda *args, **options: opened.append(args) or load(*args, **options))
    text = pickle.dumps(Embedder(folders["pooled history"]))
    assert len(text) < 1000 and not opened
    frame = pl.DataFrame({"user_id": USERS})
    first, second = (pickle.loads(text)(frame) for _ in range(2))
    assert len(opened) == 1 and first.equals(second)


def test_a_relative_path_is_the_same_in_a_process_of_another_folder(folders, monkeypatch, tmp_path):
    monkeypatch.chdir(folders["sequence"].parent)
    made = Embedder(folders["sequence"].name)
    monkeypatch.chdir(tmp_path)
    embedder._opened.cache_clear()
    assert made(pl.DataFrame({"user_id": USERS}))["embedding"].null_count() == 0


def test_a_replaced_model_is_rejected(folders, tmp_path):
    folder = shutil.copytree(folders["pooled history"], tmp_path / "model")
    made, frame = Embedder(folder), pl.DataFrame({"user_id": USERS})
    shutil.rmtree(folder)
    shutil.copytree(folders["sequence"], folder)
    with pytest.raises(InputError, match="the model was replaced"):
        made(frame)
    assert not made.__dict__.keys() & {"retriever", "model"}
    assert Embedder(folder)(frame).equals(Embedder(folders["sequence"])(frame))


KINDS = {
    "polars": (lambda frame: frame, lambda found: found["embedding"].to_list()),
    "pandas": (lambda frame: frame.to_pandas(), lambda found: list(found["embedding"])),
    "Arrow table": (lambda frame: frame.to_arrow(), lambda found: found["embedding"].to_pylist()),
    "Arrow batch": (lambda frame: frame.to_arrow().to_batches()[0], lambda found: found.column(2).to_pylist()),
    "dict of lists": (lambda frame: frame.to_dict(as_series=False), lambda found: list(found["embedding"])),
    "dict of arrays": (
        lambda frame: {name: frame[name].to_numpy() for name in frame.columns},
        lambda found: list(found["embedding"]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table(folders, kind):
    frame = pl.DataFrame({"user_id": ["u01", "stranger", None, "other"], "history": [[1, 3], [5, 99], [99], None]})
    make, rows_of = KINDS[kind]
    embed = Embedder(folders["pooled history"])
    retriever = Retriever.load(folders["pooled history"])
    known = QueryBatch.of(retriever.artifact, None, [[1, 3], [5]])
    expected = retriever.embed(known.codes, known.histories).numpy()
    batch = make(frame)
    found = embed(batch)
    rows = rows_of(found)
    assert type(found) is type(batch) and len(rows) == 4
    assert np.array_equal(np.array(rows[:2], dtype=np.float32), expected)
    unknown = rows[2:]  # a history without a known item, and an unknown id without a history
    assert all(np.isnan(row).all() if kind.startswith("dict") else row is None for row in unknown)
    if kind == "pandas":
        assert isinstance(found, pd.DataFrame) and found["embedding"][0].dtype == np.float32
    if kind.startswith("Arrow"):
        assert found.schema.field("embedding").type == pa.list_(pa.float32(), 8)


def test_rows_do_not_depend_on_their_batch(folders):
    for case in CASES:
        frame, _ = batch_of(case)
        embed = Embedder(folders[case])
        whole = embed(frame)["embedding"].to_numpy()
        parts = [embed(frame[start : start + 7])["embedding"].to_numpy() for start in range(0, 40, 7)]
        assert np.abs(np.concatenate(parts) - whole).max() < 1e-6


@pytest.mark.parametrize("dtype", [pl.Null, pl.List(pl.Int64)])
def test_a_part_without_any_history_and_an_empty_part(folders, dtype):
    embed = Embedder(folders["pooled history"])
    frame = pl.DataFrame({"user_id": ["x", "u01"], "history": pl.Series([None, None], dtype=dtype)})
    found, of_empty = embed(frame)["embedding"], embed(pl.DataFrame({"user_id": ["u01"], "history": [[99]]}))
    assert found[0] is None and found[1].equals(of_empty["embedding"][0])
    empty = embed(frame.clear())
    assert len(empty) == 0 and empty.schema["embedding"] == pl.Array(pl.Float32, 8)
    assert [len(one) for one in embed.each([frame, frame.clear()])] == [2, 0]


def test_features_are_used_where_given(folders):
    folder, retriever = folders["features and context"], Retriever.load(folders["features and context"])
    frame = pl.DataFrame({"user_id": ["u01", "u01", "new"], "taste": ["even", None, "odd"], "tags": [["x"], None, []]})
    batch = QueryBatch.of(retriever.artifact, ["u01", "u01"], None, [{"taste": "even", "tags": ["x"]}, None])
    expected = retriever.embed(batch.codes, batch.histories, batch.features).numpy()
    assert not np.array_equal(*expected)
    new = retriever.artifact.towers.embed_new_queries([{"taste": "odd", "tags": []}], torch.full((1, 5), -1))
    found = Embedder(folder)(frame)["embedding"].to_numpy()
    assert found == pytest.approx(np.concatenate([expected, new.numpy()]), abs=1e-6)


def test_new_items_are_embedded_from_their_features_and_removed_items_are_not(folders, tmp_path):
    folder = shutil.copytree(folders["features and context"], tmp_path / "model")
    retriever = Retriever.load(folder)
    retriever.catalog.add([{"item_id": 70, "colour": "red", "price": 3.0}])
    retriever.catalog.remove([4])
    save_changes(retriever.catalog, folder)
    rows = {"item_id": [3, 4, 70, 71], "colour": ["red", "red", "green", "blue"], "price": [0.0, 0.0, 0.0, 2.0]}
    found = Embedder(folder, "items", column="v")(pl.DataFrame(rows))["v"]
    towers = retriever.artifact.towers
    of_features = [towers.embed_new_items([{"colour": c, "price": p}]) for c, p in (("red", 3.0), ("blue", 2.0))]
    assert found[1] is None, "removed"
    assert found[0].to_list() == retriever.artifact.item_embeddings[3].tolist(), "as in the folder, not by the columns"
    assert torch.tensor(found[[2, 3]].to_list()) == pytest.approx(torch.cat(of_features), abs=1e-6)
    only = Embedder(folder, "items")(pl.DataFrame({"colour": ["blue"], "price": [2.0]}))["embedding"]
    assert torch.tensor(only.to_list()) == pytest.approx(of_features[1], abs=1e-6)
    with pytest.raises(InputError, match=r"row 2 \(item 4\): not in the catalog"):
        Embedder(folder, "items", unknown="error")(pl.DataFrame(rows))


@pytest.mark.parametrize(
    ("options", "batch", "words"),
    [
        ({}, {"embedding": [1.0], "user_id": ["u01"]}, "already has a column 'embedding'"),
        ({}, {"age": [1]}, "expected a column of query ids"),
        ({}, {"user_id": [1.5]}, "batch: column 'user_id': ids: ids of type Float64"),
        ({}, [["u01"]], "expected a polars, pandas or Arrow data frame"),
        ({}, pl.LazyFrame({"user_id": ["u01"]}), "collect it"),
        ({"side": "items"}, {"age": [1]}, "expected a column of item ids"),
        ({"unknown": "error"}, {"history": [[1], [99]]}, r"row 2 \(query 1\): none of its items is in the catalog"),
        ({"unknown": "error"}, {"user_id": ["u01", "x"]}, r"row 2 \(query 'x'\): no value is given"),
        ({"unknown": "error", "side": "items"}, {"item": [1, 99]}, r"row 2 \(item 99\): not in the catalog"),
    ],
)  # fmt: skip
def test_what_cannot_be_embedded_is_rejected(folders, options, batch, words):
    embed = Embedder(folders["pooled history"], **options)
    with pytest.raises(InputError, match=words):
        embed(batch)


def test_arguments_are_checked(folders, tmp_path):
    with pytest.raises(InputError, match="side: 'users'; expected"):
        Embedder(folders["sequence"], "users")
    with pytest.raises(InputError, match="unknown: 'skip'; expected"):
        Embedder(folders["sequence"], unknown="skip")
    with pytest.raises(InputError, match="no such folder"):
        Embedder(tmp_path / "nothing")


@pytest.mark.timeout(1000)  # Ray starts a dozen processes
def test_ray_runs_the_code_of_the_how_to(folders, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'twotower[ray]'")
    pl.DataFrame({"user_id": [*USERS, "stranger"]}).write_parquet(tmp_path / "users.parquet")
    code = next(one for one in re.findall(r"```python\n(.*?)```", HOW_TO.read_text(), re.DOTALL) if "import ray" in one)
    (tmp_path / "my-model").symlink_to(folders["sequence"])
    script = tmp_path / "with_ray.py"
    script.write_text(f"import ray\nray.init(num_cpus=1, include_dashboard=False)\n{code}")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = pl.read_parquet(sorted((tmp_path / "embeddings").glob("*.parquet"))).sort("user_id")
    assert found["user_id"].to_list() == sorted([*USERS, "stranger"])
    expected = by_retriever(folders["sequence"], USERS, {})
    known = found.filter(pl.col("user_id") != "stranger")["embedding"].to_list()
    assert np.array(known) == pytest.approx(expected, abs=1e-6)
    assert found.filter(pl.col("user_id") == "stranger")["embedding"].to_list() == [None]
