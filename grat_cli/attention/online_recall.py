"""How much of full attention a layer keeps, measured on sampled queries while a run goes on.

The figures are those of `recall`, but nothing here waits for the device, and keys are taken in chunks, each
read once (softmax with a running maximum, Milakov and Gimelshein, arXiv 1805.02867).

*Kept* is the softmax mass on the keys that are attended token by token, text included (recall). Summaries give some of
the rest back, so for heads that have them it is 1 - ||o - o_full|| / ||o_full||, over the outputs of all sampled
queries, where that is more. Of a plain pattern o - o_full = (1 - recall) (mean value kept - mean value left out), so
both are on one scale.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from grat_cli.attention.layer import AttentionInputs
from grat_cli.attention.recall import among, groups_of, sample_positions
from grat_kernels import HeadPlan, Plan
from grat_kernels.choosing import chosen_rows
from grat_kernels.summaries import summary_pair

_BUDGET_BYTES = 2**27


class SampledClass(NamedTuple):
    """What the sampled queries attend in the heads of one class.

    Attributes:
        plan: of the class.
        share: of the layer's heads.
        heads: their numbers, `[h]` int64, or None for all.
        tokens: whether each is attended, `[S, N]` bool.
        summaries: likewise, `[S, R]`, or None where the class has none.
        groups: whose queries they are, where groups choose by content what they attend besides, `[G]` int64.
        group_of_row: which of these each query is of, `[S]` int64.
    """

    plan: Plan
    share: float
    heads: torch.Tensor | None
    tokens: torch.Tensor
    summaries: torch.Tensor | None
    groups: torch.Tensor | None
    group_of_row: torch.Tensor | None


class SampledRows(NamedTuple):
    """Queries that are looked at under one plan, on one device.

    Attributes:
        positions: in the joint sequence, `[S]` int64.
        dense_share: of the layer's heads that attend everything, which are not looked at.
        classes: the other heads.
    """

    positions: torch.Tensor
    dense_share: float
    classes: tuple[SampledClass, ...]


def sample_rows(plan: Plan | HeadPlan, count: int, seed: int, device: torch.device) -> SampledRows:
    """Draws image queries, and lays out what each attends under a plan; plans of one token order get the same ones.

    Args:
        plan: of the layers to be measured.
        count: queries; all where there are fewer.
        seed: of the draw.
        device: where to measure.
    """
    positions = sample_positions(plan, count, seed)
    by_head = plan.class_of_head if isinstance(plan, HeadPlan) else (0,)
    dense_share, classes = 0.0, []
    for number, member in enumerate(plan.classes):
        share = by_head.count(number) / len(by_head)
        if member.density == 1:
            dense_share += share
            continue
        heads = np.flatnonzero(np.asarray(by_head) == number)
        tokens, summaries = _span_bounds(member, positions)
        groups: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if member.candidates is not None:
            numbers, of_row = np.unique(groups_of(member, positions), return_inverse=True)
            groups = _moved(numbers, device), _moved(of_row, device)
        classes.append(
            SampledClass(
                member,
                share,
                None if len(heads) == len(by_head) else _moved(heads, device),
                _inside(_moved(tokens, device), member.tokens),
                _inside(_moved(summaries, device), member.summaries.rows) if member.pattern.far_levels else None,
                *groups,
            )
        )
    return SampledRows(_moved(positions, device), dense_share, tuple(classes))


@torch.no_grad()
def measure(inputs: AttentionInputs, rows: SampledRows) -> torch.Tensor:
    """Kept share, recall and output error of a layer, `[3]` fp32 on its device; means over the samples of the batch.

    Recall and what is kept are means over heads. The error is that of the heads with summaries, NaN if none has.

    Args:
        inputs: of the layer's attention.
        rows: of `sample_rows`, for the layer's plan.
    """
    return torch.stack([_of_sample(inputs, rows, sample) for sample in range(len(inputs.query))]).mean(0)


def _of_sample(inputs: AttentionInputs, rows: SampledRows, sample: int) -> torch.Tensor:
    """`measure` of one sample of the batch."""
    query = inputs.query[sample].index_select(0, rows.positions)
    hidden = None
    if inputs.text_valid is not None:
        text = torch.arange(inputs.plan.tokens, device=query.device) - inputs.plan.text_start
        hidden = (text >= inputs.text_valid[sample]) & (text < inputs.plan.text_len)
    kept = torch.full((), rows.dense_share, device=query.device)
    recall = kept
    squares: list[torch.Tensor] = []
    for members in rows.classes:
        of_class = _of_class(inputs, members, query, hidden, sample)
        recall = recall + members.share * of_class.recall
        if of_class.squares is None:
            kept = kept + members.share * of_class.recall
        else:
            squares.append(of_class.squares)
            # `fmax` leaves out NaN: full outputs of zero have no error to speak of.
            kept = kept + members.share * torch.fmax(of_class.recall, 1 - _error(of_class.squares))
    error = _error(torch.stack(squares).sum(0)) if squares else torch.full((), torch.nan, device=query.device)
    return torch.stack([kept, recall, error])


def _error(squares: torch.Tensor) -> torch.Tensor:
    return (squares[0] / squares[1]).sqrt()


class _OfClass(NamedTuple):
    """Recall; and ||o - o_full||^2 and ||o_full||^2, `[2]`, of heads with summaries."""

    recall: torch.Tensor
    squares: torch.Tensor | None


def _of_class(
    inputs: AttentionInputs,
    members: SampledClass,
    query: torch.Tensor,
    hidden: torch.Tensor | None,
    sample: int,
) -> _OfClass:
    """What the heads of a class keep of one sample.

    Args:
        inputs: of the layer.
        members: heads, and what their queries attend.
        query: `[S, H, D]`.
        hidden: whether a position is text that is not valid, `[N]`, or None.
        sample: which of the batch.
    """

    def of_heads(tensor: torch.Tensor) -> torch.Tensor:
        """`[h, n, D]` fp32 from `[n, H, D]`."""
        return (tensor if members.heads is None else tensor.index_select(1, members.heads)).transpose(0, 1).float()

    asked = of_heads(query)
    heads, count, head_dim = asked.shape
    with_values = members.summaries is not None
    means = _means(inputs, members, sample) if with_values else None
    chosen = None
    if members.groups is not None and members.group_of_row is not None:
        assert means is not None, "what is not chosen is attended by means"
        whole = inputs.query[sample : sample + 1]
        whole = whole if members.heads is None else whole.index_select(2, members.heads)
        chosen = chosen_rows(whole, means, members.plan, inputs.scale, members.groups)[0]
        chosen = chosen.index_select(1, members.group_of_row)  # [h, S, slots]
    top = asked.new_full((heads, count), torch.finfo(torch.float32).min)
    total, inside = torch.zeros_like(top), torch.zeros_like(top)
    output, near = torch.zeros_like(asked), torch.zeros_like(asked)
    at_once = max(1, _BUDGET_BYTES // (8 * heads * (head_dim + 2 * count)))
    for start in range(0, inputs.plan.tokens, at_once):
        part = slice(start, start + at_once)
        scores = asked @ of_heads(inputs.key[sample, part]).transpose(1, 2) * inputs.scale  # [h, S, n]
        if hidden is not None:
            scores.masked_fill_(hidden[part], -torch.inf)
        higher = torch.maximum(top, scores.amax(-1))
        decay = (top - higher).exp()
        top = higher
        weights = (scores - top[..., None]).exp()
        tokens = members.tokens[:, part]
        if chosen is not None:
            tokens = tokens | among(chosen, start, start + tokens.shape[1])
        attended = weights * tokens
        total = total * decay + weights.sum(-1)
        inside = inside * decay + attended.sum(-1)
        if with_values:
            values = of_heads(inputs.value[sample, part])
            output = output * decay[..., None] + weights @ values
            near = near * decay[..., None] + attended @ values
    recall = (inside / total).mean()
    if members.summaries is None or means is None:
        return _OfClass(recall, None)

    # What the pattern makes of it: the same tokens, and means in place of the others.
    keys, values = (tensor[0].transpose(0, 1).float() for tensor in means)
    scores = asked @ keys.transpose(1, 2) * inputs.scale + members.plan.tensors(asked.device).log_counts
    seen = members.summaries
    if chosen is not None:
        seen = seen | among(chosen, inputs.plan.tokens, inputs.plan.tokens + members.plan.summaries.rows)
    scores = scores.masked_fill(~seen, -torch.inf)
    higher = torch.maximum(top, scores.amax(-1))
    weights, decay = (scores - higher[..., None]).exp(), (top - higher).exp()
    own = (near * decay[..., None] + weights @ values) / (inside * decay + weights.sum(-1))[..., None]
    full = output / total[..., None]
    return _OfClass(recall, torch.stack([(own - full).square().sum(), full.square().sum()]))


def _means(inputs: AttentionInputs, members: SampledClass, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summaries of keys and values of one sample and the heads of a class, `[1, R, h, D]` each."""
    given = inputs.summaries
    key, value = summary_pair(
        inputs.key[sample : sample + 1],
        inputs.value[sample : sample + 1],
        members.plan,
        None if given is None else (given[0][sample : sample + 1], given[1][sample : sample + 1]),
    )
    if members.heads is None:
        return key, value
    return key.index_select(2, members.heads), value.index_select(2, members.heads)


