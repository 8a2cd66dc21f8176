"""The figures of the report: interval rows, small multiples and labelled points.

Figures are built as SVG directly, without matplotlib, so the report needs no extra package. Their colours are variables
of the page's style sheet, so they follow light, dark and print modes. Each figure is drawn twice, for wide and for
narrow pages, with text of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from twotower.report.html import Html, h

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
class AxisScale:
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

    def meets(self, other: Box) -> bool:
        """Return whether two rectangles overlap or come closer than 2 pixels."""
        across = max(self.left, other.left) - min(self.right, other.right)
        return max(across, max(self.top, other.top) - min(self.bottom, other.bottom)) < 2.0

    def within(self, other: Box) -> bool:
        """Return whether the rectangle lies inside another."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def text_width(text: str, size: float = TEXT, *, strong: bool = False) -> float:
    """Estimate an upper bound on the width of a string; most browser fonts are narrower."""
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
    """Replace the hyphen of a number with a minus sign."""
    return text.replace("-", "−")


def wrapped(text: str, width: float) -> list[str]:
    """Break a name into lines at hyphens and spaces."""
    lines = [""]
    for part in text.replace("-", "-\0").replace(" ", " \0").split("\0"):
        if lines[-1] and text_width(lines[-1] + part.rstrip()) > width:
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
    """Draw a straight line; `kind` names its style."""
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


