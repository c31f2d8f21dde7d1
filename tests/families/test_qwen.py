"""Qwen-Image against stock diffusers: full attention, patterns through masks in raster order, pictures, restoring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qwen
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers import transformer_qwenimage
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_controlnet import QwenImageControlNetPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_inpaint import QwenImageEditInpaintPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_img2img import QwenImageImg2ImgPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_inpaint import QwenImageInpaintPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_layered import QwenImageLayeredPipeline
from flux_runs import NoHostReads, relative_difference
from small_runs import Progress, broken_off, generate, names, untimed
from torch.utils.flop_counter import FlopCounterMode
from tracked_memory import track
from transformers import Qwen2VLProcessor

import grat_cli
from grat_cli.attention.extrapolation import Extrapolation
from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.bench.random_weights import random_transformer, step_inputs
from grat_cli.errors import BadInput
from grat_cli.estimates.memory import Execution, denoise_moments
from grat_cli.families import FAMILIES
from grat_cli.families import qwen as qwen_family
from grat_cli.families.autoencoders import Coding, Pixels, QwenImageAutoencoder
from grat_cli.families.base import Call, Pictures
from grat_cli.families.qwen import Qwen, QwenAdapter, QwenShape, TextAndPictures
from grat_cli.families.shapes import Components
from grat_cli.generation.checkpoint import read_run
from grat_cli.generation.request import Request
from grat_cli.generation.timing import StepRecorder
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import load_model
from grat_cli.presets import Preset, load_preset
from grat_kernels import Backend, Grid

HEIGHT, WIDTH = 144, 208
GRID = Grid((9, 13))  # ragged groups of 4x4
GROUP = (4, 4)
STEPS = 3
RELATIVE = 1e-5
SMALL_AREA = 96 * 96
GUIDED: dict[str, Any] = {**tiny_qwen.negative_prompt(3, 5), "true_cfg_scale": 3.0}
FAMILY = FAMILIES["qwen"]


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def _small_references() -> Iterator[None]:
    """References of 96x96 pixels in place of a megapixel."""
    with pytest.MonkeyPatch.context() as patch:
        stock = pipeline_qwenimage_edit.calculate_dimensions
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint):
            patch.setattr(module, "calculate_dimensions", lambda area, ratio: stock(SMALL_AREA, ratio))
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SMALL_AREA)
        patch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", SMALL_AREA)
        patch.setattr(qwen_family, "_REFERENCE_AREA", SMALL_AREA)
        patch.setattr(qwen_family, "_GLANCE_AREA", SMALL_AREA)
        yield


def preset(variant: str = "full", schedule: dict[str, Any] | None = None, **attention: Any) -> Preset:
    return Preset.model_validate(
        {
            "name": "test",
            "model": "qwen",
            "attention": {"variant": variant, "group": [*GROUP], **attention},
            "schedule": schedule or {},
            "kernel": {"backend": "sdpa"},
        }
    )


def picture() -> Any:
    return tiny_qwen.picture(WIDTH, HEIGHT)


# Of each kind of pipeline what it takes besides a prompt; pipelines that edit make one picture at a time.
KINDS: dict[str, tuple[type[Any], Callable[[], dict[str, Any]]]] = {
    "text": (QwenImagePipeline, dict),
    "start": (QwenImageImg2ImgPipeline, lambda: {"image": picture(), "strength": 0.7}),
    "mask": (
        QwenImageInpaintPipeline,
        lambda: {"image": picture(), "mask_image": tiny_qwen.mask(WIDTH, HEIGHT), "strength": 0.7},
    ),
    "edit": (QwenImageEditPipeline, lambda: {"image": tiny_qwen.picture(90, 120, 1)}),
    "edit-plus": (
        QwenImageEditPlusPipeline,
        lambda: {"image": [tiny_qwen.picture(90, 120, 1), tiny_qwen.picture(120, 60, 2)]},
    ),
}


def call(pipe: Any, lengths: tuple[int, ...] = (7,), **arguments: Any) -> torch.Tensor:
    """Latents of a pipeline for seed 5."""
    defaults = {
        **tiny_qwen.prompt(*lengths),
        "true_cfg_scale": 1.0,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
    }
    return pipe(**(defaults | arguments)).images


def snapshot(model: Any) -> Any:
    """Everything that an adapter may touch."""
    hooks = [
        (list(module._forward_pre_hooks), list(module._forward_hooks), sorted(vars(module)))
        for module in (model, model.pos_embed, *model.transformer_blocks)
    ]
    return [id(block.attn.processor) for block in model.transformer_blocks], hooks


# ---- Whole pipelines


@pytest.mark.parametrize("guided", [False, True], ids=["once", "guided"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_attention_equals_the_stock_pipeline(kind: str, guided: bool) -> None:
    """Batches of prompts of two lengths where the pipeline takes them."""
    pipeline, taken = KINDS[kind]
    batched = not kind.startswith("edit")
    pipe = tiny_qwen.pipeline(pipeline)
    guidance = {**tiny_qwen.negative_prompt(*((3, 5) if batched else (3,))), "true_cfg_scale": 3.0} if guided else {}
    arguments = {"lengths": (7, 4) if batched else (6,), **taken(), **guidance}
    expected, before = call(pipe, **arguments), snapshot(pipe.transformer)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH) as installation:
        result = call(pipe, **arguments)
        assert snapshot(pipe.transformer) != before
    assert relative_difference(result, expected) < RELATIVE
    assert snapshot(pipe.transformer) == before
    assert torch.equal(call(pipe, **arguments), expected)
    assert installation.preparation == "stock modules"


def test_inpainting_by_a_pipeline_that_edits_equals_stock() -> None:
    """It makes pictures of the area of its references, whatever else is asked for."""
    pipe = tiny_qwen.pipeline(QwenImageEditInpaintPipeline)
    arguments = {"image": tiny_qwen.picture(96, 96), "mask_image": tiny_qwen.mask(96, 96), "strength": 0.9}
    expected = call(pipe, **arguments)
    with grat_cli.install(pipe, preset(), height=96, width=96):
        assert relative_difference(call(pipe, **arguments), expected) < RELATIVE


@pytest.mark.parametrize("kind", ["text", "edit-plus"])
def test_in_bfloat16_full_attention_is_as_near_to_fp32_as_stock_is(kind: str) -> None:
    pipeline, taken = KINDS[kind]
    arguments = taken()
    exact = call(tiny_qwen.pipeline(pipeline), **arguments)
    halved: Any = tiny_qwen.transformer()
    pipe = tiny_qwen.pipeline(pipeline, transformer=halved.bfloat16(), vae=tiny_qwen.autoencoder().bfloat16())
    halves: dict[str, Any] = {"prompt_embeds": tiny_qwen.prompt(7)["prompt_embeds"].bfloat16()}
    stock = call(pipe, **arguments, **halves).float()
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        ours = call(pipe, **arguments, **halves).float()
    assert relative_difference(ours, exact) < 2 * relative_difference(stock, exact) + 2**-8


def test_references_of_a_model_that_modulates_them_apart_equal_stock() -> None:
    """As of Qwen-Image-Edit-2511."""
    pipe = tiny_qwen.pipeline(QwenImageEditPlusPipeline, transformer=tiny_qwen.transformer(zero_cond_t=True))
    arguments = KINDS["edit-plus"][1]()
    expected = call(pipe, **arguments)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        assert relative_difference(call(pipe, **arguments), expected) < RELATIVE


def test_each_step_takes_its_own_attention_and_prompts_their_own_plans() -> None:
    pipe, recorder = tiny_qwen.pipeline(), StepRecorder()
    chosen = preset("x", {"dense_steps": 1, "rules": [{"steps": "2-3", "variant": "b", "radius": 0}]}, share=1)
    with grat_cli.install(pipe, chosen, height=HEIGHT, width=WIDTH, observer=recorder) as installation:
        call(pipe, (7,), **GUIDED | tiny_qwen.negative_prompt(3))
        assert sorted(text for text, *_ in installation._schedules) == [3, 7]
    first, second, third = (step.density for step in recorder.steps([0.0] * STEPS))
    assert first == 1
    assert 1 > second > third


def test_leaving_restores_the_pipeline_after_an_exception() -> None:
    pipe = tiny_qwen.pipeline()
    expected, before = call(pipe), snapshot(pipe.transformer)

    def fail(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("in a callback")

    with (
        pytest.raises(RuntimeError, match="in a callback"),
        grat_cli.install(pipe, preset("b"), height=HEIGHT, width=WIDTH),
    ):
        call(pipe, callback_on_step_end=fail)
    assert snapshot(pipe.transformer) == before
    assert torch.equal(call(pipe), expected)


def test_the_denoising_loop_never_reads_from_the_device() -> None:
    """But for the first call with each text, which reads its mask."""
    pipe = tiny_qwen.pipeline()
    with grat_cli.install(pipe, preset("x"), height=HEIGHT, width=WIDTH):
        watching, calls = NoHostReads(), []

        def watch(module: Any, args: Any) -> None:
            calls.append(module)
            if len(calls) == 3:
                watching.__enter__()

        handle = pipe.transformer.register_forward_pre_hook(watch)
        try:
            call(pipe, (7, 4), **GUIDED)
        finally:
            handle.remove()
            if len(calls) > 2:
                watching.__exit__(None, None, None)
    assert len(calls) == 2 * STEPS


# ---- Patterns, by a mask in raster order


def laid_out(chosen: Preset, text: int, references: int = 0) -> AttentionSchedule:
    return AttentionSchedule(chosen, GRID, text, True, 1, tiny_qwen.LAYERS, references=references)


class Run:
    """A run that stands at the first step of a schedule."""

    def __init__(self, schedule: AttentionSchedule) -> None:
        self._schedule = schedule

    def current_step(self) -> int:
        return 0

    def schedule(self, text_len: int, references: int = 0) -> AttentionSchedule:
        return self._schedule


@contextmanager
def under_mask(image: np.ndarray, text: int) -> Iterator[None]:
    """While inside, stock attention sees a mask between image tokens `[N, N]`; text and references see all."""
    module: Any = transformer_qwenimage
    stock, allowed = module.dispatch_attention_fn, torch.from_numpy(image)

    def masked(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        whole = torch.ones(query.shape[0], 1, query.shape[1], query.shape[1], dtype=torch.bool)
        whole[:, :, text : text + len(allowed), text : text + len(allowed)] = allowed
        return stock(query, key, value, attn_mask=whole if attn_mask is None else whole & attn_mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_qwenimage, "dispatch_attention_fn", masked)
        yield


def raster_mask(radius: int | None) -> np.ndarray:
    """What GRAT-B of a radius, or GRAT-X, allows between image tokens; without the project's own code."""
    coordinates = np.stack(np.unravel_index(np.arange(GRID.tokens), GRID.shape), axis=1) // GROUP
    apart = np.abs(coordinates[:, None] - coordinates[None, :])
    return np.asarray((apart <= radius).all(-1) if radius is not None else (apart == 0).any(-1))


