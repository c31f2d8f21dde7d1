"""`--level image`: whole runs with pictures, compared with those of full attention from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli.bench.measure import Progress
from grat_cli.bench.results import BenchResult
from grat_cli.bench.whole_runs import Pictures, RunSettings, compare_runs
from grat_cli.demo.evaluation import SHEET_PROMPTS
from grat_cli.fidelity.quality import Likeness, likeness
from grat_cli.generation.image_request import ImageRequest
from grat_cli.generation.makers import PictureMaker, request_for

if TYPE_CHECKING:
    from PIL import Image

# The sample sheet's prompts without the last one, and five more.
PROMPTS: tuple[str, ...] = (
    *SHEET_PROMPTS[:-1],
    "a red car in the desert",
    "a white house at night",
    "a brown fox at dusk",
    "a green boat at sea",
    "a yellow flower in the snow",
)


@dataclass(frozen=True, kw_only=True)
class ImageSettings(RunSettings):
    """What to make pictures of."""

    prompts: tuple[str, ...] = PROMPTS[:4]


def run_image_level(settings: ImageSettings, progress: Progress | None = None) -> tuple[BenchResult, Pictures]:
    """Makes every picture with every variant, interleaved, and compares them.

    Raises:
        BadInput: if the settings do not fit one another, or a backend by name cannot run here.
        ModelUnavailable: if the model is missing, gated or damaged.
    """
    return compare_runs(settings, ComparedPictures(settings), progress)


class ComparedPictures(PictureMaker):
    """Pictures of Flux that are compared; a `whole_runs.ComparedMaker`."""

    notes: tuple[str, ...] = (
        "Full attention is stock diffusers. Pictures are compared with its pictures of the same prompts and seeds: "
        "mean and 95 % interval by Student's t over the pictures.",
    )

    def __init__(self, settings: ImageSettings) -> None:
        preset = settings.preset()
        request = request_for(settings.model, preset, settings.prompts[0], width=settings.width, height=settings.height)
        assert isinstance(request, ImageRequest)
        super().__init__(request)
        self.recorded: Mapping[str, Any] = {"width": request.width, "height": request.height}

    def likeness(self, reference: Image.Image, made: Image.Image) -> Likeness:
        """See `whole_runs.ComparedMaker`, as for all below."""
        return likeness(reference, made)

    def shown(self, number: int, made: Image.Image) -> list[Image.Image]:
        return [made]

    def titles(self, number: int, prompt: str, seed: int) -> list[str]:
        return [f"{prompt}, seed {seed}"]
