"""Scales, ticks, marks and labels for figures, drawn twice: for wide and for narrow pages.

Figures are written as SVG by hand instead of with matplotlib. Their colours are variables of the page's style sheet, so
they follow light, dark and print modes. A figure on a phone has its own layout, with text of the same size. The report
needs no extra package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twotower.analysis.report.markup import Html, h

#: Layout widths of figures in CSS pixels.
WIDE, NARROW = 860, 350
#: Text size of figures in pixels, as in the style sheet.
TEXT = 13
#: Width of a character of a wide sans-serif font, relative to the font size.
_ADVANCE = 0.6
#: Width of bold text relative to regular text.
_STRONG = 1.12
_NARROW_CHARACTERS = frozenset("iljtfr.,:;'|!()[] -")


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.stop - self.start)


@dataclass(frozen=True)
class Box:
    """The rectangle that a label or mark occupies."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box, gap: float = 2.0) -> bool:
        """Return whether two rectangles overlap or come closer than `gap`."""
        return (
            self.left < other.right + gap
            and other.left < self.right + gap
            and self.top < other.bottom + gap
            and other.top < self.bottom + gap
        )

    def within(self, other: Box) -> bool:
        """Return whether the rectangle lies inside another."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def text_width(text: str, size: float = TEXT, *, strong: bool = False) -> float:
    """Estimate the width of a text from above; most browser fonts are narrower."""
    size *= _STRONG if strong else 1.0
    return sum(0.42 if character in _NARROW_CHARACTERS else _ADVANCE + 0.04 for character in text) * size


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Choose round numbers in [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / max(most, 1)))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def plain(value: float) -> str:
    """Format a tick without needless digits."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return minus(f"{value / 1000:,.0f}k")
    return minus(f"{value:.6g}" if abs(value) >= 1e-4 else f"{value:.0e}")


def minus(text: str) -> str:
    """Replace the hyphen of a number by a minus sign."""
    return text.replace("-", "−")


def wrapped(text: str, width: float, size: float = TEXT) -> list[str]:
    """Break a name into lines at hyphens and spaces."""
    lines = [""]
    for part in text.replace("-", "-\0").replace(" ", " \0").split("\0"):
        if lines[-1] and text_width(lines[-1] + part.rstrip(), size) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def label(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> Html:
    """Draw text; `kind` names a style: `muted`, `strong`, `small`."""
    return h("text", text, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=kind or None)


def axis_name(x: float, y: float, text: str, width: int) -> list[Html]:
    """Draw the name of a horizontal axis, centred at x and wrapped to the width."""
    reach = 2 * min(x, width - x)
    return [label(x, y + 16 * place, part, "middle", "muted") for place, part in enumerate(wrapped(text, reach))]


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    """Draw a straight line in a style."""
    return h("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=kind)


def path(points: Sequence[tuple[float, float]], kind: str) -> Html:
    """Draw a line through points."""
    steps = " ".join(f"{'M' if not place else 'L'}{x:.1f} {y:.1f}" for place, (x, y) in enumerate(points))
    return h("path", d=steps, class_=kind)


def mark(x: float, y: float, kind: str) -> Html:
    """Draw a point whose shape and colour both show its kind: best, same, behind, ..."""
    if kind == "behind":
        return h("path", d=f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z", class_="mark behind")
    if kind == "baseline":
        return h("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, class_="mark baseline")
    if kind == "ahead":
        return h("path", d=f"M{x:.1f} {y - 6:.1f}l6 10.5h-12z", class_="mark ahead")
    return h("circle", cx=float(x), cy=float(y), r=5, class_=f"mark {kind}")


def figure(
    title: str, description: str, draw: Callable[[int], tuple[float, list[Html]]], caption: Html | str | None = None
) -> Html:
    """Build a figure in both layouts, each with a text alternative; the style sheet shows one of them.

    Args:
        title: shown above the figure and read by screen readers.
        description: what the figure shows, for screen readers.
        draw: maps the width in pixels to the height and the elements.
        caption: shown below the figure.
    """
    layouts = []
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        height, elements = draw(width)
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{title}-{kind}".lower())
        layouts.append(
            h(
                "svg",
                h("title", title, id=f"t-{name}"),
                h("desc", description, id=f"d-{name}"),
                elements,
                viewBox=f"0 0 {width} {math.ceil(height)}",
                width=width,
                height=math.ceil(height),
                role="img",
                aria_labelledby=f"t-{name} d-{name}",
                class_=kind,
            )
        )
    return h("figure", h("h3", title), layouts, h("figcaption", caption) if caption else None)
