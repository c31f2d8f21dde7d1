"""Training of the demo's video transformer on moving scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

from grat_cli.demo.flow import FlowSettings, FlowTrainer, draw_sigmas
from grat_cli.demo.moving.architecture import TIME_SHIFT
from grat_cli.demo.moving.clips import ClipStream, encode_captions
from grat_cli.demo.precision import training_dtype

if TYPE_CHECKING:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline


class PlainAttention(HunyuanVideoAttnProcessor2_0):
    """HunyuanVideo's attention as matmul, softmax, matmul: on a CPU in bf16 faster to train through than the fused."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(projection: Any, states: torch.Tensor) -> torch.Tensor:
            return projection(states).unflatten(-1, (attn.heads, -1))

        single = attn.add_q_proj is None
        text_names = ("to_q", "to_k", "to_v") if single else ("add_q_proj", "add_k_proj", "add_v_proj")
        text_norms = (attn.norm_q, attn.norm_k) if single else (attn.norm_added_q, attn.norm_added_k)
        query, key = (
            torch.cat([apply_rotary_emb(norm(heads(video, hidden_states)), image_rotary_emb, sequence_dim=1), text], 1)  # pyright: ignore
            for norm, video, text in (
                (attn.norm_q, attn.to_q, text_norms[0](heads(getattr(attn, text_names[0]), encoder_hidden_states))),
                (attn.norm_k, attn.to_k, text_norms[1](heads(getattr(attn, text_names[1]), encoder_hidden_states))),
            )
        )
        text_value = heads(getattr(attn, text_names[2]), encoder_hidden_states)
        value = torch.cat([heads(attn.to_v, hidden_states), text_value], 1)
        scores = (query * query.shape[-1] ** -0.5).transpose(1, 2) @ key.transpose(1, 2).transpose(-1, -2)
        scores = scores.masked_fill(~attention_mask, -torch.inf)
        output = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        video, text = output.split_with_sizes([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[0](video)
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def use_plain_attention(transformer: Any) -> None:
    """Make every attention over video tokens of a HunyuanVideo transformer a `PlainAttention`."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        attention: Attention = block.attn
        attention.set_processor(PlainAttention())  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class ClipSettings(FlowSettings):
    """How the video transformer is trained; `batch` has no meaning, a step has a number of tokens.

    Attributes:
        native_from: step from which on new clips are mostly of the native size, instead of small and cheap.
        tokens_per_step: video tokens of a step.
        motion_weight: how much more what moves weighs in the loss than what stands still.
    """

    native_from: int = 2_400
    tokens_per_step: int = 5_000
    motion_weight: float = 2.0


class ClipTrainer(FlowTrainer):
    """Trains the transformer of a HunyuanVideo pipeline."""

    settings: ClipSettings

    def __init__(self, pipe: HunyuanVideoPipeline, folder: Path, settings: ClipSettings, **stream_options: int) -> None:
        super().__init__(pipe.transformer, folder, settings)
        self._empty = encode_captions(pipe, [""])
        pipe.vae.to(training_dtype())
        self._stream = ClipStream(
            pipe,
            folder / "shards",
            native_from=settings.native_from,
            seed=settings.seed,
            tokens_per_step=settings.tokens_per_step,
            **stream_options,
        )
        use_plain_attention(self.worker)
        # The positions of a clip are its shape's and place's, not those that the transformer would count.
        self._positions = torch.zeros(0, 3)
        self.worker.rope.forward = lambda _: self._rotations()

    def _rotations(self) -> tuple[torch.Tensor, torch.Tensor]:
        config, positions = self.master.config, cast(Any, self._positions)
        axes = [
            get_1d_rotary_pos_embed(size, positions[:, axis], config.rope_theta, use_real=True)
            for axis, size in enumerate(config.rope_axes_dim)
        ]
        cosines, sines = (torch.cat([pair[part] for pair in axes], dim=1) for part in range(2))
        return cosines, sines

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """See `FlowTrainer.loss`."""
        clips = self._stream.batch(self.step, generator)
        latents, self._positions = clips.latents.float(), clips.positions
        count = len(latents)
        empty = torch.rand(count, generator=generator) < self.settings.empty_captions
        sigma = draw_sigmas(count, TIME_SHIFT, generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = torch.lerp(latents, noise, sigma[:, None, None, None, None])
        prompt, valid, pooled = (
            torch.where(empty.view(-1, *[1] * (given.ndim - 1)), missing, given)
            for missing, given in zip(self._empty, (clips.prompt, clips.valid, clips.pooled), strict=True)
        )
        velocity = self.worker(
            hidden_states=noisy.to(self.worker.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=prompt.to(self.worker.dtype),
            encoder_attention_mask=valid,
            pooled_projections=pooled.to(self.worker.dtype),
            return_dict=False,
        )[0]
        motion = (latents - latents.mean(2, keepdim=True)).abs().mean(1).clamp(max=1)
        weight = 1 + self.settings.motion_weight * motion
        error = (velocity.float() - (noise - latents)).square().mean(1)
        return (error * weight).sum() / weight.sum()
