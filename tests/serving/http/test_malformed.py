"""Malformed requests as bytes on a socket: whatever arrives, no answer is a server error and the next one is right."""

import contextlib
import json
import math
import random
import re
import socket

import httpx
import pytest

from support.service_models import drawn, listening
from twotower.serving.http.app import ServiceSettings, create_app

WAIT = 200  # seconds, enough for a busy machine

BODIES = {
    "/recommend": {"query_id": "u001", "history": [1, 2], "k": 5, "filter": "title like 'item%'", "popularity": 1.0,
                   "exclude_seen": True, "context": {"a": 1}, "features": {"b": [1]}, "times": [1, 2], "model": None},
    "/similar": {"item": 3, "k": 4, "filter": "title is not null"},
    "/explain": {"query_id": "u001", "items": [1, 2], "popularity": 0.5, "history": [3]},
    "/page/places": {"items": [1, "2"]},
    "/reload": {},
}  # fmt: skip
PATHS = (*BODIES, "/items/1", "/items?text=item&k=3", "/models", "/metrics", "/healthz", "/page/map", "/page/card",
         "/page/queries?text=u", "/page/history?query_id=u001", "/static/page.js", "/openapi.json", "/")  # fmt: skip
TEXTS = ("", "u001", "\0", "\ud800", "\u202e", "é" * 90, "x" * 300, "x" * 30_000, "' OR 1=1 --", "../../etc/passwd",
         "{{7*7}}", "%s%n", "\r\nX: y", "1e999", "NaN", "(" * 900, "title = 'x", "title in (select 1)")  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, math.inf, math.nan)
JUNK = (b"\0", b"\x16\x03\x01", b"\xff\xfe", b"\r", b"\n", b"\r\n\r\n", b" ", b":", b"\t", b"%zz", b"\x80", b"#", b"?")


