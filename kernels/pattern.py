"""Attention patterns: which groups a query group attends, and how closely.

A pattern gives every pair of groups a *level*: 0 where the query group attends the key group token by token,
n > 0 where it attends the summaries of the n-th far level, `NOT_ATTENDED` where it does not see it at all. Each is
defined once, by an expression over the coordinates of groups (`Pattern.relation`).
GRAT-B and GRAT-X are section 3.3 of arXiv 2505.14687; sliding tiles are arXiv 2502.04507; far levels are this
project's own.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from grat_kernels.geometry import Cell, IntArray, nests

NOT_ATTENDED = -1
Levels = npt.NDArray[np.int8]
# Coordinates of groups `[..., axes]`. 32 bits, because plans compare millions of pairs.
Places = npt.NDArray[np.int32]
Coordinates = tuple[int, ...]

# Pairs of groups whose levels are held at once: some tens of megabytes with all that is made of them.
_MOST_PAIRS = 1 << 20


class Pattern(ABC):
    """What each group attends. Patterns are immutable and hashable, and know nothing of token counts."""

    @abstractmethod
    def relation(self, query: Places, key: Places, counts: tuple[int, ...] | None) -> Levels:
        """The definition: levels of key groups for query groups.

        Args:
            query: group coordinates `[..., axes]`.
            key: group coordinates `[..., axes]`, which broadcast against those of queries.
            counts: groups per axis of the whole grid.

        Returns:
            `[...]` int8: 0 exact, n the n-th far level, `NOT_ATTENDED`.

        Raises:
            ValueError: if it depends on `counts`, and they are not given.
        """

    def levels(self, queries: IntArray, keys: IntArray, counts: tuple[int, ...]) -> Levels:
        """Levels of all pairs, `[Q, K]` from group coordinates `[Q, axes]` and `[K, axes]`; see `relation`."""
        return self.relation(_axis_by_axis(queries)[:, None], _axis_by_axis(keys)[None, :], counts)

    @property
    def far_levels(self) -> tuple[FarLevel, ...]:
        """The far levels that positive levels number from 1; empty for patterns without far field."""
        return ()

    @property
    def choice(self) -> Choice | None:
        """How the blocks of the far level are told by content; None where all of them are told by their means."""
        return None

    @property
    def blocks(self) -> tuple[Cell, ...]:
        """Sizes of all blocks whose means are attended or compared."""
        sizes = (level.block for level in self.far_levels)
        return tuple(dict.fromkeys([*sizes, *([self.choice.block] if self.choice else [])]))

    def check(self, axes: int) -> None:  # noqa: B027 - most patterns fit every grid
        """Raises ValueError if the pattern does not fit a grid of `axes` axes."""

    def level(self, a: Coordinates, b: Coordinates, counts: tuple[int, ...] | None = None) -> int:
        """Level of key group `b` for query group `a`; `counts` (groups per axis) matters to sliding tiles only."""
        return int(self.relation(np.asarray(a, np.int32), np.asarray(b, np.int32), counts))

    def attends(self, a: Coordinates, b: Coordinates, counts: tuple[int, ...] | None = None) -> bool:
        """Whether query group `a` attends key group `b` token by token."""
        return self.level(a, b, counts) == 0


def query_stretches(groups: int) -> Iterator[slice]:
    """Stretches of query groups, so that the levels of one stretch for all groups take little memory."""
    length = max(1, _MOST_PAIRS // groups)
    for first in range(0, groups, length):
        yield slice(first, min(first + length, groups))


def _axis_by_axis(coordinates: IntArray) -> Places:
    """The same `[groups, axes]`, one axis after another in memory: NumPy's loops then run over groups, not over the
    two or three axes."""
    return np.ascontiguousarray(coordinates.T, np.int32).T


def _within(query: Places, key: Places, radius: int | tuple[int, ...]) -> np.bool_ | npt.NDArray[np.bool_]:
    """Whether |query - key| is at most `radius` on every axis; as two bounds, which spares the differences of all
    pairs."""
    radii = np.asarray(radius, np.int32)
    return ((query - radii <= key) & (key <= query + radii)).all(-1)


def _exact_where(attended: np.bool_ | npt.NDArray[np.bool_]) -> Levels:
    """0 where a group is attended, else `NOT_ATTENDED`."""
    assert NOT_ATTENDED == -1
    return np.asarray(attended).view(np.int8) - np.int8(1)


@dataclass(frozen=True)
class Full(Pattern):
    """Every group attends every group."""

    def relation(self, query: Places, key: Places, counts: tuple[int, ...] | None) -> Levels:
        return np.zeros(np.broadcast_shapes(query.shape, key.shape)[:-1], np.int8)


@dataclass(frozen=True)
class Block(Pattern):
    """GRAT-B: groups at most `radius` apart on every axis; `radius` is one number or one per axis.

    Raises:
        ValueError: if a radius is negative.
    """

    radius: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.radius, int):
            object.__setattr__(self, "radius", tuple(int(axis_radius) for axis_radius in self.radius))
        if np.min(self.radius) < 0:
            raise ValueError(f"a radius cannot be negative: {self.radius}")

    def check(self, axes: int) -> None:
        if not isinstance(self.radius, int) and len(self.radius) != axes:
            raise ValueError(f"radius {self.radius} has {len(self.radius)} numbers, the grid has {axes} axes")

    def relation(self, query: Places, key: Places, counts: tuple[int, ...] | None) -> Levels:
        return _exact_where(_within(query, key, self.radius))


@dataclass(frozen=True)
class CrissCross(Pattern):
    """GRAT-X: groups that share at least `share` coordinates.

    On two axes `share=1` is the same row or column. On three, `share=1` is the planes that the authors' code uses
    and `share=2` the lines that the paper's speed-up on video implies.

    Raises:
        ValueError: if `share` is not positive.
    """

    share: int = 1

    def __post_init__(self) -> None:
        if self.share < 1:
            raise ValueError(f"share must be at least 1, not {self.share}")

    def check(self, axes: int) -> None:
        if self.share > axes:
            raise ValueError(f"share {self.share} is more than the grid's {axes} axes")

    def relation(self, query: Places, key: Places, counts: tuple[int, ...] | None) -> Levels:
        return _exact_where((query == key).sum(-1, dtype=np.int8) >= self.share)


@dataclass(frozen=True)
class SlidingTile(Pattern):
    """Sliding tile attention (arXiv 2502.04507): `window` groups per axis around the query's group.

    At borders the window shifts inward, so that every group attends equally many; on an axis with fewer groups
    than the window it covers the axis.

    Raises:
        ValueError: if a window is not an odd positive number.
    """

    window: int | tuple[int, ...] = 3

    def __post_init__(self) -> None:
        if not isinstance(self.window, int):
            object.__setattr__(self, "window", tuple(int(width) for width in self.window))
        widths = (self.window,) if isinstance(self.window, int) else self.window
        if any(width < 1 or width % 2 == 0 for width in widths):
            raise ValueError(f"a window must be an odd positive number of groups, not {self.window}")

    def check(self, axes: int) -> None:
        if not isinstance(self.window, int) and len(self.window) != axes:
            raise ValueError(f"window {self.window} has {len(self.window)} numbers, the grid has {axes} axes")

    def relation(self, query: Places, key: Places, counts: tuple[int, ...] | None) -> Levels:
        if counts is None:
            raise ValueError("sliding tiles shift at borders: give counts, the groups per axis")
        window = np.asarray(self.window, np.int32)
        last = np.maximum(np.asarray(counts, np.int32) - window, 0)
        first = np.clip(query - window // 2, 0, last)
        return _exact_where(((first <= key) & (key < first + window)).all(-1))


class FarLevel(NamedTuple):
    """Groups more than `beyond` groups away on some axis are seen as means over blocks of `block` tokens."""

    beyond: int
    block: Cell


class Choice(NamedTuple):
    """How many blocks of a far level each query group and head tells more closely than by their means.

    Which ones, the content decides (`grat_kernels.choosing`). All others are attended by one mean each, so that nothing
    is dropped.

    Attributes:
        exact: blocks that are attended token by token, the best of all.
        fine: blocks that are attended by means of `block` tokens, the next best.
        block: tokens of these means on each axis; they nest in the level's blocks.
    """

    exact: int
    fine: int
    block: Cell


@dataclass(frozen=True)
class Far(Pattern):
    """Far field: attends nothing exactly, and everything beyond a distance through summaries.

    The distance between groups is the largest over the axes. A pair takes the last level whose `beyond` it
    exceeds. Join it to a near pattern: `Union(Block(1), Far([(1, (4, 4))]))`; exact attention wins where both apply.

    With a choice, each query group and head attends some blocks of its one level more closely than others:
    `Union(Block(0), Far([(0, (8, 8))], Choice(exact=8, fine=32, block=(4, 4))))`.

    Raises:
        ValueError: if there is no level, a size is out of range, distances do not grow, or a choice has several levels
            to choose from, chooses nothing, or has blocks that do not nest in those of the level.
    """

    far: tuple[FarLevel, ...]
    choose: Choice | None

    def __init__(
        self, levels: Sequence[tuple[int, Sequence[int]]], choose: tuple[int, int, Sequence[int]] | None = None
    ) -> None:
        far = tuple(FarLevel(int(beyond), tuple(int(size) for size in block)) for beyond, block in levels)
        if not far:
            raise ValueError("a far field needs at least one level (beyond, block)")
        if far[0].beyond < 0 or any(size < 1 for level in far for size in level.block):
            raise ValueError(f"far levels need beyond >= 0 and positive block sizes: {[tuple(level) for level in far]}")
        for near, next_level in itertools.pairwise(far):
            if next_level.beyond <= near.beyond:
                raise ValueError(
                    f"far levels must lie ever farther out: beyond {next_level.beyond} follows {near.beyond}"
                )
        object.__setattr__(self, "far", far)
        object.__setattr__(self, "choose", None if choose is None else _choice_from(*choose, levels=far))

    @property
    def far_levels(self) -> tuple[FarLevel, ...]:
        return self.far

    @property
    def choice(self) -> Choice | None:
        return self.choose

    def check(self, axes: int) -> None:
        for block in self.blocks:
            if len(block) != axes:
                raise ValueError(f"far block {block} has {len(block)} sizes, the grid has {axes} axes")

    def relation(self, query: Places, key: Places, counts: tuple[int, ...] | None) -> Levels:
        exceeded = np.sum([~_within(query, key, level.beyond) for level in self.far], axis=0, dtype=np.int8)
        return np.where(exceeded > 0, exceeded, np.int8(NOT_ATTENDED))


def _choice_from(exact: int, fine: int, block: Sequence[int], levels: tuple[FarLevel, ...]) -> Choice:
    """A choice among the blocks of one level."""
    choice = Choice(int(exact), int(fine), tuple(int(size) for size in block))
    if len(levels) != 1:
        raise ValueError(f"a choice is made among the blocks of one far level, not of {len(levels)}")
    if min(choice.exact, choice.fine) < 0 or choice.exact + choice.fine == 0:
        raise ValueError(f"a choice needs counts from 0 up that are not both 0, not {exact} and {fine}")
    block = levels[0].block
    if min(choice.block, default=0) < 1 or choice.block == block or not nests(choice.block, block):
        raise ValueError(f"blocks of {choice.block} do not nest in those of {block} that are chosen from")
    return choice


@dataclass(frozen=True)
class Union(Pattern):
    """Attends what any of its patterns attends, each pair at its most exact level.

    Raises:
        ValueError: if it is empty or more than one pattern has a far field.
    """

    patterns: tuple[Pattern, ...]

    def __init__(self, *patterns: Pattern) -> None:
        if not patterns:
            raise ValueError("a union needs at least one pattern")
        if sum(bool(pattern.far_levels) for pattern in patterns) > 1:
            raise ValueError("a union takes one far field: list all its levels in one Far([...])")
        object.__setattr__(self, "patterns", patterns)

    @property
    def far_levels(self) -> tuple[FarLevel, ...]:
        return next((pattern.far_levels for pattern in self.patterns if pattern.far_levels), ())

    @property
    def choice(self) -> Choice | None:
        return next((pattern.choice for pattern in self.patterns if pattern.choice), None)

    def check(self, axes: int) -> None:
        for pattern in self.patterns:
            pattern.check(axes)

    def relation(self, query: Places, key: Places, counts: tuple[int, ...] | None) -> Levels:
        # NOT_ATTENDED is -1, the largest value once read as unsigned: the most exact level is the unsigned minimum.
        levels = [pattern.relation(query, key, counts).view(np.uint8) for pattern in self.patterns]
        return np.minimum.reduce(levels).view(np.int8)
