"""A small text table, for a terminal or a file."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

#: Characters of a terminal line.
WIDTH = 80


@dataclass(frozen=True)
class TextTable:
    """Cells of text: the first column left-aligned, the others right-aligned.

    Attributes:
        header: titles of the columns.
        rows: cells, equally many in each row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """Format as plain text."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.header))]
        return [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]

    def rich(self) -> Table:
        """Format for a rich console."""
        # Two characters between columns, as in `lines`: nine columns fit into 80 characters. A longer cell wraps to a
        # second line, because a truncated number would read as another number.
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for place, title in enumerate(self.header):
            table.add_column(title, justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def shortened(text: str, width: int) -> str:
    """Truncate text to the width if it is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"
