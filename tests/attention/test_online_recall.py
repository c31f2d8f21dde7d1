"""What is measured of sampled queries while a run goes on, against `recall.row_statistics` of the same queries."""

from __future__ import annotations

import itertools

import pytest
import torch
from flux_runs import NoHostReads
from recall_cases import CHOOSING, FAR, GRIDS, HEADS, TEXT, WITH_REFERENCES, group, plan_of, tensors

from grat_cli.attention import online_recall
from grat_cli.attention.adapter import AttentionInputs
from grat_cli.attention.online_recall import measure, sample_rows
from grat_cli.attention.recall import RowStatistics, row_statistics, sample_positions
from grat_kernels import Block, CrissCross, Full, Grid, Grouping, HeadPlan, Pattern, Plan, Segments, build_head_plan
from grat_kernels.summaries import summarise

CPU = torch.device("cpu")
BATCH, ROWS, SCALE = 2, 20, 0.4


def inputs_of(plan: Plan | HeadPlan, text_valid: list[int] | None = None, summaries: bool = False) -> AttentionInputs:
    samples = [tensors(plan.tokens, seed) for seed in range(BATCH)]
    query, key, value = (torch.stack(list(tensor)) for tensor in zip(*samples, strict=True))
    valid = None if text_valid is None else torch.tensor(text_valid, dtype=torch.int32)
    means = (summarise(key, plan), summarise(value, plan)) if summaries else None
    return AttentionInputs(0, query, key, value, plan, SCALE, valid, means)


def statistics(inputs: AttentionInputs, plan: Plan, sample: int, seed: int) -> RowStatistics:
    """Of all queries' full attention and of one plan."""
    return row_statistics(
        inputs.query[sample],
        inputs.key[sample],
        inputs.value[sample],
        [plan],
        sample_positions(plan, ROWS, seed),
        inputs.scale,
        None if inputs.text_valid is None else int(inputs.text_valid[sample]),
    )


def expected(inputs: AttentionInputs, seed: int) -> list[float]:
    """Kept, recall and error by definition, mean over the samples."""
    plan = inputs.plan
    by_head = plan.class_of_head if isinstance(plan, HeadPlan) else (0,) * HEADS
    figures = []
    for sample in range(BATCH):
        kept, recalls, squares = 0.0, [], torch.zeros(2)
        for number, member in enumerate(plan.classes):
            heads = [head for head in range(HEADS) if by_head[head] == number]
            found = statistics(inputs, member, sample, seed)
            recall = (found.text + found.kept[0].image)[:, heads].mean().item()
            recalls += [recall] * len(heads)
            lengths, errors = found.output[:, heads], found.kept[0].error[:, heads]
            of_class = torch.stack([(errors * lengths).square().sum(), lengths.square().sum()])
            if member.pattern.far_levels:
                squares += of_class
                recall = max(recall, 1 - (of_class[0] / of_class[1]).sqrt().item())
            kept += recall * len(heads) / HEADS
        error = (squares[0] / squares[1]).sqrt().item() if squares[1] else float("nan")
        figures.append([kept, sum(recalls) / HEADS, error])
    return torch.tensor(figures).mean(0).tolist()


def assert_measured(inputs: AttentionInputs, seed: int = 3) -> torch.Tensor:
    found = measure(inputs, sample_rows(inputs.plan, ROWS, seed, CPU))
    # Sums of so many fp32 terms in another order; an error is a difference of two such, over the length of one.
    rounding = inputs.plan.tokens * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, torch.tensor(expected(inputs, seed)), atol=rounding, rtol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("segments", [Segments.of_text(TEXT, True), Segments.of_text(TEXT, False), WITH_REFERENCES])
@pytest.mark.parametrize("pattern", [Block(0), Block(1), CrissCross(1)])
def test_recall_is_that_of_row_statistics(grid: Grid, segments: Segments, pattern: Pattern) -> None:
    plan = plan_of(grid, pattern, segments=segments)
    for text_valid in (None, [TEXT - 3, TEXT]):
        kept, recall, error = assert_measured(inputs_of(plan, text_valid)).tolist()
        assert kept == recall
        assert error != error  # nothing but recall is measured of plain patterns
        assert (recall < 0.99) == (plan.density < 1)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("pattern", [FAR, CHOOSING])
def test_patterns_with_summaries_are_judged_by_their_output_too(pattern: Pattern, given: bool) -> None:
    plan = plan_of(Grid((9, 7)), pattern, cells=((2, 2),))
    for text_valid in (None, [TEXT - 3, TEXT]):
        kept, recall, error = assert_measured(inputs_of(plan, text_valid, summaries=given)).tolist()
        assert 0 < error < 1
        assert kept >= recall


def test_the_greater_of_recall_and_one_less_the_error_counts() -> None:
    """Equal values everywhere: nothing is lost, whatever the recall. Opposite values: recall is all there is."""
    plan = plan_of(Grid((9, 7)), FAR, cells=((2, 2),))
    rows = sample_rows(plan, ROWS, 0, CPU)
    inputs = inputs_of(plan)
    same = measure(inputs._replace(value=torch.ones_like(inputs.value)), rows)
    assert same[0].item() == pytest.approx(1, abs=1e-5)
    assert same[1] < 0.9
    none = measure(inputs._replace(value=torch.zeros_like(inputs.value)), rows)
    assert none[0] == none[1]
    assert none[2].isnan()


def test_heads_that_attend_differently_are_weighed_by_their_number() -> None:
    grid = Grid((9, 7))
    order = Grouping(grid, group(grid), (group(grid), (2, 2), (1, 2)))
    for patterns in ((Block(0), FAR), (CrissCross(1), Full()), (Full(), FAR), (FAR, CHOOSING), (CHOOSING, Full())):
        plan = build_head_plan(tuple((order, pattern) for pattern in patterns), (0, 1, 0), TEXT, True)
        assert_measured(inputs_of(plan))
        assert_measured(inputs_of(plan, [TEXT - 2, 1]))


def test_keys_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a single key, some of them hidden text alone."""
    monkeypatch.setattr(online_recall, "_BUDGET_BYTES", 1)
    for pattern, text_first in itertools.product((Block(1), FAR, CHOOSING), (True, False)):
        plan = plan_of(Grid((9, 7)), pattern, text_first, cells=((2, 2),))
        assert_measured(inputs_of(plan))
        assert_measured(inputs_of(plan, [0, 2]))


def test_half_precision_is_measured_in_fp32() -> None:
    plan = plan_of(Grid((9, 7)), Block(1))
    inputs = inputs_of(plan)
    halved = inputs._replace(**{name: getattr(inputs, name).bfloat16() for name in ("query", "key", "value")})
    widened = inputs._replace(**{name: getattr(halved, name).float() for name in ("query", "key", "value")})
    rows = sample_rows(plan, ROWS, 0, CPU)
    torch.testing.assert_close(measure(halved, rows), measure(widened, rows), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pattern", [Block(1), FAR, CHOOSING])
def test_nothing_is_read_from_the_device(pattern: Pattern) -> None:
    plan = plan_of(Grid((9, 7)), pattern, cells=((2, 2),))
    inputs = inputs_of(plan, [2, 4])
    with NoHostReads():
        measure(inputs, sample_rows(plan, ROWS, 0, CPU))
