"""Plans: a grouping and a pattern turned into short lists of contiguous key spans.

In the token order of a `Grouping` every group is one run of positions, neighbouring groups merge into longer runs,
and attention of a group becomes attention over a few *spans*. Groups that attend the same keys share one list.
This module is NumPy alone, so that planning a run needs no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from grat_kernels.candidates import Candidates, build_candidates, check_pairs
from grat_kernels.geometry import Cell, Grouping, IntArray, cell_sizes, nests
from grat_kernels.pattern import NOT_ATTENDED, Pattern

if TYPE_CHECKING:
    import torch


class Span(NamedTuple):
    """A contiguous run of keys. Level 0: positions in the joint sequence; level n: rows of the n-th summary tensor."""

    start: int
    length: int
    level: int

    @property
    def stop(self) -> int:
        """First position or row after the span."""
        return self.start + self.length


@dataclass(frozen=True)
class Segments:
    """What a joint sequence holds besides its image tokens: runs of tokens that attend all and that all attend.

    Text is one of them; pictures to refer to, which a model appends to the image, may be others.

    Attributes:
        before: tokens of each run ahead of the image tokens, in order.
        after: tokens of each run behind the image tokens, in order.
        text: which run is text, counted over those before and then those after; a sample may use fewer of its tokens
            (`text_valid`). None where there is none.

    Raises:
        ValueError: if a length is negative, or the text is none of the runs.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    text: int | None = None

    def __post_init__(self) -> None:
        runs = (*self.before, *self.after)
        if min(runs, default=0) < 0:
            raise ValueError(f"lengths of runs cannot be negative: {runs}")
        if self.text is not None and not 0 <= self.text < len(runs):
            raise ValueError(f"text is run {self.text} of {len(runs)}, which are counted from 0")

    @classmethod
    def of_text(cls, length: int, first: bool) -> Segments:
        """Text alone, before or after the image tokens."""
        return cls((length,) if first else (), () if first else (length,), 0)

    @property
    def tokens(self) -> int:
        """Tokens of all runs."""
        return sum(self.before) + sum(self.after)


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


class QueryRun(NamedTuple):
    """A contiguous run of queries in the joint sequence that attend the same span list."""

    start: int
    length: int
    span_list: int


@dataclass(frozen=True)
class SpanLists:
    """Span lists in compressed-row form: spans `bounds[i]:bounds[i + 1]` belong to list i, sorted by (level, start)."""

    starts: IntArray
    lengths: IntArray
    levels: IntArray
    bounds: IntArray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> tuple[Span, ...]:
        rows = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        columns = (self.starts[rows].tolist(), self.lengths[rows].tolist(), self.levels[rows].tolist())
        return tuple(Span(*values) for values in zip(*columns, strict=True))

    @cached_property
    def keys(self) -> IntArray:
        """Keys in each list, summaries counted as one key each, `[lists]`."""
        return self.sums(self.lengths)

    def sums(self, values: IntArray) -> IntArray:
        """Sums over each list of a value per span, `[lists]` from `[spans]`; an empty list sums to 0."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
        return total[self.bounds[1:]] - total[self.bounds[:-1]]


@dataclass(frozen=True)
class Summaries:
    """The blocks behind all summary rows, level by level, blocks in token order within a level.

    Attributes:
        blocks: block size of each level.
        starts: position of each block's first token in the joint sequence, `[rows]`.
        counts: tokens of each block, `[rows]`; a summary's score gets `+ log(count)`.
        offsets: first row of each level, and the number of rows last, `[levels + 1]`.
    """

    blocks: tuple[Cell, ...]
    starts: IntArray
    counts: IntArray
    offsets: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of summary rows over all levels."""
        return self.offsets[-1]

    def rows_of(self, level: int) -> slice:
        """Rows of a level, counted from 1."""
        return slice(self.offsets[level - 1], self.offsets[level])


class PlanTensors(NamedTuple):
    """Index tensors on one device: `order`, `inverse` `[image tokens]` int64; `log_counts` `[summary rows]` fp32."""

    order: torch.Tensor
    inverse: torch.Tensor
    log_counts: torch.Tensor


# Pairs of groups whose levels are held at once: some tens of megabytes with all that is made of them.
_MOST_PAIRS = 1 << 20

