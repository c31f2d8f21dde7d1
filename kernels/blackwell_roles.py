"""The roles of the Gluon kernel on Blackwell beside the producer: matrix products, and softmax with output.

Device code only. Matrix products lie in tensor memory, and one warp starts them for both consumers: weighted values of
tile i for the first and its scores of tile i + 1, then the same for the second. So the tensor cores work for one
consumer while the other computes its softmax (FlashAttention-4). Scores and the weights that become of them share the
same columns: products that one thread has started are computed in order, so the scores of a tile are written after the
weights of the one before were read.

A consumer tells that its weights lie there after it has read the scores and, where its maximum has risen much, has
rescaled the output. That of an item it stores before its first weights of the next one, whose products start afresh.
"""

# What is `constexpr` to Gluon's compiler is no Python object of that type.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    get_tmem_reg_layout,
    tcgen05_commit,
    tcgen05_mma,
)
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from grat_kernels.gluon_softmax import LOWEST, bias_of, raised
from grat_kernels.gluon_work import CONSUMER_WARPS, CONSUMERS, read_work, store_queries

MULTIPLIER_WARPS = gl.constexpr(1)
# Parts of a tile's columns that a consumer takes one after another.
CHUNKS = gl.constexpr(4)


@gluon.jit
def _weights_within(scores, ELEMENT: gl.constexpr):
    """Where the weights of some scores in tensor memory lie."""
    LAYOUT: gl.constexpr = TensorMemoryLayout([scores.shape[0], scores.shape[1]], col_stride=1)
    return scores._reinterpret(ELEMENT, [scores.shape[0], scores.shape[1]], LAYOUT)


@gluon.jit
def _start_scores(queries_ring, query_slot, key_ring, memory, ready, step, WHICH: gl.constexpr):
    """Starts the scores of a tile for one consumer; those for the last one release the keys."""
    query_slots, _work_slots, _query_full, _query_empty = queries_ring
    key_slots, _key_full, key_empty = key_ring
    scores_memory, _output_memory = memory
    scores_ready, _weights_ready, _output_ready = ready
    KEY_STAGES: gl.constexpr = key_slots.shape[0]
    slot = step % KEY_STAGES
    queries = query_slots.index(query_slot * CONSUMERS + WHICH)
    keys = key_slots.index(slot).permute((1, 0))
    tcgen05_mma(queries, keys, scores_memory.index(WHICH), use_acc=False, mbarriers=[scores_ready.index(WHICH)])
    if WHICH == CONSUMERS - 1:
        tcgen05_commit(key_empty.index(slot))


@gluon.jit
def _start_output(value_ring, memory, ready, step, goes_on, WHICH: gl.constexpr):
    """Starts the weighted values of a tile for one consumer, once its weights are there; adds them to those of the
    item's tiles before where it goes on. Those for the last consumer release the values."""
    value_slots, _value_full, value_empty = value_ring
    scores_memory, output_memory = memory
    _scores_ready, weights_ready, _output_ready = ready
    VALUE_STAGES: gl.constexpr = value_slots.shape[0]
    slot = step % VALUE_STAGES
    mbarrier.wait(weights_ready.index(WHICH), step & 1)
    weights = _weights_within(scores_memory.index(WHICH), value_slots.dtype)
    tcgen05_mma(weights, value_slots.index(slot), output_memory.index(WHICH), use_acc=goes_on, mbarriers=[])
    if WHICH == CONSUMERS - 1:
        tcgen05_commit(value_empty.index(slot))


