"""Ways to break the Hopper kernel, each of which the simulator must see."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """Some lines of the kernel, what stands there instead, and what complaints may follow."""

    lines: str
    instead: str
    complaints: tuple[str, ...]


FAULTS = {
    "refill waits for one consumer": Fault(
        "init(empty.index(slot), count=CONSUMERS)",
        "init(empty.index(slot), count=1)",
        ("arrivals", "overwritten", "deadlock"),
    ),
    "refill does not wait": Fault(
        "    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)\n    mbarrier.expect",
        "    mbarrier.expect",
        ("overwritten", "arrivals", "deadlock"),
    ),
    "packed refill does not wait": Fault(
        "    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)\n    for",
        "    for",
        ("overwritten", "arrivals", "deadlock"),
    ),
    "wrong parity of the refill": Fault(
        "((step // STAGES) & 1) ^ 1",
        "(step // STAGES) & 1",
        ("deadlock",),
    ),
    "queries: wrong parity of the refill": Fault(
        "((published // QUERY_STAGES) & 1) ^ 1",
        "(published // QUERY_STAGES) & 1",
        ("deadlock",),
    ),
    "keys: wrong parity": Fault(
        "mbarrier.wait(key_full.index(key_slot), ((step + 1) // KEY_STAGES) & 1)",
        "mbarrier.wait(key_full.index(key_slot), (step // KEY_STAGES) & 1)",
        ("loaded", "deadlock", "overwritten", "wrong"),
    ),
    "values are not awaited": Fault(
        "    mbarrier.wait(value_full.index(value_slot), (step // VALUE_STAGES) & 1)\n    pending",
        "    pending",
        ("loaded", "wrong"),
    ),
    "keys are released too early": Fault(
        (
            "        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))\n"
            "        mbarrier.arrive(key_empty.index(0), count=1)\n"
        ),
        (
            "        mbarrier.arrive(key_empty.index(0), count=1)\n"
            "        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))\n"
        ),
        ("overwritten",),
    ),
    "values are released too early": Fault(
        (
            "    accumulator, next_weights, decay, total = warpgroup_mma_wait(\n"
            "        num_outstanding=0, deps=(pending_output, next_weights, decay, total)\n"
            "    )\n"
            "    mbarrier.arrive(value_empty.index(value_slot), count=1)\n"
        ),
        (
            "    mbarrier.arrive(value_empty.index(value_slot), count=1)\n"
            "    accumulator, next_weights, decay, total = warpgroup_mma_wait(\n"
            "        num_outstanding=0, deps=(pending_output, next_weights, decay, total)\n"
            "    )\n"
        ),
        ("overwritten",),
    ),
    "values are never released": Fault(
        "    mbarrier.arrive(value_empty.index(value_slot), count=1)\n    return",
        "    return",
        ("deadlock",),
    ),
    "queries are released too early": Fault(
        "        # Read again",
        "        mbarrier.arrive(query_empty.index(query_slot), count=1)\n        # Read again",
        ("arrivals", "overwritten", "deadlock"),
    ),
    "a work item is read after its slot is released": Fault(
        (
            "        queries_of_item, _bounds, _padding_start = read_work(work_slots, query_slot)\n"
            "        first_query, query_count, head = queries_of_item\n"
            "        mbarrier.arrive(query_empty.index(query_slot), count=1)\n"
        ),
        (
            "        mbarrier.arrive(query_empty.index(query_slot), count=1)\n"
            "        queries_of_item, _bounds, _padding_start = read_work(work_slots, query_slot)\n"
            "        first_query, query_count, head = queries_of_item\n"
        ),
        ("written", "wrong"),
    ),
    "queries of the next item are not awaited": Fault(
        "        mbarrier.wait(query_full.index(query_slot), (taken // QUERY_STAGES) & 1)\n",
        "",
        ("loaded", "deadlock", "wrong", "written", "arrivals"),
    ),
    "queries of the item before": Fault(
        "            queries = query_slots.index(query_slot * CONSUMERS + WHICH)\n",
        "",
        ("overwritten", "loaded", "wrong"),
    ),
    "the next item goes on from this one's total": Fault(
        "accumulator, zero, lowest, bias",
        "accumulator, total, highest, bias",
        ("wrong",),
    ),
    "scores are not awaited": Fault(
        "num_outstanding=1, deps=(pending_scores,)",
        "num_outstanding=2, deps=(pending_scores,)",
        ("before its matrix product",),
    ),
    "output is not awaited": Fault(
        "num_outstanding=0, deps=(pending_output, next_weights",
        "num_outstanding=1, deps=(pending_output, next_weights",
        ("before its matrix product",),
    ),
    "no fence after threads wrote": Fault(
        "    fence_async_shared()\n    # One thread",
        "    # One thread",
        ("without a fence",),
    ),
    "copied rows are not awaited": Fault(
        "async_copy.wait_group(LATER)",
        "async_copy.wait_group(LATER + 1)",
        ("loaded", "without a fence", "without waiting"),
    ),
    "the last copied rows are not awaited": Fault(
        "    _end_rows(value_ring, step - 1, 0)\n    return",
        "    _end_rows(value_ring, step - 1, 1)\n    return",
        ("loaded", "without a fence", "without waiting"),
    ),
    "copied values are never full": Fault(
        "            if late > 0:\n                _end_rows(value_ring, step - 1, 1)\n",
        "",
        ("deadlock",),
    ),
    "copied keys are full too late": Fault(
        "            _end_rows(key_ring, step, 1)\n        step += 1\n    if late > 0:\n",
        "        step += 1\n    if late > 0:\n        _end_rows(key_ring, step - 1, 0)\n",
        ("deadlock",),
    ),
    "copied values are full after the tile that follows": Fault(
        "            if late > 0:\n                _end_rows(value_ring, step - 1, 0)\n            late = 0\n",
        "",
        ("deadlock", "wrong", "loaded", "without a fence", "arrivals", "bytes"),
    ),
    "padded text is read as a block": Fault(
        "(first + BLOCK_N > padding_start)",
        "(first > padding_start)",
        ("wrong",),
    ),
    "too few bytes announced": Fault(
        "mbarrier.expect(full.index(slot), blocks",
        "mbarrier.expect(full.index(slot), blocks.block_shape[0] // blocks",
        ("bytes",),
    ),
    "too many bytes announced": Fault(
        "ELEMENT_BYTES = gl.constexpr(2)",
        "ELEMENT_BYTES = gl.constexpr(4)",
        ("deadlock",),
    ),
    "nobody begins": Fault(
        "    mbarrier.arrive(turns.index(0), count=1)\n    fence",
        "    fence",
        ("deadlock",),
    ),
    "the turn stays": Fault(
        "mbarrier.arrive(turns.index(1 - WHICH), count=1)",
        "mbarrier.arrive(turns.index(WHICH), count=1)",
        ("deadlock", "arrivals"),
    ),
    "the end is not published": Fault(
        "    publish_work(work_slots, slot, (0, 0, 0, 0, 0, 0, 0, 0))\n",
        "",
        ("deadlock", "wrong", "written"),
    ),
    "a step is not counted": Fault(
        "        step += 1\n\n        # Stored",
        "        # Stored",
        ("deadlock", "loaded", "arrivals", "wrong"),
    ),
    "padded text is loaded": Fault(
        "present = present & ((rows < padding_start) | (rows >= padding_stop))",
        "present = present",
        ("wrong",),
    ),
    "padded text is attended": Fault(
        'float("-inf"), bias)',
        "bias, bias)",
        ("wrong",),
    ),
    "empty slots are loaded": Fault(
        "present = rows >= 0",
        "present = rows >= -1",
        ("out of bounds", "wrong"),
    ),
    "rows of the next tile are stored": Fault(
        "stored = (rows < query_count)[:, None] &",
        "stored = (rows >= 0)[:, None] &",
        ("written", "out of bounds"),
    ),
    "offsets of 32 bits": Fault(
        "wide = gl.cast(rows, gl.int64)",
        "wide = rows * 2**26 // 2**26",
        ("overflows",),
    ),
    "summaries with weights of others": Fault(
        "                tile_bias = summary_bias + tile",
        "                tile_bias = packed_bias",
        ("wrong",),
    ),
    "all heads of one class": Fault(
        "        tile += gl.load(class_of_head + head) * tiles\n",
        "        tile += 0\n",
        ("wrong",),
    ),
    "the accumulator does not decay": Fault(
        "[accumulator, decay]",
        "[accumulator]",
        ("wrong",),
    ),
    "weights by a maximum that is not in use": Fault(
        "scores * scale - highest_now[:, None]",
        "scores * scale - risen[:, None]",
        ("wrong",),
    ),
}
