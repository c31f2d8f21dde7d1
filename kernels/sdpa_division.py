"""A plan divided into dense attention calls, which `grat_kernels.sdpa_parts` makes and merges.

This module is NumPy alone, so that what attention will take is foretold without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from grat_kernels.geometry import IntArray
    from grat_kernels.plan import Plan


# What calls cost besides their pairs of queries and keys, in pairs of one head. Fitted to groups of 2×2 to 16×16 on
# 16×16 to 128×128 tokens, 4 heads of 64 channels, torch 2.13: its kernel is slow where queries are few, results are
# merged query by query, and each call and each key that is copied into another order takes its time.
_PER_KEY, _PER_QUERY, _PER_CALL, _PER_COPIED_KEY = 20, 30, 6000, 48
# The same of the other way, for each key that it gathers.
PER_GATHERED_KEY = 32.0


class Part(NamedTuple):
    """A run of queries that attends a run of keys."""

    queries: slice
    keys: slice


class Ordered(NamedTuple):
    """Parts whose keys are runs in one order.

    Attributes:
        order: runs of positions that are copied one after another, or None: the keys of parts are positions themselves.
        parts: which queries attend which keys.
    """

    order: list[slice] | None
    parts: list[Part]


def divide(plan: Plan, per_gathered_key: float) -> list[Ordered] | None:
    """Divides what queries attend token by token, but for the tokens before and after the image: all attend these.

    Args:
        plan: without a choice.
        per_gathered_key: what the other way, which gathers all keys of each run of queries, costs for each of them
            besides its pairs; in pairs.

    Returns:
        None where all attend all, and where the other way costs less.
    """
    if len(plan.query_runs) == 1:
        return None
    image = slice(plan.image_start, plan.image_stop)
    outside = slice(0, plan.image_start), slice(plan.image_stop, plan.tokens)
    of_outside = [Part(queries, image) for queries in outside if queries.start < queries.stop]
    of_groups = _parts_of_groups(plan)
    cost = len(of_outside) * _PER_QUERY * plan.image_tokens
    for order, parts in of_groups:
        cost += 0 if order is None else _PER_COPIED_KEY * plan.image_tokens
        for part in parts:
            cost += _PER_KEY * (part.keys.stop - part.keys.start) + _PER_CALL
            cost += _PER_QUERY * (part.queries.stop - part.queries.start)
    tokens = plan.span_lists.sums(np.where(plan.span_lists.levels == 0, plan.span_lists.lengths, 0))
    # What all attend is not gathered.
    gathered = sum(int(keys) for run in plan.query_runs if (keys := tokens[run.span_list]) < plan.tokens)
    # It copies all keys too, where summaries have to join them.
    joined = plan.tokens if plan.span_lists.levels.any() else 0
    other = per_gathered_key * gathered + _PER_COPIED_KEY * joined
    return [Ordered(None, of_outside), *of_groups] if cost < other else None


def _parts_of_groups(plan: Plan) -> list[Ordered]:
    """What groups attend of one another, token by token.

    A key group is attended by some runs of query groups that are neighbours along the last axis. All that one such run
    attends is as many parts as it is runs of keys, which depends on the order of keys: of the joint sequence's, and of
    one for each axis in which groups follow one another along it, each run takes the one with the fewest parts.
    """
    ranking = np.argsort(plan.grouping.starts)
    coordinates, sizes = plan.grouping.coordinates[ranking], plan.grouping.sizes[ranking]
    starts = plan.grouping.starts[ranking] + plan.image_start
    begin, end, run, key = _query_runs(coordinates, *_attended_pairs(plan, ranking, starts))

    orders = [np.arange(len(ranking)), *_orders_along_axes(coordinates)]
    ranks = [np.argsort(order) for order in orders]
    counts = [np.bincount(run[first]) for first, _ in (_stretches(run, rank[key]) for rank in ranks)]
    best = np.argmin(counts, axis=0)[run] if len(run) else run

    divided = []
    for number, (order, rank) in enumerate(zip(orders, ranks, strict=True)):
        own = np.flatnonzero(best == number)
        first, last = (own[ends] for ends in _stretches(run[own], rank[key[own]]))
        if not len(first):
            continue
        key_starts, positions = starts, None
        if number > 0:
            key_starts = np.empty_like(starts)
            key_starts[order] = np.cumsum(sizes[order]) - sizes[order]
            positions = _slices(starts[order], (starts + sizes)[order])
        queries = _slices(starts[begin[run[first]]], (starts + sizes)[end[run[first]]])
        keys = _slices(key_starts[key[first]], (key_starts + sizes)[key[last]])
        divided.append(Ordered(positions, [Part(*pair) for pair in zip(queries, keys, strict=True)]))
    return divided


def _attended_pairs(plan: Plan, ranking: IntArray, starts: IntArray) -> tuple[IntArray, IntArray]:
    """All pairs of groups that attend token by token, `[pairs]` each: query groups and key groups.

    Args:
        plan: what attends what.
        ranking: groups in token order, `[groups]`: they are counted in this order.
        starts: their first positions, `[groups]`.
    """
    lists, list_of_group = plan.span_lists, plan.list_of_group[ranking]
    # Each span as a range of groups: what it holds before and after the image is none, as are summaries.
    first = np.searchsorted(starts, lists.starts)
    stop = np.searchsorted(starts, np.minimum(lists.starts + lists.lengths, plan.image_stop))
    groups = np.where(lists.levels == 0, np.maximum(0, stop - first), 0)
    spans_of_list = np.diff(lists.bounds)[list_of_group]
    spans = _ranges(lists.bounds[list_of_group], spans_of_list)
    query = np.repeat(np.repeat(np.arange(len(ranking)), spans_of_list), groups[spans])
    return query, _ranges(first[spans], groups[spans])


def _query_runs(coordinates: IntArray, query: IntArray, key: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Runs of neighbours along the last axis that attend a key group.

    Args:
        coordinates: of groups in token order, `[groups, axes]`.
        query: query group of each pair that attends, `[pairs]`.
        key: its key group.

    Returns:
        First and last group of all distinct runs, `[runs]` each; run and key group of all cases of a run that attends a
        key group, `[cases]` each.
    """
    by_key = np.lexsort((query, key))
    query, key = query[by_key], key[by_key]
    step = np.diff(coordinates, axis=0, prepend=coordinates[:1])
    follows = (step[:, :-1] == 0).all(1) & (step[:, -1] == 1)
    same = (np.diff(key) == 0) & (np.diff(query) == 1) & follows[query[1:]]
    first, last = _ends(same, len(query))
    runs, run = np.unique(query[first] * len(coordinates) + query[last], return_inverse=True)
    return runs // len(coordinates), runs % len(coordinates), run, key[first]


