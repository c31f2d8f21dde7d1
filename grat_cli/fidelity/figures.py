"""Figures of a watched run: means with their intervals, as data for machines, a table and sentences for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from grat_cli.attention.recall import BINS, diagonal, even_distances
from grat_cli.fidelity.attend import Attended
from grat_cli.generation.request import Request
from grat_cli.models.environment import versions
from grat_cli.pages.numbers import density_text
from grat_cli.presets import Attention
from grat_kernels import Grid

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "grat.attend/1"
_MOSTLY_DENSE = 0.5


@dataclass(frozen=True)
class Estimate:
    """A mean over sampled queries, and how far it may be from the mean over all of them.

    Attributes:
        value: the mean.
        standard_error: of it.
        half_interval: half of its 95 % confidence interval, by Student's t.
    """

    value: float
    standard_error: float
    half_interval: float


@dataclass(frozen=True)
class PatternFigures:
    """What a pattern keeps of full attention, mean over recorded steps, layers and heads.

    Attributes:
        name: of the candidate.
        attention: what it attends.
        density: attended pairs over all pairs.
        text: softmax mass on text, which every pattern keeps.
        image: softmax mass on the image keys that it attends token by token.
        recall: both.
        error: root mean square of ‖output − full output‖ / ‖full output‖.
        recall_of_steps: by recorded step.
        recall_of_layers: by layer.
        error_of_steps: by recorded step.
        error_of_layers: by layer.
    """

    name: str
    attention: Attention
    density: float
    text: Estimate
    image: Estimate
    recall: Estimate
    error: Estimate
    recall_of_steps: tuple[Estimate, ...]
    recall_of_layers: tuple[Estimate, ...]
    error_of_steps: tuple[Estimate, ...]
    error_of_layers: tuple[Estimate, ...]


@dataclass(frozen=True)
class Head:
    """How far a head looks.

    Attributes:
        layer: counted from 0.
        head: counted from 0.
        distance: mean distance of its mass on image keys, as a share of the grid's diagonal.
        text: its softmax mass on text.
    """

    layer: int
    head: int
    distance: float
    text: float


def pattern_figures(attended: Attended) -> tuple[PatternFigures, ...]:
    """The figures of each candidate."""
    record, steps = attended.record, list(attended.steps)
    recall, image, error = (means[steps] for means in (record.recall, record.image, record.error))
    text = record.text[steps]
    spread = _t(attended.rows)

    def estimate(mean: float, standard_error: Any) -> Estimate:
        return Estimate(float(mean), float(standard_error), float(spread * standard_error))

    def root(square: float, standard_error: Any) -> Estimate:
        """Of a mean square; the standard error of its root by linearisation."""
        value = math.sqrt(square)
        return estimate(value, standard_error / (2 * value) if value else 0.0)

    def over(errors: np.ndarray) -> np.ndarray:
        """Standard error of the mean over steps, whose queries are drawn anew, `[...]` from `[R, ...]`."""
        return np.sqrt((errors**2).sum(0)) / len(errors)

    of_steps, of_layers = record.of_steps, record.of_layers
    found = []
    for number, candidate in enumerate(attended.candidates):
        recall_of_layers = zip(recall[..., number].mean((0, 2)), over(of_layers.recall[steps, :, number]), strict=True)
        error_of_layers = zip(error[..., number].mean((0, 2)), over(of_layers.error[steps, :, number]), strict=True)
        found.append(
            PatternFigures(
                candidate.name,
                candidate.attention,
                float(record.densities[number]),
                estimate(text.mean(), over(of_steps.text[steps])),
                estimate(image[..., number].mean(), over(of_steps.image[steps, number])),
                estimate(recall[..., number].mean(), over(of_steps.recall[steps, number])),
                root(error[..., number].mean(), over(of_steps.error[steps, number])),
                tuple(map(estimate, recall[..., number].mean((1, 2)), of_steps.recall[steps, number])),
                tuple(estimate(*pair) for pair in recall_of_layers),
                tuple(map(root, error[..., number].mean((1, 2)), of_steps.error[steps, number])),
                tuple(root(*pair) for pair in error_of_layers),
            )
        )
    return tuple(found)


def _t(rows: int) -> float:
    """The 97.5 % quantile of Student's t for so many queries a call; calls add to it, so intervals are no narrower."""
    from scipy.stats import t

    return float(t.ppf(0.975, rows - 1)) if rows > 1 else 0.0


