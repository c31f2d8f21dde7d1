"""Every backend against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Problem, defined_by_head, error_bound, problems
from hypothesis import HealthCheck, given, settings
from operator_names import record_operators
from tracked_memory import track

from grat_kernels import (
    Backend,
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    Union,
    build_head_plan,
    build_plan,
    sdpa_backend,
    span_attention,
)
from grat_kernels import reference as definition

FAST = ["reference", "sdpa", "sdpa in parts", "flex"]
WITH_TRITON = [*FAST, "triton"]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend by name; sdpa gathers groups this small in batches, and is tested as with large ones as well."""
    if request.param == "sdpa in parts":
        monkeypatch.setattr(sdpa_backend, "PER_GATHERED_KEY", math.inf)
    return Backend(request.param.split()[0])


def exact(problem: Problem, *tensors: torch.Tensor, scale: float, text_valid: torch.Tensor | None) -> torch.Tensor:
    query, key, value = (tensor.double() for tensor in tensors)
    return definition.attention(query, key, value, problem.plan, text_valid, scale, torch.float64)


@pytest.mark.parametrize("backend", FAST, indirect=True)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_backends_equal_the_definition(backend: Backend, problem: Problem) -> None:
    query, key, value, text_valid = problem.tensors(torch.float32)
    scale = 1 / math.sqrt(problem.head_dim)
    output = span_attention(query, key, value, problem.plan, text_valid, backend=backend)
    assert output.shape == query.shape
    assert output.is_contiguous()
    error = (output - exact(problem, query, key, value, scale=scale, text_valid=text_valid)).abs().max()
    assert error <= error_bound(query, key, value, scale)


@settings(max_examples=12)
@given(problem=problems(max_tokens=80))
def test_triton_equals_the_definition(problem: Problem) -> None:
    query, key, value, text_valid = problem.tensors(torch.float32)
    scale = 1 / math.sqrt(problem.head_dim)
    output = span_attention(query, key, value, problem.plan, text_valid, backend=Backend.TRITON)
    error = (output - exact(problem, query, key, value, scale=scale, text_valid=text_valid)).abs().max()
    assert error <= error_bound(query, key, value, scale)


@pytest.mark.parametrize("backend", ["sdpa", "sdpa in parts"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_sdpa_in_16_bits_is_as_exact_as_the_dtype_allows(
    backend: Backend, dtype: torch.dtype, problem: Problem
) -> None:
    query, key, value, text_valid = problem.tensors(dtype)
    scale = 1 / math.sqrt(problem.head_dim)
    output = span_attention(query, key, value, problem.plan, text_valid, backend=backend)
    assert output.dtype == dtype
    error = (output - exact(problem, query, key, value, scale=scale, text_valid=text_valid)).abs().max()
    assert error <= error_bound(query, key, value, scale)


@pytest.mark.parametrize("backend", FAST, indirect=True)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(max_tokens=120))
def test_nothing_unattended_reaches_the_output(backend: Backend, problem: Problem) -> None:
    query, key, value, text_valid = problem.tensors(torch.float32)
    plan = problem.plan
    group = 0
    seen = torch.zeros(plan.tokens, dtype=torch.bool)
    for span in plan.spans(group):
        if span.level == 0:
            seen[span.start : span.stop] = True
        else:
            offset = plan.summaries.offsets[span.level - 1] + span.start
            for row in range(offset, offset + span.length):
                seen[plan.summaries.starts[row] : plan.summaries.starts[row] + plan.summaries.counts[row]] = True
    start = plan.image_start + int(plan.grouping.starts[group])
    rows = slice(start, start + int(plan.grouping.sizes[group]))
    clean = span_attention(query, key, value, plan, text_valid, backend=backend)[:, rows]
    key[:, ~seen] = torch.nan
    value[:, ~seen] = torch.inf
    poisoned = span_attention(query, key, value, plan, text_valid, backend=backend)[:, rows]
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=2 * error_bound(query, clean, clean, 1.0))
    assert poisoned.isfinite().all()


