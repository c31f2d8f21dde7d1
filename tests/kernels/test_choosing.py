"""Choice by content: against the definition, and what holds whatever is chosen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import Problem, defined_by_head, error_bound, segments
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from grat_kernels import (
    Backend,
    Block,
    Choice,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    Plan,
    SlidingTile,
    Union,
    build_head_plan,
    build_plan,
    choosing,
    sdpa_backend,
    span_attention,
)
from grat_kernels import reference as definition
from grat_kernels.analysis import tokens_behind
from grat_kernels.pattern import NOT_ATTENDED
from grat_kernels.summaries import summary_pair
from grat_kernels.tile_lists import EMPTY

# Scores that lie closer may change places with rounding.
APART = 1e-4


@st.composite
def choosing_plans(draw: st.DrawFn, max_tokens: int = 120) -> Plan:
    """Ragged grids of one to three axes, blocks in blocks in groups, and counts from 0 to more than there is."""
    axes = draw(st.sampled_from([1, 2, 3]))
    side = {1: 60, 2: 16, 3: 7}[axes]
    ratios = st.lists(st.sampled_from([1, 2, 2, 3]), min_size=axes, max_size=axes)
    fine = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(axes))
    block = tuple(
        size * ratio for size, ratio in zip(fine, draw(ratios.filter(lambda found: max(found) > 1)), strict=True)
    )
    group = tuple(size * ratio for size, ratio in zip(block, draw(ratios), strict=True))
    shape: list[int] = []
    for _ in range(axes):
        room = max(1, max_tokens // math.prod(shape))
        shape.append(draw(st.integers(1, min(side, room))))
    count = st.sampled_from([0, 1, 2, 5, 1000])
    exact, fine_count = draw(st.tuples(count, count).filter(any))
    near = draw(st.sampled_from([Block(0), Block(1), CrissCross(1), SlidingTile(3)]))
    far = Far([(draw(st.sampled_from([0, 0, 1])), block)], Choice(exact, fine_count, fine))
    return build_plan(Grouping(Grid(tuple(shape)), group), Union(near, far), segments=draw(segments()))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    plan = draw(choosing_plans())
    batch = draw(st.integers(1, 2))
    text_valid = None
    if plan.text_len and draw(st.booleans()):
        text_valid = tuple(draw(st.integers(0, plan.text_len)) for _ in range(batch))
    return Problem(plan, batch, draw(st.integers(1, 2)), 32, text_valid, draw(st.integers(0, 99)))


def margin(query: torch.Tensor, summaries: tuple[torch.Tensor, torch.Tensor], plan: Plan, scale: float) -> float:
    """Least difference of scores between what is told closely and what is told less so."""
    candidates = plan.candidates
    assert candidates is not None
    tables = choosing._tables(plan, query.device)
    scores = choosing._scores(choosing.group_means(query, plan), summaries, tables, scale)
    ordered = scores.sort(dim=-1, descending=True).values
    least = math.inf
    for group, (exact, fine, rest) in enumerate(candidates.counts.tolist()):
        ends = ([exact] if exact and fine + rest else []) + ([exact + fine] if rest else [])
        for end in ends:
            gaps = ordered[:, :, group, end - 1] - ordered[:, :, group, end]
            least = min(least, float(gaps.min()))
    return least


def check(problem: Problem, dtype: torch.dtype) -> None:
    query, key, value, text_valid = problem.tensors(dtype)
    plan, scale = problem.plan, 1 / math.sqrt(problem.head_dim)
    summaries = summary_pair(key, value, plan, None)
    assume(margin(query, summaries, plan, scale) > APART)
    output = span_attention(query, key, value, plan, text_valid, backend=Backend.SDPA, summaries=summaries)
    wide = query.double(), key.double(), value.double()
    expected = definition.attention(*wide, plan, text_valid, scale, torch.float64, summaries)
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert (output - expected).abs().max() <= error_bound(query, key, value, scale)


@settings(max_examples=50)
@given(problem=problems())
def test_sdpa_equals_the_definition(problem: Problem) -> None:
    check(problem, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=12)
@given(problem=problems())
def test_sdpa_in_16_bits_is_as_exact_as_the_dtype_allows(dtype: torch.dtype, problem: Problem) -> None:
    check(problem, dtype)


def rows_of(plan: Plan, seed: int = 0, heads: int = 2) -> torch.Tensor:
    """What random queries choose, `[1, H, groups, slots]`."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, plan.tokens, heads, 32, generator=generator) for _ in range(3))
    return choosing.chosen_rows(query, summary_pair(key, value, plan, None), plan, 0.2)


