"""How much of full attention a pattern keeps, measured on sampled queries by exact softmax over all keys.

*Recall* is the softmax mass of full attention on the keys that a pattern attends token by token. It is what plain
patterns lose. Summaries give some of the rest back, so patterns with a far field are judged by the *output error*,
the distance of their output from that of full attention over the latter's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from grat_kernels import Plan
from grat_kernels.plan import JointSequence
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
        text: softmax mass on text keys, `[S, H]`.
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

    Holds the scores of the sampled queries of few heads at a time, so that it fits at any size.

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
    rows = torch.from_numpy(positions).to(query.device)
    bins = _distance_bins(plans[0], positions).to(query.device)
    at_once = max(1, _BUDGET_BYTES // (4 * len(positions) * key.shape[0]))
    parts = []
    for first in range(0, heads, at_once):
        of_heads = [tensor[:, first : first + at_once].float() for tensor in (query, key, value)]
        parts.append(_of_heads(of_heads, plans, positions, rows, bins, factor, text_valid))
    return RowStatistics(
        torch.cat([part.text for part in parts], 1),
        torch.cat([part.output for part in parts], 1),
        torch.cat([part.distances for part in parts]),
        tuple(
            Kept(
                torch.cat([part.kept[index].image for part in parts], 1),
                torch.cat([part.kept[index].error for part in parts], 1),
            )
            for index in range(len(plans))
        ),
    )


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
    image = slice(sequence.image_start, sequence.image_start + sequence.image_tokens)
    text = slice(sequence.text_start, sequence.text_start + sequence.text_len)
    # Heads first: products of matrices per head.
    asked, keys, values = query[rows].transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    scores = asked @ keys.transpose(1, 2) * scale  # [h, S, N]
    if text_valid is not None:
        scores[..., text.start + text_valid : text.stop] = -torch.inf
    mass = scores.softmax(-1)
    output = mass @ values
    distances = torch.zeros(len(mass), BINS, device=mass.device)
    distances.scatter_add_(1, bins.flatten().expand(len(mass), -1), mass[:, :, image].flatten(1))

    kept = []
    for plan in plans:
        tokens, means = (mask.to(mass.device) for mask in _attended(plan, positions))
        of_tokens = scores.masked_fill(~tokens, -torch.inf)
        if means.shape[1]:
            summary_keys, summary_values = (summarise(tensor[None], plan)[0].transpose(0, 1) for tensor in (key, value))
            bias = torch.from_numpy(np.log(plan.summaries.counts)).to(mass)
            of_means = (asked @ summary_keys.transpose(1, 2) * scale + bias).masked_fill(~means, -torch.inf)
            weights = torch.cat([of_tokens, of_means], -1).softmax(-1)
            made = weights[..., : len(key)] @ values + weights[..., len(key) :] @ summary_values
        else:
            made = of_tokens.softmax(-1) @ values
        error = (made - output).norm(dim=-1) / output.norm(dim=-1)
        kept_mass = (mass[..., image] * tokens[:, image]).sum(-1)
        kept.append(Kept(kept_mass.T, error.T))
    return RowStatistics(mass[:, :, text].sum(-1).T, output.norm(dim=-1).T, distances / len(positions), tuple(kept))


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


def _distance_bins(sequence: JointSequence, positions: np.ndarray) -> torch.Tensor:
    """Bin of the distance between each sampled query and each image key, `[S, image tokens]` int64."""
    extents = sequence.grouping.grid.shape
    places = np.stack(np.unravel_index(sequence.order, extents), 1)  # [image tokens, axes]
    asked = places[positions - sequence.image_start]
    squared = np.zeros((len(positions), len(places)))
    for axis in range(len(extents)):
        squared += (asked[:, axis, None] - places[None, :, axis]) ** 2
    diagonal = max(1.0, float(np.sqrt(sum((extent - 1) ** 2 for extent in extents))))
    return torch.from_numpy((np.sqrt(squared) / diagonal * BINS).astype(np.int64).clip(max=BINS - 1))