@pytest.mark.parametrize("backend", WITH_TRITON, indirect=True)
@pytest.mark.parametrize("text_first", [True, False])
def test_padded_text_is_ignored_whatever_it_holds(backend: Backend, text_first: bool) -> None:
    grouping = Grouping(Grid((9, 11)), (4, 4))
    generator = torch.Generator().manual_seed(0)
    padded = build_plan(grouping, Union(Block(1), Far([(1, (2, 2))])), 10, text_first)
    trimmed = build_plan(grouping, Union(Block(1), Far([(1, (2, 2))])), 6, text_first)
    query, key, value = (torch.randn(1, padded.tokens, 2, 32, generator=generator) for _ in range(3))
    kept = [position for position in range(padded.tokens) if not 6 <= position - padded.text_start < 10]
    expected = definition.attention(query[:, kept], key[:, kept], value[:, kept], trimmed, None, 0.2)
    drop = [position for position in range(padded.tokens) if position not in kept]
    key[:, drop] = torch.nan
    value[:, drop] = torch.nan
    output = span_attention(query, key, value, padded, torch.tensor([6]), 0.2, backend)[:, kept]
    assert (output - expected).abs().max() <= 2 * error_bound(query, key.nan_to_num(), value.nan_to_num(), 0.2)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "sdpa in parts", "flex"], indirect=True)
def test_a_value_that_is_not_finite_shows_where_it_is_attended(backend: Backend) -> None:
    plan = build_plan(Grouping(Grid((8, 12)), (4, 4)), Block(0), 5, True)
    query, key, value = (torch.randn(1, plan.tokens, 2, 32) for _ in range(3))
    value[0, plan.image_start + 20, 1, 3] = torch.nan
    output = span_attention(query, key, value, plan, backend=backend)
    group = slice(plan.image_start + 16, plan.image_start + 32)
    flawed = output.isnan()
    assert flawed[0, group, 1, 3].all()
    assert flawed[0, : plan.image_start, 1, 3].all()  # text attends all
    assert not flawed[:, :, 0].any()
    assert not flawed[:, plan.image_start : group.start].any()
    assert not flawed[:, group.stop :].any()


@pytest.mark.parametrize("backend", ["sdpa", "sdpa in parts", "flex"], indirect=True)
@pytest.mark.parametrize("text_first", [True, False])
def test_a_query_without_any_key_is_zero(backend: Backend, text_first: bool) -> None:
    """Of three groups the one in the middle has no other far enough, and all of its text is padding in one sample."""
    plan = build_plan(Grouping(Grid((4, 12)), (4, 4)), Far([(1, (2, 2))]), 6, text_first)
    query, key, value = (torch.randn(2, plan.tokens, 2, 32) for _ in range(3))
    output = span_attention(query, key, value, plan, torch.tensor([0, 4]), backend=backend)
    middle = slice(plan.image_start + 16, plan.image_start + 32)
    assert not output[0, middle].any()
    output[0, middle] = 1
    assert output.isfinite().all()
    assert (output != 0).all()


@pytest.mark.parametrize("backend", WITH_TRITON, indirect=True)
@pytest.mark.parametrize("shape", [(9, 14), (3, 5, 7)])
def test_blocks_of_one_token_equal_full_attention(backend: Backend, shape: tuple[int, ...]) -> None:
    axes = len(shape)
    grouping = Grouping(Grid(shape), (2,) * axes)
    far = build_plan(grouping, Union(Block(0), Far([(0, (1,) * axes)])), 5, True)
    full = build_plan(grouping, Full(), 5, True)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, far.tokens, 2, 32, generator=generator) for _ in range(3))
    output = span_attention(query, key, value, far, backend=backend)
    expected = span_attention(query, key, value, full, backend=Backend.REFERENCE)
    assert (output - expected).abs().max() <= 2 * error_bound(query, key, value, 1 / math.sqrt(32))


