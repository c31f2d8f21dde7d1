"""Wan inside `grat_cli.install` and on its own, against stock diffusers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_runs
import tiny_wan
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.wan.pipeline_wan_video2video import WanVideoToVideoPipeline
from flux_runs import relative_difference
from hunyuan_runs import GROUP, raster_mask
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tracked_memory import track
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

import grat_cli
from grat_cli.attention.chunking import in_chunks
from grat_cli.attention.clock import step_under_way
from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.bench.inside_models import Host
from grat_cli.bench.random_weights import (
    parameter_count,
    random_transformer,
    step_inputs,
    step_model,
    transformer_config,
)
from grat_cli.errors import BadInput
from grat_cli.estimates.components import components_of, components_of_pipeline
from grat_cli.estimates.memory import Execution, denoise_moments, run_memory
from grat_cli.families import FAMILIES, family_of
from grat_cli.families.autoencoders import Coding, Pixels, WanAutoencoder, autoencoder_shape
from grat_cli.families.base import Call, Pictures
from grat_cli.families.guidance import choose_guidance
from grat_cli.families.resumption import remembered
from grat_cli.families.shapes import Components
from grat_cli.families.wan import WanAdapter, WanShape
from grat_cli.fidelity.variants import parse_variants, variant_for
from grat_cli.generation.checkpoint import read_run
from grat_cli.generation.request import Request
from grat_cli.generation.timing import StepRecorder
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import load_model
from grat_cli.models.weights import Weights
from grat_cli.presets import Preset, Sampling, load_preset
from grat_kernels import Backend, Block, CrissCross, Full, Grid, Grouping, Pattern, Plan, build_plan

# Two computations of one fp32 forward pass: sums of a few hundred terms in another order, through two layers.
RELATIVE = 1e-5
GRID = Grid((5, 6, 8))
STEPS = 3
START: frozenset[Any] = frozenset({"start"})
LONG, SHORT = "waves at night under a red boat that sails across", "snow"
SIZES: dict[str, dict[str, Any]] = {
    kind: {"height": 48, "width": 80, "num_frames": 13} for kind in tiny_wan.KINDS
}  # 4 x 3 x 5 tokens: ragged groups of 2x3x3
SIZES["timed"] = {"height": 96, "width": 160, "num_frames": 13}


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {kind: tiny_wan.pipeline(kind) for kind in tiny_wan.KINDS}


def preset(variant: str = "full", **attention: Any) -> Preset:
    return Preset.model_validate(
        {
            "name": "test",
            "model": "wan",
            "attention": {"variant": variant, "group": list(GROUP), **attention},
            "kernel": {"backend": "sdpa"},
        }
    )


def text_of(pipe: Any, prompts: list[str], name: str = "prompt_embeds") -> dict[str, torch.Tensor]:
    one_by_one = [FAMILIES["wan"].encode_text(pipe, FAMILIES["wan"].models[0], prompt, None) for prompt in prompts]
    return {name: torch.cat([text["prompt_embeds"] for text in one_by_one])}


def call(pipe: Any, kind: str, prompts: list[str], *, guidance: float = 1.0, steps: int = STEPS, **more: Any) -> Any:
    """Latents for seed 5, with text that is encoded beforehand."""
    size = {name: more.pop(name, value) for name, value in SIZES[kind].items()}
    arguments = {**size, **text_of(pipe, prompts), "guidance_scale": guidance, "num_inference_steps": steps}
    if guidance > 1:
        arguments |= text_of(pipe, ["a dull grey sea"] * len(prompts), "negative_prompt_embeds")
    if "Image" in type(pipe).__name__:
        arguments["image"] = tiny_wan.picture(80, 48)
    options = {"generator": torch.Generator().manual_seed(5), "output_type": "latent", **more}
    return pipe(**arguments, **options).frames


def snapshot(pipe: Any) -> list[Any]:
    """Everything that an installation may touch."""
    found = []
    for model in (pipe.transformer, pipe.transformer_2):
        if model is not None:
            hooks = [
                (list(module._forward_pre_hooks), list(module._forward_hooks))
                for module in (model, model.rope, model.patch_embedding, model.proj_out)
            ]
            processors = [id(attention.processor) for block in model.blocks for attention in (block.attn1, block.attn2)]
            found.append([processors, hooks, sorted(model.__dict__)])
    return [found, id(pipe.scheduler)]


# ---- Pipelines


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["alone", "guided"])
@pytest.mark.parametrize("kind", tiny_wan.KINDS)
def test_full_attention_equals_the_stock_pipeline(pipes: dict[str, Any], kind: str, guidance: float) -> None:
    pipe = pipes[kind]
    prompts = [LONG, SHORT]
    expected, before = call(pipe, kind, prompts, guidance=guidance), snapshot(pipe)
    with grat_cli.install(pipe, preset(), **SIZES[kind]) as installation:
        assert snapshot(pipe) != before
        assert relative_difference(call(pipe, kind, prompts, guidance=guidance), expected) < RELATIVE
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe, kind, prompts, guidance=guidance), expected)
    assert installation.last_schedule.grid.shape == (4, 3, 5)
    assert installation.last_schedule.plans[0].text_len == 0


def test_the_first_frame_of_a_model_with_timed_tokens(pipes: dict[str, Any]) -> None:
    pipe = FAMILIES["wan"].pipeline_for(pipes["timed"], frozenset({"start"}))
    assert pipe.config.expand_timesteps
    expected = call(pipe, "timed", [LONG], guidance=4.0)
    with grat_cli.install(pipe, preset(), **SIZES["timed"]):
        assert relative_difference(call(pipe, "timed", [LONG], guidance=4.0), expected) < RELATIVE
    assert relative_difference(expected, call(pipes["timed"], "timed", [LONG], guidance=4.0)) > 0.01


def test_videos_that_start_from_others_take_the_steps_that_are_run(pipes: dict[str, Any]) -> None:
    """The pipeline tells its scheduler nothing of the steps that it leaves out."""
    pipe = pipes["text"]
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    other: Any = WanVideoToVideoPipeline(**parts)
    other.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        size, steps = {name: SIZES["text"][name] for name in ("height", "width")}, {"num_inference_steps": 6}
        start = torch.randn(1, tiny_wan.CHANNELS, 4, 6, 10, generator=torch.Generator().manual_seed(1))
        text = text_of(pipe, [LONG])
        return other(
            **size, **steps, **text, latents=start, strength=0.5, guidance_scale=1.0, output_type="latent"
        ).frames

    expected, recorder = run(), StepRecorder()
    with grat_cli.install(other, preset(), **SIZES["text"], observer=recorder):
        assert relative_difference(run(), expected) < RELATIVE
    assert [step.index for step in recorder.steps([0.0] * 6)] == [0, 1, 2]


def test_both_transformers_of_a_model_take_their_turn_under_grat(pipes: dict[str, Any]) -> None:
    pipe = pipes["two"]
    called = []
    with grat_cli.install(pipe, preset("b", radius=0), **SIZES["two"]):
        hooks = [
            model.register_forward_pre_hook(lambda module, args: called.append(module))
            for model in (pipe.transformer, pipe.transformer_2)
        ]
        try:
            result = call(pipe, "two", [SHORT])
        finally:
            for hook in hooks:
                hook.remove()
    assert {id(model) for model in called} == {id(pipe.transformer), id(pipe.transformer_2)}
    assert relative_difference(result, call(pipe, "two", [SHORT])) > 1e-3


def test_leaving_restores_the_pipeline_after_an_exception(pipes: dict[str, Any]) -> None:
    pipe = pipes["two"]
    before, expected = snapshot(pipe), call(pipe, "two", [SHORT])

    def fail(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("in a callback")

    with pytest.raises(RuntimeError, match="in a callback"), grat_cli.install(pipe, preset("b"), **SIZES["two"]):
        call(pipe, "two", [SHORT], callback_on_step_end=fail)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe, "two", [SHORT]), expected)


# ---- The transformer


class Run:
    """A run of one pattern."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def current_step(self) -> int:
        return 0

    def schedule(self, text_len: int, references: int = 0) -> Any:
        assert text_len == references == 0
        return self

    def density_of_step(self, step: int) -> float:
        return self.plan(step, 0).density

    def plan(self, step: int, layer: int) -> Plan:
        return build_plan(Grouping(GRID, GROUP), self.pattern, 0)


