"""Kernels are compared with the definition before they are used, and a run with a broken one stops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import grat

import grat_cli
from grat_cli.errors import NumericalFailure
from grat_kernels import (
    Backend,
    Block,
    Choice,
    CrissCross,
    Far,
    Grid,
    Grouping,
    KernelFailure,
    Plan,
    Union,
    build_head_plan,
    build_plan,
    sdpa_backend,
    self_test,
    span_attention,
    trials,
    triton_backend,
)
from grat_kernels.backends import check_kernel
from grat_kernels.tile_lists import EMPTY
from grat_kernels.trials import Form

if torch.cuda.is_available():
    pytest.skip("tests/gpu tests the compiled kernels", allow_module_level=True)

GROUPING = Grouping(Grid((6, 10)), (4, 4)).refined(((2, 2),))
NEAR = build_plan(GROUPING, Block(0), 4)
FAR = build_plan(GROUPING, Union(Block(0), Far([(0, (2, 2))])), 4)
CHOOSING = build_plan(GROUPING, Union(Block(0), Far([(0, (2, 2))], Choice(2, 1, (1, 1)))), 4)
BY_HEAD = build_head_plan(((GROUPING, Block(0)), (GROUPING, CrissCross())), (0, 1), 4)
CPU = torch.device("cpu")


def tensors(
    head_dim: int = 64, dtype: torch.dtype = torch.float32, heads_first: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, NEAR.tokens, head_dim) if heads_first else (1, NEAR.tokens, 2, head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    if heads_first:
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return query, key, value


def require(backend: str, attention: self_test.Attention, form: Form) -> None:
    """Tries a kernel in one form."""
    trials.require(backend, [form], partial(self_test.compare, backend, attention))


@pytest.fixture(autouse=True)
def nothing_passed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_passed", set())
    monkeypatch.setattr(trials, "_failures", {})


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> list[Form]:
    """Forms in the order in which they were computed by the definition, once per plan and precision."""
    forms: list[Form] = []
    problem = self_test._problem
    monkeypatch.setattr(self_test, "_problem", lambda plan, form: forms.append(form) or problem(plan, form))
    return forms


def breaks(
    monkeypatch: pytest.MonkeyPatch, break_it: Callable[[torch.Tensor], torch.Tensor], module=triton_backend
) -> None:
    """Lets a backend compute something else than it should."""
    intact = module.attention
    monkeypatch.setattr(module, "attention", lambda *arguments: break_it(intact(*arguments)))


def test_an_intact_kernel_is_tested_once(tested: list[Form]) -> None:
    first = span_attention(*tensors(), NEAR, backend="triton")
    assert set(tested) == {Form(CPU, torch.float32, 64)}
    plans = len(tested)
    assert torch.equal(span_attention(*tensors(), NEAR, backend="triton"), first)
    assert len(tested) == plans


# Tiles that fill up the shorter class of heads have no keys: 0/0, computed and not stored.
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_each_form_is_tested(tested: list[Form]) -> None:
    text_valid = torch.tensor([3])
    span_attention(*tensors(), FAR, backend="triton")
    span_attention(*tensors(), FAR, text_valid, backend="triton")
    span_attention(*tensors(), BY_HEAD, backend="triton")
    span_attention(*tensors(dtype=torch.float16), FAR, backend="triton")
    span_attention(*tensors(32), FAR, backend="triton")
    span_attention(*tensors(heads_first=True), FAR, backend="triton")
    span_attention(*tensors(), CHOOSING, backend="triton")
    form = Form(CPU, torch.float32, 64, far=True)
    assert list(dict.fromkeys(tested)) == [
        form,
        form._replace(padded=True),
        form._replace(far=False, by_head=True),
        form._replace(dtype=torch.float16),
        form._replace(head_dim=32),
        form._replace(in_place=False),
        form._replace(choosing=True),
    ]


def test_what_is_not_a_kernel_of_ours_is_not_tested(tested: list[Form]) -> None:
    for backend in (Backend.REFERENCE, Backend.SDPA, Backend.FLEX):
        span_attention(*tensors(), NEAR, backend=backend)
        check_kernel(backend, [Form(CPU, torch.float32, 64)])
    assert not tested


def test_a_test_ahead_spares_the_first_call(tested: list[Form]) -> None:
    check_kernel("triton", [Form(CPU, torch.float32, 64, far=True)])
    assert set(tested) == {Form(CPU, torch.float32, 64, far=True)}
    tested.clear()
    span_attention(*tensors(), FAR, backend="triton")
    assert not tested


def _noisy(output: torch.Tensor) -> torch.Tensor:
    return output + 1e-3 * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))


def _one_wrong_row(output: torch.Tensor) -> torch.Tensor:
    output[-1, -1, -1] = output[-1, -2, -1]
    return output


def _one_nan(output: torch.Tensor) -> torch.Tensor:
    output[0, 0, 0, 0] = torch.nan
    return output


@pytest.mark.parametrize("break_it", [_noisy, _one_wrong_row, _one_nan, torch.zeros_like])
def test_a_broken_kernel_stops_the_run(break_it, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks(monkeypatch, break_it)
    # Not only the first time.
    for _ in range(2):
        with pytest.raises(KernelFailure) as caught:
            span_attention(*tensors(), NEAR, backend="triton")
    found, advice = str(caught.value).splitlines()
    assert found.startswith("the triton kernel computes wrong results here: an error of ")
    for part in ("float32, 64 channels", f"torch {torch.__version__.partition('+')[0]}", "triton 3.", "grat-cli "):
        assert part in found
    assert "--backend sdpa" in advice


@pytest.mark.parametrize("dropped", ["far", "padded", "by_head"])
def test_a_kernel_that_ignores_a_part_of_its_form_is_found(dropped: str) -> None:
    def ignorant(query, key, value, plan, text_valid, scale):
        if dropped == "padded":
            text_valid = None
        elif dropped == "by_head":
            plan = plan.classes[0]
        elif not isinstance(plan, Plan) or plan.summaries.rows:
            plan = build_plan(plan.grouping, Block(0), plan.text_len)
        return triton_backend.attention(query, key, value, plan, text_valid, scale)

    intact, broken = (
        Form(CPU, torch.float16, 64),
        Form(CPU, torch.float16, 64)._replace(**{dropped: True}),
    )
    require("ignorant", ignorant, intact)
    with pytest.raises(KernelFailure, match="the ignorant kernel"):
        require("ignorant", ignorant, broken)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.float16, 128), (torch.float32, 64)])
def test_a_kernel_that_chooses_passes(dtype: torch.dtype, head_dim: int) -> None:
    form = Form(CPU, dtype, head_dim, far=True, padded=True, choosing=True)
    require("triton", triton_backend.attention, form)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_a_kernel_that_chooses_for_some_heads_passes() -> None:
    form = Form(CPU, torch.float16, 64, far=True, by_head=True, choosing=True)
    require("triton", triton_backend.attention, form)


@pytest.mark.parametrize("mistake", ["other group", "other head", "other sample", "no fine blocks"])
def test_a_wrong_choice_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    intact = sdpa_backend.chosen_rows

    def wrong(query, summaries, plan, scale):
        rows = intact(query, summaries, plan, scale)
        exact, fine = (
            count * room for count, room in zip(plan.pattern.choice[:2], (plan.candidates.tokens, 4), strict=True)
        )
        if mistake == "other group":
            rows[:, :, 0, :exact] = rows[:, :, 1, :exact]
        elif mistake == "other head":
            rows = rows.flip(1)
        elif mistake == "other sample":
            rows = rows.flip(0)
        else:
            rows[..., exact : exact + fine] = EMPTY
        return rows

    def attention(*arguments):
        return sdpa_backend.attention(*arguments)

    form = Form(CPU, torch.float16, 64, far=True, choosing=True)
    require("intact", attention, form)
    monkeypatch.setattr(sdpa_backend, "chosen_rows", wrong)
    with pytest.raises(KernelFailure):
        require("broken", attention, form)


def test_surroundings_do_not_matter(tested: list[Form]) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        require("triton", triton_backend.attention, Form(CPU, torch.float32, 64))
    assert tested
    state = torch.random.get_rng_state()
    require("triton", triton_backend.attention, Form(CPU, torch.float32, 128))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_compiled_code_is_tested_when_it_runs(tested: list[Form]) -> None:
    def block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return span_attention(query * 2, key, value, NEAR, backend=Backend.TRITON) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    result = compiled(*tensors())
    assert set(tested) == {Form(CPU, torch.float32, 64)}
    torch.testing.assert_close(result, block(*tensors()), rtol=0, atol=0)


def test_a_capture_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    form = Form(torch.device("cuda", 0), torch.float16, 64)
    require("triton", lambda *_: pytest.fail("called within a capture"), form)
    assert not trials._passed


def test_the_command_line_says_so_in_two_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    breaks(monkeypatch, torch.zeros_like)
    picture = tmp_path / "fox.png"
    result = grat("image", "a red fox", "--model", "demo", "--device", "cpu", "--backend", "triton", "--out", picture)
    assert result.code == NumericalFailure.exit_code == 5
    errors = result.err[result.err.index("error: ") :].splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: the triton kernel computes wrong results here")
    assert not picture.exists()


def test_install_tests_the_kernel_before_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_flux

    pipe = tiny_flux.pipeline()
    breaks(monkeypatch, torch.zeros_like)
    with (
        pytest.raises(NumericalFailure, match="wrong results"),
        grat_cli.install(pipe, "flux-x", height=256, width=256, backend="triton"),
    ):
        pytest.fail("installed a broken kernel")