@settings(max_examples=40)
@given(plan=choosing_plans(200))
def test_nothing_is_dropped_and_nothing_attended_twice(plan: Plan) -> None:
    candidates = plan.candidates
    assert candidates is not None
    rows = rows_of(plan)[0].numpy()
    assert rows.shape[-1] == candidates.width == candidates.slots.max()
    of_token_order = np.argsort(plan.grouping.starts)
    coordinates = [tuple(plan.grouping.coordinates[group].tolist()) for group in of_token_order]
    sizes = plan.group_sizes.tolist()
    for number, group in enumerate(of_token_order):
        expected = np.ones(plan.tokens, np.int64)
        attended = [
            plan.pattern.level(coordinates[number], other, plan.grouping.counts) != NOT_ATTENDED
            for other in coordinates
        ]
        expected[plan.image_start : plan.image_stop] = np.repeat(attended, sizes)
        for chosen in rows[:, number]:
            found = np.zeros(plan.tokens, np.int64)
            for span in plan.spans(int(group)):
                assert span.level == 0
                found[span.start : span.stop] += 1
            blocks = [0, 0, 0]
            for row in chosen[chosen != EMPTY].tolist():
                if row < plan.tokens:
                    found[row] += 1
                    continue
                start, count = (column[row - plan.tokens] for column in (plan.summaries.starts, plan.summaries.counts))
                found[start : start + count] += 1
                blocks[2] += int(row - plan.tokens >= plan.summaries.offsets[candidates.level - 1])
            np.testing.assert_array_equal(found, expected)
            assert (chosen[candidates.slots[number] :] == EMPTY).all()
        assert expected.sum() == tokens_behind(plan)[plan.list_of_group[group]]


def test_counts_are_those_of_the_plan_and_slots_are_empty_at_borders_alone() -> None:
    whole = build_plan(Grouping(Grid((16, 16)), (8, 8)), Union(Block(0), Far([(0, (4, 4))], Choice(2, 3, (2, 2)))), 5)
    assert whole.candidates is not None
    assert whole.candidates.counts.tolist() == [[2, 3, 7]] * 4
    assert (whole.candidates.slots == 2 * 16 + 3 * 4 + 7).all()
    rows = rows_of(whole)
    assert (rows != EMPTY).all()
    of_exact, of_fine, of_rest = rows.split([32, 12, 7], dim=-1)
    fine, coarse = (whole.tokens + whole.summaries.offsets[level] for level in (1, 0))
    assert (of_exact < whole.tokens).all()
    assert (of_fine >= fine).all()
    assert ((of_rest >= coarse) & (of_rest < fine)).all()
    assert (of_rest.diff(dim=-1) > 0).all()


class _Counted(TorchDispatchMode):
    """Query-key pairs that run, and products of two numbers in other matrix products."""

    pairs = 0
    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in function.name():
            query, key = args[:2]
            self.pairs += math.prod(query.shape[:3]) * key.shape[2]
        elif function.name() == "aten::bmm":
            self.products += math.prod(args[0].shape) * args[1].shape[2]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("shape", "text"), [((16, 24), 24), ((13, 10), 0), ((19, 9), 7)])
