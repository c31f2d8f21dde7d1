"""What groups choose by content, packed into tiles for the span kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from grat_kernels.block_scores import MOST_MEANS, block_scores
from grat_kernels.choosing import chosen_rows
from grat_kernels.launching import heads_of_class
from grat_kernels.plan import HeadPlan
from grat_kernels.tile_lists import EMPTY, chosen_tiles_of_group

if TYPE_CHECKING:
    from grat_kernels.plan import Plan


def chosen_slots(plan: Plan | HeadPlan, block_tail: int) -> int:
    """Slots of the chosen tiles of one head: those of the class that takes most; 0 where nothing is chosen."""
    tiles = (len(member.list_of_group) * chosen_tiles_of_group(member, block_tail) for member in plan.classes)
    return max(tiles) * block_tail


def choose_tiles(
    query: torch.Tensor,
    summaries: tuple[torch.Tensor, torch.Tensor],
    plan: Plan | HeadPlan,
    scale: float,
    block_tail: int,
) -> torch.Tensor:
    """What every head and group chooses, group by group in tiles of `block_tail` slots; nothing waits for the device.

    Args:
        query: `[B, N, H, D]`, image tokens in the plan's order.
        summaries: of keys and values, `[B, R, H, D]` each.
        plan: in which groups of some heads choose.
        scale: factor on the scores.
        block_tail: slots of a tile.

    Returns:
        `[B, H, chosen_slots]` int32: a position, N + r for row r of the summaries, or `EMPTY`, also where groups or
        classes of heads fill less than others.
    """
    shape = (query.shape[0], query.shape[2], chosen_slots(plan, block_tail))
    tiles = torch.full(shape, EMPTY, dtype=torch.int32, device=query.device)
    for number, member in enumerate(plan.classes):
        if not member.chooses:
            continue
        own = heads_of_class(plan, number, query.device) if isinstance(plan, HeadPlan) else slice(None)
        of_heads = (summaries[0][:, :, own], summaries[1][:, :, own])
        few_means = member.candidates is not None and member.candidates.means <= MOST_MEANS
        score = block_scores if few_means else None
        rows = chosen_rows(query[:, :, own], of_heads, member, scale, score=score)
        groups, width = rows.shape[2:]
        room = chosen_tiles_of_group(member, block_tail) * block_tail
        padded = torch.nn.functional.pad(rows, (0, room - width), value=EMPTY)
        tiles[:, own, : groups * room] = padded.flatten(2)
    return tiles
