"""Flux: pictures, with a joint sequence of [text, image] on two axes.

Read against diffusers 0.42.1, `pipelines/flux`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
    len_of_run,
    token_sides,
)
from grat_cli.families.shapes import CLIP_L, JointShape, TextEncoderShape, TransformerCall
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch.distributed import ProcessGroup

    from grat_cli.attention.chunking import Forward
    from grat_cli.attention.fitted_positions import FittedPositions
    from grat_kernels import Plan

_OF_CONTROLNETS = "a ControlNet's residuals are in raster order, the tokens are in group order"
_REDONE: frozenset[PictureKind] = frozenset(["start", "mask"])
_DEMO = ModelChoice(
    name="demo",
    source=str(DEMO_FLUX.path),
    kind="folder",
    family="flux",
    presets="demo",
    native_side=DEMO_FLUX.native_side,
    token_side=8,
    takes=_REDONE,
    text_tokens=DEMO_FLUX.text_tokens,
    default_steps=DEMO_FLUX.steps,
    default_guidance=DEMO_FLUX.guidance,
    true_guidance=True,
    is_demo=True,
)
_DEV = ModelChoice("flux-dev", "black-forest-labs/FLUX.1-dev", "hub", "flux", "flux", takes=_REDONE)
# Distilled to four steps without guidance; its reference code cuts prompts at 256 tokens.
_SCHNELL = replace(
    _DEV,
    name="flux-schnell",
    source="black-forest-labs/FLUX.1-schnell",
    text_tokens=256,
    default_steps=4,
    default_guidance=None,
)
# Steps and guidance of these are those of the examples on their model cards, and of the README of
# black-forest-labs/flux where a card leaves one out. Stock pipelines of Fill and Control take no negative prompt.
_FILL = replace(
    _DEV,
    name="flux-fill",
    source="black-forest-labs/FLUX.1-Fill-dev",
    default_steps=50,
    default_guidance=30.0,
    needs=_REDONE,
    takes_negative=False,
)
_CANNY = replace(
    _DEV,
    name="flux-canny",
    source="black-forest-labs/FLUX.1-Canny-dev",
    default_steps=50,
    default_guidance=30.0,
    takes=frozenset(["control"]),
    needs=frozenset(["control"]),
    takes_negative=False,
)
_DEPTH = replace(
    _CANNY,
    name="flux-depth",
    source="black-forest-labs/FLUX.1-Depth-dev",
    default_steps=30,
    default_guidance=10.0,
)
_KONTEXT = replace(
    _DEV,
    name="flux-kontext",
    source="black-forest-labs/FLUX.1-Kontext-dev",
    default_guidance=2.5,
    takes=frozenset(["reference"]),
)
# Width and height in pixels of the pictures that Kontext was trained to refer to (`pipeline_flux_kontext`).
KONTEXT_SIZES = tuple(
    (width, height)
    for narrow, wide in (
        *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
        (1024, 1024),
    )
    for width, height in dict.fromkeys([(narrow, wide), (wide, narrow)])
)
_VARIANTS = ("full", "b", "b-wide", "x", "bx", "far", "sta")
# black-forest-labs/FLUX.1-dev and FLUX.1-schnell, files {text_encoder_2,vae}/config.json; numbers of weights are those
# of the classes with these configurations.
_T5_XXL = TextEncoderShape(4_762_310_656, 24, 4096, 10240, 64, 512)
_AUTOENCODER = KlAutoencoder((128, 256, 512, 512), (3, 3, 3, 3), 16, 83_819_683)


@dataclass(frozen=True)
class FluxShape(JointShape):
    """A `FluxTransformer2DModel`.

    Attributes:
        out_channels: of a token that it predicts; those of Fill and Control read more than that.
    """

    out_channels: int = 0

    rotates_text = True
    joins_in_single = False

    @property
    def token_channels(self) -> int:
        return self.in_channels

    @property
    def predicted_channels(self) -> int:
        return self.out_channels

    @property
    def other_parameters(self) -> int:
        return super().other_parameters + (self.width + 1) * (self.out_channels - self.in_channels)

    def pipeline_bytes(self, plan: Plan, element: int) -> float:
        """Positions of three numbers: the pipeline's, and in fp32 in group order, with text, and of the rotation."""
        return (plan.tokens - plan.text_len) * 3 * (element + 4) + 2 * plan.tokens * 3 * 4

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
    pipelines = (
        *("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        *("FluxFillPipeline", "FluxControlPipeline", "FluxKontextPipeline"),
    )
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
    not_loaded: ClassVar[frozenset[str]] = frozenset({"image_encoder", "feature_extractor"})  # of image prompts
    refused: ClassVar[Mapping[str, str]] = {}
    not_driven: ClassVar[Mapping[str, str]] = {
        "FluxControlNetPipeline": _OF_CONTROLNETS,
        "FluxControlNetImg2ImgPipeline": _OF_CONTROLNETS,
        "FluxControlNetInpaintPipeline": _OF_CONTROLNETS,
        "FluxControlImg2ImgPipeline": "it follows one picture and redoes another, and is given one of them here",
        "FluxControlInpaintPipeline": "it follows one picture and redoes a part of another, and is given one here",
        "FluxKontextInpaintPipeline": "it refers to one picture and redoes a part of another, and is given one here",
        "VisualClozePipeline": "it fills in one of a grid of pictures",
        "VisualClozeGenerationPipeline": "it fills in one of a grid of pictures",
        "FluxPriorReduxPipeline": "it makes no pictures, but what stands for one in a prompt",
    }
    models = (_DEV, _SCHNELL, _FILL, _CANNY, _DEPTH, _KONTEXT, _DEMO)
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"flux": (*_VARIANTS, "fast"), "demo": _VARIANTS}
    larger: ClassVar[Mapping[str, str]] = {"flux": "flux-4k", "demo": "demo-4x"}
    base = _DEV.source
    text_first = True
    text_encoders = (CLIP_L, _T5_XXL)
    autoencoder = _AUTOENCODER
    tile = picture_coding.TILE
    large_encoder = "text_encoder_2"
    stages = True
    fits_positions = True
    named_in_files = ("time_text_embed.text_embedder.", "vector_in.")
    not_named_in_files = ("token_refiner",)
    blocks_in_files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "num_layers": ("transformer_blocks", "double_blocks"),
        "num_single_layers": ("single_transformer_blocks", "single_blocks"),
    }
    shapes_in_files: ClassVar[Mapping[str, tuple[tuple[str, ...], int]]] = {
        "width": (("x_embedder.weight", "img_in.weight"), 0),
        "in_channels": (("x_embedder.weight", "img_in.weight"), 1),
        "out_channels": (("proj_out.bias", "final_layer.linear.bias"), 0),
        "joint_attention_dim": (("context_embedder.weight", "txt_in.weight"), 1),
        "pooled_projection_dim": (("text_embedder.linear_1.weight", "vector_in.in_layer.weight"), 1),
        "attention_head_dim": ((".norm_q.weight", ".query_norm.scale"), 0),
    }

    # ---- Which model

    def kin(self, name: str) -> ModelChoice:
        """See `Family`, as for all below."""
        if "schnell" in name.lower():
            return _SCHNELL
        words = {"fill": _FILL, "canny": _CANNY, "depth": _DEPTH, "kontext": _KONTEXT}
        return next((words[word] for word in re.split("[^a-z]+", name.lower()) if word in words), _DEV)

    def of_file(self, name: str, config: Mapping[str, Any]) -> ModelChoice:
        kin, joining = self.kin(name), _joining_channels(config)
        if joining is not None:
            return kin if kin.needs == joining.needs else joining
        if not config["guidance_embeds"]:
            return _SCHNELL
        return _DEV if kin.needs else kin

    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        # AutoencoderTiny does not store its own block_out_channels.
        blocks = autoencoder.get("block_out_channels") or autoencoder.get("decoder_block_out_channels") or [0] * 4
        token_side = 2 ** (len(blocks) - 1) * 2
        full_size = _DEV if transformer.get("guidance_embeds") else _SCHNELL
        template = _DEMO if token_side == _DEMO.token_side else full_size
        model = replace(template, token_side=token_side, size_multiple=max(template.size_multiple, token_side))
        if (kin := _joining_channels(transformer)) is None:
            return model
        defaults = {"default_steps": kin.default_steps, "default_guidance": kin.default_guidance}
        takes = {"takes": kin.takes, "needs": kin.needs, "takes_negative": False, "true_guidance": False}
        return replace(model, **defaults, **takes)

    def of_index(
        self, choice: ModelChoice, class_name: str | None, parts: frozenset[str], options: Mapping[str, Any]
    ) -> ModelChoice:
        if "control" in choice.needs and self.kin(Path(choice.source).name) is _DEPTH:
            return replace(choice, default_steps=_DEPTH.default_steps, default_guidance=_DEPTH.default_guidance)
        if class_name != "FluxKontextPipeline" or choice.needs:
            return choice
        return replace(choice, default_guidance=_KONTEXT.default_guidance, takes=_KONTEXT.takes)

    def matching_base(self, embeds_guidance: bool) -> str:
        return f"try --base {self.base if embeds_guidance else _SCHNELL.source}"

    def vocabulary(self) -> Mapping[str, list[str]]:
        from grat_cli.demo import vocabulary

        return vocabulary()

    # ---- Shapes

    def bundled_config(self, model: ModelChoice) -> str:
        if not model.needs:
            return super().bundled_config(model)
        return "flux-fill" if "mask" in model.needs else "flux-control"

    def transformer_shape(self, config: Mapping[str, Any]) -> FluxShape:
        return FluxShape.of(config, "joint_attention_dim", out_channels=_out_channels(config))

    def reference_tokens(
        self,
        model: ModelChoice,
        size: tuple[int, int],
        kinds: frozenset[PictureKind],
        references: Sequence[tuple[int, int]],
    ) -> int:
        """As `FluxKontextPipeline` resizes them: to the size nearest in shape of those that it was trained with."""
        side, total = model.token_side, 0
        for sides in references:
            width, height = (max(side, pixels // side * side) for pixels in sides)
            _, *fitted = min((abs(width / height - w / h), w, h) for w, h in KONTEXT_SIZES)
            total += (fitted[0] // side) * (fitted[1] // side)
        return total

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
        from diffusers.pipelines.flux.pipeline_flux_control import FluxControlPipeline
        from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
        from diffusers.pipelines.flux.pipeline_flux_inpaint import FluxInpaintPipeline
        from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline

        if "reference" in kinds:
            return FluxKontextPipeline
        if "control" in kinds:
            return FluxControlPipeline
        return FluxInpaintPipeline if "mask" in kinds else FluxImg2ImgPipeline if kinds else FluxPipeline

    def pipeline_for(self, pipe: Any, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        from diffusers.pipelines.flux.pipeline_flux_fill import FluxFillPipeline

        kin = _joining_channels(pipe.transformer.config)
        joined = NO_PICTURES if kin is None else kin.needs
        if joined - kinds or ("control" in kinds and "control" not in joined):
            name = (kin or _DEV).name
            raise BadInput(f"the transformer is one like that of {name}: give the pictures that {name} takes")
        if kin is _FILL:
            return self.in_class(pipe, FluxFillPipeline)
        return super().pipeline_for(pipe, kinds)

    def transformer_class(self) -> Any:
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        return FluxTransformer2DModel

    # ---- Making

    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        embeddings, pooled, _ = pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=tokens)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        return tuple(text[name].shape[1] for name in ("prompt_embeds", "negative_prompt_embeds") if name in text)

    def denoise(self, pipe: Any, call: Call) -> torch.Tensor:
        arguments, first_step = {**call.arguments, **_picture_arguments(call)}, call.first_step
        if call.begun is not None and "strength" in arguments:
            # What `strength` leaves out is left out with the steps that are done.
            first_step += call.steps - min(call.steps, len_of_run(call.steps, arguments["strength"]))
            arguments["strength"] = 1.0
        with contextlib.ExitStack() as stack:
            if call.begun is not None:
                stack.enter_context(beginning_at(pipe, first_step, history=call.history))
                if call.pictures.kinds:
                    stack.enter_context(_going_on(pipe, call.begun))
            packed = pipe(
                **arguments,
                height=call.height,
                width=call.width,
                num_inference_steps=call.steps,
                generator=call.generator,
                latents=None if call.pictures.kinds else call.begun,
                output_type="latent",
                callback_on_step_end=call.callback,
            ).images
        return self.spatial(pipe, packed, call.width, call.height)

    def spatial(self, pipe: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)

    def latents_shape(self, model: ModelChoice, grid: Grid, *, called: bool) -> tuple[int, ...]:
        channels = _out_channels(self.transformer_config(model))
        return (1, grid.tokens, channels) if called else (1, channels // 4, *(2 * side for side in grid.shape))

    def as_called(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(latents, *latents.shape)

    def decode(
        self, pipe: Any, latents: torch.Tensor, tile: int | None = None, ranks: ProcessGroup | None = None
    ) -> torch.Tensor:
        return picture_coding.decode(pipe, latents, tile, ranks=ranks).unsqueeze(2)

    def encode(self, pipe: Any, picture: Image.Image) -> torch.Tensor:
        return picture_coding.encode(pipe, picture)

    # ---- Attention

    def mag_ratios(self, config: Mapping[str, Any]) -> Sequence[float] | None:
        """Those of dev and schnell, as diffusers has them."""
        if (config["num_layers"], config["num_single_layers"]) != (19, 38) or _joining_channels(config):
            return None
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        return FLUX_MAG_RATIOS.tolist()

    def grid(self, pipe: Any, height: int, width: int, num_frames: int | None = None) -> Grid:
        if num_frames is not None:
            raise BadInput(f"a {type(pipe).__name__} makes images: leave out num_frames")
        return Grid(token_sides(height, width, pipe.vae_scale_factor * 2))  # latents are packed two by two into tokens

    def adapter_class(self) -> type[FluxAdapter]:
        return FluxAdapter


def _out_channels(config: Mapping[str, Any]) -> int:
    """Of a token that a transformer predicts."""
    return int(config.get("out_channels") or config["in_channels"])


def _joining_channels(transformer: Mapping[str, Any]) -> ModelChoice | None:
    """The known model whose transformer reads channels of pictures beside those of latents; None for latents alone.

    Control joins one picture of as many channels, Fill one and its mask, of one per pixel.
    """
    own, read = transformer.get("out_channels") or 0, transformer.get("in_channels") or 0
    if not own or read <= own:
        return None
    return _CANNY if read == 2 * own else _FILL


def _picture_arguments(call: Call) -> dict[str, Any]:
    """The pictures of a call, as the pipelines take them."""
    pictures, strength = call.pictures, {} if call.strength is None else {"strength": call.strength}
    if call.start is not None:
        return {"image": call.start, "strength": 1.0, **strength}
    if pictures.control is not None:
        return {"control_image": pictures.control}
    if pictures.references:
        # Kontext fits the size of its output to this area.
        return {"image": pictures.references[0], "max_area": call.width * call.height}
    return {} if pictures.mask is None else {"image": pictures.start, "mask_image": pictures.mask, **strength}


@contextlib.contextmanager
def _going_on(pipe: Any, begun: torch.Tensor) -> Iterator[None]:
    """While inside, a call prepares noise and pictures as from its beginning, and goes on with these latents."""
    stock = pipe.prepare_latents

    def prepare_latents(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        latents, *others = stock(*arguments, **options)
        return begun.to(latents.device, latents.dtype), *others

    pipe.prepare_latents = prepare_latents
    try:
        yield
    finally:
        del pipe.prepare_latents


# ---- Attention


class FluxAdapter(ProcessorAdapter):
    """Image tokens and their positions are put in order outside the transformer, so that it may be compiled whole."""

    text_first = Flux.text_first
    orders_calls = True
    contiguous = True

    def __init__(self, transformer: torch.nn.Module, grid: Grid, **options: Any) -> None:
        """See `ProcessorAdapter`."""
        super().__init__(transformer, grid, **options)
        self._positions: FittedPositions | None = None
        self._ids: tuple[torch.Tensor, torch.Tensor] | None = None  # of the call, and exact

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
    def attached(self, *arguments: Any, **options: Any) -> Iterator[None]:
        rows, columns = self.grid.shape
        stock = self.model.pos_embed
        if self.extrapolation is not None and self.extrapolation.moves((rows, columns)):
            from grat_cli.attention.fitted_positions import FittedPositions

            self._positions = FittedPositions(stock, self.extrapolation, self.grid)
            self.model.pos_embed = self._positions
        try:
            with super().attached(*arguments, **options):
                yield
        finally:
            self.model.pos_embed, self._positions, self._ids = stock, None, None

    def read(self, call: dict[str, Any]) -> Text:
        _refuse_extras(call)
        if self._ids is None or self._ids[0] is not call["img_ids"]:
            self._ids = call["img_ids"], self._exact_ids(call["hidden_states"], call["img_ids"])
        references = len(self._ids[1]) - self.grid.tokens
        if references and self.extrapolation is not None:
            raise BadInput("positions and scores are not fitted where there are references: leave out extrapolation")
        return Text(call["encoder_hidden_states"].shape[1], references=references)

    def enter(self, call: dict[str, Any], step: int) -> dict[str, Any]:
        assert self._ids is not None
        if self._positions is not None:
            self._positions.prepare(self.order, call["encoder_hidden_states"].shape[1], call["timestep"], step)
        tokens, positions = self.in_groups(call["hidden_states"], 1), self.in_groups(self._ids[1], 0)
        return call | {"hidden_states": tokens, "img_ids": positions}

    def _exact_ids(self, hidden_states: torch.Tensor, image_ids: torch.Tensor) -> torch.Tensor:
        """Positions `[tokens, 3]` in fp32: of the image in raster order (0, row, column), checked against those of the
        call, and behind them those of references as they are, which say which picture they are of in place of 0.

        Pipelines make positions in the model's dtype, and bf16 holds integers up to 256 only: beyond 4096 pixels
        a side, neighbouring columns would share a position. The comparison waits for the device, but a pipeline
        makes one tensor of positions for all of its steps, and each tensor is compared once.

        Raises:
            BadInput: if they are not those of the grid.
        """
        import torch

        rows, columns = self.grid.shape
        given = image_ids[0] if image_ids.dim() == 3 else image_ids
        of_image = given[:, 0] == 0
        count = int(of_image.sum())
        if count != self.grid.tokens or hidden_states.shape[1] != len(given):
            raise BadInput(
                f"GRAT was installed for {rows}x{columns} = {self.grid.tokens} image tokens, the call has "
                f"{count if hidden_states.shape[1] == len(given) else hidden_states.shape[1]}: "
                "give the pipeline call the height and width of the install"
            )
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        exact = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float().to(image_ids.device)
        if not of_image[:count].all():
            raise BadInput(
                "tokens of references come before those of the image: GRAT takes them behind, as Kontext has"
            )
        if not torch.equal(given[:count], exact.to(given.dtype)):
            raise BadInput(
                f"the call's image positions are not those of the {rows}x{columns} grid that GRAT was installed for: "
                "give the pipeline call the height and width of the install, in this order"
            )
        return torch.cat([exact, given[count:].float()])


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
