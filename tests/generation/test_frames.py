from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from tracked_memory import track

from grat_cli.errors import NumericalFailure
from grat_cli.files.videos import write_video
from grat_cli.generation.frames import FrameCheck, checked_frames, frames_of


def by_diffusers(pixels: torch.Tensor) -> np.ndarray:
    """`[T, H, W, 3]`, as the pipeline's own pictures."""
    pictures = VideoProcessor(vae_scale_factor=8).postprocess_video(pixels, output_type="pil")[0]
    values = VideoProcessor(vae_scale_factor=8).postprocess_video(pixels, output_type="np")[0]
    frames = np.stack([np.asarray(picture) for picture in pictures])
    np.testing.assert_array_equal(frames, np.asarray(values * 255).round().astype(np.uint8))
    return frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frames_equal_those_of_diffusers_bit_for_bit(dtype: torch.dtype) -> None:
    pixels = (torch.randn(1, 3, 5, 24, 40, generator=torch.Generator().manual_seed(0)) * 0.7).to(dtype)
    before = pixels.clone()
    frames = list(frames_of(pixels))
    np.testing.assert_array_equal(np.stack(frames), by_diffusers(pixels))
    assert torch.equal(pixels, before)
    assert all(frame.dtype == np.uint8 and frame.flags.c_contiguous for frame in frames)


def test_every_value_rounds_as_in_diffusers() -> None:
    """All that bfloat16 can be between -2 and 2, and float32 values around every half."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= 2][: 30_720 // 3 * 3]
    pixels = every[: len(every) // 3 * 3].reshape(1, 3, 1, 1, -1)
    np.testing.assert_array_equal(np.stack(list(frames_of(pixels))), by_diffusers(pixels))
    halves = (torch.arange(255) + 0.5) / 255 * 2 - 1
    near = torch.cat([halves, *(halves * (1 + sign * 2.0**-power) for sign in (-1, 1) for power in (22, 23, 24))])
    pixels = near[: len(near) // 3 * 3].reshape(1, 3, 1, 1, -1)
    np.testing.assert_array_equal(np.stack(list(frames_of(pixels))), by_diffusers(pixels))


@pytest.mark.parametrize("rows", [24, 1023, 1024, 1025, 3000])
def test_a_picture_equals_that_of_diffusers_bit_for_bit(rows: int) -> None:
    pixels = torch.randn(1, 3, rows, 8, generator=torch.Generator().manual_seed(rows)) * 0.7
    (frame,) = frames_of(pixels.unsqueeze(2))
    (expected,) = np.asarray(VaeImageProcessor().postprocess(pixels, output_type="pil"))
    np.testing.assert_array_equal(frame, expected)


def test_no_more_than_a_band_of_a_large_picture_is_held_in_floating_point() -> None:
    pixels = torch.rand(1, 3, 1, 8192, 64)
    band = 1024 * 64 * 3 * 4  # bytes
    assert track(lambda: list(frames_of(pixels))).peak_bytes <= 4 * band < pixels.nbytes


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_parts_give_the_frames_of_the_whole(lengths: list[int]) -> None:
    pixels = torch.randn(1, 3, sum(lengths), 4, 6, generator=torch.Generator().manual_seed(1))
    check = FrameCheck()
    frames = list(checked_frames(pixels.split(lengths, dim=2), check))
    np.testing.assert_array_equal(np.stack(frames), by_diffusers(pixels))
    assert check.frames == sum(lengths)
    assert check.finish() == ()


def test_one_frame_at_a_time() -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    for frame in frames_of(torch.rand(1, 3, 9, 8, 8)):
        assert sum(reference() is not None for reference in alive) <= 1  # the one before is still in the loop's name
        alive.append(weakref.ref(frame))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("frame", [1, 4, 7])
def test_what_is_not_a_number_is_named_by_its_frame(value: float, frame: int, tmp_path: Path) -> None:
    pixels = torch.rand(1, 3, 7, 8, 8)
    pixels[0, 1, frame - 1, 2, 3] = value
    with pytest.raises(NumericalFailure, match=f"frame {frame} has NaN or infinity"):
        list(checked_frames(pixels.split(3, dim=2), FrameCheck()))
    with pytest.raises(NumericalFailure, match=f"frame {frame} "):
        write_video(checked_frames([pixels], FrameCheck()), tmp_path / "waves.mp4", fps=24)
    assert list(tmp_path.iterdir()) == []


def test_a_video_of_flat_frames_is_a_failure_and_leaves_no_file(tmp_path: Path) -> None:
    for colours in (torch.zeros(5), torch.linspace(-1, 1, 5)):
        pixels = colours.reshape(1, 1, 5, 1, 1).expand(1, 3, 5, 8, 8)
        with pytest.raises(NumericalFailure, match="every frame of the video is one flat colour"):
            write_video(checked_frames([pixels], FrameCheck()), tmp_path / "waves.mp4", fps=24)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NumericalFailure, match="the picture is one flat colour"):
        list(checked_frames([torch.zeros(1, 3, 1, 8, 8)], FrameCheck()))


def test_less_than_that_is_a_note() -> None:
    still = torch.rand(1, 3, 1, 8, 8).expand(1, 3, 4, 8, 8)
    moving = torch.rand(1, 3, 4, 8, 8)
    fading = torch.cat([torch.zeros(1, 3, 2, 8, 8), moving], dim=2)
    for pixels, notes in (
        (still, ("all 4 frames are identical: the video does not move",)),
        (moving, ()),
        (fading, ("2 of 6 frames are one flat colour, beginning with frame 1",)),
        (moving[:, :, :1], ()),
        (torch.cat([still, moving], dim=2), ()),
    ):
        check = FrameCheck()
        assert len(list(checked_frames([pixels], check))) == pixels.shape[2]
        assert check.finish() == notes


def test_other_shapes_are_refused() -> None:
    for shape in ((3, 5, 8, 8), (2, 3, 5, 8, 8), (1, 4, 5, 8, 8)):
        with pytest.raises(ValueError, match="expected a decoded video"):
            next(frames_of(torch.zeros(shape)))
