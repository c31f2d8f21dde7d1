"""Training clips without end, drawn and encoded shard by shard; a shard holds clips of one shape and place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from grat_cli.demo import DEMO_HUNYUAN
from grat_cli.demo.moving.architecture import FRAMES_PER_LATENT, TOKEN_PIXELS
from grat_cli.demo.moving.autoencoding import mean_latents, to_tensor
from grat_cli.demo.moving.scenes import MovingScene, View, draw_scene
from grat_cli.demo.shards import HELD_OUT_SEED, SCENES_PER_SEED, save_atomically

if TYPE_CHECKING:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

CAPTION_TOKENS = 16
_WARM_UP = 2  # latents before a window that starts in the middle of a clip: what the causal encoder looks back on


@dataclass(frozen=True)
class Shape:
    """Whole pictures, or windows into larger ones, that clips are made of.

    Attributes:
        width, height: of the clips in pixels.
        frames: of the clips, 4k+1.
        weight: share of the shards.
        canvas: width and height of the pictures that the clips are windows into; None for whole pictures.
    """

    width: int
    height: int
    frames: int
    weight: float
    canvas: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of one clip."""
        latents = (self.frames - 1) // FRAMES_PER_LATENT + 1
        return latents * (self.height // TOKEN_PIXELS) * (self.width // TOKEN_PIXELS)


# Small pictures are cheap, native ones are what the model is asked for, windows prepare it for larger ones.
SMALL = (Shape(128, 80, 17, 0.7), Shape(80, 128, 17, 0.15), Shape(96, 96, 17, 0.15))
NATIVE = (Shape(256, 144, 33, 0.84), Shape(144, 256, 33, 0.08), Shape(192, 192, 33, 0.08))
WINDOWS = (Shape(256, 144, 33, 0.4, (512, 288)), Shape(256, 144, 33, 0.6, (1280, 720)))
DIETS = {"small": (0.85, 0.10, 0.05), "native": (0.15, 0.60, 0.25)}


def shapes_of(diet: str) -> tuple[tuple[Shape, float], ...]:
    """The shapes of a diet and the share of the shards that each has."""
    groups = zip((SMALL, NATIVE, WINDOWS), DIETS[diet], strict=True)
    return tuple((shape, share * shape.weight) for group, share in groups for shape in group)


@dataclass
class Clips:
    """Clips as the transformer sees them.

    Attributes:
        latents: [N, 8, T, h, w], of about unit variance.
        prompt: [N, 16, 64], Llama's caption.
        valid: [N, 16], 1 where a token of the caption stands.
        pooled: [N, 64], CLIP's pooled caption.
        positions: [tokens, 3], rotary positions, the same for all clips.
    """

    latents: torch.Tensor
    prompt: torch.Tensor
    valid: torch.Tensor
    pooled: torch.Tensor
    positions: torch.Tensor

    def pick(self, rows: torch.Tensor) -> Clips:
        """Return the clips of the given rows."""
        return Clips(self.latents[rows], self.prompt[rows], self.valid[rows], self.pooled[rows], self.positions)


def encode_captions(pipe: HunyuanVideoPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings [N, 16, 64], which of their tokens are valid [N, 16], and pooled embeddings [N, 64]."""
    with torch.no_grad():
        encoded: Any = pipe.encode_prompt(captions, max_sequence_length=CAPTION_TOKENS)
    prompt, pooled, valid = encoded
    return prompt, valid, pooled


def token_positions(
    latents: int, rows: int, columns: int, start: tuple[int, int, int], stretched: bool
) -> torch.Tensor:
    """Return the rotary positions [tokens, 3] of a window that begins at token `start`.

    A whole picture that is smaller than the native one is stretched over the native one's positions, so that what is
    learned from small and cheap pictures holds for large ones.
    """
    axes = [torch.arange(count) + float(begin) for count, begin in zip((latents, rows, columns), start, strict=True)]
    if stretched:
        area = (DEMO_HUNYUAN.height // TOKEN_PIXELS) * (DEMO_HUNYUAN.width // TOKEN_PIXELS)
        stretch = (area / (rows * columns)) ** 0.5
        axes[1:] = [axis * stretch + (stretch - 1) / 2 for axis in axes[1:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)


def draw_shard(pipe: HunyuanVideoPipeline, seed: int, shape: Shape, first_scene: int, count: int) -> Clips:
    """Draw and encode `count` clips of a shape; a window's place is drawn from `seed`."""
    random = Random(seed)
    start = (0, 0, 0)
    view = View.whole(shape.width, shape.height)
    if shape.canvas is not None:
        start, view = _window(random, shape, shape.canvas)
    skipped = min(_WARM_UP, start[0])
    first_frame = FRAMES_PER_LATENT * (start[0] - skipped)
    frames = shape.frames + FRAMES_PER_LATENT * skipped
    scenes = [draw_scene(first_scene + number) for number in range(count)]
    latents = torch.cat([_encoded(pipe.vae, scene, view, first_frame, frames) for scene in scenes])[:, :, skipped:]
    prompt, valid, pooled = encode_captions(pipe, [scene.caption for scene in scenes])
    positions = token_positions(
        latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2, start, stretched=shape.canvas is None
    )
    return Clips(latents, prompt, valid, pooled, positions)


def _window(random: Random, shape: Shape, canvas: tuple[int, int]) -> tuple[tuple[int, int, int], View]:
    """Where a window begins, in tokens, and what it shows; not the corner that could be a whole small picture."""
    rows, columns = shape.height // TOKEN_PIXELS, shape.width // TOKEN_PIXELS
    row = column = 0
    while row < rows // 2 and column < columns // 2:
        row = random.randint(0, canvas[1] // TOKEN_PIXELS - rows)
        column = random.randint(0, canvas[0] // TOKEN_PIXELS - columns)
    view = View(*canvas, column * TOKEN_PIXELS, row * TOKEN_PIXELS, shape.width, shape.height)
    return (random.choice((0, random.randint(1, 22))), row, column), view


def _encoded(autoencoder: Any, scene: MovingScene, view: View, first_frame: int, frames: int) -> torch.Tensor:
    """Latents [1, 8, T, h, w] of a clip."""
    with torch.no_grad():
        clip = to_tensor(scene.frames(view, first_frame, frames)).to(autoencoder.dtype)
        return mean_latents(autoencoder, clip)


class ClipStream:
    """The clips of each training step: a function of the seed and the step alone, so that resuming changes nothing.

    A window of shards slides over an endless row of them by one shard every `steps_per_shard` steps, and grows from
    `first_window` shards to `window`. Shards lie in `folder` as long as they are in the window. Those that come in
    from step `native_from` on follow the native diet, those before it the small one.
    """

    def __init__(
        self,
        pipe: HunyuanVideoPipeline,
        folder: Path,
        *,
        native_from: int,
        seed: int,
        tokens_per_step: int = 5_000,
        shard_tokens: int = 20_000,
        window: int = 24,
        first_window: int = 12,
        steps_per_shard: int = 40,
    ) -> None:
        if not 0 <= seed < HELD_OUT_SEED // SCENES_PER_SEED:
            raise ValueError(f"the seed is {seed}: from {HELD_OUT_SEED // SCENES_PER_SEED} on, scenes are held out")
        self._pipe, self._folder, self._seed = pipe, folder, seed
        self._tokens_per_step, self._shard_tokens = tokens_per_step, shard_tokens
        self._window, self._first_window, self._steps_per_shard = window, first_window, steps_per_shard
        self._first_native = first_window + native_from // steps_per_shard
        self._shards: dict[int, Clips] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def _shape(self, index: int) -> Shape:
        shapes, weights = zip(*shapes_of("small" if index < self._first_native else "native"), strict=True)
        return Random(self._seed * SCENES_PER_SEED + index).choices(shapes, weights)[0]

    def _path(self, index: int) -> Path:
        return self._folder / f"seed{self._seed}-{index:06d}.pt"

    def _shard(self, index: int) -> Clips:
        path = self._path(index)
        if not path.exists():
            shape = self._shape(index)
            first = self._seed * SCENES_PER_SEED + index * self._shard_tokens  # no clip has less than one token
            clips = draw_shard(self._pipe, first, shape, first, max(1, self._shard_tokens // shape.tokens))
            save_atomically(vars(clips), path)
        return Clips(**torch.load(path))

    def batch(self, step: int, generator: torch.Generator) -> Clips:
        """Return the clips of one step, picked with `generator`."""
        end = self._first_window + step // self._steps_per_shard
        wanted = range(max(0, end - self._window), end)
        for index in [index for index in self._shards if index not in wanted]:
            del self._shards[index]
            self._path(index).unlink(missing_ok=True)
        for index in wanted:
            if index not in self._shards:
                self._shards[index] = self._shard(index)
        shard = self._shards[wanted[int(torch.randint(len(wanted), (1,), generator=generator))]]
        count = max(1, self._tokens_per_step // len(shard.positions))
        return shard.pick(torch.randperm(len(shard.latents), generator=generator)[:count])
