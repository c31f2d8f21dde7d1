"""The guard: when layers go wider, by what, and that all else stays as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny_flux
import tiny_hunyuan
import torch
from flux_runs import (
    GRID,
    GUIDED,
    HEIGHT,
    RELATIVE_OF_PIPELINES,
    WIDTH,
    NoHostReads,
    call,
    preset,
    raster_mask,
    relative_difference,
)
from small_pictures import generate, generate_staged, sparse_stages
from small_pictures import preset as demo_preset

import grat_cli
from grat_cli.attention import guard as guard_module
from grat_cli.attention import online_recall
from grat_cli.attention.guard import DELAY_STEPS, ROWS, Measured, RecallGuard
from grat_cli.attention.layer import AttentionInputs, CallObserver
from grat_cli.attention.recall import row_statistics, sample_positions
from grat_cli.attention.schedule import AttentionSchedule, Width, wider
from grat_cli.console import run_tables
from grat_cli.errors import BadInput
from grat_cli.generation import report
from grat_cli.generation.timing import StepRecorder
from grat_cli.presets import Attention, Preset, load_preset, resolve_preset
from grat_kernels import Block, CrissCross, Full, Grid, Grouping, HeadPlan, Pattern, Plan, Union, build_plan

LAYERS, STEPS = tiny_flux.LAYERS, 6
NARROW: dict[str, Any] = {"radius": 0}


def guarded(guard: float | None, chosen: Preset, steps: int = STEPS, observer: Any = None, **arguments: Any) -> Any:
    """Latents of the tiny Flux under a guard, and the installation."""
    pipe = tiny_flux.pipeline()
    with grat_cli.install(pipe, chosen, height=HEIGHT, width=WIDTH, guard=guard, observer=observer) as installation:
        return call(pipe, num_inference_steps=steps, **arguments), installation


class Script:
    """Stands in for the measurement: what layers keep by step and call, 1 where nothing is said."""

    def __init__(self, kept: Mapping[tuple[int, int], float | tuple[float, float]]) -> None:
        self.kept = kept
        self.judged: dict[tuple[int, int], Pattern] = {}
        self.step, self.calls = 0, 0

    def __call__(self, inputs: AttentionInputs, rows: Any) -> torch.Tensor:
        self.judged[self.step, inputs.layer] = inputs.plan.classes[0].pattern
        kept = self.kept.get((self.step, inputs.layer), 1.0)
        kept = kept[self.calls] if isinstance(kept, tuple) else kept
        return torch.tensor([kept, kept / 2, float("nan")])


def driven(
    script: Script,
    schedule: AttentionSchedule,
    monkeypatch: pytest.MonkeyPatch,
    guard: RecallGuard | None = None,
    calls: int = 1,
    steps: Sequence[int] | None = None,
) -> tuple[RecallGuard, list[list[Plan | HeadPlan]]]:
    """Runs the steps of a schedule as an adapter does, without a model; the plans of each step."""
    monkeypatch.setattr(online_recall, "measure", script)
    monkeypatch.setattr(online_recall, "sample_rows", lambda *_: None)
    guard = guard or RecallGuard(0.9, schedule.layers)
    used = []
    nothing = torch.zeros(1, 1, 1, 1)
    for step in steps or range(schedule.steps):
        for number in range(calls):
            script.step, script.calls = step, number
            current = guard.applied(schedule, step)
            guard.begin_call(step, current.density_of_step(step))
            for layer in range(schedule.layers):
                with guard.attention(AttentionInputs(layer, nothing, nothing, nothing, current.plan(step, layer), 1.0)):
                    pass
            guard.end_call()
        used.append([current.plan(step, layer) for layer in range(schedule.layers)])
    return guard, used


def schedule(*items: str, steps: int = 8, layers: int = 3, name: str = "demo-b", heads: int = 4) -> AttentionSchedule:
    return AttentionSchedule(
        resolve_preset(load_preset(name), set_items=items), Grid((24, 20)), 7, True, steps, layers, heads
    )


def widenings(guard: RecallGuard) -> list[tuple[int, int, int, str]]:
    found = guard.report()["widened"]
    return [(one["step"], one["layer"], one["measured_step"], one["to"]) for one in found]


def test_a_layer_goes_one_rung_at_a_time_two_steps_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 keeps too little at all steps; at step 1 it still has the pattern that step 0 was measured with."""
    plain = schedule()
    script = Script({(step, 1): 0.5 + step / 100 for step in range(8)} | {(3, 2): 0.91, (4, 2): 0.89})
    guard, used = driven(script, plain, monkeypatch)
    patterns = [[plan.pattern for plan in row if isinstance(plan, Plan)] for row in used]
    assert [row[0] for row in patterns] == [Block(1)] * 8
    assert [row[1] for row in patterns] == [Block(1)] * 2 + [Block(2)] * 2 + [Full()] * 4
    assert [row[2] for row in patterns] == [Block(1)] * 6 + [Block(2)] * 2
    assert widenings(guard) == [
        (2, 1, 0, "b radius 2, groups 4x4"),
        (4, 1, 2, "full"),
        (6, 2, 4, "b radius 2, groups 4x4"),
    ]
    assert (4, 1) not in script.judged  # full attention is not judged
    assert {step for step, _ in script.judged} == set(range(6))  # nor what would come after the last step
    said = guard.report()
    assert said["widened"][0]["kept"] == 0.5
    assert said["widened"][0]["recall"] == 0.25
    assert said["widened"][0]["error"] is None
    assert (said["lowest"]["step"], said["lowest"]["layer"], said["lowest"]["kept"]) == (0, 1, 0.5)
    # Densities are those that were run, of the steps and of the whole.
    ran = guard.applied(plain, 7)
    densities = [[plan.density for plan in row] for row in used]
    assert [ran.density_of_step(step) for step in range(8)] == pytest.approx([np.mean(row) for row in densities])
    assert ran.density == pytest.approx(np.mean(densities))
    assert said["planned_density"] == plain.density == plain.plan(0, 0).density
    assert sum(ran.shares.values()) == pytest.approx(1)
    assert ran.shares[ran.plan(7, 1)] == pytest.approx(4 / 24)  # type: ignore[index]


