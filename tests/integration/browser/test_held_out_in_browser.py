"""The held-out items of a known user on the page: hits and misses of each model, for this user's own history only."""

import httpx
import numpy as np
import pytest

from support.browser_page import LAYOUT, WAIT, at_rest, looked_at
from support.service_models import drawn, listening
from twotower.serving.http.app import ServiceSettings, create_app


@pytest.fixture(scope="module")
def address(planted_data, tmp_path_factory):
    """Models not trained on the last two rows of each query, on the last three, and one that does not say."""
    folder = tmp_path_factory.mktemp("held-out")
    counts = np.diff(planted_data.offsets)
    models = [
        drawn(planted_data, folder / f"without {n}" / "model", n, rows={"learnt": counts - n} if n else None)
        for n in (2, 3, 0)
    ]
    with listening(create_app(models, ServiceSettings(watch_seconds=0))) as opened:
        yield opened


def expected(address, model, query):
    found = httpx.get(f"{address}page/held-out", params={"query_id": query, "model": model}, timeout=WAIT / 1000)
    return found.json()["items"]


def hit(row, k):
    return row["rank"] is not None and row["rank"] <= k


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), pytest.param(390, "dark", marks=pytest.mark.slow)])
def test_hits_and_misses_of_a_known_user(browser, address, width, scheme):
    with looked_at(browser, address, width=width, scheme=scheme, path="#user=u003") as (page, _):
        page.locator("#held-out .list.b li").first.wait_for()
        at_rest(page)
        for letter, count in (("a", 2), ("b", 3)):
            rows = expected(address, f"without {count}", "u003")
            assert len(rows) == count
            shown = page.locator(f"#held-out .list.{letter} li")
            assert shown.locator(".name").all_inner_texts() == [row["title"] for row in rows]
            for k in (10, 20):
                page.locator("#settings").evaluate("one => { one.open = true; }")
                page.select_option("#k", str(k))
                at_rest(page)
                marks = shown.locator(".mark").all_inner_texts()
                assert ["hit" in one for one in marks] == [hit(row, k) for row in rows]
                hint = page.locator(f"#held-out .list.{letter} .hint").inner_text()
                assert hint.startswith(f"{sum(hit(row, k) for row in rows)} of {count} among the first {k}")
            ranks = shown.locator(".quiet").all_inner_texts()
            assert ranks == [f"rank {row['rank']}" for row in rows], "the catalog is smaller than the last rank"
        history = page.locator("#history .name").all_inner_texts()
        assert [row["title"] for row in expected(address, "without 3", "u003")] == history[2::-1]
        assert page.evaluate(LAYOUT)["wrong"] == []


def test_only_for_the_history_of_a_known_user(browser, address):
    with looked_at(browser, address, path="#user=u003") as (page, _):
        page.locator("#held-out li").first.wait_for()
        at_rest(page)
        page.locator("#history button").first.click()
        page.locator("#held-out").wait_for(state="hidden")
        page.click("#restore")
        page.locator("#held-out li").first.wait_for()
        page.click("#clear")
        page.locator("#held-out").wait_for(state="hidden")
        page.evaluate("() => { location.hash = 'user=u004&model=without%200&beside='; }")
        page.wait_for_function("() => document.getElementById('results-title').textContent.includes('u004')")
        at_rest(page)
        assert page.locator("#held-out").is_hidden(), "the model's folder does not say what was held out"
