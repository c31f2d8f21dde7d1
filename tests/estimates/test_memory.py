"""The memory that a run is foretold to need, against what torch allocates: within 15 % at every peak."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from tracked_memory import track
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from grat_cli.attention.context_parallel import Shared
from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.bench.random_weights import (
    STEP_MODELS,
    parameter_count,
    random_transformer,
    step_inputs,
    step_model,
    transformer_config,
)
from grat_cli.console.progress import ProgressDisplay
from grat_cli.demo import DEMO_HUNYUAN
from grat_cli.estimates.components import components_of, components_of_pipeline
from grat_cli.estimates.hardware import has_convolutions
from grat_cli.estimates.memory import Execution, attending_bytes, denoise_moments, run_memory
from grat_cli.estimates.planning import architecture_for, forecast
from grat_cli.families import family_of, family_of_class
from grat_cli.families.autoencoders import Coding, KlAutoencoder, Pixels, TinyAutoencoder
from grat_cli.families.flux import FluxAdapter
from grat_cli.families.guidance import choose_guidance
from grat_cli.families.hunyuan import HunyuanAdapter
from grat_cli.families.shapes import Components
from grat_cli.generation.request import request_for
from grat_cli.generation.selection import select_preset
from grat_cli.generation.single import call_for
from grat_cli.generation.stage import StepWatch, installed, stages_for
from grat_cli.models.catalogue import KNOWN_MODELS, choose_model
from grat_cli.models.loading import load_model
from grat_cli.models.parallel import Parallel
from grat_cli.models.resolution import Resolution
from grat_cli.presets import load_preset
from grat_kernels import (
    Backend,
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    Pattern,
    Union,
    build_plan,
    span_attention,
)

# What grat promises of its memory model.
TOLERANCE = 0.15
CHOOSING = "attention.far.choose={exact: 8, fine: 32, block: [2, 2]}"
UNUSED = TinyAutoencoder((8,), (1,), 4, 0)


def compare(predicted: dict[str, float], run: Callable[[], Any]) -> None:
    """Asserts that the largest moment is what running allocates at most; `pytest -rP` shows the figures."""
    with torch.no_grad():
        measured = track(run).peak_bytes
    moment = max(predicted, key=lambda name: predicted[name])
    foretold = predicted[moment]
    error = foretold / measured - 1
    print(f"{moment}: foretold {foretold / 2**20:.1f} MiB, measured {measured / 2**20:.1f}, {error:+.1%}")
    assert max(predicted.values()) == pytest.approx(measured, rel=TOLERANCE), predicted


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo's pipeline of pictures."""
    return load_model(choose_model("demo"), device=torch.device("cpu"), dtype=torch.float32).pipe


@pytest.mark.parametrize(
    ("variant", "width", "height", "guidance"),
    [
        ("full", 256, 256, 4.0),
        ("full", 384, 256, 1.0),
        ("b", 256, 256, 4.0),
        ("b", 512, 256, 4.0),
        ("x", 256, 256, 4.0),
        ("far", 256, 256, 4.0),
        ("far", 256, 384, 1.0),
        ("choose", 256, 256, 4.0),
        ("choose", 256, 384, 1.0),
    ],
)
def test_denoising_of_the_demo(demo: Any, variant: str, width: int, height: int, guidance: float) -> None:
    choice = choose_model("demo")
    items = [CHOOSING] if variant == "choose" else []
    named = "far" if variant == "choose" else variant
    preset = select_preset(choice, variant=named, steps=1, guidance=guidance, set_items=items)
    request = request_for(choice, preset, "a red fox", width=width, height=height)
    steering = choose_guidance(demo, choice, preset, None)
    text = request.family.encode_text(demo, choice, request.prompt, steering.negative_prompt)
    expected = forecast(preset, "demo", architecture_for(choice), Resolution(width, height), "float32")
    predicted = denoise_moments(
        components_of(choice),
        list(expected.schedule.plans),
        Execution("float32", on_cpu=True),
        steering.negative_prompt is not None,
    )
    (stage,) = stages_for(request)
    call = call_for(request, 1, text | steering.arguments, StepWatch(ProgressDisplay()))

    def denoise() -> None:
        with installed(demo, request, stage) as inside:
            request.family.denoise(inside.pipe, call)

    compare(predicted, denoise)


