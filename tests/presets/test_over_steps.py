"""What a preset says of attention over steps: which steps are references, with which slope, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.errors import BadInput
from grat_cli.presets import OverSteps, Preset, load_preset, preset_from, preset_yaml, ranges, resolve_preset
from grat_cli.presets.yaml_source import read_text

FRACTIONS = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)
STEPS = st.integers(1, 60)


def section(reference: Any, **others: Any) -> OverSteps:
    return OverSteps.model_validate({"reference": reference, **others})


def with_section(value: Any) -> Preset:
    base = load_preset("demo-far")
    return Preset.model_validate({**base.model_dump(), "schedule": {"over_steps": value}})


def test_fractions_are_steps_of_the_run_whatever_binary_makes_of_them() -> None:
    assert section([0, 0.1, 0.25, 0.45, 0.65, 0.85]).reference_steps(20) == (0, 2, 5, 9, 13, 17)
    assert section([0.65]).reference_steps(20) == (0, 13)  # 0.65 * 20 > 13 in binary
    assert section(3).reference_steps(8) == (0, 3, 6)
    assert section(30).reference_steps(8) == (0,)
    assert section({"spaced": 4}).reference_steps(8) == (0, 2, 4, 6)
    # Sigmas that fall slowly at first.
    assert section({"spaced": 3}).reference_steps(6, [1.0, 0.98, 0.95, 0.9, 0.7, 0.3, 0.0]) == (0, 4, 5)
    with pytest.raises(ValueError, match="has step 9 for a reference, but the run has 9 steps, counted from 0"):
        section([0, 9]).reference_steps(9)


@given(st.lists(FRACTIONS, min_size=1, max_size=9), STEPS)
def test_references_by_fractions_begin_where_ranges_of_fractions_do(fractions: list[float], steps: int) -> None:
    found = section(fractions).reference_steps(steps)
    begins = [ranges.covered(f"{fraction:.3f}-1.0", steps) for fraction in fractions]
    assert found == tuple(sorted({0, *(covered.start for covered in begins if covered)}))


@given(st.integers(1, 70), st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_spaced_references_are_as_many_as_asked_in_order_and_near_what_is_wanted(count: int, falls: list[int]) -> None:
    sigmas = [float(sum(falls[step:])) for step in range(len(falls) + 1)]
    found = section({"spaced": count}).reference_steps(len(falls), sigmas)
    assert found[0] == 0
    assert len(found) == min(count, len(falls))
    assert all(one < other < len(falls) for one, other in pairwise(found))
    for number, step in enumerate(found):
        wanted = sigmas[0] * (1 - number / len(found))
        # Nearest of all that are neither taken, nor have to be left for the others.
        free = range(found[number - 1] + 1 if number else 0, len(falls) - len(found) + number + 1)
        assert abs(sigmas[step] - wanted) == pytest.approx(min(abs(sigmas[other] - wanted) for other in free))


def test_slopes_are_of_stretches_and_later_ones_win() -> None:
    stretches = [{"steps": "0-0.25", "slope": 0.4}, {"steps": "3-8", "slope": 1}]
    found = section(3, slope=stretches)
    assert [found.slope_at(step, 10) for step in range(10)] == [0.4] * 3 + [1] * 6 + [0.9]
    assert section(3).slope_at(5, 10) == 0.9
    assert section(3, slope=0).slope_at(5, 10) == 0
    assert section(3, between="reuse").slope_at(5, 10) == 0


SECTIONS = st.fixed_dictionaries(
    {
        "reference": st.integers(1, 9)
        | st.fixed_dictionaries({"spaced": st.integers(1, 9)})
        | st.lists(FRACTIONS | st.integers(0, 9), min_size=1, max_size=4)
    },
    optional={
        "slope": st.sampled_from([0.5, 1, [{"steps": "0.0-0.5", "slope": 0.2}], [{"slope": 2.0}]]),
        "keep": st.sampled_from(["device", "fp8", "host"]),
    },
)


@given(st.lists(SECTIONS, max_size=3), st.booleans())
def test_sections_survive_yaml_and_copies(sections: list[dict[str, Any]], has_base: bool) -> None:
    for number, one in enumerate(sections):
        one["layers"] = f"{2 * number}-{2 * number + 1}"
    if has_base and sections:
        sections[-1] |= {"between": "residual", "base": {"radius": 0, "far": None}}
    preset = with_section(sections)
    assert len(preset.schedule.over_steps) == len(sections)
    assert preset_from(read_text(preset_yaml(preset), "x")) == preset
    assert Preset.model_validate(preset.model_dump()) == preset
    assert preset.model_copy(update={"description": "x"}).schedule == preset.schedule
    assert [base is not None for base in preset.bases_of_over_steps] == [
        one.between == "residual" for one in preset.schedule.over_steps
    ]


def test_one_section_stands_for_a_list_and_can_be_set_key_by_key() -> None:
    one = with_section({"reference": 3})
    assert one == with_section([{"reference": 3}])
    assert "over_steps: {reference: 3," in preset_yaml(one)
    assert with_section(None).schedule.over_steps == ()
    items = ["schedule.over_steps.reference=[0, 0.5]", "schedule.over_steps.between=reuse"]
    (changed,) = resolve_preset(load_preset("demo-far"), set_items=items).schedule.over_steps
    assert (changed.reference, changed.between) == ((0, 0.5), "reuse")


def test_a_base_joins_the_token_order() -> None:
    base = {"group": [8, 8], "far": [{"beyond": 0, "block": [2, 2]}]}
    preset = with_section({"reference": 3, "between": "residual", "base": base})
    assert preset.cells == ((8, 8), (4, 4), (2, 2))
    assert preset.attentions[-1] == preset.bases_of_over_steps[0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{}", "over_steps.reference: is missing"),
        ("{reference: 0}", r"over_steps.reference: every n-th step is a reference: expected n from 1 to 100,000"),
        ("{reference: []}", r"over_steps.reference: expected steps such as \[0, 3, 8\]"),
        ("{reference: [0, 1.0]}", "over_steps.reference: expected steps from 0 to 99,999 or fractions from 0 to below"),
        ("{reference: [true]}", "over_steps.reference: expected steps"),
        ("{reference: [-1]}", "over_steps.reference: expected steps"),
        ("{reference: 0.5}", "over_steps.reference: expected steps such as"),
        ("{reference: {spaced: 0}}", "over_steps.reference.spaced: expected 1 or more"),
        ("{reference: {space: 3}}", "over_steps.reference.space: unknown key: did you mean 'spaced'"),
        ("{reference: 3, slop: 1}", "over_steps.slop: unknown key: did you mean 'slope'"),
        ("{reference: 3, slope: 2.5}", "over_steps.slope: expected a number from 0 to 2, or a list such as"),
        ("{reference: 3, slope: [{steps: 0-3}]}", r"over_steps.slope\[0\].slope: is missing"),
        ("{reference: 3, slope: [{steps: 3-1, slope: 1}]}", r"over_steps.slope\[0\].steps: the range '3-1' runs back"),
        ("{reference: 3, between: reuse, slope: 0.9}", "over_steps.slope: has no meaning where outputs are reused"),
        ("{reference: 3, between: residul}", "over_steps.between: unknown value 'residul': did you mean 'residual'"),
        ("{reference: 3, between: residual}", "over_steps.base: is missing: residual needs the attention"),
        ("{reference: 3, base: {radius: 0}}", "over_steps.base: has no meaning for extrapolate: leave it out"),
        ("{reference: 3, between: residual, base: {window: 2}}", "over_steps.base.window: window has no meaning"),
        ("{reference: 3, keep: disk}", "over_steps.keep: unknown value 'disk'"),
        ("{reference: 3, layers: 4-2}", "over_steps.layers: the range '4-2' runs backwards"),
        ("[{reference: 3}, {reference: 2}]", r"over_steps\[1\].layers: shares layers with entry 0 of the list"),
        ("[{reference: 3, layers: 0-4}, {reference: 2, layers: 4}]", r"over_steps\[1\].layers: shares layers"),
        ("[{reference: 3, layers: 0-0.6}, {reference: 2, layers: 0.5-1.0}]", r"over_steps\[1\].layers: shares layers"),
        ("7", "over_steps: expected a section with keys, not 7"),
    ],
)
def test_mistakes_are_named_with_line_and_key(value: str, words: str) -> None:
    text = f"name: x\nmodel: demo\nattention: {{variant: b, group: [4, 4]}}\nschedule:\n  over_steps: {value}\n"
    with pytest.raises(BadInput, match=rf"^x\.yaml:5: schedule\.{words}"):
        preset_from(read_text(text, "x.yaml"))


def test_a_base_that_does_not_nest_and_a_cache_of_attentions_are_refused() -> None:
    text = "name: x\nmodel: demo\nattention: {variant: b, group: [4, 4]}\n"
    base = "schedule: {over_steps: {reference: 3, between: residual, base: {group: [6, 6]}}}\n"
    with pytest.raises(BadInput, match=r"^x\.yaml:4: schedule: .* all groups and blocks must nest"):
        preset_from(read_text(text + base, "x.yaml"))
    cached = "schedule: {over_steps: {reference: 3}}\ncache: taylor\n"
    with pytest.raises(BadInput, match=r"^x\.yaml:5: cache: taylor and schedule.over_steps take the same place"):
        preset_from(read_text(text + cached, "x.yaml"))
