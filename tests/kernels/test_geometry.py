"""Grids, groups and token order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_kernels import Grid, Grouping
from grat_kernels.geometry import cell_counts, cell_sizes, nests


@st.composite
def nested_groupings(draw: st.DrawFn) -> Grouping:
    axes = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 14)) for _ in range(axes))
    cells = [tuple(draw(st.integers(1, 4)) for _ in range(axes))]
    for _ in range(draw(st.integers(0, 2))):
        cells.insert(0, tuple(size * draw(st.integers(1, 3)) for size in cells[0]))
    return Grouping(Grid(shape), draw(st.sampled_from(cells)), tuple(cells))


@given(nested_groupings())
def test_order_and_inverse_are_permutations_of_each_other(grouping: Grouping) -> None:
    tokens = grouping.grid.tokens
    assert sorted(grouping.order.tolist()) == list(range(tokens))
    np.testing.assert_array_equal(grouping.order[grouping.inverse], np.arange(tokens))


@given(nested_groupings())
def test_order_sorts_by_cells_coarse_to_fine_then_raster(grouping: Grouping) -> None:
    coordinates = list(np.ndindex(grouping.grid.shape))

    def rank(raster: int) -> tuple[tuple[int, ...], ...]:
        position = coordinates[raster]
        return *(tuple(np.asarray(position) // np.asarray(cell)) for cell in grouping.cells), position

    assert grouping.order.tolist() == sorted(range(grouping.grid.tokens), key=rank)


@given(nested_groupings())
def test_every_cell_is_one_contiguous_run(grouping: Grouping) -> None:
    for cell in grouping.cells:
        starts, sizes = grouping.cell_starts(cell), cell_sizes(grouping.grid, cell)
        assert sizes.sum() == grouping.grid.tokens
        assert len(starts) == len(sizes) == math.prod(cell_counts(grouping.grid, cell))
        for coordinates, start, size in zip(np.ndindex(cell_counts(grouping.grid, cell)), starts, sizes, strict=True):
            raster = grouping.order[start : start + size]
            members = np.stack(np.unravel_index(raster, grouping.grid.shape), axis=1) // np.asarray(cell)
            assert (members == np.asarray(coordinates)).all()


def test_remainder_groups_hold_what_is_left() -> None:
    grouping = Grouping(Grid((33, 45, 80)), (4, 8, 8))
    assert grouping.counts == (9, 6, 10)
    assert grouping.sizes[0] == 256
    assert grouping.sizes[-1] == 1 * 5 * 8
    assert grouping.sizes.sum() == 33 * 45 * 80


def test_refining_with_blocks_keeps_the_groups_contiguous() -> None:
    grouping = Grouping(Grid((20, 27)), (8, 8)).refined(((4, 4), (2, 2)))
    assert grouping.cells == ((8, 8), (4, 4), (2, 2))
    by_position = np.argsort(grouping.starts)
    stops = (grouping.starts + grouping.sizes)[by_position]
    np.testing.assert_array_equal(grouping.starts[by_position][1:], stops[:-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(()), "positive extents"),
        (lambda: Grid((4, 0)), "positive extents"),
        (lambda: Grouping(Grid((8, 8)), (4,)), "2-axis"),
        (lambda: Grouping(Grid((8, 8)), (4, 0)), "positive"),
        (lambda: Grouping(Grid((8, 8)), (4, -4)), "positive"),
        (lambda: Grouping(Grid((8, 8)), (6, 6), ((6, 6), (4, 4))), "do not nest"),
        (lambda: Grouping(Grid((8, 8)), (2, 2), ((8, 8), (4, 4))), "not among the cells"),
    ],
)
def test_impossible_geometry_is_refused_in_words(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_cells_nest_when_each_size_divides() -> None:
    assert nests((4, 8), (8, 8))
    assert not nests((6, 6), (16, 16))
    assert not nests((4,), (8, 8))


def test_a_million_tokens_are_ordered_in_closed_form() -> None:
    grouping = Grouping(Grid((1024, 1024)), (16, 16)).refined(((8, 8), (4, 4)))
    assert grouping.inverse[0] == 0
    assert grouping.inverse[-1] == 1024 * 1024 - 1
    assert grouping.inverse[16] == 256
    assert grouping.inverse[16 * 1024] == 16 * 1024
