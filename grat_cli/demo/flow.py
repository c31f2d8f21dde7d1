"""Training of the demo's transformer by rectified flow (arXiv 2209.03003), in bf16 with fp32 master weights.

The model learns the velocity `noise - latents` of the straight path `(1 - sigma) * latents + sigma * noise`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import TOKEN_PIXELS
from grat_cli.demo.shards import EncodedScenes, SceneStream, encode_captions, save_atomically

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

GRID = DEMO_FLUX.native_side // TOKEN_PIXELS


def image_positions(rows: int) -> torch.Tensor:
    """Return the rotary positions [rows * rows, 3] of a square picture, stretched over the native grid.

    A picture of half the side covers the same positions in steps of two, so that what is learned from small and
    cheap pictures holds for large ones.
    """
    stretch = GRID / rows
    along = torch.arange(rows) * stretch + (stretch - 1) / 2
    positions = torch.zeros(rows, rows, 3)
    positions[..., 1] = along[:, None]
    positions[..., 2] = along[None, :]
    return positions.view(-1, 3)


def draw_sigmas(count: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels [count]: logit-normal, one in seven uniform, then shifted as the scheduler does.

    Logit-normal times and the shift are those of Stable Diffusion 3 (arXiv 2403.03206, sections 3.1 and 5.3.2).
    """
    uniform = torch.rand(count, generator=generator)
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator))
    times = torch.where(torch.rand(count, generator=generator) < 1 / 7, uniform, logit_normal)
    return (shift * times / (1 + (shift - 1) * times)).clamp(1e-3, 1.0)


def time_shift(scheduler: Any, tokens: int) -> float:
    """Return the factor by which the scheduler shifts times for a picture of so many tokens."""
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return math.exp(config.base_shift + (tokens - config.base_image_seq_len) * slope)


class PlainAttention(FluxAttnProcessor):
    """Flux's attention as matmul, softmax, matmul: on a CPU in bf16 twice as fast to train through as the fused one."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(projection: Any, states: torch.Tensor) -> torch.Tensor:
            return projection(states).unflatten(-1, (-1, attn.head_dim))

        query = attn.norm_q(heads(attn.to_q, hidden_states))
        key = attn.norm_k(heads(attn.to_k, hidden_states))
        value = heads(attn.to_v, hidden_states)
        if encoder_hidden_states is not None:
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj, encoder_hidden_states)), query], 1)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj, encoder_hidden_states)), key], 1)
            value = torch.cat([heads(attn.add_v_proj, encoder_hidden_states), value], 1)

        def rotate(states: torch.Tensor) -> Any:
            return apply_rotary_emb(states, image_rotary_emb, sequence_dim=1)

        query, key = rotate(query), rotate(key)
        query = query * attn.head_dim**-0.5
        scores = query.transpose(1, 2) @ key.transpose(1, 2).transpose(-1, -2)
        output = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return output
        text, image = output.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), attn.to_add_out(text)


def use_plain_attention(transformer: torch.nn.Module) -> None:
    """Make every attention of a Flux transformer a `PlainAttention`."""
    processor: Any = PlainAttention()
    for module in transformer.modules():
        if isinstance(module, FluxAttention):
            module.set_processor(processor)


@dataclass(frozen=True)
class FlowSettings:
    """How the transformer is trained.

    Attributes:
        side: side of the training pictures in pixels.
        steps: step at which training ends, counted from the beginning of the run.
        batch: pictures per step.
        learning_rate: peak rate of AdamW and of Muon, whose updates are scaled to AdamW's size.
        warm_up: steps over which the rate rises, from the beginning of the run.
        decay: last steps, over which the rate falls to a twentieth along a cosine.
        average: decay of the exponential moving average of the weights.
        subject_weight: weight of the subject's tokens in the loss; the background has 1.
        empty_captions: share of pictures without caption, for classifier-free guidance.
        seed: of pictures and noise.
        save_every: steps between saves.
    """

    side: int = 128
    steps: int = 10_000
    batch: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 150
    decay: int = 0
    average: float = 0.999
    subject_weight: float = 2.0
    empty_captions: float = 0.1
    seed: int = 1
    save_every: int = 200


def split_parameters(transformer: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Return the matrices inside the blocks, which Muon trains, and everything else, which AdamW trains."""
    matrices, others = [], []
    for name, parameter in transformer.named_parameters():
        inside = "transformer_blocks." in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return matrices, others


