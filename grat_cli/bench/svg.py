"""Drawing by hand: SVG elements, scales, ticks, and labels that keep out of each other's way. Lengths in SVG units."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from grat_cli.bench.figures import plain

FONT_SIZE = 12.0
# Widths of common sans-serif letters over the font size, a little generous, because the reader's font is not known.
_WIDTHS = dict.fromkeys("fijlrtI.,:;'|!()[]/-·", 0.38) | dict.fromkeys("mwMW@%<>+=×~—", 0.95)


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """About how wide a text is drawn."""
    # Letters beyond Latin are as wide as they are high.
    return size * sum(_WIDTHS.get(c, 0.74 if c.isupper() else 0.6 if ord(c) < 0x2E80 else 1.05) for c in text)


def fitted(text: str, width: float, size: float = FONT_SIZE) -> str:
    """The text, shortened until it fits."""
    if text_width(text, size) <= width:
        return text
    longest = bisect_right(range(1, len(text) + 1), width, key=lambda length: text_width(text[:length] + "…", size))
    return text[:longest].rstrip() + "…"


def element(name: str, *children: str, **attributes: object) -> str:
    """An element; children are markup already, attribute values are escaped. `class_` and `stroke_width` as in HTML."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(plain(value))
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{shown}"')
    return f"<{' '.join(parts)}>{''.join(children)}</{name}>" if children else f"<{' '.join(parts)}/>"


def text(content: str, x: float, y: float, **attributes: object) -> str:
    """A line of text with its baseline at y."""
    return element("text", escape(plain(content)), x=float(x), y=float(y), **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downward."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share more than an edge."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Whether the other lies within."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )

    def grown(self, by: float) -> Box:
        """The same, larger on every side."""
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is closest to this one."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


@dataclass(frozen=True)
class Scale:
    """From figures to lengths, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the scale, at most so many, two at least."""
        return _log_ticks(self.low, self.high, most) if self.logarithmic else _linear_ticks(self.low, self.high, most)


def log_scale(values: Sequence[float], start: float, stop: float, *, margin: float = 0.07, least: float = 6.0) -> Scale:
    """A logarithmic scale over positive values, with room at both ends, spanning at least so large a factor."""
    low, high = min(values), max(values)
    if high / low < least:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(least), middle * math.sqrt(least)
    room = (high / low) ** margin
    return Scale(low / room, high * room, start, stop, logarithmic=True)


def scale_from_zero(values: Sequence[float], start: float, stop: float, *, room: float = 0.04) -> Scale:
    """A linear scale from zero to beyond the largest value."""
    return Scale(0.0, (max(values, default=0.0) or 1.0) * (1 + room), start, stop)


def tick_text(value: float) -> str:
    """`0.001`, `0.5`, `20`, `5,000`, `66k`, `2M`."""
    for least, size, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / size:.3g}{suffix}"
    shown = f"{value:,.9f}".rstrip("0").rstrip(".")
    return shown if len(shown) < 8 else f"{value:.0e}"


def marker(shape: str, x: float, y: float, radius: float, class_: str, *children: str) -> str:
    """A point: `circle`, `square`, `triangle`, `diamond` or `cross`."""
    if shape == "circle":
        return element("circle", *children, cx=float(x), cy=float(y), r=float(radius), class_=class_)
    corners = {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0, -1.15), (1.1, 0.8), (-1.1, 0.8)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "cross": _CROSS,
    }[shape]
    points = " ".join(f"{x + radius * dx:.2f},{y + radius * dy:.2f}" for dx, dy in corners)
    return element("polygon", *children, points=points, class_=class_)


# An arm's corners, then the same turned by a quarter three times.
_ARM = ((-0.4, -1.1), (0.4, -1.1), (0.4, -0.4))
_CROSS = (*_ARM, *((-y, x) for x, y in _ARM), *((-x, -y) for x, y in _ARM), *((y, -x) for x, y in _ARM))


@dataclass(frozen=True)
class Label:
    """Where a label stands: its box, and whether a thin line must tie it to its point."""

    text: str
    box: Box
    tied: bool


