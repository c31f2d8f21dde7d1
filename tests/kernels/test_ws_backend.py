"""The warp-specialised kernel against the definition, in Triton's interpreter, which runs it as one group of warps."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from cases import Problem, error_bound, problems
from hypothesis import given, settings
from kernel_cases import PLANS, assert_accurate, random_tensors

from grat_kernels import (
    Block,
    CrissCross,
    Far,
    Grid,
    Grouping,
    HeadPlan,
    Plan,
    Union,
    build_head_plan,
    build_plan,
    reference,
    ws_backend,
)
from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import SPECIALISED, HopperConfig

# Tiles small enough that small grids have full and partial tiles of tokens and of summaries.
SMALL = HopperConfig(32, 32, 1)

FULL_TILES_ONLY = build_plan(Grouping(Grid((16, 16)), (8, 8)), CrissCross(), 64)
# The second class has more query tiles, and the far field alone.
BY_HEAD = build_head_plan(
    (
        (Grouping(Grid((8, 16)), (8, 8)).refined(((4, 4),)), Block(1)),
        (Grouping(Grid((8, 16)), (4, 4)).refined(((8, 8),)), Union(Block(0), Far([(0, (2, 2))]))),
    ),
    (1, 0, 1),
    text_len=9,
)


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None = None,
    config: HopperConfig | None = SMALL,
) -> torch.Tensor:
    return ws_backend.attention(query, key, value, plan, text_valid, 1 / math.sqrt(query.shape[3]), config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_definition(name: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    tensors = random_tensors(plan, 1, 1, 32, dtype)
    assert_accurate(run(*tensors, plan), *tensors, plan)


@settings(max_examples=10)
@given(problem=problems())
def test_equals_the_definition_of_random_problems(problem: Problem) -> None:
    query, key, value, text_valid = problem.tensors(torch.float32)
    scale = 1 / math.sqrt(problem.head_dim)
    output = ws_backend.attention(query, key, value, problem.plan, text_valid, scale, config=SMALL)
    wide = (query.double(), key.double(), value.double())
    exact = reference.attention(*wide, problem.plan, text_valid, scale, compute_dtype=torch.float64)
    assert (output - exact).abs().max() <= error_bound(query, key, value, scale)


def test_without_partial_tiles_nothing_is_masked() -> None:
    tensors = random_tensors(FULL_TILES_ONLY, 2, 2, 32, torch.float32)
    assert_accurate(run(*tensors, FULL_TILES_ONLY), *tensors, FULL_TILES_ONLY)
    query, key, value = tensors
    for plan, expected in ((FULL_TILES_ONLY, False), (PLANS["block"], True)):
        launch = ws_backend.launch_of(query, key, value, torch.empty_like(query), plan, None, 1.0, SMALL)
        assert launch.options["PARTIAL"] == expected


@pytest.mark.parametrize("name", ["block", "far field of a video", "one token and text", "text and one token"])
def test_padded_text_is_masked_in_each_sample(name: str) -> None:
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 2, 1, 32, torch.float32)
    text_valid = torch.tensor([plan.text_len - 2, 0])
    output = run(query, key, value, plan, text_valid)
    assert_accurate(output, query, key, value, plan, text_valid)
    for sample, valid in enumerate(text_valid.tolist()):
        padding = slice(plan.text_start + valid, plan.text_start + plan.text_len)
        key[sample, padding] = torch.nan
        value[sample, padding] = torch.inf
    assert torch.equal(run(query, key, value, plan, text_valid), output)


# Tiles that fill up the shorter class have no keys: 0/0, computed and not stored.
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_classes_of_heads_take_their_own_tiles() -> None:
    query, key, value = random_tensors(BY_HEAD.classes[0], 2, 3, 32, torch.float32)
    text_valid = torch.tensor([9, 4])
    for valid in (None, text_valid):
        output = run(query, key, value, BY_HEAD, valid)
        for number, plan in enumerate(BY_HEAD.classes):
            heads = BY_HEAD.heads_of(number)
            own = (query[:, :, heads], key[:, :, heads], value[:, :, heads])
            assert_accurate(output[:, :, heads].contiguous(), *own, plan, valid)


def test_batches_of_odd_heads() -> None:
    plan = build_plan(Grouping(Grid((5, 13)), (8, 8)), Union(Block(0), Far([(0, (2, 2))])), 3)
    tensors = random_tensors(plan, 2, 3, 32, torch.float32)
    assert_accurate(run(*tensors, plan), *tensors, plan)


@pytest.mark.parametrize("head_dim", SPECIALISED)
def test_the_tiles_of_the_table(head_dim: int) -> None:
    plan = build_plan(Grouping(Grid((24, 20)), (16, 16)), Union(Block(0), Far([(0, (2, 2))])), 7)
    tensors = random_tensors(plan, 1, 2, head_dim, torch.float16)
    assert_accurate(run(*tensors, plan, config=None), *tensors, plan)


def test_summaries_of_the_caller_are_used() -> None:
    plan = PLANS["far field"]
    query, key, value = random_tensors(plan, 1, 2, 32, torch.float32)
    means = summarise(key, plan), summarise(value, plan)
    given = ws_backend.attention(query, key, value, plan, None, 0.2, summaries=means, config=SMALL)
    assert torch.equal(given, ws_backend.attention(query, key, value, plan, None, 0.2, config=SMALL))
    other = ws_backend.attention(query, key, value, plan, None, 0.2, summaries=(means[0], 2 * means[1]), config=SMALL)
    assert not torch.equal(given, other)


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _part_of_a_projection(tensor: torch.Tensor) -> torch.Tensor:
    fused = torch.full((*tensor.shape[:2], 3, *tensor.shape[2:]), torch.nan, dtype=tensor.dtype)
    fused[:, :, 1] = tensor
    return fused[:, :, 1]


def _channels_apart(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", [_heads_first, _part_of_a_projection, _channels_apart])
def test_layouts_give_the_same_result(layout) -> None:
    plan = build_plan(Grouping(Grid((6, 10)), (6, 8)), Block(0), 5)
    query, key, value = random_tensors(plan, 2, 2, 32, torch.float32)
    expected = run(query, key, value, plan)
    assert torch.equal(run(layout(query), layout(key), layout(value), plan), expected)
    assert torch.equal(run(query, layout(key), value, plan), expected)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")
@pytest.mark.parametrize(
    "plan", [FULL_TILES_ONLY, PLANS["block"], PLANS["lines"]], ids=["full tiles", "block", "lines"]
)
def test_unattended_keys_stay_out_even_if_they_are_not_finite(plan: Plan) -> None:
    """And unattended values beyond the reach of a partial tile."""
    query, key, value = random_tensors(plan, 1, 1, 32, torch.float32)
    clean = run(query, key, value, plan)
    for group, poison in ((0, torch.nan), (len(plan.list_of_group) - 1, torch.inf)):
        seen, near = (_covered(plan, group, whole_tiles) for whole_tiles in (False, True))
        start = plan.image_start + int(plan.grouping.starts[group])
        rows = slice(start, start + int(plan.grouping.sizes[group]))
        bad_key, bad_value = key.clone(), value.clone()
        bad_key[:, ~seen] = poison
        bad_value[:, ~near] = -poison
        assert torch.equal(run(query, bad_key, bad_value, plan)[:, rows], clean[:, rows])


def _covered(plan: Plan, group: int, whole_tiles: bool) -> torch.Tensor:
    """Tokens that a group attends, `[N]` bool, or that its tiles of 32 rows cover."""
    covered = torch.zeros(plan.tokens, dtype=torch.bool)
    for span in plan.spans(group):
        length = -(-span.length // SMALL.block_n) * SMALL.block_n if whole_tiles else span.length
        covered[span.start : span.start + length] = True
    return covered


def test_what_is_attended_and_not_finite_shows() -> None:
    query, key, value = random_tensors(FULL_TILES_ONLY, 1, 1, 32, torch.float32)
    key[:, FULL_TILES_ONLY.text_start] = torch.nan
    assert run(query, key, value, FULL_TILES_ONLY).isnan().all()


def test_a_scale_that_is_not_positive_is_refused() -> None:
    plan = PLANS["one token"]
    tensors = random_tensors(plan, 1, 1, 64, torch.float32)
    for scale in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="positive scale"):
            ws_backend.attention(*tensors, plan, None, scale)


def test_obstacles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert ws_backend.obstacle(cpu, torch.float16, 128, None) is None
    for device, dtype, head_dim, tokens, reason in (
        (cpu, torch.bfloat16, 128, None, "float16 and float32 on cpu, not bfloat16"),
        (cuda, torch.float32, 128, None, "float16 and bfloat16 on cuda, not float32"),
        (cpu, torch.float16, 80, None, "head dimensions of 64 and 128, not 80"),
        (cpu, torch.float16, 128, 2**31, "32 bits"),
        (cuda, torch.float16, 128, None, "no device cuda:0"),
        (torch.device("mps"), torch.float16, 128, None, "not on mps"),
    ):
        assert reason in (ws_backend.obstacle(device, dtype, head_dim, tokens) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert f"has compute capability {capability[0]}.{capability[1]}" in (
            ws_backend.obstacle(cuda, torch.float16, 128, None) or ""
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ws_backend.obstacle(cuda, torch.bfloat16, 128, None) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "has ROCm" in (ws_backend.obstacle(cuda, torch.float16, 128, None) or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in (ws_backend.obstacle(cpu, torch.float16, 128, None) or "")


def test_without_the_interpreter_the_cpu_is_refused() -> None:
    program = (
        "import torch; from grat_kernels import ws_backend; "
        "print(ws_backend.obstacle(torch.device('cpu'), torch.float16, 128, None))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "set TRITON_INTERPRET=1" in result.stdout


def test_the_scratch_allocator_of_the_caller_is_left_alone() -> None:
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    tensors = random_tensors(PLANS["one token"], 1, 1, 32, torch.float32)
    run(*tensors, PLANS["one token"])
    assert _allocation._allocator.get() is before
