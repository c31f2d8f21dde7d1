"""Figures of attention patterns: which groups a query group attends, as in Figure 4 of arXiv 2505.14687.

Everything is drawn to the scale of tokens, so that ragged groups at borders look as small as they are. A group that is
attended token by token is filled; one that is attended through means has a dot for each of them. Of a video there is
one panel for each group of frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.console.pattern import far_words
from grat_cli.presets import Preset, shape_text
from grat_kernels import Full, Plan
from grat_kernels.pattern import NOT_ATTENDED

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Colour = tuple[int, int, int]
QUERY: Colour = (242, 163, 38)
EXACT: Colour = (32, 106, 93)
UNATTENDED: Colour = (232, 232, 228)
# Of far levels, the nearest first: of a dot and of the ground around it.
MEANS: tuple[tuple[Colour, Colour], ...] = (
    ((92, 136, 200), (222, 232, 246)),
    ((146, 112, 192), (234, 227, 244)),
    ((190, 100, 136), (246, 226, 234)),
)
_GROUND, _INK, _SOFT = (255, 255, 255), (27, 31, 36), (87, 96, 106)

_WIDTH_OF_VIDEOS, _SIDE_OF_IMAGES = 1040, 336  # pixels: of all panels abreast, and of one
_SMALLEST_GROUP, _LARGEST_GROUP = 4, 40  # pixels
_MOST_ABREAST = 12
_SMALLEST_BLOCK = 3  # pixels; the dots of smaller ones would run into one another
_MARGIN, _GAP = 16, 8
_TITLE, _TEXT = 15, 13  # font sizes


@dataclass(frozen=True)
class QueryGroup:
    """A query group and what it attends.

    Attributes:
        group: its coordinates.
        extents: its tokens on each axis.
        levels: of all groups, in the shape of the grid of groups; see `grat_kernels.pattern`.
        tokens: image tokens that it attends one by one.
        means: summaries that it attends.
        chosen: image tokens that each head attends one by one besides, by content.
    """

    group: tuple[int, ...]
    extents: tuple[int, ...]
    levels: np.ndarray
    tokens: int
    means: int
    chosen: int


def pattern_figure(schedule: AttentionSchedule, preset: Preset) -> Image:
    """A figure of every distinct pattern of a run, each for a group in the middle and for the last one.

    Args:
        schedule: the run; with its patterns come the shares of steps, layers and heads that they serve.
        preset: that the schedule was made of, which names the patterns.

    Returns:
        A picture with a palette.
    """
    from PIL import Image, ImageDraw, ImageFont

    title_font, font = ImageFont.load_default(_TITLE), ImageFont.load_default(_TEXT)
    line = round(1.4 * _TEXT)
    sections = [(_title(plan, preset), _facts(plan, schedule), plan, query_groups(plan)) for plan in schedule.plans]
    scale = _scale(schedule)

    # 1. Sizes.
    panels = _panels(schedule.plans[0], scale)
    panel_height = panels.height + (line if panels.of_video else 0)
    queries_abreast = 1 if panels.of_video else 2
    column_width = max(
        *(_panels(plan, scale).width for plan in schedule.plans),
        *(math.ceil(font.getlength(_caption(plan, query))) for _, _, plan, queries in sections for query in queries),
    )
    width = max(
        queries_abreast * (column_width + 2 * _GAP) - 2 * _GAP,
        *(title_font.getlength(title) for title, *_ in sections),
        *(font.getlength(facts) for _, facts, *_ in sections),
    )
    heights = []
    for _, _, plan, queries in sections:
        rows = math.ceil(len(queries) / queries_abreast) * _panels(plan, scale).rows
        captions = math.ceil(len(queries) / queries_abreast) * (line + _GAP)
        heights.append(line + round(1.5 * _TITLE) + rows * panel_height + (rows - 1) * _GAP + captions + 2 * _GAP)
    legend = _legend([plan for _, _, plan, _ in sections])
    legend_lines = _flowed(legend, font, width)
    size = round(width) + 2 * _MARGIN, sum(heights) + line * len(legend_lines) + 2 * _MARGIN
    figure = Image.new("RGB", size, _GROUND)
    pen = ImageDraw.Draw(figure)

    # 2. One pattern below another.
    top = _MARGIN
    for (title, facts, plan, queries), height in zip(sections, heights, strict=True):
        pen.text((_MARGIN, top), title, _INK, title_font)
        y = top + round(1.5 * _TITLE)
        pen.text((_MARGIN, y), facts, _SOFT, font)
        y += line
        for number, query in enumerate(queries):
            column = number % queries_abreast
            x = _MARGIN + column * (column_width + 2 * _GAP)
            pen.text((x, y + _GAP // 2), _caption(plan, query), _INK, font)
            bottom = _draw_query(pen, plan, query, x, y + line + _GAP // 2, scale, font, line)
            if column == queries_abreast - 1 or query is queries[-1]:
                y = bottom + _GAP
        top += height

    # 3. The legend.
    for entries in legend_lines:
        x = float(_MARGIN)
        for fill, dot, words in entries:
            _draw_swatch(pen, round(x), top + 2, _TEXT - 1, fill, dot)
            pen.text((x + _TEXT + 5, top), words, _INK, font)
            x += _legend_width(words, font)
        top += line
    # White, the shades of letters and a few colours: a palette holds them all, in a third of the bytes.
    return figure.quantize(256, dither=Image.Dither.NONE)


@dataclass(frozen=True)
class _Panels:
    """How the panels of one query group are laid out, in pixels."""

    width: int
    height: int  # of one panel
    panel_width: int
    abreast: int
    rows: int
    of_video: bool


def _panels(plan: Plan, scale: float) -> _Panels:
    *frames, rows, columns = plan.grouping.grid.shape
    count = plan.grouping.counts[0] if frames else 1
    abreast = min(count, _MOST_ABREAST)
    panel_width, panel_height = math.ceil(columns * scale), math.ceil(rows * scale)
    return _Panels(
        abreast * panel_width + (abreast - 1) * _GAP,
        panel_height,
        panel_width,
        abreast,
        math.ceil(count / abreast),
        bool(frames),
    )


def _scale(schedule: AttentionSchedule) -> float:
    """Pixels per token, the same in all panels of a figure."""
    *frames, rows, columns = schedule.grid.shape
    if frames:
        most = min(_MOST_ABREAST, max(plan.grouping.counts[0] for plan in schedule.plans))
        fitting = (_WIDTH_OF_VIDEOS - (most - 1) * _GAP) / most / columns
    else:
        fitting = _SIDE_OF_IMAGES / max(rows, columns)
    sides = [side for plan in schedule.plans for side in plan.grouping.group[-2:]]
    return max(_SMALLEST_GROUP / min(sides), min(_LARGEST_GROUP / max(sides), fitting))


def _title(plan: Plan, preset: Preset) -> str:
    """The preset's name and the attention that a plan stands for."""
    for attention in preset.attentions:
        if (attention.pattern(), attention.group) == (plan.pattern, plan.grouping.group):
            return f"{preset.name}: {attention.summary}"
    return f"{preset.name}: full attention"


