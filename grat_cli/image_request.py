"""What is asked of a run, and what can be said about it before a model is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from grat_cli.errors import BadInput
from grat_cli.models import ModelChoice
from grat_cli.presets import Preset

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageRequest:
    """What to make.

    Attributes:
        prompt: what the picture shows.
        preset: attention, schedule, kernel and sampling.
        model: of `models.choose_model`.
        width: in pixels.
        height: in pixels.
        seeds: one image is made for each.
        negative_prompt: what to steer away from, or None.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        offload: `none`, `model` or `sequential`, as in diffusers.
        init_image: picture to start from, or None for noise.
        strength: share of the steps that are run on `init_image`: 1 leaves nothing of it.
        base: folder or hub id of the other parts, for a model that is a file of a transformer alone.
    """

    prompt: str
    preset: Preset
    model: ModelChoice
    width: int
    height: int
    seeds: tuple[int, ...]
    negative_prompt: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    init_image: Path | None = None
    strength: float = 0.7
    base: str | None = None


class Progress(Protocol):
    """Told how a run goes on."""

    def phase(self, name: str) -> None:
        """A phase begins: load, text, denoise or decode."""
        ...

    def step(self, done: int, total: int) -> None:
        """So many denoising steps have been issued."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing, in one sentence."""
        ...


def check_size(request: ImageRequest) -> None:
    """Raises BadInput unless the model can make pictures of this size."""
    unit = request.model.size_multiple
    if request.width % unit or request.height % unit or min(request.width, request.height) < unit:
        raise BadInput(
            f"width and height must be multiples of {unit}, not {request.width}x{request.height}: "
            f"the nearest is {_nearest(request.width, unit)}x{_nearest(request.height, unit)}"
        )


def _nearest(size: int, unit: int) -> int:
    return max(unit, round(size / unit) * unit)


def read_init_image(request: ImageRequest, progress: Progress) -> Image.Image | None:
    """The picture to start from, cut to the request's shape and resized to it; None for noise.

    Raises:
        BadInput: if it cannot be read, or the strength is out of range.
    """
    if request.init_image is None:
        return None
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not 0.0 < request.strength <= 1.0:
        raise BadInput(f"strength must lie above 0 and at most at 1, not {request.strength}")
    try:
        picture = ImageOps.exif_transpose(Image.open(request.init_image)).convert("RGB")
    except FileNotFoundError:
        raise BadInput(f"there is no picture {request.init_image}: check the path") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise BadInput(f"{request.init_image} cannot be read as a picture: {error}") from error
    if picture.width * request.height != picture.height * request.width:
        progress.note(
            f"{request.init_image.name} is {picture.width}x{picture.height}: "
            f"its middle is cut out in the shape of {request.width}x{request.height}"
        )
    return ImageOps.fit(picture, (request.width, request.height), Image.Resampling.LANCZOS)


def note_expectations(request: ImageRequest, progress: Progress) -> None:
    """Says beforehand what a model cannot do."""
    if request.model.family == "demo":
        from grat_cli.demo import vocabulary

        known = vocabulary()
        words = {word for phrases in known.values() for phrase in phrases for word in phrase.split()}
        unknown = [word for word in re.findall(r"[^\W_]+", request.prompt.lower()) if word not in words]
        if unknown:
            named = ", ".join(dict.fromkeys(unknown))
            progress.note(f"the demo model does not know {named}; it draws {', '.join(known['subjects'])}")
    elif request.init_image is None and request.width * request.height > 2 * request.model.native_side**2:
        progress.note(
            f"Flux was trained at about {request.model.native_side}x{request.model.native_side}: much larger pictures "
            "from noise repeat and blur with any attention; start from one with --init-image"
        )
