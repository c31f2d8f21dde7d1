"""What the roles of the Gluon kernel share: who they are, the work items that one hands the others, and the output.

Device code only.
"""

# What is `constexpr` to Gluon's compiler is no Python object of that type.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from grat_kernels.gluon_softmax import LEAST_TOTAL

# Consumers, each with a warp group and its share of the queries.
CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = gl.constexpr(4)
PRODUCER_WARPS = gl.constexpr(4)
# Numbers that describe a work item: see `read_work`.
FIELDS = gl.constexpr(8)


@gluon.jit
def publish_work(work_slots, slot, fields):
    """Writes a work item where the consumers read it, before the barrier that says that its queries have come."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [PRODUCER_WARPS], [0])
    for number in gl.static_range(FIELDS):
        place = work_slots.index(slot * FIELDS + number)
        place.store(gl.full([1], fields[number], gl.int32, LAYOUT))


@gluon.jit
def read_work(work_slots, slot, WARPS: gl.constexpr):
    """A work item, for a role of so many warps: its first query as a row of all samples, how many there are, which is
    none after the last item, and their head; the bounds of its list in `key_tiles` as in `TileLists`; where padded text
    begins in its sample."""
    place = slot * FIELDS
    first_query = _field(work_slots, place, WARPS)
    query_count = _field(work_slots, place + 1, WARPS)
    head = _field(work_slots, place + 2, WARPS)
    begin = _field(work_slots, place + 3, WARPS)
    full_end = _field(work_slots, place + 4, WARPS)
    full_summary_end = _field(work_slots, place + 5, WARPS)
    end = _field(work_slots, place + 6, WARPS)
    padding_start = _field(work_slots, place + 7, WARPS)
    return (first_query, query_count, head), (begin, full_end, full_summary_end, end), padding_start


@gluon.jit
def _field(work_slots, place, WARPS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.sum(work_slots.index(place).load(LAYOUT), 0)


@gluon.jit
def store_queries(output, queries_of_item, heads, accumulator, total, WHICH: gl.constexpr):
    """Stores a consumer's share of a tile of queries: weighted values over the total of their weights.

    By masked pointers: a whole block would overwrite the queries of the next tile. A query of which all keys are padded
    text has summed up nothing, and gets zeros.
    """
    HALF: gl.constexpr = accumulator.shape[0]
    HEAD_DIM: gl.constexpr = accumulator.shape[1]
    LAYOUT: gl.constexpr = accumulator.type.layout
    first_query, query_count, head = queries_of_item
    divisor = gl.convert_layout(gl.maximum(total, LEAST_TOTAL), gl.SliceLayout(1, LAYOUT))
    result = accumulator * (1.0 / divisor)[:, None]
    rows = WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    output_rows = gl.cast(first_query, gl.int64) + rows
    pointers = output + head * HEAD_DIM + (output_rows * (heads * HEAD_DIM))[:, None] + channels[None, :]
    stored = (rows < query_count)[:, None] & (channels >= 0)[None, :]
    gl.store(pointers, result.to(output.dtype.element_ty), mask=stored)
