"""The browser for the tests of this folder."""

import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


# Not session-scoped: the driver keeps its event loop running, and tests with an event loop of their own would fail.
@pytest.fixture(scope="module")
def browser():
    """Start Chromium with playwright; skip with the reason if either is missing."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("Chromium is not installed; on Debian or Ubuntu: apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; pip install playwright, without its own browser"
    )
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()