@gluon.jit
def multiply(rings, queries_ring, memory, ready):
    """Starts the matrix products of all work items, in order."""
    _query_slots, work_slots, query_full, query_empty = queries_ring
    key_ring, value_ring = rings
    key_slots, key_full, _key_empty = key_ring
    value_slots, value_full, _value_empty = value_ring
    _scores_ready, _weights_ready, output_ready = ready
    QUERY_STAGES: gl.constexpr = query_full.shape[0]
    KEY_STAGES: gl.constexpr = key_slots.shape[0]
    VALUE_STAGES: gl.constexpr = value_slots.shape[0]
    step = 0
    taken = 0
    mbarrier.wait(query_full.index(0), 0)
    queries_of_item, bounds, _padding_start = read_work(work_slots, 0, MULTIPLIER_WARPS)
    while queries_of_item[1] > 0:
        begin, _full_end, _full_summary_end, end = bounds
        query_slot = taken % QUERY_STAGES
        mbarrier.wait(key_full.index(step % KEY_STAGES), (step // KEY_STAGES) & 1)
        for which in gl.static_range(CONSUMERS):
            _start_scores(queries_ring, query_slot, key_ring, memory, ready, step, which)
        for index in range(begin + 1, end):
            mbarrier.wait(value_full.index(step % VALUE_STAGES), (step // VALUE_STAGES) & 1)
            mbarrier.wait(key_full.index((step + 1) % KEY_STAGES), ((step + 1) // KEY_STAGES) & 1)
            for which in gl.static_range(CONSUMERS):
                _start_output(value_ring, memory, ready, step, index > begin + 1, which)
                _start_scores(queries_ring, query_slot, key_ring, memory, ready, step + 1, which)
            step += 1
        # Once the scores of its last tile are there, nothing reads the item's queries any more.
        tcgen05_commit(query_empty.index(query_slot))
        mbarrier.wait(value_full.index(step % VALUE_STAGES), (step // VALUE_STAGES) & 1)
        for which in gl.static_range(CONSUMERS):
            _start_output(value_ring, memory, ready, step, end > begin + 1, which)
            tcgen05_commit(output_ready.index(which))
        step += 1
        taken += 1
        query_slot = taken % QUERY_STAGES
        mbarrier.wait(query_full.index(query_slot), (taken // QUERY_STAGES) & 1)
        queries_of_item, bounds, _padding_start = read_work(work_slots, query_slot, MULTIPLIER_WARPS)


@gluon.jit
def _attend_tile(
    memory, ready, tile, scale, total, highest, step, BIASED: gl.constexpr, ELEMENT: gl.constexpr, WHICH: gl.constexpr
):
    """From the scores of a tile to its weights, in tensor memory, some columns at a time as registers are few.

    `tile` says what its bias is, see `bias_of`, which full tiles of tokens have none of.
    """
    scores_memory, _output_memory = memory
    scores_ready, _weights_ready, _output_ready = ready
    HALF: gl.constexpr = scores_memory.shape[1]
    BLOCK_N: gl.constexpr = scores_memory.shape[2]
    CHUNK: gl.constexpr = BLOCK_N // CHUNKS
    LAYOUT: gl.constexpr = total.type.layout.parent
    place = scores_memory.index(WHICH)
    mbarrier.wait(scores_ready.index(WHICH), step & 1)
    chunks = ()
    reached = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    for number in gl.static_range(CHUNKS):
        scores = place.slice(number * CHUNK, CHUNK).load(LAYOUT)
        if BIASED:
            index, number_of_tile, bounds, padding, biases, lists = tile
            columns = number * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, LAYOUT))
            bias = bias_of(index, number_of_tile, columns, bounds, padding, biases, lists, BLOCK_N)
            scores = scores + bias[None, :]
        reached = gl.maximum(reached, gl.max(scores, 1))
        chunks = chunks + (scores,)  # noqa: RUF005
    highest_now = raised(highest, reached * scale)
    decay = gl.exp2(highest - highest_now)
    total = total * decay
    weights_place = _weights_within(place, ELEMENT)
    for number in gl.static_range(CHUNKS):
        weights = gl.exp2(chunks[number] * scale - highest_now[:, None])
        total += gl.sum(weights, 1)
        weights_place.slice(number * CHUNK, CHUNK).store(weights.to(ELEMENT))
    return decay, total, highest_now


@gluon.jit
def _advance(
    memory, ready, tile, scale, total, highest, step, BIASED: gl.constexpr, ELEMENT: gl.constexpr, WHICH: gl.constexpr
):
    """One tile further within an item."""
    _scores_memory, output_memory = memory
    _scores_ready, weights_ready, _output_ready = ready
    HALF: gl.constexpr = output_memory.shape[1]
    HEAD_DIM: gl.constexpr = output_memory.shape[2]
    OUTPUT: gl.constexpr = get_tmem_reg_layout(gl.float32, [HALF, HEAD_DIM], output_memory.layout, CONSUMER_WARPS)
    decay, total, highest = _attend_tile(memory, ready, tile, scale, total, highest, step, BIASED, ELEMENT, WHICH)
    # Each warp looks at all rows: to agree in a reduction over warps would cost them two more meetings.
    EVERY_WARP: gl.constexpr = gl.BlockedLayout([HALF // 32], [32], [CONSUMER_WARPS], [0])
    # That these scores are there says so of the weighted values of the tile before, too, whose product started earlier.
    if gl.min(gl.convert_layout(decay, EVERY_WARP), 0) < 1.0:
        place = output_memory.index(WHICH)
        accumulator = place.load(OUTPUT)
        place.store(accumulator * gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT))[:, None])
    mbarrier.arrive(weights_ready.index(WHICH), count=1)
    return total, highest


@gluon.jit
def attend(output, biases, lists, sizes, scale, queries_ring, memory, ready, WHICH: gl.constexpr):
    """Attention of half of every tile of queries: softmax, and output."""
    key_tiles, packed_rows, _text_valid = lists
    heads, text_stop = sizes
    summary_bias, _packed_bias = biases
    query_slots, work_slots, query_full, query_empty = queries_ring
    scores_memory, output_memory = memory
    _scores_ready, weights_ready, output_ready = ready
    ELEMENT: gl.constexpr = query_slots.dtype
    QUERY_STAGES: gl.constexpr = query_full.shape[0]
    HALF: gl.constexpr = scores_memory.shape[1]
    HEAD_DIM: gl.constexpr = output_memory.shape[2]
    CHUNK: gl.constexpr = scores_memory.shape[2] // CHUNKS
    CHUNK_ROWS: gl.constexpr = TensorMemoryLayout([HALF, CHUNK], col_stride=1)
    SCORES: gl.constexpr = get_tmem_reg_layout(gl.float32, [HALF, CHUNK], CHUNK_ROWS, CONSUMER_WARPS)
    OUTPUT: gl.constexpr = get_tmem_reg_layout(gl.float32, [HALF, HEAD_DIM], output_memory.layout, CONSUMER_WARPS)
    BIASED: gl.constexpr = summary_bias is not None or packed_rows is not None

    lowest = gl.full([HALF], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    zero = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
    step = 0
    taken = 0
    mbarrier.wait(query_full.index(0), 0)
    queries_of_item, bounds, padding_start = read_work(work_slots, 0, CONSUMER_WARPS)
    while queries_of_item[1] > 0:
        mbarrier.arrive(query_empty.index(taken % QUERY_STAGES), count=1)
        begin, full_end, _full_summary_end, end = bounds
        padding = (padding_start, text_stop)
        # The first tile finds no output to rescale.
        first = (begin, gl.load(key_tiles + begin), bounds, padding, biases, lists)
        _decay, total, highest = _attend_tile(memory, ready, first, scale, zero, lowest, step, BIASED, ELEMENT, WHICH)
        mbarrier.arrive(weights_ready.index(WHICH), count=1)
        step += 1
        # Full tiles of tokens: the bulk of the work, with neither mask nor bias.
        for _ in range(begin + 1, full_end):
            total, highest = _advance(memory, ready, None, scale, total, highest, step, False, ELEMENT, WHICH)
            step += 1
        if BIASED:
            first_biased = gl.maximum(full_end, begin + 1)
            next_tile = gl.load(key_tiles + first_biased)
            for index in range(first_biased, end):
                tile = (index, next_tile, bounds, padding, biases, lists)
                next_tile = gl.load(key_tiles + index + 1)
                total, highest = _advance(memory, ready, tile, scale, total, highest, step, True, ELEMENT, WHICH)
                step += 1

        mbarrier.wait(output_ready.index(WHICH), taken & 1)
        accumulator = output_memory.index(WHICH).load(OUTPUT)
        store_queries(output, queries_of_item, heads, accumulator, total, WHICH)
        taken += 1
        query_slot = taken % QUERY_STAGES
        mbarrier.wait(query_full.index(query_slot), (taken // QUERY_STAGES) & 1)
        queries_of_item, bounds, padding_start = read_work(work_slots, query_slot, CONSUMER_WARPS)
