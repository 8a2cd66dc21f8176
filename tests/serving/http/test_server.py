"""Connections that are idle, half sent, too many or not read; HEAD; and requests that are in flight at the end."""

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest

from support.service_models import client, drawn, listening
from twotower.serving.http.app import ServiceSettings, create_app

WAIT = 200  # seconds, enough for a busy machine
HEAD = b"Host: 127.0.0.1\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HEAD + b"\r\n"
JSON = b"Content-Type: application/json\r\n"
ASK = json.dumps({"query_id": "u001", "k": 3}).encode()
POST = b"POST /recommend HTTP/1.1\r\n" + HEAD + JSON


@pytest.fixture(scope="module")
def folder(planted_data, tmp_path_factory):
    return drawn(planted_data, tmp_path_factory.mktemp("server") / "model")


def app(folder, **options):
    return create_app([folder], ServiceSettings(hosts=("127.0.0.1",), watch_seconds=0, **options))


@contextlib.contextmanager
def line(address):
    """Open a connection of bytes."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as opened:
        yield opened


def rest(opened):
    """Everything that is received until the service closes the connection; None if it resets it."""
    parts = []
    try:
        while part := opened.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        return b"".join(parts) or None
    return b"".join(parts)


def one_answer(opened):
    """Receive one response with a length."""
    text = b""
    while b"\r\n\r\n" not in text:
        part = opened.recv(65536)
        assert part, "closed without an answer"
        text += part
    head, _, body = text.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += opened.recv(65536)
    return head, body


SHORT = {"head_seconds": 0.4, "body_seconds": 0.4, "idle_seconds": 0.4}

#: What is sent, and the status of the answer before the service closes the connection; None for no answer.
HALF_SENT = {
    "nothing": ([], None),
    "half a request line": ([b"GET /hea"], 408),
    "half the headers": ([b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Part: a"], 408),
    "a header that never ends, byte by byte": ([b"GET / HTTP/1.1\r\nX: "] + [b"a"] * 300, 408),
    "line ends before a request, one by one": ([b"\r\n"] * 300, None),
    "half a body": ([POST + b"Content-Length: 100\r\n\r\n{"], 408),
    "a body, byte by byte": ([POST + b"Content-Length: 1000\r\n\r\n"] + [b" "] * 300, 408),
    "half a chunk": ([POST + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{"], 408),
    "the body of a refused request, byte by byte": (
        [b"POST /recommend HTTP/1.1\r\n" + HEAD + b"Content-Type: text/plain\r\nContent-Length: 1000\r\n\r\n"]
        + [b" "] * 300,
        415,
    ),
    "a body that nobody reads": ([b"GET /healthz HTTP/1.1\r\n" + HEAD + b"Content-Length: 9\r\n\r\n"], 200),
    "a second head": ([GET, b"GET /"], 200),
}


@pytest.mark.parametrize("name", HALF_SENT)
def test_a_half_sent_request_is_closed(folder, name):
    """Each byte by byte case sends for longer than the limit: received bytes do not postpone it."""
    parts, status = HALF_SENT[name]
    with listening(app(folder, **SHORT)) as address, line(address) as opened:

        def send():
            with contextlib.suppress(OSError):
                for part in parts:
                    opened.sendall(part)
                    time.sleep(0.01)

        sender = threading.Thread(target=send)
        sender.start()
        received = rest(opened)
        sender.join()
    if status is None:
        assert not received
    else:
        assert received is not None and received.startswith(b"HTTP/1.1 %d " % status), received


def test_a_connection_is_used_again_and_closed_when_idle(folder):
    with listening(app(folder, idle_seconds=0.4)) as address, line(address) as opened:
        for _ in range(3):
            opened.sendall(GET)
            assert one_answer(opened)[0].startswith(b"HTTP/1.1 200")
        assert rest(opened) == b""


def test_trailers_without_end_are_refused(folder):
    """The parser would keep them in memory, whatever the limit of the body."""
    with listening(app(folder)) as address, line(address) as opened:
        opened.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(40):
                opened.sendall(b"X: " + b"a" * 65536 + b"\r\n")
        received = rest(opened)
        assert received is None or b" 413 " in received.partition(b"\r\n")[0]


def test_a_client_that_reads_nothing_is_dropped(folder):
    """Its answers fill the buffers of both sides; the connection is aborted, because closing would wait for it."""
    with listening(app(folder, idle_seconds=0.5, connections=1)) as address, line(address) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.settimeout(0.5)
        with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            for _ in range(2000):
                opened.sendall(b"GET /static/page.css HTTP/1.1\r\n" + HEAD + b"\r\n")
        answered(address)


def answered(address):
    """Wait until the service has room for another connection."""
    end = time.monotonic() + WAIT
    while httpx.get(f"{address}healthz", timeout=WAIT).status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_number_of_connections_is_limited(folder):
    with listening(app(folder, connections=3)) as address, contextlib.ExitStack() as stack:
        opened = [stack.enter_context(line(address)) for _ in range(3)]
        for one in opened:
            one.sendall(GET)
            assert b"200" in one_answer(one)[0]
        with line(address) as more:
            head, body = one_answer(more)
            assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in head
            assert "too many connections" in json.loads(body)["detail"]
            assert rest(more) == b""
        opened[0].close()
        answered(address)
        opened[1].sendall(GET)
        assert b"200" in one_answer(opened[1])[0], "those that are open are not disturbed"


@pytest.mark.parametrize(
    "headers",
    [
        HEAD + HEAD,
        HEAD + b"Host: evil.example\r\n",
        b"",
        HEAD + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n",
        HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
    ],
)
def test_headers_that_two_programs_could_read_in_two_ways_are_refused(folder, headers):
    with listening(app(folder)) as address, line(address) as opened:
        opened.sendall(b"GET /healthz HTTP/1.1\r\n" + headers + b"\r\n")
        assert one_answer(opened)[0].startswith(b"HTTP/1.1 400 ")
    with client(folder) as service:
        twice = service.post("/recommend", content=ASK, headers=[("Content-Type", "application/json")] * 2)
        assert twice.status_code == 400 and "Content-Type" in twice.json()["detail"]


def test_head_is_get_without_a_body(folder):
    with client(folder) as service:
        paths = [path for path, of in service.get("/openapi.json").json()["paths"].items() if "get" in of]
        assert len(paths) > 8
        for path in ["/", "/static/page.js", "/nothing", *paths]:
            params = {"text": "item", "query_id": "u001"}
            url = path.replace("{item_id}", "1")
            full, head = service.get(url, params=params), service.request("HEAD", url, params=params)
            assert (head.status_code, head.content) == (full.status_code, b""), path
            assert head.headers["content-type"] == full.headers["content-type"]
            if path not in ("/metrics", "/page/queries"):  # these differ from one request to the next
                assert head.headers["content-length"] == full.headers["content-length"], path
        refused = service.request("HEAD", "/recommend")
        assert refused.status_code == 405 and refused.headers["allow"] == "POST"
    with listening(app(folder)) as address, line(address) as opened:
        opened.sendall(GET.replace(b"GET", b"HEAD") + GET)
        head = opened.recv(65536).partition(b"\r\n\r\n")
        assert head[0].startswith(b"HTTP/1.1 200") and not head[2].startswith(b"{")


def test_one_time_limit_for_the_whole_answer(folder):
    """A slow filter and a slow search together: each would be in time alone."""
    with client(folder, answer_seconds=1.5) as service:
        served = service.app.state.service.models.model(None)
        inner, embed = served.condition, served.retriever.embed

        def slow(work):
            return lambda *args, **kwargs: (time.sleep(1.0), work(*args, **kwargs))[1]

        served.condition, served.retriever.embed = slow(inner), slow(embed)
        answer = service.post("/recommend", json={"query_id": "u001", "filter": "title <> ''"})
        assert answer.status_code == 503 and "no answer within 1.5 seconds" in answer.json()["detail"]


def test_a_stop_answers_what_has_been_taken(folder):
    """A search in flight, a body in flight, and requests behind it on the same connection: all are answered."""
    made = app(folder)
    served = made.state.service.models.model(None)
    entered, release = threading.Event(), threading.Event()
    embed = served.retriever.embed

    def held(*args, **kwargs):
        entered.set()
        assert release.wait(WAIT)
        return embed(*args, **kwargs)

    served.retriever.embed = held
    ask = POST + b"Content-Length: %d\r\n\r\n" % len(ASK) + ASK
    with contextlib.ExitStack() as stack:
        address, stop = stack.enter_context(stoppable(made))
        searching, sending, idle = (stack.enter_context(line(address)) for _ in range(3))
        for one in (searching, sending, idle):
            one.sendall(GET)
            one_answer(one)
        searching.sendall(ask)
        assert entered.wait(WAIT)
        sending.sendall(ask[:-5])
        time.sleep(0.1)
        stop(lambda: idle.sendall(ask))  # arrives before the stop, and is read after it
        sending.sendall(ask[-5:])
        time.sleep(0.1)
        release.set()
        for one in (searching, sending, idle):
            head, body = one_answer(one)
            assert head.startswith(b"HTTP/1.1 200") and len(json.loads(body)["items"]) == 3
            assert b"connection: close" in head and rest(one) == b""


@contextlib.contextmanager
def stoppable(made):
    """Run the web server; yields its address and a function that begins its stop.

    The function holds the event loop while it calls what it is given, so that bytes sent there are unread when the stop
    begins.
    """
    from twotower.serving.http.server import server

    opened, addresses = threading.Event(), []
    one = server(
        made,
        host="127.0.0.1",
        port=0,
        limits=made.state.service.settings,
        opened=lambda address: (addresses.append(address), opened.set()),
    )
    thread = threading.Thread(target=one.run)
    thread.start()

    def stop(send):
        held, sent = threading.Event(), threading.Event()

        def hold():
            held.set()
            sent.wait(WAIT)
            for connection in list(one.server_state.connections):
                connection.shutdown()
            one.should_exit = True

        one.servers[0].get_loop().call_soon_threadsafe(hold)
        assert held.wait(WAIT)
        send()
        sent.set()

    try:
        assert opened.wait(WAIT)
        yield addresses[0], stop
    finally:
        one.should_exit = True
        thread.join(WAIT)
    assert not thread.is_alive()
