"""Request limits and service options."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from twotower.errors import InputError

#: Largest size of the request line and the headers, in bytes.
LARGEST_HEAD = 32 * 1024

#: Seconds that an idle connection stays open after the service is asked to stop, in case a request is still unread.
LINGER = 0.5

#: Largest request body in bytes. A history of `LONGEST_HISTORY` text ids of typical length fits.
LARGEST_BODY = 128 * 1024

#: Largest number of bytes after the headers: the body in chunks of any size, and trailers.
LARGEST_REST = 8 * LARGEST_BODY

#: Largest K that a request may ask for.
LARGEST_K = 1000

#: Longest history in items. Query towers read far fewer; older items are only excluded from the results. The limit is
#: generous because 40 of the 6,040 users of MovieLens-1M have more than a thousand items.
LONGEST_HISTORY = 5000

#: Longest condition on the item table, in characters.
LONGEST_FILTER = 1000

#: Maximum number of feature columns, or of context columns.
MOST_COLUMNS = 200

#: Longest id or search text, in characters.
LONGEST_ID = 200

#: Maximum number of items explained in one request; each item needs a pass over the catalog.
MOST_EXPLAINED = 20

#: Shortest token, in characters. A shorter one could be guessed.
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class ServiceSettings:
    """Options of a service.

    Attributes:
        token: token required in `Authorization: Bearer`; None to answer every client.
        hosts: names allowed in the `Host` header; None for any. This blocks requests from other sites whose
            names were made to resolve to this machine (DNS rebinding).
        queue: maximum number of waiting requests; further requests get a 503 with Retry-After.
        largest_batch: maximum number of requests searched together.
        connections: maximum number of open connections; further connections get a 503.
        head_seconds: seconds that a client may take to send the request line and the headers.
        body_seconds: seconds that a client may take to send a body.
        answer_seconds: seconds that a request may wait for its response, including the time in the queue and in worker
            threads.
        idle_seconds: seconds that a connection stays open without a request, or while its client does not read.
        watch_seconds: seconds between checks of the model folders; 0 for never.
    """

    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] | None = None
    queue: int = 512
    largest_batch: int = 128
    connections: int = 512
    head_seconds: float = 10.0
    body_seconds: float = 20.0
    answer_seconds: float = 60.0
    idle_seconds: float = 30.0
    watch_seconds: float = 1.0


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(bind: str, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names allowed in `Host`; None allows any name.

    A service bound to loopback accepts the names of this machine and the given names. Any other service accepts its
    address and the given names, or any name if none are given.
    """
    if is_loopback(bind):
        return ("localhost", "127.0.0.1", "[::1]", *names)
    return (bind, *names) if names else None


def read_token(file: Path | None, environment: str | None) -> str | None:
    """Read the token from a file, or from the environment if no file is given.

    Raises:
        InputError: the file cannot be read, or the token is too short or has characters that a header may not contain.
    """
    if file is None:
        token, where = environment, "TWOTOWER_TOKEN"
    else:
        where = str(file)
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{file}: the token cannot be read ({error}); expected a text file with one line"
            ) from None
    if token is None:
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or any(c.isspace() for c in token):
        raise InputError(
            f"{where}: expected a token of at least {SHORTEST_TOKEN} ASCII characters without spaces, found "
            f'{len(token)} characters; generate one with: python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token
