"""Training of the demo's autoencoder: from scratch, or of its decoder alone, which leaves the latents as they are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool2d

from grat_cli.demo.precision import training_autocast
from grat_cli.demo.scenes import draw_scene
from grat_cli.demo.shards import HELD_OUT_SEED, pictures_to_tensor, save_atomically

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

POOL_REFRESH = 2  # scenes replaced in the pool at every step


@dataclass(frozen=True)
class AutoencoderSettings:
    """How the autoencoder is trained.

    Attributes:
        decoder_only: leave the encoder as it is, so that a transformer trained on its latents stays valid.
        side: side of the scenes that crops are cut from, in pixels.
        crop: side of the crops, in pixels.
        steps: step at which training ends; the rate falls to zero along a cosine until then.
        batch: crops per step.
        learning_rate: peak rate of AdamW.
        latent_noise: largest deviation of the noise added to latents before decoding. A decoder that has seen noise
            forgives the errors of sampling.
        pool: scenes held to cut crops from.
        seed: of scenes, crops and noise.
        save_every: steps between saves.
    """

    decoder_only: bool = False
    side: int = 256
    crop: int = 64
    steps: int = 3_000
    batch: int = 8
    learning_rate: float = 1.5e-3
    latent_noise: float = 0.1
    pool: int = 256
    seed: int = 1
    save_every: int = 200


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the absolute error of pixels, of four-pixel averages (flat colour) and of differences (edges)."""
    pixels = (output - target).abs().mean()
    flat = (avg_pool2d(output, 4) - avg_pool2d(target, 4)).abs().mean()
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return pixels + 0.5 * flat + 0.5 * edges


class AutoencoderTrainer:
    """Trains the autoencoder of a pipeline; its state is one file."""

    def __init__(self, pipe: FluxPipeline, folder: Path, settings: AutoencoderSettings) -> None:
        self.settings = settings
        self.step = 0
        self._path = folder / "autoencoder.pt"
        self.model: AutoencoderTiny = pipe.vae.float().train().to(memory_format=torch.channels_last)  # pyright: ignore
        self.model.encoder.requires_grad_(not settings.decoder_only)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        if self._path.exists():
            state = torch.load(self._path)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        held = range(self._next_scene() - settings.pool, self._next_scene())
        self._pool = {number % settings.pool: self._scene(number) for number in held}

    def _next_scene(self) -> int:
        return self.settings.pool + self.step * POOL_REFRESH

    def _scene(self, number: int) -> torch.Tensor:
        return pictures_to_tensor([draw_scene(self.settings.seed * 1_000_000_000 + number, self.settings.side)])

    def _crops(self, generator: torch.Generator) -> torch.Tensor:
        """Return crops [batch, 3, crop, crop], half of them from scenes at half the side."""
        settings, crops = self.settings, []
        for index in torch.randint(settings.pool, (settings.batch,), generator=generator).tolist():
            scene = self._pool[index]
            if torch.rand(1, generator=generator) < 0.5:
                scene = avg_pool2d(scene, 2)
            left, top = torch.randint(scene.shape[-1] - settings.crop + 1, (2,), generator=generator).tolist()
            crops.append(scene[..., top : top + settings.crop, left : left + settings.crop])
        return torch.cat(crops).contiguous(memory_format=torch.channels_last)

    def train_step(self) -> float:
        """Take one step and return its loss."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_000_007 + self.step)
        target = self._crops(generator)
        with training_autocast():
            with torch.set_grad_enabled(not settings.decoder_only):
                latents = self.model.encode(target, return_dict=False)[0]
            amount = settings.latent_noise * torch.rand(len(target), 1, 1, 1, generator=generator)
            noise = torch.randn(latents.shape, generator=generator)
            output = self.model.decode(latents + amount * noise, return_dict=False)[0]
        loss = reconstruction_loss(output.float(), target)
        if not settings.decoder_only:
            loss = loss + 1e-3 * latents.float().square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        rate = 0.5 * (1 + math.cos(math.pi * self.step / settings.steps)) * min(1.0, (self.step + 1) / 50)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        self._optimizer.step()
        for number in range(self._next_scene(), self._next_scene() + POOL_REFRESH):
            self._pool[number % settings.pool] = self._scene(number)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Write the whole state of training."""
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        save_atomically(state, self._path)

    def train(self, minutes: float = math.inf, log: Callable[[str], None] = print) -> None:
        """Train up to the last step or for so many minutes, saving on the way."""
        begin, losses = time.monotonic(), []
        while self.step < self.settings.steps and time.monotonic() - begin < 60 * minutes:
            losses.append(self.train_step())
            if self.step % 100 == 0:
                log(f"step {self.step} loss {sum(losses) / len(losses):.4f} {time.monotonic() - begin:.0f} s")
                losses.clear()
            if self.step % self.settings.save_every == 0:
                self.save()
        self.save()


def use_latent_statistics(autoencoder: AutoencoderTiny, seed: int = 1, scenes: int = 64, side: int = 256) -> None:
    """Set the scaling and shift factors so that latents have zero mean and unit variance."""
    pictures = pictures_to_tensor([draw_scene(seed * 1_000_000_000 + number, side) for number in range(scenes)])
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(part, return_dict=False)[0] for part in pictures.split(8)])
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def signal_to_noise(autoencoder: AutoencoderTiny, side: int = 256, count: int = 16) -> float:
    """Return the reconstruction's peak signal-to-noise ratio in dB on scenes that training never draws."""
    pictures = pictures_to_tensor([draw_scene(HELD_OUT_SEED + number, side) for number in range(count)])
    output = []
    with torch.no_grad():
        for part in pictures.split(8):
            latents = autoencoder.encode(part, return_dict=False)[0]
            output.append(autoencoder.decode(latents, return_dict=False)[0].clamp(-1, 1))
    return 10 * math.log10(4 / (torch.cat(output) - pictures).square().mean().item())
