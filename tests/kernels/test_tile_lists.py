"""The kernel's work lists against the plan they come from."""

from __future__ import annotations

import itertools
import math

import numpy as np
from cases import groupings, patterns, plans
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_cases import CHOOSING_BY_HEAD

from grat_kernels import Block, Full, Grid, Grouping, Plan, build_head_plan, build_plan
from grat_kernels.analysis import tile_efficiency
from grat_kernels.geometry import nests
from grat_kernels.tile_lists import EMPTY, TileLists, build_tile_lists, chosen_tiles_of_group

BLOCK_N = 16
block_sizes = st.sampled_from([(16, 8), (8, 16), (64, 32)])


def covered(plan: Plan, lists: TileLists, query_tiles: np.ndarray) -> np.ndarray:
    """How often the tiles compute each pair of a query and a key, `[N, N + R]`, tokens before summaries."""
    count = np.zeros((plan.tokens, plan.tokens + plan.summaries.rows), np.int64)
    for first_query, queries, begin, full_end, full_summary_end, end in query_tiles.tolist():
        rows = slice(first_query, first_query + queries)
        for index in range(begin, full_summary_end):
            first = lists.key_tiles[index] + (plan.tokens if index >= full_end else 0)
            count[rows, first : first + BLOCK_N] += 1
        for index in range(full_summary_end, end):
            for packed in lists.packed_rows[lists.key_tiles[index]].tolist():
                if packed != EMPTY:
                    count[rows, packed] += 1
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
def test_tiles_cover_what_is_attended_once(plan: Plan, sizes: tuple[int, int], mask_text: bool) -> None:
    block_m, block_tail = sizes
    lists = build_tile_lists(plan, block_m, BLOCK_N, block_tail, mask_text=mask_text)
    np.testing.assert_array_equal(covered(plan, lists, lists.query_tiles), attended(plan))


@given(data=st.data(), sizes=block_sizes, mask_text=st.booleans())
def test_each_head_class_is_covered_by_its_own_tiles(
    data: st.DataObject, sizes: tuple[int, int], mask_text: bool
) -> None:
    grouping = data.draw(groupings(150))
    chosen = data.draw(st.lists(patterns(grouping), min_size=2, max_size=3))
    blocks = sorted({level.block for pattern in chosen for level in pattern.far_levels}, key=math.prod)
    assume(all(nests(inner, outer) for inner, outer in itertools.pairwise(blocks)))
    classes = tuple((grouping, pattern) for pattern in chosen)
    plan = build_head_plan(classes, tuple(range(len(classes))), data.draw(st.sampled_from([0, 7])))
    block_m, block_tail = sizes
    lists = build_tile_lists(plan, block_m, BLOCK_N, block_tail, mask_text=mask_text)
    for number, tiles in enumerate(np.split(lists.query_tiles, len(classes))):
        np.testing.assert_array_equal(covered(plan.classes[number], lists, tiles), attended(plan.classes[number]))


@given(plan=plans(max_tokens=150), sizes=block_sizes, mask_text=st.booleans())
def test_full_tiles_are_free_of_text_to_mask(plan: Plan, sizes: tuple[int, int], mask_text: bool) -> None:
    block_m, block_tail = sizes
    lists = build_tile_lists(plan, block_m, BLOCK_N, block_tail, mask_text=mask_text)
    assert (lists.query_tiles[:, 1] >= 1).all()
    assert (lists.query_tiles[:, 1] <= block_m).all()
    assert (np.diff(lists.query_tiles[:, 2:], axis=1) >= 0).all()
    for begin, full_end in lists.query_tiles[:, 2:4].tolist():
        if mask_text and plan.text_len:
            full = lists.key_tiles[begin:full_end]
            assert not ((full < plan.text_start + plan.text_len) & (full + BLOCK_N > plan.text_start)).any()
    # The kernel reads one entry ahead.
    assert lists.query_tiles[:, 2:].max() < len(lists.key_tiles)


