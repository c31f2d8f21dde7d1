"""The Triton kernel against the definition, in Triton's interpreter (which computes bfloat16 products wrongly)."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import CHOOSING, CHOOSING_BY_HEAD, PLANS, assert_accurate, random_tensors

from grat_kernels import (
    Block,
    Far,
    Grid,
    Grouping,
    HeadPlan,
    Plan,
    Union,
    build_plan,
    triton_backend,
)
from grat_kernels.launching import fits_descriptor
from grat_kernels.tile_configs import TileConfig

if torch.cuda.is_available():
    pytest.skip("tests/gpu tests the compiled kernel", allow_module_level=True)

# Tiles small enough that small grids have full and partial tiles of tokens and of summaries.
POINTERS = TileConfig(32, 32, 16, 1, 1, "pointers")
DESCRIPTORS = POINTERS._replace(form="tma")


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None = None,
    config: TileConfig | None = POINTERS,
) -> torch.Tensor:
    return triton_backend.attention(query, key, value, plan, text_valid, 1 / math.sqrt(query.shape[3]), config=config)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.float32, POINTERS), (torch.float32, DESCRIPTORS), (torch.float16, POINTERS)],
    ids=["fp32-pointers", "fp32-descriptors", "fp16-pointers"],
)
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_definition(name: str, dtype: torch.dtype, config: TileConfig) -> None:
    plan = PLANS[name]
    tensors = random_tensors(plan, 1, 1, 32, dtype)
    assert_accurate(run(*tensors, plan, config=config), *tensors, plan)


@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", ["block", "far field of a video", "one token and text", "text and one token"])
def test_padded_text_is_masked_in_each_sample(name: str, config: TileConfig) -> None:
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 2, 1, 32, torch.float32)
    text_valid = torch.tensor([plan.text_len - 2, 0])
    output = run(query, key, value, plan, text_valid, config)
    assert_accurate(output, query, key, value, plan, text_valid)
    for sample, valid in enumerate(text_valid.tolist()):
        padding = slice(plan.text_start + valid, plan.text_start + plan.text_len)
        key[sample, padding] = torch.nan
        value[sample, padding] = torch.inf
    assert torch.equal(run(query, key, value, plan, text_valid, config), output)


@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
def test_batches_of_odd_heads(config: TileConfig) -> None:
    plan = build_plan(Grouping(Grid((5, 13)), (8, 8)), Union(Block(0), Far([(0, (2, 2))])), 3)
    tensors = random_tensors(plan, 2, 3, 32, torch.float32)
    assert_accurate(run(*tensors, plan, config=config), *tensors, plan)


@pytest.mark.parametrize("head_dim", [8, 48, 64, 80, 96, 128, 256])
def test_head_dimensions(head_dim: int) -> None:
    plan = build_plan(Grouping(Grid((6, 14)), (6, 8)), Union(Block(0), Far([(0, (1, 1))])), 3)
    tensors = random_tensors(plan, 1, 2, head_dim, torch.float16)
    assert_accurate(run(*tensors, plan), *tensors, plan)
    if head_dim in (64, 128, 256):
        assert_accurate(run(*tensors, plan, config=DESCRIPTORS), *tensors, plan)


@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", CHOOSING)
def test_what_groups_choose_is_attended(name: str, config: TileConfig) -> None:
    plan = CHOOSING[name]
    tensors = random_tensors(plan, 2, 1, 32, torch.float32)
    assert_accurate(run(*tensors, plan, config=config), *tensors, plan)


def test_padded_text_is_masked_where_groups_choose() -> None:
    plan = CHOOSING["picture"]
    query, key, value = random_tensors(plan, 2, 1, 32, torch.float32)
    text_valid = torch.tensor([plan.text_len - 2, 0])
    output = run(query, key, value, plan, text_valid)
    assert_accurate(output, query, key, value, plan, text_valid)
    for sample, valid in enumerate(text_valid.tolist()):
        padding = slice(plan.text_start + valid, plan.text_start + plan.text_len)
        key[sample, padding], value[sample, padding] = torch.nan, torch.inf
    assert torch.equal(run(query, key, value, plan, text_valid), output)


# Tiles that fill up the shorter classes have no keys: 0/0, computed and not stored.
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_classes_of_heads_choose_by_themselves() -> None:
    plan = CHOOSING_BY_HEAD
    query, key, value = random_tensors(plan.classes[0], 2, 4, 32, torch.float32)
    output = run(query, key, value, plan)
    for number, member in enumerate(plan.classes):
        heads = plan.heads_of(number)
        own = (query[:, :, heads], key[:, :, heads], value[:, :, heads])
        assert_accurate(output[:, :, heads].contiguous(), *own, member)


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with [B, H, N, D] in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _part_of_a_projection(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as the middle third of a fused projection's output."""
    batch, tokens, heads, head_dim = tensor.shape
    fused = torch.full((batch, tokens, 3, heads, head_dim), torch.nan, dtype=tensor.dtype)
    fused[:, :, 1] = tensor
    return fused[:, :, 1]


