"""Stores of 8-bit and 1-bit codes: the codes against float64 numpy, their size, their range, and exact scores."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from twotower.errors import InputError
from twotower.index import ExactCatalog, build_index, load_index
from twotower.index.approximate import build, code_store
from twotower.index.approximate import index as approximate
from twotower.index.approximate.build import exact_answers
from twotower.index.approximate.code_store import BinaryStore, Int8Store
from twotower.index.catalog import Vectors

N, D, B = 3000, 21, 30


@pytest.fixture(scope="module", autouse=True)
def _faiss():
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'twotower[ann]'")


@pytest.fixture(scope="module")
def catalog():
    """Unit vectors whose dimensions differ in range by a factor of 50, with one more, like the dial's coordinate."""
    generator = torch.Generator().manual_seed(4)
    spread = torch.logspace(0, -1.7, D - 1)
    items = F.normalize(torch.randn(N, D - 1, generator=generator) * spread, dim=1)
    queries = F.normalize(torch.randn(B, D - 1, generator=generator) * spread, dim=1)
    popularity = 0.1 * torch.randn(N, 1, generator=generator)
    return torch.cat([items, popularity], 1), torch.cat([queries, torch.linspace(-1, 1, B)[:, None]], 1)


def int8_scores(items, queries):
    """Score codes with a symmetric scale per dimension in float64, [B, N]."""
    items = items.double().numpy()
    step = np.abs(items).max(0) / 127
    return queries.double().numpy() @ (np.rint(items / step) * step).T


def assert_candidates(engine, queries, scores, k):
    """Check that an engine proposes the k best by `scores`; items of equal score are interchangeable."""
    found = engine.candidates(queries.numpy(), k, None, 1.0)
    assert all(len(set(row)) == k for row in found.tolist())
    assert np.allclose(-np.sort(-np.take_along_axis(scores, found, 1)), -np.sort(-scores)[:, :k], atol=1e-6)


def test_int8_ranks_by_codes_with_a_symmetric_scale_per_dimension(catalog):
    items, queries = catalog
    assert_candidates(Int8Store(items.numpy()), queries, int8_scores(items, queries), 60)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_recall_rises_with_effort_to_one_and_scores_are_exact(catalog, kind):
    items, queries = catalog
    _, low = build_index(kind, items, {"all": queries}, k=50, settings={"effort": 1})
    index, high = build_index(kind, items, {"all": queries}, k=50, settings={"effort": 1}, min_recall=0.999)
    assert low.recall["all"] < 0.999 <= high.recall["all"] and high.settings["effort"] > 1
    index.engine.effort = 64  # 64 * 50 candidates are all items
    for found, exact in zip(index.search(queries, 50), ExactCatalog(items).search(queries, 50), strict=True):
        assert torch.allclose(found.double(), exact.double(), atol=1e-6)