class FlowTrainer:
    """Trains the transformer of a pipeline; its state is one file, and resuming from it changes no bit."""

    def __init__(self, pipe: FluxPipeline, folder: Path, settings: FlowSettings, **stream_options: int) -> None:
        self.settings = settings
        self.step = 0
        self._path = folder / "transformer.pt"
        self._pooled_empty, self._prompt_empty = (part.bfloat16() for part in encode_captions(pipe, [""]))
        rows = settings.side // TOKEN_PIXELS
        self._positions = image_positions(rows)
        self._text_positions = torch.zeros(DEMO_FLUX.text_tokens, 3)
        self._shift = time_shift(pipe.scheduler, rows * rows)
        self._stream = SceneStream(
            pipe,
            folder / "shards",
            side=settings.side,
            batch=settings.batch,
            seed=settings.seed,
            **stream_options,
        )
        self.master: FluxTransformer2DModel = copy.deepcopy(pipe.transformer).float().train()
        self.average: FluxTransformer2DModel = copy.deepcopy(self.master)
        self._worker = copy.deepcopy(self.master).bfloat16()
        use_plain_attention(self._worker)
        # bf16 would round sigma * 1000 to steps of 4; the embedding takes it exact.
        self._exact_timestep = torch.zeros(0)
        self._worker.time_text_embed.register_forward_pre_hook(lambda _, given: (self._exact_timestep, *given[1:]))
        matrices, others = split_parameters(self.master)
        self._optimizers = [
            torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        if self._path.exists():
            self._resume()
        self._synchronise()

    def _resume(self) -> None:
        state = torch.load(self._path)
        self.step = state["step"]
        self.master.load_state_dict(state["master"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Write the whole state of training."""
        state = {
            "step": self.step,
            "master": self.master.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        save_atomically(state, self._path)

    def _synchronise(self) -> None:
        with torch.no_grad():
            for worker, master in zip(self._worker.parameters(), self.master.parameters(), strict=True):
                worker.copy_(master)

    def learning_rate(self) -> float:
        """Return the rate of the coming step."""
        settings = self.settings
        rate = settings.learning_rate * min(1.0, (self.step + 1) / max(1, settings.warm_up))
        left = settings.steps - self.step
        if left < settings.decay:
            rate *= max(0.05, 0.5 * (1 - math.cos(math.pi * left / settings.decay)))
        return rate

    def _loss(self, scenes: EncodedScenes, generator: torch.Generator) -> torch.Tensor:
        latents, subject = scenes.latents.float(), scenes.subject.float()
        empty = torch.rand(len(scenes), generator=generator) < self.settings.empty_captions
        sigma = draw_sigmas(len(scenes), self._shift, generator)
        noise = torch.randn(latents.shape, generator=generator)
        self._exact_timestep = sigma * 1000
        noisy = torch.lerp(latents, noise, sigma[:, None, None])
        velocity = self._worker(
            hidden_states=noisy.bfloat16(),
            timestep=sigma,
            pooled_projections=torch.where(empty[:, None], self._pooled_empty, scenes.pooled),
            encoder_hidden_states=torch.where(empty[:, None, None], self._prompt_empty, scenes.prompt),
            txt_ids=self._text_positions,
            img_ids=self._positions,
            return_dict=False,
        )[0]
        weight = 1 + (self.settings.subject_weight - 1) * subject
        error = (velocity.float() - (noise - latents)).square().mean(-1)
        return (error * weight).sum() / weight.sum()

    def train_step(self) -> float:
        """Take one step and return its loss."""
        # A generator of its own for every step: nothing but the step has to be remembered to resume.
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_000_007 + self.step)
        loss = self._loss(self._stream.batch(self.step, generator), generator)
        loss.backward()
        parameters = list(self.master.parameters())
        for parameter, worker in zip(parameters, self._worker.parameters(), strict=True):
            parameter.grad = None if worker.grad is None else worker.grad.float()
            worker.grad = None
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            optimizer.step()
        self._synchronise()
        keep = min(self.settings.average, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), parameters, strict=True):
                average.lerp_(parameter, 1 - keep)
        self.step += 1
        return loss.item()

    def train(self, minutes: float = math.inf, log: Callable[[str], None] = print) -> None:
        """Train up to the last step or for so many minutes, saving on the way."""
        begin, first, losses = time.monotonic(), self.step, []
        while self.step < self.settings.steps and time.monotonic() - begin < 60 * minutes:
            losses.append(self.train_step())
            if self.step % 50 == 0:
                seconds = time.monotonic() - begin
                mean = sum(losses) / len(losses)
                log(f"step {self.step} loss {mean:.4f} rate {self.learning_rate():.1e} "
                    f"{(self.step - first) / seconds:.2f} steps/s {seconds:.0f} s")  # fmt: skip
                losses.clear()
            if self.step % self.settings.save_every == 0:
                self.save()
        self.save()
