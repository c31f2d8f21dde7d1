"""Span attention on torch's scaled_dot_product_attention: CPU, CUDA and MPS, without any N×N mask.

Groups that choose by content gather keys head by head. Large groups on a CPU are `grat_kernels.sdpa_parts`. Else there
are two ways, by span list:
- one span (text queries, full attention): keys are a slice, nothing is copied;
- others: runs with lists of equal shape are gathered and computed together, a bounded number at a time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from grat_kernels import sdpa_parts
from grat_kernels.choosing import chosen_rows
from grat_kernels.padded_text import padded_positions, without_padding
from grat_kernels.sdpa_division import PER_GATHERED_KEY, divide
from grat_kernels.summaries import Selection, selection, summary_pair
from grat_kernels.tile_lists import EMPTY

if TYPE_CHECKING:
    from grat_kernels.plan import Plan
    from grat_kernels.span_lists import QueryRun

DESCRIPTION = "torch scaled_dot_product_attention, runs of large groups in parts and small groups in batches"

# Keys and values gathered at once: for each thread about what stays in a CPU core's second-level cache; memory alone
# matters elsewhere.
CPU_GATHER_BYTES = 1 << 20
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
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Span attention; shapes and arguments as in `grat_kernels.span_attention`.

    Returns:
        `[B, N, H, D]`, contiguous.
    """
    device = query.device
    on_cpu = device.type == "cpu"
    budget_bytes = CPU_GATHER_BYTES * torch.get_num_threads() if on_cpu else DEVICE_GATHER_BYTES
    gathered_keys = budget_bytes // (2 * key.shape[0] * key.shape[2] * key.shape[3] * key.element_size())
    if on_cpu and plan.candidates is None:
        divided = plan.cached(("sdpa parts", PER_GATHERED_KEY), lambda: divide(plan, PER_GATHERED_KEY))
        if divided is not None:
            return sdpa_parts.attention(query, key, value, plan, divided, gathered_keys, text_valid, scale, summaries)
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    if plan.candidates is not None:
        # Text attends tokens alone; groups take means besides, head by head.
        tokens = _Source.of_tokens(key, value, plan, text_valid)
        slices, batches = plan.cached(("sdpa chosen", device), lambda: _divide_choosing(plan, device))
        for work in slices:
            work.run(query, tokens, scale, out)
        summaries = summary_pair(key, value, plan, summaries)
        _attend_chosen(query, tokens, summaries, batches, plan, scale, out, budget_bytes)
        return out
    source = _Source.of(key, value, plan, text_valid, summaries)
    for work in plan.cached(("sdpa", device, gathered_keys), lambda: _divide(plan, device, gathered_keys)):
        work.run(query, source, scale, out)
    return out


class _Source(NamedTuple):
    """What is attended: tokens, then the summaries of all levels.

    Attributes:
        key: `[B, N + R, H, D]`.
        value: `[B, N + R, H, D]`.
        bias: added to the scores: 0, log of a summary's size, -inf on padded text, `[B, N + R]`; None where all 0.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        text_valid: torch.Tensor | None,
        summaries: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> _Source:
        source = cls.of_tokens(key, value, plan, text_valid)
        # Heads without a far field share the summaries of others, which they need not carry along.
        if not plan.span_lists.levels.any():
            return source
        bias = key.new_zeros(key.shape[:2], dtype=_bias_dtype(key)) if source.bias is None else source.bias
        of_means = _bias_of_means(plan, key).expand(len(bias), -1)
        # One copy of all keys spares two copies of every gathered list.
        pairs = zip(
            (source.key, source.value, bias), (*summary_pair(key, value, plan, summaries), of_means), strict=True
        )
        return cls(*(torch.cat(pair, dim=1) for pair in pairs))

    @classmethod
    def of_tokens(cls, key: torch.Tensor, value: torch.Tensor, plan: Plan, text_valid: torch.Tensor | None) -> _Source:
        """Without summaries."""
        if text_valid is None:
            return cls(key, value, None)
        padded = padded_positions(plan, text_valid, key.device)
        bias = torch.zeros(padded.shape, dtype=_bias_dtype(key), device=key.device).masked_fill_(padded, -torch.inf)
        return cls(without_padding(key, padded), without_padding(value, padded), bias)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Source:
        """The same change made to all parts."""
        return _Source(change(self.key), change(self.value), None if self.bias is None else change(self.bias))


def _bias_dtype(key: torch.Tensor) -> torch.dtype:
    """The CPU kernel takes fp32 biases with 16-bit keys; else a bias must have the dtype of the query."""
    return torch.float32 if key.device.type == "cpu" and key.element_size() == 2 else key.dtype


def _bias_of_means(plan: Plan, key: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of all summaries, `[R]`."""
    return plan.tensors(key.device).log_counts.to(_bias_dtype(key))