@pytest.mark.parametrize(("kind", "bytes_per_item"), [("int8", 32 + 8), ("binary", -(-D // 8) + 8 + 8)])
def test_a_store_has_the_documented_size(catalog, kind, bytes_per_item, tmp_path):
    items, queries = catalog
    index, report = build_index(kind, items, {"all": queries}, k=10)
    index.engine.save(tmp_path)
    assert report.bytes == N * bytes_per_item
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.bytes <= written <= report.bytes + 8 * D * D + 1000


def test_items_beyond_the_range_widen_the_scale(catalog):
    """The range of the first dimensions grows by 1.5; codes rounded twice are within two steps of the vectors."""
    items, queries = catalog
    engine = Int8Store(items.numpy())
    longer = items[:40] * 1.5
    engine.add(np.arange(N, N + 40), longer.numpy())
    both = torch.cat([items, longer])
    scores = queries.double().numpy() @ both.double().numpy().T
    step = np.abs(both.numpy()).max(0) / 127
    bound = np.abs(queries.double().numpy()) @ step
    found = engine.candidates(queries.numpy(), 20, None, 1.0)
    worst = np.take_along_axis(scores, found, 1).min(1)
    assert (worst >= -np.sort(-scores)[:, 19] - 2 * bound).all()
    assert (found >= N).any(), "longer items are proposed, in place of those that they were made from"
    far = torch.zeros(4, D)
    far[:, 3] = torch.tensor([20.0, 40.0, 10.0, 30.0])
    engine.add(np.arange(N + 40, N + 44), far.numpy())
    # Clipped to the old range, the four would be equal.
    assert engine.candidates(far[:1].numpy(), 4, None, 1.0).tolist() == [[N + 41, N + 43, N + 40, N + 42]]


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_a_loaded_store_can_be_changed(catalog, kind, tmp_path):
    items, queries = catalog
    index, report = build_index(kind, items, {"all": queries}, k=10, settings={"effort": 64})
    index.engine.save(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = load_index(report.to_dict(), items, tmp_path)
    gone = index.search(queries, 3)[1].unique().numpy()
    loaded.remove(gone)
    new = loaded.add(queries[:5] * 3)
    assert loaded.engine.count() == N - len(gone) + 5
    exact = ExactCatalog(torch.cat([items, queries[:5] * 3]))
    exact.remove(gone)
    assert torch.equal(loaded.search(queries, 50)[1], exact.search(queries, 50)[1]), "all items are candidates"
    assert new.tolist() == list(range(N, N + 5))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written, "the mapped file is unchanged"


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_parts_answer_as_one_store_and_can_be_changed(catalog, kind, tmp_path, monkeypatch):
    items, queries = catalog
    folders = tmp_path / "one", tmp_path / "parts"
    found = []
    for folder, size in zip(folders, (N, 700), strict=True):
        monkeypatch.setattr(code_store, "PART", size)
        folder.mkdir()
        vectors = {"items": items[:, :-1].bfloat16(), "last": items[:, -1]}
        found.append(build_index(kind, queries={"all": queries}, k=50, folder=folder, **vectors))
    (one, first), (parts, second) = found
    assert second.settings == first.settings | {"parts": 5} and len(list(folders[1].iterdir())) == 6
    assert (second.recall, second.bytes) == (first.recall, first.bytes)
    for mine, theirs in zip(parts.search(queries, 50), one.search(queries, 50), strict=True):
        assert torch.equal(mine, theirs)
    changed = []
    for index in (one, parts):
        index.remove(np.arange(600, 800))  # of two parts
        index.update(np.array([5]), 3.0 * items[7:8])  # beyond the range
        index.add(2.0 * items[:40])
        changed.append(index.search(queries, 50))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*changed, strict=True))
    parts.engine.save(folders[1])
    stored = load_index(second.to_dict(), parts.vectors.rows(slice(None)), folders[1])
    assert stored.engine.count() == parts.engine.count() == N - 200 + 40
    with pytest.raises(InputError, match="parts must be in 1 .. 10000, found 0"):
        load_index({**second.to_dict(), "settings": {"effort": 2, "parts": 0}}, items, folders[1])
    with pytest.raises(InputError, match="unknown setting"):
        build_index(kind, items, {"all": queries}, settings={"parts": 2}, folder=folders[0])


def test_exact_answers_by_blocks_are_those_of_the_catalog(catalog, monkeypatch):
    items, queries = (one.bfloat16().float() for one in catalog)
    items = torch.cat([items[:1500], items[:1500]])  # ties
    monkeypatch.setattr(build, "ITEMS", 431)
    assert torch.equal(exact_answers(Vectors(items), queries, 60), ExactCatalog(items).search(queries, 60)[1])
    assert exact_answers(Vectors(items[:20]), queries, 60).shape == (B, 20)


def test_candidates_are_scored_in_bounded_memory(catalog, monkeypatch):
    items, queries = catalog
    index, _ = build_index("binary", items, {"all": queries}, k=10)
    before = index.search(queries, 10)
    sizes, rows = [], index.vectors.rows
    monkeypatch.setattr(approximate, "GATHERED", 200)
    monkeypatch.setattr(index.vectors, "rows", lambda codes: sizes.append(codes.numel()) or rows(codes))
    scores, found = index.search(queries, 10)
    assert torch.allclose(scores, before[0], atol=1e-6) and torch.equal(found, before[1])
    assert len(sizes) > 1 and max(sizes) <= 200


def test_a_damaged_store_is_rejected(catalog, tmp_path):
    items, queries = catalog
    index, report = build_index("int8", items, {"all": queries}, k=10)
    index.engine.save(tmp_path)
    with pytest.raises(InputError, match="int8: effort must be in 1 .. 64, found -3"):
        load_index({**report.to_dict(), "settings": {"effort": -3}}, items, tmp_path)
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    BinaryStore(np.ascontiguousarray(items[:, 1:].numpy())).save(narrow)
    (narrow / "scale.safetensors").replace(tmp_path / "scale.safetensors")
    with pytest.raises(InputError, match="the scale does not match the codes; build the index again"):
        load_index(report.to_dict(), items, tmp_path)
