"""Shapes of the transformers that grat knows, for planning without loading one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class VideoDecoder:
    """The decoder of an `AutoencoderKLHunyuanVideo`.

    Attributes:
        channels: of its levels, finest first.
        layers: residual blocks of a level, less one.
    """

    channels: tuple[int, ...]
    layers: int

    def flop(self, frames: int, rows: int, columns: int) -> float:
        """Floating-point operations to decode latents of a size; of convolutions alone, which are nearly all of it."""
        # Two operations per weight of a kernel of 3x3x3. In the middle two residual blocks, of two convolutions each.
        previous = self.channels[-1]
        total = 4.0 * frames * rows * columns * previous**2
        for level, channels in enumerate(reversed(self.channels)):
            total += frames * rows * columns * (previous + (1 + 2 * self.layers) * channels) * channels
            if level < 3:  # eight pixels per latent; time is doubled at the last two of the three
                rows, columns = 2 * rows, 2 * columns
                frames = 2 * frames - 1 if level > 0 else frames
                total += frames * rows * columns * channels**2
            previous = channels
        return 2 * 27 * (total + frames * rows * columns * previous * 3)


@dataclass(frozen=True)
class Architecture:
    """What a plan needs to know of a model.

    Attributes:
        family: which presets suit it.
        heads: attention heads.
        head_dim: channels per head.
        layers: transformer blocks with attention over image tokens.
        text_tokens: text tokens of the joint sequence.
        token_side: pixels per side of an image token.
        native_side: side of the square pictures it was trained on, in pixels.
        runs_twice: whether guidance takes a second transformer call per step (classifier-free guidance) instead of
            being an input of the transformer (distilled guidance).
        frames_per_latent: video frames that a row of tokens along time stands for; None for models of images.
        decoder: of videos; likewise.
    """

    family: str
    heads: int
    head_dim: int
    layers: int
    text_tokens: int
    token_side: int
    native_side: int
    runs_twice: bool
    frames_per_latent: int | None = None
    decoder: VideoDecoder | None = None

    @property
    def text_first(self) -> bool:
        """Whether text comes before the image tokens in the joint sequence."""
        return self.family != "hunyuan"

    def linear_flop(self, tokens: int) -> float:
        """Floating-point operations of all linear layers of one transformer call on a joint sequence.

        A block of either kind has 12 weights per pair of channels: query, key, value and output, and a feed-forward
        four times as wide. Each takes a multiplication and an addition per token.
        """
        return 24.0 * (self.heads * self.head_dim) ** 2 * self.layers * tokens

    def calls_per_step(self, guidance: float | None) -> int:
        """Transformer calls per denoising step."""
        return 2 if self.runs_twice and guidance is not None and guidance > 1 else 1


# Sizes in pixels must be multiples of this for every model: the pipelines of diffusers round down silently otherwise.
SIZE_MULTIPLE = 16

# Flux: 19 double and 38 single blocks (black-forest-labs/FLUX.1-dev, transformer/config.json); dev takes 512 T5 tokens,
# schnell 256. HunyuanVideo: 20 double and 40 single blocks (hunyuanvideo-community/HunyuanVideo, likewise). The demo:
# 1 double and 4 single blocks.
ARCHITECTURES: Mapping[str, Architecture] = {
    "flux-dev": Architecture("flux", 24, 128, 57, 512, 16, 1024, runs_twice=False),
    "flux-schnell": Architecture("flux", 24, 128, 57, 256, 16, 1024, runs_twice=False),
    "hunyuan": Architecture(
        "hunyuan",
        24,
        128,
        60,
        256,
        16,
        960,
        runs_twice=False,
        frames_per_latent=4,
        decoder=VideoDecoder((128, 256, 512, 512), 2),
    ),
    "demo": Architecture("demo", 3, 64, 5, 24, 8, 256, runs_twice=True),
}


def architecture_of(model: str, family: str) -> Architecture:
    """The architecture of a model by name; of any other checkpoint that of its family."""
    of_name = ARCHITECTURES.get(model)
    if of_name is not None and of_name.family == family:
        return of_name
    return ARCHITECTURES[{"flux": "flux-dev", "demo": "demo", "hunyuan": "hunyuan"}[family]]
