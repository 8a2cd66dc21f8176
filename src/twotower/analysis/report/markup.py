"""Elements of HTML and SVG whose text is escaped by construction: a title in the data can never become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

#: Elements of HTML that have no end.
VOID = {"meta", "br", "hr", "col"}


class Html(str):
    """Text that is markup already. Only `h` and `raw` make it; every other string is escaped where it is put in."""

    __slots__ = ()


Child = str | int | Iterable["Child"] | None


def h(element: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        element: its name.
        children: text, which is escaped, elements, or nested lists of these; None is left out.
        attributes: `class_` becomes class, `text_anchor` text-anchor; None and False are left out, True has no value.
    """
    given = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        given.append(f" {name}" if value is True else f' {name}="{html.escape(text)}"')
    opened = f"<{element}{''.join(given)}>"
    return Html(opened if element in VOID else f"{opened}{join(children)}</{element}>")


def join(children: Child) -> Html:
    """Children one after the other, text escaped."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int):
        return Html(html.escape(str(children)))
    return Html("".join(join(child) for child in children))


def raw(text: str) -> Html:
    """Text that is known to be markup: a style sheet of this package, never anything from the data."""
    return Html(text)
