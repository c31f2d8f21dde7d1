"""Work lists of the span kernel: a plan's spans cut into tiles of keys, its queries into tiles of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from grat_kernels.geometry import IntArray
    from grat_kernels.plan import Plan


class TileLists(NamedTuple):
    """Work lists of the span kernel.

    Attributes:
        query_tiles: `[T, 7]` int32: first query, queries, then five bounds into `key_tiles`: begin of the list, end of
            the full tiles of tokens, of the full tiles of summaries, of the partial tiles of tokens, of the partial
            tiles of summaries. Text tiles come first, because each is as long as the whole sequence, then tiles in
            order of position.
        key_tiles: `[n + 1, 2]` int32: first key and keys of each tile; summaries count rows over all levels. A full
            tile has `block_n` keys, a partial one at most `block_tail`. Shared by all query tiles of one span list;
            one padding entry at the end.
        leading: how many query tiles at the front are text tiles.
    """

    query_tiles: npt.NDArray[np.int32]
    key_tiles: npt.NDArray[np.int32]
    leading: int


def build_tile_lists(plan: Plan, block_m: int, block_n: int, block_tail: int, *, mask_text: bool) -> TileLists:
    """Cuts a plan into tiles.

    Args:
        plan: what attends what.
        block_m: queries per tile.
        block_n: keys per full tile.
        block_tail: most keys of a partial tile: what is left of a span after its full tiles is cut this finely, so
            that ragged spans waste little.
        mask_text: list all text keys in partial tiles, so that a kernel can mask padded text without a mask in its
            main loops.
    """
    spans = _spans(plan, mask_text)
    full_count = np.where(spans.masked, 0, spans.lengths // block_n)
    full_span, full_offset = _cut(full_count, block_n)
    tail_starts, tail_lengths = spans.starts + full_count * block_n, spans.lengths - full_count * block_n
    tail_span, tail_offset = _cut(-(-tail_lengths // block_tail), block_tail)

    span = np.concatenate([full_span, tail_span])
    first = np.concatenate([spans.starts[full_span] + full_offset, tail_starts[tail_span] + tail_offset])
    tail_keys = np.minimum(block_tail, tail_lengths[tail_span] - tail_offset)
    keys = np.concatenate([np.full(len(full_span), block_n), tail_keys])
    # Stretches of a list in this order: full tokens, full summaries, partial tokens, partial summaries.
    partial = np.arange(len(span)) >= len(full_span)
    slot = spans.owners[span] * 4 + partial * 2 + spans.of_summaries[span]
    by_slot = np.argsort(slot, kind="stable")
    key_tiles = np.zeros((len(span) + 1, 2), np.int32)
    key_tiles[:-1, 0] = first[by_slot]
    key_tiles[:-1, 1] = keys[by_slot]
    bounds = np.searchsorted(slot[by_slot], np.arange(len(plan.span_lists) * 4 + 1))
    list_bounds = np.stack([bounds[0:-1:4], bounds[1::4], bounds[2::4], bounds[3::4], bounds[4::4]], axis=1)

    runs = np.asarray(plan.query_runs, np.int64)
    is_text = (runs[:, 0] == plan.text_start) & (runs[:, 1] == plan.text_len)
    runs = np.concatenate([runs[is_text], runs[~is_text]])
    run, offset = _cut(-(-runs[:, 1] // block_m), block_m)
    query_tiles = np.empty((len(run), 7), np.int32)
    query_tiles[:, 0] = runs[run, 0] + offset
    query_tiles[:, 1] = np.minimum(block_m, runs[run, 1] - offset)
    query_tiles[:, 2:] = list_bounds[runs[run, 2]]
    return TileLists(query_tiles, key_tiles, -(-plan.text_len // block_m) if is_text.any() else 0)


def tile_efficiency(plan: Plan, block_m: int, block_n: int, block_tail: int) -> float:
    """Share of the pairs that the tiles compute which are attended; the rest is work on masked keys and queries."""
    lists = build_tile_lists(plan, block_m, block_n, block_tail, mask_text=False)
    begin, _, full_summary_end, _, end = lists.query_tiles[:, 2:].T.astype(np.int64)
    keys = (full_summary_end - begin) * block_n + (end - full_summary_end) * block_tail
    return plan.attended_pairs / (block_m * int(keys.sum()))


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

    # Text lies at one end of the sequence, so what a span of tokens holds besides text is one piece.
    text = np.where(of_summaries, 0, _overlap(starts, lists.lengths, plan.text_start, plan.text_len))
    image_starts = starts + (text if plan.text_first else 0)
    text_starts = starts + (0 if plan.text_first else lists.lengths - text)
    pieces = np.concatenate([lists.lengths - text, text])
    kept = pieces > 0
    return _Spans(
        np.concatenate([image_starts, text_starts])[kept],
        pieces[kept],
        np.tile(owners, 2)[kept],
        np.tile(of_summaries, 2)[kept],
        np.repeat([False, True], len(owners))[kept],
    )


def _overlap(starts: IntArray, lengths: IntArray, start: int, length: int) -> IntArray:
    """How much of each run lies in `start : start + length`."""
    return np.maximum(0, np.minimum(starts + lengths, start + length) - np.maximum(starts, start))


def _cut(counts: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """Pieces of runs: which run each piece is of, and where in it the piece begins, for `counts` pieces per run."""
    run = np.repeat(np.arange(len(counts)), counts)
    return run, (np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
