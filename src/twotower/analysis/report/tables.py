"""HTML tables that scroll sideways on a narrow page."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.analysis.report.markup import Html, h


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str | Html]], about: str, *, strong: Sequence[str] = ()
) -> Html:
    """Build a table whose first column names the rows.

    Args:
        heads: column headings.
        rows: cells.
        about: label for screen readers.
        strong: first cells of the rows to set in bold.
    """
    body = [
        h(
            "tr",
            h("th", row[0], scope="row"),
            [h("td", cell) for cell in row[1:]],
            class_="strong" if row[0] in strong else None,
        )
        for row in rows
    ]
    head = h("tr", [h("th", text, scope="col") for text in heads])
    return h(
        "div",
        h("table", h("thead", head), h("tbody", body)),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=about,
    )
