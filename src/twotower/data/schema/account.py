"""The account of a data set: the numbers of rows read and dropped, with the reasons; each step adds lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Line:
    """One line of an account; `count` is None if the line has only a note."""

    label: str
    count: int | None
    note: str


@dataclass
class Account:
    """Lines of label, count and note, printed as aligned plain text."""

    lines: list[Line] = field(default_factory=list)

    def add(self, label: str, count: int | None = None, note: str = "") -> None:
        """Append a line."""
        self.lines.append(Line(label, None if count is None else int(count), note))

    def extend(self, other: Account | Iterable[Line]) -> None:
        """Append the lines of another account."""
        self.lines.extend(other.lines if isinstance(other, Account) else other)

    def count(self, label: str) -> int:
        """Return the count of the last line with this label; 0 if there is none."""
        return next((line.count or 0 for line in reversed(self.lines) if line.label == label), 0)

    def __str__(self) -> str:
        counts = ["" if line.count is None else f"{line.count:,}" for line in self.lines]
        wide = max((len(line.label) for line in self.lines), default=0)
        right = max(map(len, counts), default=0)
        return "\n".join(
            f"{line.label:<{wide}}  {count:>{right}}  {line.note}".rstrip()
            for line, count in zip(self.lines, counts, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {"lines": [{"label": x.label, "count": x.count, "note": x.note} for x in self.lines]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Account:
        """Restore from the result of `to_dict`."""
        return cls([Line(x["label"], x["count"], x["note"]) for x in data["lines"]])
