"""What a service may be asked and how much it holds: limits that requests are checked against, and options."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from twotower.errors import InputError

#: Bytes of a request's body. A history of `LONGEST_HISTORY` text ids of usual length fits well.
LARGEST_BODY = 128 * 1024

#: K of a request.
LARGEST_K = 1000

#: Items of a history. Query towers look at far fewer, the rest is only left out of the answer; but of the 6,040 people
#: of MovieLens-1M, 40 have more than a thousand.
LONGEST_HISTORY = 5000

#: Characters of a condition on the item table.
LONGEST_FILTER = 1000

#: Characters of an id, and of a text to look for.
LONGEST_ID = 200

#: Items explained in one request: each is a pass over the catalog.
MOST_EXPLAINED = 20

#: Characters of a token. Fewer could be guessed.
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class ServiceSettings:
    """Options of a service.

    Attributes:
        token: what `Authorization: Bearer` has to carry; None where anybody may ask.
        hosts: names that the `Host` header may have; None for any. A page from elsewhere whose name is made to point
            at this machine carries its own name, and is refused.
        queue: requests that may wait; further ones are answered 503 with Retry-After.
        largest_batch: requests searched at once.
        body_seconds: how long a client may take to send a body.
        watch_seconds: how often the model folders are looked at; 0 for never.
    """

    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] | None = None
    queue: int = 512
    largest_batch: int = 128
    body_seconds: float = 20.0
    watch_seconds: float = 1.0


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(bind: str, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names that `Host` may have: those given, besides this machine's own where it is bound to them."""
    if is_loopback(bind):
        return ("localhost", "127.0.0.1", "[::1]", *names)
    return (bind, *names) if names else None


def read_token(file: Path | None, environment: str | None) -> str | None:
    """The token of a file, or of the environment where no file is given.

    Raises:
        InputError: the file cannot be read, or the token is short or holds what a header cannot carry.
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
            f'{len(token)} characters; make one with: python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token