@given(plan=plans(max_tokens=150), mask_text=st.booleans())
def test_only_the_last_packed_tile_of_a_list_has_empty_slots(plan: Plan, mask_text: bool) -> None:
    lists = build_tile_lists(plan, 16, BLOCK_N, 8, mask_text=mask_text)
    for full_summary_end, end in lists.query_tiles[:, 4:].tolist():
        for index in range(full_summary_end, end):
            empty = (lists.packed_rows[lists.key_tiles[index]] == EMPTY).sum()
            assert empty == 0 if index < end - 1 else empty < 8


def test_text_tiles_lead() -> None:
    grouping = Grouping(Grid((40, 40)), (8, 8))
    for pattern in (Block(0), Full()):
        for text_first in (True, False):
            lists = build_tile_lists(build_plan(grouping, pattern, 70, text_first), 32, 32, 16, mask_text=False)
            assert lists.leading == 3
            text_start = 0 if text_first else 1600
            np.testing.assert_array_equal(
                lists.query_tiles[:3, :2], [[text_start, 32], [text_start + 32, 32], [text_start + 64, 6]]
            )
            assert (np.diff(lists.query_tiles[3:, 0]) > 0).all()


def test_chosen_tiles_follow_the_groups_of_each_class() -> None:
    plan = CHOOSING_BY_HEAD
    block_m, block_tail = 8, 16
    lists = build_tile_lists(plan, block_m, BLOCK_N, block_tail, mask_text=False)
    assert lists.chosen_tiles is not None
    for member, tiles, chosen in zip(
        plan.classes, np.split(lists.query_tiles, 3), np.split(lists.chosen_tiles, 3), strict=True
    ):
        per_group = chosen_tiles_of_group(member, block_tail)
        assert per_group * block_tail >= (member.candidates.width if member.candidates else 0)
        assert bool(per_group) == member.chooses
        starts = plan.image_start + np.append(np.sort(member.grouping.starts), plan.image_tokens)
        for (first, queries, *_), bounds in zip(tiles.tolist(), chosen.tolist(), strict=True):
            group = np.searchsorted(starts, first, side="right") - 1
            if not queries or not plan.image_start <= first < plan.image_stop:
                assert bounds[0] == bounds[1]
                continue
            assert first + queries <= starts[group + 1]
            assert bounds == [group * per_group, (group + 1) * per_group]
    assert build_tile_lists(plan.classes[1], block_m, BLOCK_N, block_tail, mask_text=False).chosen_tiles is None


def test_tile_efficiency_counts_what_is_computed_in_vain() -> None:
    whole = build_plan(Grouping(Grid((32, 32)), (16, 16)), Block(0), 0)
    assert tile_efficiency(whole, 64, 64, 32) == 1
    # Groups of 9 queries in tiles of 16, which attend 9 keys: a packed tile of 8 and one that holds one key of 8.
    ragged = build_plan(Grouping(Grid((6, 6)), (3, 3)), Block(0), 0)
    assert tile_efficiency(ragged, 16, 32, 8) == (9 * 9) / (16 * 16)


@given(plan=plans(max_tokens=150), sizes=block_sizes)
def test_tile_efficiency_is_that_of_the_lists(plan: Plan, sizes: tuple[int, int]) -> None:
    block_m, block_tail = sizes
    lists = build_tile_lists(plan, block_m, BLOCK_N, block_tail, mask_text=False)
    begin, _, full_summary_end, end = lists.query_tiles[:, 2:].T.astype(np.int64)
    keys = (full_summary_end - begin) * BLOCK_N + (end - full_summary_end) * block_tail
    # Lists cut queries where they meet the text, which may take one tile more than the plan's runs.
    assert tile_efficiency(plan, block_m, BLOCK_N, block_tail) >= plan.attended_pairs / (block_m * int(keys.sum()))
