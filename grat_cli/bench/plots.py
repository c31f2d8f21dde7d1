"""The plots of a benchmark as inline SVG: one colour and one shape per variant in all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from grat_cli.bench import figures
from grat_cli.bench.charts import (
    WIDTH,
    Plot,
    Rows,
    Style,
    area_with_names,
    axes,
    bar,
    escaped,
    lines_with_names,
    svg_plot,
)
from grat_cli.bench.results import WHOLE_RUNS, BenchResult, Case, Level, Row
from grat_cli.bench.svg import (
    Box,
    Scale,
    draw_label,
    element,
    fitted,
    line,
    log_scale,
    marker,
    place_labels,
    scale_from_zero,
    text,
    text_width,
)

COLOURS = 8
_SHAPES = {"full": "diamond", "pattern": "circle", "baseline": "square", "peer": "triangle", "noise floor": "cross"}
_RADIUS = 5.0
_SQUARE = Box(46, 24, WIDTH - 8, 424)
_SQUARE_HEIGHT = _SQUARE.bottom + 44


def styles(result: BenchResult) -> dict[str, Style]:
    """A style for every name, the same in all cases; full attention is neutral."""
    found: dict[str, Style] = {}
    for row in chain.from_iterable(figures.ordered(case) for case in result.cases):
        if row.name not in found:
            coloured = sum(style.colour != "neutral" for style in found.values())
            colour = "neutral" if row.role == "full" else f"colour-{coloured % COLOURS}"
            found[row.name] = Style(colour, _SHAPES[row.role])
    return found


def plots(level: Level, case: Case, looks: Mapping[str, Style], identifier: str) -> list[Plot]:
    """The plots that this case has figures for."""
    rows = figures.measured(case)
    made = [
        _quality(rows, looks, f"{identifier}-quality"),
        _trade_off(level, case, rows, looks, f"{identifier}-density") if level not in WHOLE_RUNS else None,
        _steps(case, rows, looks, f"{identifier}-steps") if level == "step" else None,
        _efficiency(level, rows, looks, f"{identifier}-efficiency"),
        _times(level, case, rows, looks, f"{identifier}-times") if level != "step" else None,
        _over_steps(rows, looks, f"{identifier}-over-steps"),
    ]
    return [plot for plot in made if plot is not None]


def plot_across_cases(result: BenchResult, looks: Mapping[str, Style]) -> Plot | None:
    """Speed-up against the length of the sequence, where several sizes were measured."""
    lines: dict[str, dict[int, Row]] = {}
    for case in result.cases:
        tokens = math.prod(case.grid) + case.text_len if case.grid else 0
        for row in figures.measured(case):
            # A peer stands beside several patterns under one name, so its rows make no line.
            if row.role in ("pattern", "baseline") and tokens and row.speedup is not None and _drawable(row.speedup):
                lines.setdefault(row.name, {}).setdefault(tokens, row)
    lines = {name: dict(sorted(line_rows.items())) for name, line_rows in lines.items() if len(line_rows) > 1}
    if not lines:
        return None
    lengths = sorted({tokens for line_rows in lines.values() for tokens in line_rows})
    speedups = [row.speedup or 1.0 for line_rows in lines.values() for row in line_rows.values()]
    rows = [next(iter(line_rows.values())) for line_rows in lines.values()]
    area = area_with_names(list(map(figures.label, rows)))
    across = log_scale(lengths, area.left, area.right, least=2.0)
    up = log_scale([*speedups, 1.0], area.bottom, area.top, least=3.0)
    drawn = [axes(across, up, area, "tokens", "speed-up", across_ticks=lengths)]
    drawn.append(line(area.left, up(1), area.right, up(1), "ideal"))
    places = [
        [(across(tokens), up(row.speedup or 1.0)) for tokens, row in line_rows.items()] for line_rows in lines.values()
    ]
    drawn += lines_with_names(_named(rows, looks), places, area)
    for row, line_places in zip(rows, places, strict=True):
        look = looks[row.name]
        drawn += [marker(look.shape, x, y, 3.5, f"point {look.colour}") for x, y in line_places[:-1]]
    described = "; ".join(
        f"{figures.plain(name)}: "
        + ", ".join(f"{figures.speedup_text(row.speedup or 1.0)} at {n:,} tokens" for n, row in line_rows.items())
        for name, line_rows in lines.items()
    )
    heading = "Speed-up against size"
    svg = svg_plot("sizes", heading, f"{described}.", area.bottom + 44, drawn)
    return Plot(heading, "Dashed: full attention. Both axes are logarithmic.", svg)


def swatch(style: Style) -> str:
    """The variant's point, for tables."""
    drawn = marker(style.shape, 7, 7, _RADIUS, f"point {style.colour}")
    return element("svg", drawn, viewBox="0 0 14 14", class_="swatch", aria_hidden="true")


