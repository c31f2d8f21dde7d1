"""The kernel that scores blocks against torch, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import CHOOSING, random_tensors

from grat_kernels import Block, Choice, Far, Grid, Grouping, Plan, Union, build_plan, choosing
from grat_kernels.block_scores import block_scores
from grat_kernels.choosing import chosen_rows, group_means
from grat_kernels.summaries import summarise

if torch.cuda.is_available():
    pytest.skip("tests/gpu tests the compiled kernel", allow_module_level=True)

PLANS = {
    **CHOOSING,
    "three means to a block": build_plan(
        Grouping(Grid((13, 12)), (6, 6)), Union(Block(0), Far([(0, (6, 2))], Choice(2, 3, (2, 2)))), 3
    ),
    "means of one token": build_plan(
        Grouping(Grid((9, 20)), (8, 8)), Union(Block(0), Far([(0, (8, 8))], Choice(1, 1, (1, 1))))
    ),
}


def both_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Scores `[B, H, groups, blocks]` by torch and by the kernel, and then the rows that follow from each."""
    seen: list[torch.Tensor] = []
    by_torch = choosing._scores

    def recorded(*arguments):
        seen.append(by_torch(*arguments))
        return seen[-1]

    monkeypatch.setattr(choosing, "_scores", recorded)
    summaries, scale = (summarise(key, plan), summarise(value, plan)), 1 / math.sqrt(query.shape[3])
    rows = chosen_rows(query, summaries, plan, scale)
    own = block_scores(group_means(query, plan), *summaries, plan, scale)
    return [torch.cat(seen, dim=1), own, rows, chosen_rows(query, summaries, plan, scale, score=block_scores)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PLANS)
def test_equals_torch(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 2, 3, 24, dtype)
    # Heads of a part of a fused projection, as launchers give them.
    by_torch, scores, expected, rows = both_scores(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], plan, monkeypatch)
    assert torch.equal(scores.isneginf(), by_torch.isneginf())
    told = scores.isfinite()
    # Sums of 24 products, and logarithms, in fp32.
    bound = 64 * torch.finfo(torch.float32).eps * by_torch[told].abs().max()
    assert (scores[told] - by_torch[told]).abs().max() <= bound
    assert torch.equal(rows, expected)


def test_blocks_of_zeros_have_finite_scores() -> None:
    plan = CHOOSING["picture"]
    query, key, _ = random_tensors(plan, 1, 1, 32, torch.float32)
    summary = summarise(key, plan)
    scores = block_scores(group_means(query, plan), summary, torch.zeros_like(summary), plan, 0.2)
    assert not scores.isnan().any()
    assert torch.equal(scores.isfinite().any(-1), torch.ones(1, 1, 4, dtype=torch.bool))


def test_extreme_queries_stay_finite() -> None:
    plan = CHOOSING["picture"]
    query, key, value = random_tensors(plan, 1, 1, 32, torch.float16)
    for size in (0.0, 6e4 / 5):
        scores = block_scores(group_means(query * size, plan), summarise(key, plan), summarise(value, plan), plan, 0.2)
        assert not scores.isnan().any()
