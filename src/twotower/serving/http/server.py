"""A web server that reports its address once it listens, and limits the size of request headers."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from twotower.errors import InputError

#: Largest size of the request line and the headers, in bytes.
LARGEST_HEAD = 32 * 1024

#: Seconds that requests in flight may take after the service is asked to stop.
GRACE = 20

#: Seconds that an idle connection stays open.
KEEP_ALIVE = 30


class BoundedProtocol(HttpToolsProtocol):
    """HTTP protocol with a limit on the headers; the parser alone would buffer them without limit."""

    _head = 0

    def data_received(self, data: bytes) -> None:
        """Count and parse received bytes."""
        self._head += len(data)
        super().data_received(data)
        if self._head > LARGEST_HEAD and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        """Stop counting: the head is complete, and the size of the body is checked elsewhere."""
        self._head = -(2**62)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Start counting again for the next request."""
        self._head = 0
        super().on_message_complete()


class Server(uvicorn.Server):
    """A web server that calls `opened(address)` once it listens."""

    def __init__(self, config: uvicorn.Config, opened: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._opened = opened

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then report the address."""
        await super().startup(sockets)
        if self.started and self._opened is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._opened(f"http://{f'[{host}]' if ':' in host else host}:{port}/")


def server(app: Any, *, host: str, port: int, opened: Callable[[str], None] | None = None) -> Server:
    """Build a web server for an ASGI application.

    Args:
        app: the application.
        host: address to listen on.
        port: port to listen on; 0 for any free port.
        opened: called with the address of the page once the server is listening.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=KEEP_ALIVE,
    )
    return Server(config, opened)


def run(app: Any, *, host: str, port: int, opened: Callable[[str], None] | None = None) -> None:
    """Serve an ASGI application until SIGINT or SIGTERM; see `server`.

    Raises:
        InputError: the address is in use or does not belong to this machine.
    """
    _check(host, port)
    # uvicorn raises KeyboardInterrupt again after an orderly shutdown; ignore it.
    with contextlib.suppress(KeyboardInterrupt):
        server(app, host=host, port=port, opened=opened).run()


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
