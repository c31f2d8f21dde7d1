"""Training of the demo's Flux transformer on still scenes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import TOKEN_PIXELS
from grat_cli.demo.flow import FlowSettings, FlowTrainer, draw_sigmas
from grat_cli.demo.shards import SceneStream, encode_captions

if TYPE_CHECKING:
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
class PictureSettings(FlowSettings):
    """How the Flux transformer is trained.

    Attributes:
        side: side of the training pictures in pixels.
        subject_weight: weight of the subject's tokens in the loss; the background has 1.
    """

    side: int = 128
    subject_weight: float = 2.0


class PictureTrainer(FlowTrainer):
    """Trains the transformer of a Flux pipeline."""

    settings: PictureSettings

    def __init__(self, pipe: FluxPipeline, folder: Path, settings: PictureSettings, **stream_options: int) -> None:
        super().__init__(pipe.transformer, folder, settings)
        self._pooled_empty, self._prompt_empty = (part.to(self.worker.dtype) for part in encode_captions(pipe, [""]))
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
        use_plain_attention(self.worker)
        # bf16 would round sigma * 1000 to steps of 4; the embedding takes it exact.
        self._exact_timestep = torch.zeros(0)
        self.worker.time_text_embed.register_forward_pre_hook(lambda _, given: (self._exact_timestep, *given[1:]))

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """See `FlowTrainer.loss`."""
        scenes = self._stream.batch(self.step, generator)
        latents, subject = scenes.latents.float(), scenes.subject.float()
        empty = torch.rand(len(scenes), generator=generator) < self.settings.empty_captions
        sigma = draw_sigmas(len(scenes), self._shift, generator)
        noise = torch.randn(latents.shape, generator=generator)
        self._exact_timestep = sigma * 1000
        noisy = torch.lerp(latents, noise, sigma[:, None, None])
        dtype = self.worker.dtype
        velocity = self.worker(
            hidden_states=noisy.to(dtype),
            timestep=sigma,
            pooled_projections=torch.where(empty[:, None], self._pooled_empty, scenes.pooled.to(dtype)),
            encoder_hidden_states=torch.where(empty[:, None, None], self._prompt_empty, scenes.prompt.to(dtype)),
            txt_ids=self._text_positions,
            img_ids=self._positions,
            return_dict=False,
        )[0]
        weight = 1 + (self.settings.subject_weight - 1) * subject
        error = (velocity.float() - (noise - latents)).square().mean(-1)
        return (error * weight).sum() / weight.sum()
