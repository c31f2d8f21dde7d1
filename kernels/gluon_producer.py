"""The producer of the Gluon kernel: takes work items and loads what they need. Device code only."""

# What is `constexpr` to Gluon's compiler is no Python object of that type.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from grat_kernels.gluon_work import CONSUMERS, PRODUCER_WARPS, publish_work

# Triton 3.7 renamed it.
all_threads_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Elements that one cp.async copies: 16 bytes.
VECTOR = gl.constexpr(8)
ELEMENT_BYTES = gl.constexpr(2)
# What stands for no row, as in `tile_lists`.
EMPTY = gl.constexpr(-1)
# Rows of a packed tile that a thread copies at a time.
CHUNK_ROWS = gl.constexpr(4)


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
def _send_tile(blocks, row, column, ring, step):
    """Starts the copy of one full tile into its slot, once that is empty."""
    slots, full, empty = ring
    STAGES: gl.constexpr = slots.shape[0]
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), blocks.block_shape[0] * blocks.block_shape[1] * ELEMENT_BYTES)
    tma.async_copy_global_to_shared(blocks, [row, column], full.index(slot), slots.index(slot))


@gluon.jit
def _send_rows(source, summary_source, packed_tile, text_padding, channels, tokens, ring, step, CHUNK: gl.constexpr):
    """Starts to copy the rows of one packed tile into its slot, once that is empty; slots without a row become zeros.

    In chunks, because addresses of all rows at once would not fit the producer's few registers.
    """
    slots, _full, empty = ring
    STAGES: gl.constexpr = slots.shape[0]
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


@gluon.jit
def _end_rows(ring, step, LATER: gl.constexpr):
    """Waits for the rows of a packed tile, after which `LATER` others were started, and says that its slot is full."""
    slots, full, _empty = ring
    STAGES: gl.constexpr = slots.shape[0]
    async_copy.wait_group(LATER)
    # Ordinary writes to shared memory reach the tensor cores, which read by another path, only past this fence.
    fence_async_shared()
    # One thread arrives for all: only after every thread has passed its fence.
    all_threads_meet()
    mbarrier.arrive(full.index(step % STAGES), count=1)


@gluon.jit
def _unpadded_run(packed_runs, tile, padding, BLOCK_N: gl.constexpr):
    """First token of a packed tile that holds tokens one after another, none of them padded; negative for others."""
    padding_start, padding_stop = padding
    first = gl.load(packed_runs + tile)
    if (first + BLOCK_N > padding_start) & (first < padding_stop):
        first = EMPTY
    return first


@gluon.jit
def _send_packed(blocks, sources, lists, sizes, rings, batch, head, padding_start, packed, step):
    """Sends the packed tiles of an item, the first of which is known; returns the step after them."""
    _query_blocks, key_blocks, value_blocks, _summary_key_blocks, _summary_value_blocks = blocks
    key, value, summary_key, summary_value, key_vectors, value_vectors = sources
    _query_tiles, key_tiles, _class_of_head, packed_rows, packed_runs, text_valid = lists
    tokens, heads, summaries, text, _tiles, _leading, _items = sizes
    _text_start, text_stop = text
    key_ring, value_ring = rings
    begin, end, next_tile = packed
    BLOCK_N: gl.constexpr = key_blocks.block_shape[0]
    HEAD_DIM: gl.constexpr = key_blocks.block_shape[1]
    THREADS_PER_ROW: gl.constexpr = HEAD_DIM // VECTOR
    ROWS: gl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [32 // THREADS_PER_ROW, THREADS_PER_ROW], [PRODUCER_WARPS, 1], [1, 0]
    )
    MOST: gl.constexpr = CHUNK_ROWS * PRODUCER_WARPS * 32 // THREADS_PER_ROW
    CHUNK: gl.constexpr = MOST if MOST < BLOCK_N else BLOCK_N
    chunk_slots = gl.arange(0, CHUNK, gl.SliceLayout(1, ROWS))
    channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, ROWS))

    column = head * HEAD_DIM
    row = batch * tokens
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
        padding = (padding_start, text_stop)
    # Of keys and values of rows, one copy is under way while the next is started. Whether one of values is by now:
    late = 0
    for index in range(begin, end):
        tile = next_tile
        next_tile = gl.load(key_tiles + index + 1)
        first_row = EMPTY
        if packed_runs is not None:
            first_row = _unpadded_run(packed_runs, tile, padding, BLOCK_N)
        if first_row >= 0:
            if late > 0:
                _end_rows(value_ring, step - 1, 0)
            late = 0
            _send_tile(key_blocks, row + first_row, column, key_ring, step)
            _send_tile(value_blocks, row + first_row, column, value_ring, step)
        else:
            packed_tile = (packed_rows + tile * BLOCK_N, chunk_slots)
            _send_rows(key_source, summary_key_source, packed_tile, padding, channels, tokens, key_ring, step, CHUNK)
            if late > 0:
                _end_rows(value_ring, step - 1, 1)
            late = 1
            _send_rows(
                value_source, summary_value_source, packed_tile, padding, channels, tokens, value_ring, step, CHUNK
            )
            _end_rows(key_ring, step, 1)
        step += 1
    if late > 0:
        _end_rows(value_ring, step - 1, 0)
    return step


