"""Plans: spans, tiles, summaries and the figures read off them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from cases import plans
from hypothesis import given

from grat_kernels import Block, Choice, CrissCross, Far, Full, Grid, Grouping, Pattern, Plan, Span, Union, build_plan
from grat_kernels.analysis import reach, tile_efficiency
from grat_kernels.geometry import cell_sizes

FLUX_8K = Grouping(Grid((512, 512)), (16, 16))
HUNYUAN_720P = Grouping(Grid((33, 45, 80)), (4, 8, 8))


def positions_of_group(plan: Plan, group: int) -> set[int]:
    """Positions in the joint sequence of a group's tokens, straight from coordinates."""
    raster = np.stack(np.unravel_index(plan.order, plan.grouping.grid.shape), axis=1)
    inside = (raster // np.asarray(plan.grouping.group) == plan.grouping.coordinates[group]).all(1)
    return set((np.flatnonzero(inside) + plan.image_start).tolist())


@given(plans(max_tokens=150))
def test_spans_cover_exactly_the_attended_groups_and_text(plan: Plan) -> None:
    dense = set(range(plan.image_start)) | set(range(plan.image_stop, plan.tokens))
    coordinates = [tuple(row) for row in plan.grouping.coordinates.tolist()]
    members = [positions_of_group(plan, group) for group in range(len(coordinates))]
    for group, a in enumerate(coordinates):
        attended, summarised = set(dense), set()
        for other, b in enumerate(coordinates):
            level = plan.pattern.level(a, b, plan.grouping.counts)
            if level == 0:
                attended |= members[other]
            elif level > 0:
                number = plan.summaries.blocks.index(plan.pattern.far_levels[level - 1].block) + 1
                summarised |= {(number, position) for position in members[other]}
        spans = plan.spans(group)
        exact = [position for span in spans if span.level == 0 for position in range(span.start, span.stop)]
        assert sorted(exact) == sorted(attended)
        far = [(span.level, position) for span in spans if span.level for position in tokens_behind(plan, span)]
        assert sorted(far) == sorted(summarised)


def tokens_behind(plan: Plan, span: Span) -> list[int]:
    rows = range(
        plan.summaries.offsets[span.level - 1] + span.start, plan.summaries.offsets[span.level - 1] + span.stop
    )
    starts, counts = plan.summaries.starts, plan.summaries.counts
    return [position for row in rows for position in range(starts[row], starts[row] + counts[row])]


@given(plans())
def test_spans_are_merged_sorted_and_disjoint(plan: Plan) -> None:
    for group in range(len(plan.grouping.sizes)):
        spans = plan.spans(group)
        for left, right in itertools.pairwise(spans):
            assert left.level < right.level or left.stop < right.start


@given(plans())
def test_query_runs_cover_the_sequence_once(plan: Plan) -> None:
    position = 0
    for run in plan.query_runs:
        assert run.start == position
        position += run.length
    assert position == plan.tokens


@given(plans())
def test_summaries_are_the_blocks_of_each_level_in_token_order(plan: Plan) -> None:
    assert plan.summaries.blocks == tuple(dict.fromkeys(level.block for level in plan.pattern.far_levels))
    for number, block in enumerate(plan.summaries.blocks):
        rows = slice(plan.summaries.offsets[number], plan.summaries.offsets[number + 1])
        starts, counts = plan.summaries.starts[rows], plan.summaries.counts[rows]
        assert starts[0] == plan.image_start
        np.testing.assert_array_equal(starts[1:], (starts + counts)[:-1])
        assert sorted(counts.tolist()) == sorted(cell_sizes(plan.grouping.grid, block).tolist())


# Densities, ideal speed-ups and tile efficiencies counted by an independent script (one group at a time).
@pytest.mark.parametrize(
    ("grouping", "pattern", "text_len", "density", "efficiency"),
    [
        (FLUX_8K, CrissCross(1), 512, 0.0652, 1.00),
        (FLUX_8K, Block(1), 512, 0.0123, 1.00),
        (FLUX_8K, Block(2), 512, 0.0264, 1.00),
        (FLUX_8K, Union(Block(1), Far([(1, (8, 8))])), 512, 0.028, 1.00),
        (FLUX_8K, Union(Block(1), Far([(1, (4, 4)), (3, (16, 16))])), 512, 0.018, 0.99),
        (HUNYUAN_720P, CrissCross(1), 256, 0.345, 0.92),
        (HUNYUAN_720P, CrissCross(2), 256, 0.049, 0.93),
        (HUNYUAN_720P, Block(1), 256, 0.047, 0.94),
        (HUNYUAN_720P, Union(Block(1), Far([(1, (4, 4, 4))])), 256, 0.064, 0.93),
    ],
)
def test_published_sizes_have_the_known_figures(
    grouping: Grouping, pattern: Pattern, text_len: int, density: float, efficiency: float
) -> None:
    plan = build_plan(grouping, pattern, text_len, grouping is FLUX_8K)
    assert plan.density == pytest.approx(density, abs=5e-4)
    assert plan.ideal_speedup == pytest.approx(1 / plan.density)
    assert tile_efficiency(plan) == pytest.approx(efficiency, abs=6e-3)


def test_density_counts_text_rows_and_columns() -> None:
    plan = build_plan(Grouping(Grid((4, 4)), (2, 2)), Block(0), 3, True)
    assert plan.attended_pairs == 16 * (4 + 3) + 3 * 19
    assert build_plan(Grouping(Grid((5, 7)), (2, 3)), Full(), 3).density == 1.0


def test_full_attention_is_one_span_and_one_run() -> None:
    plan = build_plan(Grouping(Grid((20, 27)), (8, 8)), Full(), 24, False)
    assert plan.spans(0) == (Span(0, 20 * 27 + 24, 0),)
    assert len(plan.query_runs) == 1


def test_a_group_row_of_criss_cross_is_one_span() -> None:
    plan = build_plan(FLUX_8K, CrissCross(1), 512, True)
    # Group 40 lies in row 1, column 8: text, 31 groups of its column, and its row merged into one span.
    assert sorted(span.length for span in plan.spans(40)) == [256] * 31 + [512, 512 * 16]


def test_reach_is_the_farthest_token_attended_exactly() -> None:
    plan = build_plan(Grouping(Grid((12, 12)), (4, 4)), Block(1), 0)
    distances = [
        np.hypot(*(np.subtract(a, b)))
        for a in np.ndindex(12, 12)
        for b in np.ndindex(12, 12)
        if all(abs(x // 4 - y // 4) <= 1 for x, y in zip(a, b, strict=True))
    ]
    assert reach(plan) == pytest.approx(max(distances))


def choosing(exact: int, fine: int, block: tuple[int, ...] = (4, 4)) -> Pattern:
    return Union(Block(0), Far([(0, block)], Choice(exact, fine, tuple(size // 2 for size in block))))


@pytest.mark.parametrize(
    ("grouping", "pattern", "text_len", "density"),
    # Counted by hand: text rows attend all, groups the text, their own tokens and what they choose, to which selection
    # is added: half a pair for each mean and group, and the products of values on 64 channels.
    [
        (Grouping(Grid((32, 32)), (4, 4)), choosing(8, 32), 24, 0.3288),
        (Grouping(Grid((128, 128)), (16, 16)), choosing(16, 64, (8, 8)), 24, 0.1070),
        (Grouping(Grid((8, 16, 16)), (4, 8, 8)), choosing(2, 4, (2, 4, 4)), 16, 0.2097),
    ],
)
def test_choices_have_the_known_densities(grouping: Grouping, pattern: Pattern, text_len: int, density: float) -> None:
    assert build_plan(grouping, pattern, text_len).density == pytest.approx(density, abs=5e-5)


def test_tile_efficiency_of_choices_counts_tiles_of_what_is_chosen() -> None:
    # Groups of 64 attend 6 + 64 tokens by their lists, and by choice 2 · 16 + 3 · 4 + 7 = 51: in tiles of 32 keys
    # that is 96 and 64. Six rows of text attend 262 tokens, 288 in tiles.
    plan = build_plan(Grouping(Grid((16, 16)), (8, 8)), choosing(2, 3), 6)
    computed = 4 * 64 * (70 + 51) + 6 * 262
    assert plan.parts.pairs + plan.parts.text == computed
    assert tile_efficiency(plan, 64, 32) == computed / (4 * 64 * (96 + 64) + 64 * 288)
    assert tile_efficiency(plan, 1, 1) == 1


def test_reach_of_choices_is_that_of_what_may_be_chosen() -> None:
    grouping = Grouping(Grid((12, 20)), (4, 4))
    chosen, finer = (
        build_plan(grouping, Union(Block(1), Far([(0, (4, 4))], Choice(exact, 3, (2, 2))))) for exact in (3, 0)
    )
    assert reach(chosen) == math.hypot(11, 19)
    assert reach(finer) == reach(build_plan(grouping, Block(1)))


def test_equal_requests_share_one_plan() -> None:
    grouping = Grouping(Grid((8, 8)), (4, 4))
    assert build_plan(grouping, Block(1), 4, True) is build_plan(Grouping(Grid((8, 8)), (4, 4)), Block(1), 4, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_plan(Grouping(Grid((8, 8)), (4, 4)), CrissCross(3)), "axes"),
        (lambda: build_plan(Grouping(Grid((8, 8)), (4, 4)), Union(Block(1), Far([(1, (3, 3))]))), "do not nest"),
        (lambda: build_plan(Grouping(Grid((8, 8)), (4, 4)), Union(Block(1), Far([(1, (8, 8))]))), "do not nest"),
        (lambda: build_plan(Grouping(Grid((8, 8)), (4, 4)), Far([(1, (2, 2))])), "nothing to attend"),
        (lambda: build_plan(Grouping(Grid((8, 8)), (4, 4)), Full(), -1), "negative"),
        (lambda: build_plan(Grouping(Grid((8, 8)), (4, 4)), choosing(1, 1, (8, 8))), "do not nest"),
        (lambda: build_plan(Grouping(Grid((8, 8)), (4, 4)), Far([(0, (4, 4))], (1, 1, (2, 2)))), "nothing to attend"),
        (lambda: build_plan(Grouping(Grid((8, 8)), (4, 4)), choosing(1, 1, (2, 2, 2))), "axes"),
        (lambda: build_plan(Grouping(Grid((400, 400)), (4, 4)), choosing(1, 1)), "10,000 groups .* use larger ones"),
    ],
)
def test_impossible_plans_are_refused_in_words(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_work_by_part_splits_runs_over_image_and_text_and_forming_is_half_a_pair_a_token_and_level() -> None:
    grouping = Grouping(Grid((8, 8)), (4, 4), ((4, 4), (2, 2)))
    full = build_plan(grouping, Full(), text_len=5)
    assert full.parts == (64 * 69, 5 * 69, 0, 0)
    far = build_plan(grouping, Union(Block(0), Far(((0, (2, 2)), (1, (4, 4))))), text_len=5)
    assert far.parts.text == 5 * 69
    assert sum(far.parts[:3]) == far.attended_pairs
    assert far.parts.forming == 2 * 64 / 2