class UnderMask(WanAttnProcessor):
    """Stock attention over video tokens under a mask."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.from_numpy(mask)

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, mask: Any, rotary_emb: Any) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def under_mask(model: Any, inputs: dict[str, Any], mask: np.ndarray) -> torch.Tensor:
    stock = [block.attn1.processor for block in model.blocks]
    for block in model.blocks:
        block.attn1.set_processor(UnderMask(mask))
    try:
        return model(**inputs)[0]
    finally:
        for block, processor in zip(model.blocks, stock, strict=True):
            block.attn1.set_processor(processor)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(
    ("pattern", "radius", "share"),
    [(Block(1), 1, None), (Block((0, 1, 1)), (0, 1, 1), None), (CrissCross(1), None, 1), (CrissCross(2), None, 2)],
)
def test_patterns_equal_stock_attention_under_a_mask(
    pattern: Pattern, radius: Any, share: int | None, timed: bool
) -> None:
    model, inputs = tiny_wan.transformer(), tiny_wan.inputs(GRID.shape, 2, timed=timed)
    expected = under_mask(model, inputs, raster_mask(GRID, radius, share))
    with WanAdapter(model, GRID).attached(Run(pattern), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, model(**inputs)[0]) > 0.01, "the mask makes no difference: this shows nothing"


@pytest.mark.parametrize("timed", [False, True])
def test_half_precision_is_as_far_from_fp32_as_stock_is(timed: bool) -> None:
    model: Any = tiny_wan.transformer()
    inputs = tiny_wan.inputs(GRID.shape, timed=timed)
    exact = model(**inputs)[0]
    model.to(torch.bfloat16)
    half = {name: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in inputs.items()}
    stock = relative_difference(model(**half)[0].float(), exact)
    with WanAdapter(model, GRID).attached(Run(Full()), Backend.SDPA):
        ours = relative_difference(model(**half)[0].float(), exact)
    assert ours < 2 * stock


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit(dtype: torch.dtype, timed: bool) -> None:
    grid = Grid((4, 13, 15))
    model: Any = tiny_wan.transformer()
    inputs = tiny_wan.inputs(grid.shape, 2, timed=timed)
    model.to(dtype)
    inputs = {name: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for name, v in inputs.items()}
    expected = model(**inputs)[0]
    adapter = WanAdapter(model, grid)
    before = [dict(vars(block)) for block in model.blocks]
    with in_chunks(adapter.blocks, adapter.chunked_blocks(), 256):
        assert torch.equal(model(**inputs)[0], expected)
    assert [dict(vars(block)) for block in model.blocks] == before


# ---- Runs


def request_of(folder: Path, place: Path, **changes: Any) -> Request:
    """Of a video on 3 x 3 x 4 tokens in groups of 2 x 2 x 2, by a saved pipeline."""
    model = choose_model(str(folder), "video")
    side = model.token_side
    attention = {"variant": "x", "group": [2, 2, 2], "share": 2}
    sampling = {"steps": STEPS + 2, "guidance": 3.0, "shift": 4.0}
    return Request(
        **{
            "prompt": "a red boat at night",
            "preset": Preset.model_validate(
                {"name": "test", "model": "wan", "attention": attention, "sampling": sampling}
            ),
            "model": model,
            "width": 4 * side,
            "height": 3 * side,
            "frames": 9,
            "fps": 8,
            "format": "mp4",
            "device": "cpu",
            "seeds": (7,),
            "outputs": (place,),
            "save_latents": True,
            **changes,
        }
    )


@pytest.mark.parametrize(("kind", "dtype"), [("text", "float32"), ("two", "bfloat16"), ("timed", "float32")])
def test_a_run_that_is_taken_up_ends_as_if_it_had_not_been_broken_off(tmp_path: Path, kind: str, dtype: str) -> None:
    folder = tiny_wan.save(tmp_path / "model", kind)
    whole, broken = (request_of(folder, tmp_path / f"{name}.mp4", dtype=dtype) for name in ("whole", "broken"))
    (made,) = small_runs.generate(whole)
    assert made.report["steps"][0]["timestep"] == 999
    assert made.report["sampling"]["shift"] == 4.0
    kept = small_runs.broken_off(broken, after=3)
    run, asked = read_run(kept)
    assert sorted(run.history) == ["last_sample", "model_outputs.0", "model_outputs.1"]
    small_runs.generate(asked, begun=run)
    latents = [load_file(next(tmp_path.glob(f"{name}*.latents.*")))["latents"] for name in ("whole", "broken")]
    assert torch.equal(*latents)
    assert (tmp_path / "broken.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"history.last_sample": None}, "not what a UniPCMultistepScheduler needs"),
        ({"history.sigmas": torch.zeros(1, 4, 3, 6, 8)}, "not what a UniPCMultistepScheduler needs"),
        ({"history.last_sample": torch.zeros(3)}, r"its memory of a step is \[3\]"),
        ({"history.last_sample": torch.zeros(1, 4, 3, 6, 8).int()}, r"torch\.int32"),
        ({"history.last_sample": torch.full((1, 4, 3, 6, 8), torch.nan)}, "is not finite"),
        ({f"history.{number}": torch.zeros(1, 4, 3, 6, 8) for number in range(65)}, "it remembers 68 tensors"),
    ],
    ids=["missing", "foreign", "shape", "dtype", "nan", "many"],
)
def test_a_history_that_was_tampered_with_is_refused(
    broken_off: Path, tmp_path: Path, held: dict[str, Any], reason: str
) -> None:
    kept = Path(shutil.copy(broken_off, tmp_path))
    small_runs.tamper(kept, held)
    with pytest.raises(BadInput, match=reason):
        take_up(kept)


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is kept of a run."""
    place = tmp_path_factory.mktemp("run")
    return small_runs.broken_off(request_of(tiny_wan.save(place / "model"), place / "a.mp4"), after=3)


