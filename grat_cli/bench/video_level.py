"""`--level video`: whole runs with videos, compared with those of full attention from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli.bench.measure import Progress
from grat_cli.bench.results import BenchResult
from grat_cli.bench.whole_runs import Pictures, RunSettings, compare_runs
from grat_cli.demo.moving.evaluation import SAMPLE_PROMPTS
from grat_cli.fidelity.quality import Likeness, likeness_of_videos
from grat_cli.generation.makers import VideoMaker, request_for
from grat_cli.generation.video_request import VideoRequest

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Another subject each, as far as they go, then the others; and six more.
PROMPTS: tuple[str, ...] = (
    *SAMPLE_PROMPTS[::2],
    *SAMPLE_PROMPTS[1::2],
    "waves rolling at sunset",
    "an orange boat sailing across the sea",
    "a purple boat on the sea at night",
    "a green ball bouncing on the grass",
    "a red ball bouncing at night",
    "snow falling at sunset",
)
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
    return compare_runs(settings, ComparedVideos(settings), progress)


class ComparedVideos(VideoMaker):
    """Videos of HunyuanVideo that are compared; a `whole_runs.ComparedMaker`."""

    def __init__(self, settings: VideoSettings) -> None:
        preset, model = settings.preset(), settings.model
        model.require_video()
        request = request_for(
            model,
            preset,
            settings.prompts[0],
            width=settings.width,
            height=settings.height,
            frames=settings.frames,
        )
        assert isinstance(request, VideoRequest)
        super().__init__(request)
        self.recorded: Mapping[str, Any] = {
            "width": request.width,
            "height": request.height,
            "frames": request.frames,
            "fps": request.fps,
        }
        self.notes: tuple[str, ...] = (
            f"Full attention is stock diffusers: it attends the padding of the text, to {model.text_tokens} tokens, "
            "under a mask, which the others cut off; full-list is full attention without it.",
            "Videos are compared frame by frame with its videos of the same prompts and seeds: mean and 95 % interval "
            "by Student's t over the videos.",
        )

    def likeness(self, reference: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> Likeness:
        """See `whole_runs.ComparedMaker`, as for all below."""
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
