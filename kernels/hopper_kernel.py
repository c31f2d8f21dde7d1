"""The span attention kernel for Hopper (compute capability 9.0), in Gluon: device code only.

A program stays on its multiprocessor and takes work items, one tile of queries of one head each, from a counter that
all programs share. Three groups of warps play three roles:

- the *producer* (`hopper_producer`) takes an item, loads its queries and then its tiles of keys and values into rings
  of slots in shared memory: full tiles by the tensor memory accelerator, packed tiles row by row. It runs ahead as far
  as the rings have room, into the next item too;
- two *consumers* (`hopper_consumer`) compute half of the queries each. The scores of tile i + 1 and the weighted values
  of tile i are multiplied at the same time, the softmax between them runs under the matrix products, and the two take
  turns in starting their products, so that one computes its softmax while the other multiplies (FlashAttention-3, arXiv
  2407.08608, sections 3.1 and 3.2). So it goes on from the last tile of an item to the first one of the next.

Each ring slot has a barrier that says it is full and one that says it is empty. A slot's n-th use, counted from 0,
waits for the parity n & 1 of its *full* barrier, and its refill for the opposite parity of its *empty* barrier: of a
fresh barrier, the phase before the first one counts as complete.
"""

# What is `constexpr` to Gluon's compiler is no Python object of that type.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from grat_kernels.hopper_consumer import consume
from grat_kernels.hopper_producer import produce
from grat_kernels.hopper_work import CONSUMER_WARPS, CONSUMERS, FIELDS

# A register file of 64 K serves 3 · 128 threads with 168 registers each; the producer hands most of its own to the
# consumers and keeps 40. These are what FlashAttention-3 gives to a producer that copies rows itself.
CONSUMER_REGISTERS = gl.constexpr(232)


@gluon.jit(
    do_not_specialize=[
        "key_vectors",
        "value_vectors",
        "tokens",
        "heads",
        "summaries",
        "text_start",
        "text_stop",
        "tiles",
        "leading_tiles",
        "leading_items",
        "items",
    ]
)
def span_attention_kernel(
    query_blocks,  # tensor descriptors [B·N, H·D], blocks [BLOCK_M / CONSUMERS or BLOCK_N, D]
    key_blocks,
    value_blocks,
    summary_key_blocks,  # tensor descriptors [B·R, H·D], blocks [BLOCK_N, D]; None without far field
    summary_value_blocks,
    key,  # what the descriptors read, by pointers
    value,
    summary_key,  # [B, R, H, D] contiguous, or None
    summary_value,
    output,  # [B, N, H, D] contiguous
    summary_bias,  # [R] fp32: log of the tokens that a row stands for, divided by the scale; None without far field
    packed_rows,  # [P, BLOCK_N] int32: position, N + summary row, or -1; None where no tile is packed
    packed_bias,  # [P, BLOCK_N] fp32
    packed_runs,  # [P] int32: first token of a tile of tokens one after another, or -1; None where no text is padded
    text_valid,  # [B] int32: valid text tokens; None where all are
    query_tiles,  # [C·T, 6] int32, see TileLists
    key_tiles,  # [n + 1] int32
    class_of_head,  # [H] int32, or None where all heads are of one class
    counter,  # [1] int32, zero: work items taken
    key_vectors,  # from token to token, in units of VECTOR elements
    value_vectors,
    tokens,  # N
    heads,  # H
    summaries,  # R
    text_start,
    text_stop,
    tiles,  # T
    leading_tiles,  # text tiles at the front of the list of a class
    leading_items,  # leading_tiles · B · H
    items,  # T · B · H
    scale,  # factor on the scores, times log2(e)
    QUERY_STAGES: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
):
    HALF: gl.constexpr = query_blocks.block_shape[0]
    BLOCK_N: gl.constexpr = key_blocks.block_shape[0]
    HEAD_DIM: gl.constexpr = key_blocks.block_shape[1]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    query_slots = gl.allocate_shared_memory(
        query_blocks.dtype, [QUERY_STAGES * CONSUMERS, HALF, HEAD_DIM], query_blocks.layout
    )
    key_slots = gl.allocate_shared_memory(key_blocks.dtype, [KEY_STAGES, BLOCK_N, HEAD_DIM], key_blocks.layout)
    value_slots = gl.allocate_shared_memory(value_blocks.dtype, [VALUE_STAGES, BLOCK_N, HEAD_DIM], value_blocks.layout)
    work_slots = gl.allocate_shared_memory(gl.int32, [QUERY_STAGES * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    query_full = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], BARRIER)
    query_empty = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], BARRIER)
    key_full = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], BARRIER)
    key_empty = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], BARRIER)
    value_full = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], BARRIER)
    value_empty = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    _start_ring(query_full, query_empty)
    _start_ring(key_full, key_empty)
    _start_ring(value_full, value_empty)
    for which in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(which), count=1)
    # The first turn is the first consumer's.
    mbarrier.arrive(turns.index(0), count=1)
    fence_async_shared()

    text = (text_start, text_stop)
    rings = ((key_slots, key_full, key_empty), (value_slots, value_full, value_empty))
    queries_ring = (query_slots, work_slots, query_full, query_empty)
    blocks = (query_blocks, key_blocks, value_blocks, summary_key_blocks, summary_value_blocks)
    sources = (key, value, summary_key, summary_value, key_vectors, value_vectors)
    producer_lists = (query_tiles, key_tiles, class_of_head, packed_rows, packed_runs, text_valid)
    producer_sizes = (tokens, heads, summaries, text, tiles, (leading_items, leading_tiles), items)
    biases = (summary_bias, packed_bias)
    lists = (key_tiles, packed_rows, text_valid)
    sizes = (heads, text_stop)
    gl.warp_specialize(
        [
            (produce, (blocks, sources, producer_lists, producer_sizes, counter, rings, queries_ring)),
            (consume, (output, biases, lists, sizes, scale, rings, queries_ring, turns, 0)),
            (consume, (output, biases, lists, sizes, scale, rings, queries_ring, turns, 1)),
        ],
        [CONSUMER_WARPS, CONSUMER_WARPS],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )


@gluon.jit
def _start_ring(full, empty):
    """Initialises the barriers of a ring: one filler, and every consumer as a reader."""
    STAGES: gl.constexpr = full.shape[0]
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