_keys = itertools.count(1)
_plans: WeakValueDictionary[int, Plan | HeadPlan] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class JointSequence:
    """Image tokens in group order, what stands before and after them, and summaries: what plans are made over.

    Attributes:
        grouping: groups and token order of the image tokens, far blocks included.
        segments: text and other runs of tokens before and after the image tokens.
        summaries: the blocks of the far field.
        key: a number that names the plan in this process while it lives.
    """

    grouping: Grouping
    segments: Segments
    summaries: Summaries
    key: int = field(default_factory=lambda: next(_keys), kw_only=True)
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def image_tokens(self) -> int:
        """Number of image tokens."""
        return self.grouping.grid.tokens

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.image_tokens + self.segments.tokens

    @property
    def image_start(self) -> int:
        """Position of the first image token in the joint sequence."""
        return sum(self.segments.before)

    @property
    def image_stop(self) -> int:
        """Position after the last image token."""
        return self.image_start + self.image_tokens

    @property
    def text_len(self) -> int:
        """Text tokens of the joint sequence."""
        segments = self.segments
        return 0 if segments.text is None else (*segments.before, *segments.after)[segments.text]

    @property
    def text_first(self) -> bool:
        """Whether text comes before the image tokens (Flux) or after them (HunyuanVideo)."""
        return self.segments.text is not None and self.segments.text < len(self.segments.before)

    @property
    def text_start(self) -> int:
        """Position of the first text token in the joint sequence; 0 where there is none."""
        segments = self.segments
        if segments.text is None:
            return 0
        before = sum((*segments.before, *segments.after)[: segments.text])
        return before if self.text_first else self.image_tokens + before

    @property
    def order(self) -> IntArray:
        """`order[i]` is the raster index of the i-th image token in group order."""
        return self.grouping.order

    @property
    def inverse(self) -> IntArray:
        """`inverse[r]` is the position in group order of image token r."""
        return self.grouping.inverse

    def tensors(self, device: torch.device | str) -> PlanTensors:
        """Index tensors on a device, moved once."""
        import torch

        def build() -> PlanTensors:
            log_counts = torch.from_numpy(np.log(self.summaries.counts).astype(np.float32))
            order, inverse = torch.from_numpy(self.order), torch.from_numpy(self.inverse)
            return PlanTensors(*(tensor.to(device) for tensor in (order, inverse, log_counts)))

        return self.cached(("tensors", torch.device(device)), build)

    def cached(self, name: Hashable, build: Callable[[], Any]) -> Any:
        """The value kept under `name`, built on first use: backends keep their forms of the plan here."""
        if name not in self._cache:
            self._cache[name] = build()
        return self._cache[name]


