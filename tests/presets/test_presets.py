from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.errors import BadInput
from grat_cli.estimates.planning import architecture_for, schedule_for
from grat_cli.families import FAMILIES, family_of_presets, preset_variants
from grat_cli.generation.selection import select_preset
from grat_cli.models.catalogue import choose_model
from grat_cli.models.resolution import Resolution
from grat_cli.models.video_size import VideoSize
from grat_cli.presets import (
    BACKENDS,
    VARIANTS,
    Preset,
    load_preset,
    preset_from,
    preset_names,
    preset_yaml,
    resolve_preset,
)
from grat_cli.presets.attention import Attention
from grat_cli.presets.problems import nesting_sizes
from grat_cli.presets.schema import axes_by_model
from grat_cli.presets.yaml_source import YamlSource, read_text
from grat_kernels import Block, CrissCross, Far, Full, Grid, Pattern, SlidingTile, Union

MINIMAL = "name: mine\nmodel: flux\nattention: {variant: b, group: [16, 16]}\n"


def attention(fields: str) -> str:
    """A preset whose attention has these fields besides variant and group."""
    return MINIMAL.replace("]}", f"], {fields}}}")


def choosing(fields: str, block: str = "[8, 8]", *more_levels: str) -> str:
    """A preset that chooses, line by line: the levels on the seventh, the choice on the eighth."""
    levels = ", ".join([f"{{beyond: 0, block: {block}}}", *more_levels])
    far = f"  far:\n    levels: [{levels}]\n    choose: {{{fields}}}\n"
    return f"name: mine\nmodel: flux\nattention:\n  variant: b\n  group: [16, 16]\n{far}"


def read(text: str) -> Preset:
    return preset_from(read_text(text, "mine.yaml"))


# Every shipped file


