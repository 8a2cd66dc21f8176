"""The device under test: TWOTOWER_DEVICE, or CUDA if there is one, or else the CPU for a dry run."""

import os
import warnings
from contextlib import contextmanager

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    return torch.device(os.environ.get("TWOTOWER_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(autouse=True)
def _full_precision():
    """Compute float32 products in float32: the bounds of these tests are for float32, not for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def no_host_sync(device):
    """Return a context manager in which it is an error, on CUDA, if the host waits for the device."""

    @contextmanager
    def block():
        if device.type != "cuda":
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the mode does not find every wait
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    return block