def test_of_two_calls_the_lower_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script({(0, 0): (0.95, 0.7), (0, 1): (0.6, 0.95), (0, 2): (0.91, 0.91)})
    guard, _ = driven(script, schedule(), monkeypatch, calls=2)
    assert [(layer, at) for _, layer, at, _ in widenings(guard)] == [(0, 0), (1, 0)]
    assert [one["kept"] for one in guard.report()["widened"]] == pytest.approx([0.7, 0.6])


def test_dense_steps_judge_what_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four dense steps are enough to climb to full attention before any sparse step is run."""
    laid_out = schedule("schedule.dense_steps=4", "schedule.rules=[{layers: 1, variant: full}]")
    script = Script({(step, layer): 0.1 for step in range(8) for layer in range(3)})
    guard, used = driven(script, laid_out, monkeypatch)
    assert script.judged == {(step, layer): Block(1 if step < 2 else 2) for step in (0, 1, 2, 3) for layer in (0, 2)}
    # Decided at steps 2 and 4; the first sparse step of the schedule is step 4.
    assert [(step, at, to) for step, _, at, to in widenings(guard)] == [
        *([(4, 0, "b radius 2, groups 4x4")] * 2),
        *([(4, 2, "full")] * 2),
    ]
    assert {plan.density for row in used for plan in row} == {1.0}

    script = Script({(0, 0): 0.1})
    guard, used = driven(script, schedule("schedule.dense_steps=6"), monkeypatch)
    assert {step for step, _ in script.judged} == {2, 3, 4, 5}
    assert widenings(guard) == []


def test_a_layer_stays_wide_where_rules_change_its_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out = schedule("schedule.rules=[{steps: 4-7, variant: x}, {steps: 7, variant: full}]")
    _, used = driven(Script({(0, 0): 0.5}), laid_out, monkeypatch)
    assert [row[0].pattern for row in used if isinstance(row[0], Plan)] == [
        *([Block(1)] * 2 + [Block(2)] * 2),
        *([Union(Block(1), CrissCross(1))] * 3 + [Full()]),
    ]


def test_where_steps_are_left_out_and_full_attention_follows_nothing_goes_wider(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As under a cache of whole transformer calls."""
    laid_out = schedule("schedule.rules=[{steps: 4-7, variant: full}]")
    guard, _ = driven(Script({(0, 0): 0.5}), laid_out, monkeypatch, steps=(0, 5, 6))
    assert widenings(guard) == []


