"""What tests of Triton's kernels share: plans, tensors, and the bound on errors."""

from __future__ import annotations

import math

import torch

from grat_kernels import (
    Block,
    Choice,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    Plan,
    SlidingTile,
    Union,
    build_head_plan,
    build_plan,
    reference,
)

PYRAMID = Union(Block(0), Far([(0, (1, 2)), (1, (4, 4))]))


PLANS = {
    "full": build_plan(Grouping(Grid((9, 10)), (4, 4)), Full(), 20),
    "block": build_plan(Grouping(Grid((11, 20)), (8, 8)), Block(1), 13),
    "block, radius per axis": build_plan(Grouping(Grid((5, 9, 7)), (2, 4, 4)), Block((0, 1, 1)), 9, text_first=False),
    "criss-cross": build_plan(Grouping(Grid((18, 13)), (8, 8)), CrissCross(), 40, text_first=False),
    "planes": build_plan(Grouping(Grid((4, 9, 8)), (2, 8, 4)), CrissCross(1), 7),
    "lines": build_plan(Grouping(Grid((3, 10, 9)), (2, 8, 4)), CrissCross(2), 5, text_first=False),
    "union": build_plan(Grouping(Grid((17, 16)), (8, 8)), Union(Block(0), CrissCross()), 0),
    "sliding tiles": build_plan(Grouping(Grid((12, 33)), (8, 8)), SlidingTile((1, 3)), 33),
    "far field": build_plan(Grouping(Grid((18, 19)), (8, 8)), Union(Block(0), Far([(0, (2, 2))])), 13),
    "far pyramid": build_plan(Grouping(Grid((8, 34)), (8, 8)), PYRAMID, 0),
    "far field of a video": build_plan(
        Grouping(Grid((3, 9, 12)), (2, 8, 8)), Union(CrissCross(2), Far([(0, (1, 2, 2))])), 6, text_first=False
    ),
    "one token": build_plan(Grouping(Grid((1,)), (4,)), Full()),
    "one token and text": build_plan(Grouping(Grid((1, 1, 1)), (2, 2, 2)), Block(0), 3, text_first=False),
    "text and one token": build_plan(Grouping(Grid((1, 1)), (2, 2)), Block(0), 3),
}


# Groups that choose by content: with ragged ones and ragged blocks, and fewer blocks than may be chosen.
CHOOSING = {
    "picture": build_plan(
        Grouping(Grid((12, 11)), (8, 8)), Union(Block(0), Far([(0, (4, 4))], Choice(2, 3, (2, 2)))), 7
    ),
    "video": build_plan(
        Grouping(Grid((3, 5, 6)), (2, 4, 4)),
        Union(Block(0), Far([(0, (2, 2, 2))], Choice(1, 2, (1, 2, 2)))),
        5,
        text_first=False,
    ),
    "all exact": build_plan(
        Grouping(Grid((5, 9)), (4, 4)), Union(Block(0), Far([(0, (4, 2))], Choice(9, 0, (2, 2)))), 0
    ),
}
# Two classes of heads choose, from other blocks and by other groups; one does not.
_SMALL, _LARGE = (Grouping(Grid((8, 13)), group).refined(((4, 8), (4, 4))) for group in ((4, 4), (4, 8)))
CHOOSING_BY_HEAD = build_head_plan(
    (
        (_SMALL, Union(Block(0), Far([(0, (4, 4))], Choice(1, 2, (2, 2))))),
        (_SMALL, Union(Block(0), Far([(0, (2, 2))]))),
        (_LARGE, Union(Block(0), Far([(0, (2, 2))], Choice(3, 0, (1, 2))))),
    ),
    (2, 0, 1, 2),
    text_len=9,
)


def random_tensors(
    plan: Plan, batch: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(plan.tokens + 1000 * head_dim + heads)
    shape = (batch, plan.tokens, heads, head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return query, key, value


def assert_accurate(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    text_valid: torch.Tensor | None = None,
) -> None:
    """At most twice the error of a dense computation in the same precision, and one unit in the last place."""
    scale = 1 / math.sqrt(query.shape[3])
    exact = reference.attention(
        query.double(), key.double(), value.double(), plan, text_valid, scale, compute_dtype=torch.float64
    )
    plain = reference.attention(query, key, value, plan, text_valid, scale, compute_dtype=query.dtype)
    last_place = torch.finfo(query.dtype).eps * exact.abs().max()
    assert output.dtype == query.dtype
    assert output.shape == query.shape
    assert output.is_contiguous()
    assert (output - exact).abs().max() <= 2 * (plain - exact).abs().max() + last_place
