"""The context of a request on the page: a field for each column, its values in requests, and refusals at the field."""

import json
from dataclasses import replace

import httpx
import numpy as np
import polars as pl
import pytest

from support.browser_page import LAYOUT, WAIT, looked_at, shows, titles
from support.service_models import drawn, listening
from twotower.serving.http.app import ServiceSettings, create_app

COLUMNS = (
    "{column: device, kind: categorical}, {column: shop, kind: categorical, buckets: 50}, "
    "{column: basket, kind: numeric, scale: log}, {column: at, kind: timestamp, parts: [hour, weekday]}, "
    "{column: tags, kind: multi}, {column: search, kind: text, min_count: 1}, {column: place, kind: dense}"
)
CONTEXT = {
    "device": "phone",
    "shop": "north",
    "basket": 12.5,
    "at": "2024-06-03T19:15",
    "tags": ["new", "sale"],
    "search": "red shoes",
    "place": [0.5, -1],
}

CONTEXT_IN_ADDRESS = "new URLSearchParams(location.hash.slice(1)).get('context')"

#: Runs in the page; returns what reaches beyond the frame of the context fields.
OUTSIDE = """
() => {
  const frame = document.getElementById("context").getBoundingClientRect();
  return [...document.querySelectorAll("#context *")].filter(one => {
    const box = one.getBoundingClientRect();
    return box.width && (box.left < frame.left || box.right > frame.right);
  }).map(one => one.outerHTML);
}
"""


@pytest.fixture(scope="module")
def address(planted_data, tmp_path_factory):
    """A service with three models: one reads every context column, one reads a single column, one reads none."""
    folder, rows, random = tmp_path_factory.mktemp("page"), len(planted_data), np.random.default_rng(0)
    frame = pl.DataFrame({
        "device": random.choice(["desk", "phone", "tv"], rows),
        "shop": random.choice(["north", "south"], rows),
        "basket": random.random(rows) * 40,
        "at": random.integers(1_600_000_000, 1_700_000_000, rows),
        "tags": [["new", "sale", "old"][: int(n)] for n in random.integers(0, 4, rows)],
        "search": random.choice(["red shoes", "blue hat"], rows),
        "place": random.random((rows, 2)),
    })  # fmt: skip
    data = replace(planted_data, context=frame)
    columns = {"all": COLUMNS, "one": "{column: device, kind: categorical}"}
    changes = {name: [f"query_tower.context=[{declared}]"] for name, declared in columns.items()} | {"none": []}
    models = [drawn(data, folder / name / "model", changes=more) for name, more in changes.items()]
    with listening(create_app(models, ServiceSettings(watch_seconds=0))) as opened:
        yield opened


def fill(page):
    """Fill in every field of the first model, found by its label."""
    page.get_by_label("device").select_option("phone")
    page.get_by_label("shop").fill("north")
    page.get_by_label("basket").fill("12.5")
    page.get_by_label("at (UTC)").fill("2024-06-03T19:15")
    page.get_by_label("tags").fill("new, sale")
    page.locator("#context-fields").get_by_label("search").fill("red shoes")
    page.get_by_label("place").fill("0.5, -1")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), pytest.param(390, "dark", marks=pytest.mark.slow)])
