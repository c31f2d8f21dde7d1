"""The Gluon kernel's own source against the definition, in a simulator of what the hardware does at the same time."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import Problem, error_bound, problems
from gluon_faults import FAULTS
from gluon_simulator import SOURCES, ProtocolError, Simulation
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
from grat_kernels.tile_configs import GluonConfig

# Tiles so small that small grids have full and packed tiles of tokens and of summaries, in rings of all depths.
TWO_STAGES = GluonConfig(16, 8, 2)
THREE_STAGES = GluonConfig(16, 16, 3)
ONE_QUERY_STAGE = GluonConfig(16, 8, 2, query_stages=1)
FOUR_STAGES = GluonConfig(16, 16, 4, value_stages=4)
CONFIGS = {
    "two stages": TWO_STAGES,
    "three stages": THREE_STAGES,
    "one query stage": ONE_QUERY_STAGE,
    "four stages": FOUR_STAGES,
}

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
ARCHITECTURES = pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
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
    config: GluonConfig = TWO_STAGES,
    seed: int = 0,
    architecture: str = "sm_90",
    sources: dict[str, str] | None = None,
) -> None:
    """Every element is written once and as exact as fp32 arithmetic makes it, whatever lies in padded text."""
    if text_valid is not None:
        key, value = key.clone(), value.clone()
        for sample, valid in enumerate(text_valid.tolist()):
            padding = slice(plan.text_start + valid, plan.text_start + plan.text_len)
            key[sample, padding], value[sample, padding] = math.nan, math.inf
    scale = 1 / math.sqrt(query.shape[3])
    output = torch.empty(query.shape, dtype=query.dtype)
    summary_key = summary_value = None
    contents = {}
    if plan.summaries.rows:
        exact_key, exact_value = summarise(key.float(), plan), summarise(value.float(), plan)
        summary_key, summary_value = exact_key.half(), exact_value.half()
        contents = {summary_key: exact_key, summary_value: exact_value}
    config = config._replace(tensor_memory=architecture == "sm_100")
    launch = gluon_backend.launch_of(
        query, key, value, output, summary_key, summary_value, plan, text_valid, scale, config
    )
    simulation = Simulation(seed, programs=1 + seed % 2, sources=sources)
    simulation.run(launch, contents)
    result, writes = simulation.written(output)
    assert (writes == 1).all()
    query, key, value = query.float(), key.float(), value.float()
    expected = span_attention(query, key, value, plan, text_valid, scale, backend="reference")
    bound = error_bound(query, key.nan_to_num(0, 0, 0), value.nan_to_num(0, 0, 0), scale)
    assert (torch.from_numpy(result) - expected).abs().max() <= bound


@ARCHITECTURES
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_definition(name: str, config: GluonConfig, architecture: str) -> None:
    plan = PLANS[name]
    for seed in range(2):
        check(*tensors_for(plan, 1 + seed % 2, 3, 8), plan, config=config, seed=seed, architecture=architecture)


@ARCHITECTURES
@pytest.mark.parametrize("name", ["block", "lines", "far field", "far pyramid", "text and one token"])
def test_padded_text_is_masked_in_each_sample(name: str, architecture: str) -> None:
    plan = PLANS[name]
    for seed, valid in enumerate((0, plan.text_len - 2)):
        text_valid = torch.tensor([valid, plan.text_len])
        check(*tensors_for(plan, 2, 2, 8), plan, text_valid, seed=seed, architecture=architecture)


@ARCHITECTURES
def test_queries_without_any_key_get_zeros(architecture: str) -> None:
    """Those of single groups, which have no far field, and no text that is valid."""
    plan = build_plan(Grouping(Grid((4, 4)), (4, 4)), Far([(0, (2, 2))]), 5)
    for seed, valid in enumerate((0, 3)):
        text_valid = torch.tensor([valid, 5])
        check(*tensors_for(plan, 2, 2, 8), plan, text_valid, seed=seed, architecture=architecture)


@ARCHITECTURES
@pytest.mark.parametrize("amplitude", [4, 64, 1024])
def test_large_scores_rescale_the_output(amplitude: int, architecture: str) -> None:
    """Of small ones, the maximum never rises enough."""
    plan = PLANS["far field"]
    query, key, value = tensors_for(plan, 2, 3, 8)
    check(amplitude * query, key, value, plan, seed=amplitude, architecture=architecture)


@ARCHITECTURES
def test_heads_of_several_classes(architecture: str) -> None:
    for seed in range(4):
        text_valid = torch.tensor([4, 9]) if seed % 2 else None
        check(*tensors_for(BY_HEAD, 2, 3, 8), BY_HEAD, text_valid, seed=seed, architecture=architecture)


def test_parts_of_a_fused_projection_are_read_in_place() -> None:
    plan = PLANS["far field"]
    query, key, value = torch.stack(tensors_for(plan, 2, 3, 16), dim=2).unbind(2)
    assert query.stride(1) == 3 * 3 * 16
    check(query, key, value, plan, torch.tensor([13, 7]))


@ARCHITECTURES
@settings(max_examples=30)
@given(problem=problems(max_tokens=90), config=st.sampled_from(list(CONFIGS.values())), seed=st.integers(0, 10**6))
def test_random_problems_and_orders(problem: Problem, config: GluonConfig, seed: int, architecture: str) -> None:
    query, key, value, text_valid = problem.tensors(torch.float16)
    check(query, key, value, problem.plan, text_valid, config, seed, architecture)


@ARCHITECTURES
def test_programs_share_the_work(architecture: str) -> None:
    plan = PLANS["block"]
    query, key, value = tensors_for(plan, 1, 2, 8)
    output = torch.empty_like(query)
    config = TWO_STAGES._replace(tensor_memory=architecture == "sm_100")
    launch = gluon_backend.launch_of(query, key, value, output, None, None, plan, None, 0.3, config)
    taken = set()
    for programs in (1, 3, 7):
        simulation = Simulation(5, programs)
        simulation.run(launch)
        result, writes = simulation.written(output)
        assert (writes == 1).all()
        taken.add(result.tobytes())
    assert len(taken) == 1


@pytest.mark.parametrize(("architecture", "fault"), [(one, fault) for one in FAULTS for fault in FAULTS[one]])
def test_the_simulator_sees_a_fault(architecture: str, fault: str) -> None:
    """So that a run without complaint means something."""
    lines, instead, complaints = FAULTS[architecture][fault]
    broken = {name: source.replace(lines, instead) for name, source in SOURCES.items()}
    assert broken != SOURCES
    for seed in range(40):
        plan = BY_HEAD if seed % 2 else PLANS["far pyramid"]
        text_valid = torch.tensor([plan.text_len, 2]) if seed % 4 > 1 else None
        try:
            query, key, value = tensors_for(plan, 2, 3, 8)
            config = ONE_QUERY_STAGE if seed % 3 == 1 else TWO_STAGES
            check(4 * query, key, value, plan, text_valid, config, seed, architecture, broken)
        except ProtocolError as error:
            complaint = str(error)
        except AssertionError as error:
            complaint = "written" if "writes" in str(error) else "wrong"
        else:
            continue
        assert any(expected in complaint for expected in complaints), complaint
        return
    pytest.fail("not seen")


def test_tiles_of_tokens_one_after_another_are_known() -> None:
    """Summaries, tiles that are not full, and rows in another order are none."""
    rows = [[4, 5, 6, 7], [4, 5, 6, 8], [8, 9, 10, 11], [7, 8, 9, -1], [-1, 0, 1, 2], [9, 8, 7, 6]]
    assert gluon_backend._runs_of(torch.tensor(rows, dtype=torch.int32), 11).tolist() == [4, -1, -1, -1, -1, -1]
    assert gluon_backend._runs_of(torch.tensor(rows, dtype=torch.int32), 12).tolist() == [4, -1, 8, -1, -1, -1]


def test_what_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)

    def reason(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None = None) -> str:
        return gluon_backend.obstacle(device, dtype, head_dim, tokens) or ""

    assert "not on cpu" in reason(cpu, torch.bfloat16, 128)
    assert "not float32" in reason(cuda, torch.float32, 128)
    assert "too many" in reason(cuda, torch.float16, 64, 2**31)
    if not torch.cuda.is_available():
        assert "no device cuda" in reason(cuda, torch.float16, 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)
    head_dims = {(9, 0): (64, 128, 256), (10, 0): (64, 128), (10, 3): (64, 128)}
    for capability, served in head_dims.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert all(not reason(cuda, torch.float16, head_dim) for head_dim in served)
        assert f"{', '.join(map(str, served))} on sm_" in reason(cuda, torch.float16, 96)
    for capability in ((8, 0), (8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert "it needs a Hopper or Blackwell GPU (compute capability 9.0 or 10)" in reason(cuda, torch.float16, 64)


def test_triton_may_be_missing_or_speak_another_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    language = "triton.experimental.gluon.language.nvidia"
    assert gluon_backend._language_obstacle() is None
    # As in Triton 3.9, which names the copies otherwise, in 3.5, which names layouts otherwise, and before Gluon.
    others = {
        "hopper": (SimpleNamespace(tma=SimpleNamespace(async_load=None)), None),
        "blackwell": (SimpleNamespace(),),
    }
    for part, module in ((part, module) for part, modules in others.items() for module in modules):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, f"{language}.{part}", module)
            assert "Triton 3.6 and 3.7, here is" in (gluon_backend._language_obstacle() or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in (gluon_backend.obstacle(torch.device("cuda"), torch.float16, 128, None) or "")


def test_a_scale_that_is_not_positive_is_refused() -> None:
    plan = PLANS["one token"]
    query, key, value = tensors_for(plan, 1, 1, 64)
    with pytest.raises(ValueError, match="positive scale"):
        gluon_backend.launch_of(query, key, value, query, None, None, plan, None, 0.0, TWO_STAGES)
