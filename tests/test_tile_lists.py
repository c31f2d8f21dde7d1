"""Work lists of the span kernel: every attended pair once, text first."""

from __future__ import annotations

import numpy as np
from cases import plans
from hypothesis import given
from hypothesis import strategies as st

from grat_kernels import Block, Grid, Grouping, Plan, build_plan
from grat_kernels.tile_lists import build_tile_lists


@given(plans(), st.sampled_from([(16, 8, 8), (32, 16, 4), (128, 128, 32)]), st.booleans())
def test_tiles_compute_every_attended_pair_once(plan: Plan, blocks: tuple[int, int, int], mask_text: bool) -> None:
    block_m, block_n, block_tail = blocks
    tiles = build_tile_lists(plan, *blocks, mask_text=mask_text)
    assert (tiles.query_tiles[:, 1] <= block_m).all()
    text = set(range(plan.text_start, plan.text_start + plan.text_len))
    summary_offsets = (0, *plan.summaries.offsets)
    list_of_query = {}
    for run in plan.query_runs:
        list_of_query.update(dict.fromkeys(range(run.start, run.start + run.length), run.span_list))
    seen: list[int] = []
    for first, queries, *bounds in tiles.query_tiles.tolist():
        seen += range(first, first + queries)
        keys: list[tuple[bool, int]] = []
        stretches = zip(bounds, bounds[1:], (False, True, False, True), (False, False, True, True), strict=False)
        for begin, end, of_summaries, partial in stretches:
            assert begin <= end < len(tiles.key_tiles)
            for start, length in tiles.key_tiles[begin:end].tolist():
                assert length <= block_tail if partial else length == block_n
                if mask_text and not partial and not of_summaries:
                    assert not text & set(range(start, start + length))
                keys += [(of_summaries, key) for key in range(start, start + length)]
        (span_list,) = {list_of_query[query] for query in range(first, first + queries)}
        expected = [
            (span.level > 0, summary_offsets[span.level] + key)
            for span in plan.span_lists[span_list]
            for key in range(span.start, span.stop)
        ]
        assert sorted(keys) == sorted(expected)
    assert sorted(seen) == list(range(plan.tokens))


def test_text_tiles_come_first_because_each_is_as_long_as_the_sequence() -> None:
    before = build_plan(Grouping(Grid((512, 512)), (16, 16)), Block(1), 512, True)
    tiles = build_tile_lists(before, 128, 128, 32, mask_text=False)
    assert tiles.leading == 4
    assert tiles.query_tiles[:4, 0].tolist() == [0, 128, 256, 384]
    after = build_plan(Grouping(Grid((33, 45, 80)), (4, 8, 8)), Block(1), 256, False)
    tiles = build_tile_lists(after, 128, 128, 32, mask_text=False)
    assert tiles.leading == 2
    assert tiles.query_tiles[:2, 0].tolist() == [33 * 45 * 80, 33 * 45 * 80 + 128]
    assert (np.diff(tiles.query_tiles[2:, 0]) > 0).all()
