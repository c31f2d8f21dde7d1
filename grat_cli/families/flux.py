"""Flux: pictures, with a joint sequence of [text, image] on two axes.

Read against diffusers 0.42.1, `pipelines/flux`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from grat_cli.demo import DEMO_FLUX
from grat_cli.families import picture_coding
from grat_cli.families.base import Call, Family, Medium, ModelChoice, beginning_at

if TYPE_CHECKING:
    import torch
    from PIL import Image

_DEMO = ModelChoice(
    name="demo",
    source=str(DEMO_FLUX.path),
    kind="folder",
    family="flux",
    presets="demo",
    native_side=DEMO_FLUX.native_side,
    token_side=8,
    text_tokens=DEMO_FLUX.text_tokens,
    default_steps=DEMO_FLUX.steps,
    default_guidance=DEMO_FLUX.guidance,
    true_guidance=True,
    is_demo=True,
)
_DEV = ModelChoice("flux-dev", "black-forest-labs/FLUX.1-dev", "hub", "flux", "flux")
# Distilled to four steps without guidance; its reference code cuts prompts at 256 tokens.
_SCHNELL = replace(
    _DEV,
    name="flux-schnell",
    source="black-forest-labs/FLUX.1-schnell",
    text_tokens=256,
    default_steps=4,
    default_guidance=None,
)
_VARIANTS = ("full", "b", "b-wide", "x", "bx", "far", "sta")


class Flux(Family):
    """See the module."""

    name = "flux"
    title = "Flux"
    medium: ClassVar[Medium] = "image"
    axes = 2
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    transformer = "FluxTransformer2DModel"
    refused: ClassVar[Mapping[str, str]] = {}
    models = (_DEV, _SCHNELL, _DEMO)
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"flux": _VARIANTS, "demo": _VARIANTS}
    base = "black-forest-labs/FLUX.1-dev"
    text_first = True
    stages = True

    # ---- Which model

    def kin(self, name: str) -> ModelChoice:
        """See `Family`, as for all below."""
        return _SCHNELL if "schnell" in name.lower() else _DEV

    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        # AutoencoderTiny does not store its own block_out_channels.
        blocks = autoencoder.get("block_out_channels") or autoencoder.get("decoder_block_out_channels") or [0] * 4
        token_side = 2 ** (len(blocks) - 1) * 2
        full_size = _DEV if transformer.get("guidance_embeds") else _SCHNELL
        template = _DEMO if token_side == _DEMO.token_side else full_size
        return replace(template, token_side=token_side, size_multiple=max(template.size_multiple, token_side))

    def matching_base(self, embeds_guidance: bool) -> str:
        return f"try --base {self.base if embeds_guidance else _SCHNELL.source}"

    def vocabulary(self) -> Mapping[str, list[str]]:
        from grat_cli.demo import vocabulary

        return vocabulary()

    # ---- Loading

    def pipeline_class(self, *, from_picture: bool = False) -> Any:
        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
        from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

        return FluxImg2ImgPipeline if from_picture else FluxPipeline

    def transformer_class(self) -> Any:
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        return FluxTransformer2DModel

    # ---- Making

    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        embeddings, pooled, _ = pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=tokens)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        return (text["prompt_embeds"].shape[1],)

    def pipeline_for(self, pipe: Any, *, from_picture: bool) -> Any:
        kind = self.pipeline_class(from_picture=from_picture)
        if isinstance(pipe, kind):
            return pipe
        other = kind(**pipe.components)
        other.set_progress_bar_config(disable=True)
        return other

    def denoise(self, pipe: Any, call: Call) -> torch.Tensor:
        arguments, first_step = dict(call.arguments), call.first_step
        if call.start is not None:
            strength = 1.0 if call.strength is None else call.strength
            arguments |= {"image": call.start, "strength": strength}
            if call.begun is not None:  # what `strength` leaves out is left out with the steps that are done
                first_step += call.steps - min(call.steps, len_of_run(call.steps, strength))
                arguments["strength"] = 1.0
        with beginning_at(pipe, first_step) if call.begun is not None else contextlib.nullcontext():
            packed = pipe(
                **arguments,
                height=call.height,
                width=call.width,
                num_inference_steps=call.steps,
                generator=call.generator,
                latents=call.begun,
                output_type="latent",
                callback_on_step_end=call.callback,
            ).images
        return self.spatial(pipe, packed, call.width, call.height)

    def spatial(self, pipe: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)

    def as_called(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(latents, *latents.shape)

    def decode(self, pipe: Any, latents: torch.Tensor, tile: int | None = None) -> torch.Tensor:
        return picture_coding.decode(pipe, latents, tile).unsqueeze(2)

    def encode(self, pipe: Any, picture: Image.Image) -> torch.Tensor:
        return picture_coding.encode(pipe, picture)


def len_of_run(steps: int, strength: float) -> int:
    """Steps that are run at a strength, as diffusers counts them (`FluxImg2ImgPipeline.get_timesteps`)."""
    return steps - int(max(steps - steps * strength, 0))