@pytest.mark.parametrize("references", [(), ((4, 5), (3, 2))], ids=["alone", "references"])
@pytest.mark.parametrize("lengths", [(7,), (7, 4), (2, 3)])
@pytest.mark.parametrize(("attention", "radius"), [({"variant": "b", "radius": 1}, 1), ({"variant": "x"}, None)])
def test_patterns_equal_stock_attention_under_a_mask(
    attention: dict[str, Any], radius: int | None, lengths: tuple[int, ...], references: Any
) -> None:
    model = tiny_qwen.transformer(zero_cond_t=bool(references))
    inputs = tiny_qwen.inputs(GRID.shape, *lengths, references=references)
    with under_mask(raster_mask(radius), inputs["encoder_hidden_states"].shape[1]):
        expected = model(**inputs)[0]
    count = sum(rows * columns for rows, columns in references)
    schedule = laid_out(preset(**attention), max(lengths), count)
    before = snapshot(model)
    with QwenAdapter(model, GRID).attached(Run(schedule), Backend.SDPA):
        result = model(**inputs)[0]
    assert snapshot(model) == before
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, model(**inputs)[0]) > 0.005, "the mask makes no difference: this shows nothing"


@pytest.mark.parametrize("with_mask", [True, False])
def test_padding_beyond_the_longest_text_takes_no_part(with_mask: bool) -> None:
    model = tiny_qwen.transformer()
    inputs = tiny_qwen.inputs(GRID.shape, 3, 5)
    expected = model(**inputs)[0]
    padded = dict(inputs)
    if with_mask:
        padded["encoder_hidden_states"] = torch.cat([inputs["encoder_hidden_states"], torch.randn(2, 6, 32)], dim=1)
        padded["encoder_hidden_states_mask"] = torch.nn.functional.pad(inputs["encoder_hidden_states_mask"], (0, 6))
    else:
        padded["encoder_hidden_states_mask"] = None
        expected = model(**padded)[0]
    with QwenAdapter(model, GRID).attached(Run(laid_out(preset(), 5)), Backend.SDPA):
        result = model(**padded)[0]
        named = model(**padded | {"return_dict": True}).sample
    assert relative_difference(result, expected) < RELATIVE
    assert torch.equal(result, named)


