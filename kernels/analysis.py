"""What is read off a plan besides its density: how far it looks, and how much of the work in tiles is in vain.

This module is NumPy alone, as `plan` is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from grat_kernels.pattern import query_stretches

if TYPE_CHECKING:
    from grat_kernels.geometry import IntArray
    from grat_kernels.plan import Plan


def reach(plan: Plan) -> float:
    """Largest distance, in tokens on the grid, from a query to an image token that it attends exactly, or that lies
    in a block it may choose to attend exactly."""
    return plan.cached("reach", lambda: _reach(plan))


def _reach(plan: Plan) -> float:
    grouping, coordinates = plan.grouping, plan.grouping.coordinates
    may_choose = plan.candidates is not None and plan.candidates.choice.exact > 0
    squares = []
    for extent, size in zip(grouping.grid.shape, grouping.group, strict=True):
        first = np.arange(0, extent, size, dtype=np.int64)
        last = np.minimum(first + size, extent) - 1
        span = last[:, None] - first[None, :]
        squares.append(np.maximum(span, span.T) ** 2)
    farthest = 0
    for queries in query_stretches(len(coordinates)):
        levels = plan.pattern.levels(coordinates[queries], coordinates, grouping.counts)
        exact = levels >= 0 if may_choose else levels == 0
        # Groups per axis: [Q, counts of axis 0, counts of axis 1, ...], from [Q, counts of one axis] each.
        distance = np.zeros((exact.shape[0], *[1] * grouping.grid.axes), np.int64)
        for axis, square in enumerate(squares):
            shape = [1] * grouping.grid.axes
            shape[axis] = len(square)
            distance = distance + square[coordinates[queries, axis]].reshape(-1, *shape)
        farthest = max(farthest, int(distance.reshape(exact.shape).max(where=exact, initial=0)))
    return math.sqrt(farthest)


def tile_efficiency(plan: Plan, block_m: int = 128, block_n: int = 128, block_tail: int | None = None) -> float:
    """Share of the pairs computed in tiles that are attended; the rest is work on masked keys and queries.

    Args:
        block_m: queries per tile, cut from runs.
        block_n: keys per full tile, cut from spans.
        block_tail: keys per packed tile, which gathers what full tiles leave over; `block_n` by default.
    """
    block_tail = block_tail or block_n
    lists = plan.span_lists
    packed = -(-lists.sums(lists.lengths % block_n) // block_tail)
    keys = lists.sums(lists.lengths // block_n) * block_n + packed * block_tail
    executed = sum(-(-run.length // block_m) * int(keys[run.span_list]) for run in plan.query_runs)
    if plan.candidates is not None:
        chosen = -(-plan.candidates.slots // block_tail) * block_tail
        executed += int(-(-plan.group_sizes // block_m) @ chosen)
    return (plan.parts.pairs + plan.parts.text) / (executed * block_m)


def tokens_behind(plan: Plan) -> IntArray:
    """Tokens that each span list stands for, `[lists]`: keys, for a summary the tokens of its block, and those of
    all blocks that are chosen from."""
    lists, counts = plan.span_lists, np.concatenate([np.zeros(1, np.int64), np.cumsum(plan.summaries.counts)])
    of_tokens = lists.levels == 0
    first = np.asarray(plan.summaries.offsets)[np.where(of_tokens, 0, lists.levels - 1)] + lists.starts
    first = np.where(of_tokens, 0, first)
    summarised = counts[np.where(of_tokens, 0, first + lists.lengths)] - counts[first]
    behind = lists.sums(np.where(of_tokens, lists.lengths, summarised))
    if plan.candidates is not None:
        blocks = plan.summaries.rows_of(plan.candidates.level)
        behind = behind + plan.candidates.of_list @ plan.summaries.counts[blocks]
    return behind
