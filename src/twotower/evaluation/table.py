"""A small table of text, for a terminal or a file."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

#: Characters of a terminal line.
WIDTH = 80


@dataclass(frozen=True)
class TextTable:
    """Cells of text: the first column to the left, the others to the right.

    Attributes:
        header: titles of the columns.
        rows: cells, as many in each row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """As plain text."""
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
        """For a rich console."""
        # Two characters between columns, as many as in `lines`: nine fit into 80. Where that is not enough a cell goes
        # on in a second line; cut off, a number would be another one.
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for place, title in enumerate(self.header):
            table.add_column(title, justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def shortened(text: str, width: int) -> str:
    """The text, cut to the width where it is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"