# ---- Larger grids than the trained one


@contextmanager
def with_slower_turns(model: Any, trained: tuple[int, int]) -> Iterator[None]:
    """While inside, positions are those of stock tables whose base grows as in "NTK-aware" scaling (YaRN, section 3.1).

    Text lies where it would lie beside a picture of the trained grid.
    """
    module = model.pos_embed
    slower, plain = copy.copy(module), type(module).forward
    index = torch.arange(4096)
    for name, places in (("pos_freqs", index), ("neg_freqs", index.flip(0) * -1 - 1)):
        parts = [module.rope_params(places, module.axes_dim[0], module.theta)]
        for channels, side, once in zip(module.axes_dim[1:], GRID.shape, trained, strict=True):
            growth = max(1.0, side / once) ** (channels / (channels - 2))
            parts.append(module.rope_params(places, channels, module.theta * growth))
        setattr(slower, name, torch.cat(parts, dim=1))

    def forward(shapes: Any, device: Any = None, max_txt_seq_len: Any = None) -> Any:
        sides = [min(pair) for pair in zip(GRID.shape, trained, strict=True)]
        _, text = plain(module, [[(1, *sides)]], device, max_txt_seq_len)
        # Not by its own method, which remembers tables by the module that it is of.
        whole = [(part[0], *part[1:]) for part in shapes[0]]
        tables = [type(module)._compute_video_freqs.__wrapped__(slower, *part, at) for at, part in enumerate(whole)]
        stock = [type(module)._compute_video_freqs.__wrapped__(module, *part, at) for at, part in enumerate(whole)]
        return torch.cat([tables[0], *stock[1:]]), text

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@pytest.mark.parametrize("trained", [(5, 13), (4, 6)])
@pytest.mark.parametrize("references", [(), ((4, 5),)])
def test_fitted_positions_are_stock_ones_that_turn_more_slowly(trained: tuple[int, int], references: Any) -> None:
    model = tiny_qwen.transformer()
    inputs, before = tiny_qwen.inputs(GRID.shape, 7, references=references), snapshot(model)
    with with_slower_turns(model, trained):
        expected = model(**inputs)[0]
    plain = model(**inputs)[0]
    schedule = laid_out(preset(), 7, 20 if references else 0)
    for of, wanted in ((trained, expected), (GRID.shape, plain)):
        fitting = Extrapolation((of[0], of[1]), "ntk")
        with QwenAdapter(model, GRID, extrapolation=fitting).attached(Run(schedule), Backend.SDPA):
            results = [model(**inputs)[0] for _ in range(2)]
        assert relative_difference(results[0], wanted) < RELATIVE
        assert torch.equal(*results)
    assert snapshot(model) == before
    assert relative_difference(expected, plain) > 1e-3


