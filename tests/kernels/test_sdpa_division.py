"""How the sdpa backend divides plans of large groups into dense calls."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import plans
from hypothesis import given, settings

from grat_kernels import Block, CrissCross, Full, Grid, Grouping, Pattern, Plan, build_plan
from grat_kernels.sdpa_division import divide


@settings(max_examples=60)
@given(plan=plans(max_tokens=200))
def test_every_pair_is_attended_once(plan: Plan) -> None:
    divided = divide(plan, math.inf)
    if divided is None:
        assert len(plan.query_runs) == 1
        return
    shape = plan.tokens, plan.tokens
    expected, found = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for run in plan.query_runs:
        for span in plan.span_lists[run.span_list]:
            if span.level == 0:
                expected[run.start : run.start + run.length, span.start : span.stop] += 1
    for outside in (slice(0, plan.image_start), slice(plan.image_stop, plan.tokens)):
        found[:, outside] += 1
    for order, parts in divided:
        positions = np.concatenate([np.r_[run] for run in order or [slice(0, plan.tokens)]])
        for part in parts:
            found[part.queries, positions[part.keys]] += 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("pattern", "calls"),
    [
        # Each row of groups attends each column's keys in as many rows as are near: one call, of several groups.
        (Block(1), 8 * 8),
        (Block(2), 8 * 8),
        # Rows are a call each; the rest of a column comes in up to two.
        (CrissCross(), 8 + 6 * 8 * 2 + 2 * 8),
    ],
)
def test_neighbours_share_calls(pattern: Pattern, calls: int) -> None:
    divided = divide(build_plan(Grouping(Grid((32, 32)), (4, 4)), pattern), math.inf)
    assert divided is not None
    assert sum(len(parts) for _, parts in divided) == calls


def test_small_groups_and_dense_plans_are_not_divided() -> None:
    small, large = (build_plan(Grouping(Grid((side * 8, side * 8)), (side, side)), Block(1), 64) for side in (4, 16))
    assert divide(small, 32) is None
    assert divide(large, 32) is not None
    assert divide(build_plan(Grouping(Grid((32, 32)), (4, 4)), Full(), 16), math.inf) is None