@pytest.mark.parametrize(
    ("grid", "group", "block", "means", "heads"),
    [
        ((32, 32), (4, 4), (4, 4), (2, 2), 3),
        ((64, 64), (8, 8), (8, 8), (4, 4), 8),
        ((96, 90), (8, 8), (4, 4), (2, 2), 4),
    ],
)
def test_attention_to_what_is_chosen(
    grid: tuple[int, ...], group: tuple[int, ...], block: tuple[int, ...], means: tuple[int, ...], heads: int
) -> None:
    """Alone: within a step, other moments may take more."""
    plan = build_plan(Grouping(Grid(grid), group), Union(Block(0), Far([(0, block)], (8, 32, means))), 24)
    query, key, value = (torch.randn(1, plan.tokens, heads, 64) for _ in range(3))

    def attend() -> None:
        span_attention(query, key, value, plan, backend="sdpa")

    attend()  # tables of the plan, which stay
    shape = SimpleNamespace(width=heads * 64, head_dim=64)
    compare({"attention": attending_bytes(cast(Any, shape), plan, Execution("float32", on_cpu=True))}, attend)


@pytest.mark.parametrize(
    ("grid", "pattern"),
    [
        ((64, 64), Block(1)),
        ((64, 40), Union(Block(1), Far([(1, (4, 4))]))),
        ((64, 64), CrissCross()),
        ((48, 48), Full()),
    ],
)
def test_attention_of_large_groups(grid: tuple[int, ...], pattern: Pattern) -> None:
    plan = build_plan(Grouping(Grid(grid), (8, 8)), pattern, 24)
    query, key, value = (torch.randn(1, plan.tokens, 4, 64) for _ in range(3))

    def attend() -> None:
        span_attention(query, key, value, plan, backend="sdpa")

    attend()  # tables of the plan, which stay
    shape = SimpleNamespace(width=4 * 64, head_dim=64)
    execution = Execution("float32", on_cpu=True, threads=torch.get_num_threads())
    compare({"attention": attending_bytes(cast(Any, shape), plan, execution)}, attend)


@pytest.mark.parametrize(
    ("dtype", "of_torch"),
    [
        ("float32", lambda: True),
        ("bfloat16", torch.ops.mkldnn._is_mkldnn_bf16_supported),
        ("float16", torch.ops.mkldnn._is_mkldnn_fp16_supported),
    ],
)
def test_which_convolutions_this_cpu_has_is_what_torch_finds(dtype: str, of_torch: Callable[[], bool]) -> None:
    assert has_convolutions(dtype) == of_torch()


class OneStep:
    """A run of one step."""

    def __init__(self, schedule: AttentionSchedule) -> None:
        self._schedule = schedule

    def current_step(self) -> int:
        """The step."""
        return 0

    def schedule(self, text_len: int, references: int = 0) -> AttentionSchedule:
        """Its schedule."""
        return self._schedule


def config_of(name: str, layers: tuple[int, int] | None) -> dict[str, Any]:
    if name == "demo-hunyuan":
        return json.loads((DEMO_HUNYUAN.path / "transformer" / "config.json").read_text())
    return transformer_config(step_model(name), layers)


