"""The Hopper kernel against the definition, on a Hopper GPU.

Needs torch, triton, numpy and pytest, and no downloads: `make test-gpu`.
"""

from __future__ import annotations

import math

import pytest
import torch
from sampled_rows import sampled_error
from test_kernels_gpu import PLANS, assert_accurate, attended_tokens, random_tensors

from grat_kernels import (
    Block,
    Far,
    Grid,
    Grouping,
    HeadPlan,
    Plan,
    Union,
    build_head_plan,
    build_plan,
    gluon_backend,
    triton_backend,
)
from grat_kernels.launching import fits_descriptor
from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import HOPPER, HopperConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
HEAD_DIMS = pytest.mark.parametrize("head_dim", list(HOPPER))


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None = None,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    return gluon_backend.attention(query, key, value, plan, text_valid, 1 / math.sqrt(query.shape[3]), config=config)


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_definition(name: str, head_dim: int, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    tensors = random_tensors(plan, 2, 3, head_dim, dtype)
    assert_accurate(run(*tensors, plan), *tensors, plan)


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize(
    "name", ["block", "lines", "far field", "far field of a video", "one token and text", "text and one token"]
)
def test_padded_text_is_masked_in_each_sample(name: str, head_dim: int, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 2, 2, head_dim, dtype)
    text_valid = torch.tensor([plan.text_len - 2, 0], device="cuda")
    output = run(query, key, value, plan, text_valid)
    assert_accurate(output, query, key, value, plan, text_valid)
    for sample, valid in enumerate(text_valid.tolist()):
        padding = slice(plan.text_start + valid, plan.text_start + plan.text_len)
        key[sample, padding] = torch.nan
        value[sample, padding] = torch.inf
    assert torch.equal(run(query, key, value, plan, text_valid), output)


@pytest.mark.parametrize("name", ["block", "lines", "far field", "far pyramid", "far field of a video"])
def test_nothing_unattended_reaches_the_output(name: str) -> None:
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 1, 2, 128, torch.bfloat16)
    clean = run(query, key, value, plan)
    for group in range(len(plan.list_of_group)):
        unseen = ~attended_tokens(plan, group)
        start = plan.image_start + int(plan.grouping.starts[group])
        rows = slice(start, start + int(plan.grouping.sizes[group]))
        bad_key, bad_value = key.clone(), value.clone()
        bad_key[:, unseen] = torch.nan if group % 2 else torch.inf
        bad_value[:, unseen] = torch.nan
        assert torch.equal(run(query, bad_key, bad_value, plan)[:, rows], clean[:, rows])


@pytest.mark.parametrize("stages", [2, 3])
def test_heads_of_several_classes(stages: int) -> None:
    grouping = Grouping(Grid((40, 48)), (8, 8))
    near, far = (grouping, Block(1)), (grouping, Union(Block(0), Far([(0, (2, 2))])))
    plan = build_head_plan((near, far), (0, 1, 1, 0, 1), text_len=77)
    query, key, value = random_tensors(plan.classes[0], 2, 5, 128, torch.bfloat16)
    output = run(query, key, value, plan, config=HOPPER[128]._replace(stages=stages))
    for number, member in enumerate(plan.classes):
        heads = plan.heads_of(number)
        part = output[:, :, heads].contiguous()
        assert_accurate(part, query[:, :, heads], key[:, :, heads], value[:, :, heads], member)


def test_layouts() -> None:
    """Parts of a fused projection are read in place; heads first and odd offsets are copied."""
    plan = PLANS["far field"]
    query, key, value = random_tensors(plan, 2, 3, 128, torch.bfloat16)
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    fused = torch.stack([query, key, value], dim=2).unbind(2)
    shifted = []
    for tensor in (query, key, value):
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
        shifted.append(buffer[1:].view(tensor.shape).copy_(tensor))
    for (one, two, three), fits in ((heads_first, False), (fused, True), (shifted, False)):
        assert all(map(fits_descriptor, (one, two, three))) == fits
        assert_accurate(run(one, two, three, plan), query, key, value, plan)


def test_summaries_may_be_given() -> None:
    plan = PLANS["far field of a video"]
    query, key, value = random_tensors(plan, 1, 2, 128, torch.bfloat16)
    summaries = summarise(key, plan), summarise(value, plan)
    given = gluon_backend.attention(query, key, value, plan, None, 0.1, summaries=summaries)
    assert torch.equal(given, gluon_backend.attention(query, key, value, plan, None, 0.1))


def test_runs_repeat_bit_by_bit_on_any_stream() -> None:
    """Programs take work in any order, items are computed alike; and a thousand launches end."""
    plan = PLANS["far field of a video"]
    tensors = random_tensors(plan, 2, 24, 128, torch.bfloat16)
    first = run(*tensors, plan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(1000):
            again = run(*tensors, plan)
    torch.cuda.synchronize()
    assert torch.equal(again, first)


def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 40:
        pytest.skip(f"needs 40 GiB of free GPU memory, there are {free:.0f}")
    plan = build_plan(Grouping(Grid((512, 512)), (16, 16)), Union(Block(1), Far([(1, (8, 8))])), 512)
    shape = (3, plan.tokens, 24, 128)
    assert math.prod(shape) > 2**31
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    output = run(query, key, value, plan)
    sampled = sampled_error(output, query, key, value, plan)
    assert sampled.error <= 2 * sampled.plain_error + torch.finfo(torch.bfloat16).eps * sampled.largest


def test_agrees_with_the_triton_kernel_at_the_size_of_a_video() -> None:
    plan = build_plan(Grouping(Grid((33, 45, 80)), (4, 8, 8)), Block(1), 256, text_first=False)
    query, key, value = random_tensors(plan, 1, 4, 128, torch.bfloat16)
    text_valid = torch.tensor([100], device="cuda")
    other = triton_backend.attention(query, key, value, plan, text_valid, 0.1).float()
    output = gluon_backend.attention(query, key, value, plan, text_valid, 0.1).float()
    # Two roundings of the same numbers, weights and output, by each.
    assert (output - other).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * other.abs().max()
