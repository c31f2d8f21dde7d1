"""FLUX.2: pictures, with a joint sequence of [text, image, references] on two axes.

Read against diffusers 0.42.1, `pipelines/flux2`. dev embeds its guidance, klein takes true guidance or, distilled to
four steps, none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, cast

from grat_cli.attention.adapter import DispatchAdapter
from grat_cli.attention.layer import Text
from grat_cli.errors import BadInput
from grat_cli.families import picture_coding
from grat_cli.families.autoencoders import KlAutoencoder
from grat_cli.families.base import (
    ANY_TOKENIZER,
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
from grat_cli.families.shapes import TextEncoderShape, TransformerCall, TransformerShape
from grat_cli.families.time_shift import GivenShift
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

    from grat_cli.attention.chunking import Forward
    from grat_kernels import Plan

# Steps and guidance: src/flux2/util.py of github.com/black-forest-labs/flux2; pictures to refer to: docs.bfl.ai,
# "Reference Images per Model".
_DEV = ModelChoice(
    "flux2-dev",
    "black-forest-labs/FLUX.2-dev",
    "hub",
    "flux2",
    "flux2",
    default_steps=50,
    default_guidance=4.0,
    largest_pixels=2048 * 2048,  # "Maximum resolution" at help.bfl.ai, "FLUX.2 Technical Specifications"
    takes_negative=False,
    takes=frozenset(["start", "reference"]),
    most_references=6,
)
_KLEIN_4B = replace(
    _DEV,
    name="flux2-klein-4b",
    source="black-forest-labs/FLUX.2-klein-4B",
    default_steps=4,
    default_guidance=None,
    takes=frozenset(["start", "mask", "reference"]),
    most_references=4,
)
_KLEIN_9B = replace(_KLEIN_4B, name="flux2-klein-9b", source="black-forest-labs/FLUX.2-klein-9B")
_BASE_4B = replace(
    _KLEIN_4B,
    name="flux2-klein-base-4b",
    source="black-forest-labs/FLUX.2-klein-base-4B",
    default_steps=50,
    default_guidance=4.0,
    true_guidance=True,
    takes_negative=True,
)
_BASE_9B = replace(_BASE_4B, name="flux2-klein-base-9b", source="black-forest-labs/FLUX.2-klein-base-9B")

# black-forest-labs/FLUX.2-dev, FLUX.2-klein-4B and FLUX.2-klein-9B, files {text_encoder,vae}/config.json; numbers of
# weights are those of the classes with these configurations.
_MISTRAL_24B = TextEncoderShape(24_011_361_280, 40, 5120, 32768, 32, 512)
_QWEN_4B = TextEncoderShape(4_022_468_096, 36, 2560, 9728, 32, 512)
_QWEN_8B = TextEncoderShape(8_190_735_360, 36, 4096, 12288, 32, 512)
_AUTOENCODER = KlAutoencoder((128, 256, 512, 512), (3, 3, 3, 3), 32, 84_046_115)

_LARGEST_TRAINED = 128 * 128  # image tokens of the largest pictures that it is made for
_LARGEST_REFERENCE = 1024 * 1024  # pixels; the pipelines scale larger ones down
_SMALLEST_SIDE, _LONGEST_SHAPE = 64, 8  # pixels, and sides to each other, of what the pipelines refer to
_ABOUT_REFERENCES = "references come before the image, attend themselves alone, and are kept from step to step"


@dataclass(frozen=True)
class Flux2Shape(TransformerShape):
    """A `Flux2Transformer2DModel`: no biases, one modulation for all blocks of a kind, gated feed-forward layers.

    Attributes:
        double_blocks: blocks where text and image have weights of their own.
        single_blocks: blocks where they share them, and attention and feed-forward run side by side.
        feed_forward: channels inside a feed-forward layer.
        guidance_embeds: whether guidance is an input.
        time_channels: sines and cosines that timesteps and guidance are taken as.
    """

    double_blocks: int
    single_blocks: int
    feed_forward: int
    guidance_embeds: bool
    time_channels: int

    rotates_text = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a configuration of diffusers; defaults are those of the class."""
        heads, head_dim = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        return cls(
            heads=heads,
            head_dim=head_dim,
            double_blocks=int(config["num_layers"]),
            single_blocks=int(config["num_single_layers"]),
            in_channels=int(config["in_channels"]),
            text_channels=int(config["joint_attention_dim"]),
            feed_forward=int(heads * head_dim * float(config.get("mlp_ratio", 3.0))),
            guidance_embeds=bool(config.get("guidance_embeds", True)),
            time_channels=int(config.get("timestep_guidance_channels", 256)),
        )

    @property
    def blocks(self) -> Mapping[str, int]:
        """See `TransformerShape`, as for all below."""
        return {"double_blocks": self.double_blocks, "single_blocks": self.single_blocks}

    @property
    def token_channels(self) -> int:
        return self.in_channels

    # ---- Weights

    @property
    def _matrices(self) -> int:
        """Weights that a token meets in a block: query, key, value, output, and feed-forward with its gate."""
        return 4 * self.width**2 + 3 * self.feed_forward * self.width

    @property
    def double_parameters(self) -> int:
        """Weights of a double block: matrices and norms of heads for text and image."""
        return 2 * (self._matrices + 2 * self.head_dim)

    @property
    def single_parameters(self) -> int:
        """Likewise of a single block."""
        return self._matrices + 2 * self.head_dim

    @property
    def parameters(self) -> int:
        doubles, singles = self.double_blocks * self.double_parameters, self.single_blocks * self.single_parameters
        return doubles + singles + self.other_parameters

    @property
    def other_parameters(self) -> int:
        width = self.width
        embedder = self.time_channels * width + width**2
        modulation = (6 + 6 + 3 + 2) * width**2  # of image, text, single blocks and output
        return (1 + self.guidance_embeds) * embedder + modulation + (2 * self.in_channels + self.text_channels) * width

    @property
    def largest_block(self) -> int:
        double = self.double_parameters if self.double_blocks else 0
        return max(double, self.single_parameters if self.single_blocks else 0)

    @property
    def largest_matrix(self) -> int:
        """Of a single block: query, key, value and feed-forward in one."""
        return (3 * self.width + 2 * self.feed_forward) * self.width

    # ---- Operations

    def linear_flop(self, image: int, text: int) -> float:
        ends = 2 * self.in_channels * image + self.text_channels * text
        return 2.0 * (self._matrices * self.layers * (image + text) + self.width * ends)

    @property
    def carried_matrices(self) -> Mapping[str, int]:
        return {"double_blocks": 4, "single_blocks": 0}

    # ---- Memory

    def pipeline_bytes(self, plan: Plan, element: int) -> float:
        """Positions of four int64, the image's in group order as well; cosines and sines of text and image apart; with
        references, latents of both and their order once more, joined."""
        entering = plan.tokens - plan.text_len
        joined = entering * (self.token_channels * element + 2 * 8) if entering > plan.image_tokens else 0
        return (plan.tokens + entering) * 4 * 8 + 2 * plan.tokens * self.head_dim * 4 + joined

    def moments(self, call: TransformerCall) -> dict[str, float]:
        blocks = {"double": (self.double_blocks, self._double), "single": (self.single_blocks, self._single)}
        return {
            f"{moment} of a {name} block": size
            for name, (count, of_block) in blocks.items()
            if count
            for moment, size in of_block(call).items()
        }

    @property
    def _wide(self) -> float:
        """Channels inside a feed-forward layer, in widths."""
        return self.feed_forward / self.width

    def _double(self, call: TransformerCall) -> dict[str, float]:
        n, wide = call.joint, self._wide
        # Hidden states, their norms; query, key and value joined, and those of text.
        held = 2 * n + 3 * n + 3 * call.text
        moments = {"rotation of keys": held + call.rotated * n, "attention": held + call.attending}
        if call.chunked:
            # Hidden states, what attention put out, the result; of a chunk the sum, its norm, and the inner layer with
            # its gate, of which another half is made, and then again.
            return moments | {"feed-forward": 3 * n + (2 + 4 * wide) * call.chunk}
        # Hidden states, norms, what attention put out; of the image also gated, and the sum; the inner layer likewise.
        return moments | {"feed-forward": 3 * n + (2 + 4 * wide) * call.image}

    def _single(self, call: TransformerCall) -> dict[str, float]:
        n, wide = call.joint, self._wide
        if call.chunked:
            # Hidden states, those of text once more, query, key, value and the inner layer after its gate.
            held = (1 + 3 + wide) * n + call.text
            return {
                # Of a chunk all in one, the half of its inner layer that is left, both joined, and the chunk before.
                "projection of queries": held + (3 * (3 + wide) + 2 * wide) * call.chunk,
                "rotation of keys": held + (2 + call.rotated) * n,
                "attention": held + 2 * n + call.attending,
                "projection": held + 2 * n + (5 + wide) * call.chunk,
            }
        # Hidden states, those of text once more, norms; query, key, value and the inner layer with its gate in one.
        held = (2 + 3 + 2 * wide) * n + call.text
        return {
            # Queries and keys are normalised.
            "rotation of keys": held + (2 + call.rotated) * n,
            "attention": held + 2 * n + call.attending,
            "activation": held + (3 + 2 * wide) * n,
            # And what attention put out joined with half of the inner layer, and its projection.
            "projection": held + (2 + wide + 1 + wide + 1) * n,
        }


