"""Plots as inline SVG, drawn by matplotlib in the colours and the font of the page. Lengths are in SVG units."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

import numpy as np

from grat_cli.pages.html import plain, render

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

COLOURS = 8
WIDTH = 460.0
FONT_SIZE = 12.0
_ROW_HEIGHT = 27.0
_LINE_HEIGHT = 1.2 * FONT_SIZE
_AROUND_AREA = 68.0
_LONGEST_NAME = 20
# Inks are custom properties of the style sheet; matplotlib draws with stand-ins.
_INKS = ("ink", "soft", "ground", "rule", "grid", "rest", "neutral", *(f"colour-{n}" for n in range(COLOURS)))
_STAND_IN = "#1234"
_MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "P"}


@dataclass(frozen=True)
class Look:
    """How a variant looks everywhere.

    Attributes:
        colour: custom property of the style sheet.
        shape: of its points, so that colour is never alone: circle, square, triangle, diamond or cross.
    """

    colour: str
    shape: str


@dataclass(frozen=True)
class Mark:
    """A named point: its place in the units of the axes, and what it says when pointed at."""

    name: str
    look: Look
    x: float
    y: float
    about: str


@dataclass(frozen=True)
class Plot:
    """A plot: the SVG element, its heading, how to read it, and its height."""

    heading: str
    caption: str
    svg: Markup
    height: float


@contextmanager
def settings() -> Iterator[None]:
    """Under which everything here is called; also a decorator. The reader's own settings of matplotlib are left out."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_settings())
        # Text is measured with a bundled font, but shown with the reader's, which may have letters that it lacks.
        warnings.filterwarnings("ignore", "Glyph ")
        yield


def ink(name: str) -> str:
    """The stand-in for a colour of the style sheet."""
    return f"{_STAND_IN}{_INKS.index(name):02x}"


def dashed() -> dict[str, Any]:
    """How a line of comparison is drawn."""
    return {"color": ink("soft"), "linestyle": (0, (5, 4)), "linewidth": 1.5}


def about(kind: str, text: str) -> str:
    """As the `gid` of an artist: its class in the SVG, and what it says when pointed at."""
    return f"{kind}: {plain(text)}"


def shortened(name: str) -> str:
    """A name in one line, of at most as many characters as a plot has room for; of a longer one both ends, which tell
    it from others of its kind."""
    name = plain(name)
    if len(name) <= _LONGEST_NAME:
        return name
    head = _LONGEST_NAME // 2
    return f"{name[:head].rstrip()}…{name[head + 1 - _LONGEST_NAME :].lstrip()}"