def test_heads_go_wider_together(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out = schedule("schedule.rules=[{heads: 1, variant: x}, {layers: 1, heads: 3, variant: full}]")
    guard, used = driven(Script({(0, 1): 0.5, (2, 1): 0.5}), laid_out, monkeypatch)
    own, wide, full = used[0][1], used[2][1], used[4][1]
    assert isinstance(own, HeadPlan)
    assert isinstance(wide, HeadPlan)
    assert own.class_of_head == wide.class_of_head == (0, 1, 0, 2)
    assert [member.pattern for member in wide.classes] == [Block(2), Union(Block(1), CrissCross(1)), Full()]
    np.testing.assert_array_equal(wide.order, own.order)
    assert isinstance(full, Plan)
    assert isinstance(full.pattern, Full)
    assert widenings(guard)[0][3] == ("b radius 2, groups 4x4 and bx radius 1 share 1, groups 4x4 and full")


def test_a_second_call_of_the_pipeline_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, script = schedule(), Script({(0, 1): 0.5})
    guard, first = driven(script, plain, monkeypatch)
    _, second = driven(script, plain, monkeypatch, guard)
    assert first == second
    _, third = driven(Script({}), plain, monkeypatch, guard)
    assert {plan for row in third for plan in row} == {plain.plan(0, 0)}
    assert widenings(guard) == []


def test_a_run_that_was_broken_off_in_its_first_step_is_forgotten() -> None:
    """Wherever the next one begins: both are at the first step."""

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("broken off")

    pipe, chosen = tiny_flux.pipeline(), preset("b", **NARROW)
    size: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "guard": 0.9}

    def lowest(seed: int, installation: Any, **arguments: Any) -> Any:
        call(pipe, num_inference_steps=3, generator=torch.Generator().manual_seed(seed), **arguments)
        return installation.guard.report()["lowest"]

    alone = []
    for seed in (1, 2):
        with grat_cli.install(pipe, chosen, **size) as installation:
            alone.append(lowest(seed, installation))
    assert alone[0] != alone[1]
    with grat_cli.install(pipe, chosen, **size) as installation:
        for seed, other in ((1, 2), (2, 1)):
            with pytest.raises(RuntimeError, match="broken off"):
                lowest(other, installation, callback_on_step_end=fail)
            assert lowest(seed, installation) == alone[seed - 1]


@pytest.mark.parametrize("done", range(1, 8))
def test_a_run_that_is_taken_up_does_the_same(monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """Between any two steps, through JSON; a step that was broken off is run again."""
    kept = {(step, layer): 0.8 + 0.03 * ((3 * step + 5 * layer) % 7) for step in range(8) for layer in range(3)}
    plain = schedule()
    whole, expected = driven(Script(kept), plain, monkeypatch)
    for broken_off in (0, 1):
        begun, _ = driven(Script(kept), plain, monkeypatch, steps=range(done + broken_off))
        state = json.loads(json.dumps(begun.state(done)))
        rest = RecallGuard(0.9, 3)
        rest.restore(state, done)
        _, used = driven(Script(kept), plain, monkeypatch, rest, steps=range(done, 8))
        assert used == expected[done:]
        assert rest.report() == whole.report()
        assert rest.applied(plain, 7).density == whole.applied(plain, 7).density


def test_a_state_that_is_not_whole_is_refused() -> None:
    guard = RecallGuard(0.9, 3)
    for damaged in ({}, {"widened": [{}], "lowest": None, "measured": {}}, guard.state(0) | {"measured": {"x": 1}}):
        with pytest.raises(BadInput, match="what the guard had done is damaged"):
            guard.restore(damaged, 1)


CHOOSING = {"levels": [{"beyond": 0, "block": [4, 4]}], "choose": {"exact": 4, "fine": 12, "block": [2, 2]}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"variant": "b", "radius": 1}, "b radius 2, groups 4x4"),
        ({"variant": "b", "radius": [0, 2]}, "b radius 1x3, groups 4x4"),
        ({"variant": "x"}, "bx radius 1 share 1, groups 4x4"),
        ({"variant": "bx", "radius": 2}, "bx radius 3 share 1, groups 4x4"),
        ({"variant": "sta", "window": [3, 5]}, "sta window 5x7, groups 4x4"),
        ({"variant": "full"}, "full, groups 4x4"),
        (
            {"variant": "x", "far": [{"beyond": 1, "block": [2, 2]}]},
            "bx radius 1 share 1, groups 4x4, far 2x2 beyond 1",
        ),
        (
            {"variant": "b", "radius": 0, "far": CHOOSING},
            "b radius 0, groups 4x4, far 4x4 beyond 0, of which 8 exact and 24 by 2x2",
        ),
    ],
)
def test_what_is_next_wider(given: dict[str, Any], expected: str) -> None:
    own = Attention.model_validate({"group": [4, 4], **given})
    assert wider(own).summary == expected
    grouping = Grouping(Grid((32, 32)), (4, 4))
    before, after = (build_plan(grouping, one.pattern(), 24).density for one in (own, wider(own)))
    assert before < after or before == after == 1