def _attend(query: torch.Tensor, source: _Source, scale: float) -> torch.Tensor:
    """Dense attention of queries `[B, n, H, D]` to all of a source with as many samples."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, source.key, source.value))
    if source.bias is None:
        return scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
    mask = source.bias[:, None, None, :]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask.expand(-1, 1, query.shape[2], -1), scale=scale)
    # Torch's kernels differ in what they give a query without any key.
    return out.masked_fill(mask.isneginf().all(-1, keepdim=True), 0).transpose(1, 2)


class _Slice(NamedTuple):
    """Queries that attend one span: nothing is copied."""

    queries: slice
    keys: slice

    def run(self, query: torch.Tensor, source: _Source, scale: float, out: torch.Tensor) -> None:
        out[:, self.queries] = _attend(query[:, self.queries], source.map(lambda tensor: tensor[:, self.keys]), scale)


class _Batch(NamedTuple):
    """Runs of equal shape, gathered: rows of all runs one after another, `[runs * rows of one]` each."""

    runs: int
    queries: torch.Tensor
    keys: torch.Tensor

    def run(self, query: torch.Tensor, source: _Source, scale: float, out: torch.Tensor) -> None:
        gathered = source.map(lambda tensor: self._gather(tensor, self.keys))
        attended = _attend(self._gather(query, self.queries), gathered, scale)
        out[:, self.queries] = attended.unflatten(0, (-1, self.runs)).flatten(1, 2)

    def _gather(self, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`[B * runs, rows of one, ...]` from `[B, rows, ...]`."""
        # Of a view of some heads, `index_select` would copy everything first, for each batch anew.
        picked = tensor.index_select(1, rows) if tensor.is_contiguous() else tensor[:, rows]
        return picked.unflatten(1, (self.runs, -1)).flatten(0, 1)


class _ChoosingBatch(NamedTuple):
    """Groups of equal shape that choose.

    Attributes:
        groups: their numbers.
        queries: positions of their tokens, one group after another.
        keys: positions of what their lists hold, `[groups, keys of one]` int32.
        slots: those that each fills, the first of a row of what is chosen.
    """

    groups: Selection
    queries: Selection
    keys: torch.Tensor
    slots: int


