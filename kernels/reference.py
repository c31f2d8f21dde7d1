"""The definition of span attention: dense masks in full precision, straight from the coordinates of tokens.

Nothing here uses a plan's spans, lists, tiles or candidates, nor what patterns say of groups, so that it can judge
them. Quadratic in memory: small sizes only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from grat_kernels.choosing import SPREAD_LEAST, SPREAD_WITHIN
from grat_kernels.padded_text import check_text_valid
from grat_kernels.pattern import NOT_ATTENDED, Block, CrissCross, Far, Full, Pattern, SlidingTile, Union

if TYPE_CHECKING:
    from grat_kernels.geometry import Cell
    from grat_kernels.plan import Plan


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    text_valid: torch.Tensor | None,
    scale: float,
    compute_dtype: torch.dtype = torch.float32,
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Span attention by one dense softmax over all tokens and all summaries; shapes and arguments as in
    `grat_kernels.span_attention`.

    Args:
        compute_dtype: precision of everything inside.

    Raises:
        ValueError: if a sample has less than no valid text, or more than there is.
    """
    if text_valid is not None:
        check_text_valid(text_valid, plan)
    query_wide, key_wide, value_wide = (tensor.to(compute_dtype) for tensor in (query, key, value))
    block_means, score_bias = plan.cached("dense definition", lambda: _dense_definition(plan))
    means = torch.from_numpy(block_means).to(query.device, compute_dtype)
    bias = torch.from_numpy(score_bias).to(query.device, compute_dtype)
    image = slice(plan.image_start, plan.image_stop)

    outputs = []
    for sample in range(query.shape[0]):
        sample_bias = bias.clone()
        if text_valid is not None:
            sample_bias[:, plan.text_start + int(text_valid[sample]) : plan.text_start + plan.text_len] = -math.inf
        heads = []
        for head in range(query.shape[2]):
            rows = query_wide[sample, :, head]
            keys, values = key_wide[sample, :, head], value_wide[sample, :, head]
            # A NaN in one token must not reach others through 0·NaN, so each block is averaged by itself.
            if summaries is None:
                summary_keys = _masked_product(means, keys[image])
                summary_values = _masked_product(means, values[image])
            else:
                summary_keys, summary_values = (tensor[sample, :, head].to(compute_dtype) for tensor in summaries)
            head_bias = sample_bias
            if plan.pattern.choice:
                head_bias = _with_chosen(sample_bias, plan, means, rows * scale, summary_keys, summary_values)
            scores = rows @ torch.cat([keys, summary_keys]).T * scale
            scores = torch.where(head_bias == -math.inf, -math.inf, scores + head_bias)
            without_keys = (head_bias == -math.inf).all(-1, keepdim=True)
            weights = scores.softmax(-1).masked_fill(without_keys, 0)
            heads.append(_masked_product(weights, torch.cat([values, summary_values])))
        outputs.append(torch.stack(heads, dim=1))
    return torch.stack(outputs).to(query.dtype)


