"""Summaries of the far field: means of keys and values over the blocks of a plan."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from grat_kernels.geometry import IntArray
    from grat_kernels.sequence import JointSequence


# Positions or rows that follow one another are a slice, which copies nothing when it selects.
Selection = slice | torch.Tensor


def selection(indices: IntArray, device: torch.device) -> Selection:
    """What selects positions or rows on a device."""
    first, last = int(indices[0]), int(indices[-1])
    if (np.diff(indices) == 1).all():
        return slice(first, last + 1)
    return torch.from_numpy(indices).to(device)


def summarise(tokens: torch.Tensor, plan: JointSequence) -> torch.Tensor:
    """Means over the blocks of every far level, `[B, R, H, D]` from `[B, N, H, D]`, in the dtype of `tokens`.

    Accumulates in fp32. Blocks are contiguous in the plan's token order; ragged ones at the borders come in few
    sizes, and each size of a level is one batched mean.
    """
    batch, _, heads, head_dim = tokens.shape
    means = tokens.new_empty(batch, plan.summaries.rows, heads, head_dim)
    for rows, positions, count in _blocks_by_size(plan, tokens.device):
        blocks = tokens[:, positions].unflatten(1, (-1, count))
        means[:, rows] = blocks.mean(2, dtype=torch.promote_types(tokens.dtype, torch.float32)).to(tokens.dtype)
    return means


def summary_pair(
    key: torch.Tensor,
    value: torch.Tensor,
    plan: JointSequence,
    given: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summaries of keys and values, `[B, R, H, D]` each: those given, or else computed."""
    return given or (summarise(key, plan), summarise(value, plan))


def _blocks_by_size(plan: JointSequence, device: torch.device) -> list[tuple[Selection, Selection, int]]:
    """For each level and block size: summary rows `[n]`, positions of their tokens `[n * count]`, and the size."""

    def build() -> list[tuple[Selection, Selection, int]]:
        summaries = plan.summaries
        batches = []
        for first, last in itertools.pairwise(summaries.offsets):
            for count in np.unique(summaries.counts[first:last]).tolist():
                rows = first + np.flatnonzero(summaries.counts[first:last] == count)
                positions = (summaries.starts[rows][:, None] + np.arange(count)).reshape(-1)
                batches.append((selection(rows, device), selection(positions, device), count))
        return batches

    return plan.cached(("summary blocks", device), build)
