"""The plots of a benchmark: one colour and one shape per variant in all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

import numpy as np

from grat_cli.bench import figures
from grat_cli.bench.results import WHOLE_RUNS, BenchResult, Case, Level, Row
from grat_cli.pages.plots import (
    COLOURS,
    Look,
    Mark,
    Plot,
    about,
    dashed,
    draw_marks,
    draw_named_lines,
    draw_named_marks,
    finished,
    from_zero,
    ink,
    logarithmic,
    new_axes,
    new_rows,
    tick_text,
)

_SHAPES = {"full": "diamond", "pattern": "circle", "baseline": "square", "peer": "triangle", "noise floor": "cross"}
_SQUARE_HEIGHT = 468.0


def looks_of(result: BenchResult) -> dict[str, Look]:
    """A look for every name, the same in all cases; full attention is neutral."""
    found: dict[str, Look] = {}
    for row in chain.from_iterable(figures.ordered(case) for case in result.cases):
        if row.name not in found:
            coloured = sum(look.colour != "neutral" for look in found.values())
            colour = "neutral" if row.role == "full" else f"colour-{coloured % COLOURS}"
            found[row.name] = Look(colour, _SHAPES[row.role])
    return found


def plots(level: Level, case: Case, looks: Mapping[str, Look], identifier: str) -> list[Plot]:
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


def plot_across_cases(result: BenchResult, looks: Mapping[str, Look]) -> Plot | None:
    """Speed-up against the length of the sequence, where several sizes were measured."""
    lines: dict[str, dict[int, float]] = {}
    for case in result.cases:
        tokens = math.prod(case.grid) + case.text_len if case.grid else 0
        for row in figures.measured(case):
            # A peer stands beside several patterns under one name, so its rows make no line.
            if row.role in ("pattern", "baseline") and tokens and row.speedup is not None and _drawable(row.speedup):
                lines.setdefault(row.name, {}).setdefault(tokens, row.speedup)
    lines = {name: dict(sorted(line.items())) for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    lengths = sorted({tokens for line in lines.values() for tokens in line})
    axes = new_axes("tokens", "speed-up", lines=len(lines))
    logarithmic(axes, "x", lengths, least=2.0)
    logarithmic(axes, "y", [1.0, *chain.from_iterable(line.values() for line in lines.values())], least=3.0)
    least = (lengths[-1] / lengths[0]) ** 0.15
    # The sizes themselves stand on the axis, as far as there is room.
    shown = lengths[:1] + [length for last, length in pairwise(lengths) if length / last > least]
    axes.set_xticks(shown, list(map(tick_text, shown)))
    axes.axhline(1.0, **dashed())
    marks = [
        Mark(name, looks[name], tokens, speedup, f"{figures.speedup_text(speedup)} at {tokens:,} tokens")
        for name, line in lines.items()
        for tokens, speedup in line.items()
    ]
    draw_marks(axes, marks, size=7)
    draw_named_lines(axes, [(name, looks[name], list(line), list(line.values())) for name, line in lines.items()])
    caption = "Dashed: full attention. Both axes are logarithmic."
    return finished(axes, "sizes", "Speed-up against size", caption, _described(marks))


def _trade_off(
    level: Level, case: Case, rows: Sequence[Row], looks: Mapping[str, Look], identifier: str
) -> Plot | None:
    """Speed-up against density on logarithmic axes, with the ideal.

    Full attention is left out: it is at 1, 1 by definition, and would push all others into a corner.
    """
    marks = [
        _mark(row, looks, row.density, row.speedup, f"density {figures.density_text(row.density)}, {_faster(row)}")
        for row in rows
        if row.role != "full" and row.density is not None and row.speedup is not None
        if _drawable(row.density, row.speedup)
    ]
    if not marks:
        return None
    full = figures.full_of(case)
    share = 1.0 if level == "attention" else full.attention_share if full is not None else None
    axes = new_axes("density (share of pairs attended)", "speed-up", height=_SQUARE_HEIGHT)
    logarithmic(axes, "x", [mark.x for mark in marks])
    logarithmic(axes, "y", [mark.y for mark in marks], least=3.0)
    caption = "Both axes are logarithmic."
    ideal: list[tuple[float, float]] = []
    if share is not None:
        low, high = axes.get_xlim()
        ideal = [(at, 1 / (1 - share + share * at)) for at in np.geomspace(low, min(high, 1.0), 61)]
        axes.plot(*zip(*ideal, strict=True), **dashed(), gid=about("ideal", "ideal"))
        meaning = (
            "1/density, on which full attention is at 1."
            if level == "attention"
            else f"if attention ({share:.0%} of a step of full attention) took time in proportion to density and all "
            "else stayed."
        )
        caption = f"Dashed: the ideal, {meaning} {caption}"
    draw_named_marks(axes, marks, [ideal])
    return finished(axes, identifier, "Speed-up against density", caption, _described(marks))


def _quality(rows: Sequence[Row], looks: Mapping[str, Look], identifier: str) -> Plot | None:
    """SSIM with its interval against speed-up; the noise floor as a line."""
    points = [
        (row, row.quality.ssim, row.quality.ssim_interval or 0.0)
        for row in rows
        if row.quality is not None and row.speedup is not None and _drawable(row.speedup)
        if math.isfinite(row.quality.ssim) and math.isfinite(row.quality.ssim_interval or 0.0)
    ]
    if all(row.role == "noise floor" for row, *_ in points):
        return None
    marks = [
        _mark(row, looks, row.speedup or 1.0, ssim, f"SSIM {ssim:.3f} ± {interval:.3f}, {_faster(row)}")
        for row, ssim, interval in points
    ]
    axes = new_axes("speed-up of denoising", "SSIM to full attention", height=_SQUARE_HEIGHT)
    logarithmic(axes, "x", [1.0, *(mark.x for mark in marks)], least=3.0)
    intervals = [(ssim - interval, ssim + interval) for _, ssim, interval in points]
    lowest, highest = min(low for low, _ in intervals), max(1.0, *(high for _, high in intervals))
    axes.set_ylim(lowest - 0.08 * (highest - lowest) - 0.01, highest + 0.01)
    floors = [ssim for row, ssim, _ in points if row.role == "noise floor"]
    lines = [[(at, ssim) for at in np.geomspace(*axes.get_xlim(), 61)] for ssim in floors]
    for line in lines:
        axes.plot(*zip(*line, strict=True), **dashed())
    for mark, (low, high) in zip(marks, intervals, strict=True):
        axes.vlines(mark.x, low, high, ink(mark.look.colour), linewidth=1.5)
        lines.append([(mark.x, at) for at in np.linspace(low, high, 9)])
    draw_named_marks(axes, marks, lines)
    caption = "Bars are 95 % intervals of the mean. " + (
        "Dashed: the noise floor, full attention against itself on another kernel."
        if floors
        else "At 1 there is no difference."
    )
    return finished(axes, identifier, "Similarity against speed-up", caption, _described(marks))


def _efficiency(level: Level, rows: Sequence[Row], looks: Mapping[str, Look], identifier: str) -> Plot | None:
    """Bars of sparse efficiency, with a line at 1."""
    marks = [
        _mark(row, looks, row.sparse_efficiency, 0, f"{row.sparse_efficiency:,.2f}")
        for row in rows
        if row.role != "full" and row.sparse_efficiency is not None and _drawable(row.sparse_efficiency)
    ]
    if not marks:
        return None
    axes = new_rows([mark.name for mark in marks], [mark.about for mark in marks], "speed-up × density")
    from_zero(axes, "x", [1.05, *(mark.x for mark in marks)])
    for place, mark in enumerate(marks):
        axes.barh(place, mark.x, 0.58, color=ink(mark.look.colour), gid=about("bar", f"{mark.name}: {mark.about}"))
    axes.axvline(1.0, **dashed())
    heading = "Sparse efficiency" if level == "attention" else "Sparse efficiency of attention"
    caption = "Dashed: 1, where every attended pair costs what it costs in full attention."
    return finished(axes, identifier, heading, caption, _described(marks))


def _times(level: Level, case: Case, rows: Sequence[Row], looks: Mapping[str, Look], identifier: str) -> Plot | None:
    """Median times with whiskers from minimum to maximum."""
    rows = [row for row in rows if _drawable(*row.times_ms)]
    if len(rows) < 2:
        return None
    unit = figures.time_unit(case)
    spans = [_span(unit, row.times_ms) for row in rows]
    marks = [
        _mark(row, looks, median, place, f"{unit.text(row.median_ms or 0)} ({unit.range(row.times_ms)})")
        for place, (row, (_, median, _)) in enumerate(zip(rows, spans, strict=True))
    ]
    axes = new_rows([mark.name for mark in marks], [unit.text(row.median_ms or 0) for row in rows], unit.name)
    values = list(chain.from_iterable(spans))
    wide = max(values) / min(values) > 8
    if wide:
        logarithmic(axes, "x", values)
    else:
        from_zero(axes, "x", values)
    for mark, (low, _, high) in zip(marks, spans, strict=True):
        axes.hlines(mark.y, low, high, ink(mark.look.colour), linewidth=1.5)
    draw_marks(axes, marks, size=9)
    what = f"all denoising steps of a {figures.OUTPUTS[level]}" if level in WHOLE_RUNS else "one attention call"
    caption = f"Median of {what}; whiskers, where longer than the point, from the shortest to the longest."
    if wide:
        caption += " The axis is logarithmic."
    heading = "Time of attention" if level == "attention" else "Time of denoising"
    return finished(axes, identifier, heading, caption, _described(marks))


def _steps(case: Case, rows: Sequence[Row], looks: Mapping[str, Look], identifier: str) -> Plot | None:
    """Time of a step: attention and the rest, stacked."""
    rows = [row for row in rows if _drawable(*row.times_ms)]
    if len(rows) < 2:
        return None
    unit = figures.time_unit(case)
    ends = [
        unit.text(row.median_ms or 0) + (f" · {figures.speedup_text(row.speedup)}" if row.speedup else "")
        for row in rows
    ]
    axes = new_rows([figures.label(row) for row in rows], ends, unit.name, room=22)
    from_zero(axes, "x", [max(row.times_ms) / unit.milliseconds for row in rows])
    marks = []
    for place, row in enumerate(rows):
        low, median, high = _span(unit, row.times_ms)
        attention = min((row.attention_ms or 0.0) / unit.milliseconds, median)
        parts = f", {unit.text(row.attention_ms)} of it in attention" if row.attention_ms else ""
        mark = _mark(row, looks, median, place, f"{unit.text(row.median_ms or 0)}{parts}")
        told = about("bar", f"{mark.name}: {mark.about}")
        axes.barh(place, median - attention, 0.58, attention, color=ink("rest"), gid=told)
        axes.barh(place, attention, 0.58, color=ink(mark.look.colour), gid=told)
        axes.hlines(place, low, high, ink("ink"), linewidth=1.5)
        marks.append(mark)
    for colour, name in (("neutral", "attention"), ("rest", "everything else")):
        axes.barh(-1, 0, color=ink(colour), label=name)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1, handleheight=1)
    caption = (
        "Median step; whiskers from the shortest to the longest. Behind the times: the speed-up of the whole step."
    )
    return finished(axes, identifier, "Time of a step", caption, _described(marks))


def _over_steps(rows: Sequence[Row], looks: Mapping[str, Look], identifier: str) -> Plot | None:
    """Time of each denoising step over a run, a line per variant."""
    rows = [row for row in rows if len(row.step_times_ms) > 1 and _drawable(*row.step_times_ms)]
    if not rows:
        return None
    longest = max(time for row in rows for time in row.step_times_ms)
    unit = figures.SECONDS if longest >= 10_000 else figures.MILLISECONDS
    axes = new_axes("denoising step", unit.name, lines=len(rows))
    from_zero(axes, "y", [longest / unit.milliseconds])
    most = max(len(row.step_times_ms) for row in rows)
    axes.set_xlim(1 - 0.03 * most, most + 0.03 * most)
    axes.locator_params("x", integer=True)
    lines = [
        (
            figures.label(row),
            looks[row.name],
            range(1, len(row.step_times_ms) + 1),
            [time / unit.milliseconds for time in row.step_times_ms],
        )
        for row in rows
    ]
    draw_named_lines(axes, lines)
    described = "; ".join(
        f"{figures.label(row)}: {unit.text(min(row.step_times_ms))} to {unit.text(max(row.step_times_ms))}"
        for row in rows
    )
    return finished(axes, identifier, "Time of each denoising step", "Median over all runs.", f"{described}.")


def _span(unit: figures.TimeUnit, times_ms: Sequence[float]) -> tuple[float, float, float]:
    """Shortest, median and longest."""
    low, median, high = (bound(times_ms) / unit.milliseconds for bound in (min, statistics.median, max))
    return low, median, high


def _mark(row: Row, looks: Mapping[str, Look], x: float, y: float, about: str) -> Mark:
    return Mark(figures.label(row), looks[row.name], x, y, about)


def _faster(row: Row) -> str:
    return f"speed-up {figures.speedup_text(row.speedup or 1.0)}"


def _described(marks: Iterable[Mark]) -> str:
    return "; ".join(f"{mark.name}: {mark.about}" for mark in marks) + "."


def _drawable(*values: float) -> bool:
    """Whether a logarithmic axis can hold them."""
    return bool(values) and all(math.isfinite(value) and value > 0 for value in values)