@pytest.mark.parametrize("positions", ["yarn", "dype"])
def test_other_ways_to_fit_run_and_differ(positions: Any) -> None:
    model = tiny_qwen.transformer()
    inputs = tiny_qwen.inputs(GRID.shape, 7)
    fitting = Extrapolation((5, 6), positions, proportional_attention=True)
    with QwenAdapter(model, GRID, extrapolation=fitting).attached(Run(laid_out(preset(), 7)), Backend.SDPA):
        made = model(**inputs)[0]
        clearer = model(**inputs | {"timestep": torch.tensor([0.1])})[0]
    assert made.isfinite().all()
    assert clearer.isfinite().all()
    assert relative_difference(made, model(**inputs)[0]) > 1e-3


# ---- What is refused


def test_what_does_not_fit_is_refused_in_words() -> None:
    pipe = tiny_qwen.pipeline()

    def enter(pipe: Any, chosen: Any = None, size: dict[str, Any] | None = None, **arguments: Any) -> None:
        with grat_cli.install(pipe, chosen or preset(), **(size or {"height": HEIGHT, "width": WIDTH})):
            call(pipe, **arguments)

    with pytest.raises(BadInput, match=r"installed for 9x13 image tokens, the call has 9x12 in 1 layers"):
        enter(pipe, width=192)
    with pytest.raises(BadInput, match=r"multiples of 16 for this model, not 150 and 208: the nearest are 144 and 208"):
        enter(pipe, size={"height": 150, "width": 208})
    with pytest.raises(BadInput, match="makes images: leave out num_frames"):
        enter(pipe, size={"height": HEIGHT, "width": WIDTH, "num_frames": 5})
    with pytest.raises(BadInput, match="preset hunyuan-far is for hunyuan models, the pipeline is a QwenImagePipeline"):
        enter(pipe, "hunyuan-far")
    with pytest.raises(BadInput, match="attention arguments other are not supported"):
        enter(pipe, attention_kwargs={"other": 1})
    for kind, reason in ((QwenImageControlNetPipeline, "residuals"), (QwenImageLayeredPipeline, "layers")):
        with pytest.raises(BadInput, match=f"{kind.__name__} is not supported .*{reason}"):
            enter(kind.__new__(kind))
    with pytest.raises(BadInput, match="no fused kernel"):
        FAMILY.adapter(pipe.transformer, GRID, fused=True)


def test_calls_and_transformers_that_do_not_fit_are_refused() -> None:
    def attempt(model: Any, **changes: Any) -> None:
        with QwenAdapter(model, GRID).attached(Run(laid_out(preset(), 7)), Backend.SDPA):
            model(**(tiny_qwen.inputs(GRID.shape) | changes))

    model = tiny_qwen.transformer()
    with pytest.raises(BadInput, match="ControlNet is not supported"):
        attempt(model, controlnet_block_samples=[torch.zeros(1)])
    with pytest.raises(BadInput, match="in 2 layers"):
        attempt(model, img_shapes=[[(2, 9, 13)]])
    with pytest.raises(BadInput, match="differ in size"):
        attempt(model, img_shapes=[[(1, 9, 13)], [(1, 9, 13), (1, 2, 2)]])
    with pytest.raises(BadInput, match="pad prompts at their end"):
        attempt(model, encoder_hidden_states_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]]))
    with pytest.raises(BadInput, match="makes layers"):
        attempt(tiny_qwen.transformer(use_layer3d_rope=True))
    with pytest.raises(BadInput, match="embedded guidance"):
        attempt(tiny_qwen.transformer(guidance_embeds=True))
    with pytest.raises(BadInput, match="compiled"):
        attempt(torch.compile(tiny_qwen.transformer(), backend="eager"))
    replaced = tiny_qwen.transformer()
    replaced.transformer_blocks[1].attn.set_processor(object.__new__(_Foreign))  # pyright: ignore
    with pytest.raises(BadInput, match="replaced by _Foreign"):
        attempt(replaced)


