"""The span attention kernel: online softmax over short lists of key tiles, in Triton.

One program computes one tile of queries of one head. Its keys come as a flat list of tiles in three stretches: full
tiles of tokens (no mask, no bias; the bulk of the work), partial tiles of tokens (masked), and tiles of summaries
(biased and masked). Flat lists keep one software pipeline alive over all spans, where nested loops would rebuild it for
each. Masked rows are never read, because 0·NaN in `weights @ values` would carry a neighbour's NaN into the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The softmax is computed in base 2, exp2 being one instruction.
LOG2_E = tl.constexpr(1.4426950408889634)
# Where the running maximum starts. Finite, so that a tile whose keys are all masked gives exp2(-inf) = 0, never
# exp2(-inf - -inf) = NaN; the lowest float32, so that no finite score lies below it.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _accumulate(scores, scale, values, accumulator, total, highest):
    """One step of the online softmax: raw `scores` [M, N] and `values` [N, D] into the running sums of M queries.

    The positive `scale` enters by one multiply-add per score.
    """
    highest_now = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest_now[:, None])
    decay = tl.exp2(highest - highest_now)
    total = total * decay + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator * decay[:, None], input_precision="ieee")
    return accumulator, total, highest_now


@triton.jit
def span_attention_kernel(
    query,  # [B, N, H, D] by its strides; the last is 1
    key,
    value,
    output,
    query_blocks,  # tensor descriptors [B·N, H·D], blocks [BLOCK_M or BLOCK_N, D]; None: read full tiles by pointers
    key_blocks,
    value_blocks,
    summary_key,  # [B, R, H, D] contiguous; None without far field
    summary_value,
    summary_log_counts,  # [R] fp32
    text_valid,  # [B] int32: valid text tokens; None where all are
    query_tiles,  # [T, 6] int32, see grat_kernels.plan.Tiles
    key_tiles,  # [n + 1, 2] int32
    query_batch_stride,
    query_token_stride,
    query_head_stride,
    key_batch_stride,
    key_token_stride,
    key_head_stride,
    value_batch_stride,
    value_token_stride,
    value_head_stride,
    tokens,  # N
    heads,  # H
    summaries,  # R
    text_start,
    text_stop,
    tile_count,  # T
    leading_tiles,  # text tiles at the front of the list
    leading_programs,  # leading_tiles * B * H
    scale,  # factor on the scores, times log2(e)
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # next power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Text tiles of every head come first: each is as long as the sequence, and started last they would be a long tail.
    # Then head by head in token order, so that programs that run together share keys in L2.
    program = tl.program_id(0)
    if program < leading_programs:
        batch_head = program // leading_tiles
        tile = program % leading_tiles
    else:
        rest = tile_count - leading_tiles
        batch_head = (program - leading_programs) // rest
        tile = leading_tiles + (program - leading_programs) % rest
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)

    entry = query_tiles + tile * 6
    first_query = tl.load(entry)
    query_count = tl.load(entry + 1)
    list_begin = tl.load(entry + 2)
    full_end = tl.load(entry + 3)
    partial_end = tl.load(entry + 4)
    summary_end = tl.load(entry + 5)

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, PADDED_DIM)
    inside = channels < HEAD_DIM
    query_rows = (first_query + rows).to(tl.int64)

    if query_blocks is not None:
        batch_row = (batch * tokens).to(tl.int32)
        head_column = (head * HEAD_DIM).to(tl.int32)
        # Rows past the tile's end are other queries: computed and not stored.
        queries = query_blocks.load([batch_row + first_query, head_column])
    else:
        query_base = query + batch * query_batch_stride + head * query_head_stride
        queries = tl.load(
            query_base + query_rows[:, None] * query_token_stride + channels[None, :],
            mask=(rows < query_count)[:, None] & inside[None, :],
            other=0.0,
        )
    key_base = key + batch * key_batch_stride + head * key_head_stride
    value_base = value + batch * value_batch_stride + head * value_head_stride
    key_offsets = columns.to(tl.int64)[:, None] * key_token_stride + channels[None, :]
    value_offsets = columns.to(tl.int64)[:, None] * value_token_stride + channels[None, :]

    accumulator = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)

    # Full tiles. The next tile's position is loaded one step ahead, or every load would wait for an index first.
    next_key = tl.load(key_tiles + 2 * list_begin)
    for index in tl.range(list_begin, full_end, num_stages=STAGES):
        first_key = next_key
        next_key = tl.load(key_tiles + 2 * index + 2)
        if key_blocks is not None:
            keys = key_blocks.load([batch_row + first_key, head_column])
            values = value_blocks.load([batch_row + first_key, head_column])
        else:
            key_pointers = key_base + first_key.to(tl.int64) * key_token_stride + key_offsets
            value_pointers = value_base + first_key.to(tl.int64) * value_token_stride + value_offsets
            if HEAD_DIM == PADDED_DIM:
                keys = tl.load(key_pointers)
                values = tl.load(value_pointers)
            else:
                keys = tl.load(key_pointers, mask=inside[None, :], other=0.0)
                values = tl.load(value_pointers, mask=inside[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        accumulator, total, highest = _accumulate(scores, scale, values, accumulator, total, highest)

    # Partial tiles, and all text where a sample's text may be padded.
    for index in tl.range(full_end, partial_end, num_stages=1):
        first_key = tl.load(key_tiles + 2 * index)
        key_count = tl.load(key_tiles + 2 * index + 1)
        attended = columns < key_count
        if text_valid is not None:
            position = first_key + columns
            padding = (position >= text_start + tl.load(text_valid + batch)) & (position < text_stop)
            attended = attended & (padding == 0)
        loaded = attended[:, None] & inside[None, :]
        keys = tl.load(key_base + first_key.to(tl.int64) * key_token_stride + key_offsets, mask=loaded, other=0.0)
        values = tl.load(
            value_base + first_key.to(tl.int64) * value_token_stride + value_offsets, mask=loaded, other=0.0
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = tl.where(attended[None, :], scores, float("-inf"))
        accumulator, total, highest = _accumulate(scores, scale, values, accumulator, total, highest)

    # Summaries: the mean key of c tokens stands for all of them, so log c is added to its score.
    if summary_key is not None:
        summary_stride = heads * HEAD_DIM
        summary_base = batch * summaries * summary_stride + head * HEAD_DIM
        summary_offsets = columns[:, None] * summary_stride + channels[None, :]
        for index in tl.range(partial_end, summary_end, num_stages=1):
            first_row = tl.load(key_tiles + 2 * index)
            row_count = tl.load(key_tiles + 2 * index + 1)
            attended = columns < row_count
            loaded = attended[:, None] & inside[None, :]
            start = summary_base + first_row.to(tl.int64) * summary_stride
            keys = tl.load(summary_key + start + summary_offsets, mask=loaded, other=0.0)
            values = tl.load(summary_value + start + summary_offsets, mask=loaded, other=0.0)
            bias = tl.load(summary_log_counts + first_row + columns, mask=attended, other=float("-inf"))
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") + (bias * LOG2_E / scale)[None, :]
            accumulator, total, highest = _accumulate(scores, scale, values, accumulator, total, highest)

    # Stored by masked pointers: a whole block would overwrite the queries of the next tile.
    output_base = output + (batch * tokens * heads + head) * HEAD_DIM
    tl.store(
        output_base + query_rows[:, None] * (heads * HEAD_DIM) + channels[None, :],
        (accumulator / total[:, None]).to(output.dtype.element_ty),
        mask=(rows < query_count)[:, None] & inside[None, :],
    )