@pytest.mark.parametrize("backend", WITH_TRITON, indirect=True)
def test_summaries_equal_a_plain_dense_computation(backend: Backend) -> None:
    """Far field on a ragged grid, written out token by token in raster order."""
    height, width, group, block = 7, 10, 4, 2
    plan = build_plan(
        Grouping(Grid((height, width)), (group, group)), Union(CrissCross(1), Far([(0, (block, block))])), 0
    )
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(height * width, 32, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = torch.empty_like(query)
    for y in range(height):
        for x in range(width):
            keys, values, bias = [], [], []
            for block_y in range(0, height, block):
                for block_x in range(0, width, block):
                    members = [
                        row * width + column
                        for row in range(block_y, min(block_y + block, height))
                        for column in range(block_x, min(block_x + block, width))
                    ]
                    if block_y // group == y // group or block_x // group == x // group:
                        keys += [key[member] for member in members]
                        values += [value[member] for member in members]
                        bias += [0.0] * len(members)
                    else:
                        keys.append(key[members].mean(0))
                        values.append(value[members].mean(0))
                        bias.append(math.log(len(members)))
            scores = torch.stack(keys) @ query[y * width + x] / math.sqrt(32) + torch.tensor(bias, dtype=torch.float64)
            expected[y * width + x] = scores.softmax(0) @ torch.stack(values)
    order = torch.from_numpy(plan.order)
    query, key, value = (tensor[order][None, :, None].float() for tensor in (query, key, value))
    output = span_attention(query, key, value, plan, backend=backend)[0, torch.from_numpy(plan.inverse), 0]
    assert (output - expected).abs().max() <= error_bound(query, key, value, 1 / math.sqrt(32))


CELLS = ((8, 8), (4, 4), (2, 2))
HEAD_PLAN = build_head_plan(
    (
        (Grouping(Grid((9, 18)), (8, 8), CELLS), Union(Block(0), Far([(0, (2, 2))]))),
        (Grouping(Grid((9, 18)), (4, 4), CELLS), CrissCross()),
        (Grouping(Grid((9, 18)), (4, 4), CELLS), Union(Block(0), Far([(0, (2, 2)), (1, (4, 4))]))),
        (Grouping(Grid((9, 18)), (8, 8), CELLS), Full()),
    ),
    class_of_head=(2, 0, 1, 0, 3),
    text_len=7,
)
PLAN_OF_HEAD = [HEAD_PLAN.classes[number] for number in HEAD_PLAN.class_of_head]


# Tiles that fill up the shorter classes have no keys: 0/0, computed and not stored.
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("backend", WITH_TRITON, indirect=True)
@pytest.mark.parametrize("padded", [False, True], ids=["all text", "padded text"])
def test_heads_of_different_classes_attend_differently(backend: Backend, padded: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, HEAD_PLAN.tokens, 5, 32, generator=generator) for _ in range(3))
    text_valid = torch.tensor([7, 2]) if padded else None
    scale = 1 / math.sqrt(32)
    output = span_attention(query, key, value, HEAD_PLAN, text_valid, backend=backend)
    assert output.is_contiguous()
    expected = defined_by_head(query, key, value, PLAN_OF_HEAD, text_valid, scale)
    assert (output - expected).abs().max() <= error_bound(query, key, value, scale)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("backend", WITH_TRITON, indirect=True)