def text_width(text: str) -> float:
    """How wide a text is drawn, about: the reader's font is not known."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=FONT_SIZE), ismath=False)[0]


def new_axes(across: str, up: str = "", *, height: float = 344.0, lines: int = 0) -> Axes:
    """The only axes of a new figure.

    Args:
        across: what the horizontal axis counts, below it.
        up: what the vertical axis counts, above it.
        height: of the figure.
        lines: that will be named beside the axes: the figure grows until there is room.
    """
    from matplotlib.figure import Figure

    height = max(height, _LINE_HEIGHT * lines + _AROUND_AREA)
    axes = Figure(figsize=(WIDTH / 72, height / 72)).add_subplot()
    axes.set(xlabel=across, title=up)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: tick_text(value))
    axes.locator_params("x", nbins=6)
    return axes


def new_rows(names: Sequence[str], ends: Sequence[str], across: str, *, room: float = 0.0) -> Axes:
    """Axes of horizontal rows at 0, 1, ... downward: names to the left, a figure to the right of each.

    Args:
        names: of the rows.
        ends: figures.
        across: what the horizontal axis counts.
        room: for a legend above.
    """
    axes = new_axes(across, height=_ROW_HEIGHT * len(names) + 42 + room)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), list(map(shortened, names)))
    axes.tick_params("y", labelcolor=ink("ink"))
    axes.grid(visible=False, axis="y")
    widest = max(map(text_width, ends))
    for row, end in enumerate(ends):
        axes.annotate(
            end,
            (1, row),
            xycoords=axes.get_yaxis_transform(),
            xytext=(8 + widest, 0),
            textcoords="offset points",
            horizontalalignment="right",
            verticalalignment="center",
        )
    return axes


def from_zero(axes: Axes, which: Literal["x", "y"], values: Sequence[float], room: float = 0.05) -> None:
    """Makes an axis linear, from zero to beyond the largest value."""
    axes.set(**{f"{which}lim": (0.0, (max(values, default=0.0) or 1.0) * (1 + room))})


def logarithmic(axes: Axes, which: Literal["x", "y"], values: Sequence[float], least: float = 6.0) -> None:
    """Makes an axis logarithmic, around positive values with room at both ends, spanning at least so large a factor."""
    from matplotlib.ticker import LogLocator

    low, high = min(values), max(values)
    middle, half = math.sqrt(low * high), max(high / low, least) ** 0.57
    axes.set(**{f"{which}scale": "log", f"{which}lim": (middle / half, middle * half)})
    ticks = (1, 1.5, 2, 3, 5, 7) if half < 4 else (1, 2, 5) if half < 12 else (1,)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=ticks, numticks=6))
    axis.set_major_formatter(lambda value, _: tick_text(value))
    axis.set_ticks([], minor=True)


def tick_text(value: float) -> str:
    """`0.001`, `0.5`, `20`, `5,000`, `66k`, `2M`."""
    for least, size, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / size:.3g}{suffix}"
    shown = f"{value:,.9f}".rstrip("0").rstrip(".")
    return shown if len(shown) < 8 else f"{value:.0e}"


def draw_marks(axes: Axes, marks: Sequence[Mark], *, size: float = 10.0) -> None:
    """Points without their names."""
    for mark in marks:
        axes.plot(
            [mark.x],
            [mark.y],
            _MARKERS[mark.look.shape],
            color=ink(mark.look.colour),
            markersize=size - 2 * (mark.look.shape in ("square", "diamond")),
            clip_on=False,
            gid=about("point", f"{mark.name}: {mark.about}"),
        )


def draw_named_marks(axes: Axes, marks: Sequence[Mark], lines: Sequence[Sequence[tuple[float, float]]] = ()) -> None:
    """Points with names beside them that keep off points, each other and, best, off lines in the units of the axes.

    Limits and all else must be set before. A name for which there is no room is left out.
    """
    from matplotlib.transforms import Bbox

    draw_marks(axes, marks)
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # sets where the axes are
    axes.figure.set_layout_engine("none")  # type: ignore[union-attr]

    def around(x: float, y: float, reach: float) -> Bbox:
        return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)

    taken = [around(x, y, 6) for x, y in axes.transData.transform([(mark.x, mark.y) for mark in marks])]
    crossed = [around(x, y, 1) for line in lines if line for x, y in axes.transData.transform(line)]
    for mark in marks:
        label = axes.annotate(
            shortened(mark.name),
            (mark.x, mark.y),
            xytext=(0, 0),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="center",
            color=ink(mark.look.colour),
            weight="bold",
            gid=about("label", mark.name),
        )
        size = label.get_window_extent()
        free = (
            (right, up, far)
            for obstacles in ((*taken, *crossed), taken)
            for far, right, up in _offsets(size.width, size.height)
            if _within(box := size.translated(right, up), axes.bbox) and not box.count_overlaps(obstacles)
        )
        right, up, far = next(free, (0.0, 0.0, False))
        if not right and not up:
            label.remove()
            continue
        label.set_position((right, up))
        taken.append(size.translated(right, up))
        if far:
            edge = min(max(0.0, right - size.width / 2), right + size.width / 2), up
            axes.annotate(
                "", (mark.x, mark.y), xytext=edge, textcoords="offset points", arrowprops=_tie(mark.look.colour)
            )


def draw_named_lines(axes: Axes, lines: Sequence[tuple[str, Look, Sequence[float], Sequence[float]]]) -> None:
    """Lines (name, look, places across, places up), each with a point and its name at the end; limits must be set."""
    to_share = axes.transData - axes.transAxes
    ends = [float(to_share.transform((across[-1], up[-1]))[1]) for _, _, across, up in lines]
    area = axes.figure.get_figheight() * 72 - _AROUND_AREA  # type: ignore[union-attr]
    for (name, look, across, up), share in zip(lines, spread(ends, _LINE_HEIGHT / area, 0.02, 0.98), strict=True):
        axes.plot(across, up, color=ink(look.colour), clip_on=False, gid=about("run", name))
        draw_marks(axes, [Mark(name, look, across[-1], up[-1], tick_text(up[-1]))], size=7)
        axes.annotate(
            shortened(name),
            (across[-1], up[-1]),
            xytext=(1.06, share),
            textcoords="axes fraction",
            verticalalignment="center",
            color=ink(look.colour),
            weight="bold",
            gid=about("label", name),
            arrowprops={**_tie(look.colour), "shrinkA": 0, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Positions moved apart to at least this gap, within bounds; closer if they do not fit."""
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    order, steps = np.argsort(positions, kind="stable"), gap * np.arange(len(positions))
    moved = np.empty(len(positions))
    without_gaps = np.maximum.accumulate(np.asarray(positions)[order] - steps)
    moved[order] = np.clip(without_gaps, low, high - gap * (len(positions) - 1)) + steps
    return moved


