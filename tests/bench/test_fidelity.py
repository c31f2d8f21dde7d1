"""Recall and output error of a benchmark's rows, and presets among them: parts of a schedule add up to the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import grat, refusal

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.bench import fidelity, whole_runs
from grat_cli.bench.fidelity import nesting_passes
from grat_cli.bench.inside_models import Host
from grat_cli.bench.measure import Unwatched
from grat_cli.bench.request import LEVELS
from grat_cli.bench.results import BenchResult, Fidelity, Row
from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import load_pipeline
from grat_cli.errors import BadInput, NumericalFailure
from grat_cli.families import FAMILIES
from grat_cli.fidelity.prompts import built_in_prompts
from grat_cli.fidelity.variants import Request, parse_variants, variant_for
from grat_cli.models.catalogue import choose_model
from grat_cli.presets import Attention, Preset, load_preset
from grat_cli.presets.ranges import spread
from grat_kernels import Backend, Grid

GRID, STEPS = Grid((10, 12)), 3
NEAR = {"variant": "b", "group": [4, 4], "radius": 0}


def preset(name: str, attention: dict[str, Any], *rules: dict[str, Any], **schedule: Any) -> Preset:
    whole = {"name": name, "model": "demo", "attention": attention, "schedule": {"rules": list(rules), **schedule}}
    return Preset.model_validate(whole)


def request(of: Preset) -> Request:
    return Request(of.name, "preset", {}, of)


FULL = {"variant": "full", "group": [4, 4]}
# The same attention in parts of a run: together they are all of it.
PROMPTS = built_in_prompts("image")
PARTS = (
    preset("first-step", FULL, {"steps": "0", **NEAR}),
    preset("some-heads", FULL, {"steps": "1-2", "heads": "0", **NEAR}),
    preset("others", NEAR, {"heads": "0", "variant": "full"}, dense_steps=1),
)
FAR = {**NEAR, "far": [{"beyond": 0, "block": [2, 2]}]}


def run(*requests: Request, **changes: Any) -> BenchResult:
    given: dict[str, Any] = {
        "model": choose_model("demo"),
        "compare": requests,
        "prompts": PROMPTS[:2],
        "width": GRID.shape[1] * 8,
        "height": GRID.shape[0] * 8,
        "steps": STEPS,
        "device": "cpu",
        "dtype": "float32",
    }
    asked = whole_runs.RunSettings(**(given | changes))
    result, _ = whole_runs.compare_runs(asked, changes.get("progress") or Unwatched())
    return result


def rows(result: BenchResult) -> dict[str, Row]:
    return {row.name: row for row in result.cases[0].rows}


def of(result: BenchResult, name: str) -> Fidelity:
    found = rows(result)[name].fidelity
    assert found is not None
    return found


@pytest.fixture(scope="module")
def result() -> BenchResult:
    names = "grat-b:group=4:radius=0,full-list,clear:window=3,grat-b:group=5"
    presets = (preset("whole", NEAR), *PARTS, preset("far", FAR), preset("dense", NEAR, dense_steps=1.0))
    return run(*parse_variants(names), *map(request, presets))


def test_parts_of_a_schedule_lose_together_what_the_whole_does(result: BenchResult) -> None:
    whole, parts = of(result, "whole"), [of(result, part.name) for part in PARTS]
    assert 0.1 < whole.recall < 0.9
    assert sum(1 - part.recall for part in parts) == pytest.approx(1 - whole.recall)
    assert sum(part.output_error**2 for part in parts) == pytest.approx(whole.output_error**2)
    assert all(part.recall > whole.recall for part in parts)


def test_a_preset_is_the_variant_that_means_the_same(result: BenchResult) -> None:
    variant, whole = rows(result)["grat-b:group=4:radius=0"], rows(result)["whole"]
    assert (variant.fidelity, variant.quality, variant.density) == (whole.fidelity, whole.quality, whole.density)
    assert whole.preset == preset("whole", NEAR).model_dump(mode="json")
    assert variant.preset is None


def test_means_give_back_what_recall_does_not_count(result: BenchResult) -> None:
    whole, far = of(result, "whole"), of(result, "far")
    assert far.recall == pytest.approx(whole.recall)
    assert far.output_error < 0.7 * whole.output_error


def test_full_attention_keeps_everything_and_what_cannot_be_judged_says_why(result: BenchResult) -> None:
    found = rows(result)
    for name in ("full-list", "dense"):
        assert (of(result, name).recall, of(result, name).output_error) == (1, 0)
    assert (found["full"].fidelity, found[whole_runs.NOISE_FLOOR].fidelity, found["clear:window=3"].fidelity) == (
        None,
        None,
        None,
    )
    assert any(note.startswith("No recall of clear:window=3: ") for note in result.notes)
    assert found["dense"].density == 1


def test_the_record_says_what_was_looked_at(result: BenchResult) -> None:
    looked = result.settings["recall"]
    # Groups of 5 do not nest with those of 4: two passes of two prompts.
    assert (looked["prompts"], looked["steps"], looked["runs"]) == (2, [0, 1, 2], 4)
    assert of(result, "grat-b:group=5").recall_interval is not None
    assert BenchResult.from_json(json.dumps(result.as_dict(), allow_nan=False)).cases == result.cases
    note = next(note for note in result.notes if "Of a preset" in note)
    assert "sampling is the same for all rows" in note


def test_density_of_a_preset_is_that_of_its_schedule(result: BenchResult) -> None:
    text = result.cases[0].text_len
    for part in PARTS:
        schedule = AttentionSchedule(part, GRID, text, True, STEPS, 5, 3)
        assert rows(result)[part.name].density == pytest.approx(schedule.density)


def test_only_the_first_prompts_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "PROMPTS", 1)
    found = run(request(preset("whole", NEAR)), prompts=PROMPTS[:2], seeds_per_prompt=2, steps=1)
    assert (found.settings["recall"]["prompts"], found.settings["recall"]["runs"]) == (1, 1)
    assert of(found, "whole").recall_interval is None


def test_recall_can_be_left_out_and_its_failure_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise NumericalFailure("latents turned NaN")

    monkeypatch.setattr(whole_runs, "measure_fidelity", fail)
    usual = {"prompts": PROMPTS[:1], "steps": 1}
    left_out = run(request(preset("whole", NEAR)), recall=False, **usual)
    assert "recall" not in left_out.settings
    failed = run(request(preset("whole", NEAR)), **usual)
    assert rows(failed)["whole"].quality is not None
    assert rows(failed)["whole"].fidelity is None
    assert "No recall of whole: latents turned NaN." in failed.notes


def test_steps_are_spread_and_sizes_that_do_not_nest_apart() -> None:
    assert spread(20, 4) == (2, 7, 12, 17)
    assert spread(3, 4) == (0, 1, 2)
    assert spread(1, 4) == (0,)
    sizes = [(4, 4), (6, 6), (2, 2), (12, 12), (8, 8)]
    passes = nesting_passes([Attention(variant="b", group=size) for size in sizes])
    assert [[one.group for one in taken] for taken in passes] == [[(4, 4), (2, 2), (12, 12)], [(6, 6)], [(8, 8)]]


def test_a_trial_runs_every_plan_of_a_preset_once() -> None:
    pipe: Any = load_pipeline(DEMO_FLUX.path)
    host = Host(pipe.transformer, FAMILIES["flux"], 24, Backend.SDPA, torch.device("cpu"), torch.float32, steps=10)
    chosen = preset("p", NEAR, {"steps": "0.4-0.7", "layers": "2", "variant": "x"}, dense_steps=2)
    inside = host.inside(variant_for(request(chosen), GRID))
    assert inside.trial_steps == (0, 2, 4)
    assert inside.density == host.schedule(chosen, GRID).density


# What is typed


def test_presets_by_name_and_file_are_rows_of_whole_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("name: mine\nmodel: demo\nattention: {variant: b, group: [4, 4]}\n")
    names = ["demo-far", "own.yaml", "./own.yaml"]
    found = parse_variants(",".join(("full", *names)), "image")
    assert [one.name for one in found] == ["full", *names]
    assert [one.preset.name for one in found if one.preset] == ["demo-far", "mine", "mine"]
    variant = variant_for(found[1], GRID)
    assert (variant.preset, variant.description) == (
        load_preset("demo-far"),
        "preset demo-far: b radius 1, groups 4x4, far 4x4 beyond 1",
    )
    Path("bad.yaml").write_text("name: mine\nmodel: demo\nattention: {variant: q, group: [4, 4]}\n")
    for level in ("image", "video"):
        assert "bad.yaml:3: attention.variant" in refusal("bench", "--level", level, "--compare", "bad.yaml")
    with pytest.raises(BadInput, match=r"nowhere\.yaml"):
        parse_variants("nowhere.yaml")


@pytest.mark.parametrize("level", [level for level in LEVELS if level not in ("image", "video", "highres")])
def test_presets_are_refused_where_there_are_no_steps(level: str) -> None:
    assert "presets are for --level image and video" in refusal("bench", "--level", level, "--compare", "demo-far")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--level", "image", "--compare", "demo-fra"), "did you mean 'demo-far'? (choose from full,"),
        (("--level", "image", "--model", "demo", "--compare", "hunyuan-b"), "hunyuan-b is for hunyuan models"),
        (("--level", "image", "--compare", "grat-heads"), "rules of a preset are for some heads"),
        (("--no-recall",), "--no-recall says nothing to --level attention: it is for image and video"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: str) -> None:
    assert words in refusal("bench", *arguments)


def test_the_command_says_whether_to_measure_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[whole_runs.RunSettings] = []

    def stand_in(settings: whole_runs.RunSettings, progress: Any) -> Any:
        asked.append(settings)
        raise BadInput("enough")

    monkeypatch.setattr(whole_runs, "compare_runs", stand_in)
    image = ("bench", "--level", "image", "--model", "demo", "--compare", "demo-far")
    assert grat(*image).code == grat(*image, "--no-recall").code == 2
    assert [settings.recall for settings in asked] == [True, False]
    assert [item.preset for item in asked[0].compare if isinstance(item, Request)] == [load_preset("demo-far")]
