"""Error responses: RFC 9457 problem details, without stack traces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from twotower.errors import InputError
from twotower.serving.queries import UnknownIdError


class Problem(Exception):  # noqa: N818  # RFC 9457 calls it a problem
    """An error response to a request.

    Args:
        status: HTTP status.
        detail: what was found and what was expected; shown to the client.
        headers: additional headers of the response.
        field: path to the field of the body at fault, outermost name first; empty if unknown.
    """

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, field: Sequence[str] = ()
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})
        self.field = tuple(field)


def problem_body(status: int, detail: str, field: Sequence[str] = ()) -> bytes:
    """Write the JSON of an RFC 9457 problem, with `errors` (section 3) if a field is at fault."""
    values: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if field:
        values["errors"] = [{"detail": detail, "pointer": pointer(field)}]
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")


def pointer(names: Sequence[str]) -> str:
    """Write a JSON pointer (RFC 6901) as a URI fragment: `#/context/device`."""
    escaped = (name.replace("~", "~0").replace("/", "~1") for name in names)
    return "#" + "".join(f"/{quote(name.encode('utf-8', 'replace'), safe='~')}" for name in escaped)


def problem_answer(
    status: int, detail: str, headers: Mapping[str, str] | None = None, field: Sequence[str] = ()
) -> Response:
    """Make the HTTP response of a problem."""
    return Response(problem_body(status, detail, field), status, dict(headers or {}), "application/problem+json")


def install(app: FastAPI) -> None:
    """Install handlers that convert every kind of error to a problem response."""

    @app.exception_handler(Problem)
    async def _problem(_: Request, error: Problem) -> Response:
        return problem_answer(error.status, error.detail, error.headers, error.field)

    @app.exception_handler(UnknownIdError)
    async def _unknown(_: Request, error: UnknownIdError) -> Response:
        return problem_answer(404, str(error))

    @app.exception_handler(InputError)
    async def _input(_: Request, error: InputError) -> Response:
        return problem_answer(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        malformed = any(one["type"] == "json_invalid" for one in errors)
        return problem_answer(400 if malformed else 422, summary(errors))

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return problem_answer(error.status_code, str(error.detail), error.headers)


def summary(errors: Sequence[Any]) -> str:
    """Summarise the first few validation errors, each as `field: message`, without repeating values of the request."""
    parts: list[str] = []
    for error in errors:
        # A union appends the name of each branch to the field; a malformed body reports a position.
        place = [str(part) for part in error["loc"][1:] if "[" not in str(part) and "constrained" not in str(part)]
        place = [] if error["type"] == "json_invalid" else place
        part = f"{'.'.join(place) or str(error['loc'][0])}: {error['msg']}"
        if part not in parts:
            parts.append(part)
    return "; ".join(parts[:4])


#: Schema of error responses for OpenAPI.
PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "description": "Fields of the body at fault, by JSON pointer, if known.",
            "items": {
                "type": "object",
                "required": ["detail", "pointer"],
                "properties": {"detail": {"type": "string"}, "pointer": {"type": "string"}},
            },
        },
    },
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Build the OpenAPI entries for error statuses."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {"application/problem+json": {"schema": PROBLEM_SCHEMA}},
        }
        for status in statuses
    }
