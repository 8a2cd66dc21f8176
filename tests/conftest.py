"""Shared fixtures: a small data set with a planted structure, and the real data if it is available."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from planted import planted, planted_titles
from twotower.data import Interactions, by_time, leave_last_out

# Without a GPU, Triton's kernels run in its interpreter; its own functions are decorated when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).parents[2] / "shared" / "data"

# The same examples in every run, without a deadline, because the machine may be busy.
# `pytest --hypothesis-profile=default` searches for new examples.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Seed torch before every test, so that the tests that ran before it do not matter."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Seed torch before every shared fixture, so that it does not matter which test uses it first."""
    if fixturedef.scope == "function":
        return (yield)
    torch.manual_seed(0)
    try:
        return (yield)
    finally:
        torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Use a cache folder of the test run, not the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOTOWER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def real_data():
    """Return a function from name to the path of a real data set, which skips the test if it is missing."""

    def path(name: str) -> Path:
        found = SHARED / name
        if not found.exists():
            pytest.skip(f"real data {name} not found in {SHARED}")
        return found

    return path


@pytest.fixture(scope="session")
def planted_data():
    return Interactions.from_frame(planted(), items=planted_titles())


@pytest.fixture(scope="session")
def planted_split(planted_data):
    return leave_last_out(planted_data)


@pytest.fixture(scope="session")
def planted_time_split(planted_data):
    return by_time(planted_data, validation=0.1, test=0.15)


@pytest.fixture(scope="session")
def interactions_csv():
    """Return a function that writes the purchases file of the README and command-line tests."""

    def write(path: Path) -> Path:
        planted().write_csv(path)
        planted_titles().write_csv(path.with_name("products.csv"))
        return path

    return write
