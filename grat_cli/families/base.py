"""Models and what is known of each family before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Medium = Literal["image", "video"]

PIPELINES_OF_MEDIUM: Mapping[Medium, tuple[str, ...]] = {
    "image": ("FluxPipeline", "FluxImg2ImgPipeline"),
    "video": ("HunyuanVideoPipeline",),
}
# Pipelines of diffusers that may be taken for supported ones, and why they are not.
UNSUPPORTED_PIPELINES: Mapping[str, str] = {
    "HunyuanVideoImageToVideoPipeline": "it starts from a picture, whose tokens it treats apart",
    "HunyuanSkyreelsImageToVideoPipeline": "it starts from a picture, which it adds to the channels of the latents",
    "HunyuanVideoFramepackPipeline": "it adds tokens of earlier frames to those of the video",
    "HunyuanVideo15Pipeline": "HunyuanVideo 1.5 has another transformer",
    "HunyuanVideo15ImageToVideoPipeline": "HunyuanVideo 1.5 has another transformer",
}
FLUX_TOKEN_SIDE = 16


@dataclass(frozen=True)
class VideoTraits:
    """What videos a model was trained on.

    Attributes:
        width: in pixels.
        height: in pixels.
        frames: of a video.
        fps: frames per second.
        frames_per_latent: frames that a frame of latents stands for; videos have `k * frames_per_latent + 1` frames.
    """

    width: int
    height: int
    frames: int
    fps: int
    frames_per_latent: int = 4


@dataclass(frozen=True)
class ModelChoice:
    """A model, and the settings it was trained for.

    Attributes:
        name: as typed, or as chosen where nothing was typed.
        source: hub id, folder, or file of a transformer alone.
        kind: which of these three.
        family: which presets are made for it.
        reason: why this model.
        native_side: height and width in pixels that it was trained at; for videos, the side of a square as large.
        token_side: pixels per side of an image token.
        size_multiple: heights and widths must be multiples of it.
        text_tokens: length that prompts are padded or cut to.
        default_steps: denoising steps that suit it.
        default_guidance: guidance that suits it, None where it takes none.
        default_shift: time shift that suits it, None for that of its scheduler.
        true_guidance: whether its guidance is true classifier-free guidance, with a second transformer call per step.
        video: what videos it makes; None for a model of images.
        is_demo: whether it is a bundled model, which knows a few hundred words.
    """

    name: str
    source: str
    kind: Literal["hub", "folder", "file"]
    family: Literal["flux", "demo", "hunyuan"]
    reason: str
    native_side: int = 1024
    token_side: int = FLUX_TOKEN_SIDE
    size_multiple: int = 16
    text_tokens: int = 512
    default_steps: int = 28
    default_guidance: float | None = 3.5
    default_shift: float | None = None
    true_guidance: bool = False
    video: VideoTraits | None = None
    is_demo: bool = False

    @property
    def medium(self) -> Medium:
        """What it makes."""
        return "image" if self.video is None else "video"
