"""`grat_cli.install` on whole HunyuanVideo pipelines, against stock diffusers with its padding and its mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_hunyuan
import torch
from diffusers.models.transformers.transformer_hunyuan_video_framepack import HunyuanVideoFramepackTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_skyreels_image2video import HunyuanSkyreelsImageToVideoPipeline
from flux_runs import NoHostReads, relative_difference
from hunyuan_runs import raster_mask, snapshot, under_masks

import grat_cli
from grat_cli.errors import BadInput
from grat_cli.generation.timing import StepRecorder
from grat_cli.presets import Preset
from grat_kernels import Grid

HEIGHT, WIDTH, FRAMES = 80, 112, 13  # 4 x 5 x 7 tokens: ragged groups of 2x3x3
GRID = Grid((4, 5, 7))
STEPS = 3
# Three steps of a model whose layers differ by a few fp32 roundings.
RELATIVE = 2e-5
TWO_GREY_LEVELS = 2 / 255

LONG, SHORT = "waves at night under a red boat that sails across", "snow"


def preset(variant: str = "full", schedule: dict[str, Any] | None = None, **attention: Any) -> Preset:
    return Preset.model_validate(
        {
            "name": "test",
            "model": "hunyuan",
            "attention": {"variant": variant, "group": [2, 3, 3], **attention},
            "schedule": schedule or {},
            "kernel": {"backend": "sdpa"},
        }
    )


SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
GUIDED: dict[str, Any] = {"negative_prompt": "", "true_cfg_scale": 3.0}


def call(pipe: Any, prompt: str | list[str] = LONG, **arguments: Any) -> Any:
    """What the pipeline returns for seed 5: latents, unless another output is asked for."""
    defaults = {
        "prompt": prompt,
        **SIZE,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
        "max_sequence_length": 16,
    }
    return pipe(**(defaults | arguments)).frames


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_hunyuan.pipeline()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": [LONG, SHORT]},
        GUIDED,
        {
            "prompt": [SHORT, LONG],
            "negative_prompt": ["a dull long grey sea with boats", ""],
            "true_cfg_scale": 3.0,
        },
        {"num_frames": 1, "height": 16, "width": 96},
    ],
    ids=["one", "two-lengths", "guided", "two-lengths-guided", "one-row"],
)
def test_full_attention_equals_the_stock_pipeline(pipe: Any, arguments: dict[str, Any]) -> None:
    expected = call(pipe, **arguments)
    frames = call(pipe, output_type="np", **arguments)
    size = SIZE | {name: arguments[name] for name in SIZE if name in arguments}
    before = snapshot(pipe.transformer)
    with grat_cli.install(pipe, preset(), **size) as installation:
        assert relative_difference(call(pipe, **arguments), expected) < RELATIVE
        assert np.abs(call(pipe, output_type="np", **arguments) - frames).max() < TWO_GREY_LEVELS
    assert snapshot(pipe.transformer) == before
    assert torch.equal(call(pipe, **arguments), expected)
    assert installation.last_schedule.grid.shape == tuple(
        (size["num_frames"] - 1) // 4 + 1 if axis == 0 else side // 16
        for axis, side in enumerate((0, size["height"], size["width"]))
    )


def test_prompts_of_other_lengths_take_plans_of_their_own(pipe: Any) -> None:
    """Classifier-free guidance calls the transformer twice per step, with texts of different lengths."""
    lengths = []
    with grat_cli.install(pipe, preset("b"), **SIZE) as installation:
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
        try:
            call(pipe, **GUIDED)
        finally:
            hook.remove()
        assert len(installation._schedules) == 2
    # Hooks run in order of registration: this one sees what the adapter has cut.
    words = len(LONG.split())
    assert len(set(lengths)) == 2
    assert max(lengths) >= words
    assert lengths == [lengths[0], lengths[1]] * STEPS


@pytest.mark.parametrize(
    ("attention", "radius", "share"),
    [({"variant": "b", "radius": [0, 1, 1]}, (0, 1, 1), None), ({"variant": "x", "share": 2}, None, 2)],
)
def test_patterns_equal_the_stock_transformer_under_a_mask(
    pipe: Any, attention: dict[str, Any], radius: tuple[int, ...] | None, share: int | None
) -> None:
    """One transformer call of the pipeline, whose inputs are handed to stock attention under a mask."""
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs, output[0]))

    # Registered first, so that it is called with the pipeline's own arguments.
    with grat_cli.install(pipe, preset(**attention), **SIZE):
        hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
        try:
            call(pipe, [LONG, SHORT], num_inference_steps=1)
        finally:
            hook.remove()
    ((inputs, result),) = seen
    expected = under_masks(pipe.transformer, inputs, raster_mask(GRID, radius, share))
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, pipe.transformer(**inputs)[0]) > 0.01


def densities(pipe: Any, chosen: Preset, calls: int = 1, **options: Any) -> list[float]:
    """What an observer is told of every step."""
    recorder = StepRecorder()
    arguments = {"sigmas": options.pop("sigmas")} if "sigmas" in options else {}
    with grat_cli.install(pipe, chosen, **SIZE, observer=recorder, **options):
        for _ in range(calls):
            call(pipe, **arguments)
    return [step.density for step in recorder.steps([0.0] * 10)]


def test_each_step_takes_its_own_attention(pipe: Any) -> None:
    chosen = preset("x", {"dense_steps": 1, "rules": [{"steps": "2-3", "variant": "b", "radius": 0}]}, share=2)
    first, second, third = densities(pipe, chosen)
    assert first == 1
    assert 1 > second > third


@pytest.mark.parametrize("begun", [1, 2])
def test_a_run_that_goes_on_takes_the_steps_of_the_whole_run(pipe: Any, begun: int) -> None:
    """The rest of the sigmas and the latents so far: the same steps, the same attention, the same result."""
    chosen = preset("x", {"dense_steps": 1, "rules": [{"steps": "2-3", "variant": "b", "radius": 0}]}, share=2)
    kept: dict[int, torch.Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept[step + 1] = tensors["latents"].clone()
        return {}

    with grat_cli.install(pipe, chosen, **SIZE):
        whole = call(pipe, callback_on_step_end=keep)
    sigmas = np.linspace(1.0, 0.0, STEPS + 1)[:-1][begun:]
    recorder = StepRecorder()
    with grat_cli.install(pipe, chosen, **SIZE, first_step=begun, steps=STEPS, observer=recorder):
        rest = call(pipe, latents=kept[begun], sigmas=sigmas, num_inference_steps=STEPS - begun)
    assert torch.equal(rest, whole)
    assert [step.index for step in recorder.steps([0.0] * STEPS)] == list(range(begun, STEPS))
    # Without a number of steps, those before and those that are run make the whole.
    with grat_cli.install(pipe, chosen, **SIZE, first_step=begun):
        assert torch.equal(call(pipe, latents=kept[begun], sigmas=sigmas), whole)


def test_leaving_restores_the_pipeline_after_an_exception(pipe: Any) -> None:
    before, scheduler, expected = snapshot(pipe.transformer), pipe.scheduler, call(pipe)

    def fail(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("in a callback")

    with pytest.raises(RuntimeError, match="in a callback"), grat_cli.install(pipe, preset("b"), **SIZE):
        call(pipe, callback_on_step_end=fail)
    assert snapshot(pipe.transformer) == before
    assert pipe.scheduler is scheduler
    assert torch.equal(call(pipe), expected)


def test_the_denoising_loop_never_reads_from_the_device(pipe: Any) -> None:
    """But for the first call with each text, which reads its mask."""
    with grat_cli.install(pipe, preset("x"), **SIZE, observer=StepRecorder()):
        watching, calls = NoHostReads(), []

        def watch(module: Any, args: Any) -> None:
            calls.append(module)
            if len(calls) == 3:
                watching.__enter__()

        handle = pipe.transformer.register_forward_pre_hook(watch)
        try:
            call(pipe, **GUIDED)
        finally:
            handle.remove()
            if len(calls) > 2:
                watching.__exit__(None, None, None)
    assert len(calls) == 2 * STEPS


def enter(pipe: Any, chosen: Any, **options: Any) -> None:
    arguments = {name: options.pop(name) for name in ("called_with",) if name in options}
    with grat_cli.install(pipe, chosen, **(SIZE | options)):
        call(pipe, **arguments.get("called_with", {}))


def test_what_does_not_fit_is_refused_in_words(pipe: Any) -> None:
    with pytest.raises(BadInput, match=r"installed for 3x5x7 video tokens .* the call has 4x5x7"):
        enter(pipe, preset(), num_frames=9)
    with pytest.raises(BadInput, match=r"installed for 4x4x7 video tokens .* the call has 4x5x7: give the pipeline"):
        enter(pipe, preset(), height=64)
    with pytest.raises(BadInput, match=r"installed for 4x7x5 video tokens"):
        enter(pipe, preset(), height=WIDTH, width=HEIGHT)
    with pytest.raises(BadInput, match=r"num_frames must be 4k\+1 for this model, not 12: use 9 or 13"):
        enter(pipe, preset(), num_frames=12)
    with pytest.raises(BadInput, match=r"num_frames must be 4k\+1 for this model, not 0: use 1 or 5"):
        enter(pipe, preset(), num_frames=0)
    with pytest.raises(BadInput, match="makes videos: give num_frames"):
        enter(pipe, preset(), num_frames=None)
    with pytest.raises(BadInput, match="multiples of 16 for this model, not 90 and 112: the nearest are 96 and 112"):
        enter(pipe, preset(), height=90)
    with pytest.raises(BadInput, match=r"preset flux-x is for flux models, the pipeline is a Hunyuan.*: use one of"):
        enter(pipe, "flux-x")
    with pytest.raises(BadInput, match="first_step 3 is none of the run's steps"):
        enter(pipe, preset(), first_step=3, steps=3)
    with pytest.raises(BadInput, match="installed for 4 steps, the call runs 3 from step 2 on"):
        enter(pipe, preset(), first_step=2, steps=4)
    with pytest.raises(BadInput, match=r"HunyuanSkyreelsImageToVideoPipeline is not supported \(it starts from a pict"):
        enter(HunyuanSkyreelsImageToVideoPipeline.__new__(HunyuanSkyreelsImageToVideoPipeline), preset())


def test_other_transformers_are_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):  # of its real size, but without memory
        framepack = HunyuanVideoFramepackTransformer3DModel(num_layers=1, num_single_layers=1)
    monkeypatch.setattr(pipe, "transformer", framepack)
    with pytest.raises(BadInput, match="the transformer is a HunyuanVideoFramepackTransformer3DModel"):
        enter(pipe, preset())


def test_a_backend_by_name_runs(pipe: Any) -> None:
    expected = call(pipe)
    with grat_cli.install(pipe, preset(), **SIZE, backend="reference") as installation:
        assert installation.backend.value == "reference"
        assert relative_difference(call(pipe), expected) < RELATIVE


def test_shipped_presets_run(pipe: Any) -> None:
    """One of each kind on a size that their groups of 4x8x8 cut."""
    size: dict[str, Any] = {"height": 144, "width": 176, "num_frames": 17}
    results = {}
    for variant in ("full", "b", "planes", "lines", "bx", "far", "sta"):
        with grat_cli.install(pipe, f"hunyuan-{variant}", **size):
            results[variant] = call(pipe, num_inference_steps=1, **size)
        assert results[variant].isfinite().all()
    assert relative_difference(results["full"], call(pipe, num_inference_steps=1, **size)) < RELATIVE
    assert all(relative_difference(results[name], results["full"]) > 1e-4 for name in ("planes", "lines"))
