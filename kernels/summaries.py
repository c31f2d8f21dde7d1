"""Summaries of the far field: means of keys and values over the blocks of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from grat_kernels.plan import Plan


def summarise(tokens: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Means over the blocks of every far level, `[B, R, H, D]` from `[B, N, H, D]`, in the dtype of `tokens`.

    Accumulates in fp32. Blocks are contiguous in the plan's token order; ragged ones at the borders come in few
    sizes, and each size is one batched mean.
    """
    batch, _, heads, head_dim = tokens.shape
    means = tokens.new_empty(batch, plan.summaries.rows, heads, head_dim)
    for rows, gather, count in _blocks_by_size(plan, tokens.device):
        blocks = tokens[:, gather].unflatten(1, (-1, count))
        means[:, rows] = blocks.mean(2, dtype=torch.promote_types(tokens.dtype, torch.float32)).to(tokens.dtype)
    return means


def _blocks_by_size(plan: Plan, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """For each block size: summary rows `[n]`, positions of their tokens `[n * count]`, and the size."""

    def build() -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        summaries = plan.summaries
        batches = []
        for count in np.unique(summaries.counts).tolist():
            rows = np.flatnonzero(summaries.counts == count)
            positions = (summaries.starts[rows][:, None] + np.arange(count)).reshape(-1)
            batches.append((torch.from_numpy(rows).to(device), torch.from_numpy(positions).to(device), count))
        return batches

    return plan.cached(("summary blocks", device), build)
