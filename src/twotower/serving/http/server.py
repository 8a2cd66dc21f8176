"""Web server that reports its address once it is listening, and limits the time and memory of each connection.

uvicorn only closes connections that are idle between two requests. A connection that sends nothing, half a request
line, or a body that nobody reads stays open forever, and every new connection is accepted. The limits here are set in
`http.settings`; the middleware and the service limit the size of request bodies and responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import math
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from twotower.errors import InputError
from twotower.serving.http.problems import problem_body
from twotower.serving.http.settings import LARGEST_BODY, LARGEST_HEAD, LARGEST_REST, LINGER, ServiceSettings


class BoundedProtocol(HttpToolsProtocol):
    """HTTP protocol of one connection; limits the size of heads, the time they take, and the number of connections.

    One timer runs whenever no request is being answered; received bytes do not extend it. The first head must be
    complete within `head_seconds` of the connection. The first byte of a later head must arrive within `idle_seconds`
    of the last response, and the head must be complete within `head_seconds` of that byte. A second timer runs while
    the client is not reading the response.

    Args:
        limits: options of the service.
        args, kwargs: passed on to uvicorn's protocol.
    """

    def __init__(self, *args: Any, limits: ServiceSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._left = LARGEST_HEAD  # bytes still allowed for this head, or for the rest of this request
        self._begun = False  # a head has begun and is not complete
        self._timer: asyncio.TimerHandle | None = None
        self._unsent: asyncio.TimerHandle | None = None
        self._stopping = False

    @property
    def _answering(self) -> bool:
        """Return whether the application is answering a request."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer, or reject the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(503, "too many connections are open; try again", b"retry-after: 1\r\n")
            return
        self._limit(self._limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._limit(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count and parse received bytes; the parser alone would accept a head or trailers of any size."""
        self._left -= len(data)
        super().data_received(data)
        if self._left >= 0 or self.transport.is_closing():
            return
        if self._begun:
            self._refuse(431, f"the head of the request is too large; expected at most {LARGEST_HEAD:,} bytes")
        elif self._answering:
            self._refuse(413, f"the request is too large; expected a body of at most {LARGEST_BODY:,} bytes")
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Start the timer for a head."""
        super().on_message_begin()
        self._begun = True
        if not self._answering:
            self._limit(self._limits.head_seconds)

    def on_headers_complete(self) -> None:
        """Stop the timer for the head, and set the size limit for the rest, which includes the framing of chunks."""
        self._begun, self._left = False, LARGEST_REST
        self._limit(None)
        super().on_headers_complete()
        if self._stopping:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Start counting again for the next request."""
        self._left = LARGEST_HEAD
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the client to read the rest of the last response."""
        super().on_response_complete()
        if not self._answering:
            self._limit(self._limits.idle_seconds)

    def pause_writing(self) -> None:
        """Start the timer for the client to read the response."""
        super().pause_writing()
        self._unsent = self.loop.call_later(self._limits.idle_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer for the client to read the response."""
        if self._unsent is not None:
            self._unsent.cancel()
            self._unsent = None
        super().resume_writing()

    def shutdown(self) -> None:
        """Answer all requests that have arrived, including an unread one, then close."""
        self._stopping = True
        if self._answering:
            super().shutdown()
        else:
            self._limit(LINGER)

    def send_400_response(self, msg: str) -> None:
        """Send an error response to bytes that are not HTTP."""
        self._refuse(400, msg)

    def _refuse(self, status: int, detail: str, headers: bytes = b"") -> None:
        """Send an error response without calling the application, and close the connection."""
        body = problem_body(status, detail)
        head = b"content-type: application/problem+json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        self.transport.write(b"%b%b%b\r\n%b" % (STATUS_LINE[status], head, headers, body))
        self.transport.close()
        self._limit(self._limits.idle_seconds)

    def _limit(self, seconds: float | None) -> None:
        """Set the timer; None for no limit."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._expired)

    def _expired(self) -> None:
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for a client that reads nothing
        elif self._begun and not self._stopping:
            self._refuse(408, f"the head of the request did not arrive within {self._limits.head_seconds:g} seconds")
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """A web server that calls `opened(address)` once it is listening."""

    def __init__(self, config: uvicorn.Config, opened: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._opened = opened

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then report the address."""
        await super().startup(sockets)
        if self.started and self._opened is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._opened(f"http://{f'[{host}]' if ':' in host else host}:{port}/")


def server(
    app: Any, *, host: str, port: int, limits: ServiceSettings, opened: Callable[[str], None] | None = None
) -> Server:
    """Build a web server for an ASGI application.

    Args:
        app: the application.
        host: address to listen on.
        port: port to listen on; 0 for any free port.
        limits: options of the service.
        opened: called with the address of the page once the server is listening.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=functools.partial(BoundedProtocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # The time limits of the settings end every request within this time.
        timeout_graceful_shutdown=math.ceil(limits.body_seconds + limits.answer_seconds + limits.idle_seconds),
        timeout_keep_alive=math.ceil(limits.idle_seconds),
    )
    return Server(config, opened)


def run(
    app: Any, *, host: str, port: int, limits: ServiceSettings, opened: Callable[[str], None] | None = None
) -> None:
    """Serve an ASGI application until SIGINT or SIGTERM; see `server`.

    Raises:
        InputError: the address is in use or does not belong to this machine.
    """
    _check(host, port)
    # uvicorn raises KeyboardInterrupt again after an orderly shutdown; ignore it.
    with contextlib.suppress(KeyboardInterrupt):
        server(app, host=host, port=port, limits=limits, opened=opened).run()


def _check(host: str, port: int) -> None:
    """Raise an error if the address is not available; the server would only log it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise InputError(f"{host}:{port}: {'the port is in use; choose another --port' if in_use else error}") from None
