"""The bundled demo HunyuanVideo, as stock diffusers loads and runs it."""

from functools import cache
from typing import Any

import numpy
import pytest
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

import grat_cli
from grat_cli.demo import DEMO_HUNYUAN
from grat_cli.demo.moving.evaluation import held_out_losses

LARGEST_BYTES = 12_000_000


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two runs are only sure to agree bit for bit on as many threads; and one never waits on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def pipeline() -> HunyuanVideoPipeline:
    pipe = HunyuanVideoPipeline.from_pretrained(DEMO_HUNYUAN.path, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def frames_of(prompt: str, seed: int = 0, steps: int = 5) -> numpy.ndarray:
    """A video [frames, height, width, 3] in 0 to 1."""
    result: Any = pipeline()(
        prompt,
        negative_prompt="",
        true_cfg_scale=DEMO_HUNYUAN.guidance,
        height=DEMO_HUNYUAN.height,
        width=DEMO_HUNYUAN.width,
        num_frames=DEMO_HUNYUAN.frames,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return result.frames[0]


def test_the_whole_folder_is_small_enough_to_bundle() -> None:
    assert sum(file.stat().st_size for file in DEMO_HUNYUAN.path.rglob("*") if file.is_file()) <= LARGEST_BYTES


def test_it_is_made_of_the_real_classes() -> None:
    classes = {name: type(part).__name__ for name, part in pipeline().components.items()}
    assert classes["transformer"] == "HunyuanVideoTransformer3DModel"
    assert classes["vae"] == "AutoencoderKLHunyuanVideo"
    assert (classes["text_encoder"], classes["text_encoder_2"]) == ("LlamaModel", "CLIPTextModel")


def test_a_stock_call_makes_a_video_of_the_native_size() -> None:
    frames = frames_of("waves at night")
    assert frames.shape == (DEMO_HUNYUAN.frames, DEMO_HUNYUAN.height, DEMO_HUNYUAN.width, 3)
    assert numpy.isfinite(frames).all()


def test_the_caption_is_read() -> None:
    losses = held_out_losses(pipeline(), 3, (0.95, 0.8))
    for own, other, none in zip(losses["own"], losses["another's"], losses["no"], strict=True):
        assert own < none < other


def test_night_is_dark_and_day_is_bright() -> None:
    night, day = frames_of("waves at night"), frames_of("waves by day")
    assert night.mean() < 0.6 * day.mean()
    # Sky above sea, by day: bright above, blue below.
    assert day[:, :40].mean() > day[:, -40:].mean()
    red, _, blue = day[:, -40:].mean((0, 1, 2))
    assert blue > 1.5 * red


def test_waves_move_and_the_sky_above_them_does_not() -> None:
    frames = frames_of("waves by day")
    steps = numpy.abs(frames[8:] - frames[:-8]).mean((0, 2, 3))  # by row
    assert steps[-60:].mean() > 2 * steps[:20].mean()
    assert steps[-60:].mean() > 0.01


def test_the_sun_rises() -> None:
    frames = frames_of("sunrise over the sea")
    assert frames[-4:].mean() > 1.2 * frames[:4].mean()


def test_a_boat_sails_across() -> None:
    frames = frames_of("a red boat sailing by day")
    reddish = (frames[..., 0] - frames[..., 2]).clip(0.15, None) - 0.15
    columns = numpy.arange(frames.shape[2])
    places = [
        (picture.sum(0) * columns).sum() / picture.sum() for picture in (reddish[:4].mean(0), reddish[-4:].mean(0))
    ]
    assert abs(places[1] - places[0]) > 0.15 * frames.shape[2]


def test_full_attention_without_padding_equals_stock() -> None:
    """Stock attends 256 padded text tokens under a mask; ours cuts them off. At a quarter of the native sides, the
    text is most of what is attended."""
    pipe = pipeline()
    prompts = ["snow", "a big red boat sailing on the sea at sunset"]  # of different lengths
    size: dict[str, Any] = {"height": 48, "width": 64, "num_frames": 9}

    def frames() -> numpy.ndarray:
        result: Any = pipe(
            prompts,
            negative_prompt=[""] * len(prompts),
            true_cfg_scale=DEMO_HUNYUAN.guidance,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
            **size,
        )
        return numpy.asarray(result.frames)

    stock = frames()
    with grat_cli.install(pipe, "hunyuan-full", **size):
        ours = frames()
    assert stock.shape[0] == len(prompts)
    assert stock.std() > 0.05  # a picture, not one grey
    assert numpy.abs(ours - stock).max() <= 2 / 255
