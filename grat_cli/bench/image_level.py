"""`--level image`: whole runs with pictures, compared with those of full attention from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli import image_coding
from grat_cli.bench.measure import Progress
from grat_cli.bench.quality import Likeness, likeness
from grat_cli.bench.results import BenchResult
from grat_cli.bench.whole_runs import Pictures, RunSettings, compare_runs
from grat_cli.demo.evaluation import SHEET_PROMPTS
from grat_cli.denoising import StepWatch
from grat_cli.generation import encode_text
from grat_cli.generation_request import check_size
from grat_cli.guidance import Guidance
from grat_cli.highres import Stage
from grat_cli.image_request import ImageRequest, note_expectations
from grat_cli.resolution import Resolution
from grat_cli.staged_generation import denoise
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
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
    return compare_runs(settings, PictureMaker(settings), progress)


class PictureMaker:
    """Pictures of Flux; a `whole_runs.Maker`."""

    family = "flux"
    notes: tuple[str, ...] = (
        "Full attention is stock diffusers. Pictures are compared with its pictures of the same prompts and seeds: "
        "mean and 95 % interval by Student's t over the pictures.",
    )

    def __init__(self, settings: ImageSettings) -> None:
        preset, model = settings.preset(), settings.model
        side = model.native_side
        self.request = ImageRequest(
            settings.prompts[0], preset, model, settings.width or side, settings.height or side, seeds=()
        )
        check_size(self.request)
        self.grid = Grid((self.request.height // model.token_side, self.request.width // model.token_side))
        self.title = f"{self.request.width}x{self.request.height} pixels"
        self.recorded: Mapping[str, Any] = {"width": self.request.width, "height": self.request.height}

    def prepare(self, pipe: Any) -> None:
        """See `whole_runs.Maker`, as for all below. Pictures need nothing."""

    def note_expectations(self, request: ImageRequest, progress: Progress) -> None:
        note_expectations(request, progress)

    def encode_text(self, pipe: Any, request: ImageRequest, guidance: Guidance) -> dict[str, Any]:
        return encode_text(pipe, request, guidance.negative_prompt)

    def text_lens(self, text: dict[str, Any]) -> tuple[int, ...]:
        return (text["prompt_embeds"].shape[1],)

    def denoise(
        self, pipe: Any, request: ImageRequest, arguments: dict[str, Any], seed: int, watch: StepWatch
    ) -> torch.Tensor:
        import torch

        size = Resolution(request.width, request.height)
        stage = Stage(0, size.width, size.height, request.preset, strength=None, trained=size)
        generator = torch.Generator("cpu").manual_seed(seed)
        packed = denoise(pipe, stage, arguments, None, generator, watch)
        return pipe._unpack_latents(packed, stage.height, stage.width, pipe.vae_scale_factor)

    def decode(self, pipe: Any, latents: torch.Tensor) -> Image.Image:
        return image_coding.to_picture(pipe, image_coding.decode(pipe, latents))

    def likeness(self, reference: Image.Image, made: Image.Image) -> Likeness:
        return likeness(reference, made)

    def shown(self, number: int, made: Image.Image) -> list[Image.Image]:
        return [made]

    def titles(self, number: int, prompt: str, seed: int) -> list[str]:
        return [f"{prompt}, seed {seed}"]
