"""The public call: argument checks, choice of backend, and the operator under torch.compile."""

from __future__ import annotations

import gc
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from grat_kernels import (
    Backend,
    Block,
    Choice,
    CrissCross,
    Far,
    Grid,
    Grouping,
    Plan,
    Union,
    build_plan,
    can_run,
    gluon_backend,
    proven,
    span_attention,
    triton_backend,
)
from grat_kernels.backends import BackendUnavailable, choose_backend
from grat_kernels.plan import plan_by_key
from grat_kernels.proven import Proof

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def plan() -> Plan:
    return build_plan(Grouping(Grid((6, 10)), (4, 4)), Block(0), 4, True)


@pytest.fixture
def tensors(plan: Plan) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, plan.tokens, 2, 32, generator=generator) for _ in range(3))
    return query, key, value


def test_the_operator_passes_torchs_own_checks(plan: Plan, tensors: Tensors) -> None:
    arguments = (*tensors, torch.tensor([2, 4]), None, None, plan.key, 0.2, "sdpa")
    # Inference only: there is no backward formula to check.
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.grat.span_attention.default, arguments, test_utils=utilities)


def test_compiled_code_keeps_one_graph(plan: Plan, tensors: Tensors) -> None:
    def block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return span_attention(query * 2, key, value, plan, backend=Backend.SDPA).flatten(2) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), block(*tensors), rtol=0, atol=0)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_compiled_code_checks_text_and_gradients_in_one_graph(plan: Plan, tensors: Tensors, grad_mode: bool) -> None:
    def block(query: torch.Tensor, text_valid: torch.Tensor) -> torch.Tensor:
        return span_attention(query, *tensors[1:], plan, text_valid, backend=Backend.SDPA) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad_mode):
        for valid in (torch.tensor([2, 4]), torch.tensor([0, 1])):
            torch.testing.assert_close(compiled(tensors[0], valid), block(tensors[0], valid), rtol=0, atol=0)
        with pytest.raises(ValueError, match="text_valid"):
            compiled(tensors[0], torch.tensor([2, 5]))


def test_compiled_code_follows_a_change_of_plan(plan: Plan, tensors: Tensors) -> None:
    wider = build_plan(plan.grouping, CrissCross(1), 4, True)

    def block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, current: Plan) -> torch.Tensor:
        return span_attention(query, key, value, current, backend=Backend.SDPA)

    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for current in (plan, wider, plan):
        expected = span_attention(*tensors, current, backend=Backend.SDPA)
        torch.testing.assert_close(compiled(*tensors, current), expected, rtol=0, atol=0)


def test_output_is_contiguous_in_the_layout_of_the_input(plan: Plan, tensors: Tensors) -> None:
    query, key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors)
    output = span_attention(query, key, value, plan, backend=Backend.SDPA)
    assert output.is_contiguous()
    torch.testing.assert_close(output, span_attention(*tensors, plan, backend=Backend.SDPA), rtol=0, atol=1e-6)


def test_plans_are_named_by_key_while_they_live() -> None:
    made = build_plan.__wrapped__(Grouping(Grid((4, 4)), (2, 2)), Union(Block(0), CrissCross(2)), 0, True)
    key = made.key
    assert plan_by_key(key) is made
    del made
    gc.collect()
    with pytest.raises(KeyError):
        plan_by_key(key)


def test_wrong_arguments_are_refused_in_words(plan: Plan, tensors: Tensors) -> None:
    query, key, value = tensors
    with pytest.raises(ValueError, match="one shape"):
        span_attention(query, key[:, 1:], value, plan)
    with pytest.raises(ValueError, match="the plan is for 64 tokens"):
        span_attention(query[:, 1:], key[:, 1:], value[:, 1:], plan)
    with pytest.raises(ValueError, match="one dtype"):
        span_attention(query, key.double(), value, plan)
    with pytest.raises(ValueError, match="one number per sample"):
        span_attention(query, key, value, plan, torch.tensor([1]))
    with pytest.raises(ValueError, match="fast"):
        span_attention(query, key, value, plan, backend="fast")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("text_valid", [[0, -1], [5, 4]])
def test_more_text_than_there_is_and_less_than_none_are_refused(
    plan: Plan, tensors: Tensors, backend: str, text_valid: list[int]
) -> None:
    with pytest.raises(ValueError, match="between 0 and the plan's 4 text tokens"):
        span_attention(*tensors, plan, torch.tensor(text_valid), backend=backend)


@pytest.mark.parametrize("wanting", range(3))
def test_gradients_are_refused_where_they_would_be_wanted(plan: Plan, tensors: Tensors, wanting: int) -> None:
    query, key, value = (tensor.clone().requires_grad_(at == wanting) for at, tensor in enumerate(tensors))
    with pytest.raises(RuntimeError, match="no backward pass"):
        span_attention(query, key, value, plan)
    for inference in (torch.no_grad(), torch.inference_mode()):
        with inference:
            assert torch.equal(span_attention(query, key, value, plan), span_attention(*tensors, plan))


