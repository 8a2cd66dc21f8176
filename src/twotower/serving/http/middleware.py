"""Middleware around every route: checks host, token, and body; adds headers, metrics and a log line."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.serving.http.logs import log
from twotower.serving.http.metrics import Metrics
from twotower.serving.http.problems import Problem, problem_answer
from twotower.serving.http.settings import LARGEST_BODY, ServiceSettings

#: Paths that are answered without a token, because they reveal nothing about the data.
OPEN = ("/", "/healthz", "/readyz", "/openapi.json")
OPEN_FOLDER = "/static/"

#: The page loads nothing from other hosts, and no other site may frame it.
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_WITH_BODY = ("POST", "PUT", "PATCH")

#: Headers that may occur only once. If there were two, this program and a proxy could each use a different one.
_SINGLE = ("host", "authorization", "content-type", "content-length")


class SecurityMiddleware:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        settings: token, allowed hosts and the time limit of a body.
        metrics: metrics that count every request.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._token = None if settings.token is None else settings.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, request_id = time.perf_counter(), uuid.uuid4().hex[:16]
        status = 500
        started = False
        # On every route, HEAD is GET without the response body.
        head = scope["method"] == "HEAD"
        routed = {**scope, "method": "GET"} if head else scope

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers[name] = value
                headers["X-Request-ID"] = request_id
                if "cache-control" not in headers:
                    headers["Cache-Control"] = "no-store"
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        failure: BaseException | None = None
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self.app(routed, receive if body is None else _replayed(body, receive), answer)
        except Problem as problem:
            await problem_answer(problem.status, problem.detail, problem.headers)(scope, receive, answer)
        except Exception as error:  # details must not reach the client
            failure = error
            if not started:
                await problem_answer(500, f"internal error; see request {request_id} in the log of the service")(
                    scope, receive, answer
                )
        finally:
            seconds = time.perf_counter() - began
            self._record(routed, status, seconds, request_id, failure, method=scope["method"])

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        for name in _SINGLE:
            if len(headers.getlist(name)) > 1:
                raise Problem(400, f"{name.title()}: expected once, found {len(headers.getlist(name))} times")
        if "host" not in headers and scope["http_version"] != "1.0":
            raise Problem(400, "Host: missing")
        if self.settings.hosts is not None and _name(headers.get("host", "")) not in self.settings.hosts:
            raise Problem(421, "Host: this name is not allowed; start the service with --allow-host NAME")
        if self._token is not None and not _is_open(scope["path"]):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)
            if scheme.lower() != "bearer" or not known:
                raise Problem(
                    401,
                    "Authorization: expected 'Bearer TOKEN' with the token of this service",
                    {"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] in _WITH_BODY:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and (kind or headers.get("content-length", "0") != "0"):
                # Another site cannot send this type without a preflight request.
                raise Problem(415, "Content-Type: expected application/json")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Read the whole body within the limits of size and time; None for a method without a body."""
        if scope["method"] not in _WITH_BODY:
            return None
        length = Headers(scope=scope).get("content-length")
        if length is not None and (not length.isdigit() or int(length) > LARGEST_BODY):
            raise _too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(400, "body: the connection closed before the end of the body")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > LARGEST_BODY:
                        raise _too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Problem(
                408, f"body: not received within {self.settings.body_seconds:g} seconds", {"Connection": "close"}
            ) from None

    def _record(
        self,
        scope: Mapping[str, Any],
        status: int,
        seconds: float,
        request_id: str,
        failure: BaseException | None,
        *,
        method: str,
    ) -> None:
        # Log the route template, never the path, which can contain an id.
        route = getattr(scope.get("route"), "path", None) or "none"
        if method not in ("GET", "HEAD", "OPTIONS", *_WITH_BODY, "DELETE"):
            method = "other"
        self.metrics.requests.labels(route, method, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        log(
            "request",
            level=logging.ERROR if status >= 500 and status != 503 else logging.INFO,
            error=failure,
            method=method,
            route=route,
            status=status,
            milliseconds=round(1000 * seconds, 2),
            request=request_id,
        )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Make a `receive` that returns the body again, followed by the client's next messages."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _name(host: str) -> str:
    """Return the name in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_FOLDER)


def _too_large() -> Problem:
    # The rest of the body is not read, so the connection cannot be reused.
    return Problem(413, f"body: expected at most {LARGEST_BODY:,} bytes", {"Connection": "close"})
