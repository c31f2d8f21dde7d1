"""HunyuanVideo-1.5: videos from text, or from a picture and text, with a joint sequence of [video, text].

Its text is of three kinds: tokens of a picture (none for text-to-video, where zeros stand for them), of text that the
prompt quotes (byT5), and of the prompt. The transformer puts those that are valid first. Stock attention masks the
rest, by an N x N boolean mask in every layer; here they are cut off before the transformer sees them.

Read against diffusers 0.42.1, `pipelines/hunyuan_video1_5`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from grat_cli.families.autoencoders import AutoencoderShape, Coding, Pixels, Sample, convolved
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
    Pictures,
    VideoTraits,
    beginning_at,
    latent_frames,
    token_sides,
)
from grat_cli.families.hunyuan import HunyuanAdapter, HunyuanShape
from grat_cli.families.shapes import TextEncoderShape
from grat_cli.families.shared_decoding import tiles_over_ranks
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from grat_cli.attention.chunking import Forward
    from grat_cli.attention.layer import Text
    from grat_kernels import Plan

# Of a picture that a video starts from, as the pipeline's vision encoder makes them; stock text-to-video passes as many
# zeros.
PICTURE_TOKENS = 729
_STRIDE = 16  # pixels per token along a side
_QUOTED_TOKENS = 256  # that the pipeline pads quoted text to
_FROM_PICTURE = frozenset[PictureKind]({"start"})


def _model(name: str, task: str, size: int, shift: float) -> ModelChoice:
    """A known model; steps, guidance and shift are those of Tencent's README, "Optimal Inference Configurations".

    Frames are its default `--video_length`, and sizes those that diffusers' pipeline has for 16:9.
    """
    width, height = (848, 480) if size == 480 else (1280, 720)
    kinds = _FROM_PICTURE if task == "i2v" else NO_PICTURES
    return ModelChoice(
        name,
        f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{size}p_{task}",
        "hub",
        "hunyuan15",
        "hunyuan15",
        native_side=640 if size == 480 else 960,
        text_tokens=1000,
        default_steps=50,
        default_guidance=6.0,
        default_shift=shift,
        true_guidance=True,
        video=VideoTraits(width=width, height=height, frames=121, fps=24),
        takes=kinds,
        needs=kinds,
    )


_480P = _model("hunyuan15-480p", "t2v", 480, 5.0)
_720P = _model("hunyuan15-720p", "t2v", 720, 9.0)
_480P_I2V = _model("hunyuan15-480p-i2v", "i2v", 480, 5.0)
_720P_I2V = _model("hunyuan15-720p-i2v", "i2v", 720, 7.0)

# The language model of Qwen/Qwen2.5-VL-7B-Instruct, with the pipeline's own 108 tokens before a prompt;
# google/byt5-small; and for pictures google/siglip-so400m-patch14-384. Numbers of weights are those of
# Qwen2_5_VLTextModel, T5EncoderModel and SiglipVisionModel with their configurations.
_QWEN_7B = TextEncoderShape(7_070_619_136, 28, 3584, 18944, 28, 1108)
_BYT5 = TextEncoderShape(217_657_472, 12, 1472, 3584, 6, _QUOTED_TOKENS)
_SIGLIP = TextEncoderShape(428_225_600, 27, 1152, 4304, 16, PICTURE_TOKENS)


# ---- Shapes


@dataclass(frozen=True)
class Hunyuan15Shape(HunyuanShape):
    """A `HunyuanVideo15Transformer3DModel`, whose blocks are HunyuanVideo's double blocks.

    Attributes:
        out_channels: of the latents; what comes in has those of the picture and a mask besides.
        patch: latents per token.
        quoted_channels: of a token of quoted text.
        picture_channels: of a token of a picture.
        time_embedders: of the step, and in step-distilled models of the next.
    """

    out_channels: int = 32
    patch: int = 1
    quoted_channels: int = 1472
    picture_channels: int = 1152
    time_embedders: int = 1

    @property
    def blocks(self) -> Mapping[str, int]:
        return {"double_blocks": self.double_blocks}

    @property
    def token_channels(self) -> int:
        return self.patch * self.out_channels

    @property
    def predicted_channels(self) -> int:
        return self.token_channels

    @property
    def other_parameters(self) -> int:
        """In order: latents in and out, time, modulation before the last projection, kinds of text; then each kind."""
        width = self.width
        total = self.patch * self.in_channels * width + width + width * self.token_channels + self.token_channels
        total += self.time_embedders * self.embedder_parameters + 2 * width**2 + 2 * width + 3 * width
        prompt = self.embedder_parameters + (self.text_channels + width + 2) * width
        prompt += self.text_channels * width + width + self.refiner_blocks * (14 * width**2 + 15 * width)
        quoted = 2 * self.quoted_channels + (self.quoted_channels + 1) * 2048 + 2049 * 2048 + 2049 * width - width
        picture = 3 * self.picture_channels + self.picture_channels**2 + (self.picture_channels + 3) * width
        return total + prompt + quoted + width + picture

    def linear_flop(self, image: int, text: int) -> float:
        """With what is outside of the blocks: embedding, the refiner with its own attention, modulation, projection."""
        width, joint = self.width, image + self.joint_text(text)
        blocks = 24.0 * width**2 * self.double_blocks * (joint + 1)
        inside = 2.0 * image * self.patch * (self.in_channels + self.out_channels) * width
        refiner = 24.0 * width**2 * text + 4.0 * text**2 * width + 4 * width**2
        prompt = 2.0 * self.text_channels * width * (text + 1) + self.refiner_blocks * refiner
        embedders = (1 + self.time_embedders) * 2.0 * (256 + width) * width + 2.0 * width**2
        return blocks + inside + prompt + embedders + 4.0 * width**2

    def pipeline_bytes(self, plan: Plan, element: int) -> float:
        """Latents of the picture and its mask, and all three side by side; text as it was before it was put in order,
        what marks its kind, and samples of it before they are stacked."""
        latents = plan.image_tokens * self.patch * (self.out_channels + 1 + self.in_channels)
        return (latents + 3 * plan.text_len * self.width) * element


class Hunyuan15Autoencoder(AutoencoderShape):
    """`AutoencoderKLHunyuanVideo15`, which decodes all frames at once, in overlapping tiles."""

    # Pixels per side of its tiles; a quarter of each is its neighbours'.
    TILE: ClassVar[int] = 256

    def decode_flop(self, size: Pixels, tile: int | None = None) -> float:
        frames, high, wide = self._parts(size, tile)
        return sum(self._flop(frames, rows, columns) for rows in high for columns in wide)

    def _flop(self, frames: int, rows: int, columns: int) -> float:
        """Of latents of a size, decoded whole."""
        places, channels = frames * rows * columns, self.channels[-1]
        # In the middle two residual blocks, and between them an attention of one head.
        total = 27.0 * (self.latent_channels + 4 * channels) * channels * places
        total += 4.0 * channels**2 * places + 2.0 * places**2 * channels
        for level, blocks, _, channels in self._rising():
            total += 27.0 * 2 * blocks * channels**2 * frames * rows * columns
            if (up := self._up(level)) is not None:
                total += 27.0 * channels * up * frames * rows * columns
                frames, rows, columns = self._doubled(level, frames, rows, columns)
        return 2 * (total + 27.0 * self.channels[0] * 3 * frames * rows * columns)

    def encode_flop(self, size: Pixels, tile: int | None = None) -> float:
        """Of one picture; a level has a block less than in the decoder."""
        _, high, wide = self._parts(size, tile)
        pixels = float(sum(high) * sum(wide) * self.scale**2)
        total = 27.0 * 3 * self.channels[0] * pixels
        for level, (channels, layers) in enumerate(zip(self.channels, self.layers, strict=True)):
            total += 27.0 * 2 * (layers - 1) * channels**2 * pixels / 4**level
            if level + 1 < len(self.channels):
                factor = 4 if level < len(self.channels) - 3 else 8
                total += 27.0 * channels * self.channels[level + 1] / factor * pixels / 4**level
        places = pixels / self.scale**2
        return 2 * (total + 27.0 * (4 * channels + 2 * self.latent_channels) * channels * places)

    def decode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        frames, high, wide = self._parts(size, coding.tile)
        rows, columns, element = size.height // self.scale, size.width // self.scale, coding.element
        decoded = 3.0 * size.height * size.width * size.frames * element
        latents = 2.0 * frames * rows * columns * self.latent_channels * element
        of_tile = max(self._peak(frames, h, w, coding) for h in set(high) for w in set(wide))
        if len(high) * len(wide) == 1:
            return {"decoder": latents + of_tile}
        # Tiles are kept until all are done, then joined to rows, and these to frames.
        in_tiles = decoded * sum(high) * sum(wide) / (rows * columns)
        return {"decoder": latents + in_tiles + of_tile, "joining of tiles": latents + in_tiles + 2 * decoded}

    def encode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        """Of one picture: its finest level is the largest."""
        _, high, wide = self._parts(size, coding.tile)
        held = 1 if self.layers[0] > 2 else 0  # a level's input, until it ends
        of_tile = max(
            held * self.channels[0] * rows * columns * coding.element
            + self._residual_block(self.channels[0], 1, rows, columns, coding)
            for rows in {self.scale * side for side in high}
            for columns in {self.scale * side for side in wide}
        )
        return {"encoder": 3.0 * size.width * size.height * coding.element + of_tile}

    def sample(self, device: torch.device, dtype: torch.dtype) -> Sample:
        """A convolution of as many channels as the finest level has."""
        import torch
        from torch.nn import functional

        channels, side = self.channels[0], 32 if device.type == "cpu" else 128
        frames = torch.randn(1, channels, 8, side, side, device=device, dtype=dtype)
        kernel = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=dtype) / (27 * channels) ** 0.5
        flop = 2.0 * 27 * channels**2 * 8 * side**2
        return Sample(flop, lambda: functional.conv3d(frames, kernel, padding=1), 3)

    def _up(self, level: int) -> int | None:
        """Channels that the last convolution of a decoder's level makes, to be spread over eight or four places."""
        finer = len(self.channels) - 2 - level
        return None if finer < 0 else self.channels[finer] * (8 if level < 2 else 4)

    def _doubled(self, level: int, frames: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Time is doubled at the first two levels."""
        return (2 * frames - 1 if level < 2 else frames), 2 * rows, 2 * columns

    def _is_tiled(self, size: Pixels, tile: int | None) -> bool:
        return max(size.height, size.width) > (tile or self.TILE)

    def _parts(self, size: Pixels, tile: int | None) -> tuple[int, list[int], list[int]]:
        """Frames of latents, and latents of the overlapping tiles along height and width."""
        frames, high, wide = (size.frames - 1) // 4 + 1, size.height // self.scale, size.width // self.scale
        if not self._is_tiled(size, tile):
            return frames, [high], [wide]
        side = (tile or self.TILE) // self.scale

        def tiles(whole: int) -> list[int]:
            return [min(side, whole - start) for start in range(0, whole, side * 3 // 4)]

        return frames, tiles(high), tiles(wide)

    def _peak(self, frames: int, rows: int, columns: int, coding: Coding) -> float:
        """Bytes at the peak of the decoder, on latents of a size."""
        places = frames * rows * columns
        # Query, key, value, each once more in another layout, and a mask of all pairs.
        peak = (2 + 3) * self.channels[-1] * places * coding.element + places**2 * coding.element
        for level, blocks, _, channels in self._rising():
            plane = channels * frames * rows * columns * coding.element
            first = plane if blocks > 1 else 0.0  # a level's input is held until it ends
            peak = max(peak, first + self._residual_block(channels, frames, rows, columns, coding))
            if (up := self._up(level)) is not None:
                spread = up * frames * rows * columns * coding.element
                # What the convolution makes is spread over more places, then the same of what it was made from.
                convolution = convolved(channels, up, (frames, rows, columns), coding)
                peak = max(peak, first + plane + max(convolution, 3 * spread))
                frames, rows, columns = self._doubled(level, frames, rows, columns)
        return peak

    def _residual_block(self, channels: int, frames: int, rows: int, columns: int, coding: Coding) -> float:
        """Its input, and what normalises it, in fp32 where activations are of 16 bits; or that result and a
        convolution."""
        plane = channels * frames * rows * columns * coding.element
        normalised = 3 * plane if coding.element == 4 else (2 + 2 + 1) * plane
        return plane + max(normalised, plane + convolved(channels, channels, (frames, rows, columns), coding))


# Numbers of weights are those of the class, whose defaults it has.
_AUTOENCODER = Hunyuan15Autoencoder((128, 256, 512, 1024, 1024), (3, 3, 3, 3, 3), 32, 1_260_634_115)


# ---- The family


class Hunyuan15(Family):
    """See the module."""

    name = "hunyuan15"
    title = "HunyuanVideo-1.5"
    medium: ClassVar[Medium] = "video"
    axes = 3
    pipelines = ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
    transformer = "HunyuanVideo15Transformer3DModel"
    classes: ClassVar[Classes] = {
        "text_encoder": {"Qwen2_5_VLTextModel": "transformers"},
        "text_encoder_2": {"T5EncoderModel": "transformers"},
        "tokenizer": {"Qwen2Tokenizer": "transformers", "Qwen2TokenizerFast": "transformers", **ANY_TOKENIZER},
        "tokenizer_2": {"ByT5Tokenizer": "transformers"},
        "transformer": {"HunyuanVideo15Transformer3DModel": "diffusers"},
        "vae": {"AutoencoderKLHunyuanVideo15": "diffusers"},
        "scheduler": SCHEDULER,
        "guider": {"ClassifierFreeGuidance": "diffusers"},
        "image_encoder": {"SiglipVisionModel": "transformers"},
        "feature_extractor": dict.fromkeys(
            ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"), "transformers"
        ),
    }
    refused: ClassVar[Mapping[str, str]] = {}
    models = (_480P, _720P, _480P_I2V, _720P_I2V)
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"hunyuan15": ("full", "b", "lines", "far", "fast")}
    marks = ("hunyuan15", "hunyuanvideo15")
    base = _480P.source
    text_first = False
    text_encoders = (_QWEN_7B, _BYT5)
    autoencoder = _AUTOENCODER
    looks_at: ClassVar[frozenset[PictureKind]] = frozenset(["start"])
    large_encoder = "text_encoder"
    lets_go = True
    full_note = (
        "All text is valid, and there is no padding, which stock diffusers attends under a mask. That mask, a byte and "
        "more for every pair of tokens in every layer, it makes all the same, though its kernel runs without it here."
    )
    masks_text = True
    named_in_files = ("context_embedder_2.", "byt5_in.", "cond_type_embed")
    blocks_in_files: ClassVar[Mapping[str, tuple[str, ...]]] = {"num_layers": ("transformer_blocks", "double_blocks")}
    shapes_in_files: ClassVar[Mapping[str, tuple[tuple[str, ...], int]]] = {
        "width": (("x_embedder.proj.weight", "img_in.proj.weight"), 0),
    }

    # ---- Which model

    def kin(self, name: str) -> ModelChoice:
        """See `Family`, as for all below."""
        low = name.lower()
        models = (_480P_I2V, _720P_I2V) if "i2v" in low else (_480P, _720P)
        model = models["720" in low]
        if "step_distill" in low:
            return replace(model, default_guidance=1.0, default_steps=12, default_shift=7.0)
        return replace(model, default_guidance=1.0) if "distill" in low else model

    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        models = (_480P_I2V, _720P_I2V) if transformer.get("task_type", "i2v") == "i2v" else (_480P, _720P)
        template = models[transformer.get("target_size", 640) > 640]
        token_side = autoencoder.get("spatial_compression_ratio", 16) * transformer.get("patch_size", 1)
        return replace(
            template,
            default_shift=None,  # that of its own scheduler, which a distilled one may have another of
            token_side=token_side,
            size_multiple=token_side,
            video=replace(template.require_video(), frames_per_latent=autoencoder.get("temporal_compression_ratio", 4)),
        )

    # ---- Shapes

    def bundled_config(self, model: ModelChoice) -> str:
        return self.name

    def transformer_config(self, model: ModelChoice) -> dict[str, Any]:
        config = super().transformer_config(model)
        if model.folder is not None:
            return config
        task = "i2v" if "start" in model.takes else "t2v"
        return {**config, "target_size": model.native_side, "task_type": task}

    def transformer_shape(self, config: Mapping[str, Any]) -> Hunyuan15Shape:
        return Hunyuan15Shape(
            heads=int(config["num_attention_heads"]),
            head_dim=int(config["attention_head_dim"]),
            in_channels=int(config["in_channels"]),
            text_channels=int(config["text_embed_dim"]),
            double_blocks=int(config["num_layers"]),
            single_blocks=0,
            pooled_channels=0,
            guidance_embeds=False,
            refiner_blocks=int(config["num_refiner_layers"]),
            out_channels=int(config["out_channels"]),
            patch=int(config["patch_size_t"]) * int(config["patch_size"]) ** 2,
            quoted_channels=int(config["text_embed_2_dim"]),
            picture_channels=int(config["image_embed_dim"]),
            time_embedders=1 + bool(config.get("use_meanflow", False)),
            picture_tokens=PICTURE_TOKENS if config.get("task_type") == "i2v" else 0,
        )

    def text_encoders_of(self, model: ModelChoice) -> tuple[TextEncoderShape, ...]:
        return (*self.text_encoders, _SIGLIP) if "start" in model.needs else self.text_encoders

    def autoencoder_shape(self, config: Mapping[str, Any], parameters: int = 0) -> AutoencoderShape:
        return Hunyuan15Autoencoder.of(config, parameters)

    def step_grids(self, model: ModelChoice) -> tuple[Grid, ...]:
        video = model.require_video()
        return (model.grid(video.width, video.height, video.frames),)

    def step_inputs(
        self, config: Mapping[str, Any], grid: Grid, text_len: int, normal: Callable[..., torch.Tensor]
    ) -> dict[str, Any]:
        """As for a prompt that quotes nothing, without a picture, and without the padding that stands for both."""
        import torch

        _, _, *sides = _latents_shape(config, grid)
        latents = normal(1, config["in_channels"], *sides)
        return {
            "hidden_states": latents,
            "timestep": torch.full((1,), 700, device=latents.device).to(latents.dtype),
            "encoder_hidden_states": normal(1, text_len, config["text_embed_dim"]),
            "encoder_attention_mask": latents.new_ones(1, text_len),
            "encoder_hidden_states_2": latents.new_zeros(1, 0, config["text_embed_2_dim"]),
            "encoder_attention_mask_2": latents.new_zeros(1, 0),
            "image_embeds": latents.new_zeros(1, 0, config["image_embed_dim"]),
        }

    # ---- Loading

    def pipeline_class(self, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        if "start" in kinds:
            from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5_image2video import (
                HunyuanVideo15ImageToVideoPipeline,
            )

            return HunyuanVideo15ImageToVideoPipeline
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import HunyuanVideo15Pipeline

        return HunyuanVideo15Pipeline

    def transformer_class(self) -> Any:
        from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel

        return HunyuanVideo15Transformer3DModel

    def prepare(self, pipe: Any, tile: int | None = None) -> None:
        """Lets the autoencoder decode in overlapping tiles: only so do large videos fit."""
        if tile is None:
            pipe.vae.enable_tiling()
            return
        # A quarter of a tile is its neighbours': in pixels and in latents alike, or tiles would not meet.
        scale = pipe.vae.spatial_compression_ratio
        latents = max(4, tile // scale // 4 * 4)
        pipe.vae.enable_tiling(
            tile_sample_min_height=latents * scale,
            tile_sample_min_width=latents * scale,
            tile_latent_min_height=latents,
            tile_latent_min_width=latents,
        )

    # ---- Making

    def about_stock(self, model: ModelChoice) -> str:
        return (
            "Full attention is stock diffusers: it attends the padding of the text, to "
            f"{model.text_tokens + _QUOTED_TOKENS + PICTURE_TOKENS} tokens, under a mask of all pairs, which the "
            "others cut off; full-list is full attention without it."
        )

    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        pipe.tokenizer_max_length = tokens
        names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
        return dict(zip(names, pipe.encode_prompt(prompt, dtype=pipe.transformer.dtype), strict=True))

    def encode_text(
        self,
        pipe: Any,
        model: ModelChoice,
        prompt: str,
        negative: str | None,
        pictures: Pictures = Pictures(),  # noqa: B008
    ) -> dict[str, torch.Tensor]:
        """With the tokens of the picture, which prompt and negative prompt share."""
        import torch

        text = super().encode_text(pipe, model, prompt, negative, pictures)
        if pictures.start is not None:
            with torch.no_grad():
                text["image_embeds"] = pipe.encode_image(
                    pictures.start, 1, pipe._execution_device, pipe.transformer.dtype
                )
        return text

    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        import torch

        picture = text["image_embeds"].shape[1] if "image_embeds" in text else 0
        lengths = {name: int(mask.sum(1, dtype=torch.int32).max()) for name, mask in text.items() if "_mask" in name}
        calls = [prefix for prefix in ("", "negative_") if f"{prefix}prompt_embeds_mask" in lengths]
        return tuple(
            picture + lengths[f"{prefix}prompt_embeds_mask"] + lengths[f"{prefix}prompt_embeds_mask_2"]
            for prefix in calls
        )

    def denoise(self, pipe: Any, call: Call) -> torch.Tensor:
        arguments = dict(call.arguments)
        scale, picture = arguments.pop("true_cfg_scale", None), arguments.pop("image_embeds", None)
        begun = None if call.begun is None else call.begun.to(pipe._execution_device, pipe.transformer.dtype)
        size: dict[str, Any] = {"height": call.height, "width": call.width}
        with contextlib.ExitStack() as stack:
            stack.enter_context(beginning_at(pipe, call.first_step, begun))
            stack.enter_context(_guided(pipe, scale, call))
            stack.enter_context(_after_each_step(pipe, call.callback))
            if call.pictures.start is not None:
                size = {"image": call.pictures.start}
                stack.enter_context(_sized(pipe, call, picture))
            return pipe(
                **arguments,
                **size,
                num_frames=call.frames,
                num_inference_steps=call.steps,
                generator=call.generator,
                output_type="latent",
            ).frames

    def latents_shape(self, model: ModelChoice, grid: Grid, *, called: bool) -> tuple[int, ...]:
        return _latents_shape(self.transformer_config(model), grid)

    def decode(
        self, pipe: Any, latents: torch.Tensor, tile: int | None = None, ranks: ProcessGroup | None = None
    ) -> torch.Tensor:
        import torch

        if tile is not None:
            self.prepare(pipe, tile)
        with torch.no_grad(), tiles_over_ranks(pipe.vae, ranks):
            scaled = latents.to(pipe.vae.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor
            return pipe.vae.decode(scaled, return_dict=False)[0]

    # ---- Attention

    def grid(self, pipe: Any, height: int, width: int, num_frames: int | None = None) -> Grid:
        config = pipe.transformer.config
        sides = token_sides(height, width, pipe.vae_scale_factor_spatial * config.patch_size)
        latents = latent_frames(pipe, num_frames, pipe.vae_scale_factor_temporal)
        return Grid(((latents - 1) // config.patch_size_t + 1, *sides))

    def adapter_class(self) -> type[Hunyuan15Adapter]:
        return Hunyuan15Adapter


def _latents_shape(config: Mapping[str, Any], grid: Grid) -> tuple[int, ...]:
    patch = config["patch_size_t"], config["patch_size"], config["patch_size"]
    return (1, config["out_channels"], *(tokens * size for tokens, size in zip(grid.shape, patch, strict=True)))


# ---- What the pipeline takes no arguments for


@contextmanager
def _guided(pipe: Any, scale: float | None, call: Call) -> Iterator[None]:
    """While inside, the pipeline's guider steers so strongly, or without a scale not at all."""
    stock = pipe.guider
    guider = copy.copy(stock)
    if scale is None:
        guider.disable()
    else:
        guider.enable()
        guider.guidance_scale = scale
    set_state = guider.set_state

    def of_the_whole_run(step: int, num_inference_steps: int, timestep: Any) -> None:
        set_state(step=step + call.first_step, num_inference_steps=call.steps, timestep=timestep)

    guider.set_state = of_the_whole_run
    pipe.guider = guider
    try:
        yield
    finally:
        pipe.guider = stock


@contextmanager
def _after_each_step(pipe: Any, callback: Callable[..., dict[str, Any]] | None) -> Iterator[None]:
    """While inside, a callback is called after every step, as pipelines with a `callback_on_step_end` do."""
    if callback is None:
        yield
        return
    scheduler = pipe.scheduler
    stock, done = scheduler.step, 0

    def step(noise: torch.Tensor, timestep: Any, latents: torch.Tensor, **options: Any) -> tuple[Any, ...]:
        nonlocal done
        latents, *others = stock(noise, timestep, latents, **options)
        latents = callback(pipe, done, timestep, {"latents": latents}).get("latents", latents)
        done += 1
        return latents, *others

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _sized(pipe: Any, call: Call, picture: torch.Tensor | None) -> Iterator[None]:
    """While inside, image-to-video makes the call's size, where it would choose one by the picture's shape.

    Args:
        pipe: an image-to-video pipeline.
        call: with a picture of its size.
        picture: its tokens `[1, tokens, C]`, where they are made already.
    """
    pipe.video_processor.calculate_default_height_width = lambda **options: (call.height, call.width)
    if picture is not None:
        pipe.encode_image = lambda **options: picture
    try:
        yield
    finally:
        del pipe.video_processor.calculate_default_height_width
        if picture is not None:
            del pipe.encode_image


# ---- Attention


class Hunyuan15Adapter(HunyuanAdapter):
    """As HunyuanVideo's; all three kinds of text are cut to the longest of the batch, and what is none is left out."""

    def __init__(self, transformer: torch.nn.Module, grid: Grid, **options: Any) -> None:
        """See `ProcessorAdapter`."""
        from grat_cli.attention.padded_text import PaddedTexts

        super().__init__(transformer, grid, **options)
        self._quoted = PaddedTexts(may_be_empty=True)
        self._picture: tuple[torch.Tensor, int] | None = None

    def blocks_of(self, model: Any) -> list[Any]:
        return list(model.transformer_blocks)

    def stock_processors(self) -> tuple[type, ...]:
        from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

        return (HunyuanVideo15AttnProcessor2_0,)

    def chunked_blocks(self) -> Mapping[type, Forward]:
        from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TransformerBlock

        return {HunyuanVideo15TransformerBlock: self.forward_in_chunks()}

    def remedy(self, grid: tuple[int, ...]) -> str:
        # Image-to-video chooses its size by the picture, and takes none.
        latents, rows, columns = grid
        return (
            "give the pipeline call the frames, height and width of the install, or install for those of the call: "
            f"height={rows * _STRIDE}, width={columns * _STRIDE}, num_frames={4 * latents - 3}"
        )

    def read(self, call: dict[str, Any]) -> Text:
        from grat_cli.attention.layer import Text

        self.require_grid(call["hidden_states"])
        picture = self._picture_tokens(call["image_embeds"])
        call["image_embeds"] = call["image_embeds"][:, :picture]
        longest, valid = picture, None
        for kind, texts in (("", self._texts), ("_2", self._quoted)):
            text = texts.of(call[f"encoder_attention_mask{kind}"])
            for name in (f"encoder_hidden_states{kind}", f"encoder_attention_mask{kind}"):
                call[name] = call[name][:, : text.longest]
            if text.valid is not None:
                valid = text.valid + longest if valid is None else valid + text.valid
            elif valid is not None:
                valid = valid + text.longest
            longest += text.longest
        return Text(longest, valid)

    def _picture_tokens(self, embeddings: torch.Tensor) -> int:
        """How many tokens of a picture a call has: none where all are zeros, as the transformer itself sees it.

        A pipeline makes one tensor of them for all of its steps, which is looked at once: that waits for the device.
        """
        if self._picture is None or self._picture[0] is not embeddings:
            self._picture = embeddings, embeddings.shape[1] if bool(embeddings.any()) else 0
        return self._picture[1]