def _trade_off(
    level: Level, case: Case, rows: Sequence[Row], looks: Mapping[str, Style], identifier: str
) -> Plot | None:
    """Speed-up against density on logarithmic axes, with the ideal.

    Full attention is left out: it is at 1, 1 by definition, and would push all others into a corner.
    """
    points = [
        (row, row.density, row.speedup)
        for row in rows
        if row.role != "full" and row.density is not None and row.speedup is not None
        if _drawable(row.density, row.speedup)
    ]
    if not points:
        return None
    full = figures.full_of(case)
    share = 1.0 if level == "attention" else full.attention_share if full is not None else None

    area = _SQUARE
    across = log_scale([density for _, density, _ in points], area.left, area.right)
    up = log_scale([speedup for _, _, speedup in points], area.bottom, area.top, least=3.0)
    ideal: list[tuple[float, float]] = []
    if share is not None:
        for part in range(61):
            density = across.low * (across.high / across.low) ** (part / 60)
            best = 1 / (1 - share + share * density)
            if density <= 1 and up.low <= best <= up.high:
                ideal.append((across(density), up(best)))
    drawn = [axes(across, up, area, "density (share of pairs attended)", "speed-up")]
    if len(ideal) > 1:
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in ideal)
        drawn.append(element("polyline", element("title", "ideal"), points=path, class_="ideal"))
    drawn += _labelled_points(
        [(row, across(density), up(speedup)) for row, density, speedup in points],
        looks,
        area,
        [
            f"density {figures.density_text(density)}, speed-up {figures.speedup_text(speedup)}"
            for _, density, speedup in points
        ],
        ideal,
    )
    if level == "attention":
        caption = "Dashed: the ideal, 1/density, on which full attention is at 1. Both axes are logarithmic."
    elif share is not None:
        caption = (
            f"Dashed: the ideal, if attention ({share:.0%} of a step of full attention) took time in proportion to "
            "density and all else stayed. Both axes are logarithmic."
        )
    else:
        caption = "Both axes are logarithmic."
    described = _described(
        (row, f"density {figures.density_text(density)}, speed-up {figures.speedup_text(speedup)}")
        for row, density, speedup in points
    )
    return Plot(
        "Speed-up against density",
        caption,
        svg_plot(identifier, "Speed-up against density", described, _SQUARE_HEIGHT, drawn),
        square=True,
    )


def _quality(rows: Sequence[Row], looks: Mapping[str, Style], identifier: str) -> Plot | None:
    """SSIM with its interval against speed-up; the noise floor as a line."""
    points = [
        (
            row,
            row.speedup,
            row.quality.ssim,
            row.quality.ssim_interval or 0.0,
        )
        for row in rows
        if row.quality is not None and row.speedup is not None and _drawable(row.speedup)
    ]
    if not any(row.role != "noise floor" for row, *_ in points):
        return None
    area = _SQUARE
    across = log_scale([speedup for _, speedup, _, _ in points] + [1.0], area.left, area.right, least=3.0)
    lowest = min(ssim - interval for _, _, ssim, interval in points)
    highest = max(1.0, max(ssim + interval for _, _, ssim, interval in points))
    up = Scale(lowest - 0.08 * (highest - lowest) - 0.01, highest + 0.01, area.bottom, area.top)
    drawn = [axes(across, up, area, "speed-up of denoising", "SSIM to full attention")]
    floors = [(row, ssim) for row, _, ssim, _ in points if row.role == "noise floor"]
    levels = [[(area.left, up(ssim)), (area.right, up(ssim))] for _, ssim in floors]
    drawn += [line(start[0], start[1], stop[0], stop[1], "ideal") for start, stop in levels]
    obstacles = []
    for row, speedup, ssim, interval in points:
        x, top, bottom = across(speedup), up(ssim + interval), up(ssim - interval)
        drawn.append(_whisker(x, top, x, bottom, looks[row.name]))
        obstacles.append(Box(x - 3, top, x + 3, bottom))
    facts = [
        f"SSIM {ssim:.3f} ± {interval:.3f}, speed-up {figures.speedup_text(speedup)}"
        for _, speedup, ssim, interval in points
    ]
    drawn += _labelled_points(
        [(row, across(speedup), up(ssim)) for row, speedup, ssim, _ in points],
        looks,
        area,
        facts,
        *levels,
        obstacles=obstacles,
    )
    described = _described((row, fact) for (row, *_), fact in zip(points, facts, strict=True))
    caption = "Bars are 95 % intervals of the mean. " + (
        "Dashed: the noise floor, full attention against itself on another kernel."
        if floors
        else "At 1 there is no difference."
    )
    return Plot(
        "Similarity against speed-up",
        caption,
        svg_plot(identifier, "Similarity against speed-up", described, _SQUARE_HEIGHT, drawn),
        square=True,
    )