OF_LARGE_PICTURES = {"demo-4x", "flux-2k", "flux-4k", "flux-8k"}
TUNED = {"demo-tuned", "demo-video-tuned"}


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_are_named_after_their_file_and_explain_themselves(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert preset.model == ("hunyuan" if "video" in name else name.split("-")[0])
    assert len(preset.description) > 40
    assert preset_from(read_text(preset_yaml(preset), "again")) == preset


@pytest.mark.parametrize("name", sorted(TUNED))
def test_tuned_presets_are_as_dense_as_their_evidence_says(name: str) -> None:
    preset = load_preset(name)
    evidence = preset.evidence
    assert evidence is not None
    layers, heads = len(preset.schedule.tables[0].layers), 3
    laid_out = AttentionSchedule(
        preset, Grid(evidence.tokens), evidence.text_tokens, preset.model == "demo", evidence.steps, layers, heads
    )
    # Evidence has four significant figures.
    assert laid_out.density == pytest.approx(evidence.density, rel=5e-4)
    assert evidence.target in preset.description


@pytest.mark.parametrize("name", sorted(set(preset_names()) - TUNED))
def test_shipped_presets_cost_what_they_say(name: str) -> None:
    preset = load_preset(name)
    models = family_of_presets(preset.model).models
    choice = next(model for model in models if model.presets == preset.model)
    found = re.findall(
        r"1/([\d.]+)(?: of the attention work)? at (\d+)x(\d+)(?: with (\d+) frames)?", preset.description
    )
    assert found or preset.attention.variant == "full"
    for claim, width, height, frames in found:
        resolution = Resolution(int(width), int(height))
        size = VideoSize(resolution.width, resolution.height, int(frames), 24) if frames else resolution
        laid_out = schedule_for(preset, architecture_for(choice), size)
        assert abs(laid_out.ideal_speedup - float(claim)) <= (0.05 if "." in claim else 0.5)


def test_every_family_has_every_variant() -> None:
    assert (
        set(preset_names())
        == {f"{family}-{variant}" for family, variants in preset_variants().items() for variant in variants}
        | OF_LARGE_PICTURES
        | TUNED
    )


def test_presets_have_the_axes_of_their_families() -> None:
    of_families = {name: family.axes for family in FAMILIES.values() for name in family.presets}
    assert axes_by_model() == of_families


def test_presets_of_the_paper_are_pure() -> None:
    for name in sorted(set(preset_names()) - TUNED):
        preset = load_preset(name)
        if name.endswith("-fast"):
            continue
        assert bool(preset.attention.far) == (name.endswith("-far") or name in OF_LARGE_PICTURES)
        assert preset.schedule.dense_steps == 0
        assert preset.schedule.rules == ()


@pytest.mark.parametrize("name", [name for name in preset_names() if name.endswith("-fast")])
def test_fast_presets_are_guarded_and_carried_and_say_that_they_are_not_fitted(name: str) -> None:
    preset = load_preset(name)
    assert preset.guard
    assert preset.chooses
    assert preset.schedule.over_steps
    assert "not fitted" in preset.description
    assert preset.evidence is None


def test_patterns() -> None:
    def patterns(family: str) -> dict[str, Pattern]:
        return {name: load_preset(f"{family}-{name}").attention.pattern() for name in preset_variants()[family]}

    assert patterns("flux") == {
        "full": Full(),
        "b": Block(1),
        "b-wide": Block(2),
        "x": CrissCross(1),
        "bx": Union(Block(1), CrissCross(1)),
        "far": Union(Block(1), Far([(1, (8, 8))])),
        "fast": Union(Block(0), Far([(0, (8, 8))], (32, 64, (4, 4)))),
        "sta": SlidingTile(3),
    }
    assert patterns("qwen") == {name: patterns("flux")[name] for name in ("full", "b", "x", "far", "fast")}
    assert patterns("hunyuan15") == {
        "full": Full(),
        "b": Block(1),
        "lines": CrissCross(2),
        "far": Union(Block(1), Far([(1, (4, 4, 4))])),
        "fast": Union(Block(0), Far([(0, (4, 4, 4))], (64, 128, (4, 2, 2)))),
    }
    assert patterns("hunyuan") == {
        "full": Full(),
        "b": Block(1),
        "planes": CrissCross(1),
        "lines": CrissCross(2),
        "bx": Union(Block(1), CrissCross(2)),
        "far": Union(Block(1), Far([(1, (4, 4, 4))])),
        "fast": Union(Block(0), Far([(0, (4, 4, 4))], (64, 128, (4, 2, 2)))),
        "sta": SlidingTile(3),
    }


def test_a_far_field_is_levels_alone_or_levels_and_a_choice_among_their_blocks() -> None:
    chosen = read(choosing("exact: 8, fine: 32, block: [2, 4]")).attention
    assert chosen.pattern() == Union(Block(1), Far([(0, (8, 8))], (8, 32, (2, 4))))
    assert chosen.cells == ((16, 16), (8, 8), (2, 4))
    assert chosen.summary == "b radius 1, groups 16x16, far 8x8 beyond 0, of which 8 exact and 32 by 2x4"
    assert chosen.changed({"radius": 0, "far": {"levels": [{"beyond": 0, "block": [8, 8]}]}}).summary == (
        "b radius 0, groups 16x16, far 8x8 beyond 0"
    )
    assert chosen.changed({"far": None}).far is None
    alone = read(attention("far: {levels: [{beyond: 1, block: [4, 4]}]}"))
    assert alone == read(attention("far: [{beyond: 1, block: [4, 4]}]"))
    assert read(choosing("exact: 0, fine: 4, block: [2, 4]")).attention.summary.endswith("of which 4 by 2x4")
    assert read(choosing("exact: 4, fine: 0, block: [2, 4]")).attention.summary.endswith("of which 4 exact")


def test_levels_alone_are_written_as_a_list() -> None:
    """As they always were: reports and outputs that were made before the choice say the same as those after it."""
    levels = [{"beyond": 1, "block": [8, 8]}]
    far = load_preset("flux-far")
    assert far.model_dump(mode="json")["attention"]["far"] == levels
    assert Preset.model_validate(far.model_dump()) == far
    assert "far:\n  - beyond: 1\n    block: [8, 8]\n" in preset_yaml(far)
    chosen = read(choosing("exact: 8, fine: 32, block: [2, 2]"))
    assert chosen.model_dump(mode="json")["attention"]["far"] == {
        "levels": [{"beyond": 0, "block": [8, 8]}],
        "choose": {"exact": 8, "fine": 32, "block": [2, 2], "by": "mass-and-spread"},
    }


# What is refused, and in which words


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "mine.yaml is empty"),
        ("- 1\n", "mine.yaml:1: expected a section with keys, not [1]"),
        (MINIMAL + "atention: 1\n", "mine.yaml:4: atention: unknown key: did you mean 'attention'?"),
        ("name: mine\nmodel: flux\n", "mine.yaml:1: attention: is missing"),
        (MINIMAL.replace("variant: b", "variant: c"), "mine.yaml:3: attention.variant: unknown value 'c'"),
        (MINIMAL.replace("flux", "flox"), "mine.yaml:2: model: unknown value 'flox': did you mean 'flux'?"),
        (MINIMAL.replace("[16, 16]", "16"), "mine.yaml:3: attention.group: expected a list of whole numbers from 1 up"),
        (MINIMAL.replace("[16, 16]", "[16, 0]"), "not [16, 0]"),
        (MINIMAL.replace("[16, 16]", "[16, 16.0]"), "not [16, 16.0]"),
        (MINIMAL.replace("[16, 16]", "[16, true]"), "not [16, True]"),
        (MINIMAL.replace("[16, 16]", "[16]"), "expected 2 sizes for flux, not [16]"),
        (MINIMAL.replace("[16, 16]", "[]"), "not []"),
        (attention("radius: -1"), "mine.yaml:3: attention.radius: expected 0 or more, not -1"),
        (attention("radius: true"), "attention.radius: expected a list of whole numbers"),
        (attention("radius: '1'"), "not '1'"),
        (attention("radius: [1, 2, 3]"), "has 3 numbers, the grid has 2 axes"),
        (attention("share: 1"), "attention.share: share has no meaning for variant b"),
        (MINIMAL.replace("variant: b", "variant: sta, window: 2"), "window must be an odd positive number"),
        (MINIMAL.replace("variant: b", "variant: x, share: 3"), "share 3 is more than the grid's 2 axes"),
        (attention("far: [{beyond: 1}]"), "far[0].block: is missing"),
        (attention("far: [{beyond: 1, block: [5, 5]}]"), "do not nest in groups of 16x16: use 4x4 or 8x8"),
        (attention("far: [{beyond: -1, block: [4, 4]}]"), "far[0].beyond: expected 0 or more, not -1"),
        (attention("far: 8"), "far: expected a list of levels, or a section with levels and choose, not 8"),
        (attention("far: {choose: {exact: 1, fine: 0, block: [4, 4]}}"), "attention.far.levels: is missing"),
        (attention("far: {levels: []}"), "attention.far.levels: expected 1 or more of them, not []"),
        (attention("far: {levels: [{beyond: 1}]}"), "attention.far.levels[0].block: is missing"),
        (choosing("exact: 8"), "mine.yaml:8: attention.far.choose.fine: is missing"),
        (choosing("exact: 8, fine: 32, block: [2, 2], by: mas"), "mine.yaml:8: attention.far.choose.by: unknown value"),
        (choosing("exact: -1, fine: 32, block: [2, 2]"), "attention.far.choose.exact: expected 0 or more, not -1"),
        (choosing("exact: 8.0, fine: 32, block: [2, 2]"), "far.choose.exact: expected a whole number, not 8.0"),
        (choosing(f"exact: 8, fine: {'9' * 120}, block: [2, 2]"), "far.choose.fine: expected 1,000,000 or less"),
        (choosing("exact: 0, fine: 0, block: [2, 2]"), "mine.yaml:8: attention.far.choose: exact and fine are both 0"),
        (choosing("exact: 8, fine: 32, block: [8, 8]"), "mine.yaml:8: attention.far.choose.block: means of 8x8 do not"),
        (choosing("exact: 8, fine: 32, block: [3, 3]"), "that are chosen from: use for example 4x4"),
        (choosing("exact: 8, fine: 32, block: [2]"), "means of 2 do not nest in the blocks of 8x8"),
        (choosing("exact: 8, fine: 32, block: [1, 1]", "[1, 1]"), "are chosen from: use larger blocks"),
        (choosing("exact: 8, fine: 32, block: [1, 1]", "[5, 5]"), "far.levels[0].block: blocks of 5x5 do not nest"),
        (choosing("exact: 8, fine: 32, block: [2, 2]", "[8, 8]", "{beyond: 2, block: [8, 8]}"), "not of 2: leave one"),
        (choosing("exact: 8, fine: 32, bloc: [2, 2]"), "far.choose.bloc: unknown key: did you mean 'block'?"),
        (MINIMAL + "sampling: {steps: 0}\n", "mine.yaml:4: sampling.steps: expected 1 or more, not 0"),
        (MINIMAL + "sampling: {steps: '20'}\n", "sampling.steps: expected a whole number, not '20'"),
        (MINIMAL + "sampling: {steps: true}\n", "sampling.steps: expected a whole number, not true"),
        (MINIMAL + "sampling: {steps: 20.0}\n", "sampling.steps: expected a whole number, not 20.0"),
        (MINIMAL + "sampling:\n  steps: 20\n  guidance: .inf\n", "mine.yaml:6: sampling.guidance: expected a finite"),
        (MINIMAL + "sampling: {guidance: -1}\n", "sampling.guidance: expected 0 or more"),
        (MINIMAL + "sampling: {shift: 0}\n", "sampling.shift: expected more than 0"),
        (MINIMAL + "sampling: [1]\n", "mine.yaml:4: sampling: expected a section with keys, not [1]"),
        (MINIMAL + "kernel: {backend: cuda}\n", "mine.yaml:4: kernel.backend: unknown value 'cuda'"),
        (MINIMAL + "schedule: {dense_steps: 1.5}\n", "dense_steps: expected a count of steps such as 3 or a fraction"),
        (MINIMAL + "schedule: {dense_steps: -1}\n", "schedule.dense_steps: expected a count"),
        (MINIMAL + "schedule: {rules: {variant: b}}\n", "schedule.rules: expected a list, not a section with keys"),
        (MINIMAL + "schedule:\n  rules:\n  - {layers: 0}\n  - {layers: 3-1}\n", "mine.yaml:7: schedule.rules[1]"),
        (MINIMAL + "schedule: {rules: [{steps: 0.5}]}\n", "schedule.rules[0].steps: expected an index"),
        (MINIMAL + "schedule: {rules: [{variant: x, radius: 2}]}\n", "rules[0].radius: radius has no meaning"),
        (MINIMAL + "schedule: {rules: [{group: [6, 6]}]}\n", "6x6 does not in 16x16: use 4x4 or 8x8"),
        (MINIMAL + "name: twice\n", "mine.yaml:4: 'name' is given twice"),
        (MINIMAL.replace("mine", "on"), "mine.yaml:1: YAML reads on as true: write true, or 'on' in quotes for text"),
        (MINIMAL + "description: no\n", "YAML reads no as false"),
        (MINIMAL + "schedule: {rules: [{steps: 1:30}]}\n", "YAML reads 1:30 as the number 90"),
        (MINIMAL + "sampling: {steps: 010}\n", "YAML reads 010 as the number 8"),
        (MINIMAL + "sampling: {guidance: 1e1}\n", "sampling.guidance: expected a number, not '1e1'"),
        (MINIMAL + "description: 2025-01-31\n", "YAML reads 2025-01-31 as a date"),
        (MINIMAL + "on: 1\n", "mine.yaml:4: YAML reads on as true"),
        (MINIMAL + "7: 1\n", "mine.yaml:4: keys must be text, not 7"),
        (MINIMAL + "sampling: &a {steps: 2}\nkernel: *a\n", "mine.yaml:4: aliases (*name) are not supported"),
        (MINIMAL + "<<: {model: demo}\n", "mine.yaml:4: merge keys"),
        (MINIMAL + "sampling: {steps: 2\n", "not valid YAML"),
        (MINIMAL + "description: !!python/object:os.system x\n", "mine.yaml:4: tags (!!python/object:os.system)"),
        ("[" * 20000, "nested too deeply"),
        *((MINIMAL + f"sampling:\n  steps: !!{tag} ''\n", f"mine.yaml:5: tags (!!{tag}) are not supported")
          for tag in ("int", "float", "bool", "timestamp", "null", "binary", "set", "omap")),
        (MINIMAL + "sampling: !!map {steps: 2}\nkernel: !!seq x\n", "mine.yaml:5: tags (!!seq) are not supported"),
        (MINIMAL.replace("[16, 16]", f"[{10**12}, 16]"), "expected 1,000,000 or less, not 1000000000000"),
        (MINIMAL.replace("[16, 16]", f"[16, {'9' * 120}]"), "attention.group: expected 1,000,000 or less, not 99999"),
        (MINIMAL.replace("[16, 16]", f"[16, {'9' * 5000}]"), "not valid YAML: Exceeds the limit"),
        (attention(f"radius: {'9' * 120}"), "attention.radius: expected 1,000,000 or less"),
        (attention(f"far: [{{beyond: {'9' * 120}, block: [4, 4]}}]"), "far[0].beyond: expected 1,000,000 or less"),
        (MINIMAL + f"sampling: {{steps: {'9' * 120}}}\n", "sampling.steps: expected 100,000 or less, not 9999"),
        (MINIMAL + f"sampling: {{guidance: {'9' * 120}}}\n", "sampling.guidance: expected 1,000,000 or less"),
        (MINIMAL + "highres: {growth: 1.0000001}\n", "highres.growth: expected 1.1 or more, not 1.0000001"),
        (MINIMAL + f"schedule: {{dense_steps: {'9' * 120}}}\n", "schedule.dense_steps: expected a count of steps"),
        (MINIMAL + "schedule:\n  rules:\n" + "  - {layers: 0}\n" * 1001, "rules: expected at most 1,000 entries"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_line_and_key(text: str, complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(text)
    assert complaint in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_sizes_that_would_nest_are_found_at_once_however_large() -> None:
    assert nesting_sizes((999_999, 7), (10**12, 10)) == "800000x5 or 1000000x10"


def values(value: Any) -> Iterator[tuple[str | int, ...]]:
    """The path of each value within plain data."""
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (key,)
        yield from ((key, *path) for path in values(below))


FULL = load_preset("demo-4x").model_dump(mode="json") | {
    "schedule": {"dense_steps": 1, "rules": [{"layers": "0-1", "group": [4, 4]}], "tables": [{"layers": ["aa"]}],
                 "palette": {"a": {"variant": "b", "far": [{"beyond": 1, "block": [2, 2]}]},
                             "b": {"variant": "b", "far": {"levels": [{"beyond": 0, "block": [4, 4]}],
                                   "choose": {"exact": 2, "fine": 4, "block": [2, 2], "by": "mass-and-spread"}}}}}
}  # fmt: skip


@settings(max_examples=150, deadline=2000)
@given(
    st.sampled_from(sorted(values(FULL), key=str)),
    st.one_of(
        st.sampled_from([10**12, 10**120, -(10**120), 2**63, 1e308, 1e-300, "9" * 120, [10**12, 16], [], {}, None]),
        st.recursive(
            st.integers() | st.floats() | st.text(max_size=9) | st.booleans(), lambda one: st.lists(one, max_size=3)
        ),
    ),
)
def test_whatever_a_value_is_a_preset_is_planned_or_bad_input_at_once(path: tuple[str | int, ...], value: Any) -> None:
    data: Any = deepcopy(FULL)
    section = data
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    with suppress(BadInput):
        preset = preset_from(YamlSource(data, "mine.yaml", yaml.compose("a: 1")))
        assert schedule_for(preset, architecture_for(choose_model("demo")), Resolution(256, 192)).density > 0


def test_files_that_never_end_are_not_read_to_their_end() -> None:
    with pytest.raises(BadInput, match="/dev/zero is longer than 1 MiB"):
        load_preset("/dev/zero")


def test_in_rules_absent_is_not_null() -> None:
    """A preset goes through YAML, reports and `--set` as data, and must come out the same."""
    rules = "schedule: {rules: [{layers: 0}, {layers: 1, far: null}]}\n"
    preset = read(attention("far: [{beyond: 1, block: [4, 4]}]") + rules)
    for copy in (
        preset,
        read(preset_yaml(preset)),
        Preset.model_validate(preset.model_dump(mode="json")),
        resolve_preset(preset, steps=9),
    ):
        assert [bool(changed.far) for changed in copy.attention_of_rules] == [True, False]


def test_of_several_mistakes_the_first_is_named_and_the_others_counted() -> None:
    text = "name: mine\nmodel: flux\nattention:\n  variant: b\n  group: [0, 1]\n  share: x\nsampling: {steps: 0}\n"
    with pytest.raises(BadInput, match=r"^mine\.yaml:5: attention\.group: .* \(and 2 more\)$"):
        read(text)


def test_unknown_names_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: fußball".encode("latin-1"))
    for name, complaint in {
        "flux-y": "did you mean flux-",
        "qqqq": "grat presets lists them",
        "": "there is no preset ''",
        str(tmp_path / "missing.yaml"): "no such file",
        str(tmp_path): "is a directory",
        str(tmp_path / "latin.yaml"): "is not UTF-8 text",
        "name\0.yaml": "null byte",
    }.items():
        with pytest.raises(BadInput, match=complaint):
            load_preset(name)


def test_files_load_from_any_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    assert load_preset(str(path)) == read(MINIMAL)
    assert load_preset(str(path)).attention.radius == 1  # the variant's default


@given(st.text(max_size=60), st.integers(0, 400))
def test_a_damaged_preset_still_loads_or_is_bad_input(noise: str, place: int) -> None:
    text = preset_yaml(load_preset("flux-far"))
    place %= len(text)
    with suppress(BadInput):
        read(text[:place] + noise + text[place:])


# Flags, --set, file, default: in this order


def test_precedence() -> None:
    file = read(MINIMAL + "sampling: {steps: 11, guidance: 1.5}\n")
    assert (file.sampling.steps, file.kernel.backend, file.attention.radius) == (11, "auto", 1)
    items = ["sampling.steps=12", "sampling.guidance=2", "kernel.backend=sdpa"]
    changed = resolve_preset(file, set_items=items, steps=13)
    assert (changed.sampling.steps, changed.sampling.guidance, changed.kernel.backend) == (13, 2.0, "sdpa")
    assert resolve_preset(file) == file
    assert resolve_preset(file, set_items=["sampling.steps=12", "sampling.steps=14"]).sampling.steps == 14


def test_a_new_variant_keeps_what_it_can_use_and_takes_its_own_defaults() -> None:
    wide = load_preset("flux-b-wide")
    assert resolve_preset(wide, variant="bx").attention == Attention(variant="bx", group=(16, 16), radius=2, share=1)
    assert resolve_preset(wide, variant="x").attention == Attention(variant="x", group=(16, 16), share=1)
    assert resolve_preset(wide, variant="sta").attention.window == 3
    far = load_preset("flux-far")
    assert resolve_preset(far, variant="full").attention.far is None
    assert resolve_preset(far, variant="x").attention.far == far.attention.far
    given_as_well = resolve_preset(far, set_items=["attention.variant=x", "attention.share=2", "attention.far=null"])
    assert given_as_well.attention == Attention(variant="x", group=(16, 16), share=2)


def test_keys_of_a_choice_are_set_one_by_one() -> None:
    chosen = read(choosing("exact: 8, fine: 32, block: [2, 2]"))
    wider = resolve_preset(
        chosen, set_items=["attention.far.choose.exact=12", "attention.far.levels=[{beyond: 1, block: [8, 8]}]"]
    )
    assert wider.attention.summary == "b radius 1, groups 16x16, far 8x8 beyond 1, of which 12 exact and 32 by 2x2"
    assert resolve_preset(chosen, set_items=["attention.far.choose=null"]).attention.summary.endswith("8x8 beyond 0")
    # A far field of levels alone takes a choice as well, whole or key by key.
    keys = {"exact": "4", "fine": "8", "block": "[4, 4]"}
    added = resolve_preset(
        load_preset("flux-far"), set_items=[f"attention.far.choose.{key}={value}" for key, value in keys.items()]
    )
    assert added.attention.pattern() == Union(Block(1), Far([(1, (8, 8))], (4, 8, (4, 4))))


def test_one_group_size_stands_for_all_axes() -> None:
    assert resolve_preset(load_preset("flux-b"), group=8).attention.group == (8, 8)
    assert resolve_preset(load_preset("flux-b"), group=(8, 32)).attention.group == (8, 32)


@pytest.mark.parametrize(
    ("flags", "items", "complaint"),
    [
        ({"variant": "x", "radius": 2}, [], "--radius 2: radius has no meaning for variant x"),
        ({"variant": "x"}, ["attention.radius=2"], "--set attention.radius=2: radius has no meaning"),
        ({"group": 0}, [], "--group 0: expected a list of whole numbers from 1 up"),
        ({"group": (4, 4, 4)}, [], "--group 4x4x4: expected one size or 2, such as 16x16"),
        ({"group": 4}, [], "preset flux-far with --group 4: attention.far[0].block: blocks of 8x8 do not nest"),
        ({"steps": 0}, [], "--steps 0: expected 1 or more, not 0"),
        ({"backend": "tritn"}, [], "--backend tritn: unknown value 'tritn': did you mean 'triton'?"),
        ({}, ["attention.radus=2"], "--set attention.radus=2: unknown key: did you mean 'radius'?"),
        ({}, ["atention.radius=2"], "--set atention.radius=2: unknown key: did you mean 'attention'?"),
        ({}, ["attention.radius=on"], "--set attention.radius=on: YAML reads on as true"),
        ({}, ["attention.radius"], "--set attention.radius: expected section.key=value"),
        ({}, ["attention..radius=1"], "expected section.key=value"),
        ({}, ["attention.radius="], "the value is missing"),
        ({}, ["attention.group.0=3"], "group has no keys of its own: set it whole"),
        ({}, ["attention.radius=[1"], "--set attention.radius=[1: not valid YAML"),
        ({}, ["sampling=3"], "--set sampling=3: expected a section with keys"),
        ({}, ["attention.far=[{beyond: 1, block: [3, 3]}]"], "do not nest in groups of 16x16: use 2x2 or 4x4"),
        ({}, ["attention.far.choose.exact=4"], "exact=4: attention.far.choose.fine: is missing"),
        ({}, ["attention.far.choose={exact: 4, fine: 8, block: [3, 3]}"], "means of 3x3 do not nest in the blocks of"),
        ({}, ["attention.far={choose: {exact: 4, fine: 8, block: [4, 4]}}"], "block: [4, 4]}}: is missing"),
        ({}, ["attention.far=[{beyond: 2, block: [4, 4]}, {beyond: 1, block: [8, 8]}]"], "ever farther out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_blamed_on_the_option(flags: dict[str, Any], items: list[str], complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        resolve_preset(load_preset("flux-far"), set_items=items, **flags)
    assert complaint in str(caught.value)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_set_item_applies_or_is_bad_input(key: str, value: str) -> None:
    base = load_preset("flux-b")
    for item in (f"{key}={value}", f"attention.{key}={value}", f"attention.radius={value}", f"schedule.rules={value}"):
        with suppress(BadInput):
            resolve_preset(base, set_items=[item])


# Any valid preset survives YAML and plans

sizes = st.sampled_from([(4, 4), (8, 8), (8, 4), (16, 16)])
far_levels = st.lists(st.sampled_from([(1, 1), (2, 2), (4, 4)]), min_size=1, max_size=2).map(
    lambda blocks: [{"beyond": beyond, "block": list(block)} for beyond, block in enumerate(blocks, start=1)]
)
far_fields = far_levels | st.fixed_dictionaries(
    {
        "levels": st.just([{"beyond": 0, "block": [4, 4]}]),
        "choose": st.fixed_dictionaries(
            {"exact": st.integers(0, 12), "fine": st.integers(1, 70), "block": st.sampled_from([[2, 2], [1, 4]])}
        ),
    }
)
attentions = st.one_of(
    st.fixed_dictionaries({"variant": st.just("full"), "group": sizes}),
    st.fixed_dictionaries(
        {"variant": st.just("b"), "group": sizes}, optional={"radius": st.integers(0, 3), "far": far_fields}
    ),
    st.fixed_dictionaries({"variant": st.just("x"), "group": sizes}, optional={"share": st.integers(1, 2)}),
    st.fixed_dictionaries({"variant": st.just("sta"), "group": sizes}, optional={"window": st.sampled_from([1, 3, 5])}),
)
rules = st.fixed_dictionaries(
    {},
    optional={"steps": st.sampled_from([0, "0-1", "0.0-0.5"]), "layers": st.sampled_from(["1-2", 0]), "far": st.none()},
)
presets = st.fixed_dictionaries(
    {"name": st.sampled_from(["mine", "on", "7", "1e3"]), "model": st.just("demo"), "attention": attentions},
    optional={
        "description": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40),
        "schedule": st.fixed_dictionaries(
            {}, optional={"dense_steps": st.integers(0, 3) | st.floats(0, 1), "rules": st.lists(rules, max_size=2)}
        ),
        "kernel": st.fixed_dictionaries({"backend": st.sampled_from(BACKENDS)}),
        "sampling": st.fixed_dictionaries({"steps": st.integers(3, 60)}, optional={"guidance": st.floats(0, 20)}),
    },
)  # fmt: skip


@settings(max_examples=40)
@given(presets)
def test_valid_presets_survive_yaml_and_can_be_planned(data: dict[str, Any]) -> None:
    preset = Preset.model_validate(
        {**data, "attention": {**data["attention"], "group": list(data["attention"]["group"])}}
    )
    assert read(preset_yaml(preset)) == preset
    assert Preset.model_validate(preset.model_dump(mode="json")) == preset
    laid_out = schedule_for(preset, architecture_for(choose_model("demo")), Resolution(256, 192))
    # Choosing costs something even where all that is chosen from is attended anyway.
    assert 0 < laid_out.density <= (1.1 if preset.chooses else 1)


# Selection


def test_the_recommended_preset_and_the_variants_by_name() -> None:
    flux, demo = choose_model("flux-dev"), choose_model("demo")
    assert select_preset(flux).name == "flux-far"
    assert select_preset(demo).name == "demo-far"
    assert {select_preset(demo, variant=name).name for name in preset_variants()["demo"]} == {
        f"demo-{name}" for name in preset_variants()["demo"]
    }
    assert select_preset(flux, preset="flux-b-wide", variant="bx", radius="1x3").attention.radius == (1, 3)
    assert [select_preset(flux, preset="flux-b", variant=variant).attention.variant for variant in VARIANTS] == list(
        VARIANTS
    )


def test_presets_of_videos_by_variant() -> None:
    hunyuan = choose_model("hunyuan", "video")
    assert select_preset(hunyuan).name == "hunyuan-far"
    assert {select_preset(hunyuan, variant=name).name for name in preset_variants()["hunyuan"]} == {
        f"hunyuan-{name}" for name in preset_variants()["hunyuan"]
    }
    assert select_preset(hunyuan, variant="b", radius="1x2x2").attention.pattern() == Block((1, 2, 2))
    assert select_preset(hunyuan, variant="b", group="2x4x4").attention.group == (2, 4, 4)
    with pytest.raises(BadInput, match="--radius 1x2"):
        select_preset(hunyuan, variant="b", radius="1x2")
    # x means what its authors published, or lines where a share of 2 asks for them.
    assert select_preset(hunyuan, variant="x").name == "hunyuan-planes"
    assert select_preset(hunyuan, variant="x", share=1).name == "hunyuan-planes"
    assert select_preset(hunyuan, variant="x", share=2) == select_preset(hunyuan, variant="lines")
    with pytest.raises(BadInput, match="there is no variant 'plane': did you mean 'planes'"):
        select_preset(hunyuan, variant="plane")
    with pytest.raises(BadInput, match="there is no variant 'lines'"):
        select_preset(choose_model("flux-dev"), variant="lines")
    with pytest.raises(BadInput, match="--variant lines is short for the preset hunyuan-lines"):
        select_preset(hunyuan, preset="hunyuan-b", variant="lines")


def test_models_of_a_family_share_presets_but_not_sampling() -> None:
    hunyuan, demo = (select_preset(choose_model(name, "video")) for name in ("hunyuan", "demo"))
    assert hunyuan.attention == demo.attention
    assert (hunyuan.sampling.steps, hunyuan.sampling.guidance, hunyuan.sampling.shift) == (50, 6.0, 7.0)
    assert (demo.sampling.steps, demo.sampling.shift) == (20, None)


def test_shipped_presets_take_steps_and_guidance_of_the_model_and_files_keep_theirs(tmp_path: Path) -> None:
    schnell = choose_model("flux-schnell")
    assert select_preset(schnell).sampling.steps == schnell.default_steps
    assert select_preset(schnell, steps=9).sampling.steps == 9
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL + "sampling: {steps: 6}\n")
    assert select_preset(schnell, preset=str(path)).sampling.steps == 6


def test_presets_of_other_axes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.yaml"
    path.write_text("name: lines\nmodel: hunyuan\nattention: {variant: x, share: 2, group: [4, 8, 8]}\n")
    assert load_preset(str(path)).attention.pattern() == CrissCross(2)
    with pytest.raises(BadInput, match="preset lines is for hunyuan models"):
        select_preset(choose_model("flux-dev"), preset=str(path))
    with pytest.raises(BadInput, match="preset flux-b is for flux models"):
        select_preset(choose_model("hunyuan", "video"), preset="flux-b")


TABLES = MINIMAL + "schedule:\n  palette: {a: {variant: full}, b: {radius: 0}}\n  tables:\n  - layers: [a, ab]\n"


def test_palettes_and_tables_are_read_and_written(tmp_path: Path) -> None:
    preset = read(TABLES)
    assert preset.attention_of_palette["a"].variant == "full"
    assert preset.attention_of_palette["b"].radius == 0
    assert preset.schedule.tables[0].layers == ("a", "ab")
    path = tmp_path / "again.yaml"
    path.write_text(preset_yaml(preset), encoding="utf-8")
    assert load_preset(str(path)) == preset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLES.replace("[a, ab]", "[a, ac]"), "mine.yaml:7: schedule.tables[0].layers[1]: c is none of the palette's"),
        (TABLES.replace("[a, ab]", "[]"), "schedule.tables[0].layers"),
        (TABLES.replace("[a, ab]", "[a, a1]"), "schedule.tables[0].layers[1]"),
        (TABLES.replace("b: {radius: 0}", "bb: {radius: 0}"), "schedule.palette"),
        (TABLES.replace("b: {radius: 0}", "b: {group: [3, 3]}"), "all groups and blocks must nest"),
        (TABLES.replace("b: {radius: 0}", "b: {radius: -1}"), "schedule.palette.b"),
    ],
)
def test_a_palette_that_does_not_fit_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        read(text)
    assert message in str(refusal.value)
