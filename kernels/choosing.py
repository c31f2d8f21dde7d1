"""Choice by content: which blocks of the far field a query group tells token by token, and which by finer means.

For every head, query group g and block b with means k_c, v_c of n_c of its n tokens:

    s_c = q·k_c·scale + log n_c                q the mean query of the group
    mass = logsumexp s                         what the block weighs in the softmax, as far as its means tell
    w = softmax s - n_c / n                    where in the block the group looks, beyond its plain mean
    spread = |Σ w_c v_c| + 0.1 |std v_c| + 0.001 |mean v_c|
                                               how far the output is off if one mean stands for the block
    score = mass + log spread

The first term is the error of the values' mean to first order; the second stands for what the means within a block do
not tell either; the third orders blocks that have no more than one mean. Scores are in fp32. Groups and blocks are
counted in token order, and everything has a fixed shape, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from grat_kernels.summaries import Selection, selection
from grat_kernels.tile_lists import EMPTY

if TYPE_CHECKING:
    import numpy.typing as npt

    from grat_kernels.candidates import Candidates
    from grat_kernels.plan import Plan

SPREAD_WITHIN, SPREAD_LEAST = 0.1, 0.001
# Scores of means that are held at once.
_HELD_BYTES = 256 << 20
_ON_CPU_BYTES = 1 << 20
_TINY = 1e-30  # a block of nothing but zeros has a logarithm


# Scores `[B, H, groups, blocks]` of the groups' mean queries `[B, H, groups, D]`, and of the means of keys and values
# of the same heads, `[B, R, H, D]` each; of a plan, with the factor on scores.
Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Plan", float], torch.Tensor]


def chosen_rows(
    query: torch.Tensor,
    summaries: tuple[torch.Tensor, torch.Tensor],
    plan: Plan,
    scale: float,
    groups: torch.Tensor | None = None,
    score: Score | None = None,
) -> torch.Tensor:
    """What each head and query group attends besides the spans of its list.

    Args:
        query: `[B, N, H, D]`, image tokens in the plan's order.
        summaries: means of keys and values, `[B, R, H, D]` each.
        plan: with candidates.
        scale: factor on the scores.
        groups: whose rows are wanted, numbers in token order `[n]` int64; all by default.
        score: what computes the scores of blocks in place of torch, where the rows of all groups are wanted.

    Returns:
        `[B, H, groups, slots]` int32: a position in the joint sequence, or N + r for row r of the summaries, or
        `EMPTY`. Slots of exact blocks come first, then those of fine ones, then those of all others.
    """
    assert plan.candidates is not None
    tables = plan.cached(("choosing", query.device), lambda: _tables(plan, query.device))
    means = group_means(query, plan)
    if groups is not None:
        means = means.index_select(2, groups)
        tables = tables.of_groups(groups)
    batch, heads = means.shape[:2]
    of_head = batch * tables.exempt.numel() * plan.candidates.means * 4
    at_once = max(1, (_ON_CPU_BYTES if query.device.type == "cpu" else _HELD_BYTES) // of_head)
    rows = torch.empty(batch, heads, means.shape[2], plan.candidates.width, dtype=torch.int32, device=query.device)
    for first in range(0, heads, at_once):
        part = slice(first, first + at_once)
        of_heads = means[:, part], summaries[0][:, :, part], summaries[1][:, :, part]
        scores = score(*of_heads, plan, scale) if score else _scores(of_heads[0], of_heads[1:], tables, scale)
        _write_rows(scores, tables, plan.candidates, rows[:, part])
    return rows


def group_means(tokens: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Means over groups, `[B, H, groups, D]` fp32 from `[B, N, H, D]`, groups in token order."""
    sizes = plan.group_sizes
    image = tokens[:, plan.image_start : plan.image_stop]
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if (sizes == sizes[0]).all():
        return image.unflatten(1, (len(sizes), -1)).mean(2, dtype=wide).transpose(1, 2)
    batch, _, heads, head_dim = image.shape
    means = image.new_empty(batch, len(sizes), heads, head_dim, dtype=wide)
    for groups, positions, count in plan.cached(("groups by size", tokens.device), lambda: _by_size(plan, tokens)):
        means[:, groups] = image[:, positions].unflatten(1, (-1, count)).mean(2, dtype=wide)
    return means.transpose(1, 2)


