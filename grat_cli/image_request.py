"""What pictures are asked for, and what can be said about them before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grat_cli.errors import BadInput
from grat_cli.generation_request import GenerationRequest, Progress
from grat_cli.picture_files import read_picture

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageRequest(GenerationRequest):
    """Which pictures to make.

    Attributes:
        init_image: picture to start from, or None for noise.
        strength: share of the steps that are run on `init_image`: 1 leaves nothing of it.
    """

    init_image: Path | None = None
    strength: float = 0.7


def read_init_image(request: ImageRequest, progress: Progress) -> Image.Image | None:
    """The picture to start from, cut to the request's shape and resized to it; None for noise.

    Raises:
        BadInput: if it cannot be read, or the strength is out of range.
    """
    if request.init_image is None:
        return None
    from PIL import Image, ImageOps

    if not 0.0 < request.strength <= 1.0:
        raise BadInput(f"strength must lie above 0 and at most at 1, not {request.strength}")
    picture = read_picture(request.init_image)
    if picture.width * request.height != picture.height * request.width:
        progress.note(
            f"{request.init_image.name} is {picture.width}x{picture.height}: "
            f"its middle is cut out in the shape of {request.width}x{request.height}"
        )
    return ImageOps.fit(picture, (request.width, request.height), Image.Resampling.LANCZOS)


def note_expectations(request: ImageRequest, progress: Progress) -> None:
    """Says beforehand what a model cannot do."""
    if request.model.family == "demo":
        from grat_cli.demo import unknown_words, vocabulary

        known = vocabulary()
        if unknown := unknown_words(request.prompt, known):
            progress.note(f"the demo model does not know {', '.join(unknown)}; it draws {', '.join(known['subjects'])}")
    elif request.init_image is None and request.width * request.height > 2 * request.model.native_side**2:
        progress.note(
            f"Flux was trained at about {request.model.native_side}x{request.model.native_side}: much larger pictures "
            "from noise repeat and blur with any attention; start from one with --init-image"
        )