def _efficiency(level: Level, rows: Sequence[Row], looks: Mapping[str, Style], identifier: str) -> Plot | None:
    """Bars of sparse efficiency, with a line at 1."""
    bars = [
        (row, row.sparse_efficiency)
        for row in rows
        if row.role != "full" and row.sparse_efficiency is not None and _drawable(row.sparse_efficiency)
    ]
    if not bars:
        return None
    frame = Rows([figures.label(row) for row, _ in bars], [f"{value:,.2f}" for _, value in bars])
    across = scale_from_zero([*(value for _, value in bars), 1.05], frame.area.left, frame.area.right)
    drawn = [frame.axes(across, "speed-up × density")]
    for (row, value), y in zip(bars, frame.middles, strict=True):
        drawn.append(bar(0, value, y, across, f"bar {looks[row.name].colour}", f"{figures.label(row)}: {value:.2f}"))
    drawn += [line(across(1), frame.area.top, across(1), frame.area.bottom, "ideal"), *frame.names()]
    described = _described((row, f"{value:.2f}") for row, value in bars)
    caption = "Dashed: 1, where every attended pair costs what it costs in full attention."
    heading = "Sparse efficiency" if level == "attention" else "Sparse efficiency of attention"
    return Plot(heading, caption, svg_plot(identifier, heading, described, frame.height, drawn))


def _times(level: Level, case: Case, rows: Sequence[Row], looks: Mapping[str, Style], identifier: str) -> Plot | None:
    """Median times with whiskers from minimum to maximum."""
    timed = [(row, row.median_ms) for row in rows if row.median_ms is not None and _drawable(*row.times_ms)]
    if len(timed) < 2:
        return None
    unit = figures.time_unit(case)
    frame = Rows([figures.label(row) for row, _ in timed], [unit.text(median) for _, median in timed])
    values = [time / unit.milliseconds for row, _ in timed for time in row.times_ms]
    logarithmic = max(values) / min(values) > 8
    if logarithmic:
        across = log_scale(values, frame.area.left, frame.area.right)
    else:
        across = scale_from_zero(values, frame.area.left, frame.area.right)
    drawn = [frame.axes(across, unit.name)]
    for (row, median), y in zip(timed, frame.middles, strict=True):
        low, high = (across(bound / unit.milliseconds) for bound in (min(row.times_ms), max(row.times_ms)))
        title = element("title", escaped(f"{figures.label(row)}: {unit.text(median)} ({unit.range(row.times_ms)})"))
        look = looks[row.name]
        drawn.append(_whisker(low, y, high, y, look))
        drawn.append(
            marker(look.shape, across(median / unit.milliseconds), y, _RADIUS - 0.5, f"point {look.colour}", title)
        )
    drawn += frame.names()
    described = _described((row, f"{unit.text(median)}, {unit.range(row.times_ms)}") for row, median in timed)
    what = f"all denoising steps of a {figures.OUTPUTS[level]}" if level in WHOLE_RUNS else "one attention call"
    caption = f"Median of {what}; whiskers, where longer than the point, from the shortest to the longest." + (
        " The axis is logarithmic." if logarithmic else ""
    )
    heading = "Time of attention" if level == "attention" else "Time of denoising"
    return Plot(heading, caption, svg_plot(identifier, heading, described, frame.height, drawn))


def _steps(case: Case, rows: Sequence[Row], looks: Mapping[str, Style], identifier: str) -> Plot | None:
    """Time of a step: attention and the rest, stacked."""
    timed = [(row, row.median_ms) for row in rows if row.median_ms is not None and _drawable(*row.times_ms)]
    if len(timed) < 2:
        return None
    unit = figures.time_unit(case)
    ends = [
        unit.text(median) + (f" · {figures.speedup_text(row.speedup)}" if row.speedup else "") for row, median in timed
    ]
    frame = Rows([figures.label(row) for row, _ in timed], ends, top=30)
    longest = [max(row.times_ms) / unit.milliseconds for row, _ in timed]
    across = scale_from_zero(longest, frame.area.left, frame.area.right)
    drawn = [frame.axes(across, unit.name)]
    x = frame.area.left
    for class_, name in (("bar neutral", "attention"), ("bar rest", "everything else")):
        drawn.append(element("rect", x=x, y=6.0, width=11.0, height=11.0, class_=class_))
        drawn.append(text(name, x + 16, 15.5, class_="name"))
        x += 32 + text_width(name)
    for (row, median), y in zip(timed, frame.middles, strict=True):
        total, look = median / unit.milliseconds, looks[row.name]
        attention = min(row.attention_ms or 0.0, median) / unit.milliseconds
        parts = (
            f"{unit.text(row.attention_ms)} of {unit.text(median)} in attention"
            if row.attention_ms
            else unit.text(median)
        )
        title = f"{figures.label(row)}: {parts}"
        drawn.append(bar(attention, total, y, across, "bar rest", title))
        if attention:
            drawn.append(bar(0, attention, y, across, f"bar {look.colour}", title))
        low, high = (across(bound / unit.milliseconds) for bound in (min(row.times_ms), max(row.times_ms)))
        drawn.append(_whisker(low, y, high, y, Style("ink", look.shape), cap=3))
    drawn += frame.names()
    described = _described(
        (
            row,
            f"{unit.text(median)}"
            + (f", {unit.text(row.attention_ms)} of it in attention" if row.attention_ms else ""),
        )
        for row, median in timed
    )
    caption = (
        "Median step; whiskers from the shortest to the longest. Behind the times: the speed-up of the whole step."
    )
    return Plot("Time of a step", caption, svg_plot(identifier, "Time of a step", described, frame.height, drawn))