def take_up(kept: Path) -> None:
    run, asked = read_run(kept)
    small_runs.generate(asked, begun=run)


@pytest.mark.parametrize("kind", ["picture", "two pictures", "timed"])
def test_calls_from_a_first_frame_go_on_where_they_were(tmp_path: Path, kind: str) -> None:
    """As a run makes them, through the pipeline that is loaded for them."""
    folder = tiny_wan.save(tmp_path / "model", kind)
    model = choose_model(str(folder), "video")
    assert (model.takes, model.needs) == (START, START if kind != "timed" else frozenset())
    family = family_of(model)
    loaded = load_model(model, device=torch.device("cpu"), dtype=torch.float32, pictures=START).pipe
    pipe = family.pipeline_for(loaded, START)
    assert type(pipe).__name__ == "WanImageToVideoPipeline"
    guidance = choose_guidance(pipe, model, request_of(folder, tmp_path / "a.mp4").preset, None)
    text = family.encode_text(pipe, model, "a boat", guidance.negative_prompt)
    kept: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        kept.append((tensors["latents"], remembered(pipe.scheduler, tensors["latents"])))
        return {}

    side = model.token_side
    call = Call(
        width=4 * side,
        height=3 * side,
        frames=9,
        steps=5,
        arguments=text | guidance.arguments,
        generator=torch.Generator().manual_seed(1),
        callback=keep,
        pictures=Pictures(start=tiny_wan.picture(4 * side, 3 * side)),
    )
    whole = family.denoise(pipe, call)
    assert torch.equal(kept[-1][0], whole), "a run that is broken off after its last step has other latents"
    latents, history = kept[2]
    rest = family.denoise(pipe, replace(call, begun=latents, first_step=3, history=history))
    assert torch.equal(rest, whole)
    pixels = family.decode(pipe, whole)
    assert pixels.shape == (1, 3, 9, 3 * side, 4 * side)
    if kind == "timed":  # the first frame is the picture's own
        (first,) = pipe.prepare_latents(
            pipe.video_processor.preprocess(call.pictures.start), 1, 4, 3 * side, 4 * side, 9, torch.float32, "cpu"
        )[1:2]
        assert torch.equal(whole[:, :, :1], first)


