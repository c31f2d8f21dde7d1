"""Span attention with automatic warp specialisation, for Hopper (sm_90), in Triton.

The compiler splits the loop over key tiles by itself: one warp group loads tiles, two compute, each on half of the
queries, so that one computes its softmax while the other keeps the tensor cores busy. It does so for one shape of
program only (Triton 3.6, 3.7):

- 4 warps; with 8 the request is ignored;
- one loop with matrix products in the whole kernel; a second aborts the compiler. So all keys of a query tile, tokens
  and summaries, full tiles and partial ones, come as one list over one matrix of rows;
- no branch with an `else`, or the request is ignored;
- whatever goes into a matrix product is loaded through tensor descriptors, a bias included. That of the queries must
  be made in the kernel, which halves its block for the two groups; it costs 128 bytes of scratch per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grat_kernels.span_kernel import LOWEST, accumulate


@triton.jit(
    do_not_specialize=[
        "query_rows",
        "tokens",
        "key_rows",
        "bias_rows",
        "heads",
        "tile_count",
        "leading_tiles",
        "leading_programs",
    ]
)
def specialised_attention_kernel(
    query,  # [B, N, H, D], rows of [B·N, H·D]
    key_blocks,  # tensor descriptors [B·K, H·D], blocks [BLOCK_N, HEAD_DIM]; N tokens, then summaries
    value_blocks,
    bias_blocks,  # tensor descriptor [P·BLOCK_N] or [B·P·BLOCK_N] fp32, blocks [BLOCK_N]: bias of each key of a tile,
    # divided by the scale of the scores; None where all are zeros
    output,  # [B, N, H, D] contiguous
    class_of_head,  # [H] int32: which T query tiles a head takes; None where all take the same
    query_tiles,  # [C·T, 4] int32, see SingleLists
    key_tiles,  # [n, 3] int32
    query_stride,  # from row to row
    query_rows,  # B·N
    tokens,  # N
    key_rows,  # K
    bias_rows,  # P, or 0 where all samples share their biases
    heads,  # H
    tile_count,  # T
    leading_tiles,  # text tiles at the front
    leading_programs,  # leading_tiles · B · H
    scale,  # factor on the scores, times log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether any tile has fewer than BLOCK_N rows
):
    # Text tiles of every head come first, then head by head, as in the span kernel; without an `else`.
    program = tl.program_id(0)
    leads = program < leading_programs
    number = tl.where(leads, program, program - leading_programs)
    tiles_of_head = tl.where(leads, leading_tiles, tile_count - leading_tiles)
    tile = tl.where(leads, 0, leading_tiles) + number % tiles_of_head
    batch = number // tiles_of_head // heads
    head = number // tiles_of_head % heads

    if class_of_head is not None:
        tile += tl.load(class_of_head + head) * tile_count
    entry = query_tiles + tile * 4
    first_query = tl.load(entry)
    query_count = tl.load(entry + 1)
    list_begin = tl.load(entry + 2)
    list_end = tl.load(entry + 3)

    # Rows past the tile's end are other queries: computed and not stored.
    query_blocks = tl.make_tensor_descriptor(
        query,
        [query_rows, heads * HEAD_DIM],
        [query_stride, 1],  # pyright: ignore[reportArgumentType]
        [BLOCK_M, HEAD_DIM],
    )
    head_column = head * HEAD_DIM
    queries = query_blocks.load([batch * tokens + first_query, head_column])

    accumulator = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    columns = tl.arange(0, BLOCK_N)
    for index in tl.range(list_begin, list_end, num_stages=STAGES, warp_specialize=True):
        first_key = tl.load(key_tiles + 3 * index)
        key_count = tl.load(key_tiles + 3 * index + 1)
        keys = key_blocks.load([batch * key_rows + first_key, head_column])
        values = value_blocks.load([batch * key_rows + first_key, head_column])
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if bias_blocks is not None:
            bias_row = batch * bias_rows + tl.load(key_tiles + 3 * index + 2)
            scores += bias_blocks.load([bias_row * BLOCK_N])[None, :]
        if PARTIAL:
            # What lies past the end of a span are its neighbours.
            scores = tl.where((columns < key_count)[None, :], scores, float("-inf"))
        accumulator, total, highest = accumulate(scores, scale, values, accumulator, total, highest)

    # Stored by masked pointers: a whole block would overwrite the queries of the next tile.
    rows = tl.arange(0, BLOCK_M)
    channels = tl.arange(0, HEAD_DIM)
    output_rows = (batch * tokens + first_query + rows).to(tl.int64)
    pointers = output + output_rows[:, None] * (heads * HEAD_DIM) + head_column + channels[None, :]
    result = accumulator * (1.0 / total)[:, None]
    tl.store(pointers, result.to(output.dtype.element_ty), mask=(rows < query_count)[:, None])
