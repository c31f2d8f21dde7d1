"""Training of the demo's video autoencoder on crops of moving scenes, in bf16 with fp32 master weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch
from torch.nn.functional import avg_pool3d

from grat_cli.demo.moving.scenes import View, draw_scene
from grat_cli.demo.precision import orthogonalising, training_dtype
from grat_cli.demo.shards import HELD_OUT_SEED, SCENES_PER_SEED, save_atomically

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

SIZES = ((128, 80), (256, 144), (256, 144), (512, 288), (1280, 720), (144, 256))  # of the pictures that crops are of


@dataclass(frozen=True)
class AutoencoderSettings:
    """How the autoencoder is trained.

    Attributes:
        decoder_only: leave the encoder as it is, so that a transformer trained on its latents stays valid.
        crop: side of the crops, in pixels.
        frames: of a crop, 4k+1.
        steps: step at which training ends; the rate falls to zero along a cosine until then.
        batch: crops per step.
        learning_rate: peak rate of Muon, which trains the convolutions, and of AdamW, which trains the rest. With AdamW
            alone a rate that is small enough for sums over 864 inputs hardly moves.
        latent_noise: largest deviation of the noise added to latents before decoding, which sampling will make.
        pool: crops held; each is used about `pool / refresh` steps long, turned and mirrored.
        refresh: crops drawn anew at every step.
        seed: of scenes, crops and noise.
        save_every: steps between saves.
    """

    decoder_only: bool = False
    crop: int = 64
    frames: int = 9
    steps: int = 2_400
    batch: int = 4
    learning_rate: float = 2e-4
    latent_noise: float = 0.1
    pool: int = 256
    refresh: int = 2
    seed: int = 1
    save_every: int = 200


def to_tensor(frames: numpy.ndarray) -> torch.Tensor:
    """Return uint8 frames [T, H, W, 3] as [1, 3, T, H, W] in -1 to 1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def mean_latents(autoencoder: Any, clips: torch.Tensor) -> torch.Tensor:
    """Return the latents [B, 8, t, h, w] of clips [B, 3, T, H, W], without the noise of a sample."""
    return autoencoder.encode(clips).latent_dist.mean


