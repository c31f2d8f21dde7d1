"""Flux: pictures, with a joint sequence of [text, image] on two axes.

Read against diffusers 0.42.1, `pipelines/flux`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from grat_cli.attention.adapter import ProcessorAdapter
from grat_cli.attention.layer import Text
from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput
from grat_cli.families import picture_coding
from grat_cli.families.autoencoders import KlAutoencoder
from grat_cli.families.base import (
    ANY_TOKENIZER,
    CLIP_TOKENIZER,
    NO_PICTURES,
    SCHEDULER,
    Call,
    Classes,
    Family,
    Medium,
    ModelChoice,
    PictureKind,
    beginning_at,
    token_sides,
)
from grat_cli.families.shapes import CLIP_L, JointShape, TextEncoderShape, TransformerCall
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from grat_cli.attention.adapter import Run
    from grat_cli.attention.chunking import Forward
    from grat_cli.attention.fitted_positions import FittedPositions
    from grat_cli.attention.layer import CallObserver
    from grat_kernels import Backend, Plan

_DEMO = ModelChoice(
    name="demo",
    source=str(DEMO_FLUX.path),
    kind="folder",
    family="flux",
    presets="demo",
    native_side=DEMO_FLUX.native_side,
    token_side=8,
    takes=frozenset(["start"]),
    text_tokens=DEMO_FLUX.text_tokens,
    default_steps=DEMO_FLUX.steps,
    default_guidance=DEMO_FLUX.guidance,
    true_guidance=True,
    is_demo=True,
)
_DEV = ModelChoice("flux-dev", "black-forest-labs/FLUX.1-dev", "hub", "flux", "flux", takes=frozenset(["start"]))
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


class FluxShape(JointShape):
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
    classes: ClassVar[Classes] = {
        "text_encoder": {"CLIPTextModel": "transformers"},
        "text_encoder_2": {"T5EncoderModel": "transformers"},
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": {"T5Tokenizer": "transformers", "T5TokenizerFast": "transformers", **ANY_TOKENIZER},
        "transformer": {"FluxTransformer2DModel": "diffusers"},
        "vae": {"AutoencoderKL": "diffusers", "AutoencoderTiny": "diffusers"},
        "scheduler": SCHEDULER,
        "image_encoder": {"CLIPVisionModelWithProjection": "transformers"},
        "feature_extractor": {"CLIPImageProcessor": "transformers"},
    }
    left_out = ("image_encoder", "feature_extractor")  # of image prompts
    refused: ClassVar[Mapping[str, str]] = {}
    models = (_DEV, _SCHNELL, _DEMO)
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"flux": _VARIANTS, "demo": _VARIANTS}
    larger: ClassVar[Mapping[str, str]] = {"flux": "flux-4k", "demo": "demo-4x"}
    base = _DEV.source
    text_first = True
    text_encoders = (CLIP_L, _T5_XXL)
    autoencoder = _AUTOENCODER
    tile = picture_coding.TILE
    large_encoder = "text_encoder_2"
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

    def pipeline_class(self, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
        from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

        return FluxImg2ImgPipeline if kinds else FluxPipeline

    def transformer_class(self) -> Any:
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        return FluxTransformer2DModel

    # ---- Making

    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        embeddings, pooled, _ = pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=tokens)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        return (text["prompt_embeds"].shape[1],)

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

    def latents_shape(self, model: ModelChoice, grid: Grid, *, called: bool) -> tuple[int, ...]:
        channels = self.transformer_config(model)["in_channels"]
        return (1, grid.tokens, channels) if called else (1, channels // 4, *(2 * side for side in grid.shape))

    def as_called(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(latents, *latents.shape)

    def decode(self, pipe: Any, latents: torch.Tensor, tile: int | None = None) -> torch.Tensor:
        return picture_coding.decode(pipe, latents, tile).unsqueeze(2)

    def encode(self, pipe: Any, picture: Image.Image) -> torch.Tensor:
        return picture_coding.encode(pipe, picture)

    # ---- Attention

    def grid(self, pipe: Any, height: int, width: int, num_frames: int | None = None) -> Grid:
        if num_frames is not None:
            raise BadInput(f"a {type(pipe).__name__} makes images: leave out num_frames")
        return Grid(token_sides(height, width, pipe.vae_scale_factor * 2))  # latents are packed two by two into tokens

    def adapter(self, transformer: torch.nn.Module, grid: Grid, **options: Any) -> FluxAdapter:
        return FluxAdapter(transformer, grid, **options)


def len_of_run(steps: int, strength: float) -> int:
    """Steps that are run at a strength, as diffusers counts them (`FluxImg2ImgPipeline.get_timesteps`)."""
    return steps - int(max(steps - steps * strength, 0))


# ---- Attention


class FluxAdapter(ProcessorAdapter):
    """Image tokens and their positions are put in order outside the transformer, so that it may be compiled whole."""

    text_first = Flux.text_first
    contiguous = True

    def __init__(self, transformer: torch.nn.Module, grid: Grid, **options: Any) -> None:
        """See `ProcessorAdapter`."""
        super().__init__(transformer, grid, **options)
        self._positions: FittedPositions | None = None
        self._ids: tuple[torch.Tensor, torch.Tensor] | None = None

    def blocks_of(self, model: Any) -> list[Any]:
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def stock_processors(self) -> tuple[type, ...]:
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        return (FluxAttnProcessor,)

    def chunked_blocks(self) -> Mapping[type, Forward]:
        from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

        from grat_cli.attention.chunking import joint_block

        def handed_on(given: Mapping[str, Any]) -> dict[str, Any]:
            return {"image_rotary_emb": given.get("image_rotary_emb"), **(given.get("joint_attention_kwargs") or {})}

        forward = joint_block(handed_on, text_first=True, joined=True, clipped=True)
        return {FluxTransformerBlock: forward, FluxSingleTransformerBlock: forward}

    @contextlib.contextmanager
    def attached(self, run: Run, backend: Backend, observer: CallObserver | None = None) -> Iterator[None]:
        rows, columns = self.grid.shape
        stock = self.model.pos_embed
        if self.extrapolation is not None and self.extrapolation.moves((rows, columns)):
            from grat_cli.attention.fitted_positions import FittedPositions

            self._positions = FittedPositions(stock, self.extrapolation, self.grid)
            self.model.pos_embed = self._positions
        try:
            with super().attached(run, backend, observer):
                yield
        finally:
            self.model.pos_embed, self._positions, self._ids = stock, None, None

    def read(self, call: dict[str, Any]) -> Text:
        _refuse_extras(call)
        if self._ids is None or self._ids[0] is not call["img_ids"]:
            self._ids = call["img_ids"], self._exact_ids(call["hidden_states"], call["img_ids"])
        return Text(call["encoder_hidden_states"].shape[1])

    def enter(self, call: dict[str, Any], step: int) -> dict[str, Any]:
        assert self._ids is not None
        if self._positions is not None:
            self._positions.prepare(self.order, call["encoder_hidden_states"].shape[1], call["timestep"], step)
        tokens = call["hidden_states"].index_select(1, self.order)
        return call | {"hidden_states": tokens, "img_ids": self._ids[1][self.order]}

    def leave(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].index_select(1, self.inverse), *output[1:])
        return replace(output, sample=output.sample.index_select(1, self.inverse))

    def _exact_ids(self, hidden_states: torch.Tensor, image_ids: torch.Tensor) -> torch.Tensor:
        """Raster positions `[tokens, 3]` (0, row, column) in fp32, checked against those of the call.

        Pipelines make positions in the model's dtype, and bf16 holds integers up to 256 only: beyond 4096 pixels
        a side, neighbouring columns would share a position. The comparison waits for the device, but a pipeline
        makes one tensor of positions for all of its steps, and each tensor is compared once.

        Raises:
            BadInput: if they are not those of the grid.
        """
        import torch

        rows, columns = self.grid.shape
        count = image_ids.shape[-2]
        if count != self.grid.tokens or hidden_states.shape[1] != self.grid.tokens:
            raise BadInput(
                f"GRAT was installed for {rows}x{columns} = {self.grid.tokens} image tokens, the call has "
                f"{hidden_states.shape[1]}: give the pipeline call the height and width of the install "
                "(image tokens of references or controls, as in Kontext, are not supported)"
            )
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        exact = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float().to(image_ids.device)
        given = image_ids[0] if image_ids.dim() == 3 else image_ids
        if not torch.equal(given, exact.to(given.dtype)):
            raise BadInput(
                f"the call's image positions are not those of the {rows}x{columns} grid that GRAT was installed for: "
                "give the pipeline call the height and width of the install, in this order"
            )
        return exact


def _refuse_extras(call: Mapping[str, Any]) -> None:
    """Raises BadInput for inputs that carry image tokens in an order of their own."""
    if call.get("controlnet_block_samples") is not None or call.get("controlnet_single_block_samples") is not None:
        raise BadInput("ControlNet is not supported: its residuals are in raster order, the tokens are in group order")
    # `scale` is LoRA's, and changes no token order.
    extras = sorted(set(call.get("joint_attention_kwargs") or {}) - {"scale"})
    if extras:
        raise BadInput(
            f"attention arguments {', '.join(extras)} are not supported (IP-Adapter among them): leave them out"
        )