def test_wrong_summaries_are_refused_in_words(plan: Plan, tensors: Tensors) -> None:
    far = build_plan(plan.grouping, Union(Block(0), Far([(0, (2, 2))])), 4, True)
    right = torch.zeros(2, far.summaries.rows, 2, 32)
    span_attention(*tensors, far, summaries=(right, right))
    with pytest.raises(ValueError, match="no far field"):
        span_attention(*tensors, plan, summaries=(right, right))
    with pytest.raises(ValueError, match="summaries must be"):
        span_attention(*tensors, far, summaries=(right, right[:, 1:]))
    with pytest.raises(ValueError, match="dtype and device"):
        span_attention(*tensors, far, summaries=(right, right.double()))


def test_a_backend_chosen_by_name_never_falls_back(plan: Plan, tensors: Tensors) -> None:
    query, key, value = (tensor.to(torch.int8) for tensor in tensors)
    with pytest.raises(BackendUnavailable, match="sdpa backend cannot run here"):
        span_attention(query, key, value, plan, backend=Backend.SDPA)
    query, key, value = (tensor.bfloat16() for tensor in tensors)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="bfloat16"):
            span_attention(query, key, value, plan, backend=Backend.TRITON)


def test_can_run_gives_reasons_both_ways() -> None:
    assert can_run(Backend.SDPA, "cpu").reason
    assert can_run("reference", "cpu")
    long = can_run(Backend.FLEX, "cpu", tokens=1_000_000)
    assert not long
    assert "1000000" in long.reason
    assert not can_run(Backend.FLEX, "mps")
    assert not can_run(Backend.TRITON, "mps")
    assert not can_run(Backend.TRITON, "cpu", torch.float64)


def test_auto_says_what_it_chose_and_never_picks_the_interpreter() -> None:
    # Here the interpreter would run on the CPU, so that only the rule keeps it from being picked.
    if not torch.cuda.is_available():
        assert triton_backend.obstacle(torch.device("cpu"), torch.float32, 64, None) is None
    assert can_run(Backend.AUTO, "cpu", torch.float32, 64).reason.startswith("sdpa")


def test_auto_takes_the_fastest_kernel_of_a_gpu_and_says_why_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)
    gpu = torch.device("cuda", 0)

    def choice(capability: tuple[int, int], dtype: torch.dtype = torch.bfloat16, head_dim: int = 128):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return choose_backend(gpu, dtype, head_dim)

    assert choice((9, 0)) == (Backend.TRITON, "gluon has not passed its tests on sm_90 yet")
    proof = Proof("gluon", "sm_90", ".".join(version("triton").split(".")[:2]), "2.11", "a GPU", "2026-12-01")
    monkeypatch.setattr(proven, "PROOFS", (proof,))
    assert choice((9, 0)) == (Backend.GLUON, "the fastest that runs on this device")
    backend, reason = choice((9, 0), torch.float32)
    assert backend is Backend.TRITON
    assert reason.startswith(
        "the fastest that runs on this device; gluon cannot run here: it takes float16 and bfloat16"
    )
    backend, reason = choice((8, 0))
    assert backend is Backend.TRITON
    assert (
        "it needs a Hopper or Blackwell GPU (compute capability 9.0 or 10), cuda:0 has compute capability 8.0" in reason
    )
    with monkeypatch.context() as without_gluon:
        without_gluon.setattr(gluon_backend, "obstacle", lambda *_: "no Gluon")
        assert choice((9, 0)) == (
            Backend.TRITON,
            "the fastest that runs on this device; gluon cannot run here: no Gluon",
        )
    monkeypatch.setattr(proven, "PROOFS", (proof._replace(triton="3.1"),))
    assert choice((9, 0))[0] is Backend.TRITON
    backend, reason = choice((7, 5))
    assert backend is Backend.SDPA
    assert reason.startswith("triton cannot run here: it needs compute capability 8.0")


def test_what_is_chosen_by_content_is_left_to_backends_that_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan(Grouping(Grid((6, 10)), (4, 4)), Union(Block(0), Far([(0, (2, 2))], Choice(2, 1, (1, 1)))), 4)
    query, key, value = (torch.randn(1, plan.tokens, 2, 32) for _ in range(3))
    for backend in (Backend.GLUON, Backend.FLEX):
        with pytest.raises(BackendUnavailable):
            span_attention(query, key, value, plan, backend=backend)
    assert can_run(Backend.FLEX, "cpu")
    assert "chosen by content: use triton or sdpa" in can_run(Backend.FLEX, "cpu", choosing=True).reason
    assert can_run(Backend.AUTO, "cpu", choosing=True).reason.startswith("sdpa")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend, reason = choose_backend(torch.device("cuda", 0), torch.bfloat16, 128, choosing=True)
    assert backend is Backend.TRITON
    assert "gluon cannot run here: it does not attend blocks chosen by content" in reason


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from grat_kernels import Grid, Grouping, Block, build_plan;"
        "from grat_kernels.analysis import tile_efficiency;"
        "tile_efficiency(build_plan(Grouping(Grid((8, 8)), (4, 4)), Block(1)));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
