"""What stands on the page of a watched run: figures of patterns, plots, and where single queries look."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from grat_cli.attention.recall import BINS, even_distances
from grat_cli.fidelity.attend import Attended
from grat_cli.fidelity.figures import (
    Estimate,
    half_distance,
    layer_distances,
    pattern_figures,
    ranked_heads,
    with_interval,
)
from grat_cli.fidelity.overlays import Sheet, evenly
from grat_cli.pages.html import embedded, render
from grat_cli.pages.numbers import density_text
from grat_cli.pages.plots import (
    COLOURS,
    Look,
    Mark,
    Plot,
    about,
    dashed,
    draw_marks,
    draw_named_lines,
    finished,
    from_zero,
    ink,
    new_axes,
    new_rows,
    settings,
    tick_text,
)
from grat_kernels import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

_SHAPES = ("circle", "square", "triangle", "diamond", "cross")
# What a page shows of models with more; the files beside it show all.
_MOST_LAYERS, _MOST_HEADS, _MOST_BARS, _MOST_INTERVALS = 8, 8, 16, 12
_JPEG_QUALITY = 88
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


@settings()
def plots(attended: Attended, grid: Grid) -> dict[str, Plot]:
    """All plots, by the name of their file without suffix."""
    patterns = pattern_figures(attended)
    steps, layers = list(attended.steps), list(range(attended.record.text.shape[1]))
    of_steps = "Share of full attention on what each pattern attends token by token, text included."
    error_of_steps = "How far each pattern's output is from that of full attention, over the latter's length."
    of_layers = "Layers count from 0, double blocks first."
    drawn = {"distance": _distances(attended, grid)}
    if len(steps) > 1:
        for name, caption, what in (("recall", of_steps, "recall"), ("error", error_of_steps, "output error")):
            lines = {one.name: getattr(one, f"{name}_of_steps") for one in patterns}
            drawn[f"{name}-by-step"] = _lines(what, "step", caption, "denoising step", steps, lines)
    if len(layers) > 1:
        for name, what in (("recall", "recall"), ("error", "output error")):
            lines = {one.name: getattr(one, f"{name}_of_layers") for one in patterns}
            drawn[f"{name}-by-layer"] = _lines(what, "layer", of_layers, "layer", layers, lines)
    drawn["heads"] = _heads(attended)
    return drawn


def as_html(attended: Attended, data: Mapping[str, Any], drawn: Mapping[str, Plot], shown: Sequence[Shown]) -> str:
    """The page.

    Args:
        attended: the result.
        data: of `attend_figures.as_data`.
        drawn: of `plots`.
        shown: one per seed.
    """
    return render(
        "attend.html",
        title=f"Attention of {data['model']['name']}: {data['prompt']}",
        data=data,
        facts=[
            f"{data['width']}x{data['height']} pixels" + (f", {data['frames']} frames" if "frames" in data else ""),
            f"{'x'.join(map(str, data['grid']))} tokens + {data['tokens']['text']} text",
            f"{data['layers']} layers of {data['heads']} heads",
            data["created"][:10],
        ],
        columns=("density", "recall", "text", "image", "output error"),
        patterns=[
            (
                one.name,
                one.attention.summary,
                (density_text(one.density), *map(with_interval, (one.recall, one.text, one.image, one.error))),
            )
            for one in pattern_figures(attended)
        ],
        plots=drawn,
        outputs=[
            {
                "seed": output.seed,
                "picture": embedded(_jpeg(output.picture)),
                "queries": [list(map(_sheet, query)) for query in output.queries],
            }
            for output in shown
        ],
        meanings=_MEANINGS,
        conditions=_conditions(data),
    )


def _distances(attended: Attended, grid: Grid) -> Plot:
    """Cumulative mass by distance, a line per layer, with even attention dashed."""
    shares = layer_distances(attended)
    edges = np.arange(BINS + 1) / BINS
    chosen = evenly(len(shares), _MOST_LAYERS)
    named = [
        (f"layer {layer}", shares[layer], Look(f"colour-{number % COLOURS}", "circle"))
        for number, layer in enumerate(chosen)
    ]
    named.append(("all layers", shares.mean(0), Look("neutral", "circle")))
    halves = [half_distance(of_bins) for _, of_bins, _ in named]
    labels = [f"{name}: {half:.2f}" for (name, _, _), half in zip(named, halves, strict=True)]
    axes = new_axes("distance (share of the diagonal)", "share of attention to image tokens")
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    axes.plot(edges, _reached(even_distances(grid)), **dashed(), gid=about("ideal", "even attention"))
    order = sorted(range(len(named)), key=lambda index: halves[index])
    for index in order:
        _, of_bins, look = named[index]
        axes.plot(
            edges, _reached(of_bins), color=ink(look.colour), label=labels[index], gid=about("run", labels[index])
        )
    for (name, _, look), half in zip(named, halves, strict=True):
        draw_marks(axes, [Mark(name, look, half, 0.5, f"half within {half:.2f}")], size=8)
    # All lines end at 1, so their names stand beside, in the order in which each has half of its mass.
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), labelcolor="linecolor", handlelength=1)
    caption = (
        "Share of attention to image tokens within a distance of the query, mean over heads and recorded steps. The "
        "higher a line at the left, the more local the layer. Dots mark where half is reached; dashed: attention "
        "spread evenly."
    )
    if len(chosen) < len(shares):
        caption += f" {len(chosen)} of {len(shares)} layers are shown."
    described = f"Distance of half: {'; '.join(labels)}."
    return finished(axes, "distance", "Attention by distance", caption, described)


def _reached(of_bins: np.ndarray) -> np.ndarray:
    """Share of the mass within each edge of the bins, `[BINS + 1]`."""
    return np.minimum(np.concatenate([[0.0], np.cumsum(of_bins)]), 1.0)


def _lines(
    what: str,
    by: str,
    caption: str,
    across: str,
    at: Sequence[int],
    lines: Mapping[str, Sequence[Estimate]],
) -> Plot:
    """A line per pattern over steps or layers, with the interval of each point."""
    axes = new_axes(across, what, lines=len(lines))
    values = [one.value for of_line in lines.values() for one in of_line]
    if what == "recall":
        room = 0.06 * (max(values) - min(values)) + 0.005
        axes.set_ylim(max(0.0, min(values) - room), min(1.0, max(values) + room))
    else:
        from_zero(axes, "y", values)
    axes.margins(x=0.03)
    ticks = [at[index] for index in evenly(len(at), 8)]
    axes.set_xticks(ticks, list(map(tick_text, ticks)))
    looks = [Look(f"colour-{number % COLOURS}", _SHAPES[number % len(_SHAPES)]) for number in range(len(lines))]
    with_intervals = len(at) <= _MOST_INTERVALS
    for look, of_line in zip(looks, lines.values() if with_intervals else (), strict=with_intervals):
        low, high = ([one.value + sign * one.half_interval for one in of_line] for sign in (-1, 1))
        axes.vlines(at, low, high, ink(look.colour), linewidth=1.5)
    draw_named_lines(
        axes,
        [
            (name, look, at, [one.value for one in of_line])
            for (name, of_line), look in zip(lines.items(), looks, strict=True)
        ],
    )
    described = "; ".join(
        f"{name}: {of_line[0].value:.3f} to {of_line[-1].value:.3f}" for name, of_line in lines.items()
    )
    if with_intervals:
        caption += " Bars are 95 % intervals over the sampled queries."
    heading = f"{what.capitalize()} by {by}"
    return finished(axes, heading.lower().replace(" ", "-"), heading, caption, f"{described}.")


def _heads(attended: Attended) -> Plot:
    """Heads from local to global, by the mean distance of their attention; of many, the nearest and the farthest."""
    every = ranked_heads(attended)
    heads = every if len(every) <= _MOST_BARS else (*every[: _MOST_BARS // 2], *every[-_MOST_BARS // 2 :])
    names = [f"layer {head.layer}, head {head.head}" for head in heads]
    axes = new_rows(names, [f"{head.distance:.3f}" for head in heads], "mean distance (share of the diagonal)")
    from_zero(axes, "x", [head.distance for head in heads])
    one_colour_each = attended.record.text.shape[1] <= COLOURS
    for row, (name, head) in enumerate(zip(names, heads, strict=True)):
        told = f"{name}: {head.distance:.3f}, {head.text:.0%} of its attention on text"
        colour = f"colour-{head.layer}" if one_colour_each else "neutral"
        axes.barh(row, head.distance, 0.58, color=ink(colour), gid=about("bar", told))
    caption = "Mean distance of a head's attention to image tokens, in all recorded steps."
    if one_colour_each:
        caption += " A colour per layer."
    if len(heads) < len(every):
        caption += f" The {_MOST_BARS // 2} most local and most global of {len(every)}."
    described = "; ".join(f"{name}: {head.distance:.3f}" for name, head in zip(names, heads, strict=True)) + "."
    return finished(axes, "heads", "Heads from local to global", caption, described)


def _sheet(sheet: Sheet) -> dict[str, Any]:
    drawn = sheet.draw(_MOST_LAYERS, _MOST_HEADS)
    return {
        "name": sheet.name,
        "heading": sheet.heading,
        "caption": sheet.caption,
        "picture": embedded(_jpeg(drawn)),
        "width": drawn.width,
        "whole": len(sheet.rows) <= _MOST_LAYERS and len(sheet.column_titles) <= _MOST_HEADS,
    }


def _conditions(data: Mapping[str, Any]) -> dict[str, str]:
    at = ", ".join(map(str, data["recorded_steps"]))
    return {
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


def _jpeg(picture: Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