def place_labels(
    points: Sequence[tuple[float, float, str]],
    area: Box,
    *,
    radius: float = 6.0,
    obstacles: Sequence[Box] = (),
    lines: Sequence[Sequence[tuple[float, float]]] = (),
    size: float = FONT_SIZE,
) -> list[Label | None]:
    """Places for the labels of points: within the area, off all points, obstacles and each other, and best off lines.

    Close places are tried first, then farther ones, tied by a thin line. None where there is no room at all.

    Args:
        points: x, y and text of each.
        radius: of the points.
        obstacles: what must stay free as well.
        lines: polylines that labels should not cross.
    """
    taken = [Box(x, y, x, y).grown(radius) for x, y, _ in points] + list(obstacles)
    crossings = [point for polyline in lines for point in _sampled(polyline)]
    placed: list[Label | None] = []
    for x, y, content in points:
        best: tuple[float, Label] | None = None
        for box, distance in _candidates(x, y, text_width(content, size), size, radius):
            if best and distance >= best[0]:
                break  # what follows is farther still
            if not area.holds(box) or any(box.overlaps(other) for other in taken):
                continue
            label = Label(content, box, distance > radius + 4)
            cost = distance + 6 * sum(box.left <= a <= box.right and box.top <= b <= box.bottom for a, b in crossings)
            if label.tied:
                tie = _sampled([(x, y), box.nearest(x, y)])
                own = Box(x, y, x, y).grown(radius)
                passed = sum(
                    any(other != own and other.overlaps(Box(a, b, a, b).grown(0.5)) for other in taken) for a, b in tie
                )
                cost += 10 + 4 * passed
            if best is None or cost < best[0]:
                best = cost, label
        placed.append(best[1] if best else None)
        if best:
            taken.append(best[1].box)
    return placed


def draw_label(label: Label, x: float, y: float, class_: str, radius: float = 6.0) -> Iterator[str]:
    """The label of the point at x, y, and its line where it needs one."""
    box = label.box
    if label.tied:
        near_x, near_y = box.nearest(x, y)
        length = math.hypot(near_x - x, near_y - y) or 1.0
        from_x, from_y = x + (near_x - x) * radius / length, y + (near_y - y) * radius / length
        yield line(from_x, from_y, near_x, near_y, f"tie {class_}")
    middle = (box.left + box.right) / 2
    anchor = "middle" if box.left < x < box.right else "start" if middle > x else "end"
    at = {"middle": middle, "start": box.left, "end": box.right}[anchor]
    yield text(label.text, at, box.bottom - 0.26 * (box.bottom - box.top), class_=f"label {class_}", text_anchor=anchor)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved apart to at least this gap, within bounds, as little as needed; closer if they do not fit."""
    if len(positions) < 2:
        return [min(max(position, low), high) for position in positions]
    gap = min(gap, (high - low) / (len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = [0.0] * len(positions)
    # Down from the top, each at least a gap below the one before; then back up from the lower bound.
    position = low - gap
    for index in order:
        position = max(positions[index], position + gap)
        moved[index] = position
    position = high + gap
    for index in reversed(order):
        position = min(moved[index], position - gap)
        moved[index] = position
    return moved


def _candidates(x: float, y: float, width: float, size: float, radius: float) -> Iterator[tuple[Box, float]]:
    height = 1.15 * size
    for distance in (
        radius + 1.5,
        radius + 8,
        radius + 18,
        radius + 30,
        radius + 45,
        radius + 65,
        radius + 90,
        140,
        190,
    ):
        # Beside, below and above first; a step at a time around the point where it is crowded.
        angles = (0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 67, 113, 292, 247)
        for preference, angle in enumerate(angles):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = x + distance * dx - width * (1 - dx) / 2
            top = y + distance * dy - height * (1 - dy) / 2
            yield Box(left, top, left + width, top + height), distance + 0.3 * preference


def _sampled(polyline: Sequence[tuple[float, float]], step: float = 4.0) -> list[tuple[float, float]]:
    """Points along a polyline."""
    found = []
    for (x1, y1), (x2, y2) in pairwise(polyline):
        count = max(1, int(math.hypot(x2 - x1, y2 - y1) / step))
        found += [(x1 + (x2 - x1) * k / count, y1 + (y2 - y1) * k / count) for k in range(count + 1)]
    return found


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = size * factor
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(count * step, 12) for count in range(first, last + 1)]
    return [low, high]


# Finest first: steps within a decade, and every how many decades.
_LOG_STEPS = (
    ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), 1),
    ((1, 1.5, 2, 3, 5, 7), 1),
    ((1, 2, 5), 1),
    ((1, 3), 1),
    *(((1,), every) for every in range(1, 100)),
)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors, every in _LOG_STEPS:
        exponents = [exponent for exponent in range(first, last + 1) if exponent % every == 0]
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [float(f"{tick:.6g}") for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            return ticks if len(ticks) > 1 else _linear_ticks(low, high, most)
    return [low, high]