@pytest.mark.parametrize("by_head", [False, True], ids=["one plan", "plans by head"])
def test_known_summaries_are_used_as_they_are(backend: Backend, by_head: bool) -> None:
    """Also where they are not the means of these keys and values, and not contiguous."""
    plan = HEAD_PLAN if by_head else HEAD_PLAN.classes[2]
    generator = torch.Generator().manual_seed(6)
    query, key, value = (torch.randn(2, plan.tokens, 5, 32, generator=generator) for _ in range(3))
    known = [torch.randn(2, plan.summaries.rows, 5, 32, generator=generator) for _ in range(2)]
    strided = tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in known)
    scale = 1 / math.sqrt(32)
    output = span_attention(query, key, value, plan, backend=backend, summaries=strided)  # type: ignore[arg-type]
    plans = PLAN_OF_HEAD if by_head else [HEAD_PLAN.classes[2]] * 5
    expected = defined_by_head(query, key, value, plans, None, scale, known)
    largest_key, largest_value = torch.cat([key, known[0]], dim=1), torch.cat([value, known[1]], dim=1)
    assert (output - expected).abs().max() <= error_bound(query, largest_key, largest_value, scale)


def test_head_plans_say_what_does_not_fit() -> None:
    near = (Grouping(Grid((8, 8)), (4, 4)), Block(0))
    with pytest.raises(ValueError, match="counted from 0"):
        build_head_plan((near,), (0, 1))
    with pytest.raises(ValueError, match="counted from 0"):
        build_head_plan((near, near), (0, 0))
    with pytest.raises(ValueError, match="share one token order"):
        build_head_plan((near, (Grouping(Grid((8, 8)), (8, 8)), Block(0))), (0, 1))
    query = torch.randn(1, HEAD_PLAN.tokens, 3, 32)
    with pytest.raises(ValueError, match="5 heads, the tensors have 3"):
        span_attention(query, query, query, HEAD_PLAN)
    assert HEAD_PLAN.density == pytest.approx(sum(HEAD_PLAN.classes[c].density for c in (2, 0, 1, 0, 3)) / 5)
    assert build_head_plan((near, near), (0, 1)) is build_head_plan((near, near), (0, 1))


@pytest.mark.parametrize("backend", ["sdpa", "sdpa in parts"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sdpa_takes_any_strides(backend: Backend, dtype: torch.dtype) -> None:
    plan = build_plan(Grouping(Grid((9, 14)), (4, 4)), Union(Block(1), Far([(1, (2, 2))])), 5, False)
    shape = (2, 3, 32, plan.tokens)
    query, key, value = (torch.randn(shape, dtype=dtype).permute(0, 3, 1, 2) for _ in range(3))
    scale = 1 / math.sqrt(32)
    output = span_attention(query, key, value, plan, backend=backend)
    assert output.is_contiguous()
    expected = definition.attention(query.double(), key.double(), value.double(), plan, None, scale, torch.float64)
    assert (output - expected).abs().max() <= error_bound(query, key, value, scale)


def test_heads_that_are_a_view_are_not_copied_for_every_batch() -> None:
    plan = build_plan(Grouping(Grid((64, 64)), (4, 4)), Block(1))
    query, key, value = (torch.randn(1, plan.tokens, 8, 32) for _ in range(3))
    views = query[:, :, 2:6], key[:, :, 2:6], value[:, :, 2:6]
    copies = views[0].contiguous(), views[1].contiguous(), views[2].contiguous()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sdpa_backend.attention(query, key, value, plan, None, 1.0)

    assert torch.equal(attend(*views), attend(*copies))
    peaks = [track(lambda tensors=tensors: attend(*tensors)).peak_bytes for tensors in (views, copies)]
    whole = copies[0].nbytes
    assert peaks[0] < peaks[1] + whole / 2


def test_heads_without_a_far_field_leave_the_summaries_of_others_alone() -> None:
    near = HEAD_PLAN.classes[1]
    assert near.summaries.rows
    query, key, value = (torch.randn(1, near.tokens, 1, 32) for _ in range(3))
    poison = torch.full((1, near.summaries.rows, 1, 32), math.nan)
    with record_operators() as names:
        output = sdpa_backend.attention(query, key, value, near, None, 1.0, summaries=(poison, poison))
    assert output.isfinite().all()
    assert "aten::cat" not in names
