"""The guard over attention that is carried over steps: what would have been carried, and when references come more
often."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from flux_runs import GUIDED, HEIGHT, WIDTH, NoHostReads, call, preset
from hypothesis import given
from hypothesis import strategies as st
from small_pictures import generate
from small_pictures import preset as demo_preset

import grat_cli
from grat_cli.attention import guard as guard_module
from grat_cli.attention import online_recall
from grat_cli.attention.guard import DELAY_STEPS, RecallGuard, in_the_middle
from grat_cli.attention.layer import AttentionInputs, CallObserver
from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.console import run_tables
from grat_cli.errors import BadInput
from grat_cli.generation import report, told
from grat_cli.presets import Preset, load_preset, resolve_preset
from grat_kernels import Block, Full, Grid, Plan

LAYERS, STEPS = tiny_flux.LAYERS, 12
LOOKS = 1e-6  # a bar that everything is above
FAR = {"radius": 0, "far": [{"beyond": 0, "block": [2, 2]}]}
REFERENCES = [0, 2, 4, 8]
EXTRAPOLATED = {"reference": REFERENCES, "between": "extrapolate", "slope": 0.2}
RESIDUAL = {
    "reference": REFERENCES,
    "between": "residual",
    "base": {"variant": "b", "radius": 0, "far": [{"beyond": 0, "block": [4, 4]}]},
}


@st.composite
def _references(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    steps = draw(st.integers(1, 60))
    others = draw(st.sets(st.integers(0, steps - 1)))
    return tuple(sorted({0, *others})), steps, draw(st.integers(0, steps - 1))


@given(_references())
def test_each_gap_that_is_left_gets_a_reference_until_every_step_is_one(
    given: tuple[tuple[int, ...], int, int],
) -> None:
    references, steps, begin = given
    rounds = 0
    while more := in_the_middle(references, steps, begin):
        assert min(more) >= begin
        assert not set(more) & set(references)
        # What follows a reference, or the step before the first that is left, is at most half as long as it was.
        gaps = _gaps(references, steps, begin)
        assert len(more) == sum(gap > 1 for gap in gaps)
        references = tuple(sorted({*references, *more}))
        assert max(_gaps(references, steps, begin)) <= (max(gaps) + 1) // 2
        rounds += 1
    assert set(range(begin, steps)) <= set(references)
    assert rounds <= steps.bit_length()


def _gaps(references: Sequence[int], steps: int, begin: int) -> list[int]:
    marks = sorted({begin - 1, *(step for step in references if step >= begin), steps})
    return np.diff(marks).tolist()


def test_a_schedule_with_more_references_is_another_one() -> None:
    plain = schedule([0, 4], steps=8)
    more = np.zeros((8, 1), bool)
    more[[2, 6]] = True
    other = plain.widened(np.zeros((8, 3), int), more)
    assert plain.references(0) == (0, 4)
    assert other.references(0) == (0, 2, 4, 6)
    assert other.density == pytest.approx(2 * plain.density)
    assert [carried.is_reference for step in range(8) if (carried := other.carried(step, 1))] == [True, False] * 4
    assert plain.density == schedule([0, 4], steps=8).density


class Script:
    """Stands in for what is measured: how much would have been carried to a reference, 1 where nothing is said."""

    def __init__(self, carried: Mapping[Any, float], kept: Mapping[tuple[int, int], float] | None = None) -> None:
        self.carried, self.kept = carried, kept or {}
        self.judged: dict[tuple[int, int], Any] = {}
        self.step = 0

    def __call__(self, inputs: AttentionInputs, rows: Any) -> torch.Tensor:
        assert (self.step, inputs.layer) not in self.judged
        self.judged[self.step, inputs.layer] = inputs.plan.classes[0].pattern
        kept = self.kept.get((self.step, inputs.layer), 1.0)
        return torch.tensor([kept, kept, float("nan")])


def driven(
    script: Script,
    plain: AttentionSchedule,
    monkeypatch: pytest.MonkeyPatch,
    guard: RecallGuard | None = None,
    steps: range | None = None,
) -> tuple[RecallGuard, list[int]]:
    """Runs the steps of a schedule as an adapter does, without a model; the steps at which layer 0 is computed."""
    monkeypatch.setattr(online_recall, "measure", script)
    monkeypatch.setattr(online_recall, "sample_rows", lambda *_: None)
    guard = guard or RecallGuard(0.9, plain.layers)
    computed, nothing = [], torch.zeros(1, 1, 1, 1)
    for step in steps or range(plain.steps):
        script.step = step
        current = guard.applied(plain, step)
        guard.begin_call(step, current.density_of_step(step))
        for layer in range(plain.layers):
            carried = current.carried(step, layer)
            bases = [] if carried is None or carried.base is None else [carried.base]
            is_computed = carried is None or carried.is_reference
            for plan in [*([current.reference_plan(step, layer)] if is_computed else []), *bases]:
                with guard.attention(AttentionInputs(layer, nothing, nothing, nothing, plan, 1.0)):
                    pass
            if carried is not None and carried.is_reference and carried.is_kept and step:
                kept = script.carried.get((step, layer), script.carried.get(step, 1.0))
                guard.compared(layer, torch.tensor(2 * (1 - kept)))
        computed += [step] * (step in current.references(0) or current.section_of(0) is None)
        guard.end_call()
    return guard, computed


def schedule(
    reference: Any, *items: str, steps: int = STEPS, layers: int = 3, sections: Sequence[Any] = ()
) -> AttentionSchedule:
    over_steps = list(sections) or [{"reference": reference}]
    chosen = resolve_preset(load_preset("demo-b"), set_items=items)
    chosen = Preset.model_validate(chosen.model_dump() | {"schedule": {"over_steps": over_steps}})
    return AttentionSchedule(chosen, Grid((24, 20)), 7, True, steps, layers, 4)


def doublings(guard: RecallGuard) -> list[tuple[int, int, list[int]]]:
    found = guard.report().get("doubled", [])
    return [(one["step"], one["measured_step"], one["references"]) for one in found]


def test_references_come_twice_as_often_two_steps_after_one_that_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = schedule([0, 8, 16], steps=32)
    guard, computed = driven(Script({(8, 0): 0.95, (8, 1): 0.9, (8, 2): 0.82}), plain, monkeypatch)
    assert computed == [0, 8, 12, 16, 24]
    said = guard.report()
    assert said["doubled"] == [
        {
            "step": 10,
            "section": 0,
            "measured_step": 8,
            "kept": pytest.approx(0.89),
            "layer": 2,
            "least": pytest.approx(0.82),
            "references": [12, 24],
        }
    ]
    assert said["least_carried"] == {"step": 8, "section": 0, "kept": pytest.approx(0.89)}
    assert said["planned_density"] == plain.density
    assert guard.applied(plain, 31).density == pytest.approx(plain.density * 5 / 3)
    # The mean of the layers counts, not each.
    guard, computed = driven(Script({(8, 0): 0.98, (8, 1): 0.97, (8, 2): 0.8}), plain, monkeypatch)
    assert computed == [0, 8, 16]
    assert doublings(guard) == []


def test_again_if_it_stays_low_until_every_step_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = schedule([0, 8, 16], steps=32)
    guard, computed = driven(Script(dict.fromkeys(range(1, 32), 0.5)), plain, monkeypatch)
    # Steps 14 and 18 become references in the moment of the decision; what they say is not waited for.
    assert doublings(guard) == [
        (10, 8, [12, 24]),
        (14, 12, [14, 20, 28]),
        (18, 16, [18, 22, 26, 30]),
        (22, 20, [23, 25, 27, 29, 31]),
    ]
    assert computed == [0, 8, 12, 14, 16, 18, 20, *range(22, 32)]
    guard, _ = driven(Script(dict.fromkeys(range(1, 32), 0.5)), schedule(1, steps=32), monkeypatch)
    assert doublings(guard) == []


def test_sections_are_decided_on_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = [{"reference": [0, 4, 8], "layers": "0-1"}, {"reference": [0, 6], "layers": 3}]
    plain = schedule(None, layers=4, sections=sections)
    guard, computed = driven(Script({(4, 0): 0.5, (4, 1): 0.9, (6, 3): 0.95}), plain, monkeypatch)
    assert computed == [0, 4, 6, 8, 10]
    assert [(one["section"], one["layer"]) for one in guard.report()["doubled"]] == [(0, 0)]
    ran = guard.applied(plain, STEPS - 1)
    assert ran.references(1) == (0, 6)
    assert ran.carried(3, 2) is None


@pytest.mark.parametrize("base", [None, RESIDUAL["base"]])
def test_patterns_are_judged_at_references_alone(monkeypatch: pytest.MonkeyPatch, base: Any) -> None:
    section = {"reference": [0, 4, 8]} | ({"between": "residual", "base": base} if base else {})
    plain = schedule(None, sections=[section])
    script = Script({}, {(0, 1): 0.5, (4, 1): 0.6})
    guard, _ = driven(script, plain, monkeypatch)
    # That which layer 1 is to have at step 8 is that of step 4; none is judged that comes after the last reference.
    assert script.judged == {
        **{(step, layer): Block(1) for step in (0, 4) for layer in (0, 2)},
        (0, 1): Block(1),
        (4, 1): Block(2),
    }
    assert [(one["step"], one["layer"], one["to"]) for one in guard.report()["widened"]] == [
        (2, 1, "b radius 2, groups 4x4"),
        (6, 1, "full"),
    ]
    ran = guard.applied(plain, STEPS - 1)
    patterns = [plan.pattern for step in (0, 4, 8) if isinstance(plan := ran.reference_plan(step, 1), Plan)]
    assert patterns[:2] == [Block(1), Block(2)]
    assert isinstance(patterns[2], Full)


@pytest.mark.parametrize("done", range(1, STEPS))
def test_a_run_that_is_taken_up_does_the_same(monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """Between any two steps, through JSON; a step that was broken off is run again."""
    plain = schedule([0, 2, 7])
    script = Script({2: 0.8, 4: 0.85, 5: 0.7}, {(2, 1): 0.5})
    whole, expected = driven(script, plain, monkeypatch)
    assert len(doublings(whole)) == 2
    for broken_off in (0, 1):
        begun, _ = driven(Script(script.carried, script.kept), plain, monkeypatch, steps=range(done + broken_off))
        state = json.loads(json.dumps(begun.state(done)))
        rest = RecallGuard(0.9, 3)
        rest.restore(state, done)
        _, computed = driven(Script(script.carried, script.kept), plain, monkeypatch, rest, range(done, STEPS))
        assert computed == [step for step in expected if step >= done]
        assert rest.report() == whole.report()


@pytest.mark.parametrize(
    "changed",
    [
        {"doubled": [{}]},
        {"least_carried": [1, 2]},
        {"carried": {"4": [[7, 0.5]]}},
        {"carried": {"4": [[1, float("inf")]]}},
        {"carried": {"-4": []}},
        {"doubled": [{**dict.fromkeys(("step", "section", "measured_step"), 0), "references": [10**9]}]},
    ],
)
def test_a_state_that_is_not_whole_is_refused(changed: dict[str, Any]) -> None:
    guard = RecallGuard(0.9, 3)
    with pytest.raises(BadInput, match="what the guard had done is damaged"):
        guard.restore(guard.state(0) | changed, 1)


def test_a_state_of_another_run_is_refused() -> None:
    guard = RecallGuard(0.9, 3)
    known = {"step": 3, "section": 0, "measured_step": 1, "kept": 0.5, "layer": 0, "least": 0.5, "references": [30]}
    guard.restore(guard.state(0) | {"doubled": [known]}, 4)
    with pytest.raises(BadInput, match="what the guard had done is of another run"):
        guard.applied(schedule([0, 4]), 4)
    guard.restore(guard.state(0) | {"doubled": [known | {"references": [5]}]}, 4)
    assert guard.applied(schedule([0, 4]), 4).references(0) == (0, 4, 5)


# In whole pipelines.


def chosen(section: Any, **attention: Any) -> Preset:
    return preset("b", {"over_steps": section}, **(attention or FAR))


def guarded(bar: float | None, section: Any, steps: int = STEPS, observer: Any = None, **arguments: Any) -> Any:
    """Latents of the tiny Flux, and the installation."""
    pipe = tiny_flux.pipeline()
    with grat_cli.install(
        pipe, chosen(section), height=HEIGHT, width=WIDTH, guard=bar, observer=observer
    ) as installation:
        return call(pipe, num_inference_steps=steps, **arguments), installation


class Outputs:
    """What attentions give, by step: those of compute, in order."""

    def __init__(self, pipe: Any) -> None:
        self.of_step: dict[int, list[Any]] = {}
        model = pipe.transformer

        def take(module: Any, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            self.of_step.setdefault(pipe.scheduler.step_index or 0, []).append(torch.cat(parts, 1).clone())

        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.register_forward_hook(take)


@pytest.mark.parametrize("arguments", [{}, GUIDED], ids=["plain", "guided"])
def test_what_is_told_is_how_far_off_the_formula_is(arguments: dict[str, Any]) -> None:
    pipe = tiny_flux.pipeline()
    outputs = Outputs(pipe)
    with grat_cli.install(pipe, chosen(EXTRAPOLATED), height=HEIGHT, width=WIDTH, guard=LOOKS) as installation:
        call(pipe, num_inference_steps=STEPS, **arguments)
    assert installation.guard
    found = {}
    for step, before, first in ((2, 0, 0), (4, 2, 0), (8, 4, 2)):
        kept = []
        for of_layer in zip(*(outputs.of_step[at] for at in (step, before, first)), strict=True):
            made, last, earlier = (one.double() for one in of_layer)
            carried = last + 0.2 * (step - before) / max(before - first, 1) * (last - earlier)
            kept.append(1 - ((carried - made).norm() / made.norm()).item() / 2)
        calls = len(kept) // LAYERS
        found[step] = np.reshape(kept, (calls, LAYERS)).min(0).mean()
    least = min(found, key=lambda step: found[step])
    said = installation.guard.report()["least_carried"]
    assert said == {"step": least, "section": 0, "kept": pytest.approx(found[least], abs=1e-5)}


def test_of_a_difference_to_a_base_all_of_the_output_counts() -> None:
    """With a base of the same attention, nothing is carried, and all is kept."""
    _, installation = guarded(LOOKS, RESIDUAL | {"base": {"variant": "b", **FAR}})
    assert installation.guard.report()["least_carried"]["kept"] == 1
    _, installation = guarded(LOOKS, RESIDUAL)
    kept = installation.guard.report()["least_carried"]["kept"]
    _, installation = guarded(LOOKS, EXTRAPOLATED)
    assert installation.guard.report()["least_carried"]["kept"] < kept < 1


@pytest.mark.parametrize(
    "section",
    [EXTRAPOLATED, RESIDUAL, EXTRAPOLATED | {"keep": "fp8"}, EXTRAPOLATED | {"keep": "host"}],
    ids=["extrapolate", "residual", "fp8", "host"],
)
def test_looking_changes_nothing(section: Any) -> None:
    expected, plain = guarded(None, section)
    watched, installation = guarded(LOOKS, section)
    assert torch.equal(watched, expected)
    assert installation.guard.report()["doubled"] == []
    assert installation.guard.report()["lowest"]["step"] in REFERENCES
    assert installation.last_schedule.density == plain.last_schedule.density
    works = [[one.work.of_step(step) for step in range(STEPS)] for one in (plain, installation)]
    assert works[0] == works[1]


@pytest.mark.parametrize("arguments", [{}, GUIDED, {"batch": 2}], ids=["plain", "guided", "batch"])
def test_it_does_what_a_preset_with_these_references_does(arguments: dict[str, Any]) -> None:
    """Full attention, so that nothing goes wider besides."""

    def made(section: Any, bar: float | None) -> Any:
        pipe = tiny_flux.pipeline()
        with grat_cli.install(
            pipe, preset("full", {"over_steps": section}), height=HEIGHT, width=WIDTH, guard=bar
        ) as installation:
            return call(pipe, num_inference_steps=STEPS, **arguments), installation

    result, installation = made(EXTRAPOLATED, 1.0)
    said = installation.guard.report()
    assert said["lowest"] is None
    assert (said["doubled"][0]["step"], said["doubled"][0]["measured_step"]) == (2 + DELAY_STEPS, 2)
    references = sorted({*REFERENCES, *(step for one in said["doubled"] for step in one["references"])})
    assert len(references) > len(REFERENCES)
    assert list(installation.last_schedule.references(0)) == references
    expected, plain = made(EXTRAPOLATED | {"reference": references}, None)
    assert torch.equal(result, expected)
    assert installation.last_schedule.density == plain.last_schedule.density == len(references) / STEPS


def test_a_second_call_of_the_pipeline_starts_anew() -> None:
    pipe = tiny_flux.pipeline()
    with grat_cli.install(pipe, chosen(EXTRAPOLATED), height=HEIGHT, width=WIDTH, guard=0.99) as installation:
        results = [call(pipe, num_inference_steps=STEPS) for _ in range(2)]
    assert torch.equal(*results)
    assert installation.guard
    assert len(installation.guard.report()["doubled"]) > 0


@pytest.mark.parametrize("section", [EXTRAPOLATED, RESIDUAL], ids=["extrapolate", "residual"])
def test_the_denoising_loop_reads_nothing_but_what_arrived(monkeypatch: pytest.MonkeyPatch, section: Any) -> None:
    read = []

    def arrived(one: Any) -> guard_module._Found:
        read.append(current[0])
        return guard_module._Found({}, {layer: 0.5 for layer, _ in one.carried})

    monkeypatch.setattr(guard_module._Call, "read", arrived)
    watching, current = NoHostReads(), [-1]

    class Watch(CallObserver):
        def begin_call(self, step: int, density: float) -> None:
            current[0] = step
            if step == 1:
                watching.__enter__()

        def end_call(self) -> None:
            pass

        @contextmanager
        def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
            yield

    try:
        _, installation = guarded(0.9, section, observer=Watch())
    finally:
        watching.__exit__(None, None, None)
    # At the beginning of the step after, before its first call; steps that carry have nothing to read.
    computed = installation.last_schedule.references(0)
    assert read == [step + DELAY_STEPS - 1 for step in computed if step + DELAY_STEPS < STEPS]
    assert len(computed) > len(REFERENCES)


# What is told.


def test_the_report_says_when_how_low_and_what_then() -> None:
    full = demo_preset(
        "full",
        guard=1.0,
        schedule={"over_steps": {"reference": [0, 1, 7]}},
        sampling={"steps": 9, "guidance": 2.0},
    )
    (made,) = generate(preset=full)
    built = json.loads(json.dumps(made.report))
    guard = built["guard"]
    assert built["stages"][0]["guard"] == report.provenance(built)["guard"] == guard
    assert guard["lowest"] is None
    first = guard["doubled"][0]
    assert (first["step"], first["measured_step"], first["section"], first["references"]) == (3, 1, 0, [4, 8])
    assert first["kept"] < 1
    computed = {0, 1, 7, *(step for one in guard["doubled"] for step in one["references"])}
    densities = [step["density"] for step in built["steps"]]
    assert densities == [float(step in computed) for step in range(9)]
    assert guard["planned_density"] == pytest.approx(3 / 9, abs=1e-6)
    assert built["density"] == pytest.approx(len(computed) / 9)
    assert told.ToldGuard.model_validate_json(json.dumps(guard)).doubled[0].references == (4, 8)
    (line,) = run_tables.guard_lines([built])
    least, times = guard["least_carried"], len(guard["doubled"])
    assert line == (
        f"guard 1: references came twice as often from step 4 on{f', {times} times over' if times > 1 else ''} "
        f"(least carried {least['kept']:.2f} to step {least['step'] + 1}); "
        f"density 0.333 became {built['density']:.3f}"
    )
    text = run_tables.references_text(built)
    assert text is not None
    assert text.startswith("step 4: also 5, 9")


def test_lines_where_nothing_drifts_and_of_several_sections() -> None:
    lowest = {"step": 4, "layer": 2, "kept": 0.934}
    carried = {"step": 5, "section": 0, "kept": 0.951}
    calm = {
        "seed": 4,
        "guard": {"bar": 0.9, "lowest": lowest, "widened": [], "layers": 5, "least_carried": carried, "doubled": []},
        "density": 0.2,
    }
    assert run_tables.guard_lines([calm]) == [
        "guard 0.9: no layer went wider, the least kept was 0.93 in layer 2 at step 5; references stayed as they were, "
        "the least carried was 0.95 to step 6"
    ]
    assert run_tables.references_text(calm) is None
    doubled = [{"step": 3, "section": 0, "references": [5]}, {"step": 4, "section": 1, "references": [6, 7]}]
    drifted = {"guard": calm["guard"] | {"doubled": doubled, "planned_density": 0.1}, "density": 0.2}
    assert run_tables.references_text(drifted) == "step 4: also 6 of over_steps 1; step 5: also 7-8 of over_steps 2"
    assert run_tables.guard_text(drifted) == (
        "guard 0.9: no layer went wider, the least kept was 0.93 in layer 2 at step 5; references came twice as often "
        "from step 4 on, 2 times over (least carried 0.95 to step 6); density 0.100 became 0.200"
    )
