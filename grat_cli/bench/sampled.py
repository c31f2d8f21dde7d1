"""Error of an attention output over sampled queries, for sizes at which nothing dense fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from grat_cli.attention.recall import groups_of
from grat_kernels import HeadPlan, Plan
from grat_kernels.choosing import chosen_rows
from grat_kernels.summaries import summarise
from grat_kernels.tile_lists import EMPTY


class Row(NamedTuple):
    """A query of a head of a sample, and all that it may attend.

    Attributes:
        head: its number.
        position: in the joint sequence.
        query: of all positions, `[N, D]`.
        key: `[N, D]`.
        value: `[N, D]`.
    """

    head: int
    position: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


# What a query attends: keys and values in a dtype, `[K, D]` each, and what is added to their scores, `[K]`.
AttendedRows = Callable[[Row, torch.dtype], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


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
        found, *of_head = output[sample, position, head], *(tensor[sample, :, head] for tensor in (query, key, value))
        if query.device.type == "mps":  # has no fp64
            found, *of_head = (tensor.cpu() for tensor in (found, *of_head))
        row = Row(head, position, *of_head)
        exact, plain = _output(row, attended, torch.float64), _output(row, attended, query.dtype)
        # A row that holds NaN is infinitely wrong: max() would drop the NaN.
        difference = float((found - exact).abs().max())
        error = max(error, math.inf if math.isnan(difference) else difference)
        plain_error = max(plain_error, float((plain - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    return SampledError(error, plain_error, largest)


def rows_of_plan(plan: Plan | HeadPlan) -> AttendedRows:
    """What the queries of a plan attend, in its token order: tokens, and summaries with their bias.

    What a group chooses by content is what `choosing` says: the choice itself is not judged.
    """

    def attended(row: Row, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        of_head = plan.classes[plan.class_of_head[row.head]] if isinstance(plan, HeadPlan) else plan
        run = next(run for run in of_head.query_runs if run.start <= row.position < run.start + run.length)
        offsets = of_head.summaries.offsets
        rows = [
            np.arange(span.start, span.stop) + (of_head.tokens + offsets[span.level - 1] if span.level else 0)
            for span in of_head.span_lists[run.span_list]
        ]
        if of_head.candidates is not None and of_head.image_start <= row.position < of_head.image_stop:
            rows.append(_chosen(of_head, row))
        selected = np.concatenate(rows)
        tokens, means = selected[selected < plan.tokens], selected[selected >= plan.tokens] - plan.tokens
        counts = plan.summaries.counts[means]
        keys, values = (
            torch.cat(
                [source[torch.from_numpy(tokens).to(source.device)].to(dtype), _means(plan, means, source, dtype)]
            )
            for source in (row.key, row.value)
        )
        bias = torch.from_numpy(np.concatenate([np.zeros(len(tokens)), np.log(counts)]))
        return keys, values, bias.to(dtype).to(row.key.device)

    return attended


def _chosen(plan: Plan, row: Row) -> np.ndarray:
    """Rows that the group of a query chooses: positions, or the number of tokens and a summary's row added up."""
    query, key, value = (tensor[None, :, None] for tensor in (row.query, row.key, row.value))
    group = torch.from_numpy(groups_of(plan, np.array([row.position]))).to(query.device)
    summaries = summarise(key, plan), summarise(value, plan)
    chosen = chosen_rows(query, summaries, plan, query.shape[-1] ** -0.5, group).flatten()
    return chosen[chosen != EMPTY].cpu().numpy()


def _means(plan: Plan | HeadPlan, rows: np.ndarray, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Means of `[N, D]` over the blocks of some summaries, `[rows, D]`."""
    starts, counts = plan.summaries.starts[rows], plan.summaries.counts[rows]
    block = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
    members, of_block, sizes = (
        torch.from_numpy(array).to(source.device) for array in (starts[block] + within, block, counts)
    )
    sums = torch.zeros(len(rows), source.shape[1], dtype=torch.float64, device=source.device)
    return (sums.index_add_(0, of_block, source[members].double()) / sizes[:, None]).to(dtype)


def rows_of_mask(mask: Callable[[int], torch.Tensor | None]) -> AttendedRows:
    """What queries attend by a mask: a position's row of it, `[N]` bool on the CPU, or None for every token."""

    def attended(row: Row, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        selected = mask(row.position)
        keys, values = (
            (source if selected is None else source[selected.to(source.device)]).to(dtype)
            for source in (row.key, row.value)
        )
        return keys, values, torch.zeros(len(keys), dtype=dtype, device=keys.device)

    return attended


def _output(row: Row, attended: AttendedRows, dtype: torch.dtype) -> torch.Tensor:
    """The output of a query, `[D]`."""
    keys, values, bias = attended(row, dtype)
    query = row.query[row.position].to(dtype)
    scores = keys @ query / math.sqrt(len(query)) + bias
    return scores.softmax(0) @ values