def _channels_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with channels that are not next to each other."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", [_heads_first, _part_of_a_projection, _channels_apart])
def test_layouts_give_the_same_result(layout) -> None:
    plan = build_plan(Grouping(Grid((6, 10)), (6, 8)), Union(Block(0), Far([(0, (2, 2))])), 5)
    query, key, value = random_tensors(plan, 2, 2, 32, torch.float32)
    expected = run(query, key, value, plan)
    assert torch.equal(run(layout(query), layout(key), layout(value), plan), expected)
    assert torch.equal(run(query, layout(key), value, plan), expected)
    descriptors = all(fits_descriptor(layout(tensor)) for tensor in (query, key, value))
    assert descriptors == (layout is _part_of_a_projection)
    if descriptors:
        with_descriptors = run(layout(query), layout(key), layout(value), plan, config=DESCRIPTORS)
        assert_accurate(with_descriptors, query, key, value, plan)
    elif layout is _heads_first:
        with pytest.raises(ValueError, match="use the pointer form"):
            run(layout(query), layout(key), layout(value), plan, config=DESCRIPTORS)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")
@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", ["block", "lines", "far field of a video"])
def test_nothing_unattended_reaches_the_output(name: str, config: TileConfig) -> None:
    """Not even NaN and infinity, which masked arithmetic would carry along as 0·NaN."""
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 1, 1, 32, torch.float32)
    clean = run(query, key, value, plan, config=config)
    for group, poison in ((0, torch.nan), (len(plan.list_of_group) - 1, torch.inf)):
        unseen = ~_attended_tokens(plan, group)
        start = plan.image_start + int(plan.grouping.starts[group])
        rows = slice(start, start + int(plan.grouping.sizes[group]))
        bad_key, bad_value = key.clone(), value.clone()
        bad_key[:, unseen] = poison
        bad_value[:, unseen] = -poison
        assert torch.equal(run(query, bad_key, bad_value, plan, config=config)[:, rows], clean[:, rows])


def _attended_tokens(plan: Plan, group: int) -> torch.Tensor:
    """Which tokens a group attends, itself or through a summary, `[N]` bool."""
    attended = torch.zeros(plan.tokens, dtype=torch.bool)
    for span in plan.spans(group):
        if span.level == 0:
            attended[span.start : span.stop] = True
            continue
        offset = plan.summaries.offsets[span.level - 1]
        for row in range(offset + span.start, offset + span.stop):
            start = int(plan.summaries.starts[row])
            attended[start : start + int(plan.summaries.counts[row])] = True
    return attended


def test_what_is_attended_and_not_finite_shows() -> None:
    plan = PLANS["far field"]
    query, key, value = random_tensors(plan, 1, 1, 32, torch.float32)
    value[0, plan.image_start] = torch.nan
    assert run(query, key, value, plan).isnan().all()


def test_scores_of_any_size_stay_finite() -> None:
    plan = PLANS["block"]
    query, key, value = random_tensors(plan, 1, 1, 32, torch.float32)
    for size in (0.0, 1e-20, 1e15):
        tensors = (query * size, key * size, value)
        assert run(*tensors, plan).isfinite().all()


def test_the_table_serves_the_interpreter() -> None:
    plan = PLANS["far field"]
    for head_dim in (64, 80):
        tensors = random_tensors(plan, 1, 1, head_dim, torch.float16)
        assert_accurate(run(*tensors, plan, config=None), *tensors, plan)


def test_a_scale_that_is_not_positive_is_refused() -> None:
    plan = PLANS["one token"]
    tensors = random_tensors(plan, 1, 1, 32, torch.float32)
    for scale in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="positive scale"):
            triton_backend.attention(*tensors, plan, None, scale)


def test_obstacles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert triton_backend.obstacle(cpu, torch.float16, 128, None) is None
    assert triton_backend.obstacle(cpu, torch.float32, 80, 1000) is None
    for device, dtype, head_dim, tokens, reason in (
        (cpu, torch.bfloat16, 128, None, "bfloat16 products wrongly"),
        (cpu, torch.float64, 128, None, "not float64"),
        (cpu, torch.float16, 257, None, "head dimensions up to 256"),
        (cpu, torch.float16, 128, 2**31, "32 bits"),
        (cuda, torch.float16, 128, None, "no device cuda:0"),
        (torch.device("mps"), torch.float16, 128, None, "not on mps"),
    ):
        assert reason in (triton_backend.obstacle(device, dtype, head_dim, tokens) or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in (triton_backend.obstacle(cpu, torch.float16, 128, None) or "")


def test_without_the_interpreter_the_cpu_is_refused() -> None:
    program = (
        "import torch; from grat_kernels import triton_backend; "
        "print(triton_backend.obstacle(torch.device('cpu'), torch.float16, 128, None))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "set TRITON_INTERPRET=1" in result.stdout
