"""Requests that the service refuses: the right status, a clear reason, no internal details."""

import contextlib
import json
import logging
import socket
import time

import pytest

from support.service_models import TOKEN, client, drawn, listening
from twotower.errors import InputError
from twotower.serving.http import settings
from twotower.serving.http.app import ServiceSettings, create_app
from twotower.serving.http.logs import JsonLines


@pytest.fixture(scope="module")
def folder(planted_data, tmp_path_factory):
    return drawn(planted_data, tmp_path_factory.mktemp("requests") / "model")


@pytest.fixture(scope="module")
def service(folder):
    with client(folder) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(folder):
    with client(folder, token=TOKEN) as made:
        yield made


def problem_detail(answer, status):
    """Check for a problem of this status, and return its detail; it must not reveal internals."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status and problem["detail"]
    assert "Traceback" not in answer.text and ".py" not in answer.text and "/somewhere/" not in answer.text
    return problem["detail"]


JSON = {"Content-Type": "application/json"}
U = {"query_id": "u001"}

HOSTILE = {
    "no body": ("/recommend", b"", 422, "body"),
    "not JSON": ("/recommend", b"{'k': 1}", 400, "JSON"),
    "cut off": ("/recommend", b'{"query_id": "u001"', 400, "JSON"),
    "not UTF-8": ("/recommend", b'{"query_id": "\xff\xfe"}', 400, ""),
    "deep": ("/recommend", b'{"features":' + b'{"a":' * 9000 + b"1" + b"}" * 9001, 400, ""),
    "a list": ("/recommend", b"[1, 2]", 422, ""),
    "null": ("/recommend", b"null", 422, ""),
    "a number of 5,000 digits": ("/recommend", b'{"query_id": ' + b"9" * 5000 + b"}", 400, ""),
    "an integer above 64 bits": ("/recommend", {"query_id": 2**70}, 404, "query_id"),
    "true as an id": ("/recommend", {"query_id": True}, 422, "query_id"),
    "a float as an id": ("/recommend", {"history": [1.5]}, 422, "history.0"),
    "an object as an id": ("/recommend", {"query_id": {"$gt": ""}}, 422, "query_id"),
    "an id of 201 characters": ("/recommend", {"query_id": "x" * 201}, 422, "query_id"),
    "half a surrogate": ("/recommend", b'{"query_id": "\\ud800"}', 422, ""),
    "a zero byte": ("/recommend", {"query_id": "u001\0"}, 404, "unknown to this model"),
    "an unknown id": ("/recommend", {"query_id": "' OR 1=1 --"}, 404, "unknown to this model"),
    "nothing asked": (
        "/recommend",
        {"k": 5},
        422,
        "expected query_id, history, text, features or context; found none of them",
    ),
    "an empty history": ("/recommend", {"history": []}, 422, "history"),
    "only unknown items": ("/recommend", {"history": ["../../etc/passwd", 10**12]}, 404, "none of its items"),
    "a long history": ("/recommend", {"history": [1] * 5001}, 422, "5000"),
    "k is 0": ("/recommend", {**U, "k": 0}, 422, "k: "),
    "k is negative": ("/recommend", {**U, "k": -1}, 422, "k: "),
    "k is huge": ("/recommend", {**U, "k": 10**9}, 422, "1000"),
    "k is text": ("/recommend", {**U, "k": "10"}, 422, "k: "),
    "k is a float": ("/recommend", {**U, "k": 10.5}, 422, "k: "),
    "the dial is NaN": ("/recommend", b'{"query_id": "u001", "popularity": NaN}', 422, "popularity"),
    "the dial is infinite": ("/recommend", b'{"query_id": "u001", "popularity": 1e999}', 422, "popularity"),
    "the dial is out of range": ("/recommend", {**U, "popularity": 2.1}, 422, "popularity"),
    "exclude_seen is text": ("/recommend", {**U, "exclude_seen": "no"}, 422, "exclude_seen"),
    "an unknown field": ("/recommend", {**U, "exclude": True}, 422, "exclude"),
    "features": ("/recommend", {**U, "features": {"age": 3}}, 422, "takes no features"),
    "an unknown model": ("/recommend", {**U, "model": "../other"}, 404, "model"),
    "an empty filter": ("/recommend", {**U, "filter": ""}, 422, "filter"),
    "a long filter": ("/recommend", {**U, "filter": "x" * 1001}, 422, "filter"),
    "a filter that is none": ("/recommend", {**U, "filter": "title ="}, 422, "filter"),
    "a filter on nothing there": ("/recommend", {**U, "filter": "password = 'x'"}, 422, "no column"),
    "a filter that asks a table": ("/recommend", {**U, "filter": "title in (select 1)"}, 422, "found '1' at character"),
    "a filter that reads a file": ("/recommend", {**U, "filter": "read_csv('/etc/passwd')"}, 422, "filter"),
    "a filter that is a number": ("/recommend", {**U, "filter": "1 + 1"}, 422, "filter"),
    "a deep filter": ("/recommend", {**U, "filter": "(" * 480 + "1=1" + ")" * 480}, 422, "filter"),
    "a body of 129 KiB": ("/recommend", {"history": ["x" * 200] * 650}, 413, "131,072"),
    "neighbours of nothing": ("/similar", {"item": "nothing"}, 404, "item"),
    "neighbours of many": ("/similar", {"item": [1, 2]}, 422, "item"),
    "explain nothing": ("/explain", {**U, "items": []}, 422, "items"),
    "explain too much": ("/explain", {**U, "items": list(range(21))}, 422, "items"),
    "explain the unknown": ("/explain", {**U, "items": [1, "x"]}, 404, "items"),
    "reload without a token": ("/reload", {}, 403, "token"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_gets_the_right_4xx(service, name):
    path, body, status, part = HOSTILE[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert part in problem_detail(service.post(path, content=content, headers=JSON), status)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/recommend", {"Content-Type": "text/plain"}, 415),  # what a form on another site could send
        ("POST", "/recommend", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/recommend", {**JSON, "Content-Length": "99999999"}, 413),
        ("POST", "/recommend", {**JSON, "Content-Length": "-1"}, 413),
        ("POST", "/recommend", {**JSON, "Host": "evil.example"}, 421),  # DNS rebinding
        ("GET", "/items/1", {"Host": "localhost.evil.example"}, 421),
        ("PUT", "/recommend", JSON, 405),
        ("GET", "/recommend", {}, 405),
        ("GET", "/items/nothing", {}, 404),
        ("GET", "/items/..%2f..%2fetc%2fpasswd", {}, 404),
        ("GET", "/items/" + "9" * 4000, {}, 404),
        ("GET", "/items/%ff%00", {}, 404),
        ("GET", "/items?text=", {}, 422),
        ("GET", "/items?text=a&k=1000000", {}, 422),
        ("GET", "/items?text=" + "a" * 201, {}, 422),
        ("GET", "/static/../app.py", {}, 404),
        ("GET", "/static/..%2fapp.py", {}, 404),
        ("GET", "/page/history?query_id=nobody", {}, 404),
        ("GET", "/page/map?model=none", {}, 404),
        ("GET", "/docs", {}, 404),
        ("GET", "/.env", {}, 404),
    ],
)
def test_a_hostile_address_or_header_gets_the_right_4xx(service, method, path, headers, status):
    body = b"{}" if method in ("POST", "PUT") else None
    problem_detail(service.request(method, path, headers=headers, content=body), status)


def test_a_token_is_required_except_on_public_paths(guarded):
    for given in ("", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer \xe4".encode("latin-1")):
        headers = {"Authorization": given}
        answer = guarded.post("/recommend", json=U, headers=headers)
        problem_detail(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    bare = {"Authorization": ""}
    for path in ("/models", "/items/1", "/metrics", "/page/map", "/page/card", "/page/queries", "/nothing"):
        problem_detail(guarded.get(path, headers=bare), 401)
    problem_detail(guarded.post("/reload", json={}, headers=bare), 401)
    for path in ("/", "/static/page.js", "/healthz", "/readyz", "/openapi.json"):
        assert guarded.get(path, headers=bare).status_code == 200
    assert guarded.post("/recommend", json=U).status_code == 200
    assert list(guarded.post("/reload", json={}).json()["models"].values()) == ["unchanged"]


def test_every_response_has_the_security_headers(service):
    for answer in (service.get("/"), service.get("/static/page.css"), service.get("/nothing"), service.get("/models")):
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers and "access-control-allow-origin" not in answer.headers


def test_an_internal_error_reveals_nothing_and_is_logged_without_ids(service, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("something about u001 in /somewhere/secret")

    lines = []
    monkeypatch.setattr("twotower.serving.queries.stored_history", broken)
    with caplog.at_level(logging.INFO, logger="twotower.service"):
        detail = problem_detail(service.post("/recommend", json=U), 500)
        service.get("/items/17")
        service.get("/page/history", params={"query_id": "u002"})
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "twotower.service"]
    failed, item, _ = lines
    assert failed["request"] in detail and (failed["status"], failed["exception"]) == (500, "RuntimeError")
    assert any("broken" in frame for frame in failed["at"])
    assert (item["route"], item["status"], item["method"]) == ("/items/{item_id:path}", 200, "GET")
    text = json.dumps(lines)
    assert not any(word in text for word in ("u001", "u002", "/items/17", "secret", "testclient", "127.0.0.1"))


def test_a_full_queue_answers_503_with_retry_after(folder):
    with client(folder, queue=1, watch_seconds=0) as small:
        batcher = small.app.state.service._batcher
        batcher._count = 1
        answer = small.post("/recommend", json=U)
        assert answer.headers["retry-after"] == "1"
        problem_detail(answer, 503)
        batcher._count = 0
        assert small.post("/recommend", json=U).status_code == 200


def raw(address, data):
    """Send bytes and return the first bytes received."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=200) as line:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # refused before all bytes were sent
            line.sendall(data)
        return line.recv(4096)


