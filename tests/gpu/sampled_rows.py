"""Attention of sampled queries, for sizes at which nothing dense fits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from grat_kernels import Plan


class SampledError(NamedTuple):
    """Largest errors over sampled rows, and the largest exact value there."""

    error: float
    plain_error: float  # of a plain computation in the dtype of the tensors
    largest: float


def sampled_error(
    output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, samples: int = 24
) -> SampledError:
    """How far the rows of `output` are from exact, at corners of the tensors and at random places."""
    batch, tokens, heads, _ = query.shape
    generator = torch.Generator().manual_seed(0)
    picks = [(0, 0, 0), (batch - 1, tokens - 1, heads - 1), (batch - 1, min(plan.text_start, tokens - 1), heads - 1)]
    for _ in range(samples):
        sample, position, head = (int(torch.randint(size, (), generator=generator)) for size in (batch, tokens, heads))
        picks.append((sample, position, head))
    error, plain_error, largest = 0.0, 0.0, 0.0
    for sample, position, head in picks:
        tensors = query[sample, position, head], key[sample, :, head], value[sample, :, head]
        exact = _row(*tensors, plan, position, torch.float64)
        plain = _row(*tensors, plan, position, query.dtype)
        error = max(error, float((output[sample, position, head] - exact).abs().max()))
        plain_error = max(plain_error, float((plain - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    return SampledError(error, plain_error, largest)


def _row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, position: int, dtype: torch.dtype
) -> torch.Tensor:
    """The output `[D]` of the query `[D]` at a position, for keys and values `[N, D]`, from the spans it attends."""
    run = next(run for run in plan.query_runs if run.start <= position < run.start + run.length)
    keys, values, bias = [], [], []
    for span in plan.span_lists[run.span_list]:
        if span.level == 0:
            keys.append(key[span.start : span.stop].to(dtype))
            values.append(value[span.start : span.stop].to(dtype))
            bias.append(torch.zeros(span.length, dtype=dtype, device=key.device))
            continue
        offset = plan.summaries.offsets[span.level - 1]
        rows = slice(offset + span.start, offset + span.stop)
        counts = torch.from_numpy(plan.summaries.counts[rows]).to(key.device)
        start = int(plan.summaries.starts[rows][0])
        # Blocks of consecutive summaries are consecutive runs of tokens.
        block = torch.repeat_interleave(torch.arange(len(counts), device=key.device), counts)
        for source, means in ((key, keys), (value, values)):
            members = source[start : start + len(block)].double()
            sums = members.new_zeros(len(counts), members.shape[1]).index_add_(0, block, members)
            means.append((sums / counts[:, None]).to(dtype))
        bias.append(counts.double().log().to(dtype))
    scores = torch.cat(keys) @ query.to(dtype) / math.sqrt(len(query)) + torch.cat(bias)
    return scores.softmax(0) @ torch.cat(values)
