"""A million image tokens: everything made before and beside attention stays small, and grows with them, not faster."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from command_line import grat

from grat_cli.attention.schedule import MOST_GROUPS, AttentionSchedule
from grat_cli.generation import report
from grat_cli.presets import load_preset
from grat_kernels import Block, CrissCross, Far, Full, Grid, Grouping, Pattern, Plan, Union, build_plan
from grat_kernels import pattern as pattern_module
from grat_kernels.analysis import reach
from grat_kernels.tile_lists import build_tile_lists

SIDE = 1024
TOKENS = SIDE * SIDE
MEGABYTE = 10**6
PATTERNS: dict[str, Pattern] = {
    "full": Full(),
    "b": Block(1),
    "x": CrissCross(),
    "bx": Union(Block(1), CrissCross()),
    "far": Union(Block(1), Far([(1, (4, 4))])),
}


def peak_bytes(make: Callable[[], Any]) -> tuple[Any, int]:
    """What is made, and how much memory its making took at most."""
    tracemalloc.start()
    try:
        made = make()
        return made, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def plan_of(name: str, group: int, text_len: int = 512) -> Plan:
    return build_plan(Grouping(Grid((SIDE, SIDE)), (group, group)), PATTERNS[name], text_len)


def array_bytes(*things: Any) -> int:
    return sum(array.nbytes for thing in things for array in thing if isinstance(array, np.ndarray))


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("name", PATTERNS)
def test_plans_and_work_lists_are_megabytes(name: str, group: int) -> None:
    # Another text than elsewhere, so that this plan is made here.
    plan, peak = peak_bytes(lambda: plan_of(name, group, text_len=group))
    assert peak < 100 * MEGABYTE
    lists = plan.span_lists
    assert array_bytes((lists.starts, lists.lengths, lists.levels, lists.bounds)) < 10 * MEGABYTE
    # Two numbers of 8 bytes for each block of 16 tokens.
    assert array_bytes((plan.summaries.starts, plan.summaries.counts)) <= TOKENS
    assert len(plan.query_runs) <= (SIDE // group) ** 2 + 1
    tiles, peak = peak_bytes(lambda: build_tile_lists(plan, 128, 128, 64, mask_text=True))
    assert array_bytes(tiles) < 40 * MEGABYTE
    assert peak < 250 * MEGABYTE
    assert reach(plan) >= group


@pytest.mark.parametrize("name", PATTERNS)
def test_groups_are_compared_a_stretch_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    kind = type(PATTERNS[name])
    levels = kind.levels

    def counted(self: Pattern, queries: np.ndarray, keys: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
        pairs.append(len(queries) * len(keys))
        return levels(self, queries, keys, counts)

    monkeypatch.setattr(kind, "levels", counted)
    monkeypatch.setattr(pattern_module, "_MOST_PAIRS", 10_000)
    build_plan.__wrapped__(Grouping(Grid((320, 320)), (16, 16)), PATTERNS[name], 512)
    assert sum(pairs) == 400**2
    assert max(pairs) <= 10_000


@pytest.mark.parametrize("most_pairs", [1, 37, 1000])
@pytest.mark.parametrize("name", PATTERNS)
def test_stretches_change_nothing(name: str, most_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grouping = Grouping(Grid((37, 50)), (8, 8))
    whole = build_plan(grouping, PATTERNS[name], 7)
    reach_of_whole = reach(whole)
    monkeypatch.setattr(pattern_module, "_MOST_PAIRS", most_pairs)
    cut = build_plan.__wrapped__(grouping, PATTERNS[name], 7)
    assert [cut.spans(group) for group in range(35)] == [whole.spans(group) for group in range(35)]
    assert (cut.query_runs, cut.density) == (whole.query_runs, whole.density)
    assert reach(cut) == reach_of_whole


def test_the_order_is_two_numbers_a_token() -> None:
    grouping = Grouping(Grid((SIDE, SIDE)), (16, 16), ((16, 16), (4, 4)))
    _, peak = peak_bytes(lambda: (grouping.order, grouping.inverse))
    assert grouping.order.nbytes == grouping.inverse.nbytes == 8 * TOKENS
    assert peak < 10 * 8 * TOKENS
    assert (grouping.order[grouping.inverse] == np.arange(TOKENS)).all()


@pytest.mark.parametrize(
    ("name", "shape"), [("flux-x", (SIDE, SIDE)), ("hunyuan-lines", (64, 128, 128)), ("hunyuan-far", (16, 256, 256))]
)
def test_schedules_hold_their_plans_and_little_else(name: str, shape: tuple[int, ...]) -> None:
    preset = load_preset(name)
    schedule, peak = peak_bytes(lambda: AttentionSchedule(preset, Grid(shape), 300, steps=50, layers=60))
    assert schedule.grid.tokens == TOKENS
    assert peak < 200 * MEGABYTE
    assert len(schedule.plans) <= 1 + len(preset.schedule.rules) + 1


def test_a_million_tokens_in_small_groups_are_planned() -> None:
    assert (SIDE // 8) ** 2 == MOST_GROUPS


def test_what_is_told_of_a_run_does_not_grow_with_its_tokens() -> None:
    told = {}
    for side in (1024, 16_384):
        data = grat("plan", "flux-x", "--res", str(side), "--highres", "off", "--json").data
        assert data["tokens"]["image"] == (side // 16) ** 2
        told[side] = len(json.dumps(data))
    assert abs(told[16_384] - told[1024]) < 100
    assert told[16_384] < 10_000


def test_the_largest_picture_of_flux_is_planned_and_drawn() -> None:
    result = grat("plan", "flux-x", "--res", "16384")
    assert result.code == 0, result.err
    assert "1,048,576 image (1024 rows x 1024)" in result.out
    assert len(result.out) < 10_000


def test_provenance_has_no_list_of_tokens() -> None:
    """What a picture carries is what its report says, without what the run cost."""
    made = {"schema": "grat.report/1", "grid": [SIDE, SIDE], "steps": [{}] * 1000, "phases": {}, "seed": 1}
    assert report.provenance(made) == {"schema": "grat.report/1", "grid": [SIDE, SIDE], "seed": 1}
