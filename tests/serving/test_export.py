"""The exported query tower: equal to the original for other batch sizes, and runs without this package."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import polars as pl
import pytest
import torch

import twotower as tt
from support.service_models import drawn
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.features.requests import given_gaps
from twotower.serving.export import export_query_tower
from twotower.serving.model_folder import SavedModel


@pytest.fixture(scope="module")
def with_ids(planted_split, tmp_path_factory):
    """A model with query id embeddings and histories; a third of the queries has no training row."""
    settings = ["training.max_epochs=1", "training.batch_size=64", "item_tower.dimension=8",
                "query_tower.id_embedding=true", "query_tower.history.length=6"]  # fmt: skip
    model = tt.fit(planted_split, Config.load(None, settings), progress=False)
    model.artifact.towers.trained_queries[::3] = False
    return model.save(tmp_path_factory.mktemp("ids") / "model")


@pytest.fixture(scope="module")
def with_item_features(tmp_path_factory):
    """A model whose history goes through an item tower with multi-valued features, as in the preset dnn."""
    rng = np.random.default_rng(0)
    log = pl.DataFrame({"user_id": rng.integers(0, 20, 300), "item_id": rng.integers(0, 25, 300)})
    items = pl.DataFrame({
        "item_id": range(25), "genres": [["a", "b", "c"][: j % 4] for j in range(25)],
        "title": [f"word{j % 5} and word{j % 3}" for j in range(25)], "brand": [f"b{j % 6}" for j in range(25)],
    })  # fmt: skip
    features = "[{column: genres, kind: multi}, {column: title, kind: text}, {column: brand, kind: categorical}]"
    history = "query_tower={hidden: [8], features: auto, history: {length: 6, item_features: true}}"
    changes = [f"item_tower={{dimension: 16, hidden: [8], features: {features}}}", history]
    return drawn(
        tt.Interactions.from_frame(log, items=items), tmp_path_factory.mktemp("features") / "model", changes=changes
    )


def asked(artifact, rows, length, seed):
    rng = np.random.default_rng(seed)
    history = rng.integers(0, len(artifact.items), (rows, length))
    present = rng.integers(1, length + 1, (rows, 1))
    history = np.where(np.arange(length, 0, -1) <= present, history, -1)
    return rng.integers(-1, len(artifact.queries), rows), history


@pytest.mark.parametrize(("which", "format_"), [
    ("folder", "onnx"), ("folder", "torch"), ("with_ids", "onnx"), ("with_ids", "torch"),
    ("with_item_features", "onnx"),
])  # fmt: skip
def test_an_export_equals_the_original(which, format_, request, tmp_path):
    if format_ == "onnx":
        pytest.importorskip("onnxruntime", reason="ONNX is not installed: pip install 'twotower[onnx]'")
    folder = request.getfixturevalue(which)
    report = export_query_tower(folder, tmp_path / "out", format_)
    assert report["largest_difference"] <= 1e-5
    artifact = SavedModel.load(folder)
    assert list(report["inputs"]) == (["query", "history"] if which == "with_ids" else ["history"])
    for rows in (1, 2, 117):
        queries, history = asked(artifact, rows, report["history_length"], rows)
        inputs = {"query": queries, "history": history}
        with torch.no_grad():
            expected = artifact.towers.embed_queries(torch.from_numpy(queries), torch.from_numpy(history)).numpy()
        given = [inputs[name] for name in report["inputs"]]
        path = tmp_path / "out" / report["file"]
        if format_ == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            found = session.run(None, dict(zip(report["inputs"], given, strict=True)))[0]
        else:
            found = torch.export.load(path).module()(*map(torch.from_numpy, given)).detach().numpy()
        if which == "with_ids":
            new = np.where(queries % 3 == 0, -1, queries)  # a query without a training row is a new one
            with torch.no_grad():
                known = artifact.towers.embed_queries(torch.from_numpy(new), torch.from_numpy(history)).numpy()
            assert np.array_equal(known, expected)
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 1e-5
        assert np.abs(found).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_a_sequence_tower_with_time_gaps_as_onnx(planted_data, kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is not installed: pip install 'twotower[onnx]'")
    history = f"query_tower.history={{length: 6, sequence: {{kind: {kind}, blocks: 1, gaps: true}}}}"
    folder = drawn(planted_data, tmp_path / "model", changes=[history])
    report = export_query_tower(folder, tmp_path / "out", "onnx")
    assert report["inputs"] == {"history": "int64 [B, 6]", "gaps": "int64 [B, 6]"}
    session = onnxruntime.InferenceSession(tmp_path / "out" / report["file"], providers=["CPUExecutionProvider"])
    artifact = SavedModel.load(folder)
    for rows in (1, 2, 117):  # other batch sizes than in the export
        queries, items = asked(artifact, rows, 6, rows)
        days = np.random.default_rng(rows).exponential(20.0, (rows, 6)).cumsum(1)
        codes = [given_gaps((86_400 * row).tolist(), 6) for row in days]  # as the service reads times
        read = np.where(items < 0, 0, np.stack(codes)).astype(np.int64)
        with torch.no_grad():
            towers, inputs = artifact.towers, (torch.from_numpy(queries), torch.from_numpy(items))
            expected = towers.embed_queries(*inputs, gaps=torch.from_numpy(read)).numpy()
            unknown = towers.embed_queries(*inputs).numpy()
        (found,) = session.run(None, {"history": items, "gaps": read})
        (without,) = session.run(None, {"history": items, "gaps": np.zeros_like(read)})
        assert np.abs(found - expected).max() <= 1e-5
        assert np.abs(without - unknown).max() <= 1e-5
        assert np.abs(found - without).max() > 1e-3


def test_it_serves_without_torch_and_without_this_package(folder, model, tmp_path):
    """The exported folder alone gives the model's results, with onnxruntime, numpy and safetensors."""
    pytest.importorskip("onnxruntime")
    export_query_tower(folder, tmp_path / "out", "onnx")
    history = [1, 3, 5]
    codes = model.artifact.items.encode(history).tolist()
    code = f"""
        import json, sys
        import numpy as np, onnxruntime
        from safetensors.numpy import load_file
        report = json.load(open("export.json"))
        history = np.full((1, report["history_length"]), -1, dtype=np.int64)
        history[0, -3:] = {codes}
        u = onnxruntime.InferenceSession(report["file"]).run(None, {{"history": history}})[0]
        items = load_file("items.safetensors")
        scores = items["embeddings"] @ u[0] + (0.5 - 1.0) * items["popularity"]
        scores[{codes}] = -np.inf
        print(json.dumps(np.argsort(-scores)[:5].tolist()))
        assert "torch" not in sys.modules and "twotower" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = model.retriever.recommend(histories=[history], k=5, popularity=0.5)
    assert json.loads(done.stdout) == model.artifact.items.encode(found["item"].to_list()).tolist()


def test_an_export_that_differs_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("twotower.serving.export._export_torch", lambda encoder, example, path: (
        lambda inputs: encoder(*inputs).detach().numpy() + 1e-3
    ))  # fmt: skip
    with pytest.raises(InputError, match="differs from the model by 1.0e-03"):
        export_query_tower(folder, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


def test_refusals(folder, model, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("years of work")
    with pytest.raises(InputError, match="mine: exists and contains no export; choose a new or empty folder"):
        export_query_tower(folder, mine, "torch")
    for place in (mine, mine / "notes.txt"):
        with pytest.raises(
            InputError, match=f"{place.name}: exists and contains no model; choose a new or empty folder"
        ):
            model.save(place)
    assert [path.read_text() for path in mine.iterdir()] == ["years of work"]
    with pytest.raises(InputError, match="unknown format 'tflite'; expected onnx or torch"):
        export_query_tower(folder, tmp_path / "out", "tflite")
