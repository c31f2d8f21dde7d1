"""Sizes of videos as people write them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grat_cli.errors import BadInput
from grat_cli.families.base import VideoTraits
from grat_cli.models.catalogue import choose_model
from grat_cli.models.resolution import Resolution
from grat_cli.models.video_size import VideoSize, parse_video_size

HUNYUAN, DEMO = choose_model("hunyuan", "video"), choose_model("demo", "video")


def size(
    res: str | None = None,
    aspect: str | None = None,
    seconds: float | None = None,
    frames: int | None = None,
    fps: int | None = None,
) -> VideoSize:
    return parse_video_size(res, aspect, seconds, frames, fps, HUNYUAN)


def test_without_a_word_it_is_the_models_own() -> None:
    assert size() == VideoSize(1280, 720, 129, 24)
    assert parse_video_size(None, None, None, None, None, DEMO) == VideoSize(256, 144, 33, 24)
    assert size().seconds == pytest.approx(5.375)
    assert size().resolution == Resolution(1280, 720)
    assert str(size()) == "1280x720x129"


@pytest.mark.parametrize(
    ("res", "aspect", "expected"),
    [
        ("720p", None, (1280, 720)),
        ("720P", "16:9", (1280, 720)),
        ("720p", "9:16", (720, 1280)),
        ("720p", "1:1", (720, 720)),
        ("720p", "4:3", (960, 720)),
        ("720p", "3:4", (720, 960)),
        ("540p", None, (960, 544)),
        ("480p", None, (848, 480)),
        ("480p", "9:16", (480, 848)),
        (None, "9:16", (720, 1280)),
        ("960x544", None, (960, 544)),
        ("544×960", None, (544, 960)),
    ],
)
def test_resolutions(res: str | None, aspect: str | None, expected: tuple[int, int]) -> None:
    found = size(res, aspect)
    assert (found.width, found.height) == expected
    assert bool(found.notes) == (res == "540p"), "what was rounded is said, and nothing else"


def test_what_is_rounded_is_said() -> None:
    assert size("540p").notes == ("540p is 960x544 here: sides are multiples of 16",)
    assert size(seconds=5).notes == ("120 frames (5 s at 24 per second) are rounded up to 121: the model makes 4k+1",)
    assert size(frames=100).notes == ("100 frames are rounded up to 101: the model makes 4k+1",)


@pytest.mark.parametrize(
    ("seconds", "frames", "fps", "expected"),
    [
        (5, None, None, (121, 24)),
        (5, None, 30, (153, 30)),
        (4.1, None, 10, (41, 10)),  # 4.1 * 10 is a little more than 41
        (0.01, None, None, (1, 24)),
        (None, 1, None, (1, 24)),
        (None, 2, None, (5, 24)),
        (None, 129, None, (129, 24)),
        (None, 130, 12, (133, 12)),
        (None, None, 30, (129, 30)),
    ],
)
def test_lengths(seconds: float | None, frames: int | None, fps: int | None, expected: tuple[int, int]) -> None:
    found = size(seconds=seconds, frames=frames, fps=fps)
    assert (found.frames, found.fps) == expected


def test_frames_follow_the_models_own_unit() -> None:
    assert HUNYUAN.video is not None
    traits = VideoTraits(1280, 720, 129, 24, frames_per_latent=8)
    assert parse_video_size(None, None, None, 10, None, replace(HUNYUAN, video=traits)).frames == 17


def test_what_is_far_beyond_training_is_said() -> None:
    assert "was trained at 256x144: far beyond" in parse_video_size("720p", None, None, None, None, DEMO).notes[0]
    assert "was trained at 129 frames: far beyond" in size(frames=301).notes[-1]
    assert size(frames=257).notes == ()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"res": "8192"}, "expected 720p, 540p, 480p or WIDTHxHEIGHT such as 1280x720"),
        ({"res": "4k"}, "expected 720p"),
        ({"res": "1280x721"}, "multiples of 16: use 1280x720 or 1280x736"),
        ({"res": "1280x720", "aspect": "16:9"}, "already says the shape: leave out --aspect"),
        ({"res": "90000p"}, "sides go from 16 to 32768"),
        ({"res": "720p", "aspect": "0:1"}, "neither side of a ratio can be 0"),
        ({"aspect": "wide"}, "expected a ratio of width to height such as 16:9"),
        ({"seconds": 1, "frames": 9}, "leave one out"),
        ({"seconds": 0}, "--seconds 0: expected more than 0"),
        ({"seconds": 1e9}, "at most 417"),
        ({"frames": 0}, "--frames 0: expected 1 to 9999"),
        ({"fps": 0}, "--fps 0: frames per second go from 1 to 240"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        size(**arguments)


def test_models_of_images_have_no_such_size() -> None:
    with pytest.raises(BadInput, match="flux-dev makes images: give --model a model of videos"):
        parse_video_size(None, None, None, None, None, choose_model("flux-dev"))
