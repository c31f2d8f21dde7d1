"""Candidates: blocks that query groups choose from by content, and room for what they choose; see `choosing`.

This module is NumPy alone, as `plan` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from grat_kernels.geometry import Cell, Grouping, IntArray, cell_counts
from grat_kernels.pattern import Choice, Pattern
from grat_kernels.tile_lists import EMPTY

if TYPE_CHECKING:
    from grat_kernels.sequence import Summaries

# Channels of a head to which the cost of a choice refers.
_CHANNELS = 64
# Pairs of a group and a block whose scores are held at once, for a head; 268 MB.
_MOST_CANDIDATES = 1 << 26


@dataclass(frozen=True)
class Candidates:
    """What all groups of a plan choose from.

    Groups and blocks are counted in token order. What a group chooses fills one row of *slots*: those of the tokens of
    its exact blocks, of the means within its fine blocks, and of the means of all others.

    Attributes:
        choice: how many are told how closely.
        level: number of the far level whose blocks are chosen from, counted from 1 over all summaries.
        fine_level: number of the level of the means within blocks.
        of_list: whether groups with a span list choose from a block, `[lists, blocks]` bool.
        list_of_group: span list of each group, `[groups]`.
        tokens: most tokens of a block.
        means: most means within a block.
    """

    choice: Choice
    level: int
    fine_level: int
    of_list: npt.NDArray[np.bool_]
    list_of_group: IntArray
    tokens: int
    means: int

    @cached_property
    def counts(self) -> IntArray:
        """Blocks that each group attends token by token, by the means within them, and by one mean, `[groups, 3]`."""
        offered = self.of_list.sum(1)[self.list_of_group]
        exact = np.minimum(offered, self.choice.exact)
        fine = np.minimum(offered - exact, self.choice.fine)
        return np.stack([exact, fine, offered - exact - fine], axis=1)

    @cached_property
    def slots(self) -> IntArray:
        """Slots that each group fills, `[groups]`; some stay empty where it chooses smaller blocks, at borders."""
        return self.counts @ np.array([self.tokens, self.means, 1])

    @cached_property
    def width(self) -> int:
        """Slots of a row: those of the group that fills most."""
        return int(self.counts.max(0, initial=0) @ np.array([self.tokens, self.means, 1]))

    @property
    def selection_pairs(self) -> float:
        """What the choice costs, as query-key pairs, of one head.

        A score of a mean is half a pair, which has a product with the value besides. How far the values of a block lie
        apart, as a group sees them, is a quadratic form of as many numbers as it has means; the form itself, products
        of all values of a block, is made once.
        """
        groups, blocks = len(self.list_of_group), self.of_list.shape[1]
        by_group = 0.5 + (self.means + 1) / (2 * _CHANNELS)
        return blocks * self.means * (groups * by_group + self.means / 2)

    def means_within(self, summaries: Summaries) -> tuple[IntArray, IntArray]:
        """Rows of the means within each block among all summaries, and their tokens, `[blocks, means]` each.

        They follow one another; where a block has fewer of them, at a border, rows are `EMPTY` and tokens 0.
        """
        own, within = summaries.rows_of(self.level), summaries.rows_of(self.fine_level)
        # A mean lies in the block that its first token lies in.
        owner = np.searchsorted(summaries.starts[own], summaries.starts[within], side="right") - 1
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        rows = np.full((own.stop - own.start, self.means), EMPTY)
        counts = np.zeros_like(rows)
        rows[owner, rank] = np.arange(within.start, within.stop)
        counts[owner, rank] = summaries.counts[within]
        return rows, counts


def check_pairs(grouping: Grouping, pattern: Pattern) -> None:
    """Raises ValueError if there are too many pairs of groups and blocks of a pattern with a choice."""
    (level,) = pattern.far_levels
    groups, blocks = (math.prod(cell_counts(grouping.grid, size)) for size in (grouping.group, level.block))
    if groups * blocks > _MOST_CANDIDATES:
        raise ValueError(f"{groups:,} groups that choose among {blocks:,} blocks are too many: use larger ones")


def build_candidates(
    pattern: Pattern,
    by_column: npt.NDArray[np.bool_],
    list_of_group: IntArray,
    columns: IntArray,
    blocks: tuple[Cell, ...],
) -> Candidates:
    """What groups choose from.

    Args:
        pattern: with a choice.
        by_column: whether a list's groups choose from the blocks of a column of keys, `[lists, columns]`.
        list_of_group: span list of each group in token order, `[groups]`.
        columns: where the summaries of each column begin at each level, and those of the last one end,
            `[levels, columns + 1]`.
        blocks: sizes of the summaries' levels.
    """
    assert pattern.choice is not None
    block, within = pattern.far_levels[0].block, pattern.choice.block
    level, fine_level = blocks.index(block) + 1, blocks.index(within) + 1
    of_list = np.repeat(by_column, np.diff(columns[level]), axis=1)
    means = math.prod(size // inner for size, inner in zip(block, within, strict=True))
    return Candidates(pattern.choice, level, fine_level, of_list, list_of_group, math.prod(block), means)
