"""Text of data for a terminal: shown as it is, with nothing in it read as markup or as a command to the terminal."""

from __future__ import annotations

import re

from rich.text import Text

#: Control characters, lone surrogates, line separators, and marks that reverse the direction of the text after them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(value: object) -> str:
    r"""Return a value as text in which characters that a terminal would obey are written as escapes, such as `\x1b`.

    Example:
        >>> from twotower.system.terminal import plain
        >>> plain("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(value))


def cell(value: object) -> Text:
    """Return a cell of a table: floats with four decimals, everything else as `plain` text without markup."""
    return Text(f"{value:.4f}" if isinstance(value, float) else plain(value))
