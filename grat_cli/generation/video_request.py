"""What videos are asked for: all that a run needs, so that it can be kept in a file and gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from grat_cli.errors import BadInput
from grat_cli.families.base import ModelChoice, VideoTraits
from grat_cli.generation.request import GenerationRequest, Progress, check_size
from grat_cli.presets import Preset


@dataclass(frozen=True, kw_only=True)
class VideoRequest(GenerationRequest):
    """Which videos to make, and where they go.

    Attributes:
        frames: of each video.
        fps: frames per second.
        outputs: file, or folder of frames, of each seed's video; all in one folder.
        format: of `video_files.FORMATS`.
        crf: quality of the encoder, None for the format's own.
        checkpoint_every: steps between checkpoints; 0 for none.
        save_latents: whether the latents are kept beside the video.
        metadata: whether the video says how it was made.
        overwrite: whether existing files may be replaced.
        command: the command line as typed, for the report.
    """

    frames: int
    fps: int
    outputs: tuple[Path, ...]
    format: str = "mp4"
    crf: int | None = None
    checkpoint_every: int = 0
    save_latents: bool = False
    metadata: bool = True
    overwrite: bool = False
    command: str = ""

    @property
    def size(self) -> str:
        """For example `1280x720x129`."""
        return f"{self.width}x{self.height}x{self.frames}"

    @property
    def latent_frames(self) -> int:
        """Frames of the latents."""
        return (self.frames - 1) // _traits(self.model).frames_per_latent + 1

    @property
    def video_tokens(self) -> int:
        """Tokens of the video in the joint sequence."""
        side = self.model.token_side
        return self.latent_frames * (self.height // side) * (self.width // side)


def check_video(request: VideoRequest) -> None:
    """Raises BadInput unless the model can make such videos and there is a place for each."""
    unit = _traits(request.model).frames_per_latent
    check_size(request)
    if request.frames < 1 or (request.frames - 1) % unit:
        lower = max(0, (request.frames - 1) // unit) * unit + 1
        raise BadInput(
            f"the frames of a video must be a multiple of {unit} and one more, not {request.frames}: "
            f"use {lower} or {lower + unit}"
        )
    if request.fps < 1:
        raise BadInput(f"frames per second must be 1 or more, not {request.fps}")
    if len(request.outputs) != len(request.seeds):
        raise BadInput(f"{len(request.seeds)} seeds need as many outputs, not {len(request.outputs)}")
    if request.checkpoint_every < 0:
        raise BadInput(f"steps between checkpoints must be 0 or more, not {request.checkpoint_every}")


def note_expectations(request: VideoRequest, progress: Progress) -> None:
    """Says beforehand which words a model cannot make anything of."""
    if not request.model.is_demo:
        return
    from grat_cli.demo import unknown_words, video_vocabulary

    known = video_vocabulary()
    if unknown := unknown_words(request.prompt, known):
        progress.note(f"the demo model does not know {', '.join(unknown)}; it shows {', '.join(known['subjects'])}")


def request_data(request: VideoRequest) -> dict[str, Any]:
    """The request as plain data, from which `request_from_data` makes it again in another folder or process."""
    data = {field.name: getattr(request, field.name) for field in fields(request)}
    model = asdict(request.model)
    if request.model.kind != "hub":
        model["source"] = str(Path(request.model.source).resolve())
    if request.base is not None and Path(request.base).expanduser().exists():
        data["base"] = str(Path(request.base).expanduser().resolve())
    return {
        **data,
        "preset": request.preset.model_dump(mode="json"),
        "model": model,
        "seeds": list(request.seeds),
        "outputs": [path.name for path in request.outputs],
    }


def request_from_data(data: Mapping[str, Any], folder: Path) -> VideoRequest:
    """The request that `request_data` was made of.

    Args:
        data: what it returned.
        folder: where the outputs are to go.

    Raises:
        BadInput: if it is not whole, or of another version.
    """
    try:
        model = dict(data["model"])
        model["video"] = VideoTraits(**model["video"])
        request = VideoRequest(
            **{
                **data,
                "preset": Preset.model_validate(data["preset"]),
                "model": ModelChoice(**model),
                "seeds": tuple(int(seed) for seed in data["seeds"]),
                # The names alone: nothing is written outside the folder.
                "outputs": tuple(folder / Path(name).name for name in data["outputs"]),
            }
        )
        check_video(request)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput("the request is damaged, or of another version of grat") from error
    return request


def _traits(model: ModelChoice) -> VideoTraits:
    """Raises BadInput for a model of images."""
    if model.video is None:
        raise BadInput(f"{model.name} makes images: give --model a model of videos, such as hunyuan or demo")
    return model.video