def test_guidance_is_told_in_the_pipelines_own_words() -> None:
    preset = request_preset(4.0)
    two, one = choose_model("wan2.2-14b", "video"), choose_model("wan2.1-14b", "video")
    found = choose_guidance(None, two, preset, None)
    assert found.arguments == {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    assert found.negative_prompt == two.negative_prompt != ""
    assert choose_guidance(None, one, preset, "rain").negative_prompt == "rain"
    off = choose_guidance(None, one, request_preset(1.0), None)
    assert (off.scale, off.arguments, off.negative_prompt) == (None, {"guidance_scale": 1.0}, None)


def request_preset(guidance: float) -> Preset:
    return preset().model_copy(update={"sampling": Sampling(steps=3, guidance=guidance)})


# ---- Models and their shapes


@pytest.mark.parametrize("kind", tiny_wan.KINDS)
def test_parts_of_a_folder_are_those_of_its_pipeline(tmp_path: Path, kind: str) -> None:
    folder = tiny_wan.save(tmp_path / "model", kind)
    model = choose_model(str(folder), "video")
    pipe = load_model(model, device=torch.device("cpu"), dtype=torch.float32).pipe
    components = components_of(model)
    assert components == components_of_pipeline(pipe, model)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert components.parameters == sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert components.transformers == model.transformers == (2 if "two" in kind else 1)
    assert pipe.config.boundary_ratio == (0.7 if "two" in kind else None)
    assert pipe.config.expand_timesteps is (kind == "timed")
    assert model.token_side == (32 if kind == "timed" else 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_a_transformer_is_as_exact_as_a_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rotary tables in half precision would move tokens about."""
    folder, file = tiny_wan.save(tmp_path / "wan"), tmp_path / "wan.safetensors"
    shutil.copy(folder / "transformer" / "diffusion_pytorch_model.safetensors", file)
    whole, alone = (
        load_model(
            choose_model(str(path), "video"), device=torch.device("cpu"), dtype=dtype, weights=Weights(base=base)
        ).pipe.transformer
        for path, base in ((folder, None), (file, str(folder)))
    )
    assert [parameter.dtype for parameter in alone.parameters()] == [one.dtype for one in whole.parameters()]
    assert torch.equal(alone.rope.freqs_cos, whole.rope.freqs_cos)
    inputs = tiny_wan.inputs(GRID.shape)
    half = {name: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for name, v in inputs.items()}
    assert relative_difference(alone(**half)[0].float(), whole(**half)[0].float()) < torch.finfo(dtype).eps * 8
    two = tiny_wan.save(tmp_path / "wan-two", "two")
    with pytest.raises(BadInput, match=r"has two transformers, and .* would replace one of them"):
        load_model(
            choose_model(str(file), "video"), device=torch.device("cpu"), dtype=dtype, weights=Weights(base=str(two))
        )


def test_benchmarks_put_both_transformers_under_a_variant(pipes: dict[str, Any]) -> None:
    pipe, grid = pipes["two"], Grid((4, 3, 5))
    transformer, *others = FAMILIES["wan"].transformers(pipe)
    cpu = torch.device("cpu")
    host = Host(transformer, FAMILIES["wan"], 0, Backend.SDPA, cpu, torch.float32, STEPS, tuple(others))
    found = {}
    for name in ("full", "full-list"):
        recorder = StepRecorder()
        (request,) = parse_variants(name)
        inside = host.inside(variant_for(request, grid))
        with inside.attach(recorder, lambda: step_under_way(pipe.scheduler)):
            found[name] = call(pipe, "two", [SHORT])
        steps = recorder.steps([0.0] * STEPS)
        assert [step.index for step in steps] == [0, 1, 2]
        assert all(step.attention_ms > 0 for step in steps)
    assert relative_difference(found["full-list"], found["full"]) < RELATIVE
    assert torch.equal(found["full"], call(pipe, "two", [SHORT]))


def test_two_transformers_wait_in_turn() -> None:
    model = choose_model("wan2.2-14b", "video")
    components = components_of(model)

    plan = build_plan(Grouping(GRID, GROUP), Full(), 0)

    def denoising(offload: Any) -> float:
        memory = run_memory(components, Pixels(64, 48, 17), [plan], Execution(offload=offload), lets_go=True)
        return next(phase.weights for phase in memory.phases if phase.phase == "denoise")

    one = 2 * components.transformer.parameters
    assert denoising("none") == 2 * one + 2 * components.autoencoder.parameters
    assert denoising("model") == one
    assert denoising("group") < 0.2 * one


def test_weights_of_other_parts_are_those_of_their_classes() -> None:
    def count(model: Any) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    coarse: Any = {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    }
    vision: Any = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text: Any = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 256_384}
    with torch.device("meta"):
        encoder = count(UMT5EncoderModel(UMT5Config(**text, feed_forward_proj="gated-gelu")))
        pictures = count(CLIPVisionModel(CLIPVisionConfig(**vision, patch_size=14)))
        plain, large = AutoencoderKLWan(), AutoencoderKLWan(**coarse)
    first, picture, fine = (components_of(choose_model(f"wan{name}", "video")) for name in NAMES)
    assert [encoder.parameters for encoder in first.text_encoders] == [encoder]
    assert [encoder.parameters for encoder in picture.text_encoders] == [encoder, pictures]
    for components, autoencoder in ((first, plain), (fine, large)):
        of_class = autoencoder_shape({**autoencoder.config, "_class_name": "AutoencoderKLWan"}, count(autoencoder))
        assert components.autoencoder == of_class


NAMES = ("2.1-14b", "2.1-i2v-720p", "2.2-5b")
SMALL: dict[str, Any] = {"num_attention_heads": 4, "ffn_dim": 2048, "text_dim": 64}


def small_shape(name: str, **changes: Any) -> tuple[dict[str, Any], WanShape]:
    """A model with fewer and narrower blocks, and its shape."""
    config = {**transformer_config(step_model(name), (1,)), **SMALL, **changes}
    if config["image_dim"]:
        config |= {"image_dim": 96, "added_kv_proj_dim": 512}
    shape = WanShape.of(config)
    assert shape.parameters == parameter_count(config)
    return config, shape


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-i2v-480p", "wan2.2-5b"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    config, shape = small_shape(name, ffn_dim=640)
    grid = (2, 4, 8)
    inputs = step_inputs(config, grid, 40, "cpu", torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        random_transformer(config, "cpu", torch.float32)(**inputs)
    attention = 4 * 64**2 * shape.width * shape.layers
    assert shape.linear_flop(64, 40) + attention == pytest.approx(counted.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "variant", "dtype", "chunk"),
    [
        ("wan2.1-1.3b", "full", torch.float32, None),
        ("wan2.1-1.3b", "far", torch.float32, None),
        ("wan2.1-1.3b", "b", torch.bfloat16, None),
        ("wan2.1-1.3b", "b", torch.float32, 256),
        ("wan2.1-i2v-480p", "b", torch.float32, None),
        ("wan2.2-5b", "full", torch.float32, None),
        ("wan2.2-5b", "b", torch.bfloat16, 256),
    ],
)
def test_a_step_takes_the_memory_that_is_foretold(
    name: str, variant: str, dtype: torch.dtype, chunk: int | None
) -> None:
    config, shape = small_shape(name)
    grid = Grid((4, 24, 24))
    schedule: Any = AttentionSchedule(load_preset(f"wan-{variant}"), grid, 0, False, 1, shape.layers)
    model = random_transformer(config, "cpu", dtype)
    inputs = step_inputs(config, grid.shape, 512, "cpu", dtype)
    execution = Execution(str(dtype).removeprefix("torch."), on_cpu=True, chunk_tokens=chunk)
    foretold = denoise_moments(Components((), shape, WanAutoencoder((8,), (1,), 4, 0)), list(schedule.plans), execution)
    run: Any = Run(Full())
    run.schedule = lambda *_: schedule
    with WanAdapter(model, grid, chunk_tokens=chunk).attached(run, Backend.SDPA):
        measured = track(lambda: model(**inputs)).peak_bytes
    assert max(foretold.values()) == pytest.approx(measured, rel=0.15), foretold


@pytest.mark.parametrize(
    ("coarse", "frames", "width", "height", "tile"),
    [
        (False, 1, 128, 96, None),
        (False, 9, 96, 128, None),
        (True, 1, 128, 96, None),
        (True, 9, 128, 96, None),
        (False, 5, 128, 96, 64),
        (True, 5, 256, 128, 128),
    ],
)
def test_decoding_takes_the_operations_and_memory_that_are_foretold(
    coarse: bool, frames: int, width: int, height: int, tile: int | None
) -> None:
    autoencoder = tiny_wan.autoencoder(coarse, base=16)
    shape, size = (
        autoencoder_shape({**autoencoder.config, "_class_name": "AutoencoderKLWan"}),
        Pixels(width, height, frames),
    )
    FAMILIES["wan"].prepare(SimpleNamespace(vae=autoencoder), tile)
    latents = torch.randn(1, tiny_wan.CHANNELS, (frames - 1) // 4 + 1, height // shape.scale, width // shape.scale)
    with FlopCounterMode(display=False) as counted:
        autoencoder.decode(latents)
    assert shape.decode_flop(size, tile) == pytest.approx(counted.get_total_flops(), rel=0.02)
    foretold = shape.decode_moments(size, Coding(4, on_cpu=True, tile=tile))
    assert max(foretold.values()) == pytest.approx(track(lambda: autoencoder.decode(latents)).peak_bytes, rel=0.15)


@pytest.mark.parametrize(
    ("coarse", "frames", "given"), [(False, 1, 1), (False, 9, 9), (True, 9, 1)], ids=["frame", "video", "first frame"]
)
def test_encoding_takes_the_operations_and_memory_that_are_foretold(coarse: bool, frames: int, given: int) -> None:
    """Of the first frame and nothing after it; where tokens are timed, of that frame alone."""
    autoencoder = tiny_wan.autoencoder(coarse, base=16)
    shape, size = autoencoder_shape({**autoencoder.config, "_class_name": "AutoencoderKLWan"}), Pixels(128, 96, frames)

    def encode() -> Any:
        return autoencoder.encode(torch.zeros(1, 3, given, 96, 128))

    with FlopCounterMode(display=False) as counted:
        encode()
    assert shape.encode_flop(size) == pytest.approx(counted.get_total_flops(), rel=0.02)
    foretold = shape.encode_moments(size, Coding(4, on_cpu=True))
    assert max(foretold.values()) == pytest.approx(track(encode).peak_bytes, rel=0.15)


def test_a_rate_is_measured_on_as_many_operations_as_it_says() -> None:
    autoencoder = tiny_wan.autoencoder(coarse=True, base=8)
    shape = autoencoder_shape({**autoencoder.config, "_class_name": "AutoencoderKLWan"})
    sample = shape.sample(torch.device("cpu"), torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        sample.run()
    assert sample.flop == pytest.approx(counted.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "kin"),
    [
        ("someone/Wan2.1-T2V-1.3B-tuned", "wan2.1-1.3b"),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan2.1-14b"),
        ("someone/Wan2.2-TI2V-5B-tuned", "wan2.2-5b"),
        ("someone/wan2.2-i2v-a14b", "wan2.2-i2v"),
        ("someone/wan2.2-t2v-a14b", "wan2.2-14b"),
        ("someone/wan-i2v-480p", "wan2.1-i2v-480p"),
    ],
)
def test_models_on_the_hub_are_told_by_their_names(name: str, kin: str) -> None:
    known = choose_model(kin, "video")
    assert choose_model(name, "video") == replace(known, name=name, source=name, reason="hub id")


@pytest.mark.parametrize("kind", ["two", "timed"])
def test_offloaded_pipelines_in_chunks_give_the_same(pipes: dict[str, Any], kind: str) -> None:
    """Hooks that bring weights go on around blocks that run in chunks."""
    size: dict[str, Any] = {"height": 20 * 16, "width": 24 * 16, "num_frames": 5}
    size = {name: 2 * side if kind == "timed" and name != "num_frames" else side for name, side in size.items()}

    def run(pipe: Any, chunk: int | None) -> torch.Tensor:
        with grat_cli.install(pipe, preset("b"), **size, chunk_tokens=chunk) as installation:
            result = call(pipe, kind, [SHORT], steps=2, **size)
        assert installation.chunking[0] == chunk
        return result

    expected = run(pipes[kind], None)
    offloaded = tiny_wan.pipeline(kind)
    cpu = torch.device("cpu")
    offloaded.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1, exclude_modules=["vae"])
    assert torch.equal(run(offloaded, 256), expected)


def test_compiled_blocks_run_under_grat(pipes: dict[str, Any]) -> None:
    model, inputs = tiny_wan.transformer(), tiny_wan.inputs(GRID.shape)
    adapter = WanAdapter(model, GRID)
    with adapter.attached(Run(Block(1)), Backend.SDPA):
        expected = model(**inputs)[0]
    for block in model.blocks:
        block.compile(backend="eager")
    with WanAdapter(model, GRID).attached(Run(Block(1)), Backend.SDPA):
        assert relative_difference(model(**inputs)[0], expected) < RELATIVE


def test_what_does_not_fit_is_refused(pipes: dict[str, Any]) -> None:
    pipe = pipes["text"]

    def enter(pipe: Any = pipe, chosen: Any = None, **options: Any) -> None:
        with grat_cli.install(pipe, chosen or preset(), **(SIZES["text"] | options)):
            call(pipe, "text", [SHORT])

    with pytest.raises(BadInput, match="multiples of 16 for this model, not 40 and 80: the nearest are 32 and 80"):
        enter(height=40)
    with pytest.raises(BadInput, match=r"num_frames must be 4k\+1 for this model, not 14: use 13 or 17"):
        enter(num_frames=14)
    with pytest.raises(BadInput, match="makes videos: give num_frames"):
        enter(num_frames=None)
    with pytest.raises(BadInput, match="multiples of 32 for this model"):
        enter(pipes["timed"], height=48)
    with pytest.raises(BadInput, match=r"installed for 4x4x5 video tokens .* the call has 4x3x5"):
        enter(height=64)
    with pytest.raises(BadInput, match="preset flux-x is for flux models"):
        enter(chosen="flux-x")
    with (
        pytest.raises(BadInput, match="attention arguments masks are not supported"),
        grat_cli.install(pipe, preset(), **SIZES["text"]),
    ):
        call(pipe, "text", [SHORT], attention_kwargs={"masks": 1})
    with pytest.raises(BadInput, match="has the second of its transformers alone: give it both"):
        enter(tiny_wan.pipeline("two", transformer=None))
    block = pipe.transformer.blocks[1]
    stock = block.attn1.processor
    block.attn1.set_processor(UnderMask(np.ones((1, 1), bool)))
    with pytest.raises(BadInput, match="replaced by UnderMask"):
        enter()
    block.attn1.set_processor(stock)
    from diffusers.pipelines.wan.pipeline_wan_vace import WanVACEPipeline

    with pytest.raises(BadInput, match=r"WanVACEPipeline is not supported \(its transformer has further blocks"):
        enter(WanVACEPipeline.__new__(WanVACEPipeline))
