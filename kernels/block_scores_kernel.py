"""Scores of the blocks that query groups choose from, in Triton; what they are stands in `choosing`.

One program takes some blocks of one head, makes the products of the values within each once, and then goes through all
groups. The means within its blocks are the columns of its matrices: the quadratic form of a block is its part of a
product with the matrix that holds the products of each block on its diagonal.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A block of nothing but zeros has a logarithm.
TINY = tl.constexpr(1e-30)


@triton.jit
def _products(queries, keys):
    """`queries` [M, D] fp32 times `keys` [N, D], as exact as fp32.

    With keys of 16 bits on tensor cores: what a part in 16 bits leaves of the queries is the next part, and three hold
    all the bits.
    """
    transposed = tl.trans(keys)
    if keys.dtype == tl.float32:
        return tl.dot(queries, transposed, input_precision="ieee")
    first = queries.to(keys.dtype)
    rest = queries - first.to(tl.float32)
    second = rest.to(keys.dtype)
    third = (rest - second.to(tl.float32)).to(keys.dtype)
    return tl.dot(first, transposed, tl.dot(second, transposed, tl.dot(third, transposed)))


@triton.jit(do_not_specialize=["heads", "groups", "blocks", "first_row"])
def block_scores_kernel(
    queries,  # [B, H, G, D] fp32 by its strides; the last is 1: mean queries of the groups
    summary_key,  # [B, R, H, D] by its strides; the last is 1
    summary_value,
    rows,  # [blocks, MEANS] int32: summary row of each mean within a block, or -1
    log_counts,  # [blocks, MEANS] fp32: log of its tokens, -inf where there is none
    shares,  # [blocks, MEANS] fp32: its tokens over those of the block
    of_list,  # [lists, blocks] uint8: whether groups with a span list choose from a block
    list_of_group,  # [G] int32
    scores,  # [B, H, G, blocks] fp32
    query_batch_stride,
    query_head_stride,
    query_group_stride,
    key_batch_stride,
    key_row_stride,
    key_head_stride,
    value_batch_stride,
    value_row_stride,
    value_head_stride,
    heads,  # H
    groups,  # G
    blocks,
    first_row,  # of the blocks' own means among the summaries
    scale,  # factor on the scores
    spread_within,
    spread_least,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # next power of two
    GROUPS: tl.constexpr,  # of a tile
    BLOCKS: tl.constexpr,  # of a program
    MEANS: tl.constexpr,  # most of a block, a power of two
):
    # Programs of one head run together and share its queries in L2.
    tiles = tl.cdiv(blocks, BLOCKS)
    batch_head = tl.program_id(0) // tiles
    first_block = tl.program_id(0) % tiles * BLOCKS
    # Offsets of whole tensors may exceed 32 bits.
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    COLUMNS: tl.constexpr = BLOCKS * MEANS
    columns = tl.arange(0, COLUMNS)
    channels = tl.arange(0, PADDED_DIM)
    inside = (channels < HEAD_DIM)[None, :]

    block = first_block + columns // MEANS
    known = block < blocks
    slots = block * MEANS + columns % MEANS
    row = tl.load(rows + slots, mask=known, other=-1)
    present = row >= 0
    # Past the last block everything is finite, and not stored.
    log_count = tl.load(log_counts + slots, mask=known, other=0.0)
    share = tl.load(shares + slots, mask=known, other=0.0)

    key_base = summary_key + batch * key_batch_stride + head * key_head_stride
    value_base = summary_value + batch * value_batch_stride + head * value_head_stride
    key_offsets = row[:, None].to(tl.int64) * key_row_stride + channels[None, :]
    value_offsets = row[:, None].to(tl.int64) * value_row_stride + channels[None, :]
    own_offsets = (first_row + block)[:, None].to(tl.int64) * value_row_stride + channels[None, :]
    keys = tl.load(key_base + key_offsets, mask=present[:, None] & inside, other=0.0)
    values = tl.load(value_base + value_offsets, mask=present[:, None] & inside, other=0.0).to(tl.float32)
    own = tl.load(value_base + own_offsets, mask=known[:, None] & inside, other=0.0).to(tl.float32)

    # Weights sum to 0, so values may be told from their mean.
    apart = tl.where(present[:, None], values - own, 0.0)
    same_block = (columns // MEANS)[:, None] == (columns // MEANS)[None, :]
    products = tl.where(same_block, tl.dot(apart, tl.trans(apart), input_precision="ieee"), 0.0)
    variance = tl.sum(tl.reshape(tl.sum(apart * apart, 1) * share, [BLOCKS, MEANS]), 1)
    # Every column of a block has its mean.
    norm = tl.sqrt(tl.max(tl.reshape(tl.sum(own * own, 1), [BLOCKS, MEANS]), 1))
    least = spread_within * tl.sqrt(variance) + spread_least * norm

    query_base = queries + batch * query_batch_stride + head * query_head_stride
    score_base = scores + (batch * heads + head) * groups * blocks
    tile_blocks = first_block + tl.arange(0, BLOCKS)
    for first_group in range(0, groups, GROUPS):
        group = first_group + tl.arange(0, GROUPS)
        pointers = query_base + group[:, None].to(tl.int64) * query_group_stride + channels[None, :]
        query = tl.load(pointers, mask=(group < groups)[:, None] & inside, other=0.0)
        inner = _products(query, keys) * scale + log_count[None, :]
        inner = tl.reshape(inner, [GROUPS, BLOCKS, MEANS])
        highest = tl.max(inner, 2)
        weights = tl.exp(inner - highest[:, :, None])
        total = tl.sum(weights, 2)
        looked = weights / total[:, :, None] - tl.reshape(share, [1, BLOCKS, MEANS])
        looked = tl.reshape(looked, [GROUPS, COLUMNS])
        form = tl.dot(looked, products, input_precision="ieee") * looked
        form = tl.sum(tl.reshape(form, [GROUPS, BLOCKS, MEANS]), 2)
        spread = tl.sqrt(tl.maximum(form, 0.0)) + least[None, :]
        result = highest + tl.log(total) + tl.log(tl.maximum(spread, TINY))

        stored = (group < groups)[:, None] & (tile_blocks < blocks)[None, :]
        span_list = tl.load(list_of_group + group, mask=group < groups, other=0)
        offered = tl.load(of_list + span_list[:, None] * blocks + tile_blocks[None, :], mask=stored, other=0)
        result = tl.where(offered != 0, result, float("-inf"))
        tl.store(score_base + group[:, None] * blocks + tile_blocks[None, :], result, mask=stored)
