"""A watched run as one HTML page that opens anywhere: figures of patterns, plots, and where single queries look."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from grat_cli.attention.recall import BINS, even_distances
from grat_cli.bench.charts import WIDTH, Plot, Rows, Style, area_with_names, axes, bar, escaped, lines_with_names
from grat_cli.bench.charts import svg_plot as svg
from grat_cli.bench.figures import density_text
from grat_cli.bench.page_parts import document, embedded, fact_list, figure
from grat_cli.bench.page_style import style_sheet
from grat_cli.bench.svg import Scale, element, line, scale_from_zero
from grat_cli.fidelity.attend import Attended
from grat_cli.fidelity.figures import (
    Estimate,
    PatternFigures,
    half_distance,
    layer_distances,
    pattern_figures,
    ranked_heads,
    with_interval,
)
from grat_cli.fidelity.overlays import Sheet, evenly
from grat_kernels import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

_COLOURS = 8
_SHAPES = ("circle", "square", "triangle", "diamond", "cross")
# What a page shows of models with more; the files beside it show all.
_MOST_LAYERS, _MOST_HEADS, _MOST_BARS, _MOST_INTERVALS = 8, 8, 16, 12
_JPEG_QUALITY = 88
_ALL_LAYERS = "all layers"
_MEANINGS = {
    "density": "Query-key pairs that are computed, over all pairs; a summary counts as one key.",
    "recall": "Softmax mass of full attention on the keys that the pattern attends token by token.",
    "text": "The part of it on text, which every pattern keeps.",
    "image": "The part of it on image tokens.",
    "output error": "Distance of what attention gives from what full attention gives, over the latter's length: root "
    "mean square over queries, heads, layers and steps. It counts what means of far tokens give back, recall does not.",
    "±": "Half of the 95 % confidence interval over the sampled queries, which are drawn without repetition.",
}


@dataclass(frozen=True)
class Shown:
    """One output of the run as the page shows it.

    Attributes:
        seed: of its noise.
        picture: with the queries marked.
        queries: sheets of each query.
    """

    seed: int
    picture: Image
    queries: Sequence[Sequence[Sheet]]


def plots(attended: Attended, grid: Grid) -> dict[str, Plot]:
    """All plots, by the name of their file without suffix."""
    figures = pattern_figures(attended)
    steps = [float(step) for step in attended.steps]
    layers = [float(layer) for layer in range(attended.record.text.shape[1])]
    drawn = {"distance": _distances(attended, grid)}
    if len(steps) > 1:
        drawn["recall-by-step"] = _lines(
            "recall-by-step",
            "Recall by step",
            "Share of full attention on what each pattern attends token by token, text included.",
            "denoising step",
            "recall",
            steps,
            [(one.name, one.recall_of_steps) for one in figures],
        )
        drawn["error-by-step"] = _lines(
            "error-by-step",
            "Output error by step",
            "How far each pattern's output is from that of full attention, over the latter's length.",
            "denoising step",
            "output error",
            steps,
            [(one.name, one.error_of_steps) for one in figures],
        )
    if len(layers) > 1:
        drawn["recall-by-layer"] = _lines(
            "recall-by-layer",
            "Recall by layer",
            "Layers count from 0, double blocks first.",
            "layer",
            "recall",
            layers,
            [(one.name, one.recall_of_layers) for one in figures],
        )
        drawn["error-by-layer"] = _lines(
            "error-by-layer",
            "Output error by layer",
            "Layers count from 0, double blocks first.",
            "layer",
            "output error",
            layers,
            [(one.name, one.error_of_layers) for one in figures],
        )
    drawn["heads"] = _heads(attended)
    return drawn


def alone(plot: Plot) -> str:
    """A plot as an SVG file that opens by itself."""
    height = plot.svg.partition(f'viewBox="0 0 {WIDTH:g} ')[2].partition('"')[0]
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH:g}" height="{2 * float(height):g}" '
    style = f"<style>{style_sheet()} svg {{ background: var(--ground); font-family: sans-serif }}</style>"
    head, tag, rest = plot.svg.partition(">")
    return opening + head.removeprefix("<svg ") + tag + style + rest + "\n"


def as_html(
    attended: Attended, grid: Grid, data: Mapping[str, Any], drawn: Mapping[str, Plot], shown: Sequence[Shown]
) -> str:
    """The page.

    Args:
        attended: the result.
        grid: image tokens.
        data: of `attend_figures.as_data`.
        drawn: of `plots`.
        shown: one per seed.
    """
    figures = pattern_figures(attended)
    title = f"Attention of {data['model']['name']}: {data['prompt']}"
    lead = element("ul", *(element("li", escaped(sentence)) for sentence in data["findings"]), class_="lead")
    facts = [
        f"{data['width']}x{data['height']} pixels" + (f", {data['frames']} frames" if "frames" in data else ""),
        f"{'x'.join(map(str, data['grid']))} tokens + {data['tokens']['text']} text",
        f"{data['layers']} layers of {data['heads']} heads",
        str(data["created"])[:10],
    ]
    body = [
        element(
            "header",
            element("p", "grat attend", class_="product"),
            element("h1", escaped(title)),
            element("p", escaped(" · ".join(facts)), class_="soft"),
            lead,
        ),
        element(
            "section",
            element("h2", "What patterns keep"),
            _table(figures),
            element("div", *(figure(plot) for name, plot in drawn.items() if "by" in name), class_="plots"),
        ),
        element(
            "section",
            element("h2", "How far attention looks"),
            element("div", *(figure(plot) for name, plot in drawn.items() if "by" not in name), class_="plots"),
        ),
        *(_queries(output, data, len(shown) > 1) for output in shown),
        element("section", element("h2", "What the columns mean"), fact_list(_MEANINGS)),
        _conditions(data),
        element("footer", f"Made by grat attend on {escaped(data['created'])[:10]}. Schema {escaped(data['schema'])}."),
    ]
    return document(title, body)


def _distances(attended: Attended, grid: Grid) -> Plot:
    """Cumulative mass by distance, a line per layer, with even attention dashed."""
    shares = layer_distances(attended)
    edges = np.arange(BINS + 1) / BINS
    chosen = evenly(len(shares), _MOST_LAYERS)
    named = [(f"layer {layer}", shares[layer]) for layer in chosen] + [(_ALL_LAYERS, shares.mean(0))]
    halves = [half_distance(of_bins) for _, of_bins in named]
    labels = [f"{name}: {half:.2f}" for (name, _), half in zip(named, halves, strict=True)]
    area = area_with_names(labels)
    across, up = Scale(0, 1, area.left, area.right), Scale(0, 1, area.bottom, area.top)
    part = [axes(across, up, area, "distance (share of the diagonal)", "share of attention to image tokens")]

    def places(of_bins: np.ndarray) -> list[tuple[float, float]]:
        reached = np.concatenate([[0.0], np.cumsum(of_bins)])
        return [(across(edge), up(min(1.0, share))) for edge, share in zip(edges, reached, strict=True)]

    even = " ".join(f"{x:.2f},{y:.2f}" for x, y in places(even_distances(grid)))
    part.append(element("polyline", element("title", "even attention"), points=even, class_="ideal"))
    looks = [
        Style("neutral" if name == _ALL_LAYERS else f"colour-{number % _COLOURS}", _SHAPES[number % len(_SHAPES)])
        for number, (name, _) in enumerate(named)
    ]
    # All lines end at 1: their names stand where each has half of its mass.
    part += _lines_named_midway(
        list(zip(labels, looks, strict=True)),
        [places(of_bins) for _, of_bins in named],
        halves,
        across,
        up,
    )
    described = f"Distance of half: {'; '.join(labels)}."
    return Plot(
        "Attention by distance",
        "Share of attention to image tokens within a distance of the query, mean over heads and recorded steps. The "
        "higher a line at the left, the more local the layer. Dots mark where half is reached; dashed: attention "
        "spread evenly." + ("" if len(chosen) == len(shares) else f" {len(chosen)} of {len(shares)} layers are shown."),
        svg("distance", "Attention by distance", described, area.bottom + 44, part),
    )


def _lines_named_midway(
    named: Sequence[tuple[str, Style]],
    places: Sequence[Sequence[tuple[float, float]]],
    halves: Sequence[float],
    across: Scale,
    up: Scale,
) -> list[str]:
    """Lines with a point where half is reached, and names to the right in the order of the lines."""
    drawn = []
    for (name, look), line_places in zip(named, places, strict=True):
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in line_places)
        drawn.append(element("polyline", element("title", escaped(name)), points=path, class_=f"run {look.colour}"))
    order = sorted(range(len(named)), key=lambda index: halves[index])
    for rank, index in enumerate(order):
        (name, look), half = named[index], halves[index]
        x, y = across(half), up(0.5)
        drawn.append(element("circle", cx=x, cy=y, r=4.0, class_=f"point {look.colour}"))
        baseline = up(0.62) + 16.0 * rank
        drawn.append(element("text", escaped(name), x=across.stop + 8, y=baseline, class_=f"label {look.colour}"))
    return drawn


def _lines(
    identifier: str,
    heading: str,
    caption: str,
    across_title: str,
    up_title: str,
    at: Sequence[float],
    lines: Sequence[tuple[str, Sequence[Estimate]]],
) -> Plot:
    """A line per pattern over steps or layers, with the interval of each point."""
    area = area_with_names([name for name, _ in lines])
    across = Scale(min(at), max(at), area.left + 6, area.right - 6)
    values = [one.value for _, of_line in lines for one in of_line]
    low, high = min(values), max(values)
    if up_title == "recall":
        room = 0.06 * (high - low) + 0.005
        up = Scale(max(0.0, low - room), min(1.0, high + room), area.bottom, area.top)
    else:
        up = scale_from_zero(values, area.bottom, area.top, room=0.06)
    ticks = [at[index] for index in evenly(len(at), 8)]
    with_intervals = len(at) <= _MOST_INTERVALS
    drawn = [axes(across, up, area, across_title, up_title, across_ticks=ticks)]
    places = []
    for number, (_, of_line) in enumerate(lines):
        colour = f"colour-{number % _COLOURS}"
        for place, one in zip(at, of_line, strict=True) if with_intervals else ():
            top, bottom = (up(one.value + sign * one.half_interval) for sign in (1, -1))
            top, bottom = max(top, area.top), min(bottom, area.bottom)
            drawn.append(line(across(place), top, across(place), bottom, f"whisker {colour}"))
        places.append([(across(place), up(one.value)) for place, one in zip(at, of_line, strict=True)])
    named = [
        (name, Style(f"colour-{number % _COLOURS}", _SHAPES[number % len(_SHAPES)]))
        for number, (name, _) in enumerate(lines)
    ]
    drawn += lines_with_names(named, places, area)
    described = "; ".join(f"{name}: {of_line[0].value:.3f} to {of_line[-1].value:.3f}" for name, of_line in lines)
    if with_intervals:
        caption += " Bars are 95 % intervals over the sampled queries."
    return Plot(heading, caption, svg(identifier, heading, f"{described}.", area.bottom + 44, drawn))


def _heads(attended: Attended) -> Plot:
    """Heads from local to global, by the mean distance of their attention; of many, the nearest and the farthest."""
    every = ranked_heads(attended)
    heads = every if len(every) <= _MOST_BARS else (*every[: _MOST_BARS // 2], *every[-_MOST_BARS // 2 :])
    names = [f"layer {head.layer}, head {head.head}" for head in heads]
    rows = Rows(names, [f"{head.distance:.3f}" for head in heads])
    across = scale_from_zero([head.distance for head in heads], rows.area.left, rows.area.right)
    one_colour_each = attended.record.text.shape[1] <= _COLOURS
    drawn = [rows.axes(across, "mean distance (share of the diagonal)")]
    for head, name, y in zip(heads, names, rows.middles, strict=True):
        title = f"{name}: {head.distance:.3f}, {head.text:.0%} of its attention on text"
        colour = f"colour-{head.layer}" if one_colour_each else "neutral"
        drawn.append(bar(0, head.distance, y, across, f"bar {colour}", title))
    drawn += rows.names()
    caption = "Mean distance of a head's attention to image tokens, in all recorded steps."
    if one_colour_each:
        caption += " A colour per layer."
    if len(heads) < len(every):
        caption += f" The {_MOST_BARS // 2} most local and most global of {len(every)}."
    described = "; ".join(f"{name}: {head.distance:.3f}" for name, head in zip(names, heads, strict=True)) + "."
    return Plot(
        "Heads from local to global",
        caption,
        svg("heads", "Heads from local to global", described, rows.height, drawn),
    )


def _table(figures: Sequence[PatternFigures]) -> str:
    headings = [element("th", "pattern", scope="col")] + [
        element("th", escaped(name), scope="col", title=_MEANINGS[name])
        for name in ("density", "recall", "text", "image", "output error")
    ]
    lines = []
    for one in figures:
        small = element("small", escaped(one.attention.summary))
        name = element("th", element("span", escaped(one.name) + small), scope="row")
        cells = (
            density_text(one.density),
            with_interval(one.recall),
            with_interval(one.text),
            with_interval(one.image),
            with_interval(one.error),
        )
        lines.append(element("tr", name, *(element("td", escaped(cell)) for cell in cells)))
    table = element(
        "table",
        element("caption", "What each pattern keeps of full attention", class_="unseen"),
        element("thead", element("tr", *headings)),
        element("tbody", *lines),
        style="--names: 15em",
    )
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Figures of patterns")


def _queries(output: Shown, data: Mapping[str, Any], several: bool) -> str:
    suffix = f", seed {output.seed}" if several else ""
    outlined = "The queries, outlined where they stand."
    if len(data["grid"]) == 3:
        outlined = (
            f"Frame {data['queries'][0]['token'][0]} of the tokens, with the queries' places in their own frames."
        )
    parts = [
        element("h2", escaped(f"Where single queries look{suffix}")),
        element(
            "figure",
            element("img", src=embedded(_jpeg(output.picture)), alt="The output with the queries marked.", width=360),
            element("figcaption", outlined),
            style="margin-top: 18px",
        ),
    ]
    for number, of_query in enumerate(output.queries, start=1):
        token = ", ".join(map(str, data["queries"][number - 1]["token"]))
        parts.append(element("h3", f"Query {number}: token ({escaped(token)})", style="margin-top: 34px"))
        for sheet in of_query:
            drawn = sheet.draw(_MOST_LAYERS, _MOST_HEADS)
            whole = len(sheet.rows) <= _MOST_LAYERS and len(sheet.column_titles) <= _MOST_HEADS
            rest = "" if whole else f" A part of {sheet.name}.png, which has all."
            alt = f"Where query {number} looks, {sheet.heading}."
            # No larger than it is, where the style of pages would fill the width.
            natural = f"width: {drawn.width}px; max-width: 100%; min-width: 0"
            image = element("img", src=embedded(_jpeg(drawn)), alt=alt, style=natural)
            caption = element("figcaption", escaped(f"{sheet.heading.capitalize()}. {sheet.caption}{rest}"))
            parts.append(element("figure", element("div", image, class_="sheet"), caption))
    return element("section", *parts)


def _conditions(data: Mapping[str, Any]) -> str:
    at = ", ".join(map(str, data["recorded_steps"]))
    facts = {
        "prompt": data["prompt"],
        "seed": ", ".join(map(str, data["seeds"])),
        "model": data["model"]["name"] + (f" at {data['model']['revision']}" if data["model"]["revision"] else ""),
        "sampling": f"{data['preset']['sampling']['steps']} steps, preset {data['preset']['name']}",
        "recorded": f"steps {at}, counted from 0; {data['calls_per_step']} transformer calls a step, queries drawn "
        f"anew for each and the same for all layers",
        "sampled queries": f"{data['rows']} of {data['tokens']['image']:,} a call, exact softmax over all keys",
        "maps": "of the call with the prompt; exact, no sampling",
        "device": f"{data['device']['name']}, {data['device']['dtype']}, {data['device']['backend']} attention",
        "versions": ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
    }
    return element(
        "section",
        element("h2", "Conditions"),
        fact_list(facts),
        element("pre", element("code", escaped(data["command"]))),
    )


def _jpeg(picture: Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
