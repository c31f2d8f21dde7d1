"""The span attention kernel for Hopper (compute capability 9.0), in Gluon: device code only.

A program stays on its multiprocessor and takes work items, one tile of queries of one head each, from a counter that
all programs share. Three groups of warps play three roles:

- the *producer* takes an item, loads its queries and then its tiles of keys and values into rings of slots in shared
  memory: full tiles by the tensor memory accelerator, packed tiles row by row;
- two *consumers* compute half of the queries each. The scores of tile i + 1 and the weighted values of tile i are
  multiplied at the same time, the softmax between them runs under the matrix products, and the two take turns in
  starting their products, so that one computes its softmax while the other multiplies (FlashAttention-3, arXiv
  2407.08608, sections 3.1 and 3.2).

Each ring slot has a barrier that says it is full and one that says it is empty. A slot's n-th use, counted from 0,
waits for the parity n & 1 of its *full* barrier, and its refill for the opposite parity of its *empty* barrier: of a
fresh barrier, the phase before the first one counts as complete.
"""

# What is `constexpr` to Gluon's compiler is no Python object of that type.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.7 renamed it.
all_threads_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Where the running maximum starts. Finite, so that a tile whose keys are all masked gives exp2(-inf) = 0 and never
# exp2(-inf - -inf) = NaN; the lowest float32, so that no finite score lies below it.
LOWEST = gl.constexpr(-3.4028234663852886e38)

# Consumers, each with a warp group and its share of the queries.
CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = gl.constexpr(4)
PRODUCER_WARPS = gl.constexpr(4)
# A register file of 64 K serves 3 · 128 threads with 168 registers each; the producer hands most of its own to the
# consumers. These are what FlashAttention-3 gives to a producer that copies rows itself.
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)
# Elements that one cp.async copies: 16 bytes.
VECTOR = gl.constexpr(8)
ELEMENT_BYTES = gl.constexpr(2)
# Rows of a packed tile that a thread copies at a time.
CHUNK_ROWS = gl.constexpr(4)

# A negative total is impossible, so this stores nothing. But the assembler cannot know, and may not move a wait for
# the matrix products across it: without it, ptxas hoists the wait above the softmax, and the overlap is lost.
PIN = gl.constexpr(
    "{ .reg .pred never; .reg .b32 address; mov.b32 address, 0; setp.eq.f32 never, $1, 0fC0400000; "
    "@never st.volatile.shared.f32 [address], $1; mov.b32 $0, $1; }"
)


@gluon.jit
def _work_of(item, query_tiles, class_of_head, heads, tiles, leading):
    """Batch, head and tile of a work item, with its entry in `query_tiles`.

    Text tiles of every head come first: each is as long as the sequence, and started last they would be a long tail.
    Then head by head in order of position, so that programs that run together share keys in L2. `leading` is the
    text tiles of all heads and samples, and of one.
    """
    leading_items, leading_tiles = leading
    if item < leading_items:
        batch_head = item // leading_tiles
        tile = item % leading_tiles
    else:
        others = tiles - leading_tiles
        batch_head = (item - leading_items) // others
        tile = leading_tiles + (item - leading_items) % others
    batch = batch_head // heads
    head = batch_head % heads
    if class_of_head is not None:
        tile += gl.load(class_of_head + head) * tiles
    entry = query_tiles + tile * 6
    queries = (gl.load(entry), gl.load(entry + 1))
    bounds = (gl.load(entry + 2), gl.load(entry + 3), gl.load(entry + 4), gl.load(entry + 5))
    return batch, head, queries, bounds


@gluon.jit
def _padding(batch, text_valid, text):
    """Where padded text begins and ends in a sample's sequence."""
    text_start, text_stop = text
    return text_start + gl.load(text_valid + batch), text_stop


@gluon.jit
def _send_tile(blocks, row, column, ring, step, STAGES: gl.constexpr):
    """Starts the copy of one full tile into its slot, once that is empty."""
    slots, full, empty = ring
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), blocks.block_shape[0] * blocks.block_shape[1] * ELEMENT_BYTES)
    tma.async_copy_global_to_shared(blocks, [row, column], full.index(slot), slots.index(slot))


