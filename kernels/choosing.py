"""Choice by content: which blocks of the far field a query group tells token by token, and which by finer means.

For every head, query group g and block b with means k_c, v_c of n_c of its n tokens:

    s_c = q·k_c·scale + log n_c                q the mean query of the group
    mass = logsumexp s                         what the block weighs in the softmax, as far as its means tell
    w = softmax s - n_c / n                    where in the block the group looks, beyond its plain mean
    spread = |Σ w_c v_c| + 0.1 |std v_c| + 0.001 |mean v_c|
                                               how far the output is off if one mean stands for the block
    score = mass + log spread

The first term is the error of the values' mean to first order; the second stands for what the means within a block do
not tell either; the third orders blocks that have no more than one mean. Scores are in fp32. Groups and blocks are counted in token order, and everything has a fixed shape, so
nothing waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from grat_kernels.tile_lists import EMPTY

if TYPE_CHECKING:
    from grat_kernels.plan import Candidates, Plan

SPREAD_WITHIN, SPREAD_LEAST = 0.1, 0.001
# Scores of means that are held at once.
_HELD_BYTES = 256 << 20
_ON_CPU_BYTES = 16 << 20
_TINY = 1e-30  # a block of nothing but zeros has a logarithm


def chosen_rows(
    query: torch.Tensor,
    summaries: tuple[torch.Tensor, torch.Tensor],
    plan: Plan,
    scale: float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each head and query group attends besides the spans of its list.

    Args:
        query: `[B, N, H, D]`, image tokens in the plan's order.
        summaries: means of keys and values, `[B, R, H, D]` each.
        plan: with candidates.
        scale: factor on the scores.
        groups: whose rows are wanted, numbers in token order `[n]` int64; all by default.

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
    batch, heads, count, _ = means.shape
    of_head = batch * tables.starts.shape[0] * count * plan.candidates.means * 4
    at_once = max(1, (_ON_CPU_BYTES if query.device.type == "cpu" else _HELD_BYTES) // of_head)
    rows = [
        _rows(_scores(means[:, part], [one[:, :, part] for one in summaries], tables, plan, scale), tables, plan)
        for part in (slice(first, first + at_once) for first in range(0, heads, at_once))
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


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
    """Of a plan, on a device. Blocks are those that are chosen from.

    Attributes:
        starts: position of each block's first token, `[blocks]` int32.
        counts: tokens of each block, `[blocks]` int32.
        means: summary row of each mean within a block, `EMPTY` where it has fewer, `[blocks, means]` int32.
        log_counts: logarithm of the tokens of these means, -inf where there is none, `[blocks, means]` fp32.
        shares: these tokens over those of the block, `[blocks, means]` fp32.
        first_row: of the blocks' own means among all summaries.
        exempt: whether a group does not choose from a block, `[groups, blocks]` bool.
        wanted: blocks that each group attends exactly, and these and the fine ones, `[groups, 1]` int32 each.
    """

    starts: torch.Tensor
    counts: torch.Tensor
    means: torch.Tensor
    log_counts: torch.Tensor
    shares: torch.Tensor
    first_row: int
    exempt: torch.Tensor
    wanted: tuple[torch.Tensor, torch.Tensor]

    def of_groups(self, groups: torch.Tensor) -> _Tables:
        """Those of some groups, `[n]` int64."""
        exact, told = (counts.index_select(0, groups) for counts in self.wanted)
        return self._replace(exempt=self.exempt.index_select(0, groups), wanted=(exact, told))


def _tables(plan: Plan, device: torch.device) -> _Tables:
    candidates, summaries = plan.candidates, plan.summaries
    assert candidates is not None
    blocks = slice(*summaries.offsets[candidates.level - 1 : candidates.level + 1])
    fine = slice(*summaries.offsets[candidates.fine_level - 1 : candidates.fine_level + 1])
    starts, counts = summaries.starts[blocks], summaries.counts[blocks]
    # Means within a block are those whose first token lies in it; they follow one another.
    owner = np.searchsorted(starts, summaries.starts[fine], side="right") - 1
    first = np.searchsorted(owner, np.arange(len(starts)))
    rank = np.arange(len(owner)) - first[owner]
    means = np.full((len(starts), candidates.means), EMPTY, np.int32)
    means[owner, rank] = np.arange(fine.start, fine.stop)
    sizes = np.zeros(means.shape)
    sizes[owner, rank] = summaries.counts[fine]
    with np.errstate(divide="ignore"):
        log_counts = np.log(sizes).astype(np.float32)
    exempt = ~candidates.of_list[candidates.list_of_group]
    exact, within, _ = candidates.counts.T
    tables = (
        starts.astype(np.int32),
        counts.astype(np.int32),
        means,
        log_counts,
        (sizes / counts[:, None]).astype(np.float32),
        exempt,
        exact.astype(np.int32)[:, None],
        (exact + within).astype(np.int32)[:, None],
    )
    moved = [torch.from_numpy(table).to(device) for table in tables]
    return _Tables(*moved[:5], blocks.start, moved[5], (moved[6], moved[7]))


def _scores(
    means: torch.Tensor, summaries: list[torch.Tensor], tables: _Tables, plan: Plan, scale: float
) -> torch.Tensor:
    """Scores of all blocks, `[B, H, groups, blocks]` fp32; -inf where a group does not choose from a block.

    Args:
        means: of the groups' queries, `[B, H, groups, D]`.
        summaries: of keys and values of the same heads, `[B, R, H, D]` each.
        tables: of the plan.
        plan: with candidates.
        scale: factor on scores.
    """
    blocks, within = tables.means.shape
    rows = tables.means.clamp(min=0).reshape(-1)
    keys, values = (
        tensor.index_select(1, rows).transpose(1, 2).to(means.dtype).unflatten(2, (blocks, within))
        for tensor in summaries
    )
    own = summaries[1][:, tables.first_row : tables.first_row + blocks].transpose(1, 2).to(means.dtype)
    scores = (means * scale) @ keys.flatten(2, 3).transpose(-1, -2)
    scores = scores.unflatten(3, (blocks, within)).add_(tables.log_counts)
    mass = scores.logsumexp(-1)
    weights = scores.softmax(-1).sub_(tables.shares)
    # Weights sum to 0, so values may be told from their mean.
    apart = (values - own.unsqueeze(3)).masked_fill_((tables.means < 0).unsqueeze(-1), 0)
    products = apart @ apart.transpose(-1, -2)
    least = (products.diagonal(dim1=-2, dim2=-1) * tables.shares).sum(-1).clamp_(min=0).sqrt_().mul_(SPREAD_WITHIN)
    least.add_(torch.linalg.vector_norm(own, dim=-1), alpha=SPREAD_LEAST)
    looked = torch.einsum("bhgnc,bhnce->bhgne", weights, products)
    spread = (looked * weights).sum(-1).clamp_(min=0).sqrt_().add_(least.unsqueeze(2))
    return mass.add_(spread.clamp_(min=_TINY).log_()).masked_fill_(tables.exempt, -torch.inf)


def _rows(scores: torch.Tensor, tables: _Tables, plan: Plan) -> torch.Tensor:
    """The slots that follow from scores; see `chosen_rows`."""
    candidates: Candidates | None = plan.candidates
    assert candidates is not None
    exact, fine, rest = candidates.counts.max(0).tolist()
    best = scores.topk(exact + fine, dim=-1).indices
    place = torch.arange(exact + fine, device=scores.device, dtype=torch.int32)
    of_exact, of_fine = (place < wanted for wanted in tables.wanted)  # of groups that have as many to choose from

    offsets = torch.arange(candidates.tokens, device=scores.device, dtype=torch.int32)
    block = best[..., :exact]
    tokens = tables.starts[block].unsqueeze(-1) + offsets
    inside = (offsets < tables.counts[block].unsqueeze(-1)) & of_exact[:, :exact, None]
    means = torch.where(of_fine[:, exact:, None], tables.means[best[..., exact:]] + plan.tokens, EMPTY)
    means = means.masked_fill(means < plan.tokens, EMPTY)

    # Others keep their order, which is that of their memory.
    told = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, of_fine.expand_as(best))
    others = ~(told | tables.exempt)
    slot = torch.where(others, others.cumsum(-1, dtype=torch.int32) - 1, rest)
    numbers = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int32) + (plan.tokens + tables.first_row)
    single = torch.full((*scores.shape[:-1], rest + 1), EMPTY, dtype=torch.int32, device=scores.device)
    single.scatter_(-1, slot.long(), numbers.expand_as(slot))
    return torch.cat(
        [torch.where(inside, tokens, EMPTY).flatten(-2), means.flatten(-2), single[..., :rest]], dim=-1
    ).to(torch.int32)
