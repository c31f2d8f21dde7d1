"""The consumers of the Gluon kernel on Hopper: matrix products, softmax and output. Device code only.

The scores of tile i + 1 and the weighted values of tile i are multiplied at the same time, the softmax between them
runs under the matrix products, and the two consumers take turns in starting their products, so that one computes its
softmax while the other multiplies (FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2). So it goes on from the
last tile of an item to the first one of the next.
"""

# What is `constexpr` to Gluon's compiler is no Python object of that type.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from grat_kernels.gluon_softmax import LOWEST, bias_of, raised
from grat_kernels.gluon_work import CONSUMER_WARPS, CONSUMERS, read_work, store_queries

# A negative total is impossible, so this stores nothing. But the assembler cannot know, and may not move a wait for
# the matrix products across it: without it, ptxas hoists the wait above the softmax, and the overlap is lost.
PIN = gl.constexpr(
    "{ .reg .pred never; .reg .b32 address; mov.b32 address, 0; setp.eq.f32 never, $1, 0fC0400000; "
    "@never st.volatile.shared.f32 [address], $1; mov.b32 $0, $1; }"
)

# Multiplies elements of the output by the decay of their row, unless no row of the warp decays. In assembly, because
# Gluon branches on what all warps agree on, and to agree costs them two meetings a tile. What a thread holds of a
# product are two elements of one row, two of another, two of the first and so on (PTX ISA, wgmma, "Matrix fragments
# for wgmma.mma_async.m64nNk16", D).
_PACK = 32
PACK = gl.constexpr(_PACK)
RESCALE = gl.constexpr(
    "{ .reg .pred decays; "
    f"setp.neu.f32 decays, ${2 * _PACK}, 0f3F800000; "
    f"setp.neu.or.f32 decays, ${2 * _PACK + 2}, 0f3F800000, decays; "
    "vote.sync.any.pred decays, decays, 0xffffffff; "
    "@!decays bra.uni KEPT; "
    + "".join(f"mul.f32 ${element}, ${element}, ${2 * _PACK + element}; " for element in range(_PACK))
    + "KEPT: }"
)
RESCALE_OPERANDS = gl.constexpr(",".join(["=f"] * _PACK + [str(element) for element in range(_PACK)] + ["f"] * _PACK))


@gluon.jit
def _first_bias(bounds, columns, padding, biases, lists, BLOCK_N: gl.constexpr):
    """What is added to the scores of an item's first tile, whatever it holds."""
    key_tiles, _packed_rows, _text_valid = lists
    begin, _full_end, _full_summary_end, _end = bounds
    return bias_of(begin, gl.load(key_tiles + begin), columns, bounds, padding, biases, lists, BLOCK_N)


