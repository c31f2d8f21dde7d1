"""The Hopper kernel's own source against the definition, in a simulator of what the hardware does at the same time."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from cases import Problem, error_bound, problems
from hopper_simulator import SOURCE, ProtocolError, Simulation
from hypothesis import given, settings
from hypothesis import strategies as st

from grat_kernels import (
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    HeadPlan,
    Plan,
    SlidingTile,
    Union,
    build_head_plan,
    build_plan,
    gluon_backend,
    span_attention,
)
from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import HopperConfig

# Tiles so small that small grids have full and packed tiles of tokens and of summaries, in rings of two and three.
TWO_STAGES = HopperConfig(16, 8, 2)
THREE_STAGES = HopperConfig(16, 16, 3)

PLANS = {
    "full": build_plan(Grouping(Grid((7, 8)), (4, 4)), Full(), 20),
    "block": build_plan(Grouping(Grid((7, 16)), (4, 4)), Block(1), 13),
    "lines": build_plan(Grouping(Grid((2, 9, 7)), (2, 4, 4)), CrissCross(2), 5, text_first=False),
    "sliding tiles": build_plan(Grouping(Grid((8, 13)), (4, 4)), SlidingTile((1, 3)), 33),
    "far field": build_plan(Grouping(Grid((10, 13)), (4, 4)), Union(Block(0), Far([(0, (2, 2))])), 13),
    "far pyramid": build_plan(
        Grouping(Grid((8, 17)), (4, 4)), Union(Block(0), Far([(0, (1, 2)), (1, (4, 4))])), 20, text_first=False
    ),
    "no text": build_plan(Grouping(Grid((9, 10)), (4, 4)), Union(Block(0), CrissCross()), 0),
    "one token": build_plan(Grouping(Grid((1,)), (4,)), Full()),
    "text and one token": build_plan(Grouping(Grid((1, 1)), (2, 2)), Block(0), 3, text_first=False),
}
# The second class has more query tiles, and the far field alone.
BY_HEAD = build_head_plan(
    (
        (Grouping(Grid((8, 12)), (4, 4)), Block(1)),
        (Grouping(Grid((8, 12)), (4, 4)), Union(Block(0), Far([(0, (2, 2))]))),
    ),
    (1, 0, 1),
    text_len=9,
)


def tensors_for(
    plan: Plan | HeadPlan, batch: int, heads: int, head_dim: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, plan.tokens, heads, head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(torch.float16) for _ in range(3))
    return query, key, value


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None = None,
    config: HopperConfig = TWO_STAGES,
    seed: int = 0,
    source: str | None = None,
) -> None:
    """Every element is written once and as exact as fp32 arithmetic makes it, whatever lies in padded text."""
    if text_valid is not None:
        key, value = key.clone(), value.clone()
        for sample, valid in enumerate(text_valid.tolist()):
            padding = slice(plan.text_start + valid, plan.text_start + plan.text_len)
            key[sample, padding], value[sample, padding] = math.nan, math.inf
    scale = 1 / math.sqrt(query.shape[3])
    output = torch.empty(query.shape, dtype=query.dtype)
    summaries, contents = (None, None), {}
    if plan.summaries.rows:
        exact = [summarise(tensor.float(), plan) for tensor in (key, value)]
        summaries = [tensor.half() for tensor in exact]
        contents = dict(zip(summaries, exact, strict=True))
    launch = gluon_backend.launch_of(query, key, value, output, *summaries, plan, text_valid, scale, config)
    simulation = Simulation(seed, programs=1 + seed % 2, source=source)
    simulation.run(launch, contents)
    result, writes = simulation.written(output)
    assert (writes == 1).all()
    wide = [tensor.float() for tensor in (query, key, value)]
    expected = span_attention(*wide, plan, text_valid, scale, backend="reference")
    finite = [tensor.nan_to_num(0, 0, 0) for tensor in wide]
    assert (torch.from_numpy(result) - expected).abs().max() <= error_bound(*finite, scale)


@pytest.mark.parametrize("config", [TWO_STAGES, THREE_STAGES], ids=["two stages", "three stages"])
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_definition(name: str, config: HopperConfig) -> None:
    plan = PLANS[name]
    for seed in range(3):
        check(*tensors_for(plan, 1 + seed % 2, 3, 8), plan, config=config, seed=seed)


@pytest.mark.parametrize("name", ["block", "lines", "far field", "far pyramid", "text and one token"])
def test_padded_text_is_masked_in_each_sample(name: str) -> None:
    plan = PLANS[name]
    for seed, valid in enumerate((0, plan.text_len - 2)):
        check(*tensors_for(plan, 2, 2, 8), plan, torch.tensor([valid, plan.text_len]), seed=seed)


def test_heads_of_several_classes() -> None:
    for seed in range(4):
        text_valid = torch.tensor([4, 9]) if seed % 2 else None
        check(*tensors_for(BY_HEAD, 2, 3, 8), BY_HEAD, text_valid, seed=seed)


def test_parts_of_a_fused_projection_are_read_in_place() -> None:
    plan = PLANS["far field"]
    query, key, value = torch.stack(tensors_for(plan, 2, 3, 16), dim=2).unbind(2)
    assert query.stride(1) == 3 * 3 * 16
    check(query, key, value, plan, torch.tensor([13, 7]))


@settings(max_examples=30)
@given(problems(max_tokens=90), st.sampled_from([TWO_STAGES, THREE_STAGES]), st.integers(0, 10**6))
def test_random_problems_and_orders(problem: Problem, config: HopperConfig, seed: int) -> None:
    query, key, value, text_valid = problem.tensors(torch.float16)
    check(query, key, value, problem.plan, text_valid, config, seed)


def test_programs_share_the_work() -> None:
    plan = PLANS["block"]
    query, key, value = tensors_for(plan, 1, 2, 8)
    output = torch.empty_like(query)
    launch = gluon_backend.launch_of(query, key, value, output, None, None, plan, None, 0.3, TWO_STAGES)
    taken = set()
    for programs in (1, 3, 7):
        simulation = Simulation(5, programs)
        simulation.run(launch)
        result, writes = simulation.written(output)
        assert (writes == 1).all()
        taken.add(result.tobytes())
    assert len(taken) == 1


# A line of the kernel, what stands there instead, and how that shows.
FAULTS = {
    "refill waits for one consumer": ("init(key_empty.index(slot), count=CONSUMERS)", "init(key_empty.index(slot), count=1)", "arrivals|overwritten|deadlock"),
    "values: refill waits for one consumer": ("init(value_empty.index(slot), count=CONSUMERS)", "init(value_empty.index(slot), count=1)", "arrivals|overwritten|deadlock"),
    "queries: refill waits for one consumer": ("init(query_empty, count=CONSUMERS)", "init(query_empty, count=1)", "arrivals|overwritten|deadlock"),
    "refill does not wait": ("    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)\n    mbarrier.expect", "    mbarrier.expect", "overwritten|arrivals|deadlock"),
    "packed refill does not wait": ("    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)\n    for", "    for", "overwritten|arrivals|deadlock"),
    "wrong parity of the refill": ("((step // STAGES) & 1) ^ 1", "(step // STAGES) & 1", "deadlock"),
    "queries: wrong parity of the refill": ("(published & 1) ^ 1", "published & 1", "deadlock"),
    "keys: wrong parity": ("mbarrier.wait(key_full.index(next_slot), ((step + 1) // STAGES) & 1)", "mbarrier.wait(key_full.index(next_slot), (step // STAGES) & 1)", "loaded|deadlock|overwritten|wrong"),
    "values are not awaited": ("    mbarrier.wait(value_full.index(slot), (step // STAGES) & 1)\n    pending", "    pending", "loaded|wrong"),
    "keys are released too early": ("        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))\n        mbarrier.arrive(key_empty.index(slot), count=1)\n", "        mbarrier.arrive(key_empty.index(slot), count=1)\n        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))\n", "overwritten"),
    "values are released too early": ("    accumulator, next_weights, decay, total = warpgroup_mma_wait(\n        num_outstanding=0, deps=(pending_output, next_weights, decay, total)\n    )\n    mbarrier.arrive(value_empty.index(slot), count=1)\n", "    mbarrier.arrive(value_empty.index(slot), count=1)\n    accumulator, next_weights, decay, total = warpgroup_mma_wait(\n        num_outstanding=0, deps=(pending_output, next_weights, decay, total)\n    )\n", "overwritten"),
    "values are never released": ("    mbarrier.arrive(value_empty.index(slot), count=1)\n    accumulator = accumulator *", "    accumulator = accumulator *", "deadlock"),
    "queries are released too early": ("        # Queries are not read any more", "        mbarrier.arrive(query_empty, count=1)\n        # Queries", "arrivals|overwritten|deadlock"),
    "scores are not awaited": ("num_outstanding=1, deps=(pending_scores,)", "num_outstanding=2, deps=(pending_scores,)", "before its matrix product"),
    "output is not awaited": ("num_outstanding=0, deps=(pending_output, next_weights", "num_outstanding=1, deps=(pending_output, next_weights", "before its matrix product"),
    "no fence after threads wrote": ("    fence_async_shared()\n    # One thread", "    # One thread", "without a fence"),
    "copied rows are not awaited": ("async_copy.wait_group(0)", "async_copy.wait_group(1)", "loaded|without a fence|without waiting"),
    "too few bytes announced": ("mbarrier.expect(full.index(slot), blocks", "mbarrier.expect(full.index(slot), blocks.block_shape[0] // blocks", "bytes"),
    "too many bytes announced": ("ELEMENT_BYTES = gl.constexpr(2)", "ELEMENT_BYTES = gl.constexpr(4)", "deadlock"),
    "nobody begins": ("    mbarrier.arrive(turns.index(0), count=1)\n    fence", "    fence", "deadlock"),
    "the turn stays": ("mbarrier.arrive(turns.index(1 - WHICH), count=1)", "mbarrier.arrive(turns.index(WHICH), count=1)", "deadlock|arrivals"),
    "the end is not published": ("    _publish(items, item_slot, ONE)\n", "", "deadlock|wrong|written"),
    "a step is not counted": ("        step += 1\n\n        # Stored", "        # Stored", "deadlock|loaded|arrivals|wrong"),
    "padded text is loaded": ("present = present & ((rows < padding_start) | (rows >= padding_stop))", "present = present", "wrong"),
    "padded text is attended": ('float("-inf"), bias)', "bias, bias)", "wrong"),
    "empty slots are loaded": ("present = rows >= 0", "present = rows >= -1", "out of bounds|wrong"),
    "rows of the next tile are stored": ("stored = (rows < query_count)[:, None] &", "stored = (rows >= 0)[:, None] &", "written|out of bounds"),
    "offsets of 32 bits": ("wide = gl.cast(rows, gl.int64)", "wide = rows * 2**26 // 2**26", "overflows"),
    "summaries without their weight": ("bias = gl.load(summary_bias + tile + columns)", "bias = bias", "wrong"),
    "all heads of one class": ("        tile += gl.load(class_of_head + head) * tiles\n", "        tile += 0\n", "wrong"),
    "the accumulator does not decay": ("accumulator * gl.convert_layout(decay", "accumulator + 0 * gl.convert_layout(decay", "wrong"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_simulator_sees_a_fault(fault: str) -> None:
    """So that a run without complaint means something."""
    line, instead, sign = FAULTS[fault]
    source = SOURCE.read_text()
    assert line in source
    broken = source.replace(line, instead)
    signs = []
    for seed in range(40):
        plan = BY_HEAD if seed % 2 else PLANS["far pyramid"]
        text_valid = torch.tensor([plan.text_len, 2]) if seed % 4 > 1 else None
        try:
            check(*tensors_for(plan, 2, 3, 8), plan, text_valid, seed=seed, source=broken)
        except ProtocolError as error:
            signs.append(str(error))
        except AssertionError as error:
            signs.append("written" if "writes" in str(error) else "wrong")
        if signs:
            break
    assert signs, "not seen"
    assert any(part in signs[0] for part in sign.split("|")), signs[0]


def test_what_it_cannot_run_is_said() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "not on cpu" in (gluon_backend.obstacle(cpu, torch.bfloat16, 128, None) or "")
    assert "not float32" in (gluon_backend.obstacle(cuda, torch.float32, 128, None) or "")
    assert "64, 128, 256, not 96" in (gluon_backend.obstacle(cuda, torch.float16, 96, None) or "")
    assert "too many" in (gluon_backend.obstacle(cuda, torch.float16, 64, 2**31) or "")
    if not torch.cuda.is_available():
        assert "no device cuda" in (gluon_backend.obstacle(cuda, torch.float16, 64, 1) or "")


def test_triton_may_be_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    for absent in (missing, lambda name: None):
        monkeypatch.setattr(importlib.util, "find_spec", absent)
        assert "triton 3.6" in (gluon_backend.obstacle(torch.device("cuda"), torch.float16, 128, None) or "")


def test_a_scale_that_is_not_positive_is_refused() -> None:
    plan = PLANS["one token"]
    query, key, value = tensors_for(plan, 1, 1, 64)
    with pytest.raises(ValueError, match="positive scale"):
        gluon_backend.launch_of(query, key, value, query, None, None, plan, None, 0.0, TWO_STAGES)
