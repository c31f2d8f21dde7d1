"""How the sdpa backend divides plans of large groups into dense calls."""

from __future__ import annotations

import numpy as np
import pytest
from cases import plans
from hypothesis import given, settings

from grat_kernels import Block, CrissCross, Far, Full, Grid, Grouping, Pattern, Plan, Union, build_plan
from grat_kernels.sdpa_division import divide


@settings(max_examples=60)
@given(plan=plans(max_tokens=200))
def test_every_pair_is_attended_once(plan: Plan) -> None:
    divided = divide(plan, 0)
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
    divided = divide(build_plan(Grouping(Grid((32, 32)), (4, 4)), pattern), 0)
    assert divided is not None
    assert sum(len(parts) for _, parts in divided) == calls


def test_small_groups_and_dense_plans_are_not_divided() -> None:
    grouping = Grouping(Grid((32, 32)), (4, 4))
    near = build_plan(grouping, Union(Block(1), Far([(1, (2, 2))])))
    assert divide(near, 1000) is not None
    assert divide(near, 4096) is None
    assert divide(build_plan(grouping, Full(), 16), 0) is None