@dataclass(frozen=True, eq=False)
class Plan(JointSequence):
    """What every query attends, for one grid, pattern and text length. Build it with `build_plan`.

    Attributes:
        pattern: the pattern it was built from.
        span_lists: the distinct span lists.
        list_of_group: span list of each group, groups in lexicographic order, `[groups]`.
        text_list: span list of text and the like; they attend every token exactly.
        query_runs: runs of queries with one list each, in order of position; they cover the sequence. Where groups
            choose, each has a run of its own.
        candidates: what groups choose from by content, besides what their lists hold; None without a choice.
    """

    pattern: Pattern
    span_lists: SpanLists
    list_of_group: IntArray
    text_list: int
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

    @cached_property
    def tokens_behind(self) -> IntArray:
        """Tokens that each span list stands for, `[lists]`: keys, for a summary the tokens of its block, and those of
        all blocks that are chosen from."""
        lists, counts = self.span_lists, np.concatenate([np.zeros(1, np.int64), np.cumsum(self.summaries.counts)])
        of_tokens = lists.levels == 0
        first = np.asarray(self.summaries.offsets)[np.where(of_tokens, 0, lists.levels - 1)] + lists.starts
        first = np.where(of_tokens, 0, first)
        summarised = counts[np.where(of_tokens, 0, first + lists.lengths)] - counts[first]
        behind = lists.sums(np.where(of_tokens, lists.lengths, summarised))
        if self.candidates is not None:
            blocks = self.summaries.rows_of(self.candidates.level)
            behind = behind + self.candidates.of_list @ self.summaries.counts[blocks]
        return behind

    @property
    def density(self) -> float:
        """Attended pairs over all pairs of the joint sequence, text rows and columns included."""
        return self.attended_pairs / self.tokens**2

    @property
    def ideal_speedup(self) -> float:
        """How much less attention work than full attention: 1 / density."""
        return 1 / self.density

    @cached_property
    def reach(self) -> float:
        """Largest distance, in tokens on the grid, from a query to an image token that it attends exactly, or that lies
        in a block it may choose to attend exactly."""
        grouping, coordinates = self.grouping, self.grouping.coordinates
        may_choose = self.candidates is not None and self.candidates.choice.exact > 0
        squares = []
        for extent, size in zip(grouping.grid.shape, grouping.group, strict=True):
            first = np.arange(0, extent, size, dtype=np.int64)
            last = np.minimum(first + size, extent) - 1
            span = last[:, None] - first[None, :]
            squares.append(np.maximum(span, span.T) ** 2)
        farthest = 0
        for queries in _stretches(len(coordinates)):
            levels = self.pattern.levels(coordinates[queries], coordinates, grouping.counts)
            exact = levels >= 0 if may_choose else levels == 0
            # Groups per axis: [Q, counts of axis 0, counts of axis 1, ...], from [Q, counts of one axis] each.
            distance = np.zeros((exact.shape[0], *[1] * grouping.grid.axes), np.int64)
            for axis, square in enumerate(squares):
                shape = [1] * grouping.grid.axes
                shape[axis] = len(square)
                distance = distance + square[coordinates[queries, axis]].reshape(-1, *shape)
            farthest = max(farthest, int(distance.reshape(exact.shape).max(where=exact, initial=0)))
        return math.sqrt(farthest)

    def tile_efficiency(self, block_m: int = 128, block_n: int = 128, block_tail: int | None = None) -> float:
        """Share of the pairs computed in tiles that are attended; the rest is work on masked keys and queries.

        Args:
            block_m: queries per tile, cut from runs.
            block_n: keys per full tile, cut from spans.
            block_tail: keys per packed tile, which gathers what full tiles leave over; `block_n` by default.
        """
        block_tail = block_tail or block_n
        lists = self.span_lists
        packed = -(-lists.sums(lists.lengths % block_n) // block_tail)
        keys = lists.sums(lists.lengths // block_n) * block_n + packed * block_tail
        executed = sum(-(-run.length // block_m) * int(keys[run.span_list]) for run in self.query_runs)
        if self.candidates is not None:
            chosen = -(-self.candidates.slots // block_tail) * block_tail
            executed += int(-(-self.group_sizes // block_m) @ chosen)
        return (self.parts.pairs + self.parts.text) / (executed * block_m)


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

    image_start = sum(segments.before)
    tokens = grouping.grid.tokens + segments.tokens
    ranking = np.argsort(grouping.starts)
    columns, summaries = _columns_and_summaries(grouping, ranking, blocks, image_start)
    # From numbers of the pattern's far levels to numbers of the summaries' levels; NOT_ATTENDED is the last entry.
    renumbered = np.asarray([0, *(blocks.index(block) + 1 for block in far_blocks), NOT_ATTENDED], np.int8)
    lists, offered, list_of_group = [], [], np.empty(len(ranking), np.int64)
    seen: dict[bytes, int] = {}
    for queries in _stretches(len(ranking)):
        # Keys in token order, so that equal neighbours are contiguous keys.
        levels = pattern.levels(grouping.coordinates[queries], grouping.coordinates[ranking], grouping.counts)
        levels = renumbered[levels] if blocks != tuple(far_blocks) else levels
        new, list_of_group[queries] = _distinct_rows(levels, seen)
        levels = levels[new]
        if pattern.choice:
            offered.append(levels > 0)
            levels = np.where(levels > 0, np.int8(NOT_ATTENDED), levels)
        lists.append(_merged_spans(levels, columns))
    image_stop = image_start + grouping.grid.tokens
    before, after = Span(0, image_start, 0), Span(image_stop, tokens - image_stop, 0)
    span_lists = _joined_lists(lists, [dense for dense in (before, after) if dense.length], Span(0, tokens, 0))
    candidates = None
    if pattern.choice:
        by_group = np.concatenate(offered)
        candidates = build_candidates(pattern, by_group, list_of_group[ranking], columns, blocks)
    if not span_lists.keys.all():
        raise ValueError(
            f"{pattern} leaves a group with nothing to attend: join the far field to a near pattern with Union"
        )

    text_list = _whole_sequence_list(span_lists, tokens)
    runs = [
        QueryRun(image_start + start, length, span_list)
        for start, length, span_list in zip(
            grouping.starts[ranking].tolist(),
            grouping.sizes[ranking].tolist(),
            list_of_group[ranking].tolist(),
            strict=True,
        )
    ]
    if before.length:
        runs.insert(0, QueryRun(before.start, before.length, text_list))
    if after.length:
        runs.append(QueryRun(after.start, after.length, text_list))
    return Plan(
        grouping=grouping,
        segments=segments,
        summaries=summaries,
        pattern=pattern,
        span_lists=span_lists,
        list_of_group=list_of_group,
        text_list=text_list,
        query_runs=tuple(runs) if candidates else _merge_runs(runs),
        candidates=candidates,
    )


def _stretches(groups: int) -> Iterator[slice]:
    """Stretches of query groups, so that a matrix of one stretch by all groups stays small."""
    length = max(1, _MOST_PAIRS // groups)
    for first in range(0, groups, length):
        yield slice(first, min(first + length, groups))


def _distinct_rows(levels: npt.NDArray[np.int8], seen: dict[bytes, int]) -> tuple[list[int], list[int]]:
    """Rows that differ from all before, and for each row its number among all distinct ones.

    Args:
        levels: a stretch of the level matrix.
        seen: numbers of the distinct rows by hash; those of this stretch are added.
    """
    new, numbers = [], []
    for row, content in enumerate(np.ascontiguousarray(levels)):
        digest = blake2b(content, digest_size=16).digest()
        if digest not in seen:
            seen[digest] = len(seen)
            new.append(row)
        numbers.append(seen[digest])
    return new, numbers


def _columns_and_summaries(
    grouping: Grouping, ranking: IntArray, blocks: tuple[Cell, ...], image_start: int
) -> tuple[IntArray, Summaries]:
    """Where the keys of each group begin at each level, groups in token order, `[levels, groups + 1]`; and summaries.

    At level 0 keys are positions in the joint sequence, at level n rows of the n-th summary tensor.
    """
    sizes = [grouping.sizes[ranking]]
    starts, counts, offsets = [], [], [0]
    for block in blocks:
        # A group's blocks are contiguous in token order.
        block_starts = grouping.cell_starts(block)
        by_position = np.argsort(block_starts)
        starts.append(image_start + block_starts[by_position])
        counts.append(cell_sizes(grouping.grid, block)[by_position])
        offsets.append(offsets[-1] + len(block_starts))
        group_of_block = np.searchsorted(grouping.starts[ranking], block_starts, side="right") - 1
        sizes.append(np.bincount(group_of_block, minlength=len(ranking)))
    columns = np.zeros((len(sizes), len(ranking) + 1), np.int64)
    columns[:, 1:] = np.cumsum(sizes, axis=1)
    columns[0] += image_start
    none = np.empty(0, np.int64)
    return columns, Summaries(blocks, np.concatenate([none, *starts]), np.concatenate([none, *counts]), tuple(offsets))


class _Spans(NamedTuple):
    """Spans of several lists: which list of a stretch, level, start, length; ordered by list, then start."""

    rows: IntArray
    levels: IntArray
    starts: IntArray
    lengths: IntArray
    count: int  # of lists


def _merged_spans(levels: npt.NDArray[np.int8], columns: IntArray) -> _Spans:
    """Runs of neighbouring groups at the same level, of each row of the level matrix."""
    begins = np.ones((len(levels), levels.shape[1] + 1), np.bool_)
    np.not_equal(levels[:, 1:], levels[:, :-1], out=begins[:, 1:-1])
    # Each row ends with the end of its last run.
    rows, bounds = np.nonzero(begins)
    inside = rows[1:] == rows[:-1]
    rows, first, last = rows[:-1][inside], bounds[:-1][inside], bounds[1:][inside]
    level = levels[rows, first].astype(np.int64)
    attended = level != NOT_ATTENDED
    rows, level, first, last = rows[attended], level[attended], first[attended], last[attended]
    starts = columns[level, first]
    return _Spans(rows, level, starts, columns[level, last] - starts, len(levels))


def _joined_lists(stretches: list[_Spans], dense: list[Span], whole: Span) -> SpanLists:
    """All lists, text and the like added to each and merged with what they touch; then the whole sequence as one."""
    before = np.cumsum([0, *(spans.count for spans in stretches)])
    count = int(before[-1])
    rows = np.concatenate([spans.rows + offset for spans, offset in zip(stretches, before, strict=False)])
    levels, starts, lengths = (np.concatenate([spans[field] for spans in stretches]) for field in (1, 2, 3))
    for run in dense:
        touching = (levels == 0) & ((starts == run.stop) | (starts + lengths == run.start))
        starts = np.where(touching & (starts == run.stop), run.start, starts)
        lengths = lengths + np.where(touching, run.length, 0)
        alone = np.setdiff1d(np.arange(count), rows[touching])
        rows = np.concatenate([rows, alone])
        starts, lengths, levels = (
            np.concatenate([column, np.full(len(alone), value)])
            for column, value in ((starts, run.start), (lengths, run.length), (levels, 0))
        )
    rows = np.append(rows, count)
    starts, lengths, levels = (np.append(*pair) for pair in zip((starts, lengths, levels), whole, strict=True))
    order = np.lexsort((starts, levels, rows))
    bounds = np.searchsorted(rows[order], np.arange(count + 2))
    return SpanLists(starts[order], lengths[order], levels[order], bounds)


def _whole_sequence_list(lists: SpanLists, tokens: int) -> int:
    """The first list that is the whole sequence in one span: a full pattern's own, else the one kept for text."""
    single = np.flatnonzero(np.diff(lists.bounds) == 1)
    whole = single[(lists.lengths[lists.bounds[single]] == tokens) & (lists.levels[lists.bounds[single]] == 0)]
    return int(whole[0])


def _merge_runs(runs: list[QueryRun]) -> tuple[QueryRun, ...]:
    merged: list[QueryRun] = []
    for run in runs:
        if merged and merged[-1].span_list == run.span_list:
            run = QueryRun(merged[-1].start, merged.pop().length + run.length, run.span_list)
        merged.append(run)
    return tuple(merged)
