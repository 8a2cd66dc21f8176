"""The group and the time of a request on the page: fields of models that need them, in requests and in the address."""

from datetime import UTC, datetime

import httpx
import pytest

from support.browser_page import LAYOUT, WAIT, looked_at, shows
from support.markets import RULE, markets
from support.service_models import drawn, listening
from twotower.serving.http.app import ServiceSettings, create_app


@pytest.fixture(scope="module")
def address(planted_data, tmp_path_factory):
    """A service with a model that has markets and intervals, and one that has neither."""
    folder, data = tmp_path_factory.mktemp("page"), markets()
    names = {"groups": data.group_names.ids.to_list(), "account": data.account.to_dict()}
    models = [
        drawn(data, folder / "markets" / "model", changes=[RULE], data=names),
        drawn(planted_data, folder / "plain" / "model"),
    ]
    with listening(create_app(models, ServiceSettings(watch_seconds=0))) as opened:
        yield opened


def titles(address, **request):
    body = {"model": "markets", "query_id": 5, "k": 10, **request}
    response = httpx.post(f"{address}recommend", json=body, timeout=WAIT / 1000)
    assert response.status_code == 200, response.text
    return [f"item {one['item']}" for one in response.json()["items"]]


def test_the_page_asks_for_the_group_and_the_time(browser, address):
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M")
    first = {group: titles(address, group=group, time=now) for group in ("AT", "DE", "FR")}
    assert first["DE"] != first["FR"] != first["AT"]
    with looked_at(browser, address, path="#user=5&beside=") as (page, wrong):
        shows(page, first["AT"])
        assert page.locator("#group option").all_inner_texts() == ["AT", "DE", "FR"]
        page.get_by_label("Group").select_option("DE")
        shows(page, first["DE"])
        then = titles(address, group="DE", time="2024-02-01T00:00")
        assert then != first["DE"], "items 50 to 54 were still offered"
        page.get_by_label("Time of the request").fill("2024-02-01T00:00")
        shows(page, then)
        assert page.evaluate(LAYOUT)["wrong"] == []
        page.reload()
        shows(page, then)
        assert page.get_by_label("Group").input_value() == "DE"
        page.evaluate("location.hash = 'user=5&beside=&group=US'")
        page.locator("#group-refused").get_by_text("'US' is not a group of this model").wait_for()
        page.get_by_label("Group").select_option("FR")
        shows(page, first["FR"])
        page.select_option("#model-a", "plain")
        page.locator("#group-field").wait_for(state="hidden")
        assert page.locator("#time-field").is_hidden()
        wrong[:] = [one for one in wrong if "Failed to load resource" not in one]  # what the browser logs for a 4xx
