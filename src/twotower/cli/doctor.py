"""The state of this machine for training: versions, devices, threads, memory, and missing extras."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from twotower import __version__
from twotower.system import hardware, tuning

#: Extra -> a module that it installs.
EXTRAS = {
    "ann": "faiss",
    "distributed": "torchrec",
    "judgements": "ir_measures",
    "onnx": "onnxruntime",
    "pgvector": "psycopg",
    "ray": "ray",
    "serve": "fastapi",
    "tensorboard": "tensorboard",
    "text": "sentence_transformers",
    "tracking": "mlflow",
    "tune": "optuna",
}

#: CPU flags that make matrix products and bfloat16 fast, oldest first; names as on Linux.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def examine() -> dict[str, dict[str, Any]]:
    """Collect the findings: section -> (name -> value)."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "memory": _memory(hardware.memory()),
        "extras": _extras(),
    }


def _versions() -> dict[str, str]:
    names = ["torch", "pytorch-lightning", "polars", "numpy", "pydantic", "safetensors"]
    found = {"twotower": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing: pip install twotower"
    return found


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "cores": _cores(),
        "torch threads": _threads(torch.get_num_threads(), hardware.cores()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": _instructions(hardware.cpu_flags()),
        "free disk": _size(shutil.disk_usage(".").free),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = f"{device.name}, {_size(device.total_memory)}"
    else:
        found["accelerator"] = "none: training runs on the CPU"
    return found


def _cores() -> str:
    seen, quota = os.cpu_count() or 1, hardware.cpu_quota()
    text = f"{hardware.cores()} physical for this process ({seen} hardware threads in the machine)"
    return text if quota is None else f"{text}; limited to {quota:g} by the container"


def _threads(threads: int, cores: int) -> str:
    set_by = os.environ.get("OMP_NUM_THREADS")
    if threads == cores:
        return f"{threads}, one for each core" + (f" (OMP_NUM_THREADS={set_by})" if set_by == str(threads) else "")
    advice = "unset OMP_NUM_THREADS" if set_by else f"set OMP_NUM_THREADS={cores}"
    return f"{threads}, expected {cores}, the physical cores: {advice}"


def _instructions(flags: frozenset[str]) -> str:
    if not flags:
        return "unknown: the system does not report them"
    have = [name for name in FLAGS if name in flags]
    fast = "amx_bf16" in flags or "avx512_bf16" in flags
    return (
        f"{', '.join(have) or 'none of ' + ', '.join(FLAGS)}; bfloat16 products {'fast' if fast else 'emulated, slow'}"
    )


def _memory(found: hardware.Memory) -> dict[str, str]:
    rows = {
        "total": _size(found.total),
        "available": _size(found.available),
        "limit": "none" if found.limit is None else f"{_size(found.limit)} (of the container or ulimit -v)",
        "this process": f"{_size(found.resident)} now, {_size(found.peak)} at most",
        "allocator": _allocator(),
        "huge pages": _huge_pages(hardware.huge_pages()),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _allocator() -> str:
    tuned = tuning.tuning()
    name = tuning.allocator()
    if tuned is not None and tuned.kept_below is not None:
        return f"{name}; freed blocks below {_size(tuned.kept_below)} are kept for reuse"
    if not name.startswith("glibc"):
        return f"{name}; not tuned"
    given = [key for key in os.environ if key.startswith("MALLOC_") or key == "GLIBC_TUNABLES"]
    return f"{name}; set by {', '.join(given)}" if given else f"{name}; default: call twotower.system.tuning.tune()"


def _huge_pages(mode: str | None) -> str:
    if mode is None:
        return "not available"
    effects = {
        "always": "used for large tables",
        "madvise": "requested and used for large tables",
        "never": "switched off; lookups in large tables are slower",
    }
    return f"{mode}: {effects.get(mode, 'unknown setting')}"


def _extras() -> dict[str, str]:
    return {
        name: "installed" if find_spec(module) else f"missing: pip install 'twotower[{name}]'"
        for name, module in EXTRAS.items()
    }


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