def _masked_product(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`weights @ values` where a zero weight drops its value even if that is NaN or infinite."""
    product = weights @ values.nan_to_num(0.0, 0.0, 0.0)
    for row in (~values.isfinite().all(-1)).nonzero()[:, 0].tolist():
        hit = weights[:, row] != 0
        product[hit] = product[hit] + weights[hit, row : row + 1] * values[row]
    return product


def _cell_of_token(plan: Plan, cell: Cell) -> np.ndarray:
    """Coordinates of the cell that each image token (in the plan's order) lies in, `[tokens, axes]`."""
    raster = np.stack([axis.reshape(-1) for axis in np.indices(plan.grouping.grid.shape)], axis=1)
    return raster[plan.order] // np.asarray(cell)


def _with_chosen(
    bias: torch.Tensor,
    plan: Plan,
    means: torch.Tensor,
    queries: torch.Tensor,
    summary_keys: torch.Tensor,
    summary_values: torch.Tensor,
) -> torch.Tensor:
    """What is added to the scores of one head, `[N, N + R]`, once every group has chosen; see `choosing`.

    Args:
        bias: where every block that is chosen from is attended by its mean.
        plan: with a choice.
        means: averaging weights of the summaries, `[R, image tokens]`.
        queries: scaled, `[N, D]`.
        summary_keys: means, `[R, D]`.
        summary_values: likewise.
    """
    choice, (level,) = plan.pattern.choice, plan.pattern.far_levels
    assert choice is not None
    bias = bias.clone()
    members = means > 0
    whole, within = (
        plan.summaries.rows_of(plan.summaries.blocks.index(size) + 1) for size in (level.block, choice.block)
    )
    # For each block the rows of the means within it.
    inside = (means[whole] @ means[within].T > 0).tolist()
    parts = {
        row: [part for part, shared in enumerate(of_row, start=within.start) if shared]
        for row, of_row in enumerate(inside, start=whole.start)
    }
    group_of_token = _cell_of_token(plan, plan.grouping.group)
    for group in np.unique(group_of_token, axis=0):
        tokens = plan.image_start + np.flatnonzero((group_of_token == group).all(1))
        query = queries[tokens].mean(0)
        scores = {}
        for row, inner in parts.items():
            if bias[tokens[0], plan.tokens + row] == -math.inf:
                continue
            counts = members[inner].sum(1).to(query.dtype)
            shares = counts / counts.sum()
            keys, values = summary_keys[inner], summary_values[inner]
            inside = keys @ query + counts.log()
            looked, mean = (inside.softmax(0) - shares) @ values, shares @ values
            deviation = (shares @ (values - mean).square()).sum().sqrt()
            spread = looked.norm() + SPREAD_WITHIN * deviation + SPREAD_LEAST * mean.norm()
            scores[row] = float(inside.logsumexp(0) + spread.log())
        best = sorted(scores, key=lambda row: -scores[row])
        for number, row in enumerate(best[: choice.exact + choice.fine]):
            bias[tokens, plan.tokens + row] = -math.inf
            if number < choice.exact:
                exact = plan.image_start + torch.nonzero(members[row])[:, 0]
                bias[np.ix_(tokens, exact.numpy())] = 0
            else:
                counts = members[parts[row]].sum(1).to(bias.dtype)
                bias[np.ix_(tokens, plan.tokens + np.asarray(parts[row]))] = counts.log()
    return bias


def _dense_definition(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Averaging weights of the summaries, `[R, image tokens]`, and what is added to the scores, `[N, N + R]`.

    The latter is 0 for an attended token, log of a summary's size, or -inf for what is not attended. Blocks that are
    chosen from are attended by their means here.
    """
    level_of_row, weights = [], [np.zeros((0, plan.image_tokens))]
    for number, size in enumerate(plan.summaries.blocks, start=1):
        # Blocks in order of their first token: the summary order of every backend.
        _, first, block = np.unique(_cell_of_token(plan, size), axis=0, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        membership = np.zeros((len(first), plan.image_tokens))
        membership[rank[block.reshape(-1)], np.arange(plan.image_tokens)] = 1
        level_of_row += [number] * len(first)
        weights.append(membership / membership.sum(1, keepdims=True))
    means = np.concatenate(weights)
    log_counts = np.log((means > 0).sum(1))
    # From numbers of the pattern's far levels to numbers of the summaries' levels; NOT_ATTENDED is the last entry.
    number_of_level = [0, *(plan.summaries.blocks.index(level.block) + 1 for level in plan.pattern.far_levels)]
    told_by = np.asarray([*number_of_level, NOT_ATTENDED])[_levels_of_pairs(plan.pattern, plan)]
    # Blocks nest in groups: all tokens of a block have one level for a query.
    sees = told_by[:, (means > 0).argmax(1)] == np.asarray(level_of_row)

    bias = np.zeros((plan.tokens, plan.tokens + len(means)))
    bias[:, plan.tokens :] = -np.inf
    image = slice(plan.image_start, plan.image_stop)
    bias[image, image] = np.where(told_by == 0, 0, -np.inf)
    bias[image, plan.tokens :] = np.where(sees, log_counts, -np.inf)
    return means, bias


def _levels_of_pairs(pattern: Pattern, plan: Plan) -> np.ndarray:
    """Levels of all pairs of image tokens in the plan's order, `[queries, keys]`, numbered as `pattern` does it.

    What `pattern` says of groups stands here once more, in another way, so that each can judge the other: every query
    sees boxes of tokens, whose sides are multiples of the group's.
    """
    tokens, group = _cell_of_token(plan, (1,) * plan.grouping.grid.axes), np.asarray(plan.grouping.group)
    own = tokens // group

    def inside(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Whether keys lie within groups from a first to a last along each axis, `[queries, keys, axes]`."""
        return (tokens >= (first * group)[:, None]) & (tokens < ((last + 1) * group)[:, None])

    match pattern:
        case Union():
            levels = np.stack([_levels_of_pairs(member, plan) for member in pattern.patterns])
            beyond_all = len(pattern.far_levels) + 1
            closest = np.where(levels == NOT_ATTENDED, beyond_all, levels).min(0)
            return np.where(closest == beyond_all, NOT_ATTENDED, closest)
        case Far():
            levels = np.full((len(tokens), len(tokens)), NOT_ATTENDED)
            for number, level in enumerate(pattern.far, start=1):
                levels[~inside(own - level.beyond, own + level.beyond).all(-1)] = number
            return levels
        case Full():
            attended = np.ones((len(tokens), len(tokens)), np.bool_)
        case Block():
            attended = inside(own - pattern.radius, own + pattern.radius).all(-1)
        case CrissCross():
            attended = inside(own, own).sum(-1) >= pattern.share
        case SlidingTile():
            window = np.asarray(pattern.window)
            # Moved inward at the far border, then at the near one.
            first = np.maximum(np.minimum(own - window // 2, plan.grouping.counts - window), 0)
            attended = inside(first, first + window - 1).all(-1)
        case _:
            raise TypeError(f"the reference has no definition of {pattern}")
    return np.where(attended, 0, NOT_ATTENDED)