class _Foreign:
    """A processor of another tool."""


# ---- Making


def denoised(pipe: Any, pictures: Pictures = Pictures(), **changes: Any) -> tuple[torch.Tensor, dict[int, Any]]:  # noqa: B008
    """Latents by the family, and those after each step with the state of the noise."""
    generator = torch.Generator().manual_seed(5)
    kept: dict[int, Any] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept[step + 1] = tensors["latents"].clone(), generator.get_state()
        return {}

    if "noise" in changes:
        generator.set_state(changes.pop("noise"))
    asked = Call(
        WIDTH,
        HEIGHT,
        None,
        steps=5,
        arguments={**tiny_qwen.prompt(7), **tiny_qwen.negative_prompt(3), "true_cfg_scale": 3.0},
        generator=generator,
        callback=keep,
        pictures=pictures,
    )
    return FAMILY.denoise(pipe, replace(asked, **changes)), kept


TO_MAKE: dict[str, Callable[[], tuple[Any, Pictures, dict[str, Any]]]] = {
    "text": lambda: (tiny_qwen.pipeline(), Pictures(), {}),
    "start": lambda: (
        tiny_qwen.pipeline(QwenImageImg2ImgPipeline),
        Pictures(),
        {"start": torch.randn(1, 4, 18, 26, generator=torch.Generator().manual_seed(1)), "strength": 0.8},
    ),
    "mask": lambda: (
        tiny_qwen.pipeline(QwenImageInpaintPipeline),
        Pictures(start=picture(), mask=tiny_qwen.mask(WIDTH, HEIGHT)),
        {"strength": 0.8},
    ),
    "edit": lambda: (
        tiny_qwen.pipeline(QwenImageEditPipeline),
        Pictures(references=(tiny_qwen.picture(90, 120),)),
        {},
    ),
    "edit-plus": lambda: (
        tiny_qwen.pipeline(QwenImageEditPlusPipeline),
        Pictures(references=(tiny_qwen.picture(90, 120), tiny_qwen.picture(60, 60, 2))),
        {},
    ),
}


@pytest.mark.parametrize("kind", TO_MAKE)
def test_a_run_that_goes_on_makes_the_same(kind: str) -> None:
    pipe, pictures, arguments = TO_MAKE[kind]()
    whole, kept = denoised(pipe, pictures, **arguments)
    assert whole.shape == (1, 4, 18, 26)
    assert torch.equal(FAMILY.as_called(pipe, whole), kept[max(kept)][0])
    latents, noise = kept[2]
    rest, after = denoised(pipe, pictures, **arguments, begun=latents, first_step=2, noise=noise)
    assert torch.equal(rest, whole)
    assert len(after) == len(kept) - 2
    assert "prepare_latents" not in vars(pipe)


def test_a_schedule_that_ends_at_little_noise_takes_two_steps() -> None:
    """Of one, stock diffusers makes NaN."""
    with pytest.raises(BadInput, match="take 2 or more"):
        denoised(tiny_qwen.pipeline(), steps=1)


def test_pictures_matter_to_what_is_made() -> None:
    for kind in ("mask", "edit", "edit-plus"):
        pipe, pictures, arguments = TO_MAKE[kind]()
        given, _ = denoised(pipe, pictures, **arguments)
        if kind == "mask":
            changed = replace(pictures, start=tiny_qwen.picture(WIDTH, HEIGHT, 7))
        else:
            changed = replace(pictures, references=tuple(map(lambda one: one.rotate(180), pictures.references)))
        other, _ = denoised(pipe, changed, **arguments)
        assert relative_difference(other, given) > 1e-3