def draw_crop(seed: int, side: int, frames: int) -> torch.Tensor:
    """Return a crop [1, 3, frames, side, side] of the scene of `seed`, at a size and place drawn from the seed too."""
    random = Random(seed)
    width, height = random.choice(SIZES)
    left, top = random.randint(0, max(0, width - side)), random.randint(0, max(0, height - side))
    view = View(width, height, left, top, side, side)
    return to_tensor(draw_scene(seed).frames(view, random.randint(0, 60), frames))


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the absolute error of pixels, of four-pixel averages (flat colour), and of differences (edges, motion)."""
    error = output - target
    flat = avg_pool3d(error, (1, 4, 4)).abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * flat + 0.5 * edges + 0.25 * error.diff(dim=2).abs().mean()


_ANCHORS = 5  # channels of every layer that start out as red, green, blue and two constants
_CONSTANT = 1.5
_OTHERS = 0.2  # share that is kept of the random weights of all other channels
_NEARLY_LINEAR = 2.0  # from here on SiLU is close to a straight line


def start_as_averages(autoencoder: AutoencoderKLHunyuanVideo) -> None:
    """Set the weights of an untrained autoencoder so that it passes average colours, and learns the rest from there.

    Three channels of every layer carry the colours, averaged on the way down and interpolated on the way up. Two more
    carry large constants of both signs: the normalisations divide by a spread that these rule, whatever the picture,
    so that absolute colours survive them. Residual branches start at zero.
    """
    smooth, last = torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.0, 0.0, 1.0])
    centre = torch.tensor([0.0, 1.0, 0.0])

    def pass_on(conv: Any, along_time: torch.Tensor, across: torch.Tensor, channels: int) -> None:
        kernel = torch.einsum("t,y,x->tyx", along_time, across, across)
        conv.weight[:channels], conv.bias[:channels] = 0.0, 0.0
        for channel in range(channels):
            conv.weight[channel, channel] = kernel if conv.kernel_size[0] == 3 else 1.0

    with torch.no_grad():
        for parameter in autoencoder.parameters():
            if parameter.ndim == 5:
                parameter *= _OTHERS
        parts: tuple[Any, Any] = (autoencoder.encoder, autoencoder.decoder)
        for part in parts:
            for module in part.modules():
                if hasattr(module, "conv2"):
                    module.conv2.conv.weight.zero_()
                    module.conv2.conv.bias.zero_()
                    if module.conv_shortcut is not None:
                        pass_on(module.conv_shortcut.conv, last, centre, _ANCHORS)
            entry, end = part.conv_in.conv, part.conv_out.conv
            pass_on(entry, last, centre, 3)
            entry.weight[3:_ANCHORS], entry.bias[3:_ANCHORS] = 0.0, torch.tensor([_CONSTANT, -_CONSTANT])
            part.conv_norm_out.bias[:3] = _NEARLY_LINEAR
            pass_on(end, last, centre, 3)
            end.bias[:3] = -_NEARLY_LINEAR
        for block in parts[0].down_blocks:
            for sampler in block.downsamplers or ():
                pass_on(sampler.conv.conv, smooth if sampler.conv.conv.stride[0] == 2 else last, smooth, _ANCHORS)
        for block in parts[1].up_blocks:
            for sampler in block.upsamplers or ():
                pass_on(sampler.conv.conv, last, smooth, _ANCHORS)
        for conv in (autoencoder.quant_conv, autoencoder.post_quant_conv):
            pass_on(conv, last, centre, 3)
        _fit_colours(autoencoder, torch.cat([draw_crop(number, 64, 5) for number in range(32)]))


def _fit_colours(autoencoder: AutoencoderKLHunyuanVideo, clips: torch.Tensor) -> None:
    """Scale and shift each output colour so that it fits the clips [B, 3, T, H, W] best."""
    output = autoencoder.decode(mean_latents(autoencoder, clips), return_dict=False)[0]
    conv: Any = autoencoder.decoder.conv_out.conv
    for colour in range(3):
        given, wanted = output[:, colour].flatten(), clips[:, colour].flatten()
        gain = torch.cov(torch.stack([given, wanted]))[0, 1] / given.var()
        conv.weight[colour] *= gain
        conv.bias[colour] = conv.bias[colour] * gain + wanted.mean() - gain * given.mean()


class AutoencoderTrainer:
    """Trains the autoencoder of a pipeline; its state is one file."""

    def __init__(self, pipe: HunyuanVideoPipeline, folder: Path, settings: AutoencoderSettings) -> None:
        self.settings = settings
        self.step = 0
        self._path = folder / "autoencoder.pt"
        self.model: AutoencoderKLHunyuanVideo = pipe.vae.float().train()
        for part in (self.model.encoder, self.model.quant_conv):
            part.requires_grad_(not settings.decoder_only)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._kernels = [parameter for parameter in self._parameters if parameter.ndim == 5]
        # Muon takes matrices: views of the kernels, which share their memory.
        self._matrices = [torch.nn.Parameter(kernel.data.flatten(1)) for kernel in self._kernels]
        others = [parameter for parameter in self._parameters if parameter.ndim != 5]
        rate = settings.learning_rate
        self._optimizers = [
            torch.optim.Muon(self._matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        if self._path.exists():
            state = torch.load(self._path)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self._worker = cast(Any, copy.deepcopy(self.model)).to(training_dtype())
        held = range(self._next_crop() - settings.pool, self._next_crop())
        self._pool = {number % settings.pool: self._crop(number) for number in held}

    def _next_crop(self) -> int:
        return self.settings.pool + self.step * self.settings.refresh

    def _crop(self, number: int) -> torch.Tensor:
        return draw_crop(self.settings.seed * SCENES_PER_SEED + number, self.settings.crop, self.settings.frames)

    def _batch(self, generator: torch.Generator) -> torch.Tensor:
        """Return crops [batch, 3, frames, crop, crop], some mirrored."""
        rows = torch.randint(self.settings.pool, (self.settings.batch,), generator=generator).tolist()
        crops = torch.cat([self._pool[row] for row in rows])
        return crops.flip(-1) if torch.rand(1, generator=generator) < 0.5 else crops

    def train_step(self) -> float:
        """Take one step and return its loss."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_000_007 + self.step)
        target = self._batch(generator)
        worker = self._worker
        with torch.set_grad_enabled(not settings.decoder_only):
            latents = mean_latents(worker, target.to(worker.dtype))
        amount = settings.latent_noise * torch.rand(len(target), 1, 1, 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        output = worker.decode((latents + amount * noise).to(worker.dtype), return_dict=False)[0]
        loss = reconstruction_loss(output.float(), target)
        if not settings.decoder_only:
            loss = loss + 1e-3 * latents.float().square().mean()
        loss.backward()
        for parameter, trained in zip(self.model.parameters(), worker.parameters(), strict=True):
            parameter.grad = None if trained.grad is None else trained.grad.float()
            trained.grad = None
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        rate = 0.5 * (1 + math.cos(math.pi * self.step / settings.steps)) * min(1.0, (self.step + 1) / 20)
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            with orthogonalising():
                optimizer.step()
        with torch.no_grad():
            for parameter, trained in zip(self.model.parameters(), worker.parameters(), strict=True):
                trained.copy_(parameter)
        for number in range(self._next_crop(), self._next_crop() + settings.refresh):
            self._pool[number % settings.pool] = self._crop(number)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Write the whole state of training."""
        state: dict[str, Any] = {"step": self.step, "model": self.model.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self._optimizers]
        save_atomically(state, self._path)

    def train(self, minutes: float = math.inf, log: Callable[[str], None] = print) -> None:
        """Train up to the last step or for so many minutes, saving on the way."""
        begin, losses = time.monotonic(), []
        while self.step < self.settings.steps and time.monotonic() - begin < 60 * minutes:
            losses.append(self.train_step())
            if self.step % 50 == 0:
                log(f"step {self.step} loss {sum(losses) / len(losses):.4f} {time.monotonic() - begin:.0f} s")
                losses.clear()
            if self.step % self.settings.save_every == 0:
                self.save()
        self.save()


def normalise_latents(autoencoder: AutoencoderKLHunyuanVideo, seed: int = 1, crops: int = 96) -> None:
    """Change the autoencoder so that every latent channel has zero mean and unit variance, and no pixel changes.

    The pipeline knows one scaling factor alone, so the shift and scale of each channel go into the convolutions
    around the latents, which are 1x1x1.
    """
    with torch.no_grad():
        latents = torch.cat(
            [mean_latents(autoencoder, draw_crop(seed * SCENES_PER_SEED + n, 64, 13)) for n in range(crops)]
        )
        mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        into: Any = autoencoder.quant_conv
        out_of: Any = autoencoder.post_quant_conv
        channels = len(mean)
        into.weight[:channels] /= deviation[:, None, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - mean) / deviation
        out_of.bias += (out_of.weight * mean[None, :, None, None, None]).sum((1, 2, 3, 4))
        out_of.weight *= deviation[None, :, None, None, None]
        # Samples of the distribution are its mean: the variance was not trained.
        into.weight[channels:], into.bias[channels:] = 0.0, -30.0


def signal_to_noise(autoencoder: AutoencoderKLHunyuanVideo, count: int = 12) -> float:
    """Return the reconstruction's peak signal-to-noise ratio in dB on scenes that training never draws, at 256x144."""
    errors = []
    for number in range(count):
        clip = to_tensor(draw_scene(HELD_OUT_SEED + number).frames(View.whole(256, 144), 0, 17))
        with torch.no_grad():
            latents = mean_latents(autoencoder, clip)
            output = autoencoder.decode(latents, return_dict=False)[0].clamp(-1, 1)
        errors.append((output - clip).square().mean())
    return 10 * math.log10(4 / torch.stack(errors).mean().item())
