"""How much of full attention a pattern keeps, measured on sampled queries by exact softmax over all keys.

*Recall* is the softmax mass of full attention on the keys that a pattern attends token by token. It is what plain
patterns lose. Summaries give some of the rest back, so patterns with a far field are judged by the *output error*,
the distance of their output from that of full attention over the latter's length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from grat_kernels import Grid, Plan
from grat_kernels.choosing import chosen_rows
from grat_kernels.geometry import Cell, cell_counts
from grat_kernels.sequence import JointSequence
from grat_kernels.summaries import summarise

BINS = 32
_BUDGET_BYTES = 2**28


class Kept(NamedTuple):
    """What one pattern keeps, `[S, H]` fp32 each."""

    image: torch.Tensor
    """Softmax mass on the image keys that are attended token by token."""

    error: torch.Tensor
    """‖output − full output‖ / ‖full output‖."""


class RowStatistics(NamedTuple):
    """Full attention of sampled queries, and what patterns keep of it.

    Attributes:
        text: softmax mass on text keys, and on those of references where there are such, `[S, H]`.
        output: ‖full output‖, `[S, H]`.
        distances: softmax mass on image keys by their distance from the query, `[H, BINS]`, mean over the queries; bin
            i holds distances from i to i + 1 in units of the grid's diagonal / BINS.
        kept: for each pattern; `text + kept.image` is the whole mass on what is attended.
    """

    text: torch.Tensor
    output: torch.Tensor
    distances: torch.Tensor
    kept: tuple[Kept, ...]


def sample_positions(sequence: JointSequence, count: int, seed: int = 0) -> np.ndarray:
    """Positions of image queries in the joint sequence, `[count]`, drawn without repetition, or all where they are few.

    Args:
        sequence: whose order the positions refer to.
        count: queries wanted.
        seed: of the draw.
    """
    drawn = np.random.default_rng(seed).permutation(sequence.image_tokens)[:count]
    return np.sort(drawn) + sequence.image_start


def row_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plans: Sequence[Plan],
    positions: np.ndarray,
    scale: float | None = None,
    text_valid: int | None = None,
) -> RowStatistics:
    """Measures full attention of some queries of one sample, and what each plan's pattern keeps of it.

    Holds the scores of few queries and few heads at a time, so that it fits at any size.

    Args:
        query: `[N, H, D]`, image tokens in the plans' order.
        key: `[N, H, D]`.
        value: `[N, H, D]`.
        plans: of one joint sequence each of them, which share the token order and the text.
        positions: of the queries, `[S]`; image tokens.
        scale: factor on the scores, 1/√D by default.
        text_valid: valid text tokens; later ones are not attended. None means that all are.
    """
    heads, head_dim = query.shape[1:]
    factor = head_dim**-0.5 if scale is None else scale
    # Scores, masses, and what a pattern selects of them; then a head's query, key and value in fp32 beside them.
    rows_at_once = min(len(positions), max(1, _BUDGET_BYTES // (3 * 4 * key.shape[0])))
    heads_at_once = max(1, _BUDGET_BYTES // (3 * 4 * key.shape[0] * (rows_at_once + head_dim)))
    by_rows = []
    for first_row in range(0, len(positions), rows_at_once):
        of_rows = positions[first_row : first_row + rows_at_once]
        rows = torch.from_numpy(of_rows).to(query.device)
        bins = _distance_bins(plans[0], of_rows).to(query.device)
        by_heads = []
        for first in range(0, heads, heads_at_once):
            of_heads = [tensor[:, first : first + heads_at_once].float() for tensor in (query, key, value)]
            by_heads.append(_of_heads(of_heads, plans, of_rows, rows, bins, factor, text_valid))
        by_rows.append(_joined(by_heads, 1, torch.cat([part.distances for part in by_heads])))
    total = sum(len(part.text) * part.distances for part in by_rows)
    return _joined(by_rows, 0, torch.as_tensor(total) / len(positions))


def _joined(parts: Sequence[RowStatistics], axis: int, distances: torch.Tensor) -> RowStatistics:
    """Statistics of several queries (axis 0) or heads (axis 1) in one, with the distances of all of them."""
    return RowStatistics(
        torch.cat([part.text for part in parts], axis),
        torch.cat([part.output for part in parts], axis),
        distances,
        tuple(
            Kept(torch.cat([kept.image for kept in of_plan], axis), torch.cat([kept.error for kept in of_plan], axis))
            for of_plan in zip(*(part.kept for part in parts), strict=True)
        ),
    )


class QueryMaps(NamedTuple):
    """Where some queries look.

    Attributes:
        text: softmax mass on text keys, and on those of references where there are such, `[Q, H]` fp32.
        image: softmax mass on the image keys of each cell of the grid, in raster order, `[Q, H, *cells]` fp32; with
            `text` it sums to 1.
    """

    text: torch.Tensor
    image: torch.Tensor


def query_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    plan: JointSequence,
    tokens: np.ndarray,
    cell: Cell,
    scale: float | None = None,
    text_valid: int | None = None,
) -> QueryMaps:
    """Full attention of chosen queries of one sample, by exact softmax over all keys, as maps of the grid.

    Args:
        query: `[N, H, D]`, image tokens in the plan's order.
        key: `[N, H, D]`.
        plan: whose order that is.
        tokens: raster indices of the queries, `[Q]`.
        cell: tokens per axis that one value of a map stands for; masses are added up.
        scale: factor on the scores, 1/√D by default.
        text_valid: valid text tokens; later ones are not attended. None means that all are.
    """
    heads, head_dim = query.shape[1:]
    factor = head_dim**-0.5 if scale is None else scale
    grid = plan.grouping.grid
    counts = cell_counts(grid, cell)
    places = np.unravel_index(plan.order, grid.shape)
    of_cell = np.ravel_multi_index([place // size for place, size in zip(places, cell, strict=True)], counts)
    cells = torch.from_numpy(of_cell).to(query.device)  # of each image token in the plan's order
    rows = torch.from_numpy(plan.image_start + plan.inverse[tokens]).to(query.device)
    image = slice(plan.image_start, plan.image_stop)
    at_once = max(1, _BUDGET_BYTES // (4 * key.shape[0] * (2 * len(tokens) + head_dim)))
    on_text, on_image = [], []
    for first in range(0, heads, at_once):
        of_heads = slice(first, first + at_once)
        scores = torch.einsum("qhd,khd->qhk", query[rows, of_heads].float(), key[:, of_heads].float()) * factor
        if text_valid is not None:
            scores[..., _padding(plan, text_valid)] = -torch.inf
        mass = scores.softmax(-1)
        on_text.append(_beside_image(mass, plan))
        summed = torch.zeros(*mass.shape[:2], int(np.prod(counts)), device=mass.device)
        on_image.append(summed.index_add_(2, cells, mass[..., image]))
    return QueryMaps(torch.cat(on_text, 1), torch.cat(on_image, 1).unflatten(2, counts))


def _of_heads(
    joint: Sequence[torch.Tensor],
    plans: Sequence[Plan],
    positions: np.ndarray,
    rows: torch.Tensor,
    bins: torch.Tensor,
    scale: float,
    text_valid: int | None,
) -> RowStatistics:
    """`row_statistics` of some heads: query, key and value `[N, h, D]` in fp32."""
    query, key, value = joint
    sequence = plans[0]
    image = slice(sequence.image_start, sequence.image_stop)
    # Heads first: products of matrices per head.
    asked, keys, values = query[rows].transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    scores = asked @ keys.transpose(1, 2) * scale  # [h, S, N]
    if text_valid is not None:
        scores[..., _padding(sequence, text_valid)] = -torch.inf
    mass = scores.softmax(-1)
    output = mass @ values
    distances = torch.zeros(len(mass), BINS, device=mass.device)
    distances.scatter_add_(1, bins.flatten().expand(len(mass), -1), mass[:, :, image].flatten(1))

    kept = []
    for plan in plans:
        # [S, N] and [S, R]; of a choice, which each head makes for itself, [h, S, N] and [h, S, R].
        tokens, means = (mask.to(mass.device) for mask in _attended(plan, positions))
        summaries = [summarise(tensor[None], plan) for tensor in (key, value)] if means.shape[1] else []
        if plan.candidates is not None:
            groups, of_position = np.unique(groups_of(plan, positions), return_inverse=True)
            numbers, inverse = (torch.from_numpy(one).to(mass.device) for one in (groups, of_position))
            chosen = chosen_rows(query[None], (summaries[0], summaries[1]), plan, scale, numbers)[0][:, inverse]
            tokens = tokens | among(chosen, 0, plan.tokens)
            means = means | among(chosen, plan.tokens, plan.tokens + plan.summaries.rows)
        of_tokens = scores.masked_fill(~tokens, -torch.inf)
        if summaries:
            summary_keys, summary_values = (tensor[0].transpose(0, 1) for tensor in summaries)
            bias = torch.from_numpy(np.log(plan.summaries.counts)).to(mass)
            of_means = (asked @ summary_keys.transpose(1, 2) * scale + bias).masked_fill(~means, -torch.inf)
            weights = torch.cat([of_tokens, of_means], -1).softmax(-1)
            made = weights[..., : len(key)] @ values + weights[..., len(key) :] @ summary_values
        else:
            made = of_tokens.softmax(-1) @ values
        error = (made - output).norm(dim=-1) / output.norm(dim=-1)
        kept_mass = (mass[..., image] * tokens[..., image]).sum(-1)
        kept.append(Kept(kept_mass.T, error.T))
    text = _beside_image(mass, sequence).T
    return RowStatistics(text, output.norm(dim=-1).T, distances / len(positions), tuple(kept))


def _padding(sequence: JointSequence, text_valid: int) -> slice:
    """Positions of text after its first so many tokens."""
    return slice(sequence.text_start + text_valid, sequence.text_start + sequence.text_len)


def _beside_image(mass: torch.Tensor, sequence: JointSequence) -> torch.Tensor:
    """Sum over the keys `[..., N]` that are no image tokens, `[...]`."""
    return mass[..., : sequence.image_start].sum(-1) + mass[..., sequence.image_stop :].sum(-1)


def _attended(plan: Plan, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens, `[S, N]`, and which summaries, `[S, R]`, some positions attend: bool."""
    starts = np.array([run.start for run in plan.query_runs])
    list_of_run = np.array([run.span_list for run in plan.query_runs])
    lists, of_position = np.unique(
        list_of_run[np.searchsorted(starts, positions, side="right") - 1], return_inverse=True
    )
    tokens = np.zeros((len(lists), plan.tokens), np.bool_)
    means = np.zeros((len(lists), plan.summaries.rows), np.bool_)
    for row, number in enumerate(lists.tolist()):
        for span in plan.span_lists[number]:
            if span.level:
                offset = plan.summaries.offsets[span.level - 1]
                means[row, offset + span.start : offset + span.stop] = True
            else:
                tokens[row, span.start : span.stop] = True
    return torch.from_numpy(tokens[of_position]), torch.from_numpy(means[of_position])


