"""What the Gluon kernel does beyond the cases of every kernel: other rings, given summaries, many launches.

Needs torch, triton, numpy and pytest, and no downloads: `make gpu`.
"""

from __future__ import annotations

import pytest
import torch
from test_kernels_gpu import PLANS, assert_accurate, random_tensors

from grat_kernels import Block, Grid, Grouping, build_plan, gluon_backend, triton_backend
from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import GLUON, GluonConfig

ARCHITECTURE = gluon_backend.served_architecture(torch.device("cuda")) if torch.cuda.is_available() else None
HEAD_DIMS = list(GLUON[ARCHITECTURE or "sm_90"])
OTHERS = {
    "sm_90": [
        (64, GluonConfig(128, 128, 2)),
        (64, GluonConfig(128, 64, 3, value_stages=3, query_stages=1)),
        (128, GluonConfig(128, 128, 2)),
    ],
    "sm_100": [
        (64, GluonConfig(256, 128, 2, tensor_memory=True)),
        (64, GluonConfig(256, 64, 3, value_stages=3, query_stages=1, tensor_memory=True)),
        (128, GluonConfig(256, 128, 2, query_stages=1, tensor_memory=True)),
    ],
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ARCHITECTURE is None, reason="needs a Hopper or Blackwell GPU"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@DTYPES
@pytest.mark.parametrize(("head_dim", "config"), OTHERS[ARCHITECTURE or "sm_90"])
@pytest.mark.parametrize("name", ["block", "far pyramid", "text and one token"])
def test_other_tiles_and_rings(name: str, head_dim: int, config: GluonConfig, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 2, 3, head_dim, dtype)
    for text_valid in (None, torch.tensor([1, plan.text_len], device="cuda")):
        output = gluon_backend.attention(query, key, value, plan, text_valid, head_dim**-0.5, config=config)
        assert_accurate(output, query, key, value, plan, text_valid)


@DTYPES
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_large_scores_rescale_the_output(head_dim: int, dtype: torch.dtype) -> None:
    """Of small ones, the maximum never rises by as much as it may lag behind."""
    plan = PLANS["block"]
    query, key, value = random_tensors(plan, 2, 3, head_dim, dtype)
    # Keys that weigh more and more, so that the maximum rises from tile to tile.
    key = key * torch.linspace(1, 16, plan.tokens, device="cuda", dtype=dtype)[:, None, None]
    output = gluon_backend.attention(query, key, value, plan, None, head_dim**-0.5)
    assert_accurate(output, query, key, value, plan, None)


def test_summaries_may_be_given() -> None:
    plan = PLANS["far field of a video"]
    query, key, value = random_tensors(plan, 1, 2, 128, torch.bfloat16)
    summaries = summarise(key, plan), summarise(value, plan)
    given = gluon_backend.attention(query, key, value, plan, None, 0.1, summaries=summaries)
    assert torch.equal(given, gluon_backend.attention(query, key, value, plan, None, 0.1))


def test_a_thousand_launches_end_and_agree() -> None:
    """Programs take work in any order, but compute every item alike."""
    plan = PLANS["far field of a video"]
    query, key, value = random_tensors(plan, 2, 24, 128, torch.bfloat16)
    outputs = [gluon_backend.attention(query, key, value, plan, None, 0.1) for _ in range(2)]
    for _ in range(1000):
        outputs[1] = gluon_backend.attention(query, key, value, plan, None, 0.1)
    assert torch.equal(*outputs)


def test_agrees_with_another_kernel_at_the_size_of_a_video() -> None:
    plan = build_plan(Grouping(Grid((33, 45, 80)), (4, 8, 8)), Block(1), 256, text_first=False)
    query, key, value = random_tensors(plan, 1, 4, 128, torch.bfloat16)
    text_valid = torch.tensor([100], device="cuda")
    other = triton_backend.attention(query, key, value, plan, text_valid, 0.1).float()
    output = gluon_backend.attention(query, key, value, plan, text_valid, 0.1).float()
    # Each rounds its weights and its output once, from the same scores.
    assert (output - other).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * other.abs().max()