@dataclass(frozen=True)
class IntervalRow:
    """One row of `interval_rows`.

    Attributes:
        name: label on the left.
        value: position of the point.
        low, high: ends of the interval, or None.
        kind: style of the mark: best, same, ahead, behind, baseline.
        value_text: the value as text, on the right.
        seeds: value of each seed, drawn as small ticks.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    kind: str
    value_text: str
    seeds: Sequence[float] = ()


@dataclass(frozen=True)
class Curve:
    """One panel of `small_multiples`: points (x, value, low, high), with None for a missing value."""

    name: str
    points: Sequence[tuple[float, float | None, float | None, float | None]]
    kind: str = "other"


@dataclass(frozen=True)
class Point:
    """One point of `labelled_points`."""

    name: str
    x: float
    y: float
    kind: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass
class _OccupiedArea:
    """The boxes of a figure that are already occupied."""

    taken: list[Box] = field(default_factory=list)

    def free(self, box: Box) -> bool:
        return not any(box.meets(other) for other in self.taken)


def interval_rows(
    title: str, rows: Sequence[IntervalRow], axis: str, *, zero: bool = False, caption: Html | str | None = None
) -> Html:
    """Draw rows of points with intervals on one axis.

    Args:
        title: see `figure`.
        rows: the rows, from top to bottom.
        axis: axis name and unit.
        zero: extend the axis to 0 and mark it.
        caption: see `figure`.
    """
    ends = [end for row in rows for end in (row.value, row.low, row.high, *row.seeds) if end is not None]
    low, high = min([*ends, 0.0] if zero else ends), max([*ends, 0.0] if zero else ends)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (low if zero and low == 0 else low - margin), (high if zero and high == 0 else high + margin)

    def draw(width: int) -> tuple[float, list[Html]]:
        is_wide = width > 500
        names = max(text_width(row.name, strong=row.kind == "best") for row in rows) + 16 if is_wide else 12.0
        numbers = max(text_width(row.value_text, strong=row.kind == "best") for row in rows) + 16
        step = 27 if is_wide else 46
        scale = AxisScale(low, high, names, width - numbers if is_wide else width - 12)
        bottom = 8 + step * len(rows)
        elements: list[Html] = []
        for tick in ticks(low, high, 6 if is_wide else 4):
            elements.append(line(scale(tick), 4, scale(tick), bottom, "zero" if zero and tick == 0 else "grid"))
            elements.append(label(scale(tick), bottom + 16, plain(tick), "middle", "muted"))
        for number, row in enumerate(rows):
            y = 8 + step * number + (step / 2 if is_wide else step - 12)
            text = y + 4.5 if is_wide else y - 14
            strong = "strong" if row.kind == "best" else ""
            elements.append(label(0, text, row.name, "start", strong))
            elements.append(label(width, text, row.value_text, "end", f"number {strong}".strip()))
            if row.low is not None and row.high is not None:
                elements.append(line(scale(row.low), y, scale(row.high), y, f"interval {row.kind}"))
            elements += [line(scale(seed), y - 4, scale(seed), y + 4, "seed") for seed in row.seeds]
            elements.append(mark(scale(row.value), y, row.kind))
        named = axis_name((names + scale.stop) / 2, bottom + 36, axis, width)
        return bottom + 28 + 16 * len(named), [*elements, *named]

    return figure(title, "; ".join(f"{row.name} {row.value_text}" for row in rows), draw, caption)


def small_multiples(
    title: str,
    curves: Sequence[Curve],
    x_axis: str,
    y_axis: str,
    *,
    x_ticks: Sequence[tuple[float, str]],
    floor: float | None = None,
    y_words: Callable[[float], str] = plain,
    reference: float | None = None,
    description: str | None = None,
    caption: Html | str | None = None,
) -> Html:
    """Draw a panel for each curve, with the other curves in grey; ten curves in one panel would be unreadable.

    Args:
        title: see `figure`.
        curves: one panel each; all panels share both axes.
        x_axis: axis name and unit.
        y_axis: axis name and unit.
        x_ticks: position and text of each tick.
        floor: start of the vertical axis; the lowest value if None.
        y_words: formats a tick of the vertical axis.
        reference: a value that every panel marks with a dotted line.
        description: see `figure`; None for the first and the last value of each curve.
        caption: see `figure`.
    """
    xs = [x for curve in curves for x, *_ in curve.points]
    ys = [y for curve in curves for _, *values in curve.points for y in values if y is not None]
    low = min(ys) if floor is None else floor
    high = max(ys) + 0.04 * ((max(ys) - low) or 1.0)
    low = low - 0.04 * (high - low) if floor is None else low

    def draw(width: int) -> tuple[float, list[Html]]:
        y_ticks = ticks(low, high, 4)
        axis = max(text_width(y_words(tick)) for tick in y_ticks) + 8
        columns = max(min(len(curves), 4 if width > 500 else 2), 1)
        gap = 16
        wide = (width - axis - gap * (columns - 1) - 4) / columns
        heads = [wrapped(curve.name, wide) for curve in curves]
        head, tall = 17 * max(len(lines) for lines in heads) + 8, 112
        right = max([6.0, *(text_width(text) / 2 for _, text in x_ticks)])  # the text is centred on its tick
        elements: list[Html] = [label(0, 14, y_axis, "start", "muted")]
        top = 26.0
        for number, curve in enumerate(curves):
            row, column = divmod(number, columns)
            left = axis + column * (wide + gap)
            upper = top + row * (head + tall + 34) + head
            x = AxisScale(min(xs), max(xs), left + 6, left + wide - right)
            y = AxisScale(low, high, upper + tall, upper)
            for place, text in enumerate(reversed(heads[number])):
                kind = "strong" if curve.kind == "best" else ""
                elements.append(label(left, upper - 8 - 17 * place, text, "start", kind))
            for tick in y_ticks:
                elements.append(line(left, y(tick), left + wide, y(tick), "grid"))
                if column == 0:
                    elements.append(label(axis - 6, y(tick) + 4.5, y_words(tick), "end", "muted"))
            if reference is not None and low <= reference <= high:
                elements.append(line(left, y(reference), left + wide, y(reference), "reference"))
            for at, text in x_ticks:
                elements.append(label(x(at), upper + tall + 17, text, "middle", "muted"))
            elements += [
                path([(x(a), y(b)) for a, b, *_ in other.points if b is not None], "others")
                for other in curves
                if other is not curve
            ]
            known = [(x(a), y(b), y(c), y(d)) for a, b, c, d in curve.points if None not in (b, c, d)]  # type: ignore[arg-type]
            if len(known) > 1:
                band = [(a, c) for a, _, c, _ in known] + [(a, d) for a, _, _, d in reversed(known)]
                elements.append(path(band, f"band {curve.kind}"))
            shown = [(x(a), y(b)) for a, b, *_ in curve.points if b is not None]
            elements.append(path(shown, f"curve {curve.kind}"))
            elements += [h("circle", cx=a, cy=b, r=2.4, class_=f"dot {curve.kind}") for a, b in shown]
        bottom = top + -(-len(curves) // columns) * (head + tall + 34)
        named = axis_name((axis + width) / 2, bottom + 8, x_axis, width)
        return bottom + 2 + 16 * len(named), [*elements, *named]

    values = "; ".join(f"{curve.name}: {_ends(curve)}" for curve in curves)
    return figure(title, values if description is None else description, draw, caption)


def labelled_points(
    title: str,
    description: str,
    points: Sequence[Point],
    *,
    x_axis: str,
    y_axis: str,
    most: tuple[float, float] = (math.inf, math.inf),
    connected: bool = False,
    caption: Html | str | None = None,
) -> Html:
    """Draw points with their names; a name that cannot be placed without overlap near its point is omitted.

    `most` gives the largest possible x and y; the axes do not extend beyond these values. `connected` joins the points
    by a line in the given order.
    """

    def limits(values: list[float], largest: float) -> tuple[float, float]:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        return low - margin, min(high + margin, max(high, largest))

    x_low, x_high = limits([value for point in points for value in (point.x, *(point.x_range or ()))], most[0])
    y_low, y_high = limits([value for point in points for value in (point.y, *(point.y_range or ()))], most[1])

    def draw(width: int) -> tuple[float, list[Html]]:
        tall = 400 if width > 500 else 430
        y_ticks = ticks(y_low, y_high, 6)
        left = max(text_width(plain(tick)) for tick in y_ticks) + 10
        x_ticks = ticks(x_low, x_high, 6 if width > 500 else 4)
        right = max(6.0, *(text_width(plain(tick)) / 2 for tick in x_ticks))  # the text is centred on its tick
        x, y = AxisScale(x_low, x_high, left, width - right), AxisScale(y_low, y_high, 26 + tall, 26)
        elements: list[Html] = [label(0, 14, y_axis, "start", "muted")]
        for tick in y_ticks:
            elements.append(line(left, y(tick), width, y(tick), "grid"))
            elements.append(label(left - 6, y(tick) + 4.5, plain(tick), "end", "muted"))
        for tick in x_ticks:
            elements.append(line(x(tick), 26, x(tick), 26 + tall, "grid"))
            elements.append(label(x(tick), 26 + tall + 17, plain(tick), "middle", "muted"))
        places = [(x(point.x), y(point.y)) for point in points]
        if connected:
            elements.append(path(places, "curve"))
        for point, (a, b) in zip(points, places, strict=True):
            if point.y_range:
                elements.append(line(a, y(point.y_range[0]), a, y(point.y_range[1]), f"interval {point.kind}"))
            if point.x_range:
                elements.append(line(x(point.x_range[0]), b, x(point.x_range[1]), b, f"interval {point.kind}"))
        room = _OccupiedArea([Box(a - 6, b - 6, a + 6, b + 6) for a, b in places])
        inside = Box(left + 2, 22, width, 26 + tall - 2)
        for point, (a, b) in sorted(zip(points, places, strict=True), key=lambda pair: -len(pair[0].name)):
            elements += _named(point, a, b, room, inside)
        elements += [mark(a, b, point.kind) for point, (a, b) in zip(points, places, strict=True)]
        named = axis_name((left + width) / 2, 26 + tall + 38, x_axis, width)
        return 26 + tall + 30 + 16 * len(named), [*elements, *named]

    return figure(title, description, draw, caption)


def _named(point: Point, x: float, y: float, room: _OccupiedArea, inside: Box) -> list[Html]:
    """Place the name of a point in the nearest free space, with a leader line if the space is not next to the point."""
    whole = wrapped(point.name, 1e9)
    halves = wrapped(point.name, text_width(point.name) / 2 + 24)
    for away in (0, 16, 32, 48, 64, 84, 104, 128, 152, 180, 210, 240):
        for lines in (whole, halves):
            wide = max(text_width(text, strong=point.kind == "best") for text in lines)
            tall = (TEXT + 3) * len(lines)
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
                reach = 10 + away
                left = x + dx * reach if dx > 0 else (x + dx * reach - wide if dx < 0 else x - wide / 2)
                top = y + dy * reach - tall / 2 + (dy * tall / 2 if dx == 0 else 0)
                box = Box(left, top, left + wide, top + tall)
                if box.within(inside) and room.free(box):
                    room.taken.append(box)
                    elements = []
                    if away:
                        end = (box.left - 2 if dx > 0 else box.right + 2) if dx else (box.left + box.right) / 2
                        height = (box.top + box.bottom) / 2 if dx else (box.bottom + 2 if dy < 0 else box.top - 2)
                        elements.append(line(x, y, end, height, "leader"))
                    strong = "strong" if point.kind == "best" else ""
                    for number, text in enumerate(lines):
                        baseline = top + TEXT - 1 + (TEXT + 3) * number
                        elements.append(label(left, baseline, text, "start", strong))
                    return elements
    return []  # the table next to the figure lists every name


def _ends(curve: Curve) -> str:
    """Describe where a curve begins and ends, for the text alternative of a figure."""
    known: Sequence[float] = [point[1] for point in curve.points if point[1] is not None]
    return f"from {known[0]:.3f} to {known[-1]:.3f}" if known else "no value"