@gluon.jit
def _send_rows(
    source, summary_source, packed_tile, text_padding, channels, tokens, ring, step,
    STAGES: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Copies the rows of one packed tile into its slot, once that is empty; slots without a row become zeros.

    In chunks, because addresses of all rows at once would not fit the producer's few registers.
    """
    slots, full, empty = ring
    rows_of_tile, chunk_slots = packed_tile
    pointer, token_stride = source
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    for chunk in gl.static_range(slots.shape[1] // CHUNK):
        rows = gl.load(rows_of_tile + chunk * CHUNK + chunk_slots)
        present = rows >= 0
        if text_padding is not None:
            padding_start, padding_stop = text_padding
            present = present & ((rows < padding_start) | (rows >= padding_stop))
        wide = gl.cast(rows, gl.int64)
        pointers = pointer + wide * token_stride
        if summary_source is not None:
            summary_pointer, summary_stride = summary_source
            pointers = gl.where(rows >= tokens, summary_pointer + (wide - tokens) * summary_stride, pointers)
        inside = present[:, None] & (channels >= 0)[None, :]
        target = slots.index(slot).slice(chunk * CHUNK, CHUNK)
        async_copy.async_copy_global_to_shared(target, pointers[:, None] + channels[None, :], mask=inside)
    async_copy.commit_group()
    async_copy.wait_group(0)
    # Ordinary writes to shared memory reach the tensor cores, which read by another path, only past this fence.
    fence_async_shared()
    # One thread arrives for all: only after every thread has passed its fence.
    all_threads_meet()
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _publish(item, item_slot, LAYOUT: gl.constexpr):
    item_slot.store(gl.full([1], item, gl.int32, LAYOUT))


@gluon.jit
def _producer(blocks, sources, lists, sizes, counter, rings, queries_ring, item_slot, STAGES: gl.constexpr):
    """Takes work items and fills the slots; ends by publishing an item past the last."""
    query_blocks, key_blocks, value_blocks, summary_key_blocks, summary_value_blocks = blocks
    key, value, summary_key, summary_value, key_vectors, value_vectors = sources
    query_tiles, key_tiles, class_of_head, packed_rows, text_valid = lists
    tokens, heads, summaries, text, tiles, leading, items = sizes
    key_ring, value_ring = rings
    query_slots, query_full, query_empty = queries_ring
    HALF: gl.constexpr = query_blocks.block_shape[0]
    BLOCK_N: gl.constexpr = key_blocks.block_shape[0]
    HEAD_DIM: gl.constexpr = key_blocks.block_shape[1]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [PRODUCER_WARPS], [0])
    THREADS_PER_ROW: gl.constexpr = HEAD_DIM // VECTOR
    ROWS: gl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [32 // THREADS_PER_ROW, THREADS_PER_ROW], [PRODUCER_WARPS, 1], [1, 0]
    )
    MOST: gl.constexpr = CHUNK_ROWS * PRODUCER_WARPS * 32 // THREADS_PER_ROW
    CHUNK: gl.constexpr = MOST if MOST < BLOCK_N else BLOCK_N
    chunk_slots = gl.arange(0, CHUNK, gl.SliceLayout(1, ROWS))
    channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, ROWS))

    step = 0
    published = 0
    item = gl.atomic_add(counter, 1, sem="relaxed")
    while item < items:
        batch, head, queries, bounds = _work_of(item, query_tiles, class_of_head, heads, tiles, leading)
        first_query, query_count = queries
        begin, full_end, full_summary_end, end = bounds
        if query_count > 0:
            column = head * HEAD_DIM
            row = batch * tokens
            mbarrier.wait(query_empty, (published & 1) ^ 1)
            _publish(item, item_slot, ONE)
            mbarrier.expect(query_full, CONSUMERS * HALF * HEAD_DIM * ELEMENT_BYTES)
            for half in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    query_blocks, [row + first_query + half * HALF, column], query_full, query_slots.index(half)
                )
            published += 1

            # The next tile's position is read one step ahead: a copy that first waited for its own would be late.
            next_tile = gl.load(key_tiles + begin)
            for index in range(begin, full_end):
                first_row = row + next_tile
                next_tile = gl.load(key_tiles + index + 1)
                _send_tile(key_blocks, first_row, column, key_ring, step, STAGES)
                _send_tile(value_blocks, first_row, column, value_ring, step, STAGES)
                step += 1
            if summary_key is not None:
                for index in range(full_end, full_summary_end):
                    first_row = batch * summaries + next_tile
                    next_tile = gl.load(key_tiles + index + 1)
                    _send_tile(summary_key_blocks, first_row, column, key_ring, step, STAGES)
                    _send_tile(summary_value_blocks, first_row, column, value_ring, step, STAGES)
                    step += 1
            if packed_rows is not None:
                batch_row = gl.cast(batch, gl.int64) * tokens
                key_stride = gl.cast(key_vectors, gl.int64) * VECTOR
                value_stride = gl.cast(value_vectors, gl.int64) * VECTOR
                key_source = (key + batch_row * key_stride + column, key_stride)
                value_source = (value + batch_row * value_stride + column, value_stride)
                summary_key_source = None
                summary_value_source = None
                if summary_key is not None:
                    summary_stride = gl.cast(heads, gl.int64) * HEAD_DIM
                    summary_start = gl.cast(batch, gl.int64) * summaries * summary_stride + column
                    summary_key_source = (summary_key + summary_start, summary_stride)
                    summary_value_source = (summary_value + summary_start, summary_stride)
                padding = None
                if text_valid is not None:
                    padding = _padding(batch, text_valid, text)
                for index in range(full_summary_end, end):
                    packed_tile = (packed_rows + next_tile * BLOCK_N, chunk_slots)
                    next_tile = gl.load(key_tiles + index + 1)
                    _send_rows(
                        key_source, summary_key_source, packed_tile, padding, channels, tokens, key_ring, step,
                        STAGES, CHUNK,
                    )  # fmt: skip
                    _send_rows(
                        value_source, summary_value_source, packed_tile, padding, channels, tokens, value_ring, step,
                        STAGES, CHUNK,
                    )  # fmt: skip
                    step += 1
        item = gl.atomic_add(counter, 1, sem="relaxed")

    mbarrier.wait(query_empty, (published & 1) ^ 1)
    _publish(items, item_slot, ONE)
    mbarrier.arrive(query_full, count=1)


@gluon.jit
def _bias_of(
    index, tile, batch, bounds, biases, packed_rows, text_valid, text, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr
):
    """What is added to the scores of one tile, `[BLOCK_N]`: 0 for tokens, -inf for slots that hold nothing."""
    summary_bias, packed_bias = biases
    _begin, full_end, full_summary_end, _end = bounds
    columns = gl.arange(0, BLOCK_N, LAYOUT)
    bias = gl.zeros([BLOCK_N], gl.float32, LAYOUT)
    if summary_bias is not None:
        of_summaries = (index >= full_end) & (index < full_summary_end)
        if of_summaries:
            bias = gl.load(summary_bias + tile + columns)
    if packed_rows is not None:
        slots = tile * BLOCK_N + columns
        if index >= full_summary_end:
            bias = gl.load(packed_bias + slots)
            if text_valid is not None:
                rows = gl.load(packed_rows + slots)
                padding_start, padding_stop = _padding(batch, text_valid, text)
                bias = gl.where((rows >= padding_start) & (rows < padding_stop), float("-inf"), bias)
    return bias


@gluon.jit
def _softmax(scores, scale, total, highest):
    """One step of the online softmax in base 2, exp2 being one instruction; `scale` holds log2(e)."""
    highest_now = gl.maximum(highest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - highest_now[:, None])
    decay = gl.exp2(highest - highest_now)
    total = total * decay + gl.sum(weights, 1)
    total = gl.inline_asm_elementwise(PIN, "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1)
    return weights, decay, total, highest_now


@gluon.jit
def _advance(
    queries,
    weights,
    accumulator,
    total,
    highest,
    bias,
    scale,
    rings,
    turns,
    step,
    turn,
    WHICH: gl.constexpr,
    STAGES: gl.constexpr,
    BIASED: gl.constexpr,
):
    """Scores of tile `step + 1` and weighted values of tile `step`, multiplied together."""
    key_ring, value_ring = rings
    key_slots, key_full, key_empty = key_ring
    value_slots, value_full, value_empty = value_ring
    HALF: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = key_slots.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, BLOCK_N, 16])
    slot = step % STAGES
    next_slot = (step + 1) % STAGES
    nothing = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)

    mbarrier.wait(key_full.index(next_slot), ((step + 1) // STAGES) & 1)
    mbarrier.wait(turns.index(WHICH), turn & 1)
    pending_scores = warpgroup_mma(
        queries, key_slots.index(next_slot).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    mbarrier.wait(value_full.index(slot), (step // STAGES) & 1)
    pending_output = warpgroup_mma(weights, value_slots.index(slot), accumulator, is_async=True)
    mbarrier.arrive(turns.index(1 - WHICH), count=1)

    scores = warpgroup_mma_wait(num_outstanding=1, deps=(pending_scores,))
    mbarrier.arrive(key_empty.index(next_slot), count=1)
    if BIASED:
        scores = scores + gl.convert_layout(bias, gl.SliceLayout(0, SCORES))[None, :]
    next_weights, decay, total, highest = _softmax(scores, scale, total, highest)
    next_weights = gl.convert_layout(next_weights.to(weights.dtype), weights.type.layout)
    # Waiting for the softmax's results as well keeps it before the wait.
    accumulator, next_weights, decay, total = warpgroup_mma_wait(
        num_outstanding=0, deps=(pending_output, next_weights, decay, total)
    )
    mbarrier.arrive(value_empty.index(slot), count=1)
    accumulator = accumulator * gl.convert_layout(decay, gl.SliceLayout(1, accumulator.type.layout))[:, None]
    return next_weights, accumulator, total, highest


@gluon.jit
def _consumer(
    output,
    biases,
    lists,
    sizes,
    scale,
    rings,
    queries_ring,
    item_slot,
    turns,
    WHICH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attention of half of every tile of queries."""
    query_tiles, key_tiles, class_of_head, packed_rows, text_valid = lists
    tokens, heads, _summaries, text, tiles, leading, items = sizes
    summary_bias, _packed_bias = biases
    query_slots, query_full, query_empty = queries_ring
    key_ring, value_ring = rings
    key_slots, key_full, key_empty = key_ring
    value_slots, value_full, value_empty = value_ring
    ELEMENT: gl.constexpr = key_slots.dtype
    BLOCK_N: gl.constexpr = key_slots.shape[1]
    HEAD_DIM: gl.constexpr = key_slots.shape[2]
    HALF: gl.constexpr = query_slots.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    COLUMNS: gl.constexpr = gl.BlockedLayout([1], [32], [CONSUMER_WARPS], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [CONSUMER_WARPS], [0])
    BIASED: gl.constexpr = summary_bias is not None or packed_rows is not None

    queries = query_slots.index(WHICH)
    nothing = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    no_bias = gl.zeros([BLOCK_N], gl.float32, COLUMNS)
    step = 0
    turn = 0
    taken = 0
    mbarrier.wait(query_full, 0)
    item = gl.sum(item_slot.load(ONE), 0)
    while item < items:
        batch, head, query_range, bounds = _work_of(item, query_tiles, class_of_head, heads, tiles, leading)
        first_query, query_count = query_range
        begin, full_end, _full_summary_end, end = bounds
        accumulator = gl.zeros([HALF, HEAD_DIM], gl.float32, OUTPUT)
        total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
        highest = gl.full([HALF], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))

        # The first tile has no weighted values to go with.
        slot = step % STAGES
        mbarrier.wait(key_full.index(slot), (step // STAGES) & 1)
        scores = warpgroup_mma(queries, key_slots.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
        mbarrier.arrive(key_empty.index(slot), count=1)
        if BIASED:
            tile = gl.load(key_tiles + begin)
            bias = _bias_of(begin, tile, batch, bounds, biases, packed_rows, text_valid, text, BLOCK_N, COLUMNS)
            scores = scores + gl.convert_layout(bias, gl.SliceLayout(0, SCORES))[None, :]
        weights, _decay, total, highest = _softmax(scores, scale, total, highest)
        weights = gl.convert_layout(weights.to(ELEMENT), WEIGHTS)

        # Full tiles of tokens: the bulk of the work, with neither mask nor bias.
        for _ in range(begin + 1, full_end):
            weights, accumulator, total, highest = _advance(
                queries, weights, accumulator, total, highest, no_bias, scale, rings, turns, step, turn,
                WHICH, STAGES, False,
            )  # fmt: skip
            step += 1
            turn += 1
        if BIASED:
            first_biased = gl.maximum(full_end, begin + 1)
            next_tile = gl.load(key_tiles + first_biased)
            for index in range(first_biased, end):
                tile = next_tile
                next_tile = gl.load(key_tiles + index + 1)
                bias = _bias_of(index, tile, batch, bounds, biases, packed_rows, text_valid, text, BLOCK_N, COLUMNS)
                weights, accumulator, total, highest = _advance(
                    queries, weights, accumulator, total, highest, bias, scale, rings, turns, step, turn,
                    WHICH, STAGES, True,
                )  # fmt: skip
                step += 1
                turn += 1

        # Queries are not read any more: the producer may load those of the next item under what is left of this one.
        mbarrier.arrive(query_empty, count=1)
        slot = step % STAGES
        mbarrier.wait(value_full.index(slot), (step // STAGES) & 1)
        pending_output = warpgroup_mma(weights, value_slots.index(slot), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(num_outstanding=0, deps=(pending_output,))
        mbarrier.arrive(value_empty.index(slot), count=1)
        step += 1

        # Stored by masked pointers: a whole block would overwrite the queries of the next tile.
        result = accumulator * (1.0 / gl.convert_layout(total, ROWS))[:, None]
        rows = WHICH * HALF + gl.arange(0, HALF, ROWS)
        channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUTPUT))
        output_rows = gl.cast(batch, gl.int64) * tokens + first_query + rows
        pointers = output + head * HEAD_DIM + (output_rows * (heads * HEAD_DIM))[:, None] + channels[None, :]
        stored = (rows < query_count)[:, None] & (channels >= 0)[None, :]
        gl.store(pointers, result.to(ELEMENT), mask=stored)

        taken += 1
        mbarrier.wait(query_full, taken & 1)
        item = gl.sum(item_slot.load(ONE), 0)


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
    STAGES: gl.constexpr,
):
    HALF: gl.constexpr = query_blocks.block_shape[0]
    BLOCK_N: gl.constexpr = key_blocks.block_shape[0]
    HEAD_DIM: gl.constexpr = key_blocks.block_shape[1]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    query_slots = gl.allocate_shared_memory(query_blocks.dtype, [CONSUMERS, HALF, HEAD_DIM], query_blocks.layout)
    key_slots = gl.allocate_shared_memory(key_blocks.dtype, [STAGES, BLOCK_N, HEAD_DIM], key_blocks.layout)
    value_slots = gl.allocate_shared_memory(value_blocks.dtype, [STAGES, BLOCK_N, HEAD_DIM], value_blocks.layout)
    item_slot = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    query_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    query_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    mbarrier.init(query_full, count=1)
    mbarrier.init(query_empty, count=CONSUMERS)
    for slot in gl.static_range(STAGES):
        mbarrier.init(key_full.index(slot), count=1)
        mbarrier.init(key_empty.index(slot), count=CONSUMERS)
        mbarrier.init(value_full.index(slot), count=1)
        mbarrier.init(value_empty.index(slot), count=CONSUMERS)
    for which in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(which), count=1)
    # The first turn is the first consumer's.
    mbarrier.arrive(turns.index(0), count=1)
    fence_async_shared()

    blocks = (query_blocks, key_blocks, value_blocks, summary_key_blocks, summary_value_blocks)
    sources = (key, value, summary_key, summary_value, key_vectors, value_vectors)
    lists = (query_tiles, key_tiles, class_of_head, packed_rows, text_valid)
    sizes = (tokens, heads, summaries, (text_start, text_stop), tiles, (leading_items, leading_tiles), items)
    rings = ((key_slots, key_full, key_empty), (value_slots, value_full, value_empty))
    queries_ring = (query_slots, query_full, query_empty)
    biases = (summary_bias, packed_bias)
    gl.warp_specialize(
        [
            (_consumer, (output, biases, lists, sizes, scale, rings, queries_ring, item_slot, turns, 0, STAGES)),
            (_consumer, (output, biases, lists, sizes, scale, rings, queries_ring, item_slot, turns, 1, STAGES)),
            (_producer, (blocks, sources, lists, sizes, counter, rings, queries_ring, item_slot, STAGES)),
        ],
        [CONSUMER_WARPS, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
