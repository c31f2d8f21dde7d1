from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.attention.schedule import MOST_GROUPS, AttentionSchedule
from grat_cli.errors import BadInput
from grat_cli.presets import load_preset, ranges, resolve_preset
from grat_kernels import Block, CrissCross, Full, Grid, HeadPlan, Plan

GRID = Grid((24, 20))


def schedule(
    *items: str, steps: int = 10, layers: int = 6, heads: int = 4, grid: Grid = GRID, preset: str = "demo-b"
) -> AttentionSchedule:
    return AttentionSchedule(resolve_preset(load_preset(preset), set_items=items), grid, 7, True, steps, layers, heads)


def dense_calls(laid_out: AttentionSchedule) -> set[tuple[int, int]]:
    calls = np.ndindex(laid_out.steps, laid_out.layers)
    return {(step, layer) for step, layer in calls if _is_dense(laid_out.plan(step, layer))}


def _is_dense(plan: Plan | HeadPlan) -> bool:
    return isinstance(plan, Plan) and isinstance(plan.pattern, Full)


def test_without_rules_there_is_one_plan() -> None:
    laid_out = schedule()
    assert len(laid_out.plans) == 1
    assert laid_out.density == laid_out.plan(9, 5).density
    assert laid_out.ideal_speedup == 1 / laid_out.density


def test_dense_steps_are_a_count_or_a_fraction_rounded_up() -> None:
    everywhere = [(step, layer) for step in range(3) for layer in range(6)]
    assert dense_calls(schedule("schedule.dense_steps=3")) == set(everywhere)
    assert dense_calls(schedule("schedule.dense_steps=0.25")) == set(everywhere)
    assert dense_calls(schedule("schedule.dense_steps=0.3")) == set(everywhere)  # 0.3 * 10 > 3 in binary
    assert schedule("schedule.dense_steps=1.0").density == 1.0
    assert not dense_calls(schedule("schedule.dense_steps=0"))


def test_rules_cover_their_steps_and_layers_and_later_ones_win() -> None:
    laid_out = schedule("schedule.rules=[{layers: 0-1, variant: full}, {steps: 0.5-1.0, layers: 1, variant: x}]")
    assert dense_calls(laid_out) == {(step, 0) for step in range(10)} | {(step, 1) for step in range(5)}
    assert len(laid_out.plans) == 3
    assert laid_out.plan(7, 1) is not laid_out.plan(7, 2)


def test_dense_steps_come_before_any_rule() -> None:
    laid_out = schedule("schedule.dense_steps=1", "schedule.rules=[{layers: 0, variant: x}]")
    assert dense_calls(laid_out) == {(0, layer) for layer in range(6)}


def test_densities_are_means_over_layers_and_steps() -> None:
    laid_out = schedule("schedule.dense_steps=2", "schedule.rules=[{layers: 0-2, variant: full}]")
    sparse = laid_out.plan(9, 5).density
    assert laid_out.density_of_step(0) == 1.0
    assert laid_out.density_of_step(9) == pytest.approx((1 + sparse) / 2)
    assert laid_out.density == pytest.approx((2 + 8 * (1 + sparse) / 2) / 10)
    assert sum(laid_out.shares.values()) == pytest.approx(1)


def test_rules_for_heads_make_plans_by_head() -> None:
    laid_out = schedule(
        "schedule.rules=[{layers: 1-2, heads: 1, variant: full}, {layers: 2, heads: 0.5-1.0, variant: x}]", heads=4
    )
    own = laid_out.plan(0, 0)
    assert isinstance(own, Plan)
    one, two = laid_out.plan(0, 1), laid_out.plan(9, 2)
    assert isinstance(one, HeadPlan)
    assert isinstance(two, HeadPlan)
    assert one.class_of_head == (0, 1, 0, 0)
    assert two.class_of_head == (0, 1, 2, 2)
    assert [type(member.pattern) for member in two.classes] == [Block, Full, CrissCross]
    x = two.classes[2].density
    assert one.density == pytest.approx((3 * own.density + 1) / 4)
    assert two.density == pytest.approx((own.density + 1 + 2 * x) / 4)
    assert laid_out.density == pytest.approx((4 * own.density + one.density + two.density) / 6)
    shares = {plan.density: share for plan, share in laid_out.shares.items()}
    assert shares == pytest.approx({own.density: (16 + 3 + 1) / 24, 1.0: 2 / 24, x: 2 / 24})
    assert laid_out.plan(0, 1) is laid_out.plan(9, 1)  # as for every step: kernels keep what they make of a plan


def test_rules_that_say_the_same_share_a_plan() -> None:
    laid_out = schedule("schedule.rules=[{heads: 0, variant: x}, {heads: 1-3, variant: x, share: 1}]", heads=4)
    assert isinstance(laid_out.plan(0, 0), Plan)
    assert len(laid_out.plans) == 1


