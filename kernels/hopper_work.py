"""What the roles of the Hopper kernel share, in Gluon: who they are, and the work items that one hands the others.

Device code only.
"""

# What is `constexpr` to Gluon's compiler is no Python object of that type.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
def read_work(work_slots, slot):
    """A work item: its first query as a row of all samples, how many there are, which is none after the last item, and
    their head; the bounds of its list in `key_tiles` as in `TileLists`; where padded text begins in its sample."""
    place = slot * FIELDS
    queries = (_field(work_slots, place), _field(work_slots, place + 1), _field(work_slots, place + 2))
    bounds = (
        _field(work_slots, place + 3),
        _field(work_slots, place + 4),
        _field(work_slots, place + 5),
        _field(work_slots, place + 6),
    )
    return queries, bounds, _field(work_slots, place + 7)


@gluon.jit
def _field(work_slots, place):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [CONSUMER_WARPS], [0])
    return gl.sum(work_slots.index(place).load(LAYOUT), 0)