@gluon.jit
def produce(blocks, sources, lists, sizes, counter, rings, queries_ring):
    """Takes work items and fills the slots; ends by publishing an item without queries."""
    query_blocks, key_blocks, value_blocks, summary_key_blocks, summary_value_blocks = blocks
    _key, _value, summary_key, _summary_value, _key_vectors, _value_vectors = sources
    query_tiles, key_tiles, class_of_head, packed_rows, _packed_runs, text_valid = lists
    tokens, heads, summaries, text, tiles, leading, items = sizes
    text_start, text_stop = text
    key_ring, value_ring = rings
    query_slots, work_slots, query_full, query_empty = queries_ring
    QUERY_STAGES: gl.constexpr = query_full.shape[0]
    HALF: gl.constexpr = query_blocks.block_shape[0]
    HEAD_DIM: gl.constexpr = key_blocks.block_shape[1]
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
            slot = published % QUERY_STAGES
            mbarrier.wait(query_empty.index(slot), ((published // QUERY_STAGES) & 1) ^ 1)
            padding_start = text_stop
            if text_valid is not None:
                padding_start = text_start + gl.load(text_valid + batch)
            fields = (row + first_query, query_count, head, begin, full_end, full_summary_end, end, padding_start)
            publish_work(work_slots, slot, fields)
            mbarrier.expect(query_full.index(slot), CONSUMERS * HALF * HEAD_DIM * ELEMENT_BYTES)
            for half in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    query_blocks,
                    [row + first_query + half * HALF, column],
                    query_full.index(slot),
                    query_slots.index(slot * CONSUMERS + half),
                )
            published += 1

            # The next tile's position is read one step ahead: a copy that first waited for its own would be late.
            next_tile = gl.load(key_tiles + begin)
            for index in range(begin, full_end):
                first_row = row + next_tile
                next_tile = gl.load(key_tiles + index + 1)
                _send_tile(key_blocks, first_row, column, key_ring, step)
                _send_tile(value_blocks, first_row, column, value_ring, step)
                step += 1
            if summary_key is not None:
                for index in range(full_end, full_summary_end):
                    first_row = batch * summaries + next_tile
                    next_tile = gl.load(key_tiles + index + 1)
                    _send_tile(summary_key_blocks, first_row, column, key_ring, step)
                    _send_tile(summary_value_blocks, first_row, column, value_ring, step)
                    step += 1
            if packed_rows is not None:
                packed = (full_summary_end, end, next_tile)
                step = _send_packed(blocks, sources, lists, sizes, rings, batch, head, padding_start, packed, step)
        item = gl.atomic_add(counter, 1, sem="relaxed")

    slot = published % QUERY_STAGES
    mbarrier.wait(query_empty.index(slot), ((published // QUERY_STAGES) & 1) ^ 1)
    publish_work(work_slots, slot, (0, 0, 0, 0, 0, 0, 0, 0))
    mbarrier.arrive(query_full.index(slot), count=1)