class Flux2(Family):
    """See the module."""

    name = "flux2"
    title = "FLUX.2"
    medium: ClassVar[Medium] = "image"
    axes = 2
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    transformer = "Flux2Transformer2DModel"
    classes: ClassVar[Classes] = {
        "text_encoder": {"Mistral3ForConditionalGeneration": "transformers", "Qwen3ForCausalLM": "transformers"},
        "tokenizer": {
            "PixtralProcessor": "transformers",
            "Qwen2Tokenizer": "transformers",
            "Qwen2TokenizerFast": "transformers",
            **ANY_TOKENIZER,
        },
        "transformer": {"Flux2Transformer2DModel": "diffusers"},
        "vae": {"AutoencoderKLFlux2": "diffusers"},
        "scheduler": SCHEDULER,
    }
    # Of text and pictures, which wants Torchvision; only text is encoded here.
    read_as: ClassVar[Mapping[str, str]] = {"PixtralProcessor": "AutoTokenizer"}
    refused: ClassVar[Mapping[str, str]] = {"Flux2KleinKVPipeline": _ABOUT_REFERENCES}
    models = (_DEV, _KLEIN_4B, _KLEIN_9B, _BASE_4B, _BASE_9B)
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"flux2": ("full", "b", "x", "far", "fast")}
    base = _DEV.source
    text_first = True
    text_encoders = (_MISTRAL_24B,)
    autoencoder = _AUTOENCODER
    tile = picture_coding.TILE
    large_encoder = "text_encoder"
    lets_go = True
    named_in_files = ("double_stream_modulation_img.",)
    blocks_in_files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "num_layers": ("transformer_blocks", "double_blocks"),
        "num_single_layers": ("single_transformer_blocks", "single_blocks"),
    }
    shapes_in_files: ClassVar[Mapping[str, tuple[tuple[str, ...], int]]] = {
        "width": (("x_embedder.weight", "img_in.weight"), 0),
        "in_channels": (("x_embedder.weight", "img_in.weight"), 1),
        "joint_attention_dim": (("context_embedder.weight", "txt_in.weight"), 1),
        "attention_head_dim": ((".norm_q.weight", ".query_norm.scale"), 0),
    }

    # ---- Which model

    def kin(self, name: str) -> ModelChoice:
        """See `Family`, as for all below."""
        name = name.lower()
        if "klein" not in name:
            return _DEV
        distilled, base = (_KLEIN_9B, _BASE_9B) if "9b" in name else (_KLEIN_4B, _BASE_4B)
        return base if "base" in name else distilled

    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        token_side = 2 ** (len(autoencoder.get("block_out_channels") or [0] * 4) - 1) * 2
        # The configuration of dev may be older than the setting.
        template = _DEV if transformer.get("guidance_embeds", True) else _BASE_4B
        return replace(template, token_side=token_side, size_multiple=token_side)

    def of_index(
        self, choice: ModelChoice, class_name: str | None, parts: frozenset[str], options: Mapping[str, Any]
    ) -> ModelChoice:
        if choice.true_guidance and options.get("is_distilled"):
            return replace(
                choice,
                default_steps=_KLEIN_4B.default_steps,
                default_guidance=None,
                true_guidance=False,
                takes_negative=False,
            )
        return choice

    def matching_base(self, embeds_guidance: bool) -> str:
        return f"try --base {(_DEV if embeds_guidance else _KLEIN_4B).source}"

    # ---- Shapes

    def bundled_config(self, model: ModelChoice) -> str:
        """Base models have the shapes of what was distilled from them."""
        return self._kin_of(model).name.replace("-base", "")

    def text_encoders_of(self, model: ModelChoice) -> tuple[TextEncoderShape, ...]:
        kin = self._kin_of(model)
        return (_MISTRAL_24B if kin is _DEV else _QWEN_8B if kin in (_KLEIN_9B, _BASE_9B) else _QWEN_4B,)

    def _kin_of(self, model: ModelChoice) -> ModelChoice:
        return _DEV if _embeds_guidance(model) else self.kin(f"klein {model.name}")

    def transformer_shape(self, config: Mapping[str, Any]) -> Flux2Shape:
        return Flux2Shape.of(config)

    def step_grids(self, model: ModelChoice) -> tuple[Grid, ...]:
        """Of a picture as it was trained on, and of the largest that it is made for."""
        return tuple(model.grid(times * model.native_side, times * model.native_side) for times in (1, 2))

    def step_inputs(
        self, config: Mapping[str, Any], grid: Grid, text_len: int, normal: Callable[..., torch.Tensor]
    ) -> dict[str, Any]:
        import torch

        latents = normal(1, grid.tokens, config["in_channels"])
        timestep = torch.full_like(latents[:, 0, 0], 0.7)
        inputs = {
            "hidden_states": latents,
            "encoder_hidden_states": normal(1, text_len, config["joint_attention_dim"]),
            "timestep": timestep,
            "img_ids": _positions(1, *grid.shape, 1)[None].to(latents.device),
            "txt_ids": _positions(1, 1, 1, text_len)[None].to(latents.device),
        }
        # The transformer multiplies the scale by 1000 itself.
        return inputs | ({"guidance": torch.full_like(timestep, 4.0)} if config.get("guidance_embeds", True) else {})

    def reference_tokens(
        self,
        model: ModelChoice,
        size: tuple[int, int],
        kinds: frozenset[PictureKind],
        references: Sequence[tuple[int, int]],
    ) -> int:
        """The pipeline that inpaints refers to what lies around the mask as well."""
        tokens = sum(_tokens_of_reference(model, *reference) for reference in references)
        if "mask" not in kinds:
            return tokens
        if len(references) > 1:
            raise BadInput(f"{model.name} refers to one picture at most beside a mask, not {len(references)}")
        return tokens + model.grid(*size).tokens

    # ---- Loading

    def pipeline_class(self, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
        from diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint import Flux2KleinInpaintPipeline

        return Flux2KleinInpaintPipeline if "mask" in kinds else Flux2KleinPipeline

    def pipeline_of(self, model: ModelChoice, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

        return Flux2Pipeline if _embeds_guidance(model) else self.pipeline_class(kinds)

    def pipeline_for(self, pipe: Any, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        return pipe if _is_dev(pipe) else super().pipeline_for(pipe, kinds)

    def transformer_class(self) -> Any:
        from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    # ---- Making

    def given_shift(self, pipe: Any, image_tokens: int, steps: int) -> GivenShift:
        """The pipelines fit it to tokens and steps; it ends at the largest pictures that FLUX.2 is made for."""
        given = _mu(image_tokens, steps)
        return GivenShift(given, min(given, _mu(_LARGEST_TRAINED, steps)))

    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        """Padding has embeddings, which the transformer attends: no mask is among what pipelines hand it."""
        embeddings, _ = pipe.encode_prompt(prompt=prompt, max_sequence_length=tokens)
        return {"prompt_embeds": embeddings}

    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        return tuple(embeddings.shape[1] for embeddings in text.values())

    def denoise(self, pipe: Any, call: Call) -> torch.Tensor:
        arguments, first_step, latents = dict(call.arguments), call.first_step, None
        if not _is_dev(pipe):  # which has no other default than guidance
            arguments["guidance_scale"] = arguments.pop("true_cfg_scale", 1.0)
        inpaints = call.pictures.mask is not None
        if call.start is not None or inpaints:  # what `strength` leaves out is left out with the steps that are done
            strength = 1.0 if call.strength is None else call.strength
            first_step += call.steps - min(call.steps, len_of_run(call.steps, strength))
        last: list[torch.Tensor] = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            changed = call.callback(pipe, step, timestep, tensors) if call.callback else {}
            last[:] = [changed.get("latents", tensors["latents"])]
            return changed

        arguments |= {"num_inference_steps": call.steps, "callback_on_step_end": keep, "output_type": "latent"}
        with contextlib.ExitStack() as stack:
            if inpaints:
                arguments |= self._around_mask(pipe, call, stack)
            else:
                if call.begun is not None:
                    latents = _patched(call.begun, call.height // self._unit(pipe))
                elif call.start is not None:
                    latents = _noised(pipe, call, first_step)
                arguments |= {
                    "image": list(call.pictures.references) or None,
                    "height": call.height,
                    "width": call.width,
                    "generator": call.generator,
                    "latents": latents,
                }
            stack.enter_context(beginning_at(pipe, first_step))
            pipe(**arguments)
        # klein's own output is scaled for the autoencoder, with roundings.
        return self.spatial(pipe, last[0], call.width, call.height)

    def _around_mask(self, pipe: Any, call: Call, stack: contextlib.ExitStack) -> dict[str, Any]:
        """Arguments of a call that inpaints, begun or not.

        The picture is handed over as latents, which the pipeline takes as large as they are: pictures above a megapixel
        it would scale down.
        """
        import torch

        pictures = call.pictures
        assert pictures.start is not None, "a mask has a picture around it"
        generator = call.generator
        if call.begun is not None:
            # What is kept of the picture is noised at each step by what was drawn first of all.
            generator = torch.Generator("cpu").manual_seed(call.generator.initial_seed())
            stack.enter_context(_going_on_from(pipe, call.begun))
        return {
            "image": pipe._patchify_latents(picture_coding.encode(pipe, pictures.start, latents_of=_latents_by(pipe))),
            "mask_image": pictures.mask,
            "image_reference": next(iter(pictures.references), None),
            "strength": 1.0,
            "generator": generator,
        }

    def spatial(self, pipe: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        return pipe._unpatchify_latents(_patched(latents, height // self._unit(pipe)))

    def latents_shape(self, model: ModelChoice, grid: Grid, *, called: bool) -> tuple[int, ...]:
        channels = self.transformer_config(model)["in_channels"]
        return (1, grid.tokens, channels) if called else (1, channels // 4, *(2 * side for side in grid.shape))

    def as_called(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(pipe._patchify_latents(latents))

    def decode(
        self, pipe: Any, latents: torch.Tensor, tile: int | None = None, ranks: ProcessGroup | None = None
    ) -> torch.Tensor:
        mean, deviation = _statistics(pipe, latents)
        return picture_coding.decode(pipe, latents * deviation + mean, tile, _pixels_by(pipe), ranks).unsqueeze(2)

    def encode(self, pipe: Any, picture: Image.Image) -> torch.Tensor:
        latents = picture_coding.encode(pipe, picture, latents_of=_latents_by(pipe))
        mean, deviation = _statistics(pipe, latents)
        return (latents - mean) / deviation

    # ---- Attention

    def _unit(self, pipe: Any) -> int:
        """Pixels per side of an image token: latents are packed two by two."""
        return 2 * pipe.vae_scale_factor

    def grid(self, pipe: Any, height: int, width: int, num_frames: int | None = None) -> Grid:
        if num_frames is not None:
            raise BadInput(f"a {type(pipe).__name__} makes images: leave out num_frames")
        return Grid(token_sides(height, width, self._unit(pipe)))

    def adapter_class(self) -> type[Flux2Adapter]:
        return Flux2Adapter


def _embeds_guidance(model: ModelChoice) -> bool:
    """Whether it is dev, or kin to it."""
    return model.default_guidance is not None and not model.true_guidance


def _is_dev(pipe: Any) -> bool:
    return "negative_prompt_embeds" not in signature(type(pipe).__call__).parameters


def _mu(image_tokens: int, steps: int) -> float:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(image_tokens, steps)


def _positions(*sides: int) -> torch.Tensor:
    """Positions `[product of sides, 4]` (picture, row, column, word) of tokens in raster order, int64."""
    import torch

    return torch.stack(torch.meshgrid(*map(torch.arange, sides), indexing="ij"), dim=-1).reshape(-1, len(sides))


def _tokens_of_reference(model: ModelChoice, width: int, height: int) -> int:
    """Tokens of a picture to refer to, as the pipelines scale and cut it (`Flux2Pipeline.__call__`).

    Raises:
        BadInput: if they take no picture of that size.
    """
    if min(width, height) < _SMALLEST_SIDE or max(width, height) > _LONGEST_SHAPE * min(width, height):
        raise BadInput(
            f"{model.name} cannot refer to a picture of {width}x{height}: give one of {_SMALLEST_SIDE} pixels a side "
            f"or more, and no side {_LONGEST_SHAPE} times as long as the other"
        )
    if width * height > _LARGEST_REFERENCE:
        scale = (_LARGEST_REFERENCE / (width * height)) ** 0.5
        width, height = int(width * scale), int(height * scale)
    return (width // model.token_side) * (height // model.token_side)


# ---- Latents


def _patched(latents: torch.Tensor, rows: int) -> torch.Tensor:
    """Latents `[B, N, C]`, as a callback has them, in their places `[B, C, rows, columns]`."""
    return latents.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)


def _statistics(pipe: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the autoencoder's latents, for latents `[1, C, h, w]` of any size.

    They are known of each channel at each of the four places that make a token.
    """
    import torch

    vae, (high, wide) = pipe.vae, latents.shape[2:]
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)

    def spread(of_channels: torch.Tensor) -> torch.Tensor:
        of_token = of_channels.view(1, -1, 2, 2).to(latents.device, latents.dtype)
        return of_token.repeat(1, 1, -(-high // 2), -(-wide // 2))[..., :high, :wide]

    return spread(vae.bn.running_mean), spread(deviation)


def _pixels_by(pipe: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda latents: pipe.vae.decode(latents, return_dict=False)[0]


def _latents_by(pipe: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda pixels: pipe.vae.encode(pixels).latent_dist.mode()


def _noised(pipe: Any, call: Call, step: int) -> torch.Tensor:
    """The picture that a call starts from, `[1, C, rows, columns]`, with as much noise as there is before a step."""
    import numpy as np
    from diffusers.utils.torch_utils import randn_tensor

    assert call.start is not None
    start = pipe._patchify_latents(call.start)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    # As the pipelines set it.
    sigmas, tokens = np.linspace(1.0, 1 / call.steps, call.steps), start.shape[2] * start.shape[3]
    scheduler.set_timesteps(sigmas=sigmas, mu=_mu(tokens, call.steps))
    noise = randn_tensor(start.shape, generator=call.generator, device=start.device, dtype=start.dtype)
    sigma = scheduler.sigmas[step].to(start)
    return sigma * noise + (1 - sigma) * start


@contextlib.contextmanager
def _going_on_from(pipe: Any, begun: torch.Tensor) -> Iterator[None]:
    """While inside, the pipeline that inpaints prepares all as at its beginning, but goes on from other latents."""
    stock = pipe.prepare_latents

    def prepare_latents(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        latents, *others = stock(*arguments, **options)
        return (begun.to(latents), *others)

    pipe.prepare_latents = prepare_latents
    try:
        yield
    finally:
        del pipe.prepare_latents


# ---- Attention


class Flux2Adapter(DispatchAdapter):
    """Tokens and their positions are put in order outside the transformer; those of references keep their places."""

    text_first = Flux2.text_first
    orders_calls = True

    def __init__(self, transformer: torch.nn.Module, grid: Grid, **options: Any) -> None:
        """See `DispatchAdapter`."""
        super().__init__(transformer, grid, **options)
        self._checked: tuple[torch.Tensor, int] | None = None

    def blocks_of(self, model: Any) -> list[Any]:
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def stock_processors(self) -> tuple[type, ...]:
        from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

        return Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

    def returns_attention_alone(self, attention: Any) -> bool:
        """Single blocks have their feed-forward layers in it."""
        from diffusers.models.transformers.transformer_flux2 import Flux2Attention

        return isinstance(attention, Flux2Attention)

    def chunked_blocks(self) -> Mapping[type, Forward]:
        from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock

        return {Flux2TransformerBlock: _double_in_chunks, Flux2SingleTransformerBlock: _single_in_chunks}

    def read(self, call: dict[str, Any]) -> Text:
        if call.get("kv_cache_mode") is not None or call.get("kv_cache") is not None or call.get("num_ref_tokens"):
            raise BadInput(f"keys of references are kept, which is not supported: {_ABOUT_REFERENCES}")
        # `scale` is LoRA's, and changes no token order.
        extras = sorted(set(call.get("joint_attention_kwargs") or {}) - {"scale"})
        if extras:
            raise BadInput(f"attention arguments {', '.join(extras)} are not supported: leave them out")
        tokens = call["hidden_states"].shape[1]
        if tokens < self.grid.tokens or call["img_ids"].shape[-2] != tokens:
            raise BadInput(f"GRAT was installed for {self._size}, the call has {tokens}: {_GIVE_SIZE}")
        return Text(call["encoder_hidden_states"].shape[1], references=tokens - self.grid.tokens)

    def enter(self, call: dict[str, Any], step: int) -> dict[str, Any]:
        self._check_positions(call["img_ids"], step)
        positions = call["img_ids"][0] if call["img_ids"].dim() == 3 else call["img_ids"]
        tokens = self.in_groups(call["hidden_states"], 1)
        return call | {"hidden_states": tokens, "img_ids": self.in_groups(positions, 0)}

    @property
    def _size(self) -> str:
        rows, columns = self.grid.shape
        return f"{rows}x{columns} = {self.grid.tokens} image tokens"

    def _check_positions(self, given: torch.Tensor, step: int) -> None:
        """Raises BadInput unless positions are those of the grid, and what follows is of other pictures.

        The comparison waits for the device. Pipelines join the positions of references to those of the image at each
        step, always the same: so once a run.
        """
        import torch

        if self._checked is not None and (self._checked[0] is given or self._checked[1] < step):
            return
        positions = given[0] if given.dim() == 3 else given
        image, references = positions[: self.grid.tokens], positions[self.grid.tokens :]
        exact = _positions(1, *self.grid.shape, 1).to(given.device)
        if not torch.equal(image, exact.to(given.dtype)) or bool((references[:, 0] == 0).any()):
            raise BadInput(
                f"GRAT was installed for {self._size}, which are not the call's first by their positions: {_GIVE_SIZE}"
            )
        self._checked = given, step

    @contextlib.contextmanager
    def attached(self, *arguments: Any, **options: Any) -> Iterator[None]:
        try:
            with super().attached(*arguments, **options):
                yield
        finally:
            self._checked = None


_GIVE_SIZE = "give the pipeline call the height and width of the install, in this order"


# ---- Blocks in chunks of tokens


def _double_in_chunks(block: Any, chunk: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    from grat_cli.attention.chunking import double_block

    def forward(
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb_mod_img: torch.Tensor,
        temb_mod_txt: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def attend(image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            others = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
            return block.attn(hidden_states=image, encoder_hidden_states=text, **others)

        modulations = [_parts(of_stream, 6) for of_stream in (temb_mod_img, temb_mod_txt)]
        image, text = double_block(block, chunk, hidden_states, encoder_hidden_states, modulations, attend)
        return _clipped(text), image

    return forward


def _single_in_chunks(block: Any, chunk: int) -> Callable[..., Any]:
    """Its attention module projects to query, key, value and the inner layer at once, which is done chunk by chunk;
    what is kept of all tokens is the inner layer after its gate, half as wide."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from diffusers.models.embeddings import apply_rotary_emb

    from grat_cli.attention.chunking import by_chunks, modulated

    attn, rotated = block.attn, cast("Callable[..., torch.Tensor]", apply_rotary_emb)
    own = 3 * attn.inner_dim

    def forward(
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb_mod: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:
        import torch

        if encoder_hidden_states is not None:
            text_seq_len = encoder_hidden_states.shape[1]
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = _parts(temb_mod, 3)
        normed = modulated(block.norm, shift, scale)

        def project(tokens: torch.Tensor) -> torch.Tensor:
            wide = attn.to_qkv_mlp_proj(normed(tokens))
            return torch.cat([wide[..., :own], attn.mlp_act_fn(wide[..., own:])], dim=-1)

        projected: Any = by_chunks(project, chunk, hidden_states)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in projected[..., :own].chunk(3, dim=-1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (rotated(one, image_rotary_emb, sequence_dim=1) for one in (query, key))
        chosen = {"backend": attn.processor._attention_backend, "parallel_config": attn.processor._parallel_config}
        attended = dispatch_attention_fn(query, key, value, **chosen).flatten(2, 3).to(query.dtype)
        del query, key, value

        def rest(tokens: torch.Tensor, attended: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
            return _clipped(tokens + gate * attn.to_out(torch.cat([attended, inner], dim=-1)))

        joint = by_chunks(rest, chunk, hidden_states, attended, projected[..., own:])
        return (joint[:, :text_seq_len], joint[:, text_seq_len:]) if split_hidden_states else joint

    return forward


def _parts(modulation: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Shifts, scales and gates `[B, 1, C]`, that were computed for all blocks of a kind."""
    return (modulation[:, None] if modulation.dim() == 2 else modulation).chunk(count, dim=-1)


def _clipped(tokens: torch.Tensor) -> torch.Tensor:
    import torch

    return tokens.clip(-65504, 65504) if tokens.dtype == torch.float16 else tokens
