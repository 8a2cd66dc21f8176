"""The index in a real PostgreSQL: recall, filters, changes, errors, and a broken connection."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from support.postgres import postgres
from twotower.errors import InputError
from twotower.index import ExactCatalog, build_index, load_index
from twotower.index.approximate.pgvector import DATABASE, PgVector

N, D = 3000, 9


@pytest.fixture(scope="module")
def url():
    with postgres() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATABASE, address)
        yield address


@pytest.fixture(scope="module")
def catalog():
    generator = torch.Generator().manual_seed(2)
    items = torch.randn(N, D, generator=generator) * (0.5 + torch.rand(N, 1, generator=generator))
    return items, F.normalize(torch.randn(30, D, generator=generator), dim=1)


@pytest.fixture(scope="module")
def built(url, catalog):
    items, queries = catalog
    index, report = build_index(
        "pgvector", items, {"all": queries}, k=10, min_recall=0.9, settings={"url": url, "table": "built"}
    )
    yield index, report
    index.engine.close()


def overlap(found, best):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), best.tolist(), strict=True)])


def test_the_reported_recall_is_correct_and_by_inner_product(built, catalog):
    index, report = built
    items, queries = catalog
    scores, found = index.search(queries, 10)
    best = (queries.double() @ items.double().T).topk(10).indices
    assert overlap(found, best) == pytest.approx(report.recall["all"], abs=1e-3) and report.recall["all"] >= 0.9
    assert torch.allclose(scores, (queries[:, None] * items[found]).sum(2), atol=1e-5)
    assert overlap(found, torch.cdist(queries, items).topk(10, largest=False).indices) < 0.7
    assert report.bytes > N * D * 4


def test_vectors_are_stored_exactly(url, catalog):
    items, _ = catalog
    engine = PgVector(items[:50].numpy(), url=url, table="stored_exactly")
    with engine._cursor() as cursor:
        rows = cursor.execute("SELECT code, embedding::real[] FROM stored_exactly ORDER BY code").fetchall()
    engine.close()
    assert [code for code, _ in rows] == list(range(50))
    assert np.array_equal(np.array([values for _, values in rows], dtype=np.float32), items[:50].numpy())


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_filters_and_exclusions_lose_no_results(built, catalog, share):
    index, _ = built
    items, queries = catalog
    allowed = np.random.default_rng(0).random(N) < share
    best = ExactCatalog(items).search(queries, 60)[1].numpy()
    exclude = (np.arange(len(queries) + 1) * 60, best.reshape(-1))
    _, found = index.search(queries, 25, exclude, allowed=allowed)
    _, expected = ExactCatalog(items).search(queries, 25, exclude, allowed=allowed)
    assert bool((found >= 0).all()) and allowed[found.numpy()].all()
    assert not any(set(row) & set(out) for row, out in zip(found.tolist(), best.tolist(), strict=True))
    assert overlap(found, expected) > 0.85


def test_items_are_added_and_removed_and_the_table_is_loaded_again(url, catalog, tmp_path):
    items, queries = catalog
    settings = {"url": url, "table": "changing"}
    index, report = build_index("pgvector", items, {"all": queries}, k=10, settings=settings)
    gone = index.search(queries, 1)[1][:, 0].unique().numpy()
    index.remove(gone)
    assert not np.isin(index.search(queries, 5)[1].numpy(), gone).any()
    new = index.add(queries[:2] * 9)
    assert index.search(queries[:2], 1)[1][:, 0].tolist() == new.tolist() == [N, N + 1]
    index.update(new, queries[2:4] * 9)
    assert index.search(queries[2:4], 1)[1][:, 0].tolist() == new.tolist()
    index.engine.close()
    loaded = load_index(report.to_dict(), index.vectors.items, tmp_path, alive=index.vectors.alive)
    assert torch.equal(loaded.search(queries, 5)[1], index.search(queries, 5)[1])
    with loaded.engine._cursor() as cursor:
        cursor.execute("DROP TABLE changing")
    loaded.engine.close()
    with pytest.raises(InputError, match="no table changing; rebuild it"):
        load_index(report.to_dict(), items, tmp_path)


def test_a_broken_connection_is_reopened(built, catalog):
    index, _ = built
    before = index.search(catalog[1], 3)[1]
    with index.engine._cursor() as cursor:
        own = cursor.execute("SELECT pg_backend_pid()").fetchone()[0]
    other = PgVector.load(None, index.engine.settings())
    with other._cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", (own,))
    other.close()
    with pytest.raises(InputError, match="PostgreSQL request failed"):
        index.search(catalog[1], 3)
    assert torch.equal(index.search(catalog[1], 3)[1], before)


def test_a_failed_build_keeps_the_older_table(built, catalog):
    index, _ = built
    with pytest.raises(InputError), index.engine._cursor() as cursor:
        cursor.execute("DROP TABLE built")
        raise InputError("something else went wrong")
    assert bool((index.search(catalog[1], 3)[1] >= 0).all())


def test_invalid_arguments_are_refused(url, catalog):
    items, _ = catalog
    with pytest.raises(InputError, match="expected a table name"):
        PgVector(items.numpy(), url=url, table="items; drop table built")
    with pytest.raises(InputError, match="at most 2,000 dimensions"):
        PgVector(np.zeros((3, 2001), dtype=np.float32), url=url)
    with pytest.raises(InputError, match="PostgreSQL request failed"):
        PgVector(items.numpy(), url="postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(InputError, match="not a database URL"):
        PgVector(items.numpy(), url="here and there")


def test_a_password_is_not_stored(url, catalog):
    engine = PgVector.__new__(PgVector)
    engine._start("postgresql://me:secret@127.0.0.1/db", "t", {}, 1)
    assert "secret" not in str(engine.settings()) and "secret" not in engine._where()
    assert "host=127.0.0.1" in engine.settings()["url"]
