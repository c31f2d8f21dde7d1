"""Training data without end: scenes are drawn and encoded shard by shard, a few shards ahead of being forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import TOKEN_PIXELS
from grat_cli.demo.precision import training_autocast
from grat_cli.demo.scenes import Scene, draw_scene

if TYPE_CHECKING:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

HELD_OUT_SEED = 1_000_000_000_000  # scenes from here on are never trained on
SCENES_PER_SEED = 1_000_000_000
ENCODER_BATCH = 16


@dataclass
class EncodedScenes:
    """Scenes as the transformer sees them.

    Attributes:
        latents: [N, tokens, 16], packed, scaled to about unit variance.
        subject: [N, tokens], how much of each token's square the subject covers, 0 to 1.
        pooled: [N, 64], CLIP's pooled caption.
        prompt: [N, text tokens, 128], T5's caption.
    """

    latents: torch.Tensor
    subject: torch.Tensor
    pooled: torch.Tensor
    prompt: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def pick(self, rows: torch.Tensor) -> EncodedScenes:
        """Return the scenes of the given rows."""
        return EncodedScenes(self.latents[rows], self.subject[rows], self.pooled[rows], self.prompt[rows])


def concatenate(parts: list[EncodedScenes]) -> EncodedScenes:
    """Return all scenes of several sets as one."""
    fields = ("latents", "subject", "pooled", "prompt")
    return EncodedScenes(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))


def pictures_to_tensor(scenes: list[Scene]) -> torch.Tensor:
    """Return the pictures as [N, 3, H, W] in -1 to 1."""
    stacked = torch.from_numpy(numpy.stack([numpy.asarray(scene.picture) for scene in scenes]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_captions(pipe: FluxPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pooled [N, 64] and the full [N, text tokens, 128] embeddings of the captions."""
    with torch.no_grad():
        embeddings: Any = pipe.encode_prompt(captions, captions, max_sequence_length=DEMO_FLUX.text_tokens)
    prompt, pooled, _ = embeddings
    return pooled, prompt


def encode_scenes(pipe: FluxPipeline, scenes: list[Scene], captions: list[str] | None = None) -> EncodedScenes:
    """Encode scenes with the pipeline's autoencoder and text encoders.

    `captions` replaces the scenes' own captions.
    """
    pooled, prompt = encode_captions(pipe, captions or [scene.caption for scene in scenes])
    latents = []
    for begin in range(0, len(scenes), ENCODER_BATCH):
        pictures = pictures_to_tensor(scenes[begin : begin + ENCODER_BATCH])
        with torch.no_grad(), training_autocast():
            latents.append(pipe.vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latents)
    unscaled = torch.cat(latents).float()
    scaled = (unscaled - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    masks = torch.from_numpy(numpy.stack([numpy.asarray(scene.mask) for scene in scenes])).float() / 255
    return EncodedScenes(
        latents=pipe._pack_latents(scaled, *scaled.shape),
        subject=torch.nn.functional.avg_pool2d(masks, TOKEN_PIXELS).flatten(1),
        pooled=pooled,
        prompt=prompt,
    )


class SceneStream:
    """The training pictures of each step: a function of the seed and the step alone, so that resuming changes nothing.

    A window of `window` shards slides over an endless row of scenes by one shard every `steps_per_shard` steps; a
    picture is seen about `reuse` times. Shards lie in `folder` as long as they are in the window.
    """

    def __init__(
        self,
        pipe: FluxPipeline,
        folder: Path,
        *,
        side: int,
        batch: int,
        seed: int,
        shard_size: int = 2048,
        window: int = 4,
        reuse: int = 4,
    ) -> None:
        if shard_size * window < batch:
            raise ValueError(f"a window of {window} shards of {shard_size} scenes is smaller than a batch of {batch}")
        if not 0 <= seed < HELD_OUT_SEED // SCENES_PER_SEED:
            raise ValueError(f"the seed is {seed}: from {HELD_OUT_SEED // SCENES_PER_SEED} on, scenes are held out")
        pipe.vae.to(memory_format=torch.channels_last)  # four times faster on a CPU
        self._pipe, self._folder, self._side, self._batch, self._seed = pipe, folder, side, batch, seed
        self._shard_size, self._window = shard_size, window
        self._steps_per_shard = max(1, shard_size * reuse // batch)
        self._first_shard: int | None = None
        self._scenes: EncodedScenes | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"{self._side}px-seed{self._seed}-{self._shard_size}x{index:06d}.pt"

    def _shard(self, index: int) -> EncodedScenes:
        path = self._path(index)
        if not path.exists():
            first = self._seed * SCENES_PER_SEED + index * self._shard_size
            scenes = [draw_scene(first + number, self._side) for number in range(self._shard_size)]
            encoded = encode_scenes(self._pipe, scenes)
            save_atomically({name: tensor.bfloat16() for name, tensor in vars(encoded).items()}, path)
        return EncodedScenes(**torch.load(path))

    def batch(self, step: int, generator: torch.Generator) -> EncodedScenes:
        """Return the scenes of one step, picked with `generator`."""
        first = step // self._steps_per_shard
        if first != self._first_shard or self._scenes is None:
            if self._first_shard is not None:
                for index in range(self._first_shard, first):
                    self._path(index).unlink(missing_ok=True)
            self._scenes = concatenate([self._shard(index) for index in range(first, first + self._window)])
            self._first_shard = first
        return self._scenes.pick(torch.randint(len(self._scenes), (self._batch,), generator=generator))


def save_atomically(state: object, path: Path) -> None:
    """Write a file for `torch.load` so that an interruption leaves the old file or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
