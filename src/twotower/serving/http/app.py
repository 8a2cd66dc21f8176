"""The HTTP service and its web page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from twotower.errors import InputError
from twotower.serving.http import logs, problems, server
from twotower.serving.http.middleware import SecurityMiddleware
from twotower.serving.http.page_routes import page
from twotower.serving.http.routes import api, operations
from twotower.serving.http.service import Service
from twotower.serving.http.settings import ServiceSettings, is_loopback

try:
    from fastapi import Depends, FastAPI
    from fastapi.security import HTTPBearer
except ImportError as error:  # pragma: no cover  # the tests install the extra
    raise InputError(f"serve: {error.name} is missing; install it with: pip install 'twotower[serve]'") from None

__all__ = ["ServiceSettings", "create_app", "serve"]


def create_app(directories: Sequence[str | Path], settings: ServiceSettings | None = None) -> FastAPI:
    """Create an ASGI application that serves model folders.

    Args:
        directories: model or run folders. Each model is named after its folder; the first model answers requests that
            do not name one.
        settings: options of the service.

    Returns:
        The application; `state.service` holds the models.

    Raises:
        InputError: a model cannot be read.
    """
    chosen = settings or ServiceSettings()
    service = Service([Path(directory) for directory in directories], chosen)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        loop, pending = asyncio.get_running_loop(), set[asyncio.Task[dict[str, str]]]()

        def hang_up() -> None:
            task = loop.create_task(service.reload())
            pending.add(task)
            task.add_done_callback(pending.discard)

        # Only the main thread may handle signals, and some systems have no SIGHUP.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):
            loop.add_signal_handler(signal.SIGHUP, hang_up)
        yield
        await service.stop()

    app = FastAPI(
        title="twotower",
        version=version("twotower"),
        description="Recommendations from trained two-tower models.",
        lifespan=lifespan,
        # The built-in documentation pages load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    guarded = [] if chosen.token is None else [Depends(HTTPBearer(auto_error=False))]
    app.include_router(operations)
    app.include_router(api, dependencies=guarded)
    app.include_router(page, dependencies=guarded)
    problems.install(app)
    app.add_middleware(SecurityMiddleware, settings=chosen, metrics=service.metrics)
    return app


def serve(
    directories: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServiceSettings | None = None,
    log_level: str = "info",
    opened: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then answer the requests in flight and return. SIGHUP loads changed models.

    Args:
        directories: see `create_app`.
        host: address to listen on.
        port: port to listen on; 0 for any free port.
        settings: options of the service.
        log_level: level of the log on standard output, one JSON object per line.
        opened: called with the address of the page once the server is listening.

    Raises:
        InputError: a model cannot be read, or the server cannot listen on the address.
    """
    app = create_app(directories, settings)
    logs.configure(log_level)
    if not is_loopback(host) and (settings is None or settings.token is None):
        logs.log(
            "no token is set: every client that reaches this address is answered", level=logging.WARNING, address=host
        )
    server.run(app, host=host, port=port, limits=settings or ServiceSettings(), opened=opened)
