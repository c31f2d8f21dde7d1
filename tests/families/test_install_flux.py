"""`grat_cli.install` on whole pipelines, against stock diffusers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.pipelines.flux.pipeline_flux_control import FluxControlPipeline
from diffusers.pipelines.flux.pipeline_flux_controlnet import FluxControlNetPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_inpaint import FluxInpaintPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
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
    snapshot,
)
from PIL import Image

import grat_cli
from grat_cli.attention.extrapolation import Extrapolation
from grat_cli.errors import BadInput
from grat_cli.families.time_shift import shift_of, time_shift
from grat_cli.generation.timing import StepRecorder
from grat_cli.presets import Preset

ONE_GREY_LEVEL = 1 / 255


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_flux.pipeline()


def init_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batch": 3},
        GUIDED,
        {"height": 8, "width": 264},
    ],
    ids=["plain", "batch", "guided", "one-row"],
)
def test_full_attention_equals_the_stock_pipeline(pipe: Any, arguments: dict[str, Any]) -> None:
    expected = call(pipe, **arguments)
    pictures = call(pipe, output_type="np", **arguments)
    size = {"height": arguments.get("height", HEIGHT), "width": arguments.get("width", WIDTH)}
    with grat_cli.install(pipe, preset(), **size):
        assert relative_difference(call(pipe, **arguments), expected) < RELATIVE_OF_PIPELINES
        assert np.abs(call(pipe, output_type="np", **arguments) - pictures).max() < ONE_GREY_LEVEL
    assert torch.equal(call(pipe, **arguments), expected)


def test_full_attention_equals_stock_image_to_image_and_guidance_embedding() -> None:
    pipe = tiny_flux.pipeline(tiny_flux.FluxImg2ImgPipeline, guidance=True)
    arguments = {"image": init_image(), "strength": 0.7, "guidance_scale": 4.0}
    expected = call(pipe, **arguments)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        assert relative_difference(call(pipe, **arguments), expected) < RELATIVE_OF_PIPELINES


class OwnPipeline(tiny_flux.FluxPipeline):
    """Of somebody else."""


def mask_image() -> Image.Image:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[HEIGHT // 4 : -HEIGHT // 4, WIDTH // 3 :] = 255
    return Image.fromarray(mask)


def test_a_pipeline_of_somebody_else_around_flux_is_served() -> None:
    pipe = tiny_flux.pipeline(OwnPipeline)
    expected = call(pipe)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        assert relative_difference(call(pipe), expected) < RELATIVE_OF_PIPELINES


def reference(height: int = 72, width: int = 104) -> dict[str, Any]:
    """A picture to refer to as `FluxKontextPipeline` takes it, of its own size: 9 x 13 tokens."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), np.uint8))
    return {"image": picture, "max_area": HEIGHT * WIDTH, "_auto_resize": False}


