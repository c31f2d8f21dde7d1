"""What line plots and plots of points have in common: frame, axes, lines with their names, the SVG around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from grat_cli.bench.figures import plain
from grat_cli.bench.svg import (
    FONT_SIZE,
    Box,
    Scale,
    element,
    fitted,
    line,
    marker,
    spread,
    text,
    text_width,
    tick_text,
)

WIDTH = 460.0
ROW_HEIGHT = 27.0
_NAME_GAP = 1.2 * FONT_SIZE
_LONGEST_NAME = 120.0


@dataclass(frozen=True)
class Style:
    """How a variant looks everywhere.

    Attributes:
        colour: CSS class that sets its colour.
        shape: of its points; it says what the row is there for, so that colour is never alone.
    """

    colour: str
    shape: str


@dataclass(frozen=True)
class Plot:
    """One plot: the SVG element, its heading, a sentence on how to read it, and whether it is about square."""

    heading: str
    caption: str
    svg: str
    square: bool = False


def axes(
    across: Scale, up: Scale, area: Box, across_title: str, up_title: str, across_ticks: Sequence[float] | None = None
) -> str:
    """A frame with grid lines, their figures, and what stands on the axes."""
    drawn = [border(area)]
    for tick, name in readable(across, across_ticks or across.ticks(7)):
        drawn.append(line(across(tick), area.top, across(tick), area.bottom, "grid"))
        drawn.append(text(name, across(tick), area.bottom + 16, class_="tick", text_anchor="middle"))
    for tick in up.ticks(7):
        drawn.append(line(area.left, up(tick), area.right, up(tick), "grid"))
        drawn.append(text(tick_text(tick), area.left - 6, up(tick) + 4, class_="tick", text_anchor="end"))
    middle = (area.left + area.right) / 2
    drawn.append(text(across_title, middle, area.bottom + 35, class_="axis", text_anchor="middle"))
    drawn.append(text(up_title, 0, area.top - 12, class_="axis"))
    return "".join(drawn)


def readable(scale: Scale, ticks: Iterable[float]) -> list[tuple[float, str]]:
    """Ticks of a horizontal axis, without those whose figures would touch the one before."""
    kept: list[tuple[float, str]] = []
    free = -math.inf
    for tick in ticks:
        half = text_width(tick_text(tick), 11) / 2
        if scale(tick) - half > free:
            kept.append((tick, tick_text(tick)))
            free = scale(tick) + half + 6
    return kept


def border(area: Box) -> str:
    """The border of an area."""
    width, height = area.right - area.left, area.bottom - area.top
    return element("rect", x=float(area.left), y=float(area.top), width=width, height=height, class_="area")


def area_with_names(names: Sequence[str]) -> Box:
    """An area beside which these names fit, one below the other."""
    widest = max(text_width(fitted(name, _LONGEST_NAME)) for name in names)
    return Box(46, 24, WIDTH - 26 - widest, 24 + max(276.0, _NAME_GAP * len(names)))


def lines_with_names(
    named: Sequence[tuple[str, Style]], places: Sequence[Sequence[tuple[float, float]]], area: Box
) -> list[str]:
    """Lines through these places, each with its name at the end."""
    drawn = []
    heights = spread([line_places[-1][1] for line_places in places], _NAME_GAP, area.top + 5, area.bottom - 5)
    for (name, look), line_places, height in zip(named, places, heights, strict=True):
        last, end = line_places[-1]
        title = element("title", escaped(name))
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in line_places)
        drawn.append(element("polyline", title, points=path, class_=f"run {look.colour}"))
        drawn.append(marker(look.shape, last, end, 3.5, f"point {look.colour}"))
        drawn.append(line(last + 5, end, area.right + 12, height, f"tie {look.colour}"))
        baseline = height + 0.34 * FONT_SIZE
        drawn.append(text(fitted(name, _LONGEST_NAME), area.right + 15, baseline, class_=f"label {look.colour}"))
    return drawn


def svg_plot(identifier: str, title: str, description: str, height: float, drawn: Sequence[str]) -> str:
    """A plot as an SVG element that says what it shows to those who cannot see it."""
    return element(
        "svg",
        element("title", escaped(title), id=f"{identifier}-title"),
        element("desc", escaped(description), id=f"{identifier}-desc"),
        *drawn,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_labelledby=f"{identifier}-title {identifier}-desc",
        class_="plot",
    )


def escaped(content: object) -> str:
    """Text as it stands in markup, in one line."""
    return escape(plain(content))


class Rows:
    """A frame of horizontal rows: names to the left, a figure to the right of each."""

    def __init__(self, names: Sequence[str], ends: Sequence[str], top: float = 8) -> None:
        self._names = [fitted(name, 0.3 * WIDTH) for name in names]
        self._full_names = names
        self._ends = ends
        left = 10 + max(map(text_width, self._names))
        right = WIDTH - 8 - max(map(text_width, ends))
        self.area = Box(left, top, right, top + ROW_HEIGHT * len(names))
        self.middles = [top + ROW_HEIGHT * (index + 0.5) for index in range(len(names))]
        self.height = self.area.bottom + 42

    def axes(self, across: Scale, title: str) -> str:
        """Grid lines with their figures below."""
        drawn = [border(self.area)]
        for tick, name in readable(across, across.ticks(6)):
            drawn.append(line(across(tick), self.area.top, across(tick), self.area.bottom, "grid"))
            drawn.append(text(name, across(tick), self.area.bottom + 16, class_="tick", text_anchor="middle"))
        middle = (self.area.left + self.area.right) / 2
        drawn.append(text(title, middle, self.area.bottom + 35, class_="axis", text_anchor="middle"))
        return "".join(drawn)

    def names(self) -> list[str]:
        """What stands beside the rows."""
        drawn = []
        for name, whole, end, y in zip(self._names, self._full_names, self._ends, self.middles, strict=True):
            baseline = y + 0.34 * FONT_SIZE
            title = element("title", escaped(whole))
            drawn.append(
                element(
                    "text", title, escaped(name), x=self.area.left - 8, y=baseline, class_="name", text_anchor="end"
                )
            )
            drawn.append(text(end, WIDTH - 1, baseline, class_="value", text_anchor="end"))
        return drawn


def bar(start: float, stop: float, y: float, across: Scale, class_: str, title: str) -> str:
    """A horizontal bar around the height y."""
    height = 0.58 * ROW_HEIGHT
    left, right = across(start), across(stop)
    return element(
        "rect",
        element("title", escaped(title)),
        x=left,
        y=y - height / 2,
        width=max(right - left, 0.5),
        height=height,
        class_=class_,
    )
