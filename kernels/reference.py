"""The definition of span attention: dense masks in full precision, straight from groups and pattern.

Nothing here uses a plan's spans, lists or tiles, so that it can judge them. It is quadratic in memory: small sizes only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

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
) -> torch.Tensor:
    """Span attention by one dense softmax over all tokens and all summaries.

    Args:
        query: `[B, N, H, D]`, image tokens in the plan's order.
        key: `[B, N, H, D]`.
        value: `[B, N, H, D]`.
        plan: what attends what.
        text_valid: valid text tokens of each sample, `[B]` integers, or None for all.
        scale: factor on the scores.
        compute_dtype: precision of everything inside.

    Returns:
        `[B, N, H, D]` in the dtype of `query`.
    """
    query_wide, key_wide, value_wide = (tensor.to(compute_dtype) for tensor in (query, key, value))
    level_of_key, block_means, log_counts = _key_table(plan)
    means = torch.from_numpy(block_means).to(query.device, compute_dtype)
    image = slice(plan.image_start, plan.image_start + plan.image_tokens)
    bias = torch.from_numpy(_score_bias(plan, level_of_key, log_counts)).to(query.device, compute_dtype)

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
            summary_keys = _masked_product(means, keys[image])
            summary_values = _masked_product(means, values[image])
            scores = rows @ torch.cat([keys, summary_keys]).T * scale
            scores = torch.where(sample_bias == -math.inf, -math.inf, scores + sample_bias)
            heads.append(_masked_product(scores.softmax(-1), torch.cat([values, summary_values])))
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


def _key_table(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each summary row: its far level `[R]`, the averaging weights `[R, image tokens]`, and log of its size `[R]`."""
    levels, weights = [], [np.zeros((0, plan.image_tokens))]
    for number, level in enumerate(plan.pattern.far_levels, start=1):
        cells = _cell_of_token(plan, level.block)
        # Blocks in order of their first token: the summary order of every backend.
        _, first, block = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        membership = np.zeros((len(first), plan.image_tokens))
        membership[rank[block.reshape(-1)], np.arange(plan.image_tokens)] = 1
        levels += [number] * len(first)
        weights.append(membership / membership.sum(1, keepdims=True))
    table = np.concatenate(weights)
    return np.asarray(levels, np.int64), table, np.log((table > 0).sum(1))


def _score_bias(plan: Plan, level_of_row: np.ndarray, log_counts: np.ndarray) -> np.ndarray:
    """What is added to the scores, `[N, N + R]`: 0, log of a summary's size, or -inf where nothing is attended."""
    tokens, rows = plan.tokens, len(level_of_row)
    image = slice(plan.image_start, plan.image_start + plan.image_tokens)
    bias = np.full((tokens, tokens + rows), -np.inf)
    text = slice(plan.text_start, plan.text_start + plan.text_len)
    bias[:, text] = 0
    bias[text, :tokens] = 0

    groups = _cell_of_token(plan, plan.grouping.group)
    counts = plan.grouping.counts
    _, table, _ = _key_table(plan)
    group_of_row = groups[(table > 0).argmax(1)] if rows else np.zeros((0, groups.shape[1]), np.int64)
    for a in np.unique(groups, axis=0):
        own = np.flatnonzero((groups == a).all(1)) + plan.image_start
        for b in np.unique(groups, axis=0):
            level = plan.pattern.level(tuple(a.tolist()), tuple(b.tolist()), counts)
            if level == 0:
                columns = np.flatnonzero((groups == b).all(1)) + plan.image_start
                bias[np.ix_(own, columns)] = 0
            elif level > 0:
                columns = np.flatnonzero((level_of_row == level) & (group_of_row == b).all(1))
                bias[np.ix_(own, tokens + columns)] = log_counts[columns]
    assert not np.isnan(bias[image]).any()
    return bias