def layer_distances(attended: Attended) -> np.ndarray:
    """Share of the mass on image keys in each bin of distance, `[L, BINS]`; each layer adds up to 1."""
    mass = attended.record.distances[list(attended.steps)].mean((0, 2))
    return mass / mass.sum(-1, keepdims=True)


def ranked_heads(attended: Attended) -> tuple[Head, ...]:
    """All heads, those that look nearest first."""
    steps = list(attended.steps)
    mass, text = attended.record.distances[steps].mean(0), attended.record.text[steps].mean(0)  # [L, H, BINS], [L, H]
    middles = (np.arange(BINS) + 0.5) / BINS
    distance = (mass * middles).sum(-1) / mass.sum(-1)
    order = np.argsort(distance, axis=None, kind="stable")
    places = (np.unravel_index(index, distance.shape) for index in order)
    return tuple(Head(int(at[0]), int(at[1]), float(distance[at]), float(text[at])) for at in places)


def half_distance(shares: np.ndarray) -> float:
    """Distance within which half of the mass lies, as a share of the diagonal, from shares by bin `[BINS]`."""
    reached = np.concatenate([[0.0], np.cumsum(shares)])
    return float(np.interp(0.5 * reached[-1], reached, np.arange(BINS + 1) / BINS))


def findings(attended: Attended, grid: Grid) -> list[str]:
    """What the figures say, in sentences."""
    figures = pattern_figures(attended)
    noun = "video" if grid.axes == 3 else "picture"
    near, even = half_distance(layer_distances(attended).mean(0)), half_distance(even_distances(grid))
    sentences = [
        f"Half of the attention to the {noun} goes to tokens nearer than {near:.2f} of its diagonal "
        f"({near * diagonal(grid):.0f} tokens); spread evenly it would be {even:.2f}. "
        f"Text takes {figures[0].text.value:.0%} of all attention."
    ]
    sparsest = min(figures, key=lambda one: one.density)
    sparse = [one for one in figures if one.density <= _MOSTLY_DENSE]
    if len(sparse) > 1:
        closest = min(sparse, key=lambda one: one.error.value)
        sentences.append(
            f"Of the patterns that attend up to half of all pairs, {closest.name} comes closest to the output of full "
            f"attention: {closest.error.value:.0%} off, at density {density_text(closest.density)}."
        )
    sentences.append(
        f"{sparsest.name}, the sparsest at {density_text(sparsest.density)}, keeps {sparsest.recall.value:.0%} of the "
        f"attention and is {sparsest.error.value:.0%} off."
    )
    return sentences


