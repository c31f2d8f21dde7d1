"""Span attention with automatic warp specialisation, for Hopper (sm_90), in Triton.

The compiler splits the loop over key tiles by itself: one warp group loads tiles, two compute on 64 queries each, so
that one computes its softmax while the other keeps the tensor cores busy. It does so for one shape of program only
(Triton 3.6, 3.7): 4 warps, and a single loop with matrix products in the whole kernel; with 8 warps the request is
ignored, and a second such loop aborts the compiler. So all keys of a query tile, tokens and summaries, full tiles and
partial ones, come as one list over one matrix of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grat_kernels.span_kernel import LOWEST, accumulate


@triton.jit(
    do_not_specialize=[
        "tokens",
        "key_rows",
        "heads",
        "tile_count",
        "leading_tiles",
        "leading_programs",
    ]
)
def ws_attention_kernel(
    output,  # [B, N, H, D] contiguous
    query,
    key_blocks,
    value_blocks,
    bias_blocks,  # [B, K] fp32 by its batch stride: added to the score of each key, divided by the scale; None for zeros
    class_of_head,  # [H] int32: which T query tiles a head takes; None where all take the same
    query_tiles,  # [C·T, 4] int32, see SingleList
    key_tiles,  # [n + 1, 2] int32
    query_rows,
    query_row_stride,
    tokens,  # N
    key_rows,  # K: rows of one sample in the matrix of keys
    heads,  # H
    tile_count,  # T
    leading_tiles,  # text tiles at the front
    leading_programs,  # leading_tiles · B · H
    scale,  # factor on the scores, times log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether any tile has fewer than BLOCK_N keys
):
    # Text tiles of every head come first, then head by head, as in the span kernel; without a branch, which the
    # compiler would have to split among warp groups.
    program = tl.program_id(0)
    leads = program < leading_programs
    number = tl.where(leads, program, program - leading_programs)
    tiles_of_head = tl.where(leads, leading_tiles, tile_count - leading_tiles)
    batch_head = number // tiles_of_head
    tile = tl.where(leads, 0, leading_tiles) + number % tiles_of_head
    batch = batch_head // heads
    head = batch_head % heads

    if class_of_head is not None:
        tile += tl.load(class_of_head + head) * tile_count
    entry = query_tiles + tile * 4
    first_query = tl.load(entry)
    query_count = tl.load(entry + 1)
    list_begin = tl.load(entry + 2)
    list_end = tl.load(entry + 3)

    head_column = head * HEAD_DIM
    first_row = batch * key_rows
    # Rows past the tile's end are other queries: computed and not stored.
    rows = tl.arange(0, BLOCK_M)
    channels = tl.arange(0, HEAD_DIM)
    query_blocks = tl.make_tensor_descriptor(
        query, [query_rows, heads * HEAD_DIM], [query_row_stride, 1], [BLOCK_M, HEAD_DIM]
    )
    queries = query_blocks.load([batch * tokens + first_query, head_column])

    columns = tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    for index in tl.range(list_begin, list_end, num_stages=STAGES, warp_specialize=True):
        first_key = tl.load(key_tiles + 2 * index)
        key_count = tl.load(key_tiles + 2 * index + 1)
        keys = key_blocks.load([first_row + first_key, head_column])
        values = value_blocks.load([first_row + first_key, head_column])
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if bias_blocks is not None:
            bias = bias_blocks.load([first_row + first_key])
            scores += bias[None, :]
        if PARTIAL:
            # Rows past the end of a span are the span's neighbours.
            attended = columns < key_count
            scores = tl.where(attended[None, :], scores, float("-inf"))
        accumulator, total, highest = accumulate(scores, scale, values, accumulator, total, highest)

    # Stored by masked pointers: a whole block would overwrite the queries of the next tile.
    rows = tl.arange(0, BLOCK_M)
    channels = tl.arange(0, HEAD_DIM)
    row_stride = heads.to(tl.int64) * HEAD_DIM
    output_rows = batch.to(tl.int64) * tokens + first_query + rows
    pointers = output + output_rows[:, None] * row_stride + head_column + channels[None, :]
    result = accumulator * (1.0 / total)[:, None]
    tl.store(pointers, result.to(output.dtype.element_ty), mask=(rows < query_count)[:, None])