def test_density_is_what_is_computed(shape: tuple[int, int], text: int) -> None:
    pattern = Union(Block(0), Far([(0, (4, 4))], Choice(2, 4, (2, 2))))
    plan = build_plan(Grouping(Grid(shape), (8, 8)), pattern, text)
    batch, heads, head_dim = 2, 3, 64
    query, key, value = (torch.randn(batch, plan.tokens, heads, head_dim) for _ in range(3))
    with _Counted() as counted:
        sdpa_backend.attention(query, key, value, plan, None, 0.125)
    calls = batch * heads
    assert counted.pairs == calls * (plan.parts.pairs + plan.parts.text)
    # A pair is two products of as many numbers as a head has channels. Sums of a few products are no matrix products.
    selection = counted.products / (2 * head_dim * calls)
    assert selection <= plan.parts.selection <= 1.05 * selection
    assert plan.density == (plan.parts.attended) / plan.tokens**2


@pytest.mark.parametrize("shape", [(11, 14), (40,), (3, 6, 5)])
def test_enough_exact_blocks_are_full_attention(shape: tuple[int, ...]) -> None:
    axes = len(shape)
    grouping = Grouping(Grid(shape), (4,) * axes, ((4,) * axes, (2,) * axes, (1,) * axes))
    plan = build_plan(grouping, Union(Block(0), Far([(0, (2,) * axes)], Choice(10_000, 0, (1,) * axes))), 5)
    query, key, value = (torch.randn(2, plan.tokens, 2, 32) for _ in range(3))
    output = span_attention(query, key, value, plan, backend=Backend.SDPA)
    expected = span_attention(query, key, value, build_plan(grouping, Full(), 5), backend=Backend.REFERENCE)
    assert (output - expected).abs().max() <= 2 * error_bound(query, key, value, 1 / math.sqrt(32))


DEMO = build_plan(Grouping(Grid((12, 14)), (4, 4)), Union(Block(0), Far([(0, (4, 4))], Choice(2, 3, (2, 2)))), 5)


def test_heads_choose_for_themselves() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, DEMO.tokens, 4, 32, generator=generator) for _ in range(3))
    rows = choosing.chosen_rows(query, summary_pair(key, value, DEMO, None), DEMO, 0.2)
    assert not torch.equal(rows[:, 0], rows[:, 1])
    order = [2, 0, 3, 1]
    output = span_attention(query, key, value, DEMO, backend=Backend.SDPA)
    query, key, value = query[:, :, order], key[:, :, order], value[:, :, order]
    assert torch.equal(choosing.chosen_rows(query, summary_pair(key, value, DEMO, None), DEMO, 0.2), rows[:, order])
    mixed = span_attention(query, key, value, DEMO, backend=Backend.SDPA)
    torch.testing.assert_close(mixed, output[:, :, order], rtol=0, atol=error_bound(query, key, value, 0.2))


def test_heads_scored_apart_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    together = rows_of(DEMO, heads=5)
    monkeypatch.setattr(choosing, "_ON_CPU_BYTES", 1)
    assert torch.equal(rows_of(DEMO, heads=5), together)


@pytest.mark.parametrize("padded", [False, True], ids=["all text", "padded text"])
def test_nothing_waits_for_the_device(padded: bool) -> None:
    """Tensors without data have no number to wait for."""
    plan = build_plan(
        Grouping(Grid((9, 14)), (4, 4)), Union(CrissCross(1), Far([(0, (2, 4))], Choice(2, 3, (2, 2)))), 5
    )
    query = torch.empty(2, plan.tokens, 2, 32, device="meta")
    text_valid = torch.empty(2, dtype=torch.int64, device="meta") if padded else None
    assert sdpa_backend.attention(query, query, query, plan, text_valid, 0.2).shape == query.shape


