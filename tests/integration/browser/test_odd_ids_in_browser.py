"""Ids with commas, quotes, slashes and spaces on the page: a user typed in, and a history kept in the address."""

import polars as pl
import pytest

from support.browser_page import at_rest, looked_at
from support.service_models import drawn, listening
from twotower.data import Interactions
from twotower.serving.http.app import ServiceSettings, create_app

QUERIES = ["u,1", 'say "u"', "u/2", "u&4=5#6"]
ITEMS = ["a,b5", 'the "best"', "a/b", "two words", "100%", "?x=1", "i#1", "café, noir"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    rows = [(user, ITEMS[(n * 3 + step) % len(ITEMS)], 1_600_000_000 + 60 * step + n)
            for n, user in enumerate(QUERIES) for step in range(6)]  # fmt: skip
    data = Interactions.from_frame(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))
    model = drawn(data, tmp_path_factory.mktemp("odd") / "model")
    with listening(create_app([model], ServiceSettings(watch_seconds=0))) as opened:
        yield opened


def test_users_and_histories_with_odd_ids(browser, address):
    with looked_at(browser, address) as (page, _):
        page.locator("#list-a .item").first.wait_for()  # the page begins with a user of its own choice
        at_rest(page)
        for query in QUERIES:
            page.fill("#query", query)
            page.keyboard.press("Enter")
            page.wait_for_function(
                "name => document.querySelector('#results-title bdi')?.textContent === name", arg=query
            )
            at_rest(page)
            assert page.locator("#history li").count() == 6
            assert page.locator("#list-a .item").count() == len(ITEMS) - 6
        page.locator("#history button").first.click()  # the address now has the ids of the history
        at_rest(page)
        before = page.locator("#history .name").all_inner_texts()
        assert len(before) == 5 and "item a,b5" in before + page.locator("#list-a .name").all_inner_texts()
        page.reload()
        page.locator("#history li").nth(4).wait_for()
        at_rest(page)
        assert page.locator("#history .name").all_inner_texts() == before
