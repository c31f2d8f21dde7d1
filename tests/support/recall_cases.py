"""What tests of recall share: grids, plans, tensors, masks."""

from __future__ import annotations

import numpy as np
import torch

from grat_kernels import Block, Far, Grid, Grouping, Pattern, Plan, Segments, Union, build_plan, reference
from grat_kernels.summaries import summarise

HEADS, HEAD_DIM, TEXT = 3, 8, 5


GRIDS = [Grid((9, 7)), Grid((3, 5, 6)), Grid((1, 1))]


def group(grid: Grid) -> tuple[int, ...]:
    return (4, 2)[: grid.axes] if grid.axes == 2 else (2, 2, 2)


def plan_of(
    grid: Grid,
    pattern: Pattern,
    text_first: bool = True,
    cells: tuple[tuple[int, ...], ...] = (),
    segments: Segments | None = None,
) -> Plan:
    return build_plan(Grouping(grid, group(grid), (group(grid), *cells)), pattern, TEXT, text_first, segments=segments)


def tensors(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Scores as peaked as learned ones, or every pattern's recall would be its density.
    query, key, value = (torch.randn(tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    return 2 * query, key, value


def dense_mask(plan: Plan) -> np.ndarray:
    """`[image, image]` in the plan's order: which tokens are attended one by one; from groups and pattern alone."""
    places = np.stack(np.unravel_index(plan.order, plan.grouping.grid.shape), 1) // np.asarray(plan.grouping.group)
    counts = plan.grouping.counts
    return np.array(
        [[plan.pattern.level(tuple(a), tuple(b), counts) == 0 for b in places.tolist()] for a in places.tolist()]
    )


def exact_mask(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`[H, N, N]` bool: which tokens each head attends one by one by the definition, chosen blocks included.

    Args:
        plan: of one sample.
        query: `[N, H, D]`.
        key: `[N, H, D]`.
        value: `[N, H, D]`.
    """
    # Values that tell which token they are of beside those that the choice looks at: an output is a row of weights.
    names = torch.eye(plan.tokens)[:, None].expand(-1, HEADS, -1)
    means = summarise(value[None], plan)
    nameless = torch.cat([means, means.new_zeros(*means.shape[:3], plan.tokens)], -1)
    weights = reference.attention(
        query[None],
        key[None],
        torch.cat([value, names], -1)[None],
        plan,
        None,
        HEAD_DIM**-0.5,
        summaries=(summarise(key[None], plan), nameless),
    )[0, ..., value.shape[-1] :]
    return weights.transpose(0, 1) > 0


WITH_REFERENCES = Segments((2, TEXT), (4,), 1)
FAR = Union(Block(0), Far([(0, (2, 2))]))
CHOOSING = Union(Block(0), Far([(0, (2, 2))], (3, 4, (1, 2))))
