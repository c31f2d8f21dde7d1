"""Ways to break the Gluon kernel, each of which the simulator must see."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """Some lines of the kernel, what stands there instead, and what complaints may follow."""

    lines: str
    instead: str
    complaints: tuple[str, ...]


# In what both architectures run.
SHARED_FAULTS = {
    "refill does not wait": Fault(
        "    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)\n    mbarrier.expect",
        "    mbarrier.expect",
        ("overwritten", "arrivals", "deadlock"),
    ),
    "packed refill does not wait": Fault(
        "    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)\n    for",
        "    for",
        ("overwritten", "arrivals", "deadlock", "without a fence"),
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
    "queries of the next item are not awaited": Fault(
        "        mbarrier.wait(query_full.index(query_slot), (taken // QUERY_STAGES) & 1)\n",
        "",
        ("loaded", "deadlock", "wrong", "written", "arrivals"),
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
    "the end is not published": Fault(
        "    publish_work(work_slots, slot, (0, 0, 0, 0, 0, 0, 0, 0))\n",
        "",
        ("deadlock", "wrong", "written"),
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
        "                    tile_bias = summary_bias + tile",
        "                    tile_bias = packed_bias",
        ("wrong",),
    ),
    "all heads of one class": Fault(
        "        tile += gl.load(class_of_head + head) * tiles\n",
        "        tile += 0\n",
        ("wrong",),
    ),
}

HOPPER_FAULTS = {
    "refill waits for one consumer": Fault(
        "1 if TENSOR_MEMORY else CONSUMERS",
        "1",
        ("arrivals", "overwritten", "deadlock"),
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
            "        queries_of_item, _bounds, _padding_start = read_work(work_slots, query_slot, CONSUMER_WARPS)\n"
            "        mbarrier.arrive(query_empty.index(query_slot), count=1)\n"
        ),
        (
            "        mbarrier.arrive(query_empty.index(query_slot), count=1)\n"
            "        queries_of_item, _bounds, _padding_start = read_work(work_slots, query_slot, CONSUMER_WARPS)\n"
        ),
        ("written", "wrong"),
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
    "nobody begins": Fault(
        "        mbarrier.arrive(turns.index(0), count=1)\n",
        "",
        ("deadlock",),
    ),
    "the turn stays": Fault(
        "mbarrier.arrive(turns.index(1 - WHICH), count=1)",
        "mbarrier.arrive(turns.index(WHICH), count=1)",
        ("deadlock", "arrivals"),
    ),
    "a step is not counted": Fault(
        "        step += 1\n\n        store_queries",
        "        store_queries",
        ("deadlock", "loaded", "arrivals", "wrong"),
    ),
    "the accumulator does not decay": Fault(
        "[accumulator, decay]",
        "[accumulator]",
        ("wrong",),
    ),
    "weights by a maximum that is not in use": Fault(
        "gl.exp2(scores * scale - highest_now[:, None])",
        "gl.exp2(scores * scale - gl.maximum(highest, gl.max(scores, 1) * scale)[:, None])",
        ("wrong",),
    ),
}

BLACKWELL_FAULTS = {
    "scores are not awaited": Fault(
        "    mbarrier.wait(scores_ready.index(WHICH), step & 1)\n",
        "",
        ("used while", "wrong", "deadlock"),
    ),
    "weights are not awaited": Fault(
        "    mbarrier.wait(weights_ready.index(WHICH), step & 1)\n",
        "",
        ("used while", "wrong", "deadlock"),
    ),
    "weights are never said to be there": Fault(
        "    mbarrier.arrive(weights_ready.index(WHICH), count=1)\n    return",
        "    return",
        ("deadlock",),
    ),
    "weights are said to be there before the output is rescaled": Fault(
        "    if gl.min(gl.convert_layout(decay, EVERY_WARP), 0) < 1.0:\n",
        (
            "    mbarrier.arrive(weights_ready.index(WHICH), count=1)\n"
            "    if gl.min(gl.convert_layout(decay, EVERY_WARP), 0) < 1.0:\n"
        ),
        ("used while", "arrivals", "wrong", "deadlock"),
    ),
    "keys are released by the first consumer's scores": Fault(
        "    if WHICH == CONSUMERS - 1:\n        tcgen05_commit(key_empty",
        "    if WHICH == 0:\n        tcgen05_commit(key_empty",
        ("overwritten", "loaded", "wrong", "deadlock", "without a fence"),
    ),
    "values are released by the first consumer's output": Fault(
        "    if WHICH == CONSUMERS - 1:\n        tcgen05_commit(value_empty",
        "    if WHICH == 0:\n        tcgen05_commit(value_empty",
        ("overwritten", "loaded", "wrong", "deadlock", "without a fence"),
    ),
    "keys are released by both": Fault(
        "    if WHICH == CONSUMERS - 1:\n        tcgen05_commit(key_empty",
        "    if True:\n        tcgen05_commit(key_empty",
        ("overwritten", "loaded", "arrivals", "wrong", "deadlock", "without a fence"),
    ),
    "values are never released": Fault(
        "    if WHICH == CONSUMERS - 1:\n        tcgen05_commit(value_empty.index(slot))\n",
        "",
        ("deadlock",),
    ),
    "values are not awaited": Fault(
        ("        mbarrier.wait(value_full.index(step % VALUE_STAGES), (step // VALUE_STAGES) & 1)\n        for which"),
        "        for which",
        ("loaded", "wrong", "without a fence"),
    ),
    "keys: wrong parity": Fault(
        "mbarrier.wait(key_full.index((step + 1) % KEY_STAGES), ((step + 1) // KEY_STAGES) & 1)",
        "mbarrier.wait(key_full.index((step + 1) % KEY_STAGES), (step // KEY_STAGES) & 1)",
        ("loaded", "deadlock", "overwritten", "wrong"),
    ),
    "queries are released before their last scores": Fault(
        "tcgen05_commit(query_empty.index(query_slot))",
        "mbarrier.arrive(query_empty.index(query_slot), count=1)",
        ("overwritten",),
    ),
    "a work item is never released": Fault(
        "        mbarrier.arrive(query_empty.index(taken % QUERY_STAGES), count=1)\n",
        "",
        ("deadlock",),
    ),
    "output is not awaited": Fault(
        "        mbarrier.wait(output_ready.index(WHICH), taken & 1)\n",
        "",
        ("used while", "wrong", "under way"),
    ),
    "output is told of before its last values": Fault(
        "            tcgen05_commit(output_ready.index(which))\n",
        "            mbarrier.arrive(output_ready.index(which), count=1)\n",
        ("used while", "under way"),
    ),
    "an item goes on from the output of the one before": Fault(
        "use_acc=goes_on",
        "use_acc=True",
        ("wrong",),
    ),
    "values of the last tile alone": Fault(
        "use_acc=goes_on",
        "use_acc=False",
        ("wrong",),
    ),
    "the output is not rescaled": Fault(
        ", 0) < 1.0:",
        ", 0) < 0.0:",
        ("wrong",),
    ),
    "scores are read after weights are written over them": Fault(
        "gl.exp2(chunks[number] * scale",
        "gl.exp2(place.slice(number * CHUNK, CHUNK).load(LAYOUT) * scale",
        ("wrong",),
    ),
    "weights by a maximum that is not in use": Fault(
        "chunks[number] * scale - highest_now[:, None]",
        "chunks[number] * scale - gl.maximum(highest, reached * scale)[:, None]",
        ("wrong",),
    ),
}

# By architecture.
FAULTS = {"sm_90": SHARED_FAULTS | HOPPER_FAULTS, "sm_100": SHARED_FAULTS | BLACKWELL_FAULTS}
