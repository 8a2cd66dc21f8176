"""Tests that the commands give the same results in two ranks as in one process, or are refused in one line."""

import json
import sys

import polars as pl
import pytest

from distributed.starting import start
from planted import planted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes")

WRITTEN = ("per_query.parquet", "recs.parquet", "audit.parquet")


def prepare(folder):
    """Write the data and the queries, here, because commands.py forks and polars has threads."""
    planted(queries=80).write_parquet(folder / "planted.parquet")
    queries = [f"u{number:03d}" for number in range(80)]
    pl.DataFrame({"user_id": [*queries, "stranger"]}).write_parquet(folder / "queries.parquet")


def printed(folder, name):
    """Return the JSON that rank 0 printed, without times."""
    text = (folder / f"{name}.0").read_text()
    found = json.loads(text[text.index("{") :])
    found.pop("build_seconds", None)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    prepare(folder)
    start("commands.py", str(folder), "evaluate", "audit", "file", "shards", "int8", "hnsw", "similar", "one query")
    return folder, json.loads((folder / "ends.json").read_text())


@pytest.mark.parametrize("name", ["evaluate", "audit", "file", "shards", "int8", "hnsw"])
def test_two_ranks_print_what_one_process_prints(done, name):
    folder, ends = done
    assert ends[f"{name}-1"] == [0] and ends[f"{name}-2"] == [0, 0]
    assert printed(folder, f"{name}-2") == printed(folder, f"{name}-1")
    assert (folder / f"{name}-2.1").read_text() == "", "only rank 0 prints"


def test_two_ranks_write_the_same_files(done):
    folder, _ = done
    one, two = folder / "run-1", folder / "run-2"
    for name in WRITTEN:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    assert len(list((two / "recs").iterdir())) == 2, "each rank has answered a block"
    assert pl.read_parquet(two / "recs/*.parquet").equals(pl.read_parquet(one / "recs.parquet"))
    pages = [(run / "report.html").read_text().replace(str(run), "RUN") for run in (one, two)]
    assert pages[0] == pages[1]
    left = {path.name for run in (one, two) for path in run.iterdir() if path.name.startswith(".")}
    assert left == {".twotower-run"}, "no folder of parts is left"


def test_an_index_in_parts_has_the_same_files(done):
    """The index that was built first, int8 in four parts, is replaced by hnsw; the codes are compared below."""
    folder, _ = done
    assert printed(folder, "int8-2")["settings"]["parts"] == 4
    for run in ("run-1", "run-2"):
        assert (folder / run / "model" / "index" / "graph.faiss").exists()
    graphs = [(folder / run / "model" / "index" / "graph.faiss").read_bytes() for run in ("run-1", "run-2")]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize(
    ("name", "said"), [("similar", "`twotower similar` runs in one process"), ("one query", "--input FILE")]
)
def test_other_commands_are_refused_in_one_line(done, name, said):
    folder, ends = done
    assert ends[f"{name}-1"] == [0] and ends[f"{name}-2"] == [2, 2]
    for rank in range(2):
        (line,) = (folder / f"{name}-2.{rank}").read_text().splitlines()
        assert line.startswith("twotower: torchrun: ") and said in line