def finished(axes: Axes, identifier: str, heading: str, caption: str, described: str) -> Plot:
    """The plot, which says what it shows to those who cannot see it.

    Args:
        axes: drawn on.
        identifier: begins all ids in the SVG: letters, digits and dashes, unique on the page.
        heading: above it.
        caption: below it.
        described: its figures in words.
    """
    from markupsafe import Markup

    figure = axes.figure
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))  # type: ignore[union-attr]
    root = ElementTree.fromstring(file.getvalue())
    height = figure.get_figheight() * 72  # type: ignore[union-attr]
    _adapt(root, identifier)
    root.attrib = {
        "class": "plot",
        "viewBox": f"0 0 {WIDTH:g} {height:g}",
        "role": "img",
        "aria-labelledby": f"{identifier}-title {identifier}-desc",
    }
    for tag, text in (("desc", described), ("title", heading)):
        told = ElementTree.Element(tag, id=f"{identifier}-{tag}")
        told.text = plain(text)
        root.insert(0, told)
    return Plot(heading, caption, Markup(ElementTree.tostring(root, encoding="unicode")), height)


def alone(plot: Plot) -> str:
    """A plot as an SVG file that opens by itself."""
    return render("plot.svg", plot=plot, width=WIDTH)


def _settings() -> dict[Any, Any]:
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": ink("rule"),
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": ink("soft"),
        "axes.labelpad": 7,
        "axes.titlecolor": ink("soft"),
        "axes.titlelocation": "left",
        "axes.titlesize": FONT_SIZE,
        "figure.constrained_layout.use": True,
        "figure.dpi": 72,
        "figure.facecolor": "none",
        "font.size": FONT_SIZE,
        "grid.color": ink("grid"),
        "legend.fontsize": FONT_SIZE,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.scale_dashes": False,
        "lines.markeredgecolor": ink("ground"),
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "grat",
        "text.color": ink("ink"),
        "text.parse_math": False,
        "xtick.bottom": False,
        "xtick.labelcolor": ink("soft"),
        "ytick.labelcolor": ink("soft"),
        "ytick.left": False,
    }


def _tie(colour: str) -> dict[str, Any]:
    return {"arrowstyle": "-", "color": ink(colour), "linewidth": 1, "alpha": 0.7, "shrinkB": 5}


def _offsets(width: float, height: float) -> Iterator[tuple[bool, float, float]]:
    """Places for the middle of a label around its point, closest first, and whether a line must tie the two."""
    for distance in (8, 14, 24, 36, 51, 71, 96, 140, 190):
        for angle in (0, 180, 270, 90, 315, 225, 45, 135, 338, 202, 22, 158, 293, 247, 67, 113):
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            yield distance > 8, across * (distance + width / 2), up * (distance + height / 2)


def _within(inner: Any, outer: Any) -> bool:
    return outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1


def _adapt(root: ElementTree.Element, identifier: str) -> None:
    """Makes matplotlib's SVG part of a page: own ids, the page's colours and font, classes and titles of marks."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):  # rules that would hold for the whole page
                parent.remove(child)
    for node in list(root.iter()):
        node.tag = node.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in node.attrib.items()}
        kind, told, text = attributes.pop("id", "").partition(": ")
        if told:
            attributes["class"] = kind
            title = ElementTree.Element("title")
            title.text = text
            node.insert(0, title)
        elif re.fullmatch("[mp][0-9a-f]+", kind):  # what is referred to: markers and clip paths
            attributes["id"] = f"{identifier}-{kind}"
        for name in {"href", "clip-path"} & attributes.keys():
            attributes[name] = attributes[name].replace("#", f"#{identifier}-")
        if "style" in attributes:
            style = re.sub(r"font[\w-]*:[^;]*;? *", "", attributes["style"])
            attributes["style"] = re.sub(f"{_STAND_IN}(..)", lambda found: f"var(--{_INKS[int(found[1], 16)]})", style)
        node.attrib = attributes