def _over_steps(rows: Sequence[Row], looks: Mapping[str, Style], identifier: str) -> Plot | None:
    """Time of each denoising step over a run, a line per variant."""
    runs = [row for row in rows if len(row.step_times_ms) > 1 and _drawable(*row.step_times_ms)]
    if not runs:
        return None
    times = [time for row in runs for time in row.step_times_ms]
    unit = figures.SECONDS if max(times) >= 10_000 else figures.MILLISECONDS
    area = area_with_names(list(map(figures.label, runs)))
    most = max(len(row.step_times_ms) for row in runs)
    across = Scale(1, most, area.left + 6, area.right - 6)
    up = scale_from_zero([time / unit.milliseconds for time in times], area.bottom, area.top, room=0.06)
    every = next(step * size for size in _powers_of_ten() for step in (1, 2, 5) if most <= 8 * step * size)
    whole = sorted({1, *range(every, most + 1, every)})
    drawn = [axes(across, up, area, "denoising step", unit.name, across_ticks=whole)]
    places = [
        [(across(step), up(time / unit.milliseconds)) for step, time in enumerate(row.step_times_ms, start=1)]
        for row in runs
    ]
    drawn += lines_with_names(_named(runs, looks), places, area)
    described = _described(
        (row, f"{unit.text(min(row.step_times_ms))} to {unit.text(max(row.step_times_ms))}") for row in runs
    )
    svg = svg_plot(identifier, "Time of each denoising step", described, area.bottom + 44, drawn)
    return Plot("Time of each denoising step", "Median over all runs.", svg)


def _named(rows: Sequence[Row], looks: Mapping[str, Style]) -> list[tuple[str, Style]]:
    """Name and look of each row."""
    return [(figures.label(row), looks[row.name]) for row in rows]


def _labelled_points(
    points: Sequence[tuple[Row, float, float]],
    looks: Mapping[str, Style],
    area: Box,
    facts: Sequence[str],
    *lines: Sequence[tuple[float, float]],
    obstacles: Sequence[Box] = (),
) -> list[str]:
    named = [(x, y, fitted(figures.label(row), 150)) for row, x, y in points]
    labels = place_labels(named, area, lines=[polyline for polyline in lines if polyline], obstacles=obstacles)
    drawn = []
    for (row, x, y), label in zip(points, labels, strict=True):
        if label is not None:
            drawn += draw_label(label, x, y, looks[row.name].colour)
    for (row, x, y), fact in zip(points, facts, strict=True):
        title = element("title", escaped(f"{figures.label(row)}: {fact}"))
        drawn.append(marker(looks[row.name].shape, x, y, _RADIUS, f"point {looks[row.name].colour}", title))
    return drawn


def _powers_of_ten() -> Iterator[int]:
    size = 1
    while True:
        yield size
        size *= 10


def _whisker(x1: float, y1: float, x2: float, y2: float, look: Style, cap: float = 4) -> str:
    """A line, horizontal or vertical, with a cap at each end; without caps where they would blur a point."""
    if math.hypot(x2 - x1, y2 - y1) < 3.5 * cap:
        cap = 0.0
    across, up = (0.0, cap) if y1 == y2 else (cap, 0.0)
    path = (
        f"M{x1 - across:.2f} {y1 - up:.2f}L{x1 + across:.2f} {y1 + up:.2f}M{x1:.2f} {y1:.2f}L{x2:.2f} {y2:.2f}"
        f"M{x2 - across:.2f} {y2 - up:.2f}L{x2 + across:.2f} {y2 + up:.2f}"
    )
    return element("path", d=path, class_=f"whisker {look.colour}")


def _described(facts: Iterable[tuple[Row, str]]) -> str:
    return "; ".join(f"{figures.label(row)}: {fact}" for row, fact in facts) + "."


def _drawable(*values: float) -> bool:
    """Whether a logarithmic axis can hold them."""
    return bool(values) and all(math.isfinite(value) and value > 0 for value in values)
