"""Ids with commas, quotes, slashes and spaces can be asked for: over HTTP and on the command line."""

import json
import sys
from urllib.parse import quote

import polars as pl
import pytest

from support.service_models import client, drawn
from twotower.cli import main as cli
from twotower.data import Interactions

QUERIES = ["u,1", 'say "u"', "u/2", "u 3", "u&4=5#6", ",", "ü,é"]
ITEMS = ["a,b5", 'the "best"', "a/b", "two words", "100%", "?x=1", ";", "i#1", "café, noir", '5" pan']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rows = [(user, ITEMS[(n * 3 + step) % len(ITEMS)], 1_600_000_000 + 60 * step + n)
            for n, user in enumerate(QUERIES) for step in range(6)]  # fmt: skip
    data = Interactions.from_frame(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))
    return drawn(data, tmp_path_factory.mktemp("odd") / "model")


def test_over_http(folder):
    with client(folder) as service:
        for query in QUERIES:
            answer = service.post("/recommend", json={"query_id": query, "k": 3})
            assert answer.status_code == 200 and len(answer.json()["items"]) == 3
            found = service.get("/page/history", params={"query_id": query}).json()["items"]
            assert len(found) == 6 and {row["item"] for row in found} <= set(ITEMS)
        for item in ITEMS:
            assert service.get(f"/items/{quote(item, safe='')}").json()["item"] == item
            assert service.post("/similar", json={"item": item, "k": 2}).status_code == 200
            alone = service.post("/recommend", json={"history": [item], "k": 20}).json()["items"]
            assert {row["item"] for row in alone} == set(ITEMS) - {item}


def test_on_the_command_line(folder, monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["twotower", *words, "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        assert not stop.value.code, out.err
        return json.loads(out.out)

    for query in QUERIES:
        found = command("recommend", str(folder), "--query", query, "-k", "2")
        assert [row["query"] for row in found] == [query] * 2
    for item in ITEMS:
        written = '"' + item.replace('"', '""') + '"'  # as in CSV
        found = command("recommend", str(folder), "--history", f"{written}, {written}", "-k", "20")
        assert {row["item"] for row in found} == set(ITEMS) - {item}
        only = command("recommend", str(folder), "--query", "u,1", "--keep-seen", "--allow", written)
        assert [row["item"] for row in only] == [item]
        assert {row["of"] for row in command("similar", str(folder), "--item", item)} == {item}
    plain = command("recommend", str(folder), "--history", "a/b,two words", "-k", "20")
    assert {row["item"] for row in plain} == set(ITEMS) - {"a/b", "two words"}
