"""Process settings, each in a separate process; and the figures read from the system, on fake files."""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch

from twotower.cli import doctor
from twotower.system import hardware, tuning

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
GLIBC = pytest.mark.skipif(not tuning.allocator().startswith("glibc"), reason="needs glibc's allocator")


def run(code: str, **environment: str) -> dict[str, object]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**kept, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FAULTS = """
    import json, resource
    from twotower.system import tuning
    tuned = {tune}
    import torch
    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):  # until glibc reuses its holes
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
    assert plain["kept_below"] is None and plain["faults"] > 0.9 * pages, "the system maps every temporary again"
    tuned = run(FAULTS.format(tune="tuning.tune()"))
    assert tuned["kept_below"] > 40 << 20 and tuned["faults"] < 0.01 * pages


@LINUX
@GLIBC
def test_settings_of_the_user_take_precedence():
    code = """
        import json, os, sys
        from twotower.system import tuning
        tuned = tuning.tune()
        assert "torch" not in sys.modules
        print(json.dumps([tuned.kept_below is None, tuned.threads, os.environ["OMP_NUM_THREADS"]]))
    """
    cores = hardware.cores()
    assert run(code) == [False, cores, str(cores)]
    assert run(code, MALLOC_TOP_PAD_="1000000", OMP_NUM_THREADS="1") == [True, None, "1"]
    assert run(code, GLIBC_TUNABLES="glibc.malloc.top_pad=4096") == [True, cores, str(cores)]


def test_threads_if_torch_is_already_imported(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    assert tuning.use_every_core() == hardware.cores()
    assert calls == [hardware.cores()] and "OMP_NUM_THREADS" not in os.environ


def test_a_second_tune_does_nothing(monkeypatch):
    monkeypatch.setattr(tuning, "_applied", {})
    calls = []
    monkeypatch.setattr(tuning, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(tuning, "use_every_core", lambda: None)
    assert tuning.tuning() is None
    assert tuning.tune() is tuning.tune() is tuning.tuning()
    assert len(calls) == 1


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(tuning.sys, "platform", "darwin")
    monkeypatch.setattr(tuning.ctypes, "CDLL", lambda *_: pytest.fail("the C library was called"))
    assert tuning.keep_freed_memory() is None
    assert tuning.advise_huge_pages(1 << 30, 1 << 30) is False


@LINUX
def test_huge_pages_are_requested_only_inside_the_block():
    if hardware.huge_pages() not in ("always", "madvise"):
        pytest.skip("the system has no transparent huge pages")
    assert not tuning.advise_huge_pages(4096, (1 << 21) - 1), "no whole huge page lies in it"
    block = torch.empty(16 << 18)
    assert tuning.advise_huge_pages(block.data_ptr(), block.nbytes)
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
    # Whether the kernel has free huge pages depends on fragmentation; the request itself always shows in the flags.
    assert "hg" in flags


def test_quotas_of_containers(tmp_path):
    assert hardware.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert hardware.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert hardware.cpu_quota(tmp_path) == 1.5
    old = tmp_path / "old"
    (old / "cpu").mkdir(parents=True)
    (old / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert hardware.cpu_quota(old) is None
    (old / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    assert hardware.cpu_quota(old) == 4.0


def test_memory_of_containers(tmp_path, monkeypatch):
    assert hardware.memory_group(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.memory_group(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 150000\n")
    assert hardware.memory_group(tmp_path) == (1_000_000, 250_000)
    monkeypatch.setattr(hardware, "memory_group", lambda: (1_000_000, 250_000))
    monkeypatch.setattr(hardware, "process_limits", list)
    found = hardware.memory()
    assert found.limit == 1_000_000 and found.available == 750_000
    assert hardware.memory(processes=3).available == 250_000
    monkeypatch.setattr(hardware, "process_limits", lambda: [(500_000, 100_000)])
    found = hardware.memory(processes=1)
    assert found.limit == 500_000 and found.available == 400_000


def test_memory_and_cores_of_this_process():
    found = hardware.memory()
    assert found.total > found.available > 0
    assert found.peak >= found.resident > 50 << 20
    assert 1 <= hardware.cores() <= os.cpu_count()


def test_the_doctor_knows_every_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert set(project["project"]["optional-dependencies"]) - {"dev", "docs"} == set(doctor.EXTRAS)


def test_the_doctor_gives_advice(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert doctor._threads(7, 2) == "7, expected 2, the physical cores: unset OMP_NUM_THREADS"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor._threads(64, 2) == "64, expected 2, the physical cores: set OMP_NUM_THREADS=2"
    assert "switched off" in doctor._huge_pages("never")
    assert doctor._instructions(frozenset({"avx2"})) == "avx2; bfloat16 products emulated, slow"
    found = doctor.examine()
    assert {"available", "this process", "allocator", "huge pages"} <= set(found["memory"])


def test_the_peak_does_not_include_the_parent_process():
    """The peak from `getrusage` includes the parent's memory on Linux; a benchmark's child would report too much."""
    held = torch.ones(300 << 20, dtype=torch.uint8)
    code = "from twotower.system import hardware; print(hardware.peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0 < int(child.stdout) < held.nbytes <= hardware.peak_memory()