def _orders_along_axes(coordinates: IntArray) -> list[IntArray]:
    """For each axis an order of groups `[groups]` in which they follow one another along it."""
    return [np.lexsort(np.roll(coordinates, -1 - axis, axis=1)[:, ::-1].T) for axis in range(coordinates.shape[1])]


def _stretches(run: IntArray, rank: IntArray) -> tuple[IntArray, IntArray]:
    """Where stretches of one run and of ranks without a gap begin and end, as indices into both."""
    by_run = np.lexsort((rank, run))
    same = (np.diff(run[by_run]) == 0) & (np.diff(rank[by_run]) == 1)
    first, last = _ends(same, len(run))
    return by_run[first], by_run[last]


def _ends(same: npt.NDArray[np.bool_], count: int) -> tuple[IntArray, IntArray]:
    """First and last index of each stretch of `count` items, where `same` tells which go on after the one before."""
    first = np.flatnonzero(np.concatenate([np.ones(min(count, 1), np.bool_), ~same]))
    return first, np.append(first, count)[1:] - 1


def _slices(starts: IntArray, stops: IntArray) -> list[slice]:
    return [slice(*pair) for pair in zip(starts.tolist(), stops.tolist(), strict=True)]


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """All numbers of some ranges, one range after another."""
    first = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return first + np.arange(len(first))
