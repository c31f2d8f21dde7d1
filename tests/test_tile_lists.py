"""The kernel's work lists against the plan they come from."""

from __future__ import annotations

import numpy as np
from cases import plans
from hypothesis import given
from hypothesis import strategies as st

from grat_kernels import Block, Full, Grid, Grouping, Plan, build_plan
from grat_kernels.tile_lists import TileLists, build_tile_lists, tile_efficiency

block_sizes = st.sampled_from([(16, 32, 8), (8, 16, 16), (64, 64, 32)])


def covered(plan: Plan, lists: TileLists) -> np.ndarray:
    """How often the tiles compute each pair of a query and a key, `[N, N + R]`, tokens before summaries."""
    count = np.zeros((plan.tokens, plan.tokens + plan.summaries.rows), np.int64)
    for first_query, queries, begin, full_end, full_summary_end, partial_end, end in lists.query_tiles.tolist():
        for index in range(begin, end):
            first, keys = lists.key_tiles[index].tolist()
            of_summaries = full_end <= index < full_summary_end or partial_end <= index < end
            first += plan.tokens if of_summaries else 0
            count[first_query : first_query + queries, first : first + keys] += 1
    return count


def attended(plan: Plan) -> np.ndarray:
    """Whether each pair is attended, `[N, N + R]`, from the plan's spans."""
    mask = np.zeros((plan.tokens, plan.tokens + plan.summaries.rows), np.int64)
    for run in plan.query_runs:
        for span in plan.span_lists[run.span_list]:
            offset = 0 if span.level == 0 else plan.tokens + plan.summaries.offsets[span.level - 1]
            mask[run.start : run.start + run.length, offset + span.start : offset + span.stop] = 1
    return mask


@given(plan=plans(max_tokens=150), sizes=block_sizes, mask_text=st.booleans())
def test_tiles_cover_what_is_attended_once(plan: Plan, sizes: tuple[int, int, int], mask_text: bool) -> None:
    lists = build_tile_lists(plan, *sizes, mask_text=mask_text)
    np.testing.assert_array_equal(covered(plan, lists), attended(plan))


@given(plan=plans(max_tokens=150), sizes=block_sizes, mask_text=st.booleans())
def test_full_tiles_are_full_and_free_of_text_to_mask(plan: Plan, sizes: tuple[int, int, int], mask_text: bool) -> None:
    block_m, block_n, block_tail = sizes
    lists = build_tile_lists(plan, block_m, block_n, block_tail, mask_text=mask_text)
    assert (lists.query_tiles[:, 1] >= 1).all()
    assert (lists.query_tiles[:, 1] <= block_m).all()
    assert (np.diff(lists.query_tiles[:, 2:], axis=1) >= 0).all()
    for begin, full_end, full_summary_end, _, end in lists.query_tiles[:, 2:].tolist():
        assert (lists.key_tiles[begin:full_summary_end, 1] == block_n).all()
        assert (lists.key_tiles[full_summary_end:end, 1] >= 1).all()
        assert (lists.key_tiles[full_summary_end:end, 1] <= block_tail).all()
        if mask_text:
            full = lists.key_tiles[begin:full_end]
            assert not ((full[:, 0] < plan.text_start + plan.text_len) & (full.sum(1) > plan.text_start)).any()
    # The kernel reads one entry ahead.
    assert lists.query_tiles[:, 2:].max() < len(lists.key_tiles)


def test_text_tiles_lead_only_where_text_attends_more() -> None:
    grouping = Grouping(Grid((40, 40)), (8, 8))
    for text_first in (True, False):
        lists = build_tile_lists(build_plan(grouping, Block(0), 70, text_first), 32, 32, 16, mask_text=False)
        assert lists.leading == 3
        text_start = 0 if text_first else 1600
        np.testing.assert_array_equal(
            lists.query_tiles[:3, :2], [[text_start, 32], [text_start + 32, 32], [text_start + 64, 6]]
        )
        assert (np.diff(lists.query_tiles[3:, 0]) > 0).all()
    assert build_tile_lists(build_plan(grouping, Full(), 70), 32, 32, 16, mask_text=False).leading == 0


def test_tile_efficiency_counts_what_is_computed_in_vain() -> None:
    whole = build_plan(Grouping(Grid((32, 32)), (16, 16)), Block(0), 0)
    assert tile_efficiency(whole, 64, 64, 32) == 1
    # Groups of 9 queries in tiles of 16, which attend 9 keys: a tile of 8 and one that holds one key of 8.
    ragged = build_plan(Grouping(Grid((6, 6)), (3, 3)), Block(0), 0)
    assert tile_efficiency(ragged, 16, 32, 8) == (9 * 9) / (16 * 16)
