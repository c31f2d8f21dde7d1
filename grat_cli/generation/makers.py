"""Makers: one face for pictures and videos, for all that is done with whole runs of either."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from grat_cli.errors import BadInput
from grat_cli.estimates.stages import Stage
from grat_cli.families import picture_coding
from grat_cli.families.guidance import Guidance, choose_guidance
from grat_cli.families.time_shift import time_shift
from grat_cli.generation import image_request, pictures, video_request, videos
from grat_cli.generation.denoising import StepWatch, explained_backend_failures
from grat_cli.generation.frames import FrameCheck, checked_frames
from grat_cli.generation.image_request import ImageRequest
from grat_cli.generation.request import GenerationRequest, Progress, check_size
from grat_cli.generation.stage_run import denoise as denoise_picture
from grat_cli.generation.video_decoding import decode as decode_video
from grat_cli.generation.video_decoding import use_tiles
from grat_cli.generation.video_request import VideoRequest, check_video
from grat_cli.installation import Installation, install
from grat_cli.models.catalogue import ModelChoice
from grat_cli.models.resolution import Resolution
from grat_cli.presets import Preset
from grat_kernels import Grid

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from typing_extensions import NotRequired

    from grat_cli.attention.adapter import CallObserver


class Size(TypedDict):
    """In pixels and frames."""

    height: int
    width: int
    num_frames: NotRequired[int]


class Maker(Protocol):
    """What a request for one medium is, and how it is made. `Any` stands for what it makes.

    Attributes:
        family: of the model, `flux` or `hunyuan`.
        grid: image tokens.
        title: of the size, for people.
        size: as `install` takes it.
    """

    family: str
    grid: Grid
    title: str
    size: Size

    @property
    def request(self) -> GenerationRequest:
        """What is asked of each run; prompt and preset are replaced from run to run."""
        ...

    def prepare(self, pipe: Any) -> None:
        """Sets a pipeline up, once."""
        ...

    def note_expectations(self, request: Any, progress: Progress) -> None:
        """Says beforehand what the model cannot do."""
        ...

    def encode_text(self, pipe: Any, request: Any, guidance: Guidance) -> dict[str, Any]:
        """Prompts as the pipeline takes them."""
        ...

    def text_lens(self, text: dict[str, Any]) -> tuple[int, ...]:
        """Text tokens in the joint sequence of each transformer call of a step."""
        ...

    def denoise(self, pipe: Any, request: Any, arguments: dict[str, Any], seed: int, watch: StepWatch) -> torch.Tensor:
        """Latents of one output."""
        ...

    def decode(self, pipe: Any, latents: torch.Tensor) -> Any:
        """The output of latents: a picture, or frames uint8 `[H, W, 3]`.

        Raises:
            NumericalFailure: if it has NaN or shows nothing.
        """
        ...


class PictureMaker:
    """Pictures of Flux, from noise at one size whatever the preset's `highres` section says; a `Maker`."""

    family = "flux"

    def __init__(self, request: ImageRequest) -> None:
        check_size(request)
        self.request = request
        self.grid = Grid((request.height // request.model.token_side, request.width // request.model.token_side))
        self.title = f"{request.width}x{request.height} pixels"
        self.size: Size = {"height": request.height, "width": request.width}

    def prepare(self, pipe: Any) -> None:
        """See `Maker`, as for all below. Pictures need nothing."""

    def note_expectations(self, request: ImageRequest, progress: Progress) -> None:
        image_request.note_expectations(request, progress)

    def encode_text(self, pipe: Any, request: ImageRequest, guidance: Guidance) -> dict[str, Any]:
        return pictures.encode_text(pipe, request, guidance.negative_prompt)

    def text_lens(self, text: dict[str, Any]) -> tuple[int, ...]:
        return (text["prompt_embeds"].shape[1],)

    def denoise(
        self, pipe: Any, request: ImageRequest, arguments: dict[str, Any], seed: int, watch: StepWatch
    ) -> torch.Tensor:
        import torch

        size = Resolution(request.width, request.height)
        stage = Stage(0, size.width, size.height, request.preset, strength=None, trained=size)
        generator = torch.Generator("cpu").manual_seed(seed)
        packed = denoise_picture(pipe, stage, arguments, None, generator, watch)
        return pipe._unpack_latents(packed, stage.height, stage.width, pipe.vae_scale_factor)

    def decode(self, pipe: Any, latents: torch.Tensor) -> Image.Image:
        return picture_coding.to_picture(pipe, picture_coding.decode(pipe, latents))


class VideoMaker:
    """Videos of HunyuanVideo; a `Maker`."""

    family = "hunyuan"

    def __init__(self, request: VideoRequest) -> None:
        check_video(request)
        self.request = request
        side = request.model.token_side
        self.grid = Grid((request.latent_frames, request.height // side, request.width // side))
        self.title = f"{request.width}x{request.height} pixels, {request.frames} frames"
        self.size: Size = {
            "height": request.height,
            "width": request.width,
            "num_frames": request.frames,
        }

    def prepare(self, pipe: Any) -> None:
        """See `Maker`, as for all below."""
        use_tiles(pipe.vae)

    def note_expectations(self, request: VideoRequest, progress: Progress) -> None:
        video_request.note_expectations(request, progress)

    def encode_text(self, pipe: Any, request: VideoRequest, guidance: Guidance) -> dict[str, Any]:
        return videos.encode_text(pipe, request, guidance)

    def text_lens(self, text: dict[str, Any]) -> tuple[int, ...]:
        masks = [mask for name, mask in text.items() if name.endswith("attention_mask")]
        return tuple(int(mask.sum(1).max()) for mask in masks)

    def denoise(
        self, pipe: Any, request: VideoRequest, arguments: dict[str, Any], seed: int, watch: StepWatch
    ) -> torch.Tensor:
        with explained_backend_failures():
            return videos.call_pipeline(pipe, request, arguments, seed, watch)

    def decode(self, pipe: Any, latents: torch.Tensor) -> list[np.ndarray]:
        return list(checked_frames([decode_video(pipe.vae, latents)], FrameCheck()))


def request_for(
    model: ModelChoice,
    preset: Preset,
    prompt: str,
    *,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> ImageRequest | VideoRequest:
    """A request for one output of a model, with seeds and files left open.

    Args:
        model: of `models.choose_model`.
        preset: attention and sampling.
        prompt: what it shows.
        width: in pixels; None for what the model was trained at.
        height: likewise.
        frames: likewise, for videos alone.
        device: as in `--device`.
        dtype: as in `--dtype`.

    Raises:
        BadInput: if frames are given for a model of images.
    """
    if model.video is None:
        if frames is not None:
            raise BadInput(f"{model.name} makes images: leave out frames")
        side = model.native_side
        return ImageRequest(prompt, preset, model, width or side, height or side, (), device=device, dtype=dtype)
    return VideoRequest(
        prompt=prompt,
        preset=preset,
        model=model,
        width=width or model.video.width,
        height=height or model.video.height,
        frames=frames or model.video.frames,
        fps=model.video.fps,
        seeds=(),
        outputs=(),
        device=device,
        dtype=dtype,
    )


def maker_for(request: ImageRequest | VideoRequest) -> PictureMaker | VideoMaker:
    """The maker of a request.

    Raises:
        BadInput: if the model cannot make outputs of its size.
    """
    return VideoMaker(request) if isinstance(request, VideoRequest) else PictureMaker(request)


def run_installed(
    pipe: Any,
    maker: Maker,
    preset: Preset,
    prompt: str,
    seed: int,
    progress: Progress,
    observer: CallObserver | None = None,
) -> tuple[torch.Tensor, Installation]:
    """Latents of one output, made from noise with a preset installed; and what was installed.

    Args:
        pipe: a loaded pipeline, which `maker.prepare` has seen.
        maker: of the medium.
        preset: attention, schedule and sampling.
        prompt: what the output shows.
        seed: of its noise.
        progress: told of the steps.
        observer: as for `install`.

    Raises:
        BadInput: if preset and size do not fit.
        NumericalFailure: if latents turn NaN or infinite.
    """
    request = replace(maker.request, prompt=prompt, preset=preset)
    guidance = choose_guidance(pipe, request.model, preset, request.negative_prompt)
    arguments = maker.encode_text(pipe, request, guidance) | guidance.arguments
    watch = StepWatch(progress)
    with (
        time_shift(pipe, maker.grid.tokens, preset.sampling.shift),
        install(pipe, preset, **maker.size, observer=observer) as installation,
    ):
        latents = maker.denoise(pipe, request, arguments, seed, watch)
    watch.raise_if_not_finite()
    return latents, installation
