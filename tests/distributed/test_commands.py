"""Tests that the commands give the same results in two ranks as in one process, or are refused in one line."""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from distributed.starting import start, workers
from planted import planted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes")

WRITTEN = ("per_query.parquet", "recs.parquet")


def prepare(folder, many=0):
    """Write the data and the queries, here, because commands.py forks and polars has threads.

    `many` queries, the known ones again and again, are written to many.parquet.
    """
    planted(queries=80).write_parquet(folder / "planted.parquet")
    queries = [f"u{number:03d}" for number in range(80)]
    pl.DataFrame({"user_id": [*queries, "stranger"]}).write_parquet(folder / "queries.parquet")
    if many:
        pl.DataFrame({"user_id": queries * (many // 80)}).write_parquet(folder / "many.parquet")


def printed(folder, name):
    """Return the JSON that rank 0 printed, without times."""
    text = (folder / f"{name}.0").read_text()
    found = json.loads(text[text.index("{") :])
    found.pop("build_seconds", None)
    return found


def flat(value, path=()):
    """Yield the values of nested JSON with their paths."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(one, (*path, key))
    else:
        yield path, value


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
    one, two = (printed(folder, f"{name}-{size}") for size in (1, 2))
    if name == "audit":
        assert_same_audit(one, two)
    else:
        assert two == one
    assert (folder / f"{name}-2.1").read_text() == "", "only rank 0 prints"


def test_two_ranks_write_the_same_files(done):
    folder, _ = done
    one, two = folder / "run-1", folder / "run-2"
    for name in WRITTEN:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    audits = [pl.read_parquet(run / "audit.parquet") for run in (one, two)]
    assert_frame_equal(*audits, rel_tol=1e-9, abs_tol=1e-12)
    assert len(list((two / "recs").iterdir())) == 2, "each rank has answered a block"
    assert pl.read_parquet(two / "recs/*.parquet").equals(pl.read_parquet(one / "recs.parquet"))
    pages = [(run / "report.html").read_text().replace(str(run), "RUN") for run in (one, two)]
    assert pages[0] == pages[1]
    left = {path.name for run in (one, two) for path in run.iterdir() if path.name.startswith(".")}
    assert left == {".twotower-run"}, "no folder of parts is left"


def test_an_index_in_parts_has_the_same_files(done):
    folder, _ = done
    assert printed(folder, "int8-2")["settings"]["parts"] == 4
    one, two = (
        {path.name: path.read_bytes() for path in (folder / run / "model" / "index").glob("[cs]*")}
        for run in ("run-1", "run-2")
    )
    assert one == two and len(one) == 5, "four parts and the scale"


@pytest.mark.parametrize(
    ("name", "said"), [("similar", "`twotower similar` runs in one process"), ("one query", "--input FILE")]
)
def test_other_commands_are_refused_in_one_line(done, name, said):
    folder, ends = done
    assert ends[f"{name}-1"] == [0] and ends[f"{name}-2"] == [2, 2]
    for rank in range(2):
        (line,) = (folder / f"{name}-2.{rank}").read_text().splitlines()
        assert line.startswith("twotower: torchrun: ") and said in line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_compare_as_one_process_and_a_killed_rank_leaves_no_report(tmp_path):
    prepare(tmp_path)
    start("commands.py", str(tmp_path), "compare")
    ends = json.loads((tmp_path / "ends.json").read_text())
    assert ends["one"] == [0] and ends["two"] == [0, 0]
    assert_same_comparison(tmp_path / "one", tmp_path / "two")
    assert ends["hit"][1] == -signal.SIGKILL and ends["hit"][0] == 1 and ends["left"] == []
    assert_one_line(tmp_path / "hit.log.0")
    assert ends["again"] == [0, 0], "finished and interrupted runs are continued"
    assert_same_comparison(tmp_path / "one", tmp_path / "hit")


def assert_same_comparison(one, two):
    """Check that all values are equal, except times, memory and file names."""
    frames = [pl.read_parquet(out / "results.parquet") for out in (one, two)]
    assert frames[0].equals(frames[1])
    audits = [json.loads((out / "audit.json").read_text()) for out in (one, two)]
    for found in audits:
        found["asked"].pop("checksum")
    assert_same_audit(*audits)
    values = [
        [(model["name"], model["values"]) for model in json.loads((out / "results.json").read_text())["models"]]
        for out in (one, two)
    ]
    assert values[0] == values[1]


def assert_same_audit(one, two):
    """Check that all values are equal, up to the rounding of sums, which are in another order."""
    one, two = dict(flat(one)), dict(flat(two))
    numbers = [path for path, value in one.items() if isinstance(value, float)]
    found = [two.pop(path) for path in numbers]
    assert found == pytest.approx([one.pop(path) for path in numbers], rel=1e-9, abs=1e-12, nan_ok=True)
    assert two == one


def assert_one_line(log):
    output = log.read_text()
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("twotower: ")]
    assert "another rank is gone" in line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_ends_the_others_in_one_line_and_leaves_the_old_output(tmp_path):
    prepare(tmp_path, many=120_000)
    start("commands.py", str(tmp_path), "evaluate", "int8", "kill")
    ends = json.loads((tmp_path / "ends.json").read_text())["kill"]
    for name in ("recommend", "evaluate", "audit", "int8"):
        assert ends[name] == [1, -signal.SIGKILL], name
        assert_one_line(tmp_path / f"kill-{name}.0")
    assert ends["recommend left"] == [False, True], "no output, but finished parts"
    assert ends["recommend again"] == [0, 0]
    report = printed(tmp_path, "again-recommend")
    assert report["rows"] == 1_200_000 and report["resumed"] > 0
    found = pl.read_parquet(tmp_path / "run-2" / "many.parquet")
    assert found["query"].unique(maintain_order=True).len() == 80 and len(found) == 1_200_000
    assert ends["evaluate left"], "the report is the old one"
    assert len(ends["index left"]) == 7 and ends["partial"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_itself(tmp_path):
    """The results of one process; after the death of a rank one line, however torchrun and the exchange race."""
    prepare(tmp_path, many=400_000)
    start("commands.py", str(tmp_path), "evaluate")
    run, parts = tmp_path / "run-2", tmp_path / ".recs.parts"

    def torchrun(*words):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*torchrun, "twotower", *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)

    evaluated = torchrun("evaluate", str(run), "--json")
    output, errors = evaluated.communicate(timeout=400)
    assert evaluated.returncode == 0, errors
    assert json.loads(output) == printed(tmp_path, "evaluate-1")

    words = ("recommend", str(run), "--input", str(tmp_path / "many.parquet"), "--output", str(tmp_path / "recs"))
    killed = torchrun(*words, "--shards")
    while len(list(parts.glob("*.parquet"))) < 2 and killed.poll() is None:
        time.sleep(0.02)
    os.kill(workers([killed])[1], signal.SIGKILL)
    output, errors = killed.communicate(timeout=400)
    assert killed.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("twotower: ")]
    assert "finished parts are in" in line or "another rank is gone" in line
    assert not (tmp_path / "recs").exists()
    again = torchrun(*words, "--shards", "--resume", "--json")
    output, errors = again.communicate(timeout=400)
    assert again.returncode == 0, errors
    assert json.loads(output)["rows"] == len(pl.read_parquet(tmp_path / "recs/*.parquet")) == 4_000_000
    assert not list(tmp_path.rglob("*.partial")), "not even what the killed rank was writing"