def test_every_column_has_a_field_of_its_kind_whose_value_is_sent(browser, address, width, scheme):
    with looked_at(browser, address, width=width, scheme=scheme, path="#user=u003&beside=one") as (page, _):
        plain = titles(address, "all", query_id="u003")
        shows(page, plain)
        fields = page.locator("#context-fields .field")
        kinds = fields.locator("input, select").evaluate_all("all => all.map(one => one.type)")
        assert kinds == ["select-one", "text", "number", "datetime-local", "text", "text", "text"]
        labels = fields.locator("label").all_inner_texts()
        assert labels[0] == "device" and labels[1] == "shop · all only" and labels[3].startswith("at (UTC)")
        assert page.locator("#context-0 option").all_inner_texts() == ["unknown", "desk", "phone", "tv"]
        fill(page)
        in_context = titles(address, "all", query_id="u003", context=CONTEXT)
        assert in_context != plain
        shows(page, in_context)
        shows(page, titles(address, "one", query_id="u003", context={"device": "phone"}), "b")
        page.locator("#list-a .why em").first.wait_for()
        assert page.evaluate(LAYOUT)["wrong"] == [] and page.evaluate(OUTSIDE) == []

        # The address keeps the context. The keyboard clears it, and empty fields are not sent.
        page.reload()
        shows(page, in_context)
        assert page.get_by_label("basket").input_value() == "12.5"
        page.focus("#forget")
        page.keyboard.press("Enter")
        shows(page, plain)
        assert page.evaluate("document.activeElement.id") == "context-0"
        assert page.locator("#forget").is_hidden() and "context" not in page.evaluate("location.hash")

        # A model without context has no fields.
        page.select_option("#model-b", "")
        page.select_option("#model-a", "none")
        shows(page, titles(address, "none", query_id="u003"))
        assert page.locator("#context").is_hidden()


def test_a_refused_value_is_reported_at_its_field(browser, address):
    with looked_at(browser, address, path="#user=u003&beside=") as (page, wrong):
        shows(page, titles(address, "all", query_id="u003"))
        basket, message = page.get_by_label("basket"), page.locator("#context-2-refused")
        basket.fill("-5")
        message.get_by_text("Expected a number above -1 for scale: log, found -5").wait_for()
        assert basket.get_attribute("aria-invalid") == "true" and page.locator("#problem").is_hidden()
        assert page.get_by_role("alert").get_by_text("above -1").is_visible()
        assert page.locator("#list-a .nothing").inner_text().startswith("The request failed")
        page.get_by_label("place").fill("1, 2, 3")
        basket.fill("5")
        page.locator("#context-6-refused").get_by_text("2 numbers, found 3").wait_for()
        message.wait_for(state="hidden")
        assert basket.get_attribute("aria-invalid") is None
        page.get_by_label("place").fill("")
        shows(page, titles(address, "all", query_id="u003", context={"basket": 5}))
        # An incomplete value is not sent, and is reported when the field is left.
        basket.fill("")
        basket.press_sequentially("-")
        assert message.is_hidden()
        page.keyboard.press("Tab")
        message.get_by_text("expected a number").wait_for()
        shows(page, titles(address, "all", query_id="u003"))
        wrong[:] = [one for one in wrong if "Failed to load resource" not in one]  # what the browser logs for a 4xx


def test_a_context_alone_is_enough_for_a_request(browser, address):
    with looked_at(browser, address, path="#history=&beside=") as (page, _):
        page.locator("#list-a .nothing").wait_for()
        page.focus("#context-0")
        page.keyboard.press("t")  # selects the first value that begins with t
        shows(page, titles(address, "all", context={"device": "tv"}))
        page.get_by_role("button", name="Now, for at").click()
        page.wait_for_function(f"() => JSON.parse({CONTEXT_IN_ADDRESS}).at")
        now = page.get_by_label("at (UTC)").input_value()
        shows(page, titles(address, "all", context={"device": "tv", "at": now}))

        # Another address with the same models: the fields follow, and a value that no field can hold is dropped.
        page.evaluate("""location.hash = 'history=&beside=&context={"device": "none", "basket": "5"}'""")
        shows(page, titles(address, "all", context={"basket": 5}))
        assert page.get_by_label("basket").input_value() == "5" and page.get_by_label("at (UTC)").input_value() == ""
        assert json.loads(page.evaluate(CONTEXT_IN_ADDRESS)) == {"basket": "5"}
        response = httpx.post(f"{address}explain", json={"items": [3], "context": {"at": "soon"}}, timeout=WAIT / 1000)
        assert response.status_code == 422 and response.json()["errors"][0]["pointer"] == "#/context/at"