def test_where_nothing_is_between_a_layer_goes_to_full_at_once() -> None:
    """Six groups a side: radius 4 leaves out the corners, radius 5 nothing."""
    laid_out = schedule("attention.radius=4", steps=1)
    widths = np.full((1, 3), int(Width.WIDER))
    widths[0, 0] = Width.OWN
    wide = laid_out.widened(widths)
    assert [wide.described(0, layer) for layer in range(3)] == ["b radius 4, groups 4x4", "full", "full"]
    assert laid_out.density < wide.density < 1
    assert laid_out.density == laid_out.plan(0, 0).density  # it has not changed itself


# In whole pipelines.


@pytest.mark.parametrize("arguments", [{}, GUIDED, {"batch": 2}], ids=["plain", "guided", "batch"])
def test_with_a_bar_of_one_every_layer_ends_dense(arguments: dict[str, Any]) -> None:
    """Stock attention is handed the masks of the steps: radius 0, then 1, then none."""
    chosen = preset("b", **NARROW)
    recorder = StepRecorder()
    result, installation = guarded(1.0, chosen, observer=recorder, **arguments)

    masks = [mask for radius in (0, 1, 99) for mask in [raster_mask(GRID, radius, False)] * DELAY_STEPS]
    calls = []

    def hand_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = masks[len(calls) // (2 if "true_cfg_scale" in arguments else 1)]
        calls.append(mask)
        return args, kwargs | {"joint_attention_kwargs": {"attention_mask": mask}}

    pipe = tiny_flux.pipeline()
    pipe.transformer.register_forward_pre_hook(hand_mask, with_kwargs=True)
    expected = call(pipe, num_inference_steps=STEPS, **arguments)
    # Twice the steps of the model that this bound was derived for.
    assert relative_difference(result, expected) < 2 * RELATIVE_OF_PIPELINES

    densities = [mask.float().mean().item() for mask in masks]
    assert [step.density for step in recorder.steps([0.0] * STEPS)] == pytest.approx(densities)
    assert installation.last_schedule.density == pytest.approx(np.mean(densities))
    assert installation.guard.report()["planned_density"] == pytest.approx(densities[0])
    assert [one["to"] for one in installation.guard.report()["widened"]] == [
        *(["b radius 1, groups 4x4"] * LAYERS + ["full"] * LAYERS)
    ]
    rules = [{"steps": "2-3", "radius": 1}, {"steps": "4-5", "variant": "full"}]
    assert torch.equal(result, guarded(None, preset("b", {"rules": rules}, **NARROW), **arguments)[0])


@pytest.mark.parametrize("far", [None, [{"beyond": 0, "block": [2, 2]}]])
def test_looking_changes_nothing(far: Any) -> None:
    chosen = preset("b", far=far, **NARROW)
    expected, plain = guarded(None, chosen)
    assert plain.guard is None
    off, installation = guarded(0, chosen.model_copy(update={"guard": 0.99}))
    assert installation.guard is None
    assert torch.equal(off, expected)
    watched, installation = guarded(1e-6, chosen)
    assert torch.equal(watched, expected)
    said = installation.guard.report()
    assert said["widened"] == []
    assert 0 < said["lowest"]["kept"] < 1
    assert (said["lowest"]["error"] is None) == (far is None)
    assert installation.last_schedule is not plain.last_schedule
    assert installation.last_schedule.density == plain.last_schedule.density


class Keeper(CallObserver):
    """Keeps what each attention was computed from."""

    def __init__(self) -> None:
        self.step, self.seen = 0, []

    def begin_call(self, step: int, density: float) -> None:
        self.step = step

    def end_call(self) -> None:
        pass

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        assert inputs is not None
        self.seen.append((self.step, inputs))
        yield


def recall_of(step: int, inputs: AttentionInputs) -> float:
    """Of a plain pattern, by `recall`, on the rows that the guard takes."""
    assert isinstance(inputs.plan, Plan)
    positions = sample_positions(inputs.plan, ROWS, step)
    means = []
    for sample in range(len(inputs.query)):
        valid = None if inputs.text_valid is None else int(inputs.text_valid[sample])
        tensors = (tensor[sample] for tensor in (inputs.query, inputs.key, inputs.value))
        found = row_statistics(*tensors, [inputs.plan], positions, inputs.scale, valid)
        means.append((found.text + found.kept[0].image).mean().item())
    return float(np.mean(means))


def test_what_a_run_measures_is_its_recall() -> None:
    keeper = Keeper()
    _, installation = guarded(1e-6, preset("b", **NARROW), 4, keeper, **GUIDED)
    lowest = installation.guard.report()["lowest"]
    every = [(recall_of(step, inputs), step, inputs.layer) for step, inputs in keeper.seen if step < 2]
    assert len(every) == 2 * 2 * LAYERS
    recall, step, layer = min(every)
    assert (lowest["step"], lowest["layer"]) == (step, layer)
    assert lowest["kept"] == lowest["recall"] == pytest.approx(recall, abs=1e-5)


def test_videos_with_texts_of_several_lengths() -> None:
    pipe = tiny_hunyuan.pipeline()
    chosen = Preset.model_validate(
        {
            "name": "test",
            "model": "hunyuan",
            "attention": {"variant": "x", "group": [2, 2, 2], "share": 2},
            "kernel": {"backend": "sdpa"},
        }
    )
    size: dict[str, Any] = {"height": 48, "width": 64, "num_frames": 9}
    call = {"prompt": ["waves at night", "snow"], "num_inference_steps": 5, "max_sequence_length": 16}
    guidance = {"negative_prompt": ["a boat in the rain", ""], "true_cfg_scale": 2.0}
    keeper = Keeper()
    with grat_cli.install(pipe, chosen, **size, guard=1.0, observer=keeper) as installation:
        pipe(**size, **call, **guidance, output_type="latent")
    seen = [(step, inputs) for step, inputs in keeper.seen if step == 0]
    assert len({inputs.plan.text_len for _, inputs in seen}) == 2
    assert installation.guard is not None
    for one in installation.guard.report()["widened"]:
        if one["measured_step"] == 0:
            recalls = [recall_of(0, inputs) for _, inputs in seen if inputs.layer == one["layer"]]
            assert len(recalls) == 2
            assert one["recall"] == pytest.approx(min(recalls), abs=1e-5)
    assert {inputs.plan.density for step, inputs in keeper.seen if step == 4} == {1.0}


def test_the_denoising_loop_reads_nothing_but_what_was_measured_two_steps_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is left out here, from the second call on: the first one checks the image positions."""
    read = []

    def arrived(call: Any) -> guard_module._Found:
        read.append(current[0])
        measured = {layer: Measured(0.5, 0.5, None, width) for layer, (width, _) in call.measured.items()}
        return guard_module._Found(measured, {})

    monkeypatch.setattr(guard_module._Call, "read", arrived)
    watching, current = NoHostReads(), [-1]

    class Watch(Keeper):
        def begin_call(self, step: int, density: float) -> None:
            current[0] = step
            if step == 1:
                watching.__enter__()

    try:
        _, installation = guarded(0.9, preset("b", far=[{"beyond": 0, "block": [2, 2]}], **NARROW), observer=Watch())
    finally:
        watching.__exit__(None, None, None)
    assert read == [1, 2, 3, 4]  # at the beginning of the step after, before its first call
    assert installation.last_schedule.density_of_step(4) == 1


def test_layers_of_a_compiled_transformer_go_wider_as_those_of_another() -> None:
    pipe = tiny_flux.pipeline()

    def made() -> tuple[torch.Tensor, list[dict[str, Any]]]:
        with grat_cli.install(pipe, preset("b"), height=HEIGHT, width=WIDTH, guard=0.9) as installation:
            latents = call(pipe, num_inference_steps=5)
        assert installation.guard
        return latents, installation.guard.report()["widened"]

    expected, widened = made()
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True, dynamic=True)
    latents, widened_too = made()
    torch._dynamo.reset()
    assert relative_difference(latents, expected) < RELATIVE_OF_PIPELINES
    layers, layers_too = ([(one["step"], one["layer"]) for one in told] for told in (widened, widened_too))
    assert layers
    assert layers_too == layers


def test_bars_out_of_range_are_refused() -> None:
    for bar in (-0.1, 2, float("nan")):
        with pytest.raises(BadInput, match=r"expected a share from 0 to 1, such as 0.9, or 0 for none"):
            guarded(bar, preset())


# What is told.


def test_the_report_says_when_which_layer_and_why() -> None:
    (made,) = generate(preset=demo_preset("b", guard=1.0, sampling={"steps": 4, "guidance": 2.0}))
    built = json.loads(json.dumps(made.report))
    guard = built["guard"]
    assert built["stages"][0]["guard"] == report.provenance(built)["guard"] == guard
    assert (guard["bar"], guard["rows"], guard["layers"]) == (1.0, ROWS, 5)
    assert [(one["step"], one["layer"], one["measured_step"]) for one in guard["widened"]] == [
        (2, layer, 0) for layer in range(5)
    ]
    assert all(0 < one["kept"] == one["recall"] < 1 for one in guard["widened"])
    densities = [step["density"] for step in built["steps"]]
    assert densities[0] == densities[1] == pytest.approx(guard["planned_density"], abs=1e-6)
    assert densities[2] > densities[1]
    assert built["density"] == pytest.approx(np.mean(densities), abs=1e-6)
    assert built["ideal_speedup"] == 1 / built["density"]
    assert Preset.model_validate(built["preset"]).guard == 1
    (line,) = run_tables.guard_lines([built])
    lowest = guard["lowest"]
    assert line == (
        f"guard 1: 5 of 5 layers went wider from step 3 on"
        f"{', 5 of them to full' if guard['widened'][0]['to'] == 'full' else ''} "
        f"(least kept {lowest['kept']:.2f} in layer {lowest['layer']} at step {lowest['step'] + 1}); "
        f"density {guard['planned_density']:.3f} became {built['density']:.3f}"
    )
    assert run_tables.widenings_text(built) == f"step 3: layers 0-4 to {guard['widened'][0]['to']}"


def test_each_stage_of_a_large_picture_has_a_guard_of_its_own() -> None:
    (made,) = generate_staged(resolve_preset(sparse_stages(strength=1.0), guard=1.0))
    base, large = made.report["stages"]
    assert base["guard"]["lowest"] is None  # the base is full
    assert base["density"] == 1
    assert [one["step"] for one in large["guard"]["widened"]] == [2] * 5
    assert made.report["guard"] == large["guard"]
    assert large["density"] > large["guard"]["planned_density"]
    text = run_tables.guard_text({"guard": made.report["guard"], "stages": [base, large]})
    assert text is not None
    assert text.startswith("guard 1: 64x64 all attention was full; 128x128 5 of 5 layers went wider from step 3 on")
    told = run_tables.widenings_text({"guard": made.report["guard"], "stages": [base, large]})
    assert told == f"128x128 step 3: layers 0-4 to {large['guard']['widened'][0]['to']}"


def test_lines_without_a_guard_or_without_anything_to_widen() -> None:
    lowest = {"step": 4, "layer": 2, "kept": 0.934}
    plain = {"seed": 3, "guard": None, "density": 0.2}
    calm = {"seed": 4, "guard": {"bar": 0.9, "lowest": lowest, "widened": [], "layers": 5}, "density": 0.2}
    assert run_tables.guard_lines([plain]) == []
    assert run_tables.guard_lines([plain, calm]) == [
        "seed 4: guard 0.9: no layer went wider, the least kept was 0.93 in layer 2 at step 5"
    ]
    few = {"guard": calm["guard"] | {"lowest": None, "planned_density": 0.2}}
    assert run_tables.guard_text(few) == "guard 0.9: too few steps to judge any layer"
    assert run_tables.widenings_text(plain) is run_tables.widenings_text(calm) is None
