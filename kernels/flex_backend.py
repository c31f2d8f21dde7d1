"""Span attention on torch's FlexAttention: a plan becomes a block mask.

Summaries are appended to the keys, so that one mask and one score modification serve every pattern. The block mask
comes from the plan by counting, never from a dense N×N mask.
"""

from __future__ import annotations

import itertools
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from grat_kernels.padded_text import padded_positions, without_padding
from grat_kernels.summaries import summary_pair

if TYPE_CHECKING:
    from grat_kernels.plan import Plan

DESCRIPTION = "torch FlexAttention, compiled on CUDA and uncompiled elsewhere"

BLOCK = 128
UNCOMPILED_TOKENS = 16_384  # uncompiled FlexAttention holds all scores: 1 GiB a head in fp32 at this length


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None) -> str | None:
    """Why this backend cannot run, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"FlexAttention has no implementation for {device.type}"
    if device.type == "cuda" and head_dim < 16:
        return f"compiled FlexAttention needs head dimensions of at least 16, not {head_dim}"
    if device.type == "cpu" and tokens is not None and tokens > UNCOMPILED_TOKENS:
        return f"on a CPU it runs uncompiled and holds all scores: {tokens} tokens are more than {UNCOMPILED_TOKENS}"
    return None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    text_valid: torch.Tensor | None,
    scale: float,
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Span attention; shapes and arguments as in `grat_kernels.span_attention`.

    Nothing of a key or value that is not attended reaches the output, whatever it holds; a query that attends a value
    which is not finite is NaN in all channels.

    Returns:
        `[B, N, H, D]`.
    """
    masks_text = text_valid is not None and plan.text_len > 0
    tables = plan.cached(("flex", query.device, masks_text), lambda: _build_tables(plan, query.device, masks_text))
    padded = None
    if text_valid is not None:
        padded = padded_positions(plan, text_valid, query.device)
        key, value = without_padding(key, padded), without_padding(value, padded)
        padded = torch.nn.functional.pad(padded, (0, plan.summaries.rows))
    if plan.summaries.rows:
        pair = summary_pair(key, value, plan, summaries)
        key, value = (torch.cat(parts, dim=1) for parts in zip((key, value), pair, strict=True))
    key, value = _with_flaws_in_keys(key, value)
    output = _flex_attention(query.device.type)(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        score_mod=_score_modification(tables) if plan.summaries.rows else None,
        block_mask=_block_mask(plan, tables, padded),
        scale=scale,
    )
    return output.transpose(1, 2)