def density_hint(attended: Attended) -> str | None:
    """What to do where the patterns are nearly full attention; None where they are not."""
    densities = sorted(attended.record.densities.tolist())
    if densities[len(densities) // 2] <= _MOSTLY_DENSE:
        return None
    names = "b,planes,lines,bx,far" if len(attended.candidates[0].attention.group) == 3 else "b,x,bx,far"
    return (
        "at this size most of these patterns attend over half of all pairs, because groups are few: "
        f"--patterns {names} takes groups that fit the size"
    )


def table(figures: Sequence[PatternFigures]) -> Table:
    """The figures for people."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("pattern", overflow="fold")
    for name in ("density", "recall", "text", "image", "output error"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in figures:
        shown.add_row(
            one.name,
            density_text(one.density),
            with_interval(one.recall),
            f"{one.text.value:.3f}",
            f"{one.image.value:.3f}",
            with_interval(one.error),
        )
    return shown


def with_interval(estimate: Estimate) -> str:
    """For example `0.812 ± 0.013`."""
    return f"{estimate.value:.3f} ± {estimate.half_interval:.3f}"


def as_data(
    attended: Attended,
    request: Request,
    grid: Grid,
    *,
    command: str,
    created: datetime,
    files: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole result as plain data, schema `grat.attend/1`.

    Arrays are in the order recorded step, layer, head; maps of queries are in a file of their own.

    Args:
        attended: the result.
        request: what was asked for.
        grid: image tokens.
        command: the command line as typed.
        created: when, with time zone.
        files: what was written beside it, by kind.
    """
    record, steps = attended.record, list(attended.steps)
    of_video = {name: getattr(request, name) for name in ("frames", "fps") if getattr(request, name) is not None}
    return {
        "schema": SCHEMA,
        "created": created.isoformat(timespec="seconds"),
        "command": command,
        "prompt": request.prompt,
        "seeds": [seen.seed for seen in attended.seen],
        "width": request.width,
        "height": request.height,
        **of_video,
        "preset": request.preset.model_dump(mode="json"),
        "model": {
            "name": request.model.name,
            "source": request.model.source,
            "family": request.model.presets,
            "revision": attended.revision,
            "reason": request.model.reason,
        },
        "grid": list(grid.shape),
        "tokens": {"image": grid.tokens, "text": attended.text_tokens, "total": grid.tokens + attended.text_tokens},
        "layers": record.text.shape[1],
        "heads": record.text.shape[2],
        "recorded_steps": steps,
        "calls_per_step": attended.calls_per_step,
        "rows": attended.rows,
        "findings": findings(attended, grid),
        "patterns": [
            {
                "name": one.name,
                "attention": one.attention.model_dump(mode="json"),
                "summary": one.attention.summary,
                "density": one.density,
                **{name: _estimate(getattr(one, name)) for name in ("text", "image", "recall")},
                "output_error": _estimate(one.error),
                "by_step": {
                    "recall": list(map(_estimate, one.recall_of_steps)),
                    "output_error": list(map(_estimate, one.error_of_steps)),
                },
                "by_layer": {
                    "recall": list(map(_estimate, one.recall_of_layers)),
                    "output_error": list(map(_estimate, one.error_of_layers)),
                },
                "image_by_head": _listed(record.image[steps][..., number]),
                "image_by_head_standard_error": _listed(record.of_heads.image[steps][..., number]),
                "output_error_by_head": _listed(np.sqrt(record.error[steps][..., number])),
            }
            for number, one in enumerate(pattern_figures(attended))
        ],
        "text_by_head": _listed(record.text[steps]),
        "distances": {
            "diagonal_tokens": diagonal(grid),
            "bin_edges": _listed(np.arange(BINS + 1) / BINS),
            "mass_by_head": _listed(record.distances[steps]),
            "even": _listed(even_distances(grid)),
        },
        "heads_from_local_to_global": [
            {
                "layer": head.layer,
                "head": head.head,
                "mean_distance": round(head.distance, 6),
                "text": round(head.text, 6),
            }
            for head in ranked_heads(attended)
        ],
        "queries": [
            {
                "token": list(query),
                "maps": {
                    "cell": list(attended.seen[0].queries.cell),
                    "text_by_step_and_layer": [_listed(seen.queries.text[number]) for seen in attended.seen],
                },
            }
            for number, query in enumerate(attended.seen[0].queries.queries)
        ],
        "files": dict(files),
        "device": {"name": attended.device, "dtype": attended.dtype, "backend": attended.backend},
        "versions": versions(),
        "phases": {name: round(milliseconds, 3) for name, milliseconds in attended.phases_ms.items()},
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.value - estimate.half_interval, estimate.value + estimate.half_interval
    return {
        "mean": round(estimate.value, 6),
        "standard_error": round(estimate.standard_error, 6),
        "interval_95": [round(low, 6), round(high, 6)],
    }


def _listed(values: np.ndarray) -> list[Any]:
    return np.round(np.asarray(values, np.float64), 6).tolist()
