"""Scores of the blocks that query groups choose from, by a Triton kernel: in one pass over the means within blocks.

Of pictures of 4096² the scores of single means, which torch would write and read a dozen times, are 0.1 GB a layer; of
720p videos 0.8 GB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from grat_kernels.choosing import SPREAD_LEAST, SPREAD_WITHIN
from grat_kernels.launching import Launch, on_device, padded_head_dim
from grat_kernels.tile_configs import SCORED_HEAD_DIM, SCORES
from grat_kernels.tile_lists import EMPTY

if TYPE_CHECKING:
    from grat_kernels.plan import Plan

# Of one block, which a program holds whole.
_MOST_MEANS = 64


def serves(plan: Plan, head_dim: int) -> bool:
    """Whether the kernel is for a plan with candidates and heads of so many channels."""
    return plan.candidates is not None and plan.candidates.means <= _MOST_MEANS and head_dim <= SCORED_HEAD_DIM


def block_scores(
    queries: torch.Tensor, summary_key: torch.Tensor, summary_value: torch.Tensor, plan: Plan, scale: float
) -> torch.Tensor:
    """Scores of all blocks for all groups; see `choosing`.

    Args:
        queries: mean queries of the groups, `[B, H, groups, D]` fp32.
        summary_key: `[B, R, H, D]` of the same heads; of all three tensors channels are contiguous.
        summary_value: likewise.
        plan: one that it `serves`.
        scale: factor on the scores.

    Returns:
        `[B, H, groups, blocks]` fp32; -inf where a group does not choose from a block.
    """
    tables = plan.cached(("block scores", queries.device), lambda: block_tables(plan, queries.device))
    shape = (*queries.shape[:3], tables.of_list.shape[1])
    scores = torch.empty(shape, dtype=torch.float32, device=queries.device)
    launch = launch_of(queries, summary_key, summary_value, scores, tables, scale)
    from grat_kernels.block_scores_kernel import block_scores_kernel

    with on_device(queries.device):
        block_scores_kernel[(launch.programs,)](*launch.arguments, **launch.options)
    return scores


class BlockTables(NamedTuple):
    """Of a plan, on a device.

    Attributes:
        rows: summary row of each mean within a block, else `EMPTY`, `[blocks, means]` int32; means are as many as the
            next power of two.
        log_counts: logarithm of its tokens, -inf where there is none, `[blocks, means]` fp32.
        shares: its tokens over those of the block, `[blocks, means]` fp32.
        of_list: whether groups with a span list choose from a block, `[lists, blocks]` uint8.
        list_of_group: `[groups]` int32.
        first_row: of the blocks' own means among all summaries.
    """

    rows: torch.Tensor
    log_counts: torch.Tensor
    shares: torch.Tensor
    of_list: torch.Tensor
    list_of_group: torch.Tensor
    first_row: int


def block_tables(plan: Plan, device: torch.device) -> BlockTables:
    """The tables of a plan with candidates."""
    candidates, summaries = plan.candidates, plan.summaries
    assert candidates is not None
    own = summaries.rows_of(candidates.level)
    rows, counts = candidates.means_within(summaries)
    room = (1 << (candidates.means - 1).bit_length()) - candidates.means
    rows = np.pad(rows, ((0, 0), (0, room)), constant_values=EMPTY).astype(np.int32)
    counts = np.pad(counts, ((0, 0), (0, room)))
    with np.errstate(divide="ignore"):
        log_counts = np.log(counts).astype(np.float32)
    shares = (counts / summaries.counts[own][:, None]).astype(np.float32)
    list_of_group = candidates.list_of_group.astype(np.int32)
    tables = (rows, log_counts, shares, candidates.of_list.astype(np.uint8), list_of_group)
    moved = [torch.from_numpy(table).to(device) for table in tables]
    return BlockTables(*moved, first_row=own.start)


def launch_of(
    queries: torch.Tensor,
    summary_key: torch.Tensor,
    summary_value: torch.Tensor,
    scores: torch.Tensor,
    tables: BlockTables,
    scale: float,
) -> Launch:
    """The launch for these tensors, which may lie on the meta device: ahead-of-time compilation asks for it too."""
    batch, heads, groups, head_dim = queries.shape
    blocks, means = tables.rows.shape
    config = SCORES[8 * summary_key.element_size()]
    of_program = max(1, config.columns // means)
    arguments = (
        queries,
        summary_key,
        summary_value,
        *tables[:5],
        scores,
        *queries.stride()[:3],
        *summary_key.stride()[:3],
        *summary_value.stride()[:3],
        heads,
        groups,
        blocks,
        tables.first_row,
        scale,
        SPREAD_WITHIN,
        SPREAD_LEAST,
    )
    options = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_head_dim(head_dim),
        "GROUPS": config.groups,
        "BLOCKS": of_program,
        "MEANS": means,
        "num_warps": config.warps,
    }
    return Launch(-(-blocks // of_program) * batch * heads, arguments, options)
