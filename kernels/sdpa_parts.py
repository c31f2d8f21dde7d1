"""Span attention on a CPU: many calls of torch's dense kernel, whose results are merged by their log-sum-exp.

What all attend, text and the like, is one call for all queries. What groups attend of one another is divided by keys:
the groups that attend a key group are a few runs of neighbours, which hold more queries than one group, and torch's
kernel is the faster the more queries it is given. Keys that the same run attends are a call together, read from a copy
of keys and values in which they follow one another. For `Block(1)` on two axes, that makes calls of 1×3 groups of
queries and 3×1 groups of keys. Nothing is gathered group by group and nothing is masked, but for small groups and for
summaries.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from grat_kernels.summaries import Selection, selection, summary_pair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grat_kernels.plan import Plan
    from grat_kernels.sdpa_division import Ordered, Part

# Queries of a call that takes many: what comes of them stays in a cache until it is merged.
_MOST_QUERIES = 4096


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    divided: list[Ordered],
    gathered_keys: int,
    text_valid: torch.Tensor | None,
    scale: float,
    summaries: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Span attention on a CPU; shapes and arguments as in `grat_kernels.span_attention`.

    Args:
        divided: the plan, which has no choice, divided.
        gathered_keys: most summaries that are gathered at once, where a single run has no more.
    """
    merged = _Merged(query, scale)
    tokens = _Keys.of(key, value)
    for samples, positions in _shared_keys(plan, text_valid):
        for first in range(0, plan.tokens, _MOST_QUERIES):
            merged.add(slice(first, first + _MOST_QUERIES), tokens.part(positions, samples), samples)
    for order, parts in divided:
        merged.add_parts(parts, tokens if order is None else tokens.in_order(order))
    if plan.span_lists.levels.any():
        means, log_counts = _Keys.of(*summary_pair(key, value, plan, summaries)), plan.tensors(key.device).log_counts
        for batch in plan.cached(("sdpa batches", gathered_keys), lambda: _batches(plan, gathered_keys)):
            merged.add_batch(batch, means, log_counts)
    return merged.out.transpose(1, 2).to(query.dtype)


class _Keys(NamedTuple):
    """Keys and values, `[B, H, n, D]` each."""

    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor) -> _Keys:
        """From `[B, n, H, D]`."""
        return cls(_heads_first(key), _heads_first(value))

    def part(self, positions: slice, samples: slice = slice(None)) -> _Keys:
        """A run of keys of some samples."""
        return _Keys(self.key[samples, :, positions], self.value[samples, :, positions])

    def in_order(self, order: list[slice]) -> _Keys:
        """A copy of some runs, one after another; head by head in memory, which is read a little faster."""
        return _Keys(*(torch.cat([tensor[:, :, positions] for positions in order], dim=2) for tensor in self))

    def gathered(self, batch: _Batch) -> _Keys:
        """What the runs of a batch attend, `[B * runs, H, keys of one, D]` each."""
        return _Keys(*(_gathered(tensor, batch.rows, batch.runs) for tensor in self))


class _Batch(NamedTuple):
    """Runs of queries of equal length that attend as many summaries each, which are gathered.

    Attributes:
        runs: how many.
        queries: their positions, one run after another.
        rows: of the summaries they attend, one run after another, `[runs * summaries of one]`.
    """

    runs: int
    queries: Selection
    rows: torch.Tensor


