"""Tests that killed, stopped and re-numbered ranks end with the model of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.starting import start, workers
from planted import planted

sys.path.insert(0, str(Path(__file__).parent))

import faults

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes, and finds them in /proc"),
    pytest.mark.slow,
    pytest.mark.timeout(1000),
]


def scenario(folder: Path, kills: int) -> dict:
    """Run faults.py in a folder and return the outcome."""
    data, shards = folder / "planted.parquet", folder / "shards"
    planted(queries=80).write_parquet(data)
    shards.mkdir()  # here, because faults.py forks and polars has threads
    for number, part in enumerate(planted(queries=80).iter_slices(300)):
        part.write_parquet(shards / f"part-{number}.parquet")
    start("faults.py", str(data), str(folder), str(kills))
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def found(folder):
    return scenario(folder, kills=2)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "towers.safetensors")


def assert_near(run: Path, other: Path) -> None:
    expected = weights(other)
    for name, value in weights(run).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_two_processes_of_the_command_equal_one(found, folder):
    assert found["one"] == [0] and found["two"] == [0, 0]
    assert_near(folder / "two", folder / "one")
    one, two = (json.loads((folder / run / "results.json").read_text()) for run in ("one", "two"))
    assert one["rows"] and one["num_targets"] == two["num_targets"]
    for row, other in zip(one["rows"], two["rows"], strict=True):
        for name, value in row["values"].items():
            assert other["values"][name] == pytest.approx(value, abs=0.01), name


def assert_same_after_kills(found, folder, kills):
    *failed, last = found["killed"]
    assert last == [0, 0] and len(failed) == kills
    for ended in failed:
        assert -signal.SIGKILL in ended, "no rank was killed: the test kills too late"
        assert ended.count(-signal.SIGKILL) == 1 and 1 in ended, "the other rank exits by itself, as after a failure"
    expected = weights(folder / "two")
    for name, value in weights(folder / "killed").items():
        assert torch.equal(value, expected[name]), name


def test_a_killed_rank_is_reported_and_the_model_is_the_same(found, folder):
    assert_same_after_kills(found, folder, 2)
    output = (folder / "killed.log.0").read_text() + (folder / "killed.log.1").read_text()
    lines = [line for line in output.splitlines() if "another rank is gone" in line]
    assert len(lines) == 2 and "Traceback" not in output, output
    assert all(line.startswith("twotower: rank ") and "--max-restarts" in line for line in lines)


def test_sigterm_leaves_a_checkpoint_that_other_numbers_of_ranks_resume(found, folder):
    assert found["stopped"] == [130, 130] and found["stopped at"] >= 12
    for size in (1, 3):
        assert found[f"resumed-{size}"] == [0] * size
        assert_near(folder / f"resumed-{size}", folder / "two")
    assert not torch.equal(weights(folder / "two")["log_temperature"], torch.zeros(()))  # the run has learnt something


def errors(log: Path) -> list[str]:
    output = log.read_text()
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("twotower: ")]


def test_a_suspended_rank_is_reported_in_one_line_after_the_timeout(found, folder):
    ended, seconds = found["hung"]
    assert ended == 1 and 4 < seconds < 60, "the timeout is 8 seconds"
    (line,) = errors(folder / "hung.log.0")
    assert "another rank is gone or did not respond in time" in line and "--max-restarts" in line


def test_a_full_disk_is_reported_leaves_nothing_half_written_and_the_run_resumes(found, folder):
    first, left, then = found["full"]
    assert first == [2] and then == [0]
    (line,) = errors(folder / "full.log.0")
    assert "full/checkpoints/last.ckpt: cannot be written, the disk is full" in line
    assert left == []
    assert_near(folder / "full", folder / "one")


def test_two_ranks_read_a_folder_of_shards_and_a_missing_one_is_reported_by_name(found, folder):
    first, then = found["sharded"]
    assert first == [0, 0] and then[0] == 2
    assert then[1] in (1, 2), "the second rank finds the missing shard itself, or gets the error of the first"
    expected = weights(folder / "two")
    for name, value in weights(folder / "sharded").items():
        assert torch.equal(value, expected[name]), name
    for rank in range(2):
        (line,) = errors(folder / f"sharded.lost.{rank}")
        assert "shards/part-2.parquet: missing, but the run began with it" in line


def test_ten_kills_at_random_steps(tmp_path):
    assert_same_after_kills(scenario(tmp_path, kills=10), tmp_path, 10)


@pytest.mark.parametrize(("machines", "killed"), [(1, [1]), (2, [0, 1])], ids=["one machine", "two machines"])
def test_torchrun_restarts_all_ranks(found, folder, tmp_path, machines, killed):
    """Two torchrun agents simulate two machines: the one whose rank was not killed counts no restart."""
    data, out = folder / "planted.parquet", tmp_path / "run"
    meeting = [f"--rdzv-endpoint=127.0.0.1:{faults.free_port()}", "--rdzv-backend=c10d", "--rdzv-id=test"]
    several = [*meeting, f"--nnodes={machines}", f"--nproc-per-node={2 // machines}", "--max-restarts=3"]
    words = [sys.executable, "-m", "torch.distributed.run", *several, "-m", "twotower", *faults.words(data, out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"{number}.log" for number in range(machines)]
    agents = []
    for log in logs:
        with log.open("w") as output:
            process = subprocess.Popen(words, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        agents.append(process)
    try:
        for rank in killed:
            before = faults.steps_done(out)
            while faults.steps_done(out) <= before and all(agent.poll() is None for agent in agents):
                time.sleep(0.05)
            os.kill(workers(agents)[rank], signal.SIGKILL)
        ended = [agent.wait(timeout=800) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    output = "".join(log.read_text() for log in logs)
    assert ended == [0] * machines, output
    assert "another rank is gone" in output or "Signal 9" in output, output
    expected = weights(folder / "two")
    for name, value in weights(out).items():
        assert torch.equal(value, expected[name]), name


def test_a_restart_does_not_resume_a_refused_run(found, folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folder / "one", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "twotower"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    data = folder / "planted.parquet"
    ended = subprocess.run(
        [sys.executable, "-m", *words, *faults.words(data, out)], env=env, capture_output=True, text=True, timeout=800
    )
    assert ended.returncode != 0 and ended.stderr.count("already contains a model") >= 2, ended.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