def _by_size(plan: Plan, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Groups of each size, positions of their tokens behind the first image token, and the size."""
    sizes = plan.group_sizes
    starts = np.cumsum(sizes) - sizes
    found = []
    for count in np.unique(sizes).tolist():
        groups = np.flatnonzero(sizes == count)
        positions = (starts[groups][:, None] + np.arange(count)).reshape(-1)
        found.append((*(torch.from_numpy(one).to(tokens.device) for one in (groups, positions)), count))
    return found


class _Tables(NamedTuple):
    """Of a plan, on a device. Blocks are those that are chosen from; behind the last stands one that holds nothing.

    Attributes:
        tokens: positions of each block's tokens, then `EMPTY`, `[blocks + 1, most tokens]` int32.
        means: of the means within each block, positions behind all tokens, then `EMPTY`, `[blocks + 1, means]` int32.
        wholes: of the blocks' own means, likewise, `[blocks]` int32.
        within: summary rows of the means within blocks, the first again where a block has fewer, `[blocks * means]`.
        own: summary rows of the blocks' own means.
        log_counts: logarithm of the tokens of the means within, -inf where there is none, `[blocks, means, 1]` fp32.
        shares: these tokens over those of the block, `[blocks, means, 1]` fp32.
        exempt: whether a group does not choose from a block, `[blocks, groups]` bool.
        offered: how many blocks each group chooses from, `[groups, 1]` int32.
    """

    tokens: torch.Tensor
    means: torch.Tensor
    wholes: torch.Tensor
    within: Selection
    own: slice
    log_counts: torch.Tensor
    shares: torch.Tensor
    exempt: torch.Tensor
    offered: torch.Tensor

    def of_groups(self, groups: torch.Tensor) -> _Tables:
        """Those of some groups, `[n]` int64."""
        return self._replace(exempt=self.exempt.index_select(1, groups), offered=self.offered.index_select(0, groups))


def _tables(plan: Plan, device: torch.device) -> _Tables:
    candidates, summaries = plan.candidates, plan.summaries
    assert candidates is not None
    own = summaries.rows_of(candidates.level)
    starts, counts = summaries.starts[own], summaries.counts[own]
    offsets = np.arange(candidates.tokens)
    tokens = np.where(offsets < counts[:, None], starts[:, None] + offsets, EMPTY)
    means, sizes = candidates.means_within(summaries)
    with np.errstate(divide="ignore"):
        log_counts = np.log(sizes)
    exempt = ~candidates.of_list[candidates.list_of_group].T

    def moved(table: npt.NDArray[Any], dtype: npt.DTypeLike) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(table, dtype)).to(device)

    def with_nothing(table: npt.NDArray[Any]) -> torch.Tensor:
        return moved(np.append(table, np.full((1, table.shape[1]), EMPTY), axis=0), np.int32)

    return _Tables(
        tokens=with_nothing(tokens),
        means=with_nothing(np.where(sizes > 0, plan.tokens + means, EMPTY)),
        wholes=moved(np.arange(own.start, own.stop) + plan.tokens, np.int32),
        within=selection(np.where(sizes > 0, means, means[:, :1]).reshape(-1), device),
        own=own,
        log_counts=moved(log_counts[..., None], np.float32),
        shares=moved((sizes / counts[:, None])[..., None], np.float32),
        exempt=moved(exempt, np.bool_),
        offered=moved(candidates.counts.sum(1)[:, None], np.int32),
    )


def _scores(
    means: torch.Tensor, summaries: tuple[torch.Tensor, torch.Tensor], tables: _Tables, scale: float
) -> torch.Tensor:
    """Scores of all blocks, `[B, H, groups, blocks]` fp32; -inf where a group does not choose from a block.

    Groups come last while scores are made, so that what is summed over the few means of a block is summed in vectors.

    Args:
        means: of the groups' queries, `[B, H, groups, D]`.
        summaries: of keys and values of the same heads, `[B, R, H, D]` each.
        tables: of the plan.
        scale: factor on scores.
    """
    within = tables.log_counts.shape[:2]
    keys, values = (tensor[:, tables.within].transpose(1, 2).to(means.dtype) for tensor in summaries)
    own = summaries[1][:, tables.own].transpose(1, 2).to(means.dtype)
    # Weights sum to 0, so values may be told from their mean.
    apart = values.unflatten(2, within) - own.unsqueeze(3)
    products = apart @ apart.transpose(-1, -2)  # [B, H, blocks, means, means]
    least = (products.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * tables.shares).sum(-2).clamp_(min=0).sqrt_()
    least = least * SPREAD_WITHIN + torch.linalg.vector_norm(own, dim=-1, keepdim=True) * SPREAD_LEAST

    scores = (keys @ (means * scale).transpose(-1, -2)).unflatten(2, within)  # [B, H, blocks, means, groups]
    scores.add_(tables.log_counts)
    highest = scores.amax(-2, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-2, keepdim=True)
    weights.div_(total).sub_(tables.shares)
    spread = (products @ weights).mul_(weights).sum(-2).clamp_(min=0).sqrt_().add_(least).clamp_(min=_TINY)
    mass = total.log_().add_(highest).squeeze(-2)
    return mass.add_(spread.log_()).masked_fill_(tables.exempt, -torch.inf).transpose(-1, -2).contiguous()


def _write_rows(scores: torch.Tensor, tables: _Tables, candidates: Candidates, rows: torch.Tensor) -> None:
    """Writes the rows that follow from scores; see `chosen_rows`."""
    exact, fine, rest = candidates.counts.max(0).tolist()
    best = scores.topk(exact + fine, dim=-1).indices
    # Others keep their order, which is that of their memory. Slot 0 takes what has no slot.
    taken = torch.isneginf(scores).scatter_(-1, best, True)
    slot = (~taken).cumsum(-1).masked_fill_(taken, 0)
    others = torch.full((*scores.shape[:-1], rest + 1), EMPTY, dtype=torch.int32, device=scores.device)
    others.scatter_(-1, slot, tables.wholes.expand_as(slot))
    # A group that has fewer to choose from takes the block of nothing.
    place = torch.arange(exact + fine, device=scores.device)
    best.masked_fill_(place >= tables.offered, len(tables.wholes))
    of_exact, of_fine, of_rest = rows.split([exact * candidates.tokens, fine * candidates.means, rest], dim=-1)
    of_exact.copy_(tables.tokens[best[..., :exact]].flatten(-2))
    of_fine.copy_(tables.means[best[..., exact:]].flatten(-2))
    of_rest.copy_(others[..., 1:])
