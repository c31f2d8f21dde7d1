"""What pictures are asked for, and what can be said about them before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from grat_cli.errors import BadInput
from grat_cli.estimates.stages import FAIR_AREA
from grat_cli.files.pictures import read_picture
from grat_cli.generation.request import GenerationRequest, Progress

if TYPE_CHECKING:
    from PIL import Image

    from grat_cli.generation.preview import Preview


@dataclass(frozen=True)
class ImageRequest(GenerationRequest):
    """Which pictures to make.

    Attributes:
        init_image: picture to start from, or None for noise.
        strength: share of the steps that are run on `init_image`: 1 leaves nothing of it. None for 0.7, or on the
            high-resolution path for the preset's.
        previews: by seed, of the outputs that are to have them.
    """

    init_image: Path | None = None
    strength: float | None = None
    previews: Mapping[int, Preview] = field(default_factory=dict)


def read_init_image(request: ImageRequest, progress: Progress) -> Image.Image | None:
    """The picture to start from, cut to the request's shape but of its own size; None for noise.

    Raises:
        BadInput: if it cannot be read, or the strength is out of range.
    """
    if request.init_image is None:
        return None
    from PIL import Image, ImageOps

    if request.strength is not None and not 0.0 < request.strength <= 1.0:
        raise BadInput(f"strength must lie above 0 and at most at 1, not {request.strength}")
    picture = read_picture(request.init_image)
    if picture.width * request.height != picture.height * request.width:
        progress.note(
            f"{request.init_image.name} is {picture.width}x{picture.height}: "
            f"its middle is cut out in the shape of {request.width}x{request.height}"
        )
    return ImageOps.fit(picture, _largest_within(picture, request.width, request.height), Image.Resampling.LANCZOS)


def _largest_within(picture: Image.Image, width: int, height: int) -> tuple[int, int]:
    """The largest size in a shape that a picture holds, and no larger than that of the shape."""
    scale = min(picture.width / width, picture.height / height, 1.0)
    return max(1, round(width * scale)), max(1, round(height * scale))


def note_expectations(request: ImageRequest, progress: Progress) -> None:
    """Says beforehand what a model cannot do."""
    preset = request.preset
    from_noise = preset.highres is not None and preset.highres.mode != "cascade"
    if request.model.is_demo:
        from grat_cli.demo import unknown_words, vocabulary

        known = vocabulary()
        if unknown := unknown_words(request.prompt, known):
            progress.note(f"the demo model does not know {', '.join(unknown)}; it draws {', '.join(known['subjects'])}")
    if request.init_image is None and from_noise and _area(request) > FAIR_AREA * request.model.native_side**2:
        side = request.model.native_side
        progress.note(
            f"{request.model.name} was trained at about {side}x{side}: much larger pictures from noise repeat and blur "
            "with any attention; leave --highres to its default, or start from a picture with --init-image"
        )


def _area(request: ImageRequest) -> int:
    return request.width * request.height