@pytest.mark.parametrize(
    ("name", "layers", "grid", "preset", "dtype", "chunk"),
    [
        ("demo-hunyuan", None, (9, 12, 16), "hunyuan-full", torch.float32, None),
        ("demo-hunyuan", None, (9, 12, 16), "hunyuan-b", torch.float32, None),
        ("demo-hunyuan", None, (9, 12, 16), "hunyuan-planes", torch.float32, None),
        ("demo-hunyuan", None, (9, 12, 16), "hunyuan-far", torch.float32, None),
        ("flux-dev", (1, 0), (32, 32), "flux-x", torch.float32, None),
        ("flux-dev", (0, 1), (32, 32), "flux-far", torch.float32, None),
        ("flux-dev", (0, 1), (16, 16), "flux-b", torch.bfloat16, None),
        ("hunyuan", (1, 0), (2, 16, 16), "hunyuan-b", torch.float32, None),
        ("flux-dev", (0, 1), (32, 32), "flux-b", torch.float32, 256),
        ("demo", None, (48, 48), "demo-full", torch.float32, 512),
        ("demo-hunyuan", None, (9, 12, 16), "hunyuan-full", torch.float32, 256),
    ],
)
def test_a_step_of_a_random_transformer(
    name: str,
    layers: tuple[int, int] | None,
    grid: tuple[int, ...],
    preset: str,
    dtype: torch.dtype,
    chunk: int | None,
) -> None:
    """Real widths and few layers: memory does not grow with their number, but for weights."""
    config = config_of(name, layers)
    shape, video = family_of_class(config["_class_name"]).transformer_shape(config), len(grid) == 3
    text_len = 32 if name == "demo-hunyuan" else min(128, STEP_MODELS[name].text_tokens)
    schedule = AttentionSchedule(load_preset(preset), Grid(grid), text_len, not video, 1, shape.layers)
    transformer = random_transformer(config, "cpu", dtype)
    inputs = step_inputs(config, grid, text_len, "cpu", dtype)
    adapter: Any = (HunyuanAdapter if video else FluxAdapter)(transformer, Grid(grid), chunk_tokens=chunk)
    execution = Execution(str(dtype).removeprefix("torch."), on_cpu=True, chunk_tokens=chunk)
    with adapter.attached(OneStep(schedule), Backend.SDPA):
        compare(
            denoise_moments(Components((), shape, UNUSED), list(schedule.plans), execution),
            lambda: transformer(**inputs),
        )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("layers", "preset"), [((1, 0), "flux-b"), ((0, 1), "flux-b"), ((0, 1), "flux-far")])