def test_a_token_that_is_not_finite_reaches_those_alone_that_attend_it() -> None:
    """Not those whose rows have empty slots, nor the scores of blocks with fewer means, nor through padded text."""
    grouping = Grouping(Grid((9, 23)), (4, 4))
    plan = build_plan(grouping, Union(Block(0), Far([(1, (4, 2))], Choice(2, 2, (2, 2)))), 3, text_first=False)
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(1, plan.tokens, 2, 32, generator=generator) for _ in range(3))
    text_valid = torch.tensor([2])
    clean = span_attention(query, key, value, plan, text_valid, backend=Backend.SDPA)
    for tensor in (key, value):
        tensor[:, 0] = torch.nan
        tensor[:, plan.text_start + 2] = torch.nan
    poisoned = span_attention(query, key, value, plan, text_valid, backend=Backend.SDPA)
    reached = []
    for group, b in enumerate(grouping.coordinates.tolist()):
        start = int(plan.grouping.starts[group])
        rows = slice(start, start + int(plan.grouping.sizes[group]))
        reached.append(plan.pattern.level(tuple(b), (0, 0), grouping.counts) != NOT_ATTENDED)
        if reached[-1]:
            assert poisoned[:, rows].isnan().all()
        else:
            assert torch.equal(poisoned[:, rows], clean[:, rows])
    assert any(reached)
    assert not all(reached)


CELLS = ((8, 8), (4, 4), (2, 2), (1, 2))
HEAD_PLAN = build_head_plan(
    (
        (Grouping(Grid((9, 18)), (8, 8), CELLS), Union(Block(0), Far([(0, (4, 4))], Choice(3, 2, (2, 2))))),
        (Grouping(Grid((9, 18)), (4, 4), CELLS), Union(CrissCross(1), Far([(0, (2, 2))], Choice(1, 4, (1, 2))))),
        (Grouping(Grid((9, 18)), (4, 4), CELLS), Union(Block(0), Far([(0, (2, 2)), (1, (4, 4))]))),
        (Grouping(Grid((9, 18)), (8, 8), CELLS), Full()),
    ),
    class_of_head=(2, 0, 1, 0, 3),
    text_len=7,
)
PLAN_OF_HEAD = [HEAD_PLAN.classes[number] for number in HEAD_PLAN.class_of_head]


def test_classes_of_heads_choose_differently_or_not_at_all() -> None:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, HEAD_PLAN.tokens, 5, 32, generator=generator) for _ in range(3))
    text_valid, scale = torch.tensor([7, 2]), 0.2
    output = span_attention(query, key, value, HEAD_PLAN, text_valid, scale, Backend.SDPA)
    expected = defined_by_head(query, key, value, PLAN_OF_HEAD, text_valid, scale)
    assert (output - expected).abs().max() <= error_bound(query, key, value, scale)
    selections = [plan.parts.selection for plan in PLAN_OF_HEAD]
    assert HEAD_PLAN.parts.selection == pytest.approx(sum(selections) / 5)
    assert HEAD_PLAN.parts.selection > 0


def test_blocks_that_their_means_tell_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens of some blocks are alike, the choice is closer to full attention than the largest scores are."""
    grouping = Grouping(Grid((16, 16)), (4, 4))
    plan = build_plan(grouping, Union(Block(0), Far([(0, (4, 4))], Choice(3, 0, (2, 2)))), 4)
    generator = torch.Generator().manual_seed(7)
    query, key, value = (torch.randn(2, plan.tokens, 3, 32, generator=generator) for _ in range(3))
    for tensor in (key, value):
        blocks = tensor[:, plan.image_start :].unflatten(1, (16, 16))
        blocks[:, ::2] = blocks[:, ::2] * 0.1 + torch.randn(2, 8, 1, 3, 32, generator=generator)
    scale = 2 / math.sqrt(32)
    expected = span_attention(query, key, value, build_plan(grouping, Full(), 4), None, scale, Backend.SDPA)

    def error() -> float:
        output = span_attention(query, key, value, plan, None, scale, Backend.SDPA)
        return float((output - expected)[:, plan.image_start :].norm())

    ours = error()

    def by_score(
        means: torch.Tensor, summaries: tuple[torch.Tensor, torch.Tensor], tables: choosing._Tables, scale: float
    ) -> torch.Tensor:
        keys = summaries[0][:, tables.own].transpose(1, 2)
        return (means * scale @ keys.transpose(-1, -2)).masked_fill(tables.exempt.T, -math.inf)

    monkeypatch.setattr(choosing, "_scores", by_score)
    assert ours < 0.8 * error()