def with_pictures(kind: type[Any]) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline, and the pictures that it is given."""
    channels, arguments = {
        FluxInpaintPipeline: (16, {"image": init_image(), "mask_image": mask_image(), "strength": 0.7}),
        FluxFillPipeline: (96, {"image": init_image(), "mask_image": mask_image()}),
        FluxControlPipeline: (32, {"control_image": init_image()}),
        FluxKontextPipeline: (16, reference()),
    }[kind]
    transformer = tiny_flux.transformer(in_channels=channels, out_channels=16, guidance=True)
    return tiny_flux.pipeline(kind, transformer=transformer, vae=tiny_flux.autoencoder_of_distributions()), arguments


KINDS = (FluxInpaintPipeline, FluxFillPipeline, FluxControlPipeline, FluxKontextPipeline)
BATCH: dict[str, Any] = {"batch": 2, "guidance_scale": 4.0}


@pytest.mark.parametrize("kind", KINDS)
def test_full_attention_equals_stock_pipelines_that_are_given_pictures(kind: type[Any]) -> None:
    """In bf16 both are as far from fp32 as its roundings are."""
    pipe, pictures = with_pictures(kind)
    expected = call(pipe, **pictures, **BATCH)
    before = snapshot(pipe.transformer)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH) as installation:
        assert relative_difference(call(pipe, **pictures, **BATCH), expected) < RELATIVE_OF_PIPELINES
    assert installation.last_schedule.plans[0].tokens == tiny_flux.TEXT_TOKENS + GRID.tokens + (
        9 * 13 if kind is FluxKontextPipeline else 0
    )
    assert snapshot(pipe.transformer) == before
    assert torch.equal(call(pipe, **pictures, **BATCH), expected)

    pipe.to(torch.bfloat16)
    halves: dict[str, Any] = {name: tensor.bfloat16() for name, tensor in tiny_flux.prompt(2).items()}
    stock = call(pipe, **pictures, **BATCH, **halves)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        made = call(pipe, **pictures, **BATCH, **halves)
    error = relative_difference(stock.float(), expected)
    assert relative_difference(made.float(), expected) < 2 * error + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("variant", "radius", "cross"), [("b", 1, False), ("x", None, True)])
def test_patterns_equal_stock_pipelines_with_pictures_under_a_mask(
    kind: type[Any], variant: str, radius: int, cross: bool
) -> None:
    """References attend everything, and everything attends them."""
    pipe, pictures = with_pictures(kind)
    mask = raster_mask(GRID, radius, cross, 9 * 13 if kind is FluxKontextPipeline else 0)
    expected = call(pipe, **pictures, **BATCH, joint_attention_kwargs={"attention_mask": mask})
    with grat_cli.install(pipe, preset(variant), height=HEIGHT, width=WIDTH):
        result = call(pipe, **pictures, **BATCH)
    assert relative_difference(result, expected) < RELATIVE_OF_PIPELINES
    assert relative_difference(result, call(pipe, **pictures, **BATCH)) > 0.005


def test_references_and_guidance_by_a_negative_prompt_go_together() -> None:
    pipe, pictures = with_pictures(FluxKontextPipeline)
    expected = call(pipe, **pictures, **GUIDED)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH) as installation:
        assert relative_difference(call(pipe, **pictures, **GUIDED), expected) < RELATIVE_OF_PIPELINES
        alone = call(pipe, max_area=HEIGHT * WIDTH)
        assert installation.last_schedule.plans[0].tokens == tiny_flux.TEXT_TOKENS + GRID.tokens
    assert relative_difference(alone, call(pipe, max_area=HEIGHT * WIDTH)) < RELATIVE_OF_PIPELINES


def test_stock_modules_prepare_attention_with_references() -> None:
    pipe, pictures = with_pictures(FluxKontextPipeline)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH) as installation:
        call(pipe, **pictures)
        assert installation.preparation == "stock modules: the fused kernel knows no tokens of references"


def test_positions_are_not_fitted_with_references() -> None:
    pipe, pictures = with_pictures(FluxKontextPipeline)
    fitted = Extrapolation((9, 13), "ntk", proportional_attention=True)
    with pytest.raises(BadInput, match="not fitted where there are references"):
        enter(pipe, preset(), called_with=pictures, extrapolation=fitted)


def test_residuals_of_a_control_net_are_refused() -> None:
    controlnet = FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 6, 6],
    )
    pipe = tiny_flux.pipeline(FluxControlNetPipeline, controlnet=controlnet)
    with pytest.raises(BadInput, match="ControlNet is not supported"):
        enter(pipe, preset(), called_with={"control_image": init_image()})


@pytest.mark.parametrize(("variant", "radius", "cross"), [("b", 1, False), ("x", None, True), ("bx", 1, True)])
def test_patterns_equal_the_stock_pipeline_under_a_mask(pipe: Any, variant: str, radius: int, cross: bool) -> None:
    mask = raster_mask(GRID, radius, cross)
    arguments = {**tiny_flux.negative_prompt(2), "true_cfg_scale": 2.0, "batch": 2}
    expected = call(pipe, **arguments, joint_attention_kwargs={"attention_mask": mask})
    with grat_cli.install(pipe, preset(variant), height=HEIGHT, width=WIDTH):
        result = call(pipe, **arguments)
    assert relative_difference(result, expected) < RELATIVE_OF_PIPELINES
    assert relative_difference(result, call(pipe, **arguments)) > 0.01


@pytest.mark.parametrize("guided", [False, True])
def test_each_step_takes_its_own_attention(pipe: Any, guided: bool) -> None:
    """Dense, then GRAT-X, then GRAT-B: the same masks are handed to stock attention call by call."""
    masks = [raster_mask(GRID, 99, False), raster_mask(GRID, None, True), raster_mask(GRID, 1, False)]
    arguments = GUIDED if guided else {}
    calls_per_step = 2 if guided else 1
    counted = []

    def hand_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = masks[len(counted) // calls_per_step]
        counted.append(mask)
        return args, kwargs | {"joint_attention_kwargs": {"attention_mask": mask}}

    handle = pipe.transformer.register_forward_pre_hook(hand_mask, with_kwargs=True)
    expected = call(pipe, **arguments)
    handle.remove()
    assert len(counted) == 3 * calls_per_step

    recorder = StepRecorder()
    rules = {"dense_steps": 1, "rules": [{"steps": "2-3", "variant": "b", "radius": 1}]}
    with grat_cli.install(pipe, preset("x", rules), height=HEIGHT, width=WIDTH, observer=recorder) as installation:
        result = call(pipe, **arguments)
    assert relative_difference(result, expected) < RELATIVE_OF_PIPELINES
    densities = [mask.float().mean().item() for mask in masks]
    assert [step.density for step in recorder.steps([1.0, 2.0, 3.0])] == pytest.approx(densities)
    assert installation.last_schedule.density == pytest.approx(np.mean(densities))


def test_image_to_image_counts_steps_from_the_first_that_is_run() -> None:
    pipe = tiny_flux.image_to_image()
    recorder = StepRecorder()
    with grat_cli.install(
        pipe, preset("b", {"dense_steps": 1}), height=HEIGHT, width=WIDTH, observer=recorder
    ) as installation:
        call(pipe, image=init_image(), strength=0.5, num_inference_steps=6)
    assert installation.last_schedule.steps == 3
    first, *others = [step.density for step in recorder.steps([3.0, 2.0, 1.0])]
    assert first == 1
    assert others == pytest.approx([raster_mask(GRID, 1, False).float().mean().item()] * 2)


def test_timing_adds_up(pipe: Any) -> None:
    recorder = StepRecorder()
    with grat_cli.install(pipe, preset("x"), height=HEIGHT, width=WIDTH, observer=recorder):
        call(pipe, **GUIDED)
    steps = recorder.steps(pipe.scheduler.timesteps.tolist())
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.timestep for step in steps] == pytest.approx(pipe.scheduler.timesteps.tolist())
    for step in steps:
        assert 0 < step.attention_ms < step.total_ms
        assert step.attention_ms + step.other_ms == pytest.approx(step.total_ms)


def test_the_denoising_loop_never_reads_from_the_device(pipe: Any) -> None:
    """But for the first call, which checks the image positions."""
    with grat_cli.install(pipe, preset("x"), height=HEIGHT, width=WIDTH, observer=StepRecorder()):
        watching = NoHostReads()
        calls = []

        def watch(module: Any, args: Any) -> None:
            calls.append(module)
            if len(calls) == 2:
                watching.__enter__()

        handle = pipe.transformer.register_forward_pre_hook(watch)
        try:
            call(pipe)
        finally:
            handle.remove()
            if len(calls) > 1:
                watching.__exit__(None, None, None)
    assert len(calls) == 3


def test_leaving_restores_the_pipeline_after_an_exception(pipe: Any) -> None:
    before, scheduler = snapshot(pipe.transformer), pipe.scheduler

    def fail(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("in a callback")

    with (
        pytest.raises(RuntimeError, match="in a callback"),
        grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH),
    ):
        call(pipe, callback_on_step_end=fail)
    assert snapshot(pipe.transformer) == before
    assert pipe.scheduler is scheduler


def test_a_second_install_is_refused_and_leaves_the_first(pipe: Any) -> None:
    expected = call(pipe)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        with (
            pytest.raises(BadInput, match="already installed"),
            grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH),
        ):
            pass
        assert relative_difference(call(pipe), expected) < RELATIVE_OF_PIPELINES


def enter(
    pipe: Any, chosen: Any, height: int = HEIGHT, width: int = WIDTH, called_with: Any = None, **options: Any
) -> None:
    with grat_cli.install(pipe, chosen, height=height, width=width, **options):
        call(pipe, **(called_with or {}))


def test_what_does_not_fit_is_refused_in_words(pipe: Any) -> None:
    with pytest.raises(BadInput, match=r"installed for 18x18 = 324 image tokens, the call has 468"):
        enter(pipe, preset(), HEIGHT, HEIGHT)
    with pytest.raises(BadInput, match="in this order"):
        enter(pipe, preset(), WIDTH, HEIGHT)
    with pytest.raises(BadInput, match="multiples of 8 for this model, not 145 and 208: the nearest are 144 and 208"):
        enter(pipe, preset(), 145)
    with pytest.raises(BadInput, match="DiffusionPipeline is not supported: use one of FluxPipeline"):
        enter(type("DiffusionPipeline", (), {})(), preset())
    with pytest.raises(BadInput, match="no-such-preset"):
        enter(pipe, "no-such-preset")
    with pytest.raises(BadInput, match="unknown backend 'tritn': did you mean 'triton'"):
        enter(pipe, preset(), backend="tritn")
    with pytest.raises(BadInput, match="installed for 2 steps, the call runs 3"):
        enter(pipe, preset(), steps=2)
    video = Preset.model_validate(
        {"name": "test", "model": "hunyuan", "attention": {"variant": "x", "group": [4, 8, 8]}}
    )
    with pytest.raises(BadInput, match="preset test is for hunyuan models, the pipeline is a FluxPipeline"):
        enter(pipe, video)


class OtherScheduler:
    """One that keeps no step index."""


def test_a_scheduler_that_does_not_count_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "scheduler", OtherScheduler())
    with pytest.raises(BadInput, match="OtherScheduler does not count its steps"):
        enter(pipe, preset())


def test_a_backend_by_name_runs_or_says_why_not(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = call(pipe)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH, backend="reference") as installation:
        assert installation.backend.value == "reference"
        assert relative_difference(call(pipe), expected) < RELATIVE_OF_PIPELINES
    from grat_kernels import triton_backend

    monkeypatch.setattr(triton_backend, "obstacle", lambda *arguments: "no GPU in sight")
    with pytest.raises(BadInput, match="triton backend cannot run here: no GPU in sight"):
        enter(pipe, preset(), backend="triton")
    chosen = preset().model_copy(update={"kernel": preset().kernel.model_copy(update={"backend": "auto"})})
    with grat_cli.install(pipe, chosen, height=HEIGHT, width=WIDTH) as installation:
        assert installation.backend.value == "sdpa"


def test_time_shift_ends_where_training_did(pipe: Any) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = {tokens: np.log(shift_of(scheduler, tokens, None)) for tokens in (256, 4096, 262_144)}
    assert mu == pytest.approx({256: 0.5, 4096: 1.15, 262_144: 1.15})
    assert shift_of(scheduler, 4096, 3.0) == 3.0
    assert shift_of(FlowMatchEulerDiscreteScheduler(shift=2.0), 4096, None) == 2.0


def run_sigmas(pipe: Any) -> list[float]:
    call(pipe)
    return pipe.scheduler.sigmas.tolist()


def test_time_shift_of_a_run_reaches_the_pipeline_and_is_undone(pipe: Any) -> None:
    stock, stock_sigmas = pipe.scheduler, run_sigmas(pipe)
    plain = np.linspace(1, 1 / 3, 3)
    for fixed in (1.0, 10.0):
        with time_shift(pipe, GRID.tokens, fixed) as shift:
            assert shift == fixed
            assert run_sigmas(pipe)[:3] == pytest.approx(list(fixed * plain / (1 + (fixed - 1) * plain)))
    with time_shift(pipe, GRID.tokens, None) as shift:
        assert run_sigmas(pipe) == stock_sigmas
        assert stock_sigmas[:3] == pytest.approx(list(shift * plain / (1 + (shift - 1) * plain)))
    # As if trained up to 64 tokens, so that 468 are beyond.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64
    )
    with time_shift(pipe, GRID.tokens, None) as shift:
        assert np.log(shift) == pytest.approx(1.15)
        assert run_sigmas(pipe)[:3] == pytest.approx(list(shift * plain / (1 + (shift - 1) * plain)))
    with pytest.warns(UserWarning, match="extrapolates its time shift"):
        enter(pipe, preset())
    with warnings.catch_warnings(), time_shift(pipe, GRID.tokens, None):
        warnings.simplefilter("error")
        enter(pipe, preset())
    pipe.scheduler = stock
