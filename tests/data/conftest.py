"""A separate cache for each test, and the real data if it is available."""

from pathlib import Path

import pytest

REAL = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL.is_dir():
        pytest.skip(f"real data not found in {REAL}")
    return REAL
