"""The page of the service in a real browser: every part of it, wide and narrow, light and dark, and by keyboard."""

import json

import httpx
import polars as pl
import pytest

from planted import planted, planted_titles
from support.browser_page import LAYOUT, WAIT, Held, at_rest, looked_at, names, shows, titles
from support.search import documents, searches
from support.service_models import TOKEN, drawn, listening
from twotower.data import Interactions, with_query_text
from twotower.serving.http.app import ServiceSettings, create_app


@pytest.fixture(scope="module")
def models(planted_data, tmp_path_factory):
    """Two models of the same data; the first has an evaluation with slices, and an audit."""
    folder = tmp_path_factory.mktemp("page")
    kinds = pl.Series("kind", [("drama", "comedy", "crime")[j % 3] for j in range(100)])
    table = planted_data.item_table.with_columns(kinds)
    first = drawn(planted_data, folder / "first" / "model", 0, table, metrics=METRICS)
    second = drawn(planted_data, folder / "second" / "model", 1, table)
    audit = {"conclusion": ["mixed: no bias found"], "objectives": [{"name": "mixed", "verdict": "no bias found"}]}
    (folder / "first" / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    return first, second


METRICS = {
    "holdout": "test",
    "protocol": {"catalog": "full", "exact": True, "ks": [10, 20]},
    "num_items": 100,
    "num_queries": 60,
    "num_targets": 60,
    "slice_sizes": {part: {"items": count} for part, count in (("head", 9), ("mid", 21), ("tail", 70))},
    "rows": [
        {
            "name": "model",
            "values": {"NDCG@10": 0.25},
            "slices": {p: {"NDCG@10": 0.2} for p in ("head", "mid", "tail")},
        },
        {"name": "popularity", "values": {"NDCG@10": 0.125}, "slices": {"head": {"NDCG@10": 0.5}}},
    ],
}


@pytest.fixture(scope="module")
def address(models):
    with listening(create_app(models, ServiceSettings(watch_seconds=0))) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_user_the_dial_the_comparison_the_map_and_the_card(browser, address, width, scheme):
    with looked_at(browser, address, width=width, scheme=scheme, path="#user=u003") as (page, _):
        for letter, model in (("a", "first"), ("b", "second")):
            shows(page, titles(address, model, query_id="u003"), letter)
        common = set(names(page)) & set(names(page, "b"))
        assert page.locator("#common").inner_text().startswith(f"{len(common)} of 10")
        assert page.locator("#list-a .shared").count() == len(common)
        history = httpx.get(f"{address}page/history", params={"query_id": "u003"}, timeout=WAIT / 1000).json()["items"]
        shown = page.locator("#history .name").all_inner_texts()
        assert shown == [row["title"] for row in reversed(history)]

        # What raised an item: in its row, in the history, and in the expanded row with the columns.
        page.locator("#list-a .why").first.get_by_text("popularity").wait_for()
        at_rest(page)  # a row that is replaced during a click would miss it
        page.locator("#list-a .item").first.click()
        page.locator("#list-a .more dl").get_by_text("kind").wait_for()
        assert page.locator("#list-a .pulls li").count() >= 5
        assert page.locator("#list-a .item").first.get_attribute("aria-expanded") == "true"

        # The dial by keyboard: the list, its median and the curve follow.
        before = names(page)
        page.focus("#dial")
        page.keyboard.press("Home")
        shows(page, titles(address, "first", query_id="u003", popularity=0.0))
        assert names(page) != before and "rarer items" in page.locator("#dial-setting").inner_text()
        rare = int(page.locator("#list-a .median").inner_text())
        page.keyboard.press("End")
        shows(page, titles(address, "first", query_id="u003", popularity=2.0))
        at_rest(page)  # the curve, the marks on the map and the card are drawn, too
        assert int(page.locator("#list-a .median").inner_text()) > rare
        assert page.locator("#curve path").count() == 2

        # The map: its marks and colors, zooming in and out.
        assert page.locator("#map-wait").is_hidden()
        label = page.locator("#chart").get_attribute("aria-label")
        assert (
            "Map of 100 items" in label
            and "10 recommendations" in label
            and "10 recommendations of the second model" in label
        )
        assert page.locator("#colour option").all_inner_texts() == ["popularity", "kind"]
        assert "comedy" in page.locator("#legend").inner_text()
        page.select_option("#colour", "popularity")
        assert "tail" in page.locator("#legend").inner_text()
        page.click("#whole")  # moves the focus out of the list, which removes the name from the map
        drawn_before = page.evaluate("document.getElementById('chart').toDataURL()")
        page.click("#closer")
        assert page.evaluate("document.getElementById('chart').toDataURL()") != drawn_before
        page.click("#whole")
        assert page.evaluate("document.getElementById('chart').toDataURL()") == drawn_before

        # The card.
        card = page.locator("#cards article").first
        assert "0.2500" in card.inner_text() and "NDCG@10 by popularity of the target" in card.inner_text()
        assert "mixed: no bias found" in card.inner_text() and "purchases.csv" in card.inner_text()
        assert "/somewhere" not in page.content()
        assert "No evaluation is saved" in page.locator("#cards article").nth(1).inner_text()

        # A single model, and the page fits.
        page.select_option("#model-b", "")
        page.wait_for_function("() => document.querySelectorAll('#lists > .list').length === 1")
        page.locator("#list-a .why em").first.wait_for()
        assert page.evaluate(LAYOUT)["wrong"] == []


def test_a_history_built_with_the_keyboard(browser, address):
    with looked_at(browser, address) as (page, _):
        page.locator("#list-a .item").first.wait_for()  # a random user: the page is not empty at the start
        assert page.input_value("#query").startswith("u0")
        whose = page.locator("#results-title")
        assert whose.inner_text() == f"Recommendations for user {page.input_value('#query')}"
        page.click("#clear")
        page.locator("#list-a .nothing").wait_for()
        assert page.evaluate("document.activeElement.id") == "title"
        assert whose.inner_text() == "Recommendations" and page.locator("#common").is_hidden()
        page.keyboard.type("number 17")
        page.locator("#title-list li").first.wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        shows(page, titles(address, "first", history=[17]))
        page.keyboard.type("number 42")
        page.wait_for_function("() => document.querySelector('#title-list li')?.textContent.includes('42')")
        page.keyboard.press("Enter")
        shows(page, titles(address, "first", history=[17, 42]))
        page.get_by_role("button", name="Remove Item number 17").click()
        shows(page, titles(address, "first", history=[42]))
        assert whose.inner_text() == "Recommendations for a new user with 1 item"
        assert "history=42" in page.evaluate("location.hash")

        page.fill("#query", "u011")
        page.keyboard.press("Enter")
        shows(page, titles(address, "first", query_id="u011"))
        page.locator("#history button").first.click()
        page.locator("#restore").wait_for()
        rows = httpx.get(f"{address}page/history", params={"query_id": "u011"}, timeout=WAIT / 1000).json()["items"]
        shows(page, titles(address, "first", query_id="u011", history=[row["item"] for row in rows[:-1]]))
        assert whose.inner_text() == "Recommendations for user u011 with an edited history"
        page.click("#restore")
        shows(page, titles(address, "first", query_id="u011"))


def test_keys_faster_than_the_suggestions(browser, address):
    """Enter applies to the text in the field, not to suggestions for its first letters."""
    with looked_at(browser, address) as (page, _):
        late = ("text=number+17&", "text=u01&", "text=u012&")
        held = Held(page, lambda url: any(one in url for one in late))

        page.locator("#list-a .item").first.wait_for()
        page.click("#clear")
        page.keyboard.type("number 1")
        page.wait_for_function("() => document.querySelectorAll('#title-list li').length > 1")
        page.keyboard.type("7")
        for key in ("ArrowDown", "Enter"):
            page.keyboard.press(key)
        held.wait()
        page.wait_for_timeout(100)
        assert page.locator("#history li").count() == 0, "the suggestions for this title are held back"
        held.answer_one()
        shows(page, titles(address, "first", history=[17]))

        # Escape cancels the request; an arrow key requests again, and each press is one step.
        page.focus("#query")
        page.keyboard.type("u01")
        page.keyboard.press("Escape")
        held.answer_one()
        at_rest(page)
        assert page.locator("#query-list").is_hidden()
        for key in ("ArrowDown", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        held.answer_one()
        found = httpx.get(f"{address}page/queries?text=u01", timeout=WAIT / 1000).json()["queries"]
        shows(page, titles(address, "first", query_id=found[1]))

        # Enter also counts if the field is left before the suggestions arrive.
        page.fill("#query", "u012")
        page.keyboard.press("Enter")
        page.focus("#title")
        held.answer_one()
        shows(page, titles(address, "first", query_id="u012"))


def test_a_late_user_does_not_appear_after_clear(browser, address):
    with looked_at(browser, address, path="#user=u003") as (page, _):
        page.locator("#list-a .item").first.wait_for()
        held = Held(page, "**/page/history?*")
        page.click("#random")
        held.wait()
        page.click("#clear")
        page.locator("#list-a .nothing").wait_for()
        held.answer_one()
        at_rest(page)
        assert page.input_value("#query") == "" and page.locator("#history li").count() == 0


def test_late_answers_undo_no_later_action(browser, address):
    with looked_at(browser, address, path="#user=u003") as (page, wrong):
        shows(page, titles(address, "first", query_id="u003"))
        at_rest(page)

        # The columns of an item arrive late: the row is already expanded, and the focus stays where it moved to.
        held = Held(page, "**/items/*")
        page.locator("#list-a .item").first.click()
        page.locator("#list-a .pulls li").first.wait_for()
        page.focus("#title")
        held.answer_one()
        page.locator("#list-a .more dl").get_by_text("kind").wait_for()
        assert page.evaluate("document.activeElement.id") == "title"

        # A title added before Clear does not appear after it.
        page.keyboard.type("number 17")
        page.keyboard.press("Enter")
        held.wait()
        page.click("#clear")
        held.answer_one()
        at_rest(page)
        assert page.locator("#history li").count() == 0

        # A title added while a user is loading is added to that user.
        page.unroute_all()
        rows = httpx.get(f"{address}page/history", params={"query_id": "u011"}, timeout=WAIT / 1000).json()["items"]
        done = [row["item"] for row in rows]
        new = next(item for item in range(20, 100) if item not in done)
        held = Held(page, "**/page/history*")
        page.fill("#query", "u011")
        page.keyboard.press("Enter")
        page.focus("#title")
        page.keyboard.type(f"number {new}")
        with page.expect_response("**/items/*"):
            page.keyboard.press("Enter")
        held.answer_all()
        request = {"query_id": "u011", "history": [*done, new]}
        shows(page, titles(address, "first", **request))
        at_rest(page)
        page.unroute_all()

        # A click still counts if its row would be replaced between press and release.
        held = Held(page, "**/explain*")
        page.focus("#dial")
        page.keyboard.press("ArrowLeft")
        held.wait()
        page.locator("#list-a li:nth-child(2) .item").hover()
        page.mouse.down()
        held.answer_all()
        at_rest(page)
        assert page.locator("#list-a .why em").count() == 0
        page.mouse.up()
        page.locator("#list-a li:nth-child(2) .item[aria-expanded=true]").wait_for()
        page.locator("#list-a .why em").first.wait_for()
        page.unroute_all()

        # The focus keeps its place: in a list that is redrawn, and in the history.
        held = Held(page, "**/explain*")
        page.focus("#dial")
        page.keyboard.press("Home")
        shows(page, titles(address, "first", **request, popularity=0.0))
        page.focus("#list-a li:nth-child(2) .item")
        held.answer_all()
        page.locator("#list-a .why em").first.wait_for()
        assert page.evaluate("document.activeElement === document.querySelectorAll('#list-a .item')[1]")
        page.focus("#history button")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement === document.querySelector('#history button')")

        # A list that answers an earlier request is marked as busy.
        page.unroute_all()
        held = Held(page, "**/recommend")
        page.focus("#dial")
        page.keyboard.press("End")
        page.locator("#lists[aria-busy]").wait_for()
        held.answer_all()
        page.locator("#lists:not([aria-busy])").wait_for()

        # The service stops responding.
        page.unroute_all()
        page.route("**/recommend", lambda route: route.abort())
        page.keyboard.press("Home")
        page.locator("#problem").get_by_text("The service does not respond").wait_for()
        wrong[:] = [one for one in wrong if "Failed to load resource" not in one]


def test_the_address_keeps_the_state(browser, address):
    with looked_at(browser, address, path="#user=u003") as (page, _):
        shows(page, titles(address, "first", query_id="u003"))
        page.select_option("#model-b", "")
        page.locator(".settings summary").click()
        page.select_option("#k", "5")
        page.uncheck("#exclude-seen")
        page.fill("#filter", "kind = 'crime'")
        request = {"query_id": "u003", "filter": "kind = 'crime'", "exclude_seen": False, "k": 5}
        shows(page, titles(address, "first", **request))
        page.get_by_role("link", name="Map").click()  # a link to a part of the page keeps the state
        page.wait_for_function("() => location.hash.includes('user=u003')")
        page.reload()
        shows(page, titles(address, "first", **request))
        page.locator("#list-a .why em").first.wait_for()
        assert page.locator("#list-b").count() == 0 and page.input_value("#model-b") == ""
        assert page.input_value("#k") == "5" and not page.is_checked("#exclude-seen") and page.is_visible("#filter")

        # Another address in the same tab.
        page.evaluate("location.hash = 'user=u011&beside=second'")
        shows(page, titles(address, "first", query_id="u011"))
        shows(page, titles(address, "second", query_id="u011"), "b")
        assert page.input_value("#query") == "u011" and page.input_value("#filter") == ""
        page.click("#clear")
        page.locator("#list-a .nothing").wait_for()
        page.reload()
        page.locator("#list-a .nothing").wait_for()


def test_settings_a_click_on_the_map_and_the_theme(browser, address):
    with looked_at(browser, address, path="#user=u003") as (page, _):
        shows(page, titles(address, "first", query_id="u003"))
        page.locator(".settings summary").click()
        page.fill("#filter", "kind = 'crime'")
        shows(page, titles(address, "first", query_id="u003", filter="kind = 'crime'"))
        page.select_option("#k", "5")
        shows(page, titles(address, "first", query_id="u003", filter="kind = 'crime'")[:5])
        page.uncheck("#exclude-seen")
        shows(page, titles(address, "first", query_id="u003", filter="kind = 'crime'", exclude_seen=False)[:5])

        at_rest(page)  # the map has stopped moving
        before = page.locator("#history li").count()
        chart = httpx.get(f"{address}page/map", timeout=WAIT / 1000).json()
        rows = httpx.get(f"{address}page/history?query_id=u003", timeout=WAIT / 1000).json()["items"]
        seen = {row["item"] for row in rows}
        box = page.locator("#chart").bounding_box()
        scale = 0.47 * min(box["width"], box["height"])
        far = [at for at, item in enumerate(chart["items"]) if item not in seen and _alone(chart, at)]
        x, y = chart["x"][far[0]], chart["y"][far[0]]
        page.mouse.click(box["x"] + box["width"] / 2 + scale * x, box["y"] + box["height"] / 2 - scale * y)
        page.wait_for_function("count => document.querySelectorAll('#history li').length === count", arg=before + 1)
        assert page.locator("#history .name").first.inner_text() == chart["titles"][far[0]]

        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        page.reload()
        page.locator("#list-a .item").first.wait_for()
        assert page.locator("html").get_attribute("data-theme") == "dark"


def _alone(chart, at):
    """Return True if no other item of the map is near enough to catch the click."""
    places = list(zip(chart["x"], chart["y"], strict=True))
    x, y = places[at]
    return all((x - a) ** 2 + (y - b) ** 2 > 0.12**2 for place, (a, b) in enumerate(places) if place != at)


def test_ids_above_two_to_the_53_stay_exact(browser, tmp_path):
    """As a JavaScript number, an odd id of this size would be rounded to another one."""
    first = 2**53 + 1
    item, user = pl.col("item_id") + first, pl.col("user_id").str.slice(1).cast(pl.Int64) + first
    data = Interactions.from_frame(planted().with_columns(item, user), items=planted_titles().with_columns(item))
    model = drawn(data, tmp_path / "large" / "model")
    with (
        listening(create_app([model], ServiceSettings(watch_seconds=0))) as address,
        looked_at(browser, address, path=f"#history={first + 16}") as (page, _),
    ):
        shows(page, titles(address, "large", history=[first + 16]))
        page.fill("#title", "number 42")
        page.keyboard.press("Enter")
        shows(page, titles(address, "large", history=[first + 16, first + 42]))
        assert f"{first + 16}%2C{first + 42}" in page.evaluate("location.hash")
        page.locator("#list-a .why em").first.wait_for()
        at_rest(page)
        page.locator("#list-a .item").first.click()
        page.locator("#list-a .more dl").get_by_text("item_id").wait_for()
        best = httpx.post(f"{address}recommend", json={"history": [first + 16, first + 42]}, timeout=WAIT / 1000)
        assert page.locator("#list-a .more dd").first.inner_text() == str(best.json()["items"][0]["item"])
        page.fill("#query", str(first)[:-1])
        page.locator("#query-list li").first.wait_for()
        chosen = page.locator("#query-list li").first.inner_text()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        shows(page, titles(address, "large", query_id=int(chosen)))
        assert page.locator("#results-title").inner_text() == f"Recommendations for user {chosen}"


def test_refusals_are_shown_at_their_field(browser, address):
    with looked_at(browser, address, path="#user=u003&beside=") as (page, wrong):
        page.locator("#list-a .item").first.wait_for()
        page.fill("#query", "nobody")
        page.keyboard.press("Enter")
        page.locator("#query-refused").get_by_text("This model has no user “nobody”.").wait_for()
        assert page.locator("#query").get_attribute("aria-invalid") == "true" and page.locator("#problem").is_hidden()
        page.locator(".settings summary").click()
        page.fill("#filter", "price < 3")
        page.locator("#filter-refused").get_by_text("no column 'price'").wait_for()
        assert page.locator("#filter").get_attribute("aria-invalid") == "true" and page.locator("#problem").is_hidden()
        assert page.locator("#query-refused").is_hidden(), "the refusal of an earlier request is gone"
        page.locator("#list-a").get_by_text("The request failed").wait_for()
        page.fill("#filter", "")
        shows(page, titles(address, "first", query_id="u003"))
        assert (
            page.locator("#filter-refused").is_hidden()
            and page.locator("#filter").get_attribute("aria-invalid") is None
        )
        wrong[:] = [one for one in wrong if "Failed to load resource" not in one]  # what the browser logs for a 4xx


def test_the_page_prompts_for_the_token(browser, models):
    with (
        listening(create_app(models[:1], ServiceSettings(token=TOKEN, watch_seconds=0))) as address,
        looked_at(browser, address, path="#user=u003") as (page, wrong),
    ):
        page.locator("#token-dialog").wait_for()
        refused = page.get_by_role("alert").get_by_text("The service refused that token")
        assert refused.is_hidden(), "no token was entered yet"
        page.fill("#token", "not the right one at all")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "() => document.getElementById('token-dialog').open && !document.getElementById('token').value"
        )
        refused.wait_for()
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.locator("#list-a .item").nth(9).wait_for()
        page.locator("#cards article").wait_for()
        assert page.locator("#compare").is_hidden()
        wrong[:] = [one for one in wrong if "Failed to load resource" not in one]


@pytest.mark.slow
def test_words_are_searched_beside_a_user_and_alone(browser, tmp_path):
    """A model whose queries are texts, and one with texts beside users: the same search box."""
    data = with_query_text(
        Interactions.from_frame(searches(), documents(), columns={"query": "search"}), "search", texts_are_queries=True
    )
    alone = drawn(data, tmp_path / "alone" / "model", 0, changes=["data.query_text=search", *WORDS])
    data = with_query_text(
        Interactions.from_frame(searches(), documents(), context=["search"]), "search", texts_are_queries=False
    )
    users = ["data.query_text=search", "data.columns.query=user_id", *WORDS]
    beside = drawn(data, tmp_path / "beside" / "model", 1, changes=users)
    text = "ask3a ask5b"
    with listening(create_app([alone], ServiceSettings(watch_seconds=0))) as opened:
        with looked_at(browser, opened, width=1280, scheme="light") as (page, _):
            assert page.locator("#query-label").inner_text() == "Query in the data"
            page.fill("#words", text)
            shows(page, titles(opened, "alone", text=text))
            assert page.locator("#results-title").inner_text() == f"Recommendations for “{text}”"
            assert "text=ask3a+ask5b" in page.url and page.locator("#query").input_value() == ""
        with looked_at(browser, opened, width=390, scheme="dark", path=f"#text={text}") as (page, _):
            shows(page, titles(opened, "alone", text=text))
    with (
        listening(create_app([beside], ServiceSettings(watch_seconds=0))) as opened,
        looked_at(browser, opened, width=1280, scheme="light", path="#user=u03") as (page, _),
    ):
        shows(page, titles(opened, "beside", query_id="u03"))
        page.fill("#words", text)
        shows(page, titles(opened, "beside", query_id="u03", text=text))
        assert page.locator("#context").is_hidden() and page.locator("#query-label").inner_text() == "User id"


WORDS = ["item_tower.features=[{column: text, kind: text}]", "query_tower.hidden=[8]"]