class Malformed:
    """Draws requests: valid ones with something changed, at the level of values, of JSON, or of HTTP."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def value(self, depth=3):
        kind = self.random.randrange(7 if depth else 4)
        if kind == 0:
            return self.random.choice(TEXTS)
        if kind == 1:
            return self.random.choice(NUMBERS)
        if kind == 2:
            return self.random.choice((None, True, False))
        if kind == 3:
            return self.random.choice(([], {}, [None] * 6000, [1] * 300, {str(n): n for n in range(300)}))
        if kind == 4:
            return {self.random.choice(TEXTS): self.value(depth - 1) for _ in range(self.random.randrange(4))}
        if kind == 5:
            nested = self.value(0)
            for _ in range(self.random.choice((1, 3, 40, 900))):
                nested = [nested] if self.random.random() < 0.5 else {"a": nested}
            return nested
        return [self.value(depth - 1) for _ in range(self.random.randrange(4))]

    def body(self, path):
        """JSON with some values changed, removed or added; or the text of it cut, or with bytes changed."""
        values = dict(BODIES.get(path, {}))
        if len(values) > 2:
            values = {name: one for name, one in values.items() if self.random.random() < 0.4}
        for _ in range(self.random.randrange(3)):
            name = self.random.choice((*BODIES.get(path, {}), *TEXTS[:6]))
            values[name] = self.value()
        whole = values if self.random.random() < 0.9 else self.value()
        text = json.dumps(whole, ensure_ascii=self.random.random() < 0.8).encode("utf-8", "surrogatepass")
        if self.random.random() < 0.3:
            text = self.changed(text)
        return text

    def changed(self, text):
        """Bytes with a part cut out, doubled, or replaced by junk."""
        if not text:
            return self.random.choice(JUNK)
        start = self.random.randrange(len(text))
        end = min(len(text), start + self.random.choice((1, 1, 3, 50)))
        middle = self.random.choice((b"", text[start:end] * 2, self.random.choice(JUNK), self.random.randbytes(5)))
        return text[:start] + middle + text[end:]

    def path(self):
        path = self.random.choice(PATHS).encode()
        kind = self.random.randrange(6)
        if kind == 0:
            return self.changed(path).replace(b" ", b"").replace(b"\n", b"").replace(b"\r", b"") or b"/"
        if kind == 1:
            name = self.random.choice((b"k", b"text", b"model", b"query_id", b"x", b"%00"))
            value = self.random.choice((b"", b"-1", b"%ff%00", b"9" * 400, b"a" * 5000, b"%F0%9F%98%80", b"u001", b"%"))
            return path + self.random.choice((b"?", b"&", b"#", b";")) + name + b"=" + value
        if kind == 2:
            return path + self.random.choice((b"/", b"//", b"/..", b"/%2e%2e/", b"/\xff", b"%", b"/." * 2000))
        return path

    def request(self):
        """The bytes of one request."""
        path = self.path()
        plain = path.partition(b"?")[0].decode("latin-1")
        method = b"POST" if plain in BODIES else b"GET"
        if self.random.random() < 0.15:
            method = self.random.choice((b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT", b"get",
                                         b"POST", b"GET", b"PRI", b"X" * 300, b"\0"))  # fmt: skip
        body = self.body(plain) if method in (b"POST", b"PUT", b"PATCH") or self.random.random() < 0.05 else b""
        headers = [b"Host: 127.0.0.1"]
        if body:
            headers.append(b"Content-Type: application/json")
            if self.random.random() < 0.15:
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
                headers.append(b"Transfer-Encoding: chunked")
                if self.random.random() < 0.5:
                    body = self.changed(body)
            else:
                headers.append(b"Content-Length: %d" % len(body))
        if self.random.random() < 0.3:
            headers.insert(self.random.randrange(len(headers) + 1), self.random.choice((
                b"Host: evil.example", b"Host: 127.0.0.1", b"Content-Length: -1", b"Content-Length: 1e9", b"X" * 40_000,
                b"Content-Length: 99999999999999999999", b"Transfer-Encoding: gzip, chunked", b"Expect: 100-continue",
                b"Connection: upgrade\r\nUpgrade: websocket", b"X: \xff\xfe", b": empty", b"no colon", b" folded: x",
                b"X : y", b"X\0: y", b"Content-Type: text/plain", b"Content-Encoding: gzip", b"Range: bytes=0-1",
                b"Authorization: Bearer \xff", b"If-None-Match: *", b"Cookie: " + b"a=b;" * 2000,
            )))  # fmt: skip
        version = self.random.choice((b"HTTP/1.1",) * 12 + (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"HTTP", b""))
        text = method + b" " + path + b" " + version + b"\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body
        if self.random.random() < 0.15:
            text = self.changed(text)
        if self.random.random() < 0.05:
            text = text[: self.random.randrange(len(text))]
        return text


def status(address, text):
    """Send bytes and the end of the stream; return the status of the answer, or None without one."""
    with socket.create_connection(address, timeout=WAIT) as line:
        received = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # refused before all bytes were sent
            line.sendall(text)
            line.settimeout(0.3)  # an unfinished request has no answer
            while b"\r\n" not in received:
                with contextlib.suppress(TimeoutError):
                    part = line.recv(65536)
                    if not part:
                        break
                    received += part
                    continue
                line.settimeout(WAIT)
                line.shutdown(socket.SHUT_WR)
    if not received:
        return None
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    assert found, received[:100]
    return int(found[1])


@pytest.fixture(scope="module")
def address(planted_data, tmp_path_factory):
    folder = drawn(planted_data, tmp_path_factory.mktemp("malformed") / "model")
    with listening(create_app([folder], ServiceSettings(hosts=("127.0.0.1",), watch_seconds=0))) as opened:
        yield opened


@pytest.mark.parametrize("count", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_malformed_requests_cause_no_server_error(address, count):
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    drawn_requests, seen = Malformed(count), {}
    for number in range(count):
        text = drawn_requests.request()
        found = status((host, int(port)), text)
        assert found is None or found < 500, (number, found, text[:3000])
        seen[found] = seen.get(found, 0) + 1
        if number % 50 == 0:
            assert httpx.get(f"{address}healthz", timeout=WAIT).status_code == 200
    # The generator reaches the parser, the routes, the schemas and the models; some of its requests are valid.
    assert {200, 400, 404, 405, 422, None} <= set(seen), seen
    answer = httpx.post(f"{address}recommend", json={"query_id": "u001", "k": 3}, timeout=WAIT)
    assert answer.status_code == 200 and len(answer.json()["items"]) == 3
    counted = httpx.get(f"{address}metrics", timeout=WAIT).text
    assert "twotower_requests_total" in counted and not re.search(r'twotower_requests_total\{.*status="5', counted)
