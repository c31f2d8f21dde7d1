"""Span lists: what groups attend, as a few contiguous runs of keys each.

In the token order of a `Grouping` every group is one run of positions, and its summaries are one run of rows at each
level. So the groups that a group attends are columns of keys, and neighbouring columns at one level merge into a span.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from grat_kernels.geometry import IntArray
from grat_kernels.pattern import NOT_ATTENDED, Levels


class Span(NamedTuple):
    """A contiguous run of keys. Level 0: positions in the joint sequence; level n: rows of the n-th summary tensor."""

    start: int
    length: int
    level: int

    @property
    def stop(self) -> int:
        """First position or row after the span."""
        return self.start + self.length


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

    @classmethod
    def of(cls, spans: IntArray, count: int) -> SpanLists:
        """From list, level, start and length of each span in any order, `[4, spans]`, of so many lists."""
        lists, levels, starts, lengths = spans[:, np.lexsort((spans[2], spans[1], spans[0]))]
        return cls(starts, lengths, levels, np.searchsorted(lists, np.arange(count + 1)))

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


def distinct_rows(levels: Levels, seen: dict[bytes, int]) -> tuple[list[int], list[int]]:
    """Rows that differ from all before, and for each row its number among all distinct ones.

    Args:
        levels: rows of levels, `[rows, columns]`.
        seen: numbers of the distinct rows by hash; those of these rows are added.
    """
    new, numbers = [], []
    for row, content in enumerate(np.ascontiguousarray(levels)):
        digest = blake2b(content, digest_size=16).digest()
        if digest not in seen:
            seen[digest] = len(seen)
            new.append(row)
        numbers.append(seen[digest])
    return new, numbers


def merged_spans(levels: Levels, columns: IntArray, first_list: int) -> IntArray:
    """Runs of neighbouring columns that a list attends at one level, as spans.

    Args:
        levels: of each list and column of keys, `[lists, columns]`; columns follow one another in the joint sequence.
        columns: where each column begins at each level, and where the last one ends, `[levels, columns + 1]`.
        first_list: number of the first list.

    Returns:
        List, level, start and length of each span, `[4, spans]`.
    """
    begins = np.ones((len(levels), levels.shape[1] + 1), np.bool_)
    np.not_equal(levels[:, 1:], levels[:, :-1], out=begins[:, 1:-1])
    # Each row ends with the end of its last run.
    rows, bounds = np.nonzero(begins)
    inside = rows[1:] == rows[:-1]
    rows, first, last = rows[:-1][inside], bounds[:-1][inside], bounds[1:][inside]
    level = levels[rows, first].astype(np.int64)
    starts, stops = columns[level, first], columns[level, last]
    kept = (level != NOT_ATTENDED) & (stops > starts)
    return np.stack([rows + first_list, level, starts, stops - starts])[:, kept]
