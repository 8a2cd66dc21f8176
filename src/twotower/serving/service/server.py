"""The web server around the application: it says where it listens, and bounds what it reads before a request is one."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from twotower.errors import InputError

#: Bytes of the first line and the headers of a request.
LARGEST_HEAD = 32 * 1024

#: Seconds that requests in flight have when the service is told to end.
GRACE = 20

#: Seconds that an idle connection is kept.
KEEP_ALIVE = 30


class BoundedProtocol(HttpToolsProtocol):
    """HTTP whose headers have an end: the parser alone would gather them until the memory is full."""

    _head = 0

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        self._head += len(data)
        super().data_received(data)
        if self._head > LARGEST_HEAD and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        """The head is here; what follows is a body, which is counted elsewhere."""
        self._head = -(2**62)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request may begin."""
        self._head = 0
        super().on_message_complete()


class Server(uvicorn.Server):
    """A web server that says where it listens: `opened(address)`."""

    def __init__(self, config: uvicorn.Config, opened: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._opened = opened

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say where."""
        await super().startup(sockets)
        if self.started and self._opened is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._opened(f"http://{f'[{host}]' if ':' in host else host}:{port}/")


def server(app: Any, *, host: str, port: int, opened: Callable[[str], None] | None = None) -> Server:
    """A web server for an ASGI application.

    Args:
        app: the application.
        host: address to listen on.
        port: port; 0 for any free one.
        opened: called with the address of the page once it can be asked.
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
        InputError: the address is taken or is not one of this machine's.
    """
    _check(host, port)
    # Ctrl-C is raised once more after everything has ended in order; nobody needs to hear of it again.
    with contextlib.suppress(KeyboardInterrupt):
        server(app, host=host, port=port, opened=opened).run()


def _check(host: str, port: int) -> None:
    """Say in one line that an address cannot be had; the server would only log it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise InputError(
            f"{host}:{port}: {'another program listens there; choose another --port' if taken else error}"
        ) from None