def _span_bounds(plan: Plan, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends in turn of the spans that queries attend: of tokens, and of summaries, `[S, 2 x spans]` each.

    Lists of fewer spans are filled up with a number that no position reaches.
    """
    starts = np.array([run.start for run in plan.query_runs])
    runs = np.searchsorted(starts, positions, side="right") - 1
    offsets = plan.summaries.offsets
    tokens: list[list[int]] = []
    means: list[list[int]] = []
    for run in runs.tolist():
        spans = plan.span_lists[plan.query_runs[run].span_list]
        tokens.append([bound for span in spans if not span.level for bound in (span.start, span.stop)])
        means.append(
            [offsets[span.level - 1] + bound for span in spans if span.level for bound in (span.start, span.stop)]
        )
    return _filled(tokens), _filled(means)


def _filled(rows: list[list[int]]) -> np.ndarray:
    filled = np.full((len(rows), max(map(len, rows))), np.iinfo(np.int32).max, np.int32)
    for bounds, row in zip(filled, rows, strict=True):
        bounds[: len(row)] = row
    return filled


def _inside(bounds: torch.Tensor, count: int) -> torch.Tensor:
    """Whether positions lie in spans, `[S, count]` bool: those with an odd number of bounds at or before them."""
    positions = torch.arange(count, dtype=torch.int32, device=bounds.device).repeat(len(bounds), 1)
    return torch.searchsorted(bounds, positions, out_int32=True, right=True).bitwise_and_(1).bool()


def _moved(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on a device; from pinned memory the copy takes its place among the device's work, and nobody waits."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