def test_invalid_http_is_refused(folder):
    """Raw bytes: not HTTP, endless headers, bodies without a length that are too large or never arrive."""
    app = create_app([folder], ServiceSettings(hosts=("127.0.0.1",), body_seconds=0.5, watch_seconds=0))
    post = b"POST /recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with listening(app) as address:
        assert b" 400 " in raw(address, b"\x16\x03\x01 no http\r\n\r\n")
        assert b" 431 " in raw(address, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 40_000)
        assert b" 431 " in raw(address, b"GET /" + b"a" * 40_000)
        chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
        assert b" 413 " in raw(address, post + b"Transfer-Encoding: chunked\r\n\r\n" + 33 * chunk)
        began = time.monotonic()
        assert b" 408 " in raw(address, post + b"Content-Length: 100\r\n\r\n{")
        assert time.monotonic() - began < ServiceSettings().body_seconds, "the time limit that was set, not the default"
        assert b" 200 " in raw(address, post + b"Content-Length: 21\r\n\r\n" + b'{"query_id": "u001" }')


@pytest.mark.parametrize("text", ["short", "x" * 15, "two words in one token", "ümlaut-in-a-long-token"])
def test_a_bad_token_is_refused_at_the_start(tmp_path, text):
    file = tmp_path / "token"
    file.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="expected a token of at least 16"):
        settings.read_token(file, None)
    assert settings.read_token(None, None) is None
    with pytest.raises(InputError, match="cannot be read"):
        settings.read_token(tmp_path / "nothing", None)
    file.write_text(TOKEN + "\n", encoding="utf-8")
    assert settings.read_token(file, "another one of some length") == TOKEN


def test_loopback_allows_only_the_names_of_this_machine():
    assert settings.allowed_hosts("127.0.0.1", ()) == ("localhost", "127.0.0.1", "[::1]")
    assert settings.allowed_hosts("0.0.0.0", ()) is None
    assert settings.allowed_hosts("0.0.0.0", ("a.example",)) == ("0.0.0.0", "a.example")
    assert not settings.is_loopback("10.0.0.1") and settings.is_loopback("::1")