def test_all_plans_share_one_token_order() -> None:
    laid_out = schedule(
        "attention.group=[8, 8]",
        "schedule.dense_steps=1",
        "schedule.rules=[{steps: 5-6, group: [4, 4]}, {layers: 0, far: [{beyond: 1, block: [2, 2]}]}]",
    )
    assert len(laid_out.plans) == 4
    for plan in laid_out.plans[1:]:
        np.testing.assert_array_equal(plan.order, laid_out.plans[0].order)


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("schedule.rules=[{layers: 6-9, variant: full}]", "layers 6-9, but the run has 6 layers"),
        ("schedule.rules=[{steps: 10, variant: full}]", "steps 10, but the run has 10 steps"),
        ("schedule.rules=[{heads: 4-5, variant: full}]", "heads 4-5, but the run has 4 heads"),
        ("schedule.dense_steps=11", "the run has 10 steps"),
    ],
)
def test_rules_for_steps_layers_and_heads_that_do_not_exist_are_refused(item: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        schedule(item)


def test_a_range_that_ends_beyond_the_last_layer_is_cut() -> None:
    laid_out = schedule("schedule.rules=[{layers: 4-99, variant: full}]", steps=1)
    assert dense_calls(laid_out) == {(0, 4), (0, 5)}


def test_presets_for_other_axes_and_too_many_groups_are_refused() -> None:
    with pytest.raises(BadInput, match="2 axes, this model's have 3"):
        schedule(grid=Grid((3, 8, 8)))
    with pytest.raises(BadInput, match="--group 2x2"):
        schedule("attention.group=[1, 1]", grid=Grid((100, MOST_GROUPS // 50)))
    with pytest.raises(BadInput, match="--group 8x8"):
        schedule("attention.group=[4, 4]", grid=Grid((1024, 1024)))


@given(st.integers(1, 60), st.integers(0, 100))
def test_fractions_split_a_run_without_gap_or_overlap(count: int, hundredths: int) -> None:
    cut = f"{hundredths / 100:.2f}"
    pieces = [range(0), range(0)]
    if hundredths > 0:
        pieces[0] = ranges.covered(f"0.0-{cut}", count)
    if hundredths < 100:
        pieces[1] = ranges.covered(f"{cut}-1.0", count)
    assert [*pieces[0], *pieces[1]] == list(range(count))
    assert ranges.leading(hundredths / 100, count) == len(pieces[0])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_indices_are_inclusive(first: int, extra: int, count: int) -> None:
    inside = [index for index in range(first, first + extra + 1) if index < count]
    assert list(ranges.covered(f"{first}-{first + extra}", count)) == inside
    assert list(ranges.covered(first, count)) == list(ranges.covered(str(first), count)) == inside[:1]


@given(st.text(alphabet="0123456789.- ", max_size=9) | st.text(max_size=6))
def test_any_text_is_a_range_or_a_value_error(text: str) -> None:
    try:
        covered = ranges.covered(text, 20)
    except ValueError:
        return
    assert set(covered) <= set(range(20))


@pytest.mark.parametrize("text", ["5-3", "0.5-0.5", "0.6-0.2", "0.0-1.5", "0.5", "-1", "a-b", "", "1-2-3", "1--2", "½"])
def test_ranges_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected an index|is empty|backwards|lie between|both ends"):
        ranges.covered(text, 20)


PALETTE = "schedule.palette={d: {variant: full}, x: {variant: x}}"


def test_tables_give_layers_and_heads_their_letters_and_rules_override_them() -> None:
    laid_out = schedule(
        PALETTE,
        "schedule.tables=[{layers: [d, x, dxdx, xxdd, d, d]}, {steps: 0.5-1.0, layers: [x, x, x, x, x, dddx]}]",
        "schedule.rules=[{steps: 9, layers: 5, variant: b}]",
    )
    full, cross = Full(), CrissCross(1)
    by_head = laid_out.plan(0, 2)
    assert isinstance(by_head, HeadPlan)
    assert [by_head.classes[number].pattern for number in by_head.class_of_head] == [full, cross, full, cross]
    assert dense_calls(laid_out) == {(step, layer) for step in range(5) for layer in (0, 4, 5)}
    assert isinstance(laid_out.plan(5, 5), HeadPlan)
    last = laid_out.plan(9, 5)
    assert isinstance(last, Plan)
    assert last.pattern == Block(1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[d, x]", "table 1 of preset demo-b has 2 layers, the model has 6"),
        ("[d, x, dx, x, x, x]", "layer 2 in table 1 of preset demo-b has 2 letters, the model has 4 heads"),
    ],
)
def test_a_table_for_another_model_is_refused(table: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        schedule(PALETTE, f"schedule.tables=[{{layers: {table}}}]")


def test_a_share_of_few_steps_may_hold_none() -> None:
    laid_out = schedule(PALETTE, "schedule.rules=[{steps: 0.5-0.75, variant: full}]", steps=1)
    assert not dense_calls(laid_out)


# ---- Over steps


def over_steps(*sections: str, steps: int = 10, items: tuple[str, ...] = ()) -> AttentionSchedule:
    return schedule(f"schedule.over_steps=[{', '.join(sections)}]", *items, steps=steps)


def test_layers_that_are_carried_to_a_step_cost_nothing_there() -> None:
    laid_out = over_steps("{reference: [0, 0.3, 8], layers: 1-3}")
    density = laid_out.plan(0, 0).density
    assert laid_out.is_over_steps
    assert not schedule().is_over_steps
    for step in range(10):
        reference = step in (0, 3, 8)
        assert laid_out.density_of_step(step) == pytest.approx(density if reference else density / 2)
        assert laid_out.carried(step, 0) is None
        carried = laid_out.carried(step, 1)
        assert carried is not None
        assert (carried.is_reference, carried.is_kept, carried.slope) == (reference, step < 9, 0.9)
        assert laid_out.plan(step, 1) is laid_out.reference_plan(step, 1) is laid_out.plan(0, 0)
    assert laid_out.density == pytest.approx(density * (3 + 10) / 20)
    assert sum(laid_out.shares.values()) == pytest.approx((3 + 10) / 20)


def test_a_base_is_computed_at_every_step_that_needs_it() -> None:
    section = "{reference: [0, 4, 9], between: residual, base: {variant: b, radius: 0}}"
    laid_out = over_steps(section)
    own, base = laid_out.plan(0, 0), laid_out.plan(1, 0)
    assert laid_out.plans == (own, base)
    assert base.density < own.density
    assert laid_out.reference_plan(1, 0) is own
    expected = [own.density + base.density if step in (0, 4) else base.density for step in range(9)] + [own.density]
    assert [laid_out.density_of_step(step) for step in range(10)] == pytest.approx(expected)
    shares = laid_out.shares
    assert shares[own] == pytest.approx(3 / 10)  # pyright: ignore[reportArgumentType]
    assert shares[base] == pytest.approx(9 / 10)  # pyright: ignore[reportArgumentType]
    assert sum(plan.density * share for plan, share in shares.items()) == pytest.approx(laid_out.density)


def test_dense_steps_are_references_and_rules_hold_at_references() -> None:
    laid_out = over_steps(
        "{reference: [0, 5]}", items=("schedule.dense_steps=2", "schedule.rules=[{steps: 5, variant: x}]")
    )
    references = [step for step in range(10) if (one := laid_out.carried(step, 0)) and one.is_reference]
    assert references == [0, 1, 5]
    assert laid_out.density_of_step(1) == 1
    assert laid_out.density_of_step(5) == laid_out.plan(5, 0).density != laid_out.plan(6, 0).density


def test_wider_layers_stay_carried() -> None:
    laid_out = over_steps("{reference: [0, 5], between: residual, base: {variant: b, radius: 0}}")
    widths = np.zeros((10, 6), np.int64)
    widths[3:, 2] = 2
    wider = laid_out.widened(widths)
    assert wider.reference_plan(5, 2).density == 1
    assert wider.plan(6, 2) is laid_out.plan(6, 2)
    assert wider.density_of_step(6) == laid_out.density_of_step(6)
    assert wider.density_of_step(5) > laid_out.density_of_step(5)


@given(
    st.integers(1, 30),
    st.integers(0, 40),
    st.sampled_from(["{reference: 3}", "{reference: [0, 0.4]}", "{reference: {spaced: 5}}"]),
)
def test_whatever_the_run_what_is_carried_has_something_to_be_carried_from(
    steps: int, dense: int, section: str
) -> None:
    laid_out = over_steps(section, steps=steps, items=(f"schedule.dense_steps={min(dense, steps)}",))
    rules = [laid_out.carried(step, 0) for step in range(steps)]
    assert all(rule is not None for rule in rules)
    carried = [step for step, rule in enumerate(rules) if rule and not rule.is_reference]
    assert 0 not in carried
    assert not any(step < dense for step in carried)
    assert [rule.is_kept for rule in rules if rule] == [any(at > step for at in carried) for step in range(steps)]


def test_what_does_not_fit_the_run_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^over_steps of preset demo-b has step 10 for a reference, but the run has 10"):
        over_steps("{reference: [0, 10]}")
    with pytest.raises(BadInput, match=r"^over_steps of preset demo-b is for layers 6-8, but the run has 6 layers"):
        over_steps("{reference: 3, layers: 6-8}")
    with pytest.raises(BadInput, match=r"^over_steps 1 and 2 of preset demo-b both have layer 3: give each"):
        over_steps("{reference: 3, layers: 2-3}", "{reference: 2, layers: 0.5-1.0}")
