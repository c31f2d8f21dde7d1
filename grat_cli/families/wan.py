"""Wan 2.1 and 2.2: videos, with attention over video tokens alone; text and pictures come in by cross-attention.

Read against diffusers 0.42.1, `pipelines/wan` and `models/transformers/transformer_wan.py`. Settings are those of
Wan-Video/Wan2.1 (`generate.py`, README.md) and Wan-Video/Wan2.2 (`wan/configs`), configurations those of the folders
`Wan-AI/*-Diffusers` on the Hugging Face hub.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from grat_cli.attention.adapter import DispatchAdapter
from grat_cli.attention.layer import Text
from grat_cli.errors import BadInput
from grat_cli.families.autoencoders import AutoencoderShape, WanAutoencoder
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
    VideoTraits,
    beginning_at,
    latent_frames,
    token_sides,
)
from grat_cli.families.shapes import TextEncoderShape, TransformerCall, TransformerShape
from grat_cli.families.shared_decoding import tiles_over_ranks
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from grat_cli.attention.chunking import Forward
    from grat_kernels import Plan

_START: frozenset[PictureKind] = frozenset({"start"})
# `sample_neg_prompt` of both repositories (`wan/configs/shared_config.py`).
_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_480P, _720P = VideoTraits(832, 480, 81, 16), VideoTraits(1280, 720, 81, 16)
_14B = ModelChoice(
    "wan2.1-14b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "hub",
    "wan",
    "wan",
    config="wan2.1-14b",
    native_side=960,
    text_tokens=512,
    default_steps=50,
    default_guidance=5.0,
    default_shift=5.0,
    true_guidance=True,
    negative_prompt=_NEGATIVE,
    video=_720P,
)
_1B = replace(
    _14B,
    name="wan2.1-1.3b",
    source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    config="wan2.1-1.3b",
    native_side=632,
    default_guidance=6.0,
    default_shift=8.0,
    video=_480P,
)
_I2V_720P = replace(
    _14B,
    name="wan2.1-i2v-720p",
    source="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    config="wan2.1-i2v",
    default_steps=40,
    takes=_START,
    needs=_START,
)
_I2V_480P = replace(
    _I2V_720P,
    name="wan2.1-i2v-480p",
    source="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    native_side=632,
    default_shift=3.0,
    video=_480P,
)
# Two transformers, one for much noise and one for little, of which the second is guided by 3 where the first is by 4.
_A14B = replace(
    _14B,
    name="wan2.2-14b",
    source="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    default_steps=40,
    default_guidance=4.0,
    default_shift=12.0,
    transformers=2,
    later_guidance=3 / 4,
)
_I2V_A14B = replace(
    _A14B,
    name="wan2.2-i2v",
    source="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    config="wan2.2-i2v",
    default_guidance=3.5,
    default_shift=5.0,
    later_guidance=1.0,
    takes=_START,
    needs=_START,
)
_5B = replace(
    _14B,
    name="wan2.2-5b",
    source="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    config="wan2.2-5b",
    token_side=32,
    size_multiple=32,
    takes=_START,
    video=VideoTraits(1280, 704, 121, 24),
)
_MODELS = (_14B, _1B, _A14B, _5B, _I2V_480P, _I2V_720P, _I2V_A14B)

# google/umt5-xxl, and the picture encoder of Wan2.1-I2V-14B-*-Diffusers; numbers of weights are those of the classes
# with these configurations.
_UMT5 = TextEncoderShape(5_680_910_336, 24, 4096, 10240, 64, 512, vocabulary=256_384)
_CLIP_H = TextEncoderShape(630_766_080, 32, 1280, 5120, 16, 257, vocabulary=0, of_pictures=True)
_FINE, _COARSE = (96, 192, 384, 384), (256, 512, 1024, 1024)
_AUTOENCODER = WanAutoencoder(_FINE, (3, 3, 3, 3), 16, 126_892_531, encoder_channels=_FINE)
# Of TI2V-5B: 48 channels, which the pipeline treats as latents whose tokens have timesteps of their own.
_AUTOENCODER_5B = WanAutoencoder(
    _COARSE, (3, 3, 3, 3), 48, 704_688_668, patch=2, residual=True, encoder_channels=(160, 320, 640, 640)
)
_CHANNELS_5B = 48
_PICTURE_TOKENS = 257  # of CLIP for one picture
_TEXT_TOKENS = 512


@dataclass(frozen=True)
class WanShape(TransformerShape):
    """A `WanTransformer3DModel`.

    Attributes:
        count: blocks.
        inner: channels inside the feed-forward layers.
        out_channels: of the prediction.
        patch: latents that a token holds of each channel.
        frequencies: sines and cosines that a timestep is taken as.
        norms_cross: whether the norm before cross-attention has weights.
        picture_channels: of a token of the picture encoder; 0 without one.
        added_channels: of what further keys and values of cross-attention are made of; likewise.
        picture_places: positions of such tokens that are learned; 0 for none.
    """

    count: int
    inner: int
    out_channels: int
    patch: int
    frequencies: int
    norms_cross: bool
    picture_channels: int
    added_channels: int
    picture_places: int

    joins_text = False
    rotates_text = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> WanShape:
        """From a configuration of diffusers."""
        return cls(
            heads=int(config["num_attention_heads"]),
            head_dim=int(config["attention_head_dim"]),
            in_channels=int(config["in_channels"]),
            text_channels=int(config["text_dim"]),
            count=int(config["num_layers"]),
            inner=int(config["ffn_dim"]),
            out_channels=int(config["out_channels"] or config["in_channels"]),
            patch=math.prod(int(size) for size in config["patch_size"]),
            frequencies=int(config["freq_dim"]),
            norms_cross=bool(config["cross_attn_norm"]),
            picture_channels=int(config.get("image_dim") or 0),
            added_channels=int(config.get("added_kv_proj_dim") or 0),
            picture_places=int(config.get("pos_embed_seq_len") or 0),
        )

    @property
    def blocks(self) -> Mapping[str, int]:
        """See `TransformerShape`, as for all below."""
        return {"blocks": self.count}

    @property
    def token_channels(self) -> int:
        return self.patch * self.in_channels

    @property
    def predicted_channels(self) -> int:
        return self.patch * self.out_channels

    @property
    def timed_tokens(self) -> bool:
        """Whether each token has a timestep of its own, as the pipeline of TI2V-5B has it."""
        return self.in_channels == _CHANNELS_5B

    # ---- Weights

    @property
    def largest_block(self) -> int:
        width = self.width
        attention = 4 * (width**2 + width) + 2 * width
        added = 2 * (self.added_channels * width + width) + width if self.added_channels else 0
        feed_forward = 2 * width * self.inner + self.inner + width
        return 2 * attention + added + feed_forward + 2 * width * self.norms_cross + 6 * width

    @property
    def other_parameters(self) -> int:
        width, picture = self.width, self.picture_channels
        ends = self.token_channels * width + width + width * self.patch * self.out_channels
        ends += self.patch * self.out_channels + 2 * width
        time = self.frequencies * width + width + width**2 + width + 6 * (width**2 + width)
        text = self.text_channels * width + width + width**2 + width
        pictures = picture**2 + picture + picture * width + width + 2 * picture + 2 * width if picture else 0
        pictures += self.picture_places * picture
        return ends + time + text + pictures

    @property
    def parameters(self) -> int:
        return self.count * self.largest_block + self.other_parameters

    @property
    def largest_matrix(self) -> int:
        return self.width * max(self.inner, self.width)

    # ---- Operations

    def linear_flop(self, image: int, text: int) -> float:
        """With cross-attention, which is over all text, and over the tokens of a picture."""
        width = self.width
        pictures = _PICTURE_TOKENS if self.added_channels else 0
        of_image = 6 * width**2 + 2 * width * self.inner
        of_text = 2 * width**2 * text + 2 * self.added_channels * width * pictures
        across = 2 * width * image * (text + pictures)
        ends = (self.token_channels + self.patch * self.out_channels) * width * image
        ends += (self.text_channels * width + width**2) * text
        ends += (self.picture_channels**2 + self.picture_channels * width) * pictures
        timesteps = image if self.timed_tokens else 1
        ends += (self.frequencies * width + 7 * width**2) * timesteps
        return 2.0 * (self.count * (of_image * image + of_text + across) + ends)

    # ---- Memory

    def pipeline_bytes(self, plan: Plan, element: int) -> float:
        """Text as it comes and as blocks take it, latents in fp32 beside those of the transformer, and timesteps of
        tokens with the modulation that is made of them."""
        width, tokens = self.width, plan.image_tokens
        text = _TEXT_TOKENS * (self.text_channels + 2 * width) * element
        latents = tokens * self.patch * self.out_channels * 4
        return text + latents + (7 * tokens * width * element if self.timed_tokens else 0)

    def moments(self, call: TransformerCall) -> dict[str, float]:
        n, chunk = call.image, call.chunk
        fp32 = (call.rotated - 1) / 3  # bytes of fp32 per byte of a hidden state
        # The modulation of each token in fp32, which stock blocks hold from their beginning.
        modulation = 6 * fp32 if self.timed_tokens else 0.0
        inner = self.inner / self.width
        # Hidden states, their norm, query, key and value.
        held = 5 * n + (0 if call.chunked else modulation * n)
        attention = {
            "attention": held + 2 * call.summaries * call.fused + call.attending,
            # Beside the rotated query what the key is rotated to, by two products and their difference of half of it.
            "rotation of keys": held + (1 + 1.5 * fp32) * n,
        }
        if not call.chunked:
            # Hidden states as they came and as they are, what cross-attention took and put out, and twice the inner
            # layer.
            return attention | {"feed-forward": (4 + modulation + 2 * inner) * n}
        # Hidden states as they came and as they are, what comes of them; of a chunk its sum and norm in fp32, and twice
        # the inner layer.
        return attention | {"feed-forward": 3 * n + (2 * fp32 + modulation + 1 + 2 * inner) * chunk}


class Wan(Family):
    """See the module."""

    name = "wan"
    title = "Wan"
    medium: ClassVar[Medium] = "video"
    axes = 3
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    transformer = "WanTransformer3DModel"
    classes: ClassVar[Classes] = {
        "text_encoder": {"UMT5EncoderModel": "transformers"},
        "tokenizer": {"T5Tokenizer": "transformers", "T5TokenizerFast": "transformers", **ANY_TOKENIZER},
        "transformer": {"WanTransformer3DModel": "diffusers"},
        "transformer_2": {"WanTransformer3DModel": "diffusers"},
        "vae": {"AutoencoderKLWan": "diffusers"},
        "scheduler": {"UniPCMultistepScheduler": "diffusers", **SCHEDULER},
        "image_encoder": {"CLIPVisionModel": "transformers"},
        # Without torchvision it is saved as what it is then.
        "image_processor": {"CLIPImageProcessor": "transformers", "CLIPImageProcessorPil": "transformers"},
    }
    optional: ClassVar[frozenset[str]] = frozenset({"transformer_2", "image_encoder", "image_processor"})
    refused: ClassVar[Mapping[str, str]] = {
        "WanVACEPipeline": "its transformer has further blocks, which see tokens of a control in raster order",
        "WanAnimatePipeline": "its transformer adds tokens of a pose, and of a face between its blocks",
    }
    not_driven: ClassVar[Mapping[str, str]] = {
        "LucyEditPipeline": "it edits a video, and grat hands on pictures alone",
        "WanVideoToVideoPipeline": "it starts from a video, and grat hands on pictures alone",
    }
    models = _MODELS
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"wan": ("full", "b", "planes", "lines", "far", "fast")}
    base = _14B.source
    text_first = False
    text_encoders = (_UMT5,)
    autoencoder = _AUTOENCODER
    large_encoder = "text_encoder"
    autoencoder_dtype = "float32"  # as on its model cards
    lets_go = True
    named_in_files = ("patch_embedding.",)
    blocks_in_files: ClassVar[Mapping[str, tuple[str, ...]]] = {"num_layers": ("blocks",)}
    shapes_in_files: ClassVar[Mapping[str, tuple[tuple[str, ...], int]]] = {
        "width": (("patch_embedding.weight",), 0),
        "ffn_dim": ((".ffn.net.0.proj.bias", ".ffn.0.bias"), 0),
        "text_dim": (("text_embedder.linear_1.weight", "text_embedding.0.weight"), 1),
    }

    # ---- Which model

    def kin(self, name: str) -> ModelChoice:
        """See `Family`, as for all below."""
        word = name.lower()
        from_picture = "i2v" in word and "ti2v" not in word
        if "5b" in word:
            return _5B
        if "2.2" in word or "a14b" in word:
            return _I2V_A14B if from_picture else _A14B
        if from_picture:
            return _I2V_480P if "480" in word else _I2V_720P
        return _1B if "1.3b" in word else _14B

    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        patch = transformer.get("patch_size") or [1, 2, 2]
        channels = transformer.get("in_channels", 16)
        if channels == _CHANNELS_5B:
            template = _5B
        elif channels != transformer.get("out_channels", channels):
            template = _I2V_720P if transformer.get("image_dim") else _I2V_A14B
        else:
            template = _14B if transformer.get("num_attention_heads", 40) == 40 else _1B
        token_side = autoencoder.get("scale_factor_spatial", 8) * patch[-1]
        frames_per_latent = autoencoder.get("scale_factor_temporal", 4)
        return replace(
            template,
            # Its own scheduler's shift: a fine-tune may have another.
            default_shift=None,
            transformers=1,
            later_guidance=1.0,
            token_side=token_side,
            size_multiple=max(16, token_side),
            video=replace(template.require_video(), frames_per_latent=frames_per_latent),
        )

    def of_index(
        self, choice: ModelChoice, class_name: str | None, parts: frozenset[str], options: Mapping[str, Any]
    ) -> ModelChoice:
        if options.get("expand_timesteps"):  # so that those of a first frame can be 0
            choice = replace(choice, takes=_START, needs=NO_PICTURES)
        if "transformer_2" not in parts:
            return choice
        kin = _I2V_A14B if choice.needs else _A14B
        return replace(
            choice,
            transformers=2,
            later_guidance=kin.later_guidance,
            default_steps=kin.default_steps,
            default_guidance=kin.default_guidance,
        )

    # ---- Shapes

    def bundled_config(self, model: ModelChoice) -> str:
        return model.config

    def fresh_modules(self, config: Mapping[str, Any]) -> Mapping[str, torch.nn.Module]:
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

        patch: Any = tuple(config["patch_size"])
        return {"rope": WanRotaryPosEmbed(config["attention_head_dim"], patch, config.get("rope_max_seq_len", 1024))}

    def transformer_shape(self, config: Mapping[str, Any]) -> WanShape:
        return WanShape.of(config)

    def autoencoder_of(self, model: ModelChoice) -> AutoencoderShape:
        return _AUTOENCODER_5B if model.config == _5B.config else _AUTOENCODER

    def text_encoders_of(self, model: ModelChoice) -> tuple[TextEncoderShape, ...]:
        return (_UMT5, _CLIP_H) if model.config == _I2V_720P.config else (_UMT5,)

    def step_grids(self, model: ModelChoice) -> tuple[Grid, ...]:
        video = model.require_video()
        return (model.grid(video.width, video.height, video.frames),)

    def step_inputs(
        self, config: Mapping[str, Any], grid: Grid, text_len: int, normal: Callable[..., torch.Tensor]
    ) -> dict[str, Any]:
        import torch

        latents = normal(*_latents_shape(config, grid, config["in_channels"]))
        timed = self.transformer_shape(config).timed_tokens
        inputs = {
            "hidden_states": latents,
            "timestep": torch.full((1, grid.tokens) if timed else (1,), 700, device=latents.device),
            "encoder_hidden_states": normal(1, text_len, config["text_dim"]),
        }
        pictures = config.get("image_dim")
        return inputs | ({"encoder_hidden_states_image": normal(1, _PICTURE_TOKENS, pictures)} if pictures else {})

    # ---- Loading

    def pipeline_class(self, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        from diffusers.pipelines.wan.pipeline_wan import WanPipeline
        from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

        return WanImageToVideoPipeline if "start" in kinds else WanPipeline

    def transformer_class(self) -> Any:
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        return WanTransformer3DModel

    def dtypes(self, parts: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The autoencoder is in fp32, as on the model cards: it is small, and its norms lose most in half precision."""
        import torch

        return {part: torch.float32 if part == "vae" else dtype for part in parts}

    def prepare(self, pipe: Any, tile: int | None = None) -> None:
        """The autoencoder decodes a frame of latents at a time; in tiles only where they are asked for."""
        if tile is None:
            return
        unit = pipe.vae.spatial_compression_ratio
        stride = max(unit, tile * 3 // 4 // unit * unit)
        pipe.vae.enable_tiling(
            tile_sample_min_height=tile,
            tile_sample_min_width=tile,
            tile_sample_stride_height=stride,
            tile_sample_stride_width=stride,
        )

    # ---- Making

    def guided(self, model: ModelChoice, scale: float | None) -> dict[str, float]:
        if scale is None:
            return {"guidance_scale": 1.0}
        later = {"guidance_scale_2": scale * model.later_guidance} if model.transformers == 2 else {}
        return {"guidance_scale": scale, **later}

    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        # The pipeline of videos from text encodes for the others, too: they cannot without the package ftfy.
        of_text = self.pipeline_for(pipe)
        embeddings, _ = of_text.encode_prompt(
            prompt=prompt, do_classifier_free_guidance=False, max_sequence_length=tokens
        )
        return {"prompt_embeds": embeddings}

    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        """Text is attended across, not jointly."""
        return (0,) * sum(name.endswith("prompt_embeds") for name in text)

    def denoise(self, pipe: Any, call: Call) -> torch.Tensor:
        start = call.pictures.start
        with (
            beginning_at(pipe, call.first_step, history=call.history),
            _first_frame_kept(pipe, call.callback) as callback,
        ):
            return pipe(
                **call.arguments,
                **({} if start is None else {"image": start}),
                height=call.height,
                width=call.width,
                num_frames=call.frames,
                num_inference_steps=call.steps,
                generator=call.generator,
                latents=call.begun,
                output_type="latent",
                callback_on_step_end=callback,
            ).frames

    def latents_shape(self, model: ModelChoice, grid: Grid, *, called: bool) -> tuple[int, ...]:
        config = self.transformer_config(model)
        return _latents_shape(config, grid, config["out_channels"])

    def decode(
        self, pipe: Any, latents: torch.Tensor, tile: int | None = None, ranks: ProcessGroup | None = None
    ) -> torch.Tensor:
        import torch

        if tile is not None:
            self.prepare(pipe, tile)
        vae = pipe.vae
        latents = latents.to(vae.device, vae.dtype)

        def by_channel(numbers: Any) -> torch.Tensor:
            return torch.tensor(numbers).view(1, -1, 1, 1, 1).to(latents)

        with torch.no_grad(), tiles_over_ranks(pipe.vae, ranks):
            scaled = latents / (1.0 / by_channel(vae.config.latents_std)) + by_channel(vae.config.latents_mean)
            return vae.decode(scaled, return_dict=False)[0]

    # ---- Attention

    def transformers(self, pipe: Any) -> tuple[Any, ...]:
        return tuple(one for one in (pipe.transformer, getattr(pipe, "transformer_2", None)) if one is not None)

    def grid(self, pipe: Any, height: int, width: int, num_frames: int | None = None) -> Grid:
        frames, rows, columns = pipe.transformer.config.patch_size
        if rows != columns:
            raise BadInput(f"the transformer's patches are {rows}x{columns} latents: GRAT knows square ones")
        sides = token_sides(height, width, pipe.vae_scale_factor_spatial * rows)
        latents = latent_frames(pipe, num_frames, pipe.vae_scale_factor_temporal)
        return Grid((latents // frames, *sides))

    def adapter_class(self) -> type[WanAdapter]:
        return WanAdapter


@contextmanager
def _first_frame_kept(pipe: Any, callback: Callable[..., dict[str, Any]] | None) -> Iterator[Any]:
    """While inside, a callback that has latents after the last step as a call returns them.

    Where tokens are timed, the pipeline puts the given first frame back once more when all steps are done.
    """
    if callback is None or not pipe.config.expand_timesteps or "image_encoder" not in pipe.components:
        yield callback
        return
    stock, given = pipe.prepare_latents, []

    def prepare_latents(*arguments: Any, **options: Any) -> Any:
        prepared = stock(*arguments, **options)
        given[:] = prepared[1:2]
        return prepared

    def with_first_frame(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        import torch

        if step + 1 == pipe.num_timesteps:
            latents = torch.cat([given[0][:, :, :1], tensors["latents"][:, :, 1:]], dim=2)
            tensors = {**tensors, "latents": latents}
        return callback(pipe, step, timestep, tensors)

    pipe.prepare_latents = prepare_latents
    try:
        yield with_first_frame
    finally:
        del pipe.prepare_latents


def _latents_shape(config: Mapping[str, Any], grid: Grid, channels: int) -> tuple[int, ...]:
    return (1, channels, *(tokens * size for tokens, size in zip(grid.shape, config["patch_size"], strict=True)))


# ---- Attention


class WanAdapter(DispatchAdapter):
    """Tokens are put in order where they leave the patch embedding, and back where they leave the output projection.

    Cross-attention, in which each video token is alone, stays as it is.
    """

    text_first = Wan.text_first

    def blocks_of(self, model: Any) -> list[Any]:
        return list(model.blocks)

    def attention_of(self, block: Any) -> Any:
        return block.attn1

    def stock_processors(self) -> tuple[type, ...]:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        return (WanAttnProcessor,)

    def chunked_blocks(self) -> Mapping[type, Forward]:
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock

        return {WanTransformerBlock: _in_chunks}

    def hooks(self) -> Sequence[tuple[torch.nn.Module, Callable[..., Any]]]:
        model = self.model
        return (
            (model.rope, self.grouped(1)),
            (model.patch_embedding, self._embedded),
            (model.proj_out, self.restored(1)),
        )

    def _embedded(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        """A hook that puts embedded patches `[B, C, T, h, w]`, which are flattened afterwards, in group order."""
        return self.in_groups(output.flatten(2), 2)[..., None, None]

    def read(self, call: dict[str, Any]) -> Text:
        shape = tuple(
            size // side
            for size, side in zip(call["hidden_states"].shape[2:], self.model.config.patch_size, strict=True)
        )
        if shape != self.grid.shape:
            installed, given = ("x".join(map(str, sizes)) for sizes in (self.grid.shape, shape))
            raise BadInput(
                f"GRAT was installed for {installed} video tokens (frames x rows x columns), the call has {given}: "
                "give the pipeline call the frames, height and width of the install"
            )
        # `scale` is LoRA's, and changes no token order.
        if extras := sorted(set(call.get("attention_kwargs") or {}) - {"scale"}):
            raise BadInput(f"attention arguments {', '.join(extras)} are not supported: leave them out")
        return Text(0)

    def enter(self, call: dict[str, Any], step: int) -> dict[str, Any]:
        """Timesteps of tokens `[B, N]` go with their tokens."""
        timestep = call["timestep"]
        return call | {"timestep": self.in_groups(timestep, 1)} if timestep.ndim == 2 else call


def _in_chunks(block: Any, chunk: int) -> Callable[..., torch.Tensor]:
    """The forward of a `WanTransformerBlock` in chunks of tokens; both attentions take all of them at once."""
    from grat_cli.attention.chunking import by_chunks

    def forward(
        hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, rotary_emb: Any
    ) -> torch.Tensor:
        by_token = temb.ndim == 4  # [B, N, 6, C], else [B, 6, C]

        def modulation(temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
            table = block.scale_shift_table
            parts = ((table.unsqueeze(0) if by_token else table) + temb.float()).chunk(6, dim=2 if by_token else 1)
            return tuple(part.squeeze(2) for part in parts) if by_token else parts

        own = (temb,) if by_token else ()
        shared = None if by_token else modulation(temb)

        def vectors(temb: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return modulation(*temb) if shared is None else shared

        def normed(tokens: torch.Tensor, *temb: torch.Tensor) -> torch.Tensor:
            shift, scale, *_ = vectors(temb)
            return (block.norm1(tokens.float()) * (1 + scale) + shift).type_as(tokens)

        def attended(tokens: torch.Tensor, attention: torch.Tensor, *temb: torch.Tensor) -> torch.Tensor:
            return (tokens.float() + attention * vectors(temb)[2]).type_as(tokens)

        def crossed(tokens: torch.Tensor) -> torch.Tensor:
            return block.norm2(tokens.float()).type_as(tokens)

        def fed(tokens: torch.Tensor, *temb: torch.Tensor) -> torch.Tensor:
            _, _, _, shift, scale, gate = vectors(temb)
            made = block.ffn((block.norm3(tokens.float()) * (1 + scale) + shift).type_as(tokens))
            return (tokens.float() + made.float() * gate).type_as(tokens)

        attention = block.attn1(by_chunks(normed, chunk, hidden_states, *own), None, None, rotary_emb)
        hidden_states = by_chunks(attended, chunk, hidden_states, attention, *own)
        del attention
        hidden_states = hidden_states + block.attn2(
            by_chunks(crossed, chunk, hidden_states), encoder_hidden_states, None, None
        )
        return by_chunks(fed, chunk, hidden_states, *own)

    return forward