def test_pixels_become_latents_and_back_as_in_the_stock_pipelines() -> None:
    pipe, latents = tiny_qwen.pipeline(), torch.randn(1, 16, 18 * 26 // 4, generator=torch.Generator().manual_seed(2))
    packed = latents.transpose(1, 2).contiguous()
    spatial = FAMILY.spatial(pipe, packed, WIDTH, HEIGHT)
    pixels = FAMILY.decode(pipe, spatial)
    assert pixels.shape == (1, 3, 1, HEIGHT, WIDTH)
    mean, deviation = (
        torch.tensor(numbers).view(1, 4, 1, 1, 1)
        for numbers in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    assert torch.allclose(pixels, pipe.vae.decode(spatial.unsqueeze(2) * deviation + mean).sample, atol=1e-5)
    made = call(pipe, output_type="pt")
    ours = FAMILY.decode(pipe, FAMILY.spatial(pipe, call(pipe), WIDTH, HEIGHT))[:, :, 0]
    assert torch.allclose(made, (ours / 2 + 0.5).clamp(0, 1), atol=1e-5)
    start = tiny_qwen.pipeline(QwenImageEditPipeline)
    given = start.image_processor.preprocess(picture(), HEIGHT, WIDTH).unsqueeze(2)
    expected = start._encode_vae_image(given, None).squeeze(2)
    assert torch.allclose(FAMILY.encode(pipe, picture()), expected, atol=1e-5)
    # Tiles fade into one another; the attention in the middle sees one at a time.
    tiled = FAMILY.decode(pipe, spatial, 96)
    assert relative_difference(tiled, pixels) < 0.5


def test_the_time_shift_is_that_of_the_models_own_line() -> None:
    from grat_cli.families.time_shift import shift_of

    pipe = tiny_qwen.pipeline()
    at_most, beyond = shift_of(pipe.scheduler, 8192, None), shift_of(pipe.scheduler, 30_000, None)
    assert at_most == beyond == pytest.approx(np.exp(0.9))


# ---- Loading, and whole runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("qwen")
    edits = {"text": None, "edit": "QwenImageEditPipeline", "edit-plus": "QwenImageEditPlusPipeline"}
    return {name: tiny_qwen.save(parent / name, kind) for name, kind in edits.items()}


def loaded(folder: Path) -> tuple[Any, Any]:
    choice = choose_model(str(folder))
    return choice, load_model(choice, device=torch.device("cpu"), dtype=torch.float32).pipe


@pytest.mark.parametrize("kind", ["text", "edit", "edit-plus"])
def test_folders_are_loaded_as_what_they_were_saved_from(folders: dict[str, Path], kind: str) -> None:
    choice, pipe = loaded(folders[kind])
    assert type(pipe) is KINDS[kind][0]
    assert choice.family == "qwen"
    assert choice.true_guidance
    if kind == "text":
        assert (choice.takes, choice.needs) == ({"start", "mask"}, frozenset())
    else:
        assert choice.takes == choice.needs == {"reference"}
        assert choice.most_references == (1 if kind == "edit" else 3)
        assert isinstance(pipe.processor, TextAndPictures)
    for kinds in (frozenset({"start"}), frozenset({"start", "mask"})):
        other = FAMILY.pipeline_for(pipe, kinds)  # pyright: ignore
        assert other.transformer is pipe.transformer
        assert (other is pipe) == (kind != "text")
    text = FAMILY.encode_text(pipe, choice, "a red boat", None)
    assert set(text) == {"prompt_embeds", "prompt_embeds_mask"}


def test_text_is_encoded_as_the_stock_pipelines_encode_it(folders: dict[str, Path]) -> None:
    """Its pictures included: the stock pipeline with our processor encodes by itself what we hand to it."""
    for kind in ("text", "edit", "edit-plus"):
        choice, pipe = loaded(folders[kind])
        references = KINDS[kind][1]().get("image", ())
        references = tuple(references) if isinstance(references, (list, tuple)) else (references,)
        text = FAMILY.encode_text(pipe, choice, "a red boat", "", Pictures(references=references))
        image = {} if kind == "text" else {"image": list(references) if kind == "edit-plus" else references[0]}
        seen: list[Any] = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        pipe(prompt="a red boat", negative_prompt=" ", true_cfg_scale=4.0, **image, **size)
        hook.remove()
        assert torch.allclose(seen[0], text["prompt_embeds"], atol=1e-5)
        assert torch.allclose(seen[1], text["negative_prompt_embeds"], atol=1e-5)
        assert FAMILY.text_lens(text) == (seen[0].shape[1], seen[1].shape[1])


def test_each_picture_is_as_many_tokens_as_its_patches(folders: dict[str, Path]) -> None:
    _, pipe = loaded(folders["edit-plus"])
    pictures = [tiny_qwen.picture(112, 56), tiny_qwen.picture(56, 84)]
    inputs = pipe.processor(text=["one <|image_pad|> two <|image_pad|> end"], images=pictures)
    number = pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 8], [1, 6, 4]]
    assert int((inputs["input_ids"] == number).sum()) == 4 * 8 // 4 + 6 * 4 // 4
    assert inputs["pixel_values"].shape[0] == 4 * 8 + 6 * 4
    assert set(pipe.processor(text=["no picture"])) == {"input_ids", "attention_mask"}
    with pytest.raises(BadInput, match="stands for pictures"):
        pipe.processor(text=["<|image_pad|><|image_pad|>"], images=pictures[0])


