"""Work lists of the span kernel: a plan's spans cut into tiles of keys, its queries into tiles of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from grat_kernels.geometry import IntArray
    from grat_kernels.plan import HeadPlan, Plan


class TileLists(NamedTuple):
    """Work lists of the span kernels.

    Attributes:
        query_tiles: `[C·T, 6]` int32: first query, queries, then bounds into `key_tiles`: begin of the list, end of the
            full tiles of tokens, end of the full tiles of summaries, end of the list. T tiles for each of C head
            classes; a class with fewer is filled up with tiles of no queries and no keys. Tiles of text and
            the like come first, because each is as long as the whole sequence, then others in order of position.
        key_tiles: `[n + 1]` int32, shared by all query tiles of one span list: the first key of a full tile of tokens,
            the first row of a full tile of summaries (rows counted over all levels), the number of a packed tile.
            One padding entry at the end.
        packed_rows: `[P, block_tail]` int32: what each slot of a packed tile holds: a position in the joint sequence,
            or N + r for row r of the summaries, or `EMPTY`.
        leading: how many query tiles at the front of each class are such tiles.
        chosen_tiles: `[C·T, 2]` int32: where the chosen tiles of each query tile begin and end; counted within a head,
            as of each group and class they are as many. None where nothing is chosen by content.
    """

    query_tiles: npt.NDArray[np.int32]
    key_tiles: npt.NDArray[np.int32]
    packed_rows: npt.NDArray[np.int32]
    leading: int
    chosen_tiles: npt.NDArray[np.int32] | None


EMPTY = -1


def build_tile_lists(
    plan: Plan | HeadPlan, block_m: int, block_n: int, block_tail: int, *, mask_text: bool
) -> TileLists:
    """Cuts a plan into tiles.

    Full tiles are runs of `block_n` keys and need no mask. What they leave over of all spans of a list is gathered,
    one key after another, into packed tiles, so that ragged spans waste next to nothing.

    Args:
        plan: what attends what.
        block_m: queries per tile.
        block_n: keys per full tile.
        block_tail: keys per packed tile.
        mask_text: list all text keys in packed tiles, so that a kernel can mask padded text without a mask in its
            main loops.
    """
    classes = [_class_lists(member, block_m, block_n, block_tail, mask_text=mask_text) for member in plan.classes]
    packed_before = np.cumsum([0, *(len(lists.packed_rows) for lists in classes)])
    key_tiles = [
        lists.key_tiles + np.where(lists.is_packed, packed, 0).astype(np.int32)
        for lists, packed in zip(classes, packed_before[:-1], strict=True)
    ]
    padding = np.zeros(1, np.int32)
    query_tiles = _joined_query_tiles(
        [lists.query_tiles for lists in classes], [len(lists.key_tiles) for lists in classes]
    )
    return TileLists(
        query_tiles,
        np.concatenate([*key_tiles, padding]),
        np.concatenate([lists.packed_rows for lists in classes]),
        _leading(plan, block_m),
        _chosen_tiles(plan, query_tiles, block_tail),
    )


def _joined_query_tiles(classes: list[npt.NDArray[np.int32]], key_tiles: list[int]) -> npt.NDArray[np.int32]:
    """Query tiles of all classes, each filled up to the most of any, with bounds into the joined key tiles."""
    most = max(len(tiles) for tiles in classes)
    joined = np.zeros((len(classes), most, classes[0].shape[1]), np.int32)
    for number, tiles in enumerate(classes):
        joined[number, : len(tiles)] = tiles
        joined[number, : len(tiles), 2:] += sum(key_tiles[:number])
    return joined.reshape(len(classes) * most, -1)


def chosen_tiles_of_group(plan: Plan, block_tail: int) -> int:
    """Tiles that hold what one group chooses, the last one filled up with `EMPTY`; 0 where nothing is chosen."""
    return -(-plan.candidates.width // block_tail) if plan.candidates else 0


def _chosen_tiles(
    plan: Plan | HeadPlan, query_tiles: npt.NDArray[np.int32], block_tail: int
) -> npt.NDArray[np.int32] | None:
    """`TileLists.chosen_tiles` of joined query tiles."""
    if not plan.chooses:
        return None
    ranges = []
    for member, tiles in zip(plan.classes, np.split(query_tiles, len(plan.classes)), strict=True):
        first, count = tiles[:, 0], tiles[:, 1]
        per_group = chosen_tiles_of_group(member, block_tail)
        of_image = (count > 0) & (first >= plan.image_start) & (first < plan.image_stop)
        group = np.searchsorted(np.sort(member.grouping.starts), first - plan.image_start, side="right") - 1
        begin = np.where(of_image, group * per_group, 0)
        ranges.append(np.stack([begin, begin + of_image * per_group], axis=1))
    return np.concatenate(ranges).astype(np.int32)


class _ClassLists(NamedTuple):
    """`TileLists` of one head class, without padding, and which of its key tiles are packed."""

    query_tiles: npt.NDArray[np.int32]
    key_tiles: npt.NDArray[np.int32]
    is_packed: npt.NDArray[np.bool_]
    packed_rows: npt.NDArray[np.int32]


def _class_lists(plan: Plan, block_m: int, block_n: int, block_tail: int, *, mask_text: bool) -> _ClassLists:
    spans = _spans(plan, mask_text)
    full_count = np.where(spans.masked, 0, spans.lengths // block_n)
    full_span, full_offset = _cut(full_count, block_n)
    packed_rows, packed_owner = _pack(plan, spans, full_count * block_n, block_tail)

    # Stretches of a list in this order: full tiles of tokens, full tiles of summaries, packed tiles.
    first = np.concatenate([spans.starts[full_span] + full_offset, np.arange(len(packed_rows))])
    is_packed = np.arange(len(first)) >= len(full_span)
    owner = np.concatenate([spans.owners[full_span], packed_owner])
    kind = np.concatenate([spans.of_summaries[full_span], np.full(len(packed_rows), 2)])
    slot = owner * 3 + kind
    by_slot = np.argsort(slot, kind="stable")
    bounds = np.searchsorted(slot[by_slot], np.arange(len(plan.span_lists) * 3 + 1))
    list_bounds = np.stack([bounds[0:-1:3], bounds[1::3], bounds[2::3], bounds[3::3]], axis=1)
    return _ClassLists(
        _query_tiles(plan, block_m, list_bounds), first[by_slot].astype(np.int32), is_packed[by_slot], packed_rows
    )


def _pack(plan: Plan, spans: _Spans, done: IntArray, size: int) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Packed tiles `[P, size]` of what lies in each span after its first `done` keys, and the list of each tile."""
    by_owner = np.argsort(spans.owners, kind="stable")
    left = (spans.lengths - done)[by_owner]
    start = (spans.starts + done + np.where(spans.of_summaries, plan.tokens, 0))[by_owner]
    keys_of_list = np.bincount(spans.owners[by_owner], weights=left, minlength=len(plan.span_lists)).astype(np.int64)
    tiles_of_list = -(-keys_of_list // size)
    span, offset = _cut(left, 1)
    # A key's slot: where its list's tiles begin, and how many keys of the list come before it.
    list_begin, keys_before = np.cumsum(tiles_of_list) - tiles_of_list, np.cumsum(keys_of_list) - keys_of_list
    owner = spans.owners[by_owner][span]
    slot = (list_begin[owner] * size - keys_before[owner]) + np.arange(len(span))
    rows = np.full(int(tiles_of_list.sum()) * size, EMPTY, np.int32)
    rows[slot] = start[span] + offset
    return rows.reshape(-1, size), np.repeat(np.arange(len(plan.span_lists)), tiles_of_list)


def _query_tiles(plan: Plan, block_m: int, list_bounds: IntArray) -> npt.NDArray[np.int32]:
    """Query tiles `[T, 2 + b]` of one head class, with the b bounds of their lists `[lists, b]`.

    What is no image token comes first, cut from the runs where they meet it.
    """
    starts, lengths, lists = np.asarray(plan.query_runs, np.int64).T
    before, image, after = _parts(starts, lengths, plan.image_start, plan.image_stop)
    runs = np.concatenate([np.stack([*piece, lists], axis=1) for piece in (before, after, image)])
    run, offset = _cut(-(-runs[:, 1] // block_m), block_m)
    tiles = np.empty((len(run), 2 + list_bounds.shape[1]), np.int32)
    tiles[:, 0] = runs[run, 0] + offset
    tiles[:, 1] = np.minimum(block_m, runs[run, 1] - offset)
    tiles[:, 2:] = list_bounds[runs[run, 2]]
    return tiles


class _Spans(NamedTuple):
    """Pieces of all span lists: first key, keys, list, whether of summaries, whether all of it needs a mask."""

    starts: IntArray
    lengths: IntArray
    owners: IntArray
    of_summaries: npt.NDArray[np.bool_]
    masked: npt.NDArray[np.bool_]


def _spans(plan: Plan, mask_text: bool) -> _Spans:
    lists = plan.span_lists
    owners = np.repeat(np.arange(len(lists)), np.diff(lists.bounds))
    of_summaries = lists.levels > 0
    starts = lists.starts + np.asarray((0, *plan.summaries.offsets[:-1]), np.int64)[lists.levels]
    if not mask_text or plan.text_len == 0:
        return _Spans(starts, lists.lengths, owners, of_summaries, np.zeros(len(owners), np.bool_))

    # Rows of summaries are no positions: all of such a span is its first part.
    text = np.where(of_summaries, 0, starts), np.where(of_summaries, 0, lists.lengths)
    before, inside, after = _parts(*text, plan.text_start, plan.text_start + plan.text_len)
    before = np.where(of_summaries, (starts, lists.lengths), before)
    pieces = np.concatenate([before, after, inside], axis=1)
    kept = pieces[1] > 0
    return _Spans(
        pieces[0, kept],
        pieces[1, kept],
        np.tile(owners, 3)[kept],
        np.tile(of_summaries, 3)[kept],
        np.repeat([False, False, True], len(owners))[kept],
    )


def _leading(plan: Plan | HeadPlan, block_m: int) -> int:
    """Query tiles of what is no image token."""
    return -(-plan.image_start // block_m) + -(-(plan.tokens - plan.image_stop) // block_m)


def _parts(starts: IntArray, lengths: IntArray, begin: int, end: int) -> tuple[IntArray, IntArray, IntArray]:
    """Runs of positions cut where they meet `[begin, end)`: starts and lengths `[2, runs]` before, inside, after it."""
    stops = starts + lengths
    bounds = [(starts, np.minimum(stops, begin)), (np.maximum(starts, begin), np.minimum(stops, end))]
    bounds.append((np.maximum(starts, end), stops))
    before, inside, after = (np.stack([first, np.maximum(0, last - first)]) for first, last in bounds)
    return before, inside, after


def _cut(counts: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """Pieces of runs: which run each piece is of, and where in it the piece begins, for `counts` pieces per run."""
    run = np.repeat(np.arange(len(counts)), counts)
    return run, (np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
