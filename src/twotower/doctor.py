"""What this machine offers a training: versions, devices, threads, and which extras are missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from twotower import __version__

#: Extra -> module that it brings.
EXTRAS = {
    "ann": "faiss",
    "onnx": "onnxruntime",
    "pgvector": "psycopg",
    "tensorboard": "tensorboard",
    "tracking": "mlflow",
}


def examine() -> dict[str, dict[str, Any]]:
    """Sections of findings: name -> (what -> found)."""
    return {"versions": _versions(), "machine": _machine(), "extras": _extras()}


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    found: dict[str, Any] = {
        "cores": cores,
        "torch threads": threads if threads == cores else f"{threads} (set OMP_NUM_THREADS={cores} to use every core)",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "free disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB",
    }
    memory = _memory()
    if memory is not None:
        found["memory"] = f"{memory / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    else:
        found["accelerator"] = "none: training runs on the CPU"
    return found


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _extras() -> dict[str, str]:
    return {
        name: "installed" if find_spec(module) else f"missing: pip install 'twotower[{name}]'"
        for name, module in EXTRAS.items()
    }