@gluon.jit
def _softmax(scores, scale, total, highest):
    """One step of the online softmax in base 2, exp2 being one instruction; `scale` holds log2(e)."""
    highest_now = raised(highest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - highest_now[:, None])
    decay = gl.exp2(highest - highest_now)
    total = total * decay + gl.sum(weights, 1)
    total = gl.inline_asm_elementwise(PIN, "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1)
    return weights, decay, total, highest_now


@gluon.jit
def _overlap(queries, weights, accumulator, total, highest, bias, scale, rings, turns, step, WHICH: gl.constexpr):
    """Scores of tile `step + 1` for some queries and weighted values of tile `step`, multiplied together, with the
    softmax under the second product. `bias` is None where there is none."""
    key_ring, value_ring = rings
    key_slots, key_full, key_empty = key_ring
    value_slots, value_full, value_empty = value_ring
    KEY_STAGES: gl.constexpr = key_slots.shape[0]
    VALUE_STAGES: gl.constexpr = value_slots.shape[0]
    HALF: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = key_slots.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, BLOCK_N, 16])
    key_slot = (step + 1) % KEY_STAGES
    value_slot = step % VALUE_STAGES
    nothing = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)

    mbarrier.wait(key_full.index(key_slot), ((step + 1) // KEY_STAGES) & 1)
    mbarrier.wait(turns.index(WHICH), step & 1)
    pending_scores = warpgroup_mma(
        queries, key_slots.index(key_slot).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    mbarrier.wait(value_full.index(value_slot), (step // VALUE_STAGES) & 1)
    pending_output = warpgroup_mma(weights, value_slots.index(value_slot), accumulator, is_async=True)
    mbarrier.arrive(turns.index(1 - WHICH), count=1)

    scores = warpgroup_mma_wait(num_outstanding=1, deps=(pending_scores,))
    mbarrier.arrive(key_empty.index(key_slot), count=1)
    if bias is not None:
        scores = scores + gl.convert_layout(bias, gl.SliceLayout(0, SCORES))[None, :]
    next_weights, decay, total, highest = _softmax(scores, scale, total, highest)
    next_weights = gl.convert_layout(next_weights.to(weights.dtype), weights.type.layout)
    # Waiting for the softmax's results as well keeps it before the wait.
    accumulator, next_weights, decay, total = warpgroup_mma_wait(
        num_outstanding=0, deps=(pending_output, next_weights, decay, total)
    )
    mbarrier.arrive(value_empty.index(value_slot), count=1)
    return next_weights, accumulator, decay, total, highest


@gluon.jit
def _advance(queries, weights, accumulator, total, highest, bias, scale, rings, turns, step, WHICH: gl.constexpr):
    """One tile further within an item."""
    weights, accumulator, decay, total, highest = _overlap(
        queries, weights, accumulator, total, highest, bias, scale, rings, turns, step, WHICH
    )
    decay = gl.convert_layout(decay, gl.SliceLayout(1, accumulator.type.layout))[:, None]
    accumulator = gl.inline_asm_elementwise(
        RESCALE, RESCALE_OPERANDS, [accumulator, decay], dtype=gl.float32, is_pure=False, pack=PACK
    )
    return weights, accumulator, total, highest


@gluon.jit
def consume(
    output,
    biases,
    lists,
    sizes,
    scale,
    rings,
    queries_ring,
    turns,
    WHICH: gl.constexpr,
):
    """Attention of half of every tile of queries.

    Work items follow one another without a gap: the first scores of an item are computed together with the last
    weighted values of the one before.
    """
    key_tiles, packed_rows, _text_valid = lists
    heads, text_stop = sizes
    summary_bias, _packed_bias = biases
    query_slots, work_slots, query_full, query_empty = queries_ring
    key_ring, value_ring = rings
    key_slots, key_full, key_empty = key_ring
    value_slots, value_full, value_empty = value_ring
    ELEMENT: gl.constexpr = key_slots.dtype
    QUERY_STAGES: gl.constexpr = query_full.shape[0]
    VALUE_STAGES: gl.constexpr = value_slots.shape[0]
    BLOCK_N: gl.constexpr = key_slots.shape[1]
    HEAD_DIM: gl.constexpr = key_slots.shape[2]
    HALF: gl.constexpr = query_slots.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    COLUMNS: gl.constexpr = gl.BlockedLayout([1], [32], [CONSUMER_WARPS], [0])
    BIASED: gl.constexpr = summary_bias is not None or packed_rows is not None

    columns = gl.arange(0, BLOCK_N, COLUMNS)
    lowest = gl.full([HALF], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    zero = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
    nothing = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    weights = gl.zeros([HALF, BLOCK_N], ELEMENT, WEIGHTS)
    total = zero
    highest = lowest
    step = 0
    taken = 0
    mbarrier.wait(query_full.index(0), 0)
    queries_of_item, bounds, padding_start = read_work(work_slots, 0, CONSUMER_WARPS)
    more = queries_of_item[1] > 0
    if more:
        # The very first tile has no weighted values to go with.
        mbarrier.wait(key_full.index(0), 0)
        queries = query_slots.index(WHICH)
        scores = warpgroup_mma(queries, key_slots.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
        mbarrier.arrive(key_empty.index(0), count=1)
        if BIASED:
            bias = _first_bias(bounds, columns, (padding_start, text_stop), biases, lists, BLOCK_N)
            scores = scores + gl.convert_layout(bias, gl.SliceLayout(0, SCORES))[None, :]
        weights, _decay, total, highest = _softmax(scores, scale, total, highest)
        weights = gl.convert_layout(weights.to(ELEMENT), WEIGHTS)

    while more:
        query_slot = taken % QUERY_STAGES
        _queries_of_item, bounds, padding_start = read_work(work_slots, query_slot, CONSUMER_WARPS)
        padding = (padding_start, text_stop)
        begin, full_end, _full_summary_end, end = bounds
        queries = query_slots.index(query_slot * CONSUMERS + WHICH)
        accumulator = gl.zeros([HALF, HEAD_DIM], gl.float32, OUTPUT)
        # Full tiles of tokens: the bulk of the work, with neither mask nor bias.
        for _ in range(begin + 1, full_end):
            weights, accumulator, total, highest = _advance(
                queries, weights, accumulator, total, highest, None, scale, rings, turns, step, WHICH
            )
            step += 1
        if BIASED:
            first_biased = gl.maximum(full_end, begin + 1)
            next_tile = gl.load(key_tiles + first_biased)
            for index in range(first_biased, end):
                tile = next_tile
                next_tile = gl.load(key_tiles + index + 1)
                bias = bias_of(index, tile, columns, bounds, padding, biases, lists, BLOCK_N)
                weights, accumulator, total, highest = _advance(
                    queries, weights, accumulator, total, highest, bias, scale, rings, turns, step, WHICH
                )
                step += 1

        # Read again: over the loops above, registers are few. Then this slot is not read any more.
        queries_of_item, _bounds, _padding_start = read_work(work_slots, query_slot, CONSUMER_WARPS)
        mbarrier.arrive(query_empty.index(query_slot), count=1)
        taken += 1
        query_slot = taken % QUERY_STAGES
        mbarrier.wait(query_full.index(query_slot), (taken // QUERY_STAGES) & 1)
        queries_of_next, bounds, padding_start = read_work(work_slots, query_slot, CONSUMER_WARPS)
        more = queries_of_next[1] > 0
        item_total = total
        if more:
            bias = None
            if BIASED:
                bias = _first_bias(bounds, columns, (padding_start, text_stop), biases, lists, BLOCK_N)
            queries = query_slots.index(query_slot * CONSUMERS + WHICH)
            weights, accumulator, _decay, total, highest = _overlap(
                queries, weights, accumulator, zero, lowest, bias, scale, rings, turns, step, WHICH
            )
        else:
            slot = step % VALUE_STAGES
            mbarrier.wait(value_full.index(slot), (step // VALUE_STAGES) & 1)
            pending_output = warpgroup_mma(weights, value_slots.index(slot), accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(num_outstanding=0, deps=(pending_output,))
            mbarrier.arrive(value_empty.index(slot), count=1)
        step += 1

        store_queries(output, queries_of_item, heads, accumulator, item_total, WHICH)
