"""HTML and SVG elements whose text is always escaped, so that a title in the data can never become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

#: HTML elements without an end tag.
VOID = {"meta", "br", "hr", "col"}


class Html(str):
    """Text that is already markup. Only `h`, `join` and `raw` create it; other strings are escaped on insertion."""

    __slots__ = ()


Child = str | int | Iterable["Child"] | None


def h(element: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """Build an element.

    Args:
        element: tag name.
        children: text (escaped), elements, or nested lists of these; None is skipped.
        attributes: `class_` becomes class, `text_anchor` text-anchor; None and False are skipped, True has no value.
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
    """Concatenate children, escaping text."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int):
        return Html(html.escape(str(children)))
    return Html("".join(join(child) for child in children))


def raw(text: str) -> Html:
    """Mark text as trusted markup: a style sheet of this package, never anything from the data."""
    return Html(text)


def table(heads: Sequence[str], rows: Sequence[Sequence[str | Html]], about: str) -> Html:
    """Build a table whose first column names the rows.

    Args:
        heads: column headings.
        rows: cells.
        about: label for screen readers.
    """
    body = [h("tr", h("th", row[0], scope="row"), [h("td", cell) for cell in row[1:]]) for row in rows]
    head = h("tr", [h("th", text, scope="col") for text in heads])
    return h(
        "div",
        h("table", h("thead", head), h("tbody", body)),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=about,
    )
