"""Video sizes as people write them: `720p`, `960x544`, `16:9`, seconds or frames."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from grat_cli.errors import BadInput
from grat_cli.families.base import ModelChoice, VideoTraits
from grat_cli.models.resolution import LARGEST_SIDE, Resolution, parse_resolution

MOST_FRAMES = 9999

_SHORT_SIDE = re.compile(r"(\d{2,5})p", re.ASCII)
_WIDTH_X_HEIGHT = re.compile(r"\d{1,6}[x×]\d{1,6}", re.ASCII)
_RATIO = re.compile(r"(\d{1,4}(?:\.\d{1,3})?):(\d{1,4}(?:\.\d{1,3})?)", re.ASCII)


@dataclass(frozen=True)
class VideoSize:
    """A video's size.

    Attributes:
        width: in pixels.
        height: in pixels.
        frames: how many.
        fps: frames per second.
        notes: what people should be told, such as what was rounded.
    """

    width: int
    height: int
    frames: int
    fps: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return self.frames / self.fps

    @property
    def resolution(self) -> Resolution:
        """Width and height."""
        return Resolution(self.width, self.height)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def parse_video_size(
    res: str | None,
    aspect: str | None,
    seconds: float | None,
    frames: int | None,
    fps: int | None,
    model: ModelChoice,
) -> VideoSize:
    """Reads `--res`, `--aspect`, `--seconds`, `--frames` and `--fps`.

    `720p` is the shorter side, in the model's own shape or that of `--aspect`; without `--res` it is the model's own.
    Sides that follow from it are rounded to the nearest that the model can make, frames up to the next that it can;
    the notes say so where that changes what was typed. Sides that were typed as `WIDTHxHEIGHT` are never rounded.

    Args:
        res: `720p`, `WIDTHxHEIGHT`, or None.
        aspect: `16:9`, `9:16`, `1:1` or another ratio of width to height, or None.
        seconds: how long it is to play, or None.
        frames: how many frames, or None. Without both it is as many as the model was trained on.
        fps: frames per second, or None for the model's own.
        model: one of videos.

    Raises:
        BadInput: if they do not fit one another or the model, with what to type instead.
    """
    traits = model.require_video()
    resolution, notes = _resolution(res, aspect, traits, model.size_multiple)
    if fps is not None and not 1 <= fps <= 240:
        raise BadInput(f"--fps {fps}: frames per second go from 1 to 240")
    rate = traits.fps if fps is None else fps
    count, more_notes = _frames(seconds, frames, rate, traits)
    size = VideoSize(resolution.width, resolution.height, count, rate, (*notes, *more_notes))
    return replace(size, notes=(*size.notes, *_expectations(size, model, traits)))


def parse_size(
    model: ModelChoice,
    res: str | None,
    aspect: str | None = None,
    seconds: float | None = None,
    frames: int | None = None,
    fps: int | None = None,
) -> Resolution | VideoSize:
    """The size of what a model makes; see `parse_resolution` and `parse_video_size`."""
    if model.video:
        return parse_video_size(res, aspect, seconds, frames, fps, model)
    return parse_resolution(res, model.native_side, model.size_multiple)


def _resolution(
    res: str | None, aspect: str | None, traits: VideoTraits, multiple: int
) -> tuple[Resolution, tuple[str, ...]]:
    word = None if res is None else res.strip().lower()
    if word is not None and _WIDTH_X_HEIGHT.fullmatch(word):
        if aspect is not None:
            raise BadInput(f"--res {res} already says the shape: leave out --aspect, or give --res as 720p")
        return parse_resolution(word, traits.height, multiple), ()
    if word is None:
        if aspect is None:
            return Resolution(traits.width, traits.height), ()
        short = min(traits.width, traits.height)
    elif match := _SHORT_SIDE.fullmatch(word):
        short = int(match.group(1))
    else:
        raise BadInput(f"--res {res}: expected 720p, 540p, 480p or WIDTHxHEIGHT such as {traits.width}x{traits.height}")
    ratio = traits.width / traits.height if aspect is None else _ratio(aspect)
    sides = (short * max(1.0, ratio), short * max(1.0, 1 / ratio))
    width, height = (round(side / multiple) * multiple for side in sides)
    if min(width, height) < multiple or max(width, height) > LARGEST_SIDE:
        raise BadInput(f"--res {res or f'{short}p'}: sides go from {multiple} to {LARGEST_SIDE} pixels")
    if min(width, height) != short:
        note = f"{short}p is {width}x{height} here: sides are multiples of {multiple}"
        return Resolution(width, height, computed=True), (note,)
    return Resolution(width, height, computed=True), ()


def _ratio(aspect: str) -> float:
    match = _RATIO.fullmatch(aspect.strip())
    if match is None:
        raise BadInput(f"--aspect {aspect}: expected a ratio of width to height such as 16:9, 9:16, 1:1 or 4:3")
    across, down = float(match.group(1)), float(match.group(2))
    if not (across and down):
        raise BadInput(f"--aspect {aspect}: neither side of a ratio can be 0")
    return across / down


def _frames(seconds: float | None, frames: int | None, fps: int, traits: VideoTraits) -> tuple[int, tuple[str, ...]]:
    if seconds is not None and frames is not None:
        raise BadInput("--seconds and --frames both say how long the video is: leave one out")
    if seconds is None and frames is None:
        return traits.frames, ()
    if seconds is not None:
        if not 0 < seconds * fps <= MOST_FRAMES:
            raise BadInput(f"--seconds {seconds:g}: expected more than 0 and at most {MOST_FRAMES / fps:.0f}")
        # What is left of a product such as 4.1 * 10 is not another frame.
        asked = math.ceil(round(seconds * fps, 6))
        typed = f"{asked} frames ({seconds:g} s at {fps} per second)"
    else:
        assert frames is not None
        if not 1 <= frames <= MOST_FRAMES:
            raise BadInput(f"--frames {frames}: expected 1 to {MOST_FRAMES}")
        asked, typed = frames, f"{frames} frames"
    unit = traits.frames_per_latent
    count = -(-(asked - 1) // unit) * unit + 1
    if count == asked:
        return count, ()
    return count, (f"{typed} are rounded up to {count}: the model makes {unit}k+1",)


def _expectations(size: VideoSize, model: ModelChoice, traits: VideoTraits) -> tuple[str, ...]:
    """What a model cannot be expected to do."""
    beyond = []
    if size.width * size.height > 2 * traits.width * traits.height:
        beyond.append(f"{traits.width}x{traits.height}")
    if size.frames > 2 * traits.frames - 1:
        beyond.append(f"{traits.frames} frames")
    if not beyond:
        return ()
    return (f"{model.name} was trained at {' and '.join(beyond)}: far beyond that, scenes repeat or fall apart",)