class _Merged:
    """Attention of all queries to what was added so far.

    Attributes:
        out: `[B, H, N, D]`, token by token in memory, in fp32 at least.
        log_sum: logarithm of the sum of all exponentiated scores, `[B, H, N]`; -inf where nothing was attended.
    """

    def __init__(self, query: torch.Tensor, scale: float) -> None:
        """For queries `[B, N, H, D]`."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        self._query = _heads_first(query)
        self._scale = scale
        self.out = torch.zeros(query.shape, dtype=dtype).transpose(1, 2)
        self.log_sum = torch.full(query.shape[:3], -math.inf, dtype=dtype).transpose(1, 2)

    def add(self, queries: slice, keys: _Keys, samples: slice = slice(None)) -> None:
        """Attention of a run of queries of some samples to keys of as many samples."""
        where = samples, slice(None), queries
        new = self._attend(self._query[where], keys)
        _merge(self.out[where], self.log_sum[where], *new)

    def add_parts(self, parts: list[Part], keys: _Keys) -> None:
        """Attention of runs of queries to runs of keys."""
        for part in parts:
            self.add(part.queries, keys.part(part.keys))

    def add_batch(self, batch: _Batch, means: _Keys, log_counts: torch.Tensor) -> None:
        """Attention of runs of queries to means `[B, H, R, D]`, with what is added to their scores `[R]`."""
        where = slice(None), slice(None), batch.queries
        query = _gathered(self._query, batch.queries, batch.runs)
        bias = log_counts[batch.rows].view(batch.runs, 1, 1, -1).repeat(len(self.out), 1, 1, 1)
        # torch's kernel takes biases in fp32 with 16 bits, else in the dtype of the query.
        new = self._attend(query, means.gathered(batch), bias.to(self.out.dtype).expand(-1, -1, query.shape[2], -1))
        out, log_sum = (part.unflatten(0, (-1, batch.runs)).transpose(1, 2).flatten(2, 3) for part in new)
        held = self.out[where], self.log_sum[where]
        _merge(*held, out, log_sum)
        if not isinstance(batch.queries, slice):
            self.out[where], self.log_sum[where] = held

    def _attend(
        self, query: torch.Tensor, keys: _Keys, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention `[B, H, n, D]` of a run of queries, and its log-sum-exp `[B, H, n]`."""
        # What `scaled_dot_product_attention` calls on a CPU; it alone tells the log-sum-exp.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys.key, keys.value, attn_mask=bias, scale=self._scale
        )


def _merge(out: torch.Tensor, log_sum: torch.Tensor, new_out: torch.Tensor, new_log_sum: torch.Tensor) -> None:
    """Adds attention to further keys, in place."""
    share = torch.sigmoid(new_log_sum - log_sum)
    out.lerp_(new_out.to(out.dtype), share[..., None])
    torch.logaddexp(log_sum, new_log_sum, out=log_sum)


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, H, n, D]` from `[B, n, H, D]`; torch's kernel needs the channels of a token side by side."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2)


def _gathered(tensor: torch.Tensor, rows: slice | torch.Tensor, runs: int) -> torch.Tensor:
    """Rows of `[B, H, n, D]` as `[B * runs, H, rows of one, D]`."""
    rows_first = tensor.transpose(1, 2)
    if isinstance(rows, torch.Tensor) and rows_first.is_contiguous():
        picked = rows_first.index_select(1, rows)
    else:
        # Of a view of some heads, `index_select` would copy everything first, for each batch anew.
        picked = rows_first[:, rows]
    return picked.unflatten(1, (runs, -1)).flatten(0, 1).transpose(1, 2)


def _shared_keys(plan: Plan, text_valid: torch.Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Runs of positions before and after the image that all queries of some samples attend: samples, positions."""
    outside = (0, plan.image_start), (plan.image_stop, plan.tokens)
    runs = [(slice(None), *run) for run in outside]
    if text_valid is not None:
        runs = []
        for sample, valid in enumerate(text_valid.tolist()):
            padding = plan.text_start + min(valid, plan.text_len), plan.text_start + plan.text_len
            for start, stop in outside:
                runs.append((slice(sample, sample + 1), start, min(stop, max(start, padding[0]))))
                runs.append((slice(sample, sample + 1), max(start, min(stop, padding[1])), stop))
    for samples, start, stop in runs:
        if start < stop:
            yield samples, slice(start, stop)


def _batches(plan: Plan, gathered_keys: int) -> list[_Batch]:
    """All runs that attend summaries, with these."""
    lists = plan.span_lists
    shapes: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for run in plan.query_runs:
        spans = [span for span in lists[run.span_list] if span.level > 0]
        if spans:
            firsts = [plan.summaries.offsets[span.level - 1] + span.start for span in spans]
            rows = np.concatenate(
                [np.arange(first, first + span.length) for first, span in zip(firsts, spans, strict=True)]
            )
            shapes[run.length, len(rows)].append((np.arange(run.start, run.start + run.length), rows))
    batches = []
    for (_, count), runs in shapes.items():
        size = max(1, gathered_keys // count)
        for first in range(0, len(runs), size):
            together = runs[first : first + size]
            queries, rows = (np.concatenate(column) for column in zip(*together, strict=True))
            batches.append(_Batch(len(together), selection(queries, torch.device("cpu")), torch.from_numpy(rows)))
    return batches