def groups_of(plan: Plan, positions: np.ndarray) -> np.ndarray:
    """The group, counted in token order, that each position of an image token lies in, `[S]`."""
    return np.searchsorted(np.sort(plan.grouping.starts), positions - plan.image_start, side="right") - 1


def among(chosen: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Which of the rows from `start` to `stop` are among those that were chosen, `[..., stop - start]` bool.

    Args:
        chosen: rows of `choosing.chosen_rows`, `[..., slots]`.
        start: first row.
        stop: row after the last one.
    """
    # All that lies elsewhere is marked in one more place, which is cut off.
    place = torch.where((chosen >= start) & (chosen < stop), chosen - start, stop - start).long()
    marked = torch.zeros(*chosen.shape[:-1], stop - start + 1, dtype=torch.bool, device=chosen.device)
    return marked.scatter_(-1, place, True)[..., :-1]


def _distance_bins(sequence: JointSequence, positions: np.ndarray) -> torch.Tensor:
    """Bin of the distance between each sampled query and each image key, `[S, image tokens]` int64."""
    extents = sequence.grouping.grid.shape
    places = np.stack(np.unravel_index(sequence.order, extents), 1)  # [image tokens, axes]
    asked = places[positions - sequence.image_start]
    squared = np.zeros((len(positions), len(places)))
    for axis in range(len(extents)):
        squared += (asked[:, axis, None] - places[None, :, axis]) ** 2
    return torch.from_numpy(
        (np.sqrt(squared) / diagonal(sequence.grouping.grid) * BINS).astype(np.int64).clip(max=BINS - 1)
    )


def diagonal(grid: Grid) -> float:
    """Distance between opposite corners, in tokens; 1 for a single token."""
    return max(1.0, math.hypot(*(extent - 1 for extent in grid.shape)))


def even_distances(grid: Grid) -> np.ndarray:
    """What `RowStatistics.distances` would be if every image query attended all image keys alike, `[BINS]`."""
    squared, pairs = np.zeros(1), np.ones(1)
    for extent in grid.shape:
        offsets = np.arange(extent)
        # An offset of d occurs at extent - d places, in both directions.
        counts = (extent - offsets) * np.where(offsets, 2, 1) / extent**2
        squared = np.add.outer(squared, offsets**2).ravel()
        pairs = np.multiply.outer(pairs, counts).ravel()
    bins = (np.sqrt(squared) / diagonal(grid) * BINS).astype(np.int64).clip(max=BINS - 1)
    return np.bincount(bins, pairs, BINS)
