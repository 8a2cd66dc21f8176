"""What several rooms' tests share: a small data set with a planted answer, and the real data where it is at hand."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from planted import planted, planted_titles
from twotower.data import Interactions, by_time, leave_last_out

SHARED = Path(__file__).parents[2] / "shared" / "data"

# The same examples in every run, and none refused for the time it takes: the machine may be busy with something else.
# `pytest --hypothesis-profile=default` looks for others.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Random numbers of torch are those of the test, whichever tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """So are those of what several tests share, whichever of them is the first to ask for it."""
    if fixturedef.scope == "function":
        return (yield)
    torch.manual_seed(0)
    try:
        return (yield)
    finally:
        torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Prepared data goes to a folder of the test run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOTOWER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def real_data():
    """Path of a real data set, or a skip with the reason."""

    def path(name: str) -> Path:
        found = SHARED / name
        if not found.exists():
            pytest.skip(f"real data {name} is not at {SHARED}")
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
    """A writer of the file of purchases that README and command line tests use."""

    def write(path: Path) -> Path:
        planted().write_csv(path)
        planted_titles().write_csv(path.with_name("products.csv"))
        return path

    return write
