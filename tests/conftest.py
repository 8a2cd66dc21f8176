"""What several rooms' tests share: a small data set with a planted answer, and the real data where it is at hand."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from twotower.data import Interactions, by_time, leave_last_out

SHARED = Path(__file__).parents[2] / "shared" / "data"


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


def planted(queries: int = 60, items: int = 100, rows: int = 24, seed: int = 0) -> pl.DataFrame:
    """Two tastes that never mix: even queries take even items, odd ones odd items; popular items come first.

    A model that has learnt anything ranks items of the right parity on top; popularity cannot.
    """
    rng = np.random.default_rng(seed)
    user, item, time = [], [], []
    for query in range(queries):
        pool = np.arange(query % 2, items, 2)
        weight = 1.0 / np.arange(1, len(pool) + 1)
        chosen = rng.choice(pool, size=min(rows, len(pool) - 4), replace=False, p=weight / weight.sum())
        user += [f"u{query:03d}"] * len(chosen)
        item += chosen.tolist()
        time += np.sort(rng.integers(1_600_000_000, 1_700_000_000, len(chosen))).tolist()
    return pl.DataFrame({"user_id": user, "item_id": item, "timestamp": time})


def planted_titles(items: int = 100) -> pl.DataFrame:
    return pl.DataFrame({"item_id": range(items), "title": [f"Item number {j}" for j in range(items)]})


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
