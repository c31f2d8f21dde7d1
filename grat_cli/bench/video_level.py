"""`--level video`: whole runs with videos, compared with those of full attention from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli.bench.measure import Progress
from grat_cli.bench.quality import Likeness, likeness_of_videos
from grat_cli.bench.results import BenchResult
from grat_cli.bench.whole_runs import Pictures, RunSettings, compare_runs
from grat_cli.demo.moving.evaluation import SAMPLE_PROMPTS
from grat_cli.denoising import StepWatch, explained_backend_failures
from grat_cli.errors import BadInput
from grat_cli.guidance import Guidance
from grat_cli.video_check import FrameCheck, checked_frames
from grat_cli.video_decoding import decode, use_tiles
from grat_cli.video_generation import call_pipeline, encode_text
from grat_cli.video_request import VideoRequest, check_video, note_expectations
from grat_kernels import Grid

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

# Another subject each, as far as they go, then the others.
PROMPTS: tuple[str, ...] = (*SAMPLE_PROMPTS[::2], *SAMPLE_PROMPTS[1::2])
VIDEOS_SHOWN, FRAMES_SHOWN = 2, 4


@dataclass(frozen=True, kw_only=True)
class VideoSettings(RunSettings):
    """What to make videos of.

    Attributes:
        frames: of each video; None for what the model was trained at.
    """

    prompts: tuple[str, ...] = PROMPTS[:3]
    frames: int | None = None


def run_video_level(settings: VideoSettings, progress: Progress | None = None) -> tuple[BenchResult, Pictures]:
    """Makes every video with every variant, interleaved, and compares them.

    Raises:
        BadInput: if the settings do not fit one another, or a backend by name cannot run here.
        ModelUnavailable: if the model is missing, gated or damaged.
    """
    return compare_runs(settings, VideoMaker(settings), progress)


class VideoMaker:
    """Videos of HunyuanVideo, as frames uint8 `[H, W, 3]`; a `whole_runs.Maker`."""

    family = "hunyuan"

    def __init__(self, settings: VideoSettings) -> None:
        preset, model = settings.preset(), settings.model
        if model.video is None:
            raise BadInput(f"{model.name} makes images: use --level image, or --model demo or hunyuan")
        self.request = VideoRequest(
            prompt=settings.prompts[0],
            preset=preset,
            model=model,
            width=settings.width or model.video.width,
            height=settings.height or model.video.height,
            frames=settings.frames or model.video.frames,
            fps=model.video.fps,
            seeds=(),
            outputs=(),
        )
        check_video(self.request)
        width, height, frames = self.request.width, self.request.height, self.request.frames
        side = model.token_side
        self.grid = Grid((self.request.latent_frames, height // side, width // side))
        self.title = f"{width}x{height} pixels, {frames} frames"
        self.recorded: Mapping[str, Any] = {"width": width, "height": height, "frames": frames, "fps": model.video.fps}
        self.notes: tuple[str, ...] = (
            f"Full attention is stock diffusers: it attends the padding of the text, to {model.text_tokens} tokens, "
            "under a mask, which the others cut off; full-list is full attention without it.",
            "Videos are compared frame by frame with its videos of the same prompts and seeds: mean and 95 % interval "
            "by Student's t over the videos.",
        )

    def prepare(self, pipe: Any) -> None:
        """See `whole_runs.Maker`, as for all below."""
        use_tiles(pipe.vae)

    def note_expectations(self, request: VideoRequest, progress: Progress) -> None:
        note_expectations(request, progress)

    def encode_text(self, pipe: Any, request: VideoRequest, guidance: Guidance) -> dict[str, Any]:
        return encode_text(pipe, request, guidance)

    def text_lens(self, text: dict[str, Any]) -> tuple[int, ...]:
        masks = [mask for name, mask in text.items() if name.endswith("attention_mask")]
        return tuple(int(mask.sum(1).max()) for mask in masks)

    def denoise(
        self, pipe: Any, request: VideoRequest, arguments: dict[str, Any], seed: int, watch: StepWatch
    ) -> torch.Tensor:
        with explained_backend_failures():
            return call_pipeline(pipe, request, arguments, seed, watch)

    def decode(self, pipe: Any, latents: torch.Tensor) -> list[np.ndarray]:
        return list(checked_frames([decode(pipe.vae, latents)], FrameCheck()))

    def likeness(self, reference: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> Likeness:
        return likeness_of_videos(reference, made)

    def shown(self, number: int, made: Sequence[np.ndarray]) -> list[Image.Image]:
        from PIL import Image

        return [Image.fromarray(made[frame]) for frame in self._frames_shown(number)]

    def titles(self, number: int, prompt: str, seed: int) -> list[str]:
        frames = self._frames_shown(number)
        return [
            f"{prompt}, seed {seed}, frame {frame + 1}" if frame == frames[0] else f"frame {frame + 1}"
            for frame in frames
        ]

    def _frames_shown(self, number: int) -> list[int]:
        """Frames of the n-th video, evenly spread over its time; none of those that the sheet has no room for."""
        if number >= VIDEOS_SHOWN:
            return []
        last, count = self.request.frames - 1, min(FRAMES_SHOWN, self.request.frames)
        return [round(place * last / max(1, count - 1)) for place in range(count)]
