"""The settings of a process, in processes of their own; and what the machine tells, on made-up systems."""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch

from twotower import doctor, machine, process

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
GLIBC = pytest.mark.skipif(not process.allocator().startswith("glibc"), reason="needs glibc's allocator")


def run(code: str, **environment: str) -> dict[str, object]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**kept, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FAULTS = """
    import json, resource
    from twotower import process
    tuned = {tune}
    import torch
    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):  # until glibc has found its holes
        torch.ones(40 << 18)
    before = faults()
    for _ in range(10):
        torch.ones(40 << 18)
    print(json.dumps({{"faults": faults() - before, "kept_below": tuned and tuned.kept_below}}))
"""


@LINUX
@GLIBC
def test_a_tuned_process_reuses_the_memory_of_its_temporaries():
    pages = 10 * (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    plain = run(FAULTS.format(tune="None"))
    assert plain["kept_below"] is None and plain["faults"] > 0.9 * pages, "the system maps every temporary anew"
    tuned = run(FAULTS.format(tune="process.tune()"))
    assert tuned["kept_below"] > 40 << 20 and tuned["faults"] < 0.01 * pages


@LINUX
@GLIBC
def test_what_the_user_set_is_left_alone():
    code = """
        import json, os, sys
        from twotower import process
        tuned = process.tune()
        assert "torch" not in sys.modules
        print(json.dumps([tuned.kept_below is None, tuned.threads, os.environ["OMP_NUM_THREADS"]]))
    """
    cores = machine.cores()
    assert run(code) == [False, cores, str(cores)]
    assert run(code, MALLOC_TOP_PAD_="1000000", OMP_NUM_THREADS="1") == [True, None, "1"]
    assert run(code, GLIBC_TUNABLES="glibc.malloc.top_pad=4096") == [True, cores, str(cores)]


def test_threads_of_a_torch_that_is_loaded(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert process.use_every_core() == machine.cores()
    assert asked == [machine.cores()] and "OMP_NUM_THREADS" not in os.environ


def test_tuning_twice_is_tuning_once(monkeypatch):
    monkeypatch.setattr(process, "_applied", {})
    calls = []
    monkeypatch.setattr(process, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(process, "use_every_core", lambda: None)
    assert process.tuning() is None
    assert process.tune() is process.tune() is process.tuning()
    assert len(calls) == 1


def test_elsewhere_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(process.sys, "platform", "darwin")
    monkeypatch.setattr(process.ctypes, "CDLL", lambda *_: pytest.fail("the C library was called"))
    assert process.keep_freed_memory() is None
    assert process.advise_huge_pages(1 << 30, 1 << 30) is False


@LINUX
def test_huge_pages_are_asked_for_inside_the_block_alone():
    if machine.huge_pages() not in ("always", "madvise"):
        pytest.skip("the system has no transparent huge pages")
    assert not process.advise_huge_pages(4096, (1 << 21) - 1), "no whole huge page lies in it"
    block = torch.empty(16 << 18)
    assert process.advise_huge_pages(block.data_ptr(), block.nbytes)
    block.fill_(1.0)
    start = block.data_ptr()
    flags, inside = set(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low < start + block.nbytes and start < high
        elif inside and first == "VmFlags:":
            flags.update(line.split()[1:])
    # Whether the kernel has whole huge pages to give depends on how its memory lies; that they were asked for does not.
    assert "hg" in flags


def test_quotas_of_containers(tmp_path):
    assert machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.cpu_quota(tmp_path) == 1.5
    old = tmp_path / "old"
    (old / "cpu").mkdir(parents=True)
    (old / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota(old) is None
    (old / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    assert machine.cpu_quota(old) == 4.0


def test_memory_of_containers(tmp_path, monkeypatch):
    assert machine.memory_group(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_group(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 150000\n")
    assert machine.memory_group(tmp_path) == (1_000_000, 250_000)
    monkeypatch.setattr(machine, "memory_group", lambda: (1_000_000, 250_000))
    monkeypatch.setattr(machine, "process_limits", list)
    found = machine.memory()
    assert found.limit == 1_000_000 and found.available == 750_000
    assert machine.memory(processes=3).available == 250_000
    monkeypatch.setattr(machine, "process_limits", lambda: [(500_000, 100_000)])
    found = machine.memory(processes=1)
    assert found.limit == 500_000 and found.available == 400_000


def test_memory_and_cores_are_those_of_this_process():
    found = machine.memory()
    assert found.total > found.available > 0
    assert found.peak >= found.resident > 50 << 20
    assert 1 <= machine.cores() <= os.cpu_count()


def test_the_doctor_knows_every_extra():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert set(project["project"]["optional-dependencies"]) - {"dev", "docs"} == set(doctor.EXTRAS)


def test_the_doctor_says_what_to_do(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert doctor._threads(7, 2) == "7, expected 2, the physical cores: unset OMP_NUM_THREADS"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor._threads(64, 2) == "64, expected 2, the physical cores: set OMP_NUM_THREADS=2"
    assert "switched off" in doctor._huge_pages("never")
    assert doctor._instructions(frozenset({"avx2"})) == "avx2; bfloat16 products emulated, slow"
    found = doctor.examine()
    assert {"available", "this process", "allocator", "huge pages"} <= set(found["memory"])


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it():
    """`getrusage` begins at the parent's, on Linux: a benchmark's or a comparison's child would tell too much."""
    held = torch.ones(300 << 20, dtype=torch.uint8)
    code = "from twotower import machine; print(machine.peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0 < int(child.stdout) < held.nbytes <= machine.peak_memory()
