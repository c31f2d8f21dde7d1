"""Which groups attend which."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import groupings, patterns
from hypothesis import given
from hypothesis import strategies as st

from grat_kernels import Block, Choice, CrissCross, Far, Full, Grid, Grouping, Pattern, SlidingTile, Union
from grat_kernels.pattern import NOT_ATTENDED

SOME_GROUPS = list(itertools.product(range(4), range(3), range(5)))


@given(st.sampled_from(SOME_GROUPS), st.sampled_from(SOME_GROUPS))
def test_the_papers_patterns_follow_their_definitions(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    distances = [abs(x - y) for x, y in zip(a, b, strict=True)]
    equal = sum(x == y for x, y in zip(a, b, strict=True))
    assert Full().attends(a, b)
    assert Block(1).attends(a, b) == (max(distances) <= 1)
    assert Block((0, 1, 2)).attends(a, b) == all(d <= r for d, r in zip(distances, (0, 1, 2), strict=True))
    assert CrissCross(1).attends(a, b) == (equal >= 1)
    assert CrissCross(2).attends(a, b) == (equal >= 2)
    assert Union(Block(1), CrissCross(2)).attends(a, b) == (max(distances) <= 1 or equal >= 2)


def test_sliding_tiles_shift_inward_at_borders() -> None:
    pattern = SlidingTile(3)
    attended = [b for b in range(6) if pattern.attends((0,), (b,), counts=(6,))]
    assert attended == [0, 1, 2]
    assert [b for b in range(6) if pattern.attends((3,), (b,), counts=(6,))] == [2, 3, 4]
    assert [b for b in range(6) if pattern.attends((5,), (b,), counts=(6,))] == [3, 4, 5]
    assert [b for b in range(2) if pattern.attends((1,), (b,), counts=(2,))] == [0, 1]


@given(st.data())
def test_every_sliding_tile_attends_equally_many(data: st.DataObject) -> None:
    counts = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    width = data.draw(st.sampled_from([1, 3, 5]))
    groups = np.asarray(list(np.ndindex(counts)))
    attended = (SlidingTile(width).levels(groups, groups, counts) == 0).sum(1)
    assert set(attended.tolist()) == {min(width, counts[0]) * min(width, counts[1])}


def test_far_levels_follow_distance_and_exact_attention_wins() -> None:
    pattern = Union(Block(1), Far([(0, (2, 2)), (3, (4, 4))]))
    levels = [pattern.level((0, 0), (0, distance)) for distance in range(6)]
    assert levels == [0, 0, 1, 1, 2, 2]
    gap = Union(Block(0), Far([(2, (2, 2))]))
    assert [gap.level((0, 0), (distance, 0)) for distance in range(5)] == [0, NOT_ATTENDED, NOT_ATTENDED, 1, 1]


@given(st.data())
def test_levels_of_all_pairs_agree_with_single_pairs(data: st.DataObject) -> None:
    grouping = data.draw(groupings(60))
    pattern: Pattern = data.draw(patterns(grouping))
    levels = pattern.levels(grouping.coordinates, grouping.coordinates, grouping.counts)
    for row, a in enumerate(grouping.coordinates.tolist()):
        for column, b in enumerate(grouping.coordinates.tolist()):
            assert levels[row, column] == pattern.level(tuple(a), tuple(b), grouping.counts)
    assert (np.diagonal(levels) == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Block(-1), "radius"),
        (lambda: CrissCross(0), "share"),
        (lambda: SlidingTile(2), "odd"),
        (lambda: SlidingTile(0), "odd"),
        (lambda: Far([]), "at least one level"),
        (lambda: Far([(1, (4, 4)), (1, (8, 8))]), "farther out"),
        (lambda: Far([(-1, (4, 4))]), "beyond >= 0"),
        (lambda: Far([(1, (0, 4))]), "positive"),
        (lambda: Far([(0, (4, 4)), (2, (8, 8))], (1, 1, (2, 2))), "one far level, not of 2"),
        (lambda: Far([(0, (4, 4))], (0, 0, (2, 2))), "not both 0"),
        (lambda: Far([(0, (4, 4))], (-1, 4, (2, 2))), "from 0 up"),
        (lambda: Far([(0, (4, 4))], (1, 1, (4, 4))), "do not nest"),
        (lambda: Far([(0, (4, 4))], (1, 1, (3, 2))), "do not nest"),
        (lambda: Far([(0, (4, 4))], (1, 1, (2,))), "do not nest"),
        (lambda: Far([(0, (4, 4))], (1, 1, ())), "do not nest"),
        (lambda: Union(), "at least one"),
        (lambda: Union(Far([(1, (4, 4))]), Far([(2, (8, 8))])), "one far field"),
        (lambda: SlidingTile(3).attends((0,), (1,)), "counts"),
    ],
)
def test_impossible_patterns_are_refused_in_words(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_unions_choose_as_their_far_field_does() -> None:
    far = Far([(1, (8, 4))], (3, 5, (2, 2)))
    pattern = Union(CrissCross(1), far)
    assert pattern.choice == far.choice == Choice(3, 5, (2, 2))
    assert pattern.blocks == ((8, 4), (2, 2))
    assert Union(CrissCross(1), Far([(1, (8, 4))])).choice is None
    assert pattern == Union(CrissCross(1), Far([(1, (8, 4))], Choice(3, 5, (2, 2))))
    assert hash(pattern) != hash(Union(CrissCross(1), Far([(1, (8, 4))])))


@pytest.mark.parametrize(
    "pattern",
    [Block((1, 1, 1)), CrissCross(3), SlidingTile((3, 3, 3)), Far([(1, (2, 2, 2))]), Union(Block((1,)), Full())],
)
def test_patterns_know_the_grids_they_fit(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match="axes"):
        pattern.check(Grouping(Grid((8, 8)), (4, 4)).grid.axes)
