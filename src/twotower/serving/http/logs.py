"""Logs as one JSON object per line: events and durations, never clients or ids."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

logger = logging.getLogger("twotower.service")


class JsonLines(logging.Formatter):
    """A log formatter that writes one JSON object per record.

    Only the type and the stack frames of an exception are written, because its message could contain an id.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            values["exception"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            values["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
        return json.dumps(values, ensure_ascii=False, default=str)


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Send the logs of the service and of the web server to one stream (standard output), as JSON."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonLines())
    for name in ("twotower.service", "uvicorn", "uvicorn.error"):
        one = logging.getLogger(name)
        one.handlers = [handler] if name != "uvicorn.error" else []
        one.propagate = name == "uvicorn.error"
        one.setLevel(level.upper())
    # The access log contains addresses and full paths, with ids; the service logs requests itself.
    access = logging.getLogger("uvicorn.access")
    access.handlers, access.propagate = [], False


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Write one log line."""
    logger.log(level, event, extra={"fields": fields}, exc_info=error)
