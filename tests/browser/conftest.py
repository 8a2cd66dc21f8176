"""The browser of this machine, where it has one."""

import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


# Not for the session: while the driver is there its event loop runs, and tests with one of their own could not.
@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by playwright; a skip with the reason where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: on Debian or Ubuntu, apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright; its own browser is unused")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()