def _facts(plan: Plan, schedule: AttentionSchedule) -> str:
    """Density, and if there are several plans the share of the run that this one serves."""
    grouping = plan.grouping
    axes = " (frames of latents, rows, columns)" if grouping.grid.axes == 3 else ""
    shape, counts = shape_text(grouping.grid.shape), shape_text(grouping.counts)
    facts = f"{shape} tokens{axes} in {counts} groups; density {plan.density:.3f}"
    if len(schedule.plans) == 1:
        return facts
    return f"{facts}; {schedule.shares[plan]:.1%} of all steps, layers and heads"


def query_groups(plan: Plan) -> list[QueryGroup]:
    """The group in the middle, and the last one, which borders cut; of full attention one is enough."""
    counts = plan.grouping.counts
    places = [tuple(count // 2 for count in counts)]
    if not isinstance(plan.pattern, Full):
        places.append(tuple(count - 1 for count in counts))
    return [_query_group(plan, place) for place in dict.fromkeys(places)]


def _query_group(plan: Plan, group: tuple[int, ...]) -> QueryGroup:
    grouping = plan.grouping
    levels = plan.pattern.levels(np.asarray([group], np.int64), grouping.coordinates, grouping.counts)[0]
    means = chosen = 0
    if plan.candidates is not None:
        ranked = np.sort(grouping.starts)  # candidates count groups in token order
        at = np.searchsorted(ranked, grouping.starts[np.ravel_multi_index(group, grouping.counts)])
        exact, fine, single = plan.candidates.counts[at].tolist()
        chosen, means = exact * plan.candidates.tokens, fine * plan.candidates.means + single
    for number, level in enumerate(() if plan.candidates else plan.pattern.far_levels, start=1):
        for other in grouping.coordinates[levels == number]:
            extents = zip(_extents(plan, other.tolist()), level.block, strict=True)
            means += math.prod(-(-extent // side) for extent, side in extents)
    tokens = int(grouping.sizes[levels == 0].sum())
    return QueryGroup(group, _extents(plan, group), levels.reshape(grouping.counts), tokens, means, chosen)


def _caption(plan: Plan, query: QueryGroup) -> str:
    """For example `4x8x8 tokens attend 6,912 of 118,800, and 2,052 means`; after a plus sign those by content."""
    means = f", and {query.means:,} means" if query.means else ""
    chosen = f" + {query.chosen:,}" if query.chosen else ""
    of_all = f"{query.tokens:,}{chosen} of {plan.image_tokens:,}"
    return f"{shape_text(query.extents)} tokens attend {of_all}{means}"


def _extents(plan: Plan, group: Sequence[int]) -> tuple[int, ...]:
    """Tokens of a group on each axis."""
    grouping = plan.grouping
    axes = zip(group, grouping.group, grouping.grid.shape, strict=True)
    return tuple(min(side, extent - place * side) for place, side, extent in axes)


def _draw_query(
    pen: ImageDraw, plan: Plan, query: QueryGroup, left: int, top: int, scale: float, font: object, line: int
) -> int:
    """Draws the panels of a query group, and returns where they end."""
    panels = _panels(plan, scale)
    y = top
    for number, frame in enumerate(query.levels.reshape(-1, *query.levels.shape[-2:])):
        column = number % panels.abreast
        if number and not column:
            y += line + panels.height + _GAP
        x = left + column * (panels.panel_width + _GAP)
        start = y
        if panels.of_video:
            pen.text((x, y), _frames_title(plan, number), _SOFT, font)  # pyright: ignore[reportArgumentType]
            start += line
        for row in range(frame.shape[0]):
            for place in range(frame.shape[1]):
                level = int(frame[row, place])
                is_query = (row, place) == query.group[-2:] and (not panels.of_video or number == query.group[0])
                _draw_group(pen, plan, (row, place), level, is_query, x, start, scale)
    return y + (line if panels.of_video else 0) + panels.height


def _frames_title(plan: Plan, number: int) -> str:
    """Which frames of latents a panel shows, counted from 1."""
    side, extent = plan.grouping.group[0], plan.grouping.grid.shape[0]
    first, last = number * side + 1, min(extent, (number + 1) * side)
    frames = f"{first}" if first == last else f"{first}-{last}"
    return f"frames {frames}" if number == 0 else frames


def _draw_group(
    pen: ImageDraw, plan: Plan, place: tuple[int, int], level: int, is_query: bool, left: int, top: int, scale: float
) -> None:
    """Draws a group, with a thin line to the next ones."""
    sides, shape = plan.grouping.group[-2:], plan.grouping.grid.shape[-2:]
    (y, y_end), (x, x_end) = (
        (number * side, min(extent, (number + 1) * side))
        for number, side, extent in zip(place, sides, shape, strict=True)
    )
    box = _box(x, y, x_end, y_end, left, top, scale)
    if is_query or level <= 0:
        pen.rectangle(box, QUERY if is_query else EXACT if level == 0 else UNATTENDED)
        return
    dot, ground = MEANS[min(level, len(MEANS)) - 1]
    pen.rectangle(box, ground)
    rows, columns = plan.pattern.far_levels[level - 1].block[-2:]
    if min(rows, columns) * scale < _SMALLEST_BLOCK:
        pen.rectangle(box, dot)
        return
    for row in range(y, y_end, rows):
        for column in range(x, x_end, columns):
            block = _box(column, row, min(x_end, column + columns), min(y_end, row + rows), left, top, scale)
            pen.rectangle(_dot(block), dot)


def _box(x: int, y: int, x_end: int, y_end: int, left: int, top: int, scale: float) -> tuple[int, int, int, int]:
    """Pixels of a stretch of tokens, without a line of one pixel at its right and lower edge."""
    x0, y0 = left + round(x * scale), top + round(y * scale)
    return x0, y0, max(x0, left + round(x_end * scale) - 2), max(y0, top + round(y_end * scale) - 2)


def _dot(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The middle of a box, about half as wide and high."""
    x, y, x_end, y_end = box
    wide, high = (max(1, round(0.5 * (end - start + 1))) for start, end in ((x, x_end), (y, y_end)))
    dot_x, dot_y = x + (x_end - x + 1 - wide) // 2, y + (y_end - y + 1 - high) // 2
    return dot_x, dot_y, dot_x + wide - 1, dot_y + high - 1


_LegendEntry = tuple[Colour, Colour | None, str]


def _legend(plans: Sequence[Plan]) -> list[_LegendEntry]:
    """Colours and what they mean, for what is in the figure."""
    entries: list[_LegendEntry] = [(QUERY, None, "query group"), (EXACT, None, "attended token by token")]
    for plan in plans:
        for number, words in enumerate(far_words(plan)):
            dot, ground = MEANS[min(number, len(MEANS) - 1)]
            entries.append((ground, dot, words))
    if any((query.levels == NOT_ATTENDED).any() for plan in plans for query in query_groups(plan)):
        entries.append((UNATTENDED, None, "not attended"))
    return list(dict.fromkeys(entries))


def _flowed(legend: Sequence[_LegendEntry], font: object, width: float) -> list[list[_LegendEntry]]:
    """Entries in lines of at most a width."""
    lines: list[list[_LegendEntry]] = [[]]
    for entry in legend:
        taken = sum(_legend_width(words, font) for *_, words in (*lines[-1], entry))
        if lines[-1] and taken > width:
            lines.append([])
        lines[-1].append(entry)
    return lines


def _legend_width(words: str, font: object) -> float:
    return font.getlength(words) + 3 * _TEXT  # type: ignore[attr-defined]


def _draw_swatch(pen: ImageDraw, x: int, y: int, side: int, fill: Colour, dot: Colour | None) -> None:
    box = (x, y, x + side - 1, y + side - 1)
    pen.rectangle(box, fill)
    if dot is not None:
        pen.rectangle(_dot(box), dot)