def test_a_step_that_ranks_share(
    layers: tuple[int, int], preset: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one of them, to which nobody sends anything."""

    def exchanged(shared: Shared, sent: torch.Tensor, to_each: list[int], from_each: list[int]) -> torch.Tensor:
        return sent.new_zeros((sum(from_each), *sent.shape[1:]))

    monkeypatch.setattr(Shared, "_exchanged", exchanged)
    monkeypatch.setattr(Shared, "gathered", lambda shared, tokens, dim: torch.cat([tokens] * ranks, dim))
    config, grid, text_len = config_of("flux-dev", layers), (32, 32), 128
    shape = family_of_class(config["_class_name"]).transformer_shape(config)
    schedule = AttentionSchedule(load_preset(preset), Grid(grid), text_len, True, 1, shape.layers)
    transformer = random_transformer(config, "cpu", torch.float32)
    inputs = step_inputs(config, grid, text_len, "cpu", torch.float32)
    group: Any = SimpleNamespace(size=lambda: ranks, rank=lambda: 0)
    adapter = FluxAdapter(transformer, Grid(grid), chunk_tokens=None, ranks=group)
    execution = Execution("float32", on_cpu=True, chunk_tokens=None, parallel=Parallel(ranks))
    with adapter.attached(OneStep(schedule), Backend.SDPA):
        compare(
            denoise_moments(Components((), shape, UNUSED), list(schedule.plans), execution),
            lambda: transformer(**inputs),
        )


@pytest.mark.parametrize("preset", ["flux-b", "flux-far"])
def test_a_step_with_references(preset: str) -> None:
    """As many tokens again as the picture has."""
    config, grid, text_len = config_of("flux-kontext", (0, 1)), (16, 32), 128
    shape = family_of_class(config["_class_name"]).transformer_shape(config)
    count = grid[0] * grid[1]
    schedule = AttentionSchedule(load_preset(preset), Grid(grid), text_len, True, 1, shape.layers, references=count)
    transformer = random_transformer(config, "cpu", torch.float32)
    inputs = step_inputs(config, grid, text_len, "cpu", torch.float32)
    behind = inputs["img_ids"] + torch.tensor([1, 0, 0])
    inputs |= {
        "hidden_states": inputs["hidden_states"].repeat(1, 2, 1),
        "img_ids": torch.cat([inputs["img_ids"], behind]),
    }
    adapter = FluxAdapter(transformer, Grid(grid), chunk_tokens=None)
    execution = Execution("float32", on_cpu=True, chunk_tokens=None)
    with adapter.attached(OneStep(schedule), Backend.SDPA):
        compare(
            denoise_moments(Components((), shape, UNUSED), list(schedule.plans), execution),
            lambda: transformer(**inputs),
        )


CPU = Coding(4, on_cpu=True)


def whole(predicted: dict[str, float], size: Pixels) -> dict[str, float]:
    """Without the pixels that `image_coding` collects beside the autoencoder's own work."""
    return {name: bytes_ - size.count * 4 for name, bytes_ in predicted.items()}


@pytest.mark.parametrize(("width", "height"), [(256, 256), (256, 512)])
def test_coding_of_the_demo(demo: Any, width: int, height: int) -> None:
    shape, size = components_of(choose_model("demo")).autoencoder, Pixels(width, height)
    assert isinstance(demo.vae, AutoencoderTiny)
    latents, pixels = torch.randn(1, 4, height // 4, width // 4), torch.randn(1, 3, height, width)
    compare(whole(shape.decode_moments(size, CPU), size), lambda: demo.vae.decode(latents))
    compare(whole(shape.encode_moments(size, CPU), size), lambda: demo.vae.encode(pixels))


@pytest.mark.parametrize(("channels", "side"), [((16, 32, 64, 64), 256), ((64, 128, 256, 256), 128)])
def test_coding_of_an_autoencoder_like_that_of_flux(channels: tuple[int, ...], side: int) -> None:
    levels = len(channels)
    autoencoder: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore
        block_out_channels=channels,  # pyright: ignore
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    shape, size = KlAutoencoder(channels, (3,) * levels, 16, 0), Pixels(side, side)
    latents, pixels = torch.randn(1, 16, side // 8, side // 8), torch.randn(1, 3, side, side)
    compare(whole(shape.decode_moments(size, CPU), size), lambda: autoencoder.decode(latents))
    compare(whole(shape.encode_moments(size, CPU), size), lambda: autoencoder.encode(pixels))


@pytest.mark.parametrize(
    ("frames", "width", "height", "tile"),
    [(9, 96, 64, None), (33, 64, 96, None), (17, 96, 64, 64), (5, 160, 288, None)],
)
def test_decoding_of_videos(frames: int, width: int, height: int, tile: int | None) -> None:
    """In fp32, whole, in windows of frames, in tiles, and small enough for torch's convolution by columns."""
    choice = choose_model("demo", "video")
    shape, family = components_of(choice).autoencoder, family_of(choice)
    loader: Any = AutoencoderKLHunyuanVideo
    pipe = SimpleNamespace(vae=loader.from_pretrained(DEMO_HUNYUAN.path / "vae", torch_dtype=torch.float32))
    family.prepare(pipe, tile)
    latents = torch.randn(1, shape.latent_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    predicted = shape.decode_moments(Pixels(width, height, frames), replace(CPU, tile=tile))
    compare(predicted, lambda: pipe.vae.decode(latents))


@pytest.mark.parametrize("name", STEP_MODELS)
def test_weights_of_transformers_are_those_of_diffusers(name: str) -> None:
    config = transformer_config(step_model(name))
    assert family_of_class(config["_class_name"]).transformer_shape(config).parameters == parameter_count(config)


def test_weights_of_other_parts_are_those_of_their_classes() -> None:
    def count(model: Any) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    # LlamaConfig's own defaults are 4096 channels, 32 layers and 32 heads; CLIP's and T5's likewise where not given.
    levels: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    flux_autoencoder: Any = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    with torch.device("meta"):
        clip = count(CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)))
        t5 = count(
            T5EncoderModel(
                T5Config(d_model=4096, d_ff=10240, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
            )
        )
        llama = count(LlamaModel(LlamaConfig(vocab_size=128320, intermediate_size=14336, num_key_value_heads=8)))
        autoencoder = count(
            AutoencoderKL(**levels, **flux_autoencoder, use_quant_conv=False, use_post_quant_conv=False)
        )
        of_videos = count(AutoencoderKLHunyuanVideo())
    flux = components_of(KNOWN_MODELS["image"]["flux-dev"])
    video = components_of(KNOWN_MODELS["video"]["hunyuan"])
    assert [encoder.parameters for encoder in flux.text_encoders] == [clip, t5]
    assert [encoder.parameters for encoder in video.text_encoders] == [llama, clip]
    assert (flux.autoencoder.parameters, video.autoencoder.parameters) == (autoencoder, of_videos)


@pytest.mark.parametrize("medium", ["image", "video"])
def test_weights_of_a_folder_are_those_in_its_files(medium: Any) -> None:
    choice = choose_model("demo", medium)
    pipe = load_model(choice, device=torch.device("cpu"), dtype=torch.float32).pipe
    components = components_of(choice)
    parts = (pipe.text_encoder, pipe.text_encoder_2, pipe.transformer, pipe.vae)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert [encoder.parameters for encoder in components.text_encoders] == counts[:2]
    assert [components.transformer.parameters, components.autoencoder.parameters] == counts[2:]
    assert components.parameters == sum(counts)
    assert components_of_pipeline(pipe, choice) == components


def test_offloading_leaves_fewer_weights_on_the_device() -> None:
    choice = KNOWN_MODELS["image"]["flux-dev"]
    components, preset = components_of(choice), load_preset("flux-x")
    expected = forecast(preset, choice.name, architecture_for(choice), Resolution(1024, 1024))

    def weights(**changes: Any) -> dict[str, float]:
        memory = run_memory(components, Pixels(1024, 1024), expected.schedule.plans, Execution(**changes))
        return {phase.phase: phase.weights for phase in memory.phases}

    everything, transformer = 2 * components.parameters, 2 * components.transformer.parameters
    assert weights() == dict.fromkeys(("text", "denoise", "decode"), everything)
    by_part = weights(offload="model")
    assert by_part["denoise"] == transformer
    assert by_part["text"] == 2 * components.text_encoders[1].parameters
    order = [weights(offload=kind)["denoise"] for kind in ("none", "model", "group", "sequential")]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) == 4
    assert weights(quantize="int8")["denoise"] < 0.6 * everything
    assert weights(quantize="nf4")["denoise"] < 0.35 * everything


def test_chunks_take_less_where_tokens_are_many() -> None:
    choice = KNOWN_MODELS["image"]["flux-dev"]
    expected = forecast(load_preset("flux-x"), choice.name, architecture_for(choice), Resolution(8192, 8192))

    def peak(**changes: Any) -> float:
        moments = denoise_moments(components_of(choice), list(expected.schedule.plans), Execution(**changes))
        return max(moments.values())

    row = 3072 * 2
    assert peak(chunk_tokens=None) > 15 * 262_656 * row  # as much as a single block holds when it projects
    assert peak() == peak(chunk_tokens=16_384) < 0.7 * peak(chunk_tokens=None)
    assert peak() < peak(chunk_tokens=200_000) < peak(chunk_tokens=None)


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    import shutil

    from grat_cli.errors import ModelUnavailable

    choice = choose_model("demo")
    shutil.copytree(choice.source, tmp_path / "copy")
    damaged = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(b"abc")
    with pytest.raises(ModelUnavailable, match="cut off"):
        components_of(replace(choice, source=str(tmp_path / "copy")))
    damaged.unlink()
    with pytest.raises(ModelUnavailable, match=r"no \.safetensors file"):
        components_of(replace(choice, source=str(tmp_path / "copy")))
