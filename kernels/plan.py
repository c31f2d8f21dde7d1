"""Plans: a grouping and a pattern turned into short lists of contiguous key spans.

In the token order of a `Grouping` every group is one run of positions, neighbouring groups merge into longer runs,
and attention of a group becomes attention over a few *spans*. Groups that attend the same keys share one list.
This module is NumPy alone, so that planning a run needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from grat_kernels.candidates import Candidates, build_candidates, check_pairs
from grat_kernels.geometry import Cell, Grouping, IntArray, cell_sizes, nests
from grat_kernels.pattern import NOT_ATTENDED, Levels, Pattern, query_stretches
from grat_kernels.sequence import JointSequence, Segments, Summaries
from grat_kernels.span_lists import QueryRun, Span, SpanLists, distinct_rows, merged_spans

_plans: WeakValueDictionary[int, Plan | HeadPlan] = WeakValueDictionary()


class Parts(NamedTuple):
    """Attention work by part, as query-key pairs of one head.

    Attributes:
        pairs: of image tokens as queries.
        text: of text and the like as queries, which attend everything.
        selection: of choosing by content.
        forming: of means of keys and values, which density leaves out. At each level every key and every value is added
            up once: that is two operations a token and channel, and a pair takes four a channel.
    """

    pairs: float
    text: float
    selection: float
    forming: float

    @property
    def attended(self) -> float:
        """All but forming."""
        return self.pairs + self.text + self.selection

    def over(self, pairs: float) -> Parts:
        """Their shares of so many pairs."""
        return Parts(*(part / pairs for part in self))


@dataclass(frozen=True, eq=False)
class Plan(JointSequence):
    """What every query attends, for one grid, pattern and text length. Build it with `build_plan`.

    Attributes:
        pattern: the pattern it was built from.
        span_lists: the distinct span lists.
        list_of_group: span list of each group, groups in lexicographic order, `[groups]`.
        query_runs: runs of queries with one list each, in order of position; they cover the sequence. Where groups
            choose, each has a run of its own.
        candidates: what groups choose from by content, besides what their lists hold; None without a choice.
    """

    pattern: Pattern
    span_lists: SpanLists
    list_of_group: IntArray
    query_runs: tuple[QueryRun, ...]
    candidates: Candidates | None = None

    def __post_init__(self) -> None:
        _plans[self.key] = self

    @property
    def classes(self) -> tuple[Plan, ...]:
        """The plans of all head classes: this one serves every head."""
        return (self,)

    @property
    def chooses(self) -> bool:
        """Whether groups choose by content what they attend."""
        return self.candidates is not None

    def spans(self, group: int) -> tuple[Span, ...]:
        """Merged spans of a group, counted in lexicographic order of group coordinates, text included."""
        return self.span_lists[int(self.list_of_group[group])]

    @cached_property
    def attended_pairs(self) -> float:
        """Query-key pairs that are computed, a summary counted as one key, and a choice by what it costs."""
        return self.parts.attended

    @cached_property
    def parts(self) -> Parts:
        """The same by part, and what it leaves out."""
        keys = self.span_lists.keys
        image = text = selection = 0.0
        for run in self.query_runs:
            # Full attention has one run over image and text.
            inside = min(run.start + run.length, self.image_stop) - max(run.start, self.image_start)
            image += max(0, inside) * int(keys[run.span_list])
            text += (run.length - max(0, inside)) * int(keys[run.span_list])
        if self.candidates is not None:
            image += int(self.group_sizes @ self.candidates.slots)
            selection = self.candidates.selection_pairs
        return Parts(image, text, selection, len(self.summaries.blocks) * self.image_tokens / 2)

    @cached_property
    def group_sizes(self) -> IntArray:
        """Tokens of each group, in token order, `[groups]`."""
        return self.grouping.sizes[np.argsort(self.grouping.starts)]

    def of_heads(self, heads: range) -> Plan:
        """What some of the heads attend: all attend alike."""
        return self

    @property
    def density(self) -> float:
        """Attended pairs over all pairs of the joint sequence, text rows and columns included."""
        return self.attended_pairs / self.tokens**2

    @property
    def ideal_speedup(self) -> float:
        """How much less attention work than full attention: 1 / density."""
        return 1 / self.density


@dataclass(frozen=True, eq=False)
class HeadPlan(JointSequence):
    """Plans by attention head, which one kernel launch serves. Build it with `build_head_plan`.

    Attributes:
        classes: one plan per class of heads; all share token order, text and summaries.
        class_of_head: class of each head.
    """

    classes: tuple[Plan, ...]
    class_of_head: tuple[int, ...]

    def __post_init__(self) -> None:
        _plans[self.key] = self

    @property
    def attended_pairs(self) -> float:
        """Query-key pairs that are computed, a summary counted as one key, mean over heads."""
        return self.parts.attended

    @property
    def parts(self) -> Parts:
        """The same by part, and what it leaves out."""
        return Parts(*np.mean([self.classes[number].parts for number in self.class_of_head], axis=0).tolist())

    @property
    def density(self) -> float:
        """Attended pairs over all pairs of the joint sequence, mean over heads."""
        return float(np.mean([self.classes[number].density for number in self.class_of_head]))

    @property
    def ideal_speedup(self) -> float:
        """How much less attention work than full attention: 1 / density."""
        return 1 / self.density

    @property
    def chooses(self) -> bool:
        """Whether groups of some heads choose by content what they attend."""
        return any(member.chooses for member in self.classes)

    def heads_of(self, number: int) -> list[int]:
        """The heads of a class."""
        return [head for head, owner in enumerate(self.class_of_head) if owner == number]

    def of_heads(self, heads: range) -> Plan | HeadPlan:
        """What some of the heads attend, counted from the first of them; summaries are the same."""
        owners = self.class_of_head[heads.start : heads.stop]
        kept = sorted(set(owners))

        def build() -> Plan | HeadPlan:
            classes = tuple(self.classes[number] for number in kept)
            if len(classes) == 1:
                return classes[0]
            return HeadPlan(self.grouping, self.segments, self.summaries, classes, tuple(map(kept.index, owners)))

        return self.cached(("of heads", owners), build)


def plan_by_key(key: int) -> Plan | HeadPlan:
    """The living plan of that key.

    Raises:
        KeyError: if it has been dropped.
    """
    return _plans[key]


@lru_cache(maxsize=64)
def build_head_plan(
    classes: tuple[tuple[Grouping, Pattern], ...],
    class_of_head: tuple[int, ...],
    text_len: int = 0,
    text_first: bool = True,
    *,
    segments: Segments | None = None,
) -> HeadPlan:
    """Builds plans for classes of heads that attend differently; equal arguments give the same plan.

    Args:
        classes: groups and pattern of each class. Groups may differ in size, but not in the token order.
        class_of_head: class of each head, counted from 0.
        text_len: text tokens of the joint sequence.
        text_first: whether they come before the image tokens.
        segments: text and other runs of tokens, in place of `text_len` and `text_first`.

    Raises:
        ValueError: if a class has no heads or does not exist, token orders differ, or as for `build_plan`.
    """
    if set(class_of_head) != set(range(len(classes))):
        raise ValueError(
            f"class_of_head names classes {sorted(set(class_of_head))}, there are {len(classes)}, counted from 0"
        )
    blocks = tuple(dict.fromkeys(block for _, pattern in classes for block in pattern.blocks))
    segments = segments or Segments.of_text(text_len, text_first)
    plans = tuple(build_plan(grouping, pattern, blocks=blocks, segments=segments) for grouping, pattern in classes)
    first = plans[0]
    for plan in plans:
        if plan.grouping.grid != first.grouping.grid or plan.grouping.cells != first.grouping.cells:
            raise ValueError(
                f"heads of one plan share one token order, not those of cells {first.grouping.cells} and "
                f"{plan.grouping.cells}: give every Grouping the same cells"
            )
    return HeadPlan(first.grouping, segments, first.summaries, plans, class_of_head)


@lru_cache(maxsize=64)
def build_plan(
    grouping: Grouping,
    pattern: Pattern,
    text_len: int = 0,
    text_first: bool = True,
    blocks: tuple[Cell, ...] = (),
    *,
    segments: Segments | None = None,
) -> Plan:
    """Builds the plan of a pattern on a grouping; equal arguments give the same plan.

    Args:
        grouping: grid, groups and token order; far blocks are added to the order where they are missing.
        pattern: which groups attend which.
        text_len: text tokens of the joint sequence, attended by every query.
        text_first: whether they come before the image tokens.
        blocks: further block sizes to summarise, for plans that share their summaries.
        segments: text and other runs of tokens that attend all and that all attend, such as those of pictures to refer
            to, in place of `text_len` and `text_first`.

    Raises:
        ValueError: if pattern and grid do not fit, a far block does not nest in a group, a group attends nothing, or
            there are too many pairs of groups and blocks to choose from.
    """
    segments = segments or Segments.of_text(text_len, text_first)
    pattern.check(grouping.grid.axes)
    far_blocks = [level.block for level in pattern.far_levels]
    blocks = tuple(dict.fromkeys((*blocks, *pattern.blocks)))
    for block in far_blocks:
        if not nests(block, grouping.group):
            raise ValueError(
                f"far blocks of {block} do not nest in groups of {grouping.group}: use divisors of the group's sizes"
            )
    grouping = grouping.refined(blocks)
    if pattern.choice:
        check_pairs(grouping, pattern)

    ranking = np.argsort(grouping.starts)
    columns, summaries = _columns_and_summaries(grouping, ranking, blocks, segments)
    # From numbers of the pattern's far levels to numbers of the summaries' levels; NOT_ATTENDED is the last entry.
    renumbered = np.asarray([0, *(blocks.index(block) + 1 for block in far_blocks), NOT_ATTENDED], np.int8)
    spans, offered, list_of_row = [], [], []
    seen: dict[bytes, int] = {}
    for levels in _level_rows(grouping, pattern, ranking):
        first_list = len(seen)
        new, numbers = distinct_rows(levels, seen)
        list_of_row += numbers
        levels = levels[new] if blocks == tuple(far_blocks) else renumbered[levels[new]]
        if pattern.choice:
            offered.append(levels > 0)
            levels = np.where(levels > 0, np.int8(NOT_ATTENDED), levels)
        spans.append(merged_spans(levels, columns, first_list))
    span_lists = SpanLists.of(np.concatenate(spans, axis=1), len(seen))
    if not span_lists.keys.all():
        raise ValueError(
            f"{pattern} leaves a group with nothing to attend: join the far field to a near pattern with Union"
        )

    list_of_group, list_of_text = np.asarray(list_of_row[:-1]), list_of_row[-1]
    candidates = None
    if pattern.choice:
        candidates = build_candidates(pattern, np.concatenate(offered), list_of_group[ranking], columns, blocks)
    list_of_column = [list_of_text, *list_of_group[ranking].tolist(), list_of_text]
    runs = [
        QueryRun(start, stop - start, span_list)
        for (start, stop), span_list in zip(itertools.pairwise(columns[0].tolist()), list_of_column, strict=True)
        if stop > start
    ]
    return Plan(
        grouping=grouping,
        segments=segments,
        summaries=summaries,
        pattern=pattern,
        span_lists=span_lists,
        list_of_group=list_of_group,
        query_runs=tuple(runs) if candidates else _merge_runs(runs),
        candidates=candidates,
    )


def _level_rows(grouping: Grouping, pattern: Pattern, ranking: IntArray) -> Iterator[Levels]:
    """Levels of all keys `[rows, groups + 2]`, for some groups at a time, and at last for text and the like.

    Columns are in order of the joint sequence, so that equal neighbours are contiguous keys: what is before the image,
    the groups in token order, and what is behind. All attend the outer two, and text and the like attend all.
    """
    coordinates = grouping.coordinates
    for queries in query_stretches(len(coordinates)):
        levels = pattern.levels(coordinates[queries], coordinates[ranking], grouping.counts)
        yield np.pad(levels, ((0, 0), (1, 1)))
    yield np.zeros((1, len(coordinates) + 2), np.int8)


def _columns_and_summaries(
    grouping: Grouping, ranking: IntArray, blocks: tuple[Cell, ...], segments: Segments
) -> tuple[IntArray, Summaries]:
    """Where the columns of `_level_rows` begin at each level and the last ends, `[levels, groups + 3]`; and summaries.

    At level 0 keys are positions in the joint sequence, at level n rows of the n-th summary tensor.
    """
    image_start = sum(segments.before)
    sizes = [np.concatenate([[image_start], grouping.sizes[ranking], [sum(segments.after)]])]
    starts, counts, offsets = [], [], [0]
    for block in blocks:
        # A group's blocks are contiguous in token order.
        block_starts = grouping.cell_starts(block)
        by_position = np.argsort(block_starts)
        starts.append(image_start + block_starts[by_position])
        counts.append(cell_sizes(grouping.grid, block)[by_position])
        offsets.append(offsets[-1] + len(block_starts))
        column_of_block = np.searchsorted(grouping.starts[ranking], block_starts, side="right")
        sizes.append(np.bincount(column_of_block, minlength=len(ranking) + 2))
    columns = np.zeros((len(sizes), len(ranking) + 3), np.int64)
    columns[:, 1:] = np.cumsum(sizes, axis=1)
    none = np.empty(0, np.int64)
    return columns, Summaries(blocks, np.concatenate([none, *starts]), np.concatenate([none, *counts]), tuple(offsets))


def _merge_runs(runs: list[QueryRun]) -> tuple[QueryRun, ...]:
    merged: list[QueryRun] = []
    for run in runs:
        if merged and merged[-1].span_list == run.span_list:
            run = QueryRun(merged[-1].start, merged.pop().length + run.length, run.span_list)
        merged.append(run)
    return tuple(merged)
