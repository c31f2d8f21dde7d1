"""Span attention on torch's scaled_dot_product_attention: CPU, CUDA and MPS, without any N×N mask.

Three ways, chosen per span list:
- one span (text queries, full attention): keys are a slice, nothing is copied;
- small groups: runs with lists of equal shape are gathered and computed together, a bounded number at a time;
- large groups: one run at a time over a *window*, a buffer of keys that moves from group to group. Neighbouring
  groups share most of their keys, and only those that change are copied: on a CPU, gathering all keys of every
  group costs a quarter of the time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from grat_kernels.padded_text import padded_positions, without_padding
from grat_kernels.summaries import summarise

if TYPE_CHECKING:
    from grat_kernels.plan import Plan, QueryRun

DESCRIPTION = "torch scaled_dot_product_attention, groups of equal shape in batches"

# Keys and values gathered at once: about what stays in a CPU's second-level cache; memory alone matters elsewhere.
CPU_GATHER_BYTES = 4 << 20
DEVICE_GATHER_BYTES = 256 << 20


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None) -> str | None:
    """Why this backend cannot run, or None: torch has an implementation for every device."""
    if not dtype.is_floating_point:
        return f"attention needs a floating-point dtype, not {dtype}"
    return None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    text_valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Span attention; shapes and arguments as in `grat_kernels.span_attention`.

    Returns:
        `[B, N, H, D]`, contiguous.
    """
    device = query.device
    source = _Source.of(key, value, plan, text_valid)
    budget_bytes = CPU_GATHER_BYTES if device.type == "cpu" else DEVICE_GATHER_BYTES
    row_bytes = 2 * key.shape[0] * key.shape[2] * key.shape[3] * key.element_size()
    gathered_keys = budget_bytes // row_bytes
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    for work in plan.cached(("sdpa", device, gathered_keys), lambda: _divide(plan, device, gathered_keys)):
        work.run(query, source, scale, out)
    return out


class _Source(NamedTuple):
    """What is attended: tokens `[B, N, H, D]`, summaries `[B, R, H, D]`, and what is added to their scores.

    `token_bias` `[B, N]` is -inf on padded text and None where there is none; `summary_bias` is `[R]`.
    """

    key: torch.Tensor
    value: torch.Tensor
    summary_key: torch.Tensor
    summary_value: torch.Tensor
    token_bias: torch.Tensor | None
    summary_bias: torch.Tensor

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor, plan: Plan, text_valid: torch.Tensor | None) -> _Source:
        # The CPU kernel takes fp32 biases with 16-bit keys; else a bias must have the dtype of the query.
        half_on_cpu = key.device.type == "cpu" and key.element_size() == 2
        bias_dtype = torch.float32 if half_on_cpu else key.dtype
        token_bias = None
        if text_valid is not None:
            padded = padded_positions(plan, text_valid, key.device)
            token_bias = torch.zeros(padded.shape, dtype=bias_dtype, device=key.device).masked_fill_(padded, -torch.inf)
            key, value = without_padding(key, padded), without_padding(value, padded)
        return cls(
            key,
            value,
            summarise(key, plan),
            summarise(value, plan),
            token_bias,
            plan.tensors(key.device).log_counts.to(bias_dtype),
        )


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Dense attention in `[B, N, H, D]` layout; `bias` `[B or 1, keys]` is added to every query's scores."""
    mask = None if bias is None else bias[:, None, None, :].expand(query.shape[0], 1, query.shape[1], -1)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


class _Slice(NamedTuple):
    """Queries that attend one span of tokens: nothing is copied."""

    queries: slice
    keys: slice

    def run(self, query: torch.Tensor, source: _Source, scale: float, out: torch.Tensor) -> None:
        bias = None if source.token_bias is None else source.token_bias[:, self.keys]
        key, value = source.key[:, self.keys], source.value[:, self.keys]
        out[:, self.queries] = _attend(query[:, self.queries], key, value, bias, scale)


