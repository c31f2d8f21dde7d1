"""The span attention kernel for Hopper and Blackwell (compute capabilities 9.0 and 10), in Gluon: device code only.

A program stays on its multiprocessor and takes work items, one tile of queries of one head each, from a counter that
all programs share. Groups of warps play the roles:

- the *producer* (`gluon_producer`) takes an item, loads its queries and then its tiles of keys and values into rings
  of slots in shared memory: full tiles by the tensor memory accelerator, packed tiles row by row. It runs ahead as far
  as the rings have room, into the next item too;
- two *consumers* attend with half of the queries each: on Hopper they multiply matrices themselves
  (`hopper_consumer`), on Blackwell a role of one warp does so for both (`blackwell_roles`).

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
from triton.experimental.gluon.language.nvidia.blackwell import TensorMemoryLayout, allocate_tensor_memory
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from grat_kernels.blackwell_roles import MULTIPLIER_WARPS, attend, multiply
from grat_kernels.gluon_producer import produce
from grat_kernels.gluon_work import CONSUMER_WARPS, CONSUMERS, FIELDS
from grat_kernels.hopper_consumer import consume

# Of the 64 K registers of a multiprocessor, the consumers get most: on Hopper 3 · 128 threads start with 168 each, and
# the producer keeps 40, what FlashAttention-3 gives to one that copies rows itself; on Blackwell 4 · 128 threads start
# with 128 each, the warp that multiplies, with three idle ones, keeps 40, and the producer 56.
HOPPER_REGISTERS = gl.constexpr(232)
BLACKWELL_REGISTERS = gl.constexpr(208)
MULTIPLIER_REGISTERS = gl.constexpr(40)


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
    TENSOR_MEMORY: gl.constexpr,  # whether matrix products lie there: on Blackwell, not on Hopper
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
    # Products of the one warp that multiplies are known to have ended by a single arrival.
    READERS: gl.constexpr = 1 if TENSOR_MEMORY else CONSUMERS
    _start_barriers(key_full, 1)
    _start_barriers(key_empty, READERS)
    _start_barriers(value_full, 1)
    _start_barriers(value_empty, READERS)
    # Every reader of a work item says that it is done, the one that multiplies too.
    _start_barriers(query_full, 1)
    _start_barriers(query_empty, CONSUMERS + 1 if TENSOR_MEMORY else CONSUMERS)

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
    produced = (blocks, sources, producer_lists, producer_sizes, counter, rings, queries_ring)
    if TENSOR_MEMORY:
        ROWS: gl.constexpr = TensorMemoryLayout([HALF, BLOCK_N], col_stride=1)
        scores_memory = allocate_tensor_memory(gl.float32, [CONSUMERS, HALF, BLOCK_N], ROWS)
        OUTPUT: gl.constexpr = TensorMemoryLayout([HALF, HEAD_DIM], col_stride=1)
        output_memory = allocate_tensor_memory(gl.float32, [CONSUMERS, HALF, HEAD_DIM], OUTPUT)
        scores_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
        weights_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
        output_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
        _start_barriers(scores_ready, 1)
        _start_barriers(weights_ready, 1)
        _start_barriers(output_ready, 1)
        fence_async_shared()
        memory = (scores_memory, output_memory)
        ready = (scores_ready, weights_ready, output_ready)
        gl.warp_specialize(
            [
                (produce, produced),
                (attend, (output, biases, lists, sizes, scale, queries_ring, memory, ready, 0)),
                (attend, (output, biases, lists, sizes, scale, queries_ring, memory, ready, 1)),
                (multiply, (rings, queries_ring, memory, ready)),
            ],
            [CONSUMER_WARPS, CONSUMER_WARPS, MULTIPLIER_WARPS],
            [BLACKWELL_REGISTERS, BLACKWELL_REGISTERS, MULTIPLIER_REGISTERS],
        )
    else:
        turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
        _start_barriers(turns, 1)
        # The first turn is the first consumer's.
        mbarrier.arrive(turns.index(0), count=1)
        fence_async_shared()
        gl.warp_specialize(
            [
                (produce, produced),
                (consume, (output, biases, lists, sizes, scale, rings, queries_ring, turns, 0)),
                (consume, (output, biases, lists, sizes, scale, rings, queries_ring, turns, 1)),
            ],
            [CONSUMER_WARPS, CONSUMER_WARPS],
            [HOPPER_REGISTERS, HOPPER_REGISTERS],
        )


@gluon.jit
def _start_barriers(barriers, ARRIVALS: gl.constexpr):
    """Initialises barriers, each of whose phases ends after so many arrivals."""
    COUNT: gl.constexpr = barriers.shape[0]
    for number in gl.static_range(COUNT):
        mbarrier.init(barriers.index(number), count=ARRIVALS)