def _with_flaws_in_keys(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that are NaN where values `[B, N, H, D]` are not finite, and values that are zero there.

    FlexAttention replaces masked scores, but multiplies masked values by zero, which leaves a NaN a NaN.
    """
    flawed = ~value.isfinite().all(-1, keepdim=True)
    return key.masked_fill(flawed, torch.nan), value.masked_fill(flawed, 0)


@lru_cache(maxsize=2)
def _flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cuda":
        return torch.compile(flex_attention, dynamic=False)

    def uncompiled(*arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
            return flex_attention(*arguments, **options)

    return uncompiled


class _Tables(NamedTuple):
    """What a mask looks up. Keys fall into *columns*: a group's tokens or its summaries of a level, or all that is
    before or after the image.

    Attributes:
        list_of_query: span list of each query, `[N]` int32.
        column_of_key: column of each token and summary, `[N + R]` int32.
        attended: whether a list attends a column, `[lists, columns]` bool.
        key_bias: what is added to each key's scores, `[N + R]` fp32.
        partial: numbers `[query blocks]` and indices `[query blocks, key blocks]` of blocks that need the mask.
        full: the same of blocks that are attended whole.
    """

    list_of_query: torch.Tensor
    column_of_key: torch.Tensor
    attended: torch.Tensor
    key_bias: torch.Tensor
    partial: tuple[torch.Tensor, torch.Tensor]
    full: tuple[torch.Tensor, torch.Tensor]


def _build_tables(plan: Plan, device: torch.device, masks_text: bool) -> _Tables:
    column_starts = _column_starts(plan)
    keys = plan.tokens + plan.summaries.rows
    column_sizes = np.diff(np.append(column_starts, keys))
    lists = plan.span_lists
    attended = np.zeros((len(lists), len(column_starts)), np.bool_)
    offsets = plan.tokens + np.asarray((-plan.tokens, *plan.summaries.offsets[:-1]))
    for index in range(len(lists)):
        for span in lists[index]:
            first = offsets[span.level] + span.start
            columns = slice(*np.searchsorted(column_starts, (first, first + span.length)))
            attended[index, columns] = True
    list_of_query = np.empty(plan.tokens, np.int32)
    for run in plan.query_runs:
        list_of_query[run.start : run.start + run.length] = run.span_list
    column_of_key = np.repeat(np.arange(len(column_starts), dtype=np.int32), column_sizes)
    key_bias = np.concatenate([np.zeros(plan.tokens), np.log(plan.summaries.counts)]).astype(np.float32)

    # Attended pairs of each 128×128 block: (queries of a list) · (list attends column) · (keys of a column).
    queries_of_list = _overlap(list_of_query, len(lists))
    keys_of_column = _overlap(column_of_key, len(column_starts))
    pairs = queries_of_list @ attended.astype(np.float32) @ keys_of_column.T
    whole = pairs == np.outer(queries_of_list.sum(1), keys_of_column.sum(1))
    if masks_text:
        whole[:, plan.text_start // BLOCK : (plan.text_start + plan.text_len - 1) // BLOCK + 1] = False
    return _Tables(
        torch.from_numpy(list_of_query).to(device),
        torch.from_numpy(column_of_key).to(device),
        torch.from_numpy(attended).to(device),
        torch.from_numpy(key_bias).to(device),
        _block_rows((pairs > 0) & ~whole, device),
        _block_rows(whole, device),
    )


def _column_starts(plan: Plan) -> np.ndarray:
    """First key of each column, `[columns]`, summaries counted after the tokens."""
    starts = [np.sort(plan.grouping.starts) + plan.image_start]
    if plan.image_start:
        starts.append(np.zeros(1, np.int64))
    if plan.image_stop < plan.tokens:
        starts.append(np.asarray([plan.image_stop]))
    offsets = plan.summaries.offsets
    for first, last in itertools.pairwise(offsets):
        blocks = plan.summaries.starts[first:last] - plan.image_start
        group = np.searchsorted(np.sort(plan.grouping.starts), blocks, side="right")
        starts.append(plan.tokens + first + np.flatnonzero(np.diff(group, prepend=0)))
    return np.sort(np.concatenate(starts))


def _overlap(label: np.ndarray, labels: int) -> np.ndarray:
    """How many rows of each block of 128 carry each label, `[blocks, labels]` fp32."""
    blocks = -(-len(label) // BLOCK)
    flat = np.arange(len(label)) // BLOCK * labels + label
    return np.bincount(flat, minlength=blocks * labels).reshape(blocks, labels).astype(np.float32)


def _block_rows(selected: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and indices of the selected key blocks of each query block, selected ones first."""
    indices = np.argsort(~selected, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(selected.sum(1).astype(np.int32)).to(device), torch.from_numpy(indices).to(device)


def _block_mask(plan: Plan, tables: _Tables, padded: torch.Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    def attended(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return tables.attended[tables.list_of_query[query], tables.column_of_key[key]]

    def attended_and_valid(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return attended(batch, head, query, key) & ~padded[batch, key]  # pyright: ignore[reportOptionalSubscript]

    return BlockMask.from_kv_blocks(
        *(tensor[None, None] for tensor in (*tables.partial, *tables.full)),
        BLOCK_SIZE=BLOCK,
        mask_mod=attended if padded is None else attended_and_valid,
        seq_lengths=(plan.tokens, plan.tokens + plan.summaries.rows),
    )


def _score_modification(tables: _Tables) -> Any:
    def add_bias(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return score + tables.key_bias[key]

    return add_bias
