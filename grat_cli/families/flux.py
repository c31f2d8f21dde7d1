"""Flux: pictures, with a joint sequence of [text, image] on two axes.

Read against diffusers 0.42.1, `pipelines/flux`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from grat_cli.demo import DEMO_FLUX
from grat_cli.families import picture_coding
from grat_cli.families.autoencoders import KlAutoencoder
from grat_cli.families.base import Call, Family, Medium, ModelChoice, beginning_at
from grat_cli.families.shapes import CLIP_L, TextEncoderShape, TransformerCall, TransformerShape
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from grat_kernels import Plan

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
# black-forest-labs/FLUX.1-dev and FLUX.1-schnell, files {text_encoder_2,vae}/config.json; numbers of weights are those
# of the classes with these configurations.
_T5_XXL = TextEncoderShape(4_762_310_656, 24, 4096, 10240, 64, 512)
_AUTOENCODER = KlAutoencoder((128, 256, 512, 512), (3, 3, 3, 3), 16, 83_819_683)


class FluxShape(TransformerShape):
    """A `FluxTransformer2DModel`."""

    rotates_text = True
    joins_in_single = False

    @property
    def token_channels(self) -> int:
        return self.in_channels

    def pipeline_bytes(self, plan: Plan, element: int) -> float:
        """Positions of three numbers: the pipeline's, and in fp32 in group order, with text, and of the rotation."""
        return plan.image_tokens * 3 * (element + 4) + 2 * plan.tokens * 3 * 4

    def feed_forward_bytes(self, call: TransformerCall) -> float:
        # Hidden states, what attention put out, gated and not, the sum, its norm; then twice the inner layer.
        return 2 * call.joint + 3 * call.image + 8 * call.image

    def projection_bytes(self, call: TransformerCall) -> float:
        # What attention put out, it and the inner layer side by side, the projection of these, gated and not.
        return (1 + 5 + 1 + 1) * call.joint


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
    larger: ClassVar[Mapping[str, str]] = {"flux": "flux-4k", "demo": "demo-4x"}
    base = _DEV.source
    text_first = True
    text_encoders = (CLIP_L, _T5_XXL)
    autoencoder = _AUTOENCODER
    large_encoder = "text_encoder_2"

    # ---- Which model

    def kin(self, name: str) -> ModelChoice:
        """See `Family`, as for all below."""
        return _SCHNELL if "schnell" in name.lower() else _DEV

    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        # AutoencoderTiny does not store its own block_out_channels.
        blocks = autoencoder.get("block_out_channels") or autoencoder.get("decoder_block_out_channels") or [0] * 4
        token_side = 2 ** (len(blocks) - 1) * 2
        of_its_kind = _DEV if transformer.get("guidance_embeds") else _SCHNELL
        template = _DEMO if token_side == _DEMO.token_side else of_its_kind
        return replace(template, token_side=token_side, size_multiple=max(template.size_multiple, token_side))

    def matching_base(self, embeds_guidance: bool) -> str:
        return f"try --base {self.base if embeds_guidance else _SCHNELL.source}"

    def vocabulary(self) -> Mapping[str, list[str]]:
        from grat_cli.demo import vocabulary

        return vocabulary()

    # ---- Shapes

    def transformer_shape(self, config: Mapping[str, Any]) -> FluxShape:
        return FluxShape.of(config, "joint_attention_dim")

    def step_grids(self, model: ModelChoice) -> tuple[Grid, ...]:
        """Of large pictures: of twice and four times the side that it was trained at."""
        return tuple(model.grid(times * model.native_side, times * model.native_side) for times in (2, 4))

    def step_inputs(
        self, config: Mapping[str, Any], grid: Grid, text_len: int, normal: Callable[..., torch.Tensor]
    ) -> dict[str, Any]:
        import torch

        pooled = normal(1, config["pooled_projection_dim"])
        row, column = torch.meshgrid(*(torch.arange(side) for side in grid.shape), indexing="ij")
        positions = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
        inputs = {
            "hidden_states": normal(1, grid.tokens, config["in_channels"]),
            "encoder_hidden_states": normal(1, text_len, config["joint_attention_dim"]),
            "pooled_projections": pooled,
            "timestep": torch.full_like(pooled[:, 0], 0.7),
            "img_ids": positions.to(pooled.device),
            "txt_ids": torch.zeros(text_len, 3, device=pooled.device),
        }
        # The transformer multiplies the scale by 1000 itself.
        return inputs | ({"guidance": torch.full_like(pooled[:, 0], 3.5)} if config["guidance_embeds"] else {})

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

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(latents, *latents.shape)

    def decode(self, pipe: Any, latents: torch.Tensor, tile: int | None = None) -> torch.Tensor:
        return picture_coding.decode(pipe, latents, tile).unsqueeze(2)

    def encode(self, pipe: Any, picture: Image.Image) -> torch.Tensor:
        return picture_coding.encode(pipe, picture)


def len_of_run(steps: int, strength: float) -> int:
    """Steps that are run at a strength, as diffusers counts them (`FluxImg2ImgPipeline.get_timesteps`)."""
    return steps - int(max(steps - steps * strength, 0))
