"""Display of data as plain text in a terminal: no part of it acts as markup or as a control sequence."""

from __future__ import annotations

import re

from rich.text import Text

#: Control characters, lone surrogates, line separators, and marks that change the direction of the following text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(value: object) -> str:
    r"""Convert a value to text, and escape characters that a terminal would interpret, for example as `\x1b`.

    Example:
        >>> from twotower.system.terminal import plain
        >>> plain("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(value))


def cell(value: object) -> Text:
    """Format a table cell: floats with four decimals, everything else as `plain` text without markup."""
    return Text(f"{value:.4f}" if isinstance(value, float) else plain(value))