def test_text_and_pictures_are_prepared_as_by_the_processor_of_transformers(folders: dict[str, Path]) -> None:
    _, pipe = loaded(folders["edit-plus"])
    ours = pipe.processor
    # Its constructor asks for Torchvision, its work on pictures does not.
    stock: Any = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    stock.image_processor, stock.tokenizer, stock.video_processor = ours.image_processor, ours.tokenizer, None
    stock.chat_template, stock.image_token, stock.video_token = None, "<|image_pad|>", "<|video_pad|>"
    stock.image_token_id, stock.video_token_id = map(
        pipe.tokenizer.convert_tokens_to_ids, (stock.image_token, stock.video_token)
    )
    several = [tiny_qwen.picture(112, 56), tiny_qwen.picture(90, 120, 3)]
    for text, pictures in (("one <|image_pad|> and <|image_pad|> two", several), ("<|image_pad|> a", several[0])):
        expected = stock(text=[text], images=pictures, padding=True, return_tensors="pt")
        made = ours(text=[text], images=pictures, padding=True, return_tensors="pt")
        assert set(made) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())


def asked(folder: Path, output: Path, **changes: Any) -> Request:
    chosen = preset("x", {"dense_steps": 1}).model_dump() | {"sampling": {"steps": 5, "guidance": 2.0}}
    defaults: dict[str, Any] = {
        "prompt": "a red boat at night",
        "preset": Preset.model_validate(chosen),
        "model": choose_model(str(folder)),
        "width": 96,
        "height": 80,
        "format": "png",
        "device": "cpu",
        "seeds": (7,),
        "outputs": (output,),
    }
    return Request(**defaults | changes)


def test_a_folder_makes_pictures_and_goes_on_with_them(folders: dict[str, Path], tmp_path: Path) -> None:
    whole, progress = asked(folders["text"], tmp_path / "whole.png"), Progress()
    (made,) = generate(whole, progress)
    assert made.report["grid"] == [5, 6]
    assert [step["index"] for step in made.report["steps"]] == list(range(5))
    assert names(tmp_path) == ["whole.json", "whole.png"]
    parted = asked(folders["text"], tmp_path / "parted.png")
    run, request = read_run(broken_off(parted, after=2))
    (again,) = generate(request, begun=run)
    assert (tmp_path / "parted.png").read_bytes()[-5000:] == (tmp_path / "whole.png").read_bytes()[-5000:]
    assert untimed(again.report)["steps"] == untimed(made.report)["steps"]


def test_a_large_picture_grows_from_one_of_the_trained_area(folders: dict[str, Path], tmp_path: Path) -> None:
    sections = {"highres": {"strength": 0.6, "dense_below": 0}, "sampling": {"steps": 5, "guidance": 2.0}}
    model = replace(choose_model(str(folders["text"])), native_side=64)
    chosen = Preset.model_validate(preset("b").model_dump() | sections)
    request = asked(folders["text"], tmp_path / "large.png", model=model, preset=chosen, width=128, height=128)
    (made,) = generate(request)
    assert [(stage["width"], stage["steps"], stage["positions"]) for stage in made.report["stages"]] == [
        (64, 5, "none"),
        (128, 3, "ntk"),
    ]


# ---- Shapes


def test_models_known_by_name() -> None:
    for name, source in {
        "qwen-image": "Qwen/Qwen-Image",
        "qwen-image-2512": "Qwen/Qwen-Image-2512",
        "qwen-image-edit": "Qwen/Qwen-Image-Edit",
        "qwen-image-edit-2509": "Qwen/Qwen-Image-Edit-2509",
        "qwen-image-edit-2511": "Qwen/Qwen-Image-Edit-2511",
    }.items():
        choice = choose_model(name)
        assert (choice.source, choice.family, choice.default_guidance) == (source, "qwen", 4.0)
        assert FAMILY.kin(source).name == name
        shape = FAMILY.transformer_shape(FAMILY.transformer_config(choice))
        assert isinstance(shape, QwenShape)
        assert shape.modulates_apart == name.endswith("2511")
        assert shape.parameters == 20_430_401_088
    # 83 rows and columns of 1328 pixels, and a megapixel to refer to.
    assert choose_model("qwen-image").grid(1328, 1328).shape == (83, 83)


def test_references_add_the_tokens_that_the_pipelines_make() -> None:
    plus = tiny_qwen.pipeline(QwenImageEditPlusPipeline)
    seen: list[Any] = []
    plus.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    call(plus, **KINDS["edit-plus"][1](), num_inference_steps=2)
    sizes = [one.size for one in KINDS["edit-plus"][1]()["image"]]
    assert seen[0] - GRID.tokens == _references("qwen-image-edit-2509", sizes)
    assert _references("qwen-image", []) == 0


def _references(model: str, sizes: list[tuple[int, int]]) -> int:
    return FAMILY.reference_tokens(choose_model(model), (WIDTH, HEIGHT), frozenset({"reference"}), sizes)