class _Batch(NamedTuple):
    """Runs of equal shape, gathered: rows of all runs one after another, `[runs * rows of one]` each."""

    runs: int
    queries: torch.Tensor
    tokens: torch.Tensor
    summaries: torch.Tensor

    def run(self, query: torch.Tensor, source: _Source, scale: float, out: torch.Tensor) -> None:
        key = self._gather(source.key, source.summary_key)
        value = self._gather(source.value, source.summary_value)
        attended = _attend(self._rows(query, self.queries).flatten(0, 1), key, value, self._bias(source), scale)
        out[:, self.queries] = attended.unflatten(0, (-1, self.runs)).flatten(1, 2)

    def _rows(self, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`[B, rows, ...]` to `[B, runs, rows of one, ...]`."""
        return tensor.index_select(1, rows).unflatten(1, (self.runs, -1))

    def _gather(self, tokens: torch.Tensor, summaries: torch.Tensor) -> torch.Tensor:
        rows = self._rows(tokens, self.tokens)
        if len(self.summaries):
            rows = torch.cat([rows, self._rows(summaries, self.summaries)], dim=2)
        return rows.flatten(0, 1)

    def _bias(self, source: _Source) -> torch.Tensor | None:
        """`[B * runs, keys]`, or None where nothing is added."""
        if source.token_bias is None and not len(self.summaries):
            return None
        batch = source.key.shape[0]
        summary = self._rows(source.summary_bias.expand(batch, -1), self.summaries)
        if source.token_bias is None:
            token = summary.new_zeros(batch, self.runs, len(self.tokens) // self.runs)
        else:
            token = self._rows(source.token_bias, self.tokens)
        return torch.cat([token, summary], dim=2).flatten(0, 1)


class _Copy(NamedTuple):
    """Rows of a window to fill, and where they come from."""

    window: slice
    source: slice


class _Step(NamedTuple):
    """One run over a window: token rows that change since the step before, and all summary rows."""

    queries: slice
    tokens: tuple[_Copy, ...]
    summaries: tuple[_Copy, ...]


class _Window(NamedTuple):
    """Runs whose lists hold token pieces of equal sizes, in an order that changes few pieces from step to step."""

    rows: int
    steps: tuple[_Step, ...]

    def run(self, query: torch.Tensor, source: _Source, scale: float, out: torch.Tensor) -> None:
        batch, _, heads, head_dim = query.shape
        key, value = (query.new_empty(batch, self.rows, heads, head_dim) for _ in range(2))
        biased = source.token_bias is not None or source.summary_bias.numel() > 0
        bias = torch.zeros(batch, self.rows, dtype=source.summary_bias.dtype, device=query.device) if biased else None
        for step in self.steps:
            for window, rows in step.tokens:
                key[:, window] = source.key[:, rows]
                value[:, window] = source.value[:, rows]
                if bias is not None and source.token_bias is not None:
                    bias[:, window] = source.token_bias[:, rows]
            for window, rows in step.summaries:
                key[:, window] = source.summary_key[:, rows]
                value[:, window] = source.summary_value[:, rows]
                if bias is not None:
                    bias[:, window] = source.summary_bias[rows]
            out[:, step.queries] = _attend(query[:, step.queries], key, value, bias, scale)


def _divide(plan: Plan, device: torch.device, gathered_keys: int) -> list[_Slice | _Batch | _Window]:
    """Divides a plan's runs among the three ways; a batch gathers at most `gathered_keys` keys."""
    work: list[_Slice | _Batch | _Window] = []
    batches: dict[tuple[int, int, int], list[QueryRun]] = defaultdict(list)
    windows: dict[tuple[tuple[int, ...], int], list[QueryRun]] = defaultdict(list)
    cutter = _Cutter(plan)
    for run in plan.query_runs:
        spans = plan.span_lists[run.span_list]
        tokens = sum(span.length for span in spans if span.level == 0)
        summaries = sum(span.length for span in spans if span.level > 0)
        if len(spans) == 1 and summaries == 0:
            work.append(_Slice(slice(run.start, run.start + run.length), slice(spans[0].start, spans[0].stop)))
        elif tokens + summaries <= gathered_keys:
            batches[run.length, tokens, summaries].append(run)
        else:
            sizes = sorted(piece.stop - piece.start for piece in cutter.pieces(run))
            windows[tuple(sizes), summaries].append(run)
    for (_, tokens, summaries), runs in batches.items():
        size = max(1, gathered_keys // (tokens + summaries))
        work += [_gather_batch(plan, runs[first : first + size], device) for first in range(0, len(runs), size)]
    work += [_slide_window(plan, cutter, runs) for runs in windows.values()]
    return work


def _gather_batch(plan: Plan, runs: list[QueryRun], device: torch.device) -> _Batch:
    def rows(ranges: list[tuple[int, int]]) -> torch.Tensor:
        parts = [np.arange(start, start + length) for start, length in ranges]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts])).to(device)

    offsets = (0, *plan.summaries.offsets)
    spans = [span for run in runs for span in plan.span_lists[run.span_list]]
    return _Batch(
        len(runs),
        rows([(run.start, run.length) for run in runs]),
        rows([(span.start, span.length) for span in spans if span.level == 0]),
        rows([(offsets[span.level] + span.start, span.length) for span in spans if span.level > 0]),
    )


class _Cutter:
    """Cuts token spans where groups and text begin, so that neighbouring lists share whole pieces."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        starts = np.sort(plan.grouping.starts) + plan.image_start
        self.cuts = np.append(starts, plan.text_start) if plan.text_len else starts
        self.cuts.sort()

    def pieces(self, run: QueryRun) -> list[slice]:
        pieces = []
        for span in self.plan.span_lists[run.span_list]:
            if span.level == 0:
                inside = self.cuts[(self.cuts > span.start) & (self.cuts < span.stop)].tolist()
                bounds = [span.start, *inside, span.stop]
                pieces += [slice(*pair) for pair in itertools.pairwise(bounds)]
        return pieces


def _slide_window(plan: Plan, cutter: _Cutter, runs: list[QueryRun]) -> _Window:
    offsets = (0, *plan.summaries.offsets)
    held: dict[tuple[int, int], slice] = {}
    steps = []
    rows = 0
    for run in runs:
        pieces = [(piece.start, piece.stop) for piece in cutter.pieces(run)]
        wanted = set(pieces)
        free: dict[int, list[slice]] = defaultdict(list)
        if held:
            for start, stop in [piece for piece in held if piece not in wanted]:
                free[stop - start].append(held.pop((start, stop)))
        else:
            bounds = np.cumsum([0, *(stop - start for start, stop in pieces)]).tolist()
            for first, last in itertools.pairwise(bounds):
                free[last - first].append(slice(first, last))
            rows = bounds[-1]
        copies = []
        for start, stop in pieces:
            if (start, stop) not in held:
                held[start, stop] = free[stop - start].pop(0)
                copies.append(_Copy(held[start, stop], slice(start, stop)))
        filled = rows
        summaries = []
        for span in plan.span_lists[run.span_list]:
            if span.level > 0:
                first = offsets[span.level] + span.start
                summaries.append(_Copy(slice(filled, filled + span.length), slice(first, first + span.length)))
                filled += span.length
        steps.append(_Step(slice(run.start, run.start + run.length), tuple(copies), tuple(summaries)))
    summary_rows = sum(copy.source.stop - copy.source.start for copy in steps[0].summaries)
    return _Window(rows + summary_rows, tuple(steps))
