"""The span attention kernel: online softmax over short lists of key tiles, in Triton.

One program computes one tile of queries of one head. Its keys come as a flat list of tiles (`tile_lists`): full tiles
of tokens, which are the bulk of the work and need neither mask nor bias; full tiles of summaries, which add a bias;
packed tiles, which gather what is left over of all spans; and where groups choose by content, chosen tiles, which are
packed on the device for each head and group. Flat lists keep one load pipeline alive over all spans, where loops nested
over spans would restart it for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Where the running maximum starts. Finite, so that a tile whose keys are all masked gives exp2(-inf) = 0 and never
# exp2(-inf - -inf) = NaN; the lowest float32, so that no finite score lies below it.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def accumulate(scores, scale, values, accumulator, total, highest):
    """One step of the online softmax: raw `scores` [M, N] and `values` [N, D] into the running sums of M queries.

    Softmax is computed in base 2, exp2 being one instruction; the positive `scale` holds log2(e) and enters by one
    multiply-add per score.
    """
    highest_now = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest_now[:, None])
    decay = tl.exp2(highest - highest_now)
    total = total * decay + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator * decay[:, None], input_precision="ieee")
    return accumulator, total, highest_now


@triton.jit
def _load(pointers, inside, EVERY_CHANNEL: tl.constexpr):
    """Rows of a full tile: masked only where the head dimension is padded."""
    if EVERY_CHANNEL:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside[None, :], other=0.0)


@triton.jit
def _attend_packed(
    packed,  # [BLOCK_TAIL] int32: what the slots hold: a position, or N + r for row r of the summaries
    attended,  # [BLOCK_TAIL] bool: slots that hold anything
    bias,  # [BLOCK_TAIL] fp32: -inf where they do not
    queries,
    scale,
    sources,  # of tokens: keys and values of one head with their strides
    summary_sources,  # of summaries: the same with one stride; None without far field
    tokens,
    channels,
    inside,
    accumulator,
    total,
    highest,
):
    """One packed tile. Only attended keys are read, and zeros stand in empty slots: in the product with the values,
    0·NaN would carry a neighbour's NaN into the output."""
    key_base, key_token_stride, value_base, value_token_stride = sources
    of_tokens = (attended & (packed < tokens))[:, None] & inside[None, :]
    token_rows = packed[:, None].to(tl.int64)
    keys = tl.load(key_base + token_rows * key_token_stride + channels[None, :], mask=of_tokens, other=0.0)
    values = tl.load(value_base + token_rows * value_token_stride + channels[None, :], mask=of_tokens, other=0.0)
    if summary_sources is not None:
        summary_key_base, summary_value_base, row_stride = summary_sources
        of_summaries = (packed >= tokens)[:, None] & inside[None, :]
        offsets = (packed - tokens)[:, None].to(tl.int64) * row_stride + channels[None, :]
        # Where one load reads, the other gives zeros.
        keys += tl.load(summary_key_base + offsets, mask=of_summaries, other=0.0)
        values += tl.load(summary_value_base + offsets, mask=of_summaries, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") + bias[None, :]
    return accumulate(scores, scale, values, accumulator, total, highest)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "heads",
        "summaries",
        "text_start",
        "text_stop",
        "tile_count",
        "leading_tiles",
        "leading_programs",
        "chosen_slots",
    ]
)
def span_attention_kernel(
    query,  # [B, N, H, D] by its strides; the last is 1
    key,
    value,
    output,  # [B, N, H, D] contiguous
    query_blocks,  # tensor descriptors [B·N, H·D], blocks [BLOCK_M or BLOCK_N, D]; None: full tiles by pointers
    key_blocks,
    value_blocks,
    summary_key,  # [B, R, H, D] contiguous; None without far field
    summary_value,
    summary_key_blocks,  # tensor descriptors [B·R, H·D], blocks [BLOCK_N, D], or None
    summary_value_blocks,
    summary_bias,  # [R] fp32: log of the tokens that a row stands for, divided by the scale of the scores
    text_valid,  # [B] int32: valid text tokens; None where all are
    class_of_head,  # [H] int32: which T query tiles a head takes; None where all take the same
    query_tiles,  # [C·T, 6] int32, see TileLists
    key_tiles,  # [n + 1] int32
    packed_rows,  # [P, BLOCK_TAIL] int32
    packed_bias,  # [P, BLOCK_TAIL] fp32: as summary_bias; 0 for tokens, -inf in empty slots
    chosen_tiles,  # [C·T, 2] int32, see TileLists; None where nothing is chosen by content
    chosen_rows,  # [B, H, chosen_slots] int32: as packed_rows; or None
    query_batch_stride,
    query_token_stride,
    query_head_stride,
    key_batch_stride,
    key_token_stride,
    key_head_stride,
    value_batch_stride,
    value_token_stride,
    value_head_stride,
    row_stride,  # H·D: from token to token in the contiguous tensors, output and summaries
    tokens,  # N
    heads,  # H
    summaries,  # R
    text_start,
    text_stop,
    tile_count,  # T
    leading_tiles,  # text tiles at the front
    leading_programs,  # leading_tiles · B · H
    chosen_slots,  # of all tiles of one head; or None
    scale,  # factor on the scores, times log2(e)
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # next power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Text tiles of every head come first: each is as long as the sequence, and started last they would be a long tail.
    # Then head by head in order of position, so that programs that run together share keys in L2.
    program = tl.program_id(0)
    if program < leading_programs:
        batch_head = program // leading_tiles
        tile = program % leading_tiles
    else:
        image_tiles = tile_count - leading_tiles
        batch_head = (program - leading_programs) // image_tiles
        tile = leading_tiles + (program - leading_programs) % image_tiles
    # Offsets of whole tensors may exceed 32 bits.
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)

    if class_of_head is not None:
        tile += tl.load(class_of_head + head) * tile_count
    entry = query_tiles + tile * 6
    first_query = tl.load(entry)
    query_count = tl.load(entry + 1)
    list_begin = tl.load(entry + 2)
    full_end = tl.load(entry + 3)
    full_summary_end = tl.load(entry + 4)
    list_end = tl.load(entry + 5)

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, PADDED_DIM)
    inside = channels < HEAD_DIM
    EVERY_CHANNEL: tl.constexpr = HEAD_DIM == PADDED_DIM
    query_rows = (first_query + rows).to(tl.int64)
    stored = (rows < query_count)[:, None] & inside[None, :]
    key_base = key + batch * key_batch_stride + head * key_head_stride
    value_base = value + batch * value_batch_stride + head * value_head_stride

    if query_blocks is not None:
        batch_row = (batch * tokens).to(tl.int32)
        head_column = (head * HEAD_DIM).to(tl.int32)
        # Rows past the tile's end are other queries: computed and not stored.
        queries = query_blocks.load([batch_row + first_query, head_column])
    else:
        query_base = query + batch * query_batch_stride + head * query_head_stride
        query_pointers = query_base + query_rows[:, None] * query_token_stride + channels[None, :]
        queries = tl.load(query_pointers, mask=stored, other=0.0)

    accumulator = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)

    # Full tiles of tokens. The next tile's position is read one step ahead: a load that first waited for its own
    # position would be late.
    key_offsets = columns[:, None].to(tl.int64) * key_token_stride + channels[None, :]
    value_offsets = columns[:, None].to(tl.int64) * value_token_stride + channels[None, :]
    next_key = tl.load(key_tiles + list_begin)
    for index in tl.range(list_begin, full_end, num_stages=STAGES):
        first_key = next_key
        next_key = tl.load(key_tiles + index + 1)
        if key_blocks is not None:
            keys = key_blocks.load([batch_row + first_key, head_column])
            values = value_blocks.load([batch_row + first_key, head_column])
        else:
            keys = _load(key_base + first_key.to(tl.int64) * key_token_stride + key_offsets, inside, EVERY_CHANNEL)
            values = _load(
                value_base + first_key.to(tl.int64) * value_token_stride + value_offsets, inside, EVERY_CHANNEL
            )
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        accumulator, total, highest = accumulate(scores, scale, values, accumulator, total, highest)

    # Full tiles of summaries. The mean key of c tokens stands for all of them, so log c is added to its score.
    if summary_key is not None:
        summary_key_base = summary_key + batch * summaries * row_stride + head * HEAD_DIM
        summary_value_base = summary_value + batch * summaries * row_stride + head * HEAD_DIM
        summary_offsets = columns[:, None].to(tl.int64) * row_stride + channels[None, :]
        summary_row = (batch * summaries).to(tl.int32)
        next_key = tl.load(key_tiles + full_end)
        for index in tl.range(full_end, full_summary_end, num_stages=STAGES):
            first_key = next_key
            next_key = tl.load(key_tiles + index + 1)
            if summary_key_blocks is not None:
                keys = summary_key_blocks.load([summary_row + first_key, head_column])
                values = summary_value_blocks.load([summary_row + first_key, head_column])
            else:
                start = first_key.to(tl.int64) * row_stride
                keys = _load(summary_key_base + start + summary_offsets, inside, EVERY_CHANNEL)
                values = _load(summary_value_base + start + summary_offsets, inside, EVERY_CHANNEL)
            bias = tl.load(summary_bias + first_key + columns)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") + bias[None, :]
            accumulator, total, highest = accumulate(scores, scale, values, accumulator, total, highest)

    sources = (key_base, key_token_stride, value_base, value_token_stride)
    summary_sources = None
    if summary_key is not None:
        summary_sources = (summary_key_base, summary_value_base, row_stride)

    # Packed tiles, all text among them where it may be padded.
    tail = tl.arange(0, BLOCK_TAIL)
    for index in tl.range(full_summary_end, list_end, num_stages=STAGES):
        slots = tl.load(key_tiles + index) * BLOCK_TAIL + tail
        packed = tl.load(packed_rows + slots)
        bias = tl.load(packed_bias + slots)
        attended = packed >= 0
        if text_valid is not None:
            padding = (packed >= text_start + tl.load(text_valid + batch)) & (packed < text_stop)
            attended = attended & (padding == 0)
            bias = tl.where(attended, bias, float("-inf"))
        accumulator, total, highest = _attend_packed(
            packed, attended, bias, queries, scale, sources, summary_sources, tokens, channels, inside,
            accumulator, total, highest,
        )  # fmt: skip

    # Chosen tiles, which hold no text.
    if chosen_rows is not None:
        chosen_base = chosen_rows + (batch * heads + head) * chosen_slots
        for index in tl.range(
            tl.load(chosen_tiles + tile * 2), tl.load(chosen_tiles + tile * 2 + 1), num_stages=STAGES
        ):
            packed = tl.load(chosen_base + index * BLOCK_TAIL + tail)
            bias = tl.load(summary_bias + packed - tokens, mask=packed >= tokens, other=0.0)
            bias = tl.where(packed >= 0, bias, float("-inf"))
            accumulator, total, highest = _attend_packed(
                packed, packed >= 0, bias, queries, scale, sources, summary_sources, tokens, channels, inside,
                accumulator, total, highest,
            )  # fmt: skip

    # Stored by masked pointers: a whole block would overwrite the queries of the next tile.
    output_base = output + batch * tokens * row_stride + head * HEAD_DIM
    # A query without any key has a total of nothing, and zeros come out.
    result = accumulator * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    output_pointers = output_base + query_rows[:, None] * row_stride + channels[None, :]
    tl.store(output_pointers, result.to(output.dtype.element_ty), mask=stored)