def small_config(**changes: Any) -> dict[str, Any]:
    config = FAMILY.transformer_config(choose_model("qwen-image"))
    return config | {"num_attention_heads": 4, "attention_head_dim": 128, "num_layers": 2} | changes


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_operations_and_weights_are_those_of_the_class(zero_cond_t: bool) -> None:
    config = small_config(zero_cond_t=zero_cond_t)
    model = random_transformer(config, "cpu", torch.float32)
    shape = FAMILY.transformer_shape(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.largest_block == sum(parameter.numel() for parameter in model.transformer_blocks[0].parameters())  # pyright: ignore
    inputs = step_inputs(config, (16, 20), 40, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    # The counter leaves out attention of CPUs.
    assert counter.get_total_flops() == pytest.approx(shape.linear_flop(320, 40), rel=0.02)


@pytest.mark.parametrize(
    ("chosen", "zero_cond_t", "dtype", "chunk"),
    [
        ("qwen-full", False, torch.float32, None),
        ("qwen-x", False, torch.float32, None),
        ("qwen-far", False, torch.bfloat16, None),
        ("qwen-b", True, torch.float32, None),
        ("qwen-b", False, torch.float32, 256),
    ],
)
def test_memory_of_a_step_is_foretold(chosen: str, zero_cond_t: bool, dtype: torch.dtype, chunk: int | None) -> None:
    config = small_config(num_layers=1, zero_cond_t=zero_cond_t)
    shape, grid = FAMILY.transformer_shape(config), Grid((40, 44))
    schedule = AttentionSchedule(load_preset(chosen), grid, 64, True, 1, 1)
    model = random_transformer(config, "cpu", dtype)
    inputs = step_inputs(config, grid.shape, 64, "cpu", dtype)
    execution = Execution(str(dtype).removeprefix("torch."), on_cpu=True, chunk_tokens=chunk)
    unused = QwenImageAutoencoder((8,), (1,), 4, 0)
    predicted = denoise_moments(Components((), shape, unused), list(schedule.plans), execution)
    with QwenAdapter(model, grid, chunk_tokens=chunk).attached(Run(schedule), Backend.SDPA):
        measured = track(lambda: model(**inputs)).peak_bytes
    print(chosen, dtype, chunk, max(predicted.values()) / measured, predicted)
    assert max(predicted.values()) == pytest.approx(measured, rel=0.15), predicted


@pytest.mark.parametrize(("channels", "mult"), [(32, [1, 2, 4, 4]), (32, [1, 2, 2, 2])])
def test_coding_is_foretold(channels: int, mult: list[int]) -> None:
    config: Any = {"base_dim": channels, "dim_mult": mult, "num_res_blocks": 2, "z_dim": 16}
    autoencoder = AutoencoderKLQwenImage(**config).eval()
    shape, size = QwenImageAutoencoder.of(config, 0), Pixels(320, 256)
    latents, pixels = torch.randn(1, 16, 1, 32, 40), torch.randn(1, 3, 1, 256, 320)
    coding = Coding(4, on_cpu=True)
    for predicted, run, operations in (
        (shape.decode_moments(size, coding), lambda: autoencoder.decode(latents), shape.decode_flop(size)),
        (shape.encode_moments(size, coding), lambda: autoencoder.encode(pixels), shape.encode_flop(size)),
    ):
        (foretold,) = predicted.values()
        measured = track(run).peak_bytes
        print(channels, (foretold - size.count * 4) / measured)
        assert foretold - size.count * 4 == pytest.approx(measured, rel=0.15)
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == pytest.approx(operations, rel=0.02)


@pytest.mark.parametrize(("zero_cond_t", "dtype"), [*product([False, True], [torch.float32, torch.bfloat16])])
def test_chunks_change_no_bit(zero_cond_t: bool, dtype: torch.dtype) -> None:
    model: Any = tiny_qwen.transformer(zero_cond_t=zero_cond_t)
    model = model.to(dtype)
    inputs = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in tiny_qwen.inputs(GRID.shape, 7, 4, references=((4, 5),)).items()
    }
    results = []
    for chunk in (None, 50):
        schedule = laid_out(preset("x"), 7, 20)
        adapter = QwenAdapter(model, GRID)
        adapter._chunk_tokens = chunk
        with adapter.attached(Run(schedule), Backend.SDPA):
            assert adapter.chunking[0] == chunk
            results.append(model(**inputs)[0])
    assert torch.equal(*results)


def test_the_known_parts_have_the_weights_of_their_classes() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: Any = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    vision: Any = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    config = Qwen2_5_VLConfig(
        text_config={**text, "num_key_value_heads": 4, "vocab_size": 152064},
        vision_config={**vision, "out_hidden_size": 3584},
    )
    with torch.device("meta"):
        parts = AutoencoderKLQwenImage(), Qwen2_5_VLForConditionalGeneration(config)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == [Qwen.autoencoder.parameters, Qwen.text_encoders[0].parameters]
