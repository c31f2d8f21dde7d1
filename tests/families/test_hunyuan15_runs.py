"""HunyuanVideo-1.5 from a folder to a video; what is foretold of its work and memory, against what torch counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_runs
import tiny_hunyuan15
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from flux_runs import relative_difference
from hunyuan15_runs import (
    LONG,
    QUOTING,
    SHORT,
    SIZE_OF_PICTURE,
    STEPS,
    Run,
    call_with_picture,
    snapshot,
    unguided,
)
from small_runs import Progress, Small, broken_off, generate, untimed
from torch.utils.flop_counter import FlopCounterMode
from tracked_memory import track
from transformers import Qwen2_5_VLTextModel, T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

import grat_cli
from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.bench.random_weights import parameter_count, random_transformer, step_inputs
from grat_cli.errors import ModelUnavailable
from grat_cli.estimates.components import components_of, components_of_pipeline
from grat_cli.estimates.memory import Execution, denoise_moments
from grat_cli.estimates.planning import architecture_for, forecast
from grat_cli.families import FAMILIES, family_of_pipeline
from grat_cli.families.autoencoders import Pixels, TinyAutoencoder
from grat_cli.families.base import Call, Pictures
from grat_cli.families.hunyuan15 import Hunyuan15Adapter
from grat_cli.families.shapes import Components
from grat_cli.files import outputs
from grat_cli.generation.checkpoint import read_run
from grat_cli.generation.selection import select_preset
from grat_cli.models.catalogue import KNOWN_MODELS, choose_model
from grat_cli.models.loading import load_model
from grat_cli.models.video_size import VideoSize
from grat_cli.presets import load_preset
from grat_kernels import Backend, Full, Grid

FAMILY = FAMILIES["hunyuan15"]
KNOWN = {model.name: model for model in FAMILY.models}
CPU = torch.device("cpu")
TOLERANCE = 0.15  # what grat promises of its memory model


# ---- Which model


@pytest.mark.parametrize(
    ("name", "kin", "guidance"),
    [
        ("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", "hunyuan15-480p", 6.0),
        ("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", "hunyuan15-720p", 6.0),
        ("someone/HunyuanVideo-1.5-480p_i2v", "hunyuan15-480p-i2v", 6.0),
        ("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v_distilled", "hunyuan15-720p-i2v", 1.0),
        ("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v_step_distilled", "hunyuan15-480p-i2v", 1.0),
        ("hunyuanvideo-community/HunyuanVideo", "hunyuan", 6.0),
        ("hunyuanvideo-community/HunyuanVideo-I2V", "hunyuan-i2v", 6.0),
        ("someone/a-video-model", "hunyuan", 6.0),
    ],
)
def test_checkpoints_are_kin_to_the_model_that_their_name_says(name: str, kin: str, guidance: float) -> None:
    model, like = choose_model(name, medium="video"), KNOWN_MODELS["video"][kin]
    assert (model.family, model.video, model.needs) == (like.family, like.video, like.needs)
    assert model.default_guidance == guidance
    steps = 12 if "step" in name else like.default_steps
    assert model.default_steps == steps


def test_models_from_pictures_need_one() -> None:
    assert {name for name, model in KNOWN.items() if model.needs} == {"hunyuan15-480p-i2v", "hunyuan15-720p-i2v"}
    for model in KNOWN.values():
        pipeline = FAMILY.pipeline_class(model.needs).__name__
        assert pipeline in FAMILY.pipelines
        assert ("ImageToVideo" in pipeline) == bool(model.needs)
        assert family_of_pipeline(pipeline) is FAMILY


# ---- Shapes


@pytest.mark.parametrize("name", KNOWN)
def test_weights_are_those_of_diffusers(name: str) -> None:
    config = FAMILY.transformer_config(KNOWN[name])
    for changed in (config, {**config, "use_meanflow": True, "num_layers": 3, "patch_size": 2}):
        assert FAMILY.transformer_shape(changed).parameters == parameter_count(changed)


def test_weights_of_other_parts_are_those_of_their_classes() -> None:
    def count(model: Any) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        qwen = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=152_064,
                hidden_size=3584,
                intermediate_size=18_944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
            )
        )
        byt5 = T5EncoderModel(
            T5Config(
                d_model=1472, d_ff=3584, num_heads=6, num_layers=12, vocab_size=384, feed_forward_proj="gated-gelu"
            )
        )
        autoencoder = AutoencoderKLHunyuanVideo15()
    assert [encoder.parameters for encoder in FAMILY.text_encoders] == [count(qwen), count(byt5)]
    assert FAMILY.autoencoder.parameters == count(autoencoder)
    assert replace(FAMILY.autoencoder, parameters=0) == FAMILY.autoencoder_shape(autoencoder.config)


def test_operations_of_a_call_are_those_that_torch_counts() -> None:
    """Those of its linear layers; attention is counted apart."""
    model = tiny_hunyuan15.transformer(num_attention_heads=4, attention_head_dim=32, rope_axes_dim=(8, 12, 12))
    grid, shape = Grid((4, 8, 8)), FAMILY.transformer_shape(model.config)
    inputs = tiny_hunyuan15.inputs(grid.shape)
    with (
        torch.no_grad(),
        Hunyuan15Adapter(model, grid).attached(Run(grid, Full()), Backend.SDPA),
        FlopCounterMode(display=False) as counter,
    ):
        model(**inputs)
    linear = counter.get_total_flops() - counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    assert shape.linear_flop(grid.tokens, tiny_hunyuan15.TEXT_TOKENS) == pytest.approx(linear, rel=0.02)


def test_plans_count_the_tokens_of_a_picture() -> None:
    size = VideoSize(848, 480, 121, 24)
    text = {
        name: forecast(select_preset(KNOWN[name]), name, architecture_for(KNOWN[name]), size).main_plan.text_len
        for name in ("hunyuan15-480p", "hunyuan15-480p-i2v")
    }
    assert text == {"hunyuan15-480p": 1000, "hunyuan15-480p-i2v": 1729}


def autoencoder(channels: tuple[int, ...], layers: int = 1) -> Any:
    kind: Any = AutoencoderKLHunyuanVideo15
    return kind(latent_channels=8, block_out_channels=channels, layers_per_block=layers, scaling_factor=0.5).eval()


@pytest.mark.parametrize(
    ("frames", "height", "width", "tile"), [(9, 64, 96, None), (9, 288, 352, None), (5, 96, 80, 64)]
)
def test_operations_of_coding_are_those_that_torch_counts(
    frames: int, height: int, width: int, tile: int | None
) -> None:
    with torch.device("meta"):
        model = autoencoder((16, 32, 64, 64, 64), layers=2)
        latents = torch.empty(1, 8, (frames - 1) // 4 + 1, height // 16, width // 16)
        picture = torch.empty(1, 3, 1, height, width)
        FAMILY.prepare(SimpleNamespace(vae=model), tile)
        with torch.no_grad(), FlopCounterMode(display=False) as decoding:
            model.decode(latents)
        with torch.no_grad(), FlopCounterMode(display=False) as encoding:
            model.encode(picture)
    shape = FAMILY.autoencoder_shape(model.config)
    decoded, encoded = Pixels(width, height, frames), Pixels(width, height)
    assert shape.decode_flop(decoded, tile) == pytest.approx(decoding.get_total_flops(), rel=0.02)
    assert shape.encode_flop(encoded, tile) == pytest.approx(encoding.get_total_flops(), rel=0.02)


def compare(predicted: dict[str, float], run: Callable[[], Any]) -> None:
    """Asserts that the largest moment is what running allocates at most."""
    with torch.no_grad():
        measured = track(run).peak_bytes
    foretold = max(predicted.values())
    print(f"foretold {foretold / 2**20:.1f} MiB, measured {measured / 2**20:.1f}, {foretold / measured - 1:+.1%}")
    assert foretold == pytest.approx(measured, rel=TOLERANCE), predicted


@pytest.mark.parametrize(
    ("frames", "width", "height", "tile", "channels", "dtype"),
    [
        (9, 96, 64, None, (16, 32, 64, 64, 64), torch.float32),
        (17, 128, 96, None, (32, 32, 64, 64, 64), torch.float32),
        (5, 192, 192, None, (32, 64, 64, 64, 64), torch.float32),
        (9, 160, 128, 64, (16, 32, 64, 64, 64), torch.float32),
        (5, 96, 80, 64, (16, 32, 32, 32, 32), torch.bfloat16),
    ],
)
def test_memory_of_coding(
    frames: int, width: int, height: int, tile: int | None, channels: tuple[int, ...], dtype: torch.dtype
) -> None:
    """In fp32 and in 16 bits, whole and in tiles, by columns and by oneDNN."""
    model = autoencoder(channels).to(dtype)
    FAMILY.prepare(SimpleNamespace(vae=model), tile)
    shape = FAMILY.autoencoder_shape(model.config)
    coding = Execution(str(dtype).removeprefix("torch."), on_cpu=True, tile=tile).coding
    latents = torch.randn(1, 8, (frames - 1) // 4 + 1, height // 16, width // 16, dtype=dtype)
    picture = torch.randn(1, 3, 1, height, width, dtype=dtype)
    compare(shape.decode_moments(Pixels(width, height, frames), coding), lambda: model.decode(latents))
    compare(shape.encode_moments(Pixels(width, height), coding), lambda: model.encode(picture))


@pytest.mark.parametrize(
    ("grid", "preset", "dtype", "chunk"),
    [
        ((4, 16, 16), "hunyuan15-b", torch.float32, None),
        ((5, 17, 24), "hunyuan15-far", torch.float32, None),
        ((4, 16, 24), "hunyuan15-full", torch.bfloat16, None),
        ((4, 16, 24), "hunyuan15-full", torch.float32, 256),
    ],
)
def test_memory_of_a_step(grid: tuple[int, ...], preset: str, dtype: torch.dtype, chunk: int | None) -> None:
    """Of one block, and a quarter of the real width: memory does not grow with their number, but for weights."""
    text_len, narrow = 200, {"num_attention_heads": 4, "text_embed_dim": 512, "num_refiner_layers": 1}
    config = FAMILY.with_blocks(FAMILY.transformer_config(KNOWN["hunyuan15-480p"]) | narrow, (1,))
    shape = FAMILY.transformer_shape(config)
    schedule = AttentionSchedule(load_preset(preset), Grid(grid), text_len, False, 1, shape.layers)
    transformer = random_transformer(config, "cpu", dtype)
    inputs = step_inputs(config, grid, text_len, "cpu", dtype)
    execution = Execution(str(dtype).removeprefix("torch."), on_cpu=True, chunk_tokens=chunk)
    parts = Components((), shape, TinyAutoencoder((8,), (1,), 4, 0))
    run: Any = SimpleNamespace(current_step=lambda: 0, schedule=lambda *lengths: schedule)
    with Hunyuan15Adapter(transformer, Grid(grid), chunk_tokens=chunk).attached(run, Backend.SDPA):
        compare(denoise_moments(parts, list(schedule.plans), execution), lambda: transformer(**inputs))


# ---- Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan15.save(tmp_path_factory.mktemp("hunyuan15") / "model")


@pytest.fixture(scope="module")
def small(folder: Path) -> Small:
    """3 x 5 x 6 tokens in groups of 2 x 2 x 2."""
    model = choose_model(str(folder), medium="video")
    request = small_runs.request_of(
        "hunyuan15", [2, 2, 2], "mp4", width=96, height=80, frames=9, fps=8, model=model, negative_prompt=SHORT
    )
    return Small(request, ".mp4")


def test_a_folder_tells_what_it_is(folder: Path, tmp_path: Path) -> None:
    model = choose_model(str(folder), medium="video")
    assert (model.family, model.token_side, model.needs) == ("hunyuan15", 16, frozenset())
    pipe = load_model(model, device=CPU, dtype=torch.float32).pipe
    assert type(pipe).__name__ == "HunyuanVideo15Pipeline"
    assert components_of(model) == components_of_pipeline(pipe, model)
    from_picture = choose_model(str(tiny_hunyuan15.save(tmp_path / "i2v", picture=True)), medium="video")
    assert from_picture.needs == {"start"}


def test_a_folder_that_lacks_its_guider_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "guider")
    with pytest.raises(ModelUnavailable, match="guider is missing"):
        load_model(choose_model(str(tmp_path / "copy"), medium="video"), device=CPU, dtype=torch.float32)


def test_a_run_that_is_taken_up_ends_like_an_unbroken_one(small: Small, tmp_path: Path) -> None:
    places = tmp_path / "whole", tmp_path / "broken"
    (made,) = generate(small.of(places[0], save_latents=True))
    asked = small.of(places[1], save_latents=True)
    begun, request = read_run(broken_off(asked))
    progress = Progress()
    (resumed,) = generate(replace(request, outputs=asked.outputs), progress, begun)
    assert progress.steps == [(3, 5), (4, 5), (5, 5)]
    assert untimed(resumed.report) == untimed(made.report)
    first, second = (read_run(outputs.latents_path(one.path))[0].latents for one in (made, resumed))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert made.report["sampling"] == {"steps": 5, "guidance": 2.0, "shift": 5.0}
    assert made.report["tokens"]["image"] == 3 * 5 * 6


def encoded(pipe: Any, model: Any, prompt: str, negative: str | None, pictures: Pictures = Pictures()) -> Any:  # noqa: B008
    return FAMILY.encode_text(pipe, model, prompt, negative, pictures)


def calls_of(pipe: Any) -> tuple[list[int], Any]:
    """Text tokens of every transformer call to come."""
    lengths: list[int] = []

    def look(block: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        lengths.append(args[1].shape[1])

    return lengths, pipe.transformer.transformer_blocks[0].register_forward_pre_hook(look, with_kwargs=True)


@pytest.mark.parametrize("picture", [False, True])
@pytest.mark.parametrize("guided", [True, False])
def test_texts_are_as_long_as_the_transformer_takes_them(picture: bool, guided: bool) -> None:
    pipe = tiny_hunyuan15.pipeline(picture=picture)
    model = replace(KNOWN["hunyuan15-480p"], text_tokens=tiny_hunyuan15.PROMPT_ROOM)
    size = SIZE_OF_PICTURE
    pictures = Pictures(tiny_hunyuan15.first_frame(size["width"], size["height"])) if picture else Pictures()
    text = encoded(pipe, model, QUOTING, SHORT if guided else None, pictures)
    lengths, hook = calls_of(pipe)
    arguments = text | ({"true_cfg_scale": 3.0} if guided else {})
    call = Call(80, 48, 13, 1, arguments, torch.Generator().manual_seed(5), pictures=pictures)
    with grat_cli.install(pipe, "hunyuan15-full", **size):
        FAMILY.denoise(pipe, call)
    hook.remove()
    assert tuple(lengths) == FAMILY.text_lens(text)
    assert len(lengths) == 1 + guided


@pytest.mark.parametrize("guided", [True, False])
def test_a_run_from_a_picture_is_that_of_the_stock_pipeline(guided: bool) -> None:
    """Also where it goes on after a step, and its callback is told of each."""
    pipe = tiny_hunyuan15.pipeline(picture=True)
    size = SIZE_OF_PICTURE
    first = tiny_hunyuan15.first_frame(size["width"], size["height"])
    stock = pipe if guided else unguided(tiny_hunyuan15.pipeline(picture=True))
    expected = call_with_picture(stock, QUOTING, negative_prompt=SHORT if guided else None, image=first)
    model = replace(KNOWN["hunyuan15-480p-i2v"], text_tokens=tiny_hunyuan15.PROMPT_ROOM)
    text = encoded(pipe, model, QUOTING, SHORT if guided else None, Pictures(first))
    seen: list[Any] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, pipe.num_timesteps, tensors["latents"].clone()))
        return {}

    arguments = text | ({"true_cfg_scale": 6.0} if guided else {})
    call = Call(80, 48, 13, STEPS, arguments, torch.Generator().manual_seed(5), keep, pictures=Pictures(first))
    whole, before = FAMILY.denoise(pipe, call), snapshot(pipe)
    assert relative_difference(whole, expected) < 1e-6
    assert [(step, steps) for step, steps, _ in seen] == [(step, STEPS) for step in range(STEPS)]
    assert torch.equal(seen[-1][2], whole)
    rest = FAMILY.denoise(pipe, replace(call, begun=seen[0][2], first_step=1))
    assert torch.equal(rest, whole)
    assert snapshot(pipe) == before


def test_another_size_than_the_pictures_shape_would_choose() -> None:
    """Runs make what is asked for: the picture comes in that size."""
    pipe = tiny_hunyuan15.pipeline(picture=True)
    first = tiny_hunyuan15.first_frame(112, 80)
    model = replace(KNOWN["hunyuan15-480p-i2v"], text_tokens=tiny_hunyuan15.PROMPT_ROOM)
    call = Call(
        112, 80, 5, 1, encoded(pipe, model, LONG, None, Pictures(first)), torch.Generator(), pictures=Pictures(first)
    )
    assert FAMILY.denoise(pipe, call).shape[2:] == (2, 5, 7)


@pytest.mark.parametrize("tile", [None, 64, 80, 16])
def test_tiles_meet(tile: int | None) -> None:
    """Of any size: a frame comes out as large as its latents say."""
    pipe = SimpleNamespace(vae=autoencoder((8, 8, 8, 8, 8)), vae_scale_factor_spatial=16)
    latents = torch.randn(1, 8, 2, 7, 9)
    pixels = FAMILY.decode(pipe, latents, tile)
    assert pixels.shape == (1, 3, 5, 7 * 16, 9 * 16)
    assert pixels.isfinite().all()
