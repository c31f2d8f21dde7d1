"""What is foretold of attention that is carried over steps: bytes that are kept against those that are, work, time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_qwen
import tiny_wan
import torch
from command_line import grat
from flux_runs import GUIDED

import grat_cli
from grat_cli.estimates.components import components_of
from grat_cli.estimates.fitting import judge
from grat_cli.estimates.hardware import GPUS
from grat_cli.estimates.over_steps import kept_bytes
from grat_cli.estimates.planning import Forecast, run_forecasts
from grat_cli.estimates.time import estimate_for
from grat_cli.families import family_of_transformer
from grat_cli.generation.selection import select_preset
from grat_cli.models.catalogue import choose_model
from grat_cli.models.resolution import Resolution
from grat_cli.models.video_size import VideoSize
from grat_cli.presets import Preset

PICTURE = {"height": 144, "width": 208}
VIDEO = {"height": 48, "width": 80, "num_frames": 13}
WAVES = {"prompt": "waves at night under a red boat", "max_sequence_length": 16}
SIX = "[0, 0.1, 0.25, 0.45, 0.65, 0.85]"


class Model(NamedTuple):
    """A pipeline, what presets are made for, groups, size and other arguments, and the calls of a step with the lengths
    of their texts, None for what the last call had."""

    make: Callable[[], Any]
    presets: str
    group: list[int]
    size: dict[str, Any]
    arguments: dict[str, Any]
    texts: tuple[int | None, ...] = (None,)


MODELS = {
    "flux": Model(tiny_flux.pipeline, "flux", [4, 4], PICTURE, {**tiny_flux.prompt(), **GUIDED}, texts=(None, None)),
    "flux2": Model(tiny_flux2.pipeline, "flux2", [4, 4], PICTURE, {**tiny_flux2.prompt(), "guidance_scale": 1.0}),
    "qwen": Model(
        tiny_qwen.pipeline,
        "qwen",
        [4, 4],
        PICTURE,
        {**tiny_qwen.prompt(7), **tiny_qwen.negative_prompt(5), "true_cfg_scale": 2.0},
        texts=(7, 5),
    ),
    "hunyuan": Model(tiny_hunyuan.pipeline, "hunyuan", [2, 3, 3], VIDEO, WAVES),
    "wan": Model(tiny_wan.pipeline, "wan", [2, 3, 3], VIDEO, {**WAVES, "guidance_scale": 3.0}, texts=(None, None)),
}


@pytest.mark.parametrize(
    ("name", "over_steps"),
    [
        *((name, {"reference": [0, 2]}) for name in MODELS),
        *((name, {"reference": [0, 2], "keep": "fp8"}) for name in MODELS),
        ("flux", {"reference": [0, 2], "between": "reuse"}),
        ("flux", {"reference": [0]}),
        ("flux", {"reference": [0, 3], "keep": "host"}),
        ("flux", {"reference": [0, 2], "between": "residual", "base": {"radius": 0}, "keep": "fp8"}),
        ("flux", [{"reference": [0], "layers": 0}, {"reference": [0, 2], "layers": "1-2", "keep": "fp8"}]),
    ],
)
def test_bytes_that_are_kept_are_those_foretold(name: str, over_steps: Any) -> None:
    model = MODELS[name]
    pipe = model.make()
    preset = Preset.model_validate(
        {
            "name": "test",
            "model": model.presets,
            "attention": {"variant": "b", "group": model.group, "radius": 1},
            "schedule": {"over_steps": over_steps},
        }
    )
    steps: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    with torch.no_grad(), grat_cli.install(pipe, preset, **model.size) as installation:
        pipe(**model.size, **model.arguments, **steps)
        last, carrying = installation.last_schedule, installation.carrying
        assert carrying is not None
        schedules = [last if length is None else installation.schedule(length) for length in model.texts]
        measured, kinds = carrying.most_kept_bytes, [carrying.kind_of_step(step) for step in range(4)]
    family = family_of_transformer(pipe.transformer)
    assert family is not None
    foretold = kept_bytes(schedules, family.transformer_shape(pipe.transformer.config), 4, on_cpu=True)
    assert foretold == (measured, 0, 0)
    assert measured
    assert kinds == [last.kind_of_step(step) for step in range(4)]


def flux_of(side: int, *items: str, model: str = "flux-dev") -> list[Forecast]:
    choice = choose_model(model)
    preset = select_preset(choice, variant="far", highres="off", set_items=items)
    return run_forecasts(preset, choice, Resolution(side, side))


def reference_steps(*more: str) -> tuple[str, ...]:
    return (f"schedule.over_steps.reference={SIX}", *(f"schedule.over_steps.{item}" for item in more))


def test_flux_keeps_700_kilobytes_a_token() -> None:
    (carried,) = flux_of(2048, *reference_steps())
    per_token = 57 * 3072 * 2 * 2
    assert carried.kept() == (per_token * (128 * 128 + 512), 0, 0)
    assert carried.kept("fp8").device == pytest.approx(carried.kept().device / 2, rel=0.002)
    in_main_memory = carried.kept("host")
    assert (in_main_memory.device, in_main_memory.host) == (0, carried.kept().device)
    assert in_main_memory.buffers < 0.06 * in_main_memory.host
    (reused,) = flux_of(2048, *reference_steps("between=reuse"))
    assert reused.kept().device == carried.kept().device / 2
    (some,) = flux_of(2048, *reference_steps('layers="0-18"'))
    assert some.kept().device == carried.kept().device / 3
    (none,) = flux_of(2048)
    assert none.kept() == (0, 0, 0)
    assert none.over_steps is None


def test_calls_of_guidance_are_kept_apart() -> None:
    choice = choose_model("hunyuan", "video")
    preset = select_preset(choice, variant="far", set_items=reference_steps())
    (video,) = run_forecasts(preset, choice, VideoSize(1280, 720, 129, 24))
    assert video.kept().device == pytest.approx(88e9, rel=0.01)
    demo = choose_model("demo")
    once, twice = (
        run_forecasts(
            select_preset(demo, variant="b", guidance=guidance, set_items=reference_steps()), demo, Resolution(256, 256)
        )[0].kept()
        for guidance in (1.0, 2.0)
    )
    assert twice.device == 2 * once.device


def test_density_and_time_count_what_runs() -> None:
    """A step that attention is carried to has no attention, no projections around it, and reads what is kept."""
    h200 = GPUS["h200"]
    (plain,), (carried,), (kept_apart,) = (
        flux_of(4096, *items) for items in ((), reference_steps(), reference_steps("keep=host"))
    )
    assert carried.schedule.density == pytest.approx(plain.schedule.density * 6 / 28)
    assert [carried.schedule.kind_of_step(step) for step in (0, 1, 3)] == ["reference", "carried", "reference"]
    assert sum(carried.schedule.parts[:3]) == pytest.approx(carried.schedule.density)
    width, tokens = 3072, 256 * 256 + 512
    # Query, key, value and output of 19 double blocks; of 38 single blocks all but the output.
    assert carried.carrying(1).flop == 2 * (19 * 4 + 38 * 3) * width**2 * tokens
    assert carried.carrying(0).flop == 0
    components = components_of(choose_model("flux-dev"))

    def seconds(run: Forecast, bandwidth: float = 4.8e12) -> float:
        device = replace(h200, bandwidth=bandwidth, link=h200.link)
        execution = judge([run], components, choose_model("flux-dev"), device).execution
        made = estimate_for(run, components, execution, device)
        assert made is not None
        return made["denoise"]

    assert seconds(carried) < 0.75 * seconds(plain)
    # What is in main memory arrives while the rest is at work, if there is time.
    assert seconds(kept_apart) >= seconds(carried)
    assert kept_apart.carrying(1).link_bytes == kept_apart.kept().host


def test_a_base_is_computed_at_every_step() -> None:
    section = "schedule.over_steps={reference: [0, 5], between: residual, base: {variant: b, radius: 0}, layers: 0}"
    (run,) = flux_of(1024, section)
    assert run.carrying(1).flop == 0
    assert run.schedule.kind_of_step(1) == "carried"
    told = run.over_steps
    assert told is not None
    assert (told["layers"], [group["count"] for group in told["steps"]]) == ("0", [2, 26])


def test_what_is_advised_for_memory_fits() -> None:
    choice, components = choose_model("flux-dev"), components_of(choose_model("flux-dev"))
    runs = flux_of(4096, *reference_steps())
    at_size = lambda size: flux_of(size.width, *reference_steps())  # noqa: E731
    verdict = judge(runs, components, choice, GPUS["h100-pcie"], at_size=at_size)
    assert not verdict.fits
    assert verdict.advice == "try --set schedule.over_steps.keep=host"
    followed = flux_of(4096, *reference_steps("keep=host"))
    assert judge(followed, components, choice, GPUS["h100-pcie"]).fits


def test_plans_show_references_and_work_by_part() -> None:
    choose = "attention.far={levels: [{beyond: 1, block: [4, 4]}], choose: {exact: 4, fine: 8, block: [2, 2]}}"
    items = [part for item in ("schedule.over_steps.reference=[0,5,10]", choose) for part in ("--set", item)]
    shown = grat("plan", "demo-far", *items).out
    assert "3 reference steps of 20 (1, 6, 11), attention" in shown
    assert "keeps 15.4 MiB on the device" in " ".join(shown.split())
    assert "selection 0.00" in shown