def _attend_chosen(
    query: torch.Tensor,
    tokens: _Source,
    summaries: tuple[torch.Tensor, torch.Tensor],
    batches: list[_ChoosingBatch],
    plan: Plan,
    scale: float,
    out: torch.Tensor,
    budget_bytes: int,
) -> None:
    """Attention of groups that choose, one head of one sample at a time: its keys stay in a CPU's cache.

    Args:
        query: `[B, N, H, D]`.
        tokens: keys and values of all tokens.
        summaries: means of keys and values, `[B, R, H, D]` each.
        batches: groups by shape.
        plan: with candidates.
        scale: factor on scores.
        out: to write to, `[B, N, H, D]`.
        budget_bytes: of keys and values that are gathered at once.
    """
    batch, count, heads, head_dim = query.shape
    chosen = chosen_rows(query, summaries, plan, scale)
    # Behind tokens and means one row that is not attended stands for slots that are empty.
    nothing = count + plan.summaries.rows
    chosen.masked_fill_(chosen == EMPTY, nothing)
    key, value = (tensor.new_zeros(nothing + 1, head_dim) for tensor in (tokens.key, tokens.value))
    bias = torch.zeros(nothing + 1, dtype=_bias_dtype(query), device=query.device)
    bias[count:nothing] = _bias_of_means(plan, query)
    bias[nothing] = -torch.inf
    for sample, head in itertools.product(range(batch), range(heads)):
        for held, of_tokens, of_means in zip((key, value), tokens[:2], summaries, strict=True):
            held[:count] = of_tokens[sample, :, head]
            held[count:nothing] = of_means[sample, :, head]
        if tokens.bias is not None:
            bias[:count] = tokens.bias[sample]
        for shape in batches:
            rows = torch.cat([shape.keys, chosen[sample, head, shape.groups, : shape.slots]], dim=1)
            groups, keys = rows.shape
            at_once = max(1, budget_bytes // (2 * keys * head_dim * query.element_size()))
            gathered = [held.new_empty(min(at_once, groups) * keys, head_dim) for held in (key, value)]
            mask = bias.index_select(0, rows.flatten()).view(groups, 1, 1, keys)
            queries = query[sample, shape.queries, head].unflatten(0, (groups, 1, -1))
            attended = torch.empty_like(queries)
            parts = (tensor.split(at_once) for tensor in (rows, mask, queries, attended))
            for of_rows, of_mask, of_queries, result in zip(*parts, strict=True):
                picked = of_rows.flatten()
                near = (
                    torch.index_select(held, 0, picked, out=room[: len(picked)]).view(len(of_rows), 1, keys, head_dim)
                    for held, room in zip((key, value), gathered, strict=True)
                )
                of_mask = of_mask.expand(-1, -1, of_queries.shape[2], -1)
                result.copy_(scaled_dot_product_attention(of_queries, *near, attn_mask=of_mask, scale=scale))
            out[sample, shape.queries, head] = attended.flatten(0, 2)


def _divide(plan: Plan, device: torch.device, gathered_keys: int) -> list[_Slice | _Batch]:
    """Divides a plan's runs; a batch gathers at most `gathered_keys` keys, or those of one run."""
    work: list[_Slice | _Batch] = []
    batches: dict[tuple[int, int], list[QueryRun]] = defaultdict(list)
    lists = _KeyLists(plan)
    for run in plan.query_runs:
        near, far = lists.near(run), lists.far(run)
        keys = sum(key_range[1] - key_range[0] for key_range in near + far)
        if len(near) == 1 and not far:
            work.append(_Slice(slice(run.start, run.start + run.length), slice(*near[0])))
        else:
            batches[run.length, keys].append(run)
    for (_, keys), runs in batches.items():
        size = max(1, gathered_keys // keys)
        work += [_gather_batch(lists, runs[first : first + size], device) for first in range(0, len(runs), size)]
    return work


def _divide_choosing(plan: Plan, device: torch.device) -> tuple[list[_Slice], list[_ChoosingBatch]]:
    """The runs of a plan with a choice: those that attend all, and groups of equal shape."""
    assert plan.candidates is not None
    lists = _KeyLists(plan)
    slices, groups = [], []
    for run in plan.query_runs:
        if plan.image_start <= run.start < plan.image_stop:
            groups.append(run)
        else:
            slices.append(_Slice(slice(run.start, run.start + run.length), slice(0, plan.tokens)))
    shapes: dict[tuple[int, int, int], list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)
    for number, (run, slots) in enumerate(zip(groups, plan.candidates.slots.tolist(), strict=True)):
        keys = np.concatenate([np.arange(*key_range, dtype=np.int32) for key_range in lists.near(run)])
        queries = np.arange(run.start, run.start + run.length)
        shapes[run.length, len(keys), slots].append((number, queries, keys))
    batches = []
    for (_, _, slots), members in shapes.items():
        numbers, queries, keys = zip(*members, strict=True)
        batches.append(
            _ChoosingBatch(
                selection(np.array(numbers), device),
                selection(np.concatenate(queries), device),
                torch.from_numpy(np.stack(keys)).to(device),
                slots,
            )
        )
    return slices, batches


class _KeyLists:
    """Spans as ranges (start, stop) of a source's rows, where summaries follow the tokens."""

    def __init__(self, plan: Plan) -> None:
        self._lists = plan.span_lists
        self._offsets = (0, *(plan.tokens + offset for offset in plan.summaries.offsets))

    def near(self, run: QueryRun) -> list[tuple[int, int]]:
        """Ranges of tokens."""
        return [(span.start, span.stop) for span in self._lists[run.span_list] if span.level == 0]

    def far(self, run: QueryRun) -> list[tuple[int, int]]:
        """Ranges of summaries."""
        return [
            (self._offsets[span.level] + span.start, self._offsets[span.level] + span.stop)
            for span in self._lists[run.span_list]
            if span.level > 0
        ]


def _gather_batch(lists: _KeyLists, runs: list[QueryRun], device: torch.device) -> _Batch:
    def rows(ranges: list[tuple[int, int]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.arange(*key_range) for key_range in ranges])).to(device)

    queries = rows([(run.start, run.start + run.length) for run in runs])
    keys = rows([key_range for run in runs for key_range in lists.near(run) + lists.far(run)])
    return _Batch(len(runs), queries, keys)
