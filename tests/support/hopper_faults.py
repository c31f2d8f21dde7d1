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
        "init(key_empty.index(slot), count=CONSUMERS)",
        "init(key_empty.index(slot), count=1)",
        ("arrivals", "overwritten", "deadlock"),
    ),
    "values: refill waits for one consumer": Fault(
        "init(value_empty.index(slot), count=CONSUMERS)",
        "init(value_empty.index(slot), count=1)",
        ("arrivals", "overwritten", "deadlock"),
    ),
    "queries: refill waits for one consumer": Fault(
        "init(query_empty, count=CONSUMERS)",
        "init(query_empty, count=1)",
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
        "(published & 1) ^ 1",
        "published & 1",
        ("deadlock",),
    ),
    "keys: wrong parity": Fault(
        "mbarrier.wait(key_full.index(next_slot), ((step + 1) // STAGES) & 1)",
        "mbarrier.wait(key_full.index(next_slot), (step // STAGES) & 1)",
        ("loaded", "deadlock", "overwritten", "wrong"),
    ),
    "values are not awaited": Fault(
        "    mbarrier.wait(value_full.index(slot), (step // STAGES) & 1)\n    pending",
        "    pending",
        ("loaded", "wrong"),
    ),
    "keys are released too early": Fault(
        (
            "        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))\n"
            "        mbarrier.arrive(key_empty.index(slot), count=1)\n"
        ),
        (
            "        mbarrier.arrive(key_empty.index(slot), count=1)\n"
            "        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))\n"
        ),
        ("overwritten",),
    ),
    "values are released too early": Fault(
        (
            "    accumulator, next_weights, decay, total = warpgroup_mma_wait(\n"
            "        num_outstanding=0, deps=(pending_output, next_weights, decay, total)\n"
            "    )\n"
            "    mbarrier.arrive(value_empty.index(slot), count=1)\n"
        ),
        (
            "    mbarrier.arrive(value_empty.index(slot), count=1)\n"
            "    accumulator, next_weights, decay, total = warpgroup_mma_wait(\n"
            "        num_outstanding=0, deps=(pending_output, next_weights, decay, total)\n"
            "    )\n"
        ),
        ("overwritten",),
    ),
    "values are never released": Fault(
        "    mbarrier.arrive(value_empty.index(slot), count=1)\n    accumulator = accumulator *",
        "    accumulator = accumulator *",
        ("deadlock",),
    ),
    "queries are released too early": Fault(
        "        # Queries are not read any more",
        "        mbarrier.arrive(query_empty, count=1)\n        # Queries",
        ("arrivals", "overwritten", "deadlock"),
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
        "async_copy.wait_group(0)",
        "async_copy.wait_group(1)",
        ("loaded", "without a fence", "without waiting"),
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
        "    _publish(items, item_slot, ONE)\n",
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
    "summaries without their weight": Fault(
        "bias = gl.load(summary_bias + tile + columns)",
        "bias = bias",
        ("wrong",),
    ),
    "all heads of one class": Fault(
        "        tile += gl.load(class_of_head + head) * tiles\n",
        "        tile += 0\n",
        ("wrong",),
    ),
    "the accumulator does not decay": Fault(
        "accumulator * gl.convert_layout(decay",
        "accumulator + 0 * gl.convert_layout(decay",
        ("wrong",),
    ),
}
