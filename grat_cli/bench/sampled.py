"""Error of an attention output over sampled queries, for sizes at which nothing dense fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from grat_kernels import HeadPlan, Plan

# What a query attends: for its head, its position in the joint sequence and a source of keys or values `[N, D]`, the
# attended rows `[K, D]` in a dtype, and what is added to their scores `[K]`.
AttendedRows = Callable[[int, int, torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]


class SampledError(NamedTuple):
    """Largest errors over sampled rows, and the largest exact value there."""

    error: float
    plain_error: float  # of a plain computation in the dtype of the tensors
    largest: float


def sampled_error(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attended: AttendedRows,
    *,
    text_start: int = 0,
    samples: int = 24,
) -> SampledError:
    """How far rows of `output` are from attention in fp64, at corners of the tensors and at random places.

    Args:
        output: `[B, N, H, D]`, any device.
        query: `[B, N, H, D]`.
        key: `[B, N, H, D]`.
        value: `[B, N, H, D]`.
        attended: what each query attends.
        text_start: position of the first text token, whose row is among the corners.
        samples: random rows besides the corners.
    """
    batch, tokens, heads, _ = query.shape
    generator = torch.Generator().manual_seed(0)
    picks = [(0, 0, 0), (batch - 1, tokens - 1, heads - 1), (batch - 1, min(text_start, tokens - 1), heads - 1)]
    for _ in range(samples):
        sample, position, head = (int(torch.randint(size, (), generator=generator)) for size in (batch, tokens, heads))
        picks.append((sample, position, head))
    error, plain_error, largest = 0.0, 0.0, 0.0
    for sample, position, head in picks:
        found, row_query = output[sample, position, head], query[sample, position, head]
        keys, values = key[sample, :, head], value[sample, :, head]
        if query.device.type == "mps":  # has no fp64
            found, row_query, keys, values = (tensor.cpu() for tensor in (found, row_query, keys, values))
        exact = _row(row_query, keys, values, attended, head, position, torch.float64)
        plain = _row(row_query, keys, values, attended, head, position, query.dtype)
        # A row that holds NaN is infinitely wrong: max() would drop the NaN.
        difference = float((found - exact).abs().max())
        error = max(error, math.inf if math.isnan(difference) else difference)
        plain_error = max(plain_error, float((plain - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    return SampledError(error, plain_error, largest)


def rows_of_plan(plan: Plan | HeadPlan) -> AttendedRows:
    """What the queries of a plan attend, in its token order: spans of tokens, and summaries with their bias."""

    def attended(
        head: int, position: int, source: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_head = plan.classes[plan.class_of_head[head]] if isinstance(plan, HeadPlan) else plan
        run = next(run for run in of_head.query_runs if run.start <= position < run.start + run.length)
        rows, bias = [], []
        for span in of_head.span_lists[run.span_list]:
            if span.level == 0:
                rows.append(source[span.start : span.stop].to(dtype))
                bias.append(torch.zeros(span.length, dtype=dtype, device=source.device))
                continue
            offset = plan.summaries.offsets[span.level - 1]
            selected = slice(offset + span.start, offset + span.stop)
            counts = torch.from_numpy(plan.summaries.counts[selected]).to(source.device)
            start = int(plan.summaries.starts[selected][0])
            # Blocks of consecutive summaries are consecutive runs of tokens.
            block = torch.repeat_interleave(torch.arange(len(counts), device=source.device), counts)
            members = source[start : start + len(block)].double()
            sums = members.new_zeros(len(counts), members.shape[1]).index_add_(0, block, members)
            rows.append((sums / counts[:, None]).to(dtype))
            bias.append(counts.double().log().to(dtype))
        return torch.cat(rows), torch.cat(bias)

    return attended


def rows_of_mask(mask: Callable[[int], torch.Tensor | None]) -> AttendedRows:
    """What queries attend by a mask: a position's row of it, `[N]` bool on the CPU, or None for every token."""

    def attended(
        head: int, position: int, source: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        selected = mask(position)
        rows = (source if selected is None else source[selected.to(source.device)]).to(dtype)
        return rows, torch.zeros(len(rows), dtype=dtype, device=source.device)

    return attended


def _row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attended: AttendedRows,
    head: int,
    position: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The output `[D]` of the query `[D]` of a head at a position, for keys and values `[N, D]`."""
    keys, bias = attended(head, position, key, dtype)
    values, _ = attended(head, position, value, dtype)
    scores = keys @ query.to(dtype) / math.sqrt(len(query)) + bias
    return scores.softmax(0) @ values
