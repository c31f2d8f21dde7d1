"""HunyuanVideo: videos, with a joint sequence of [video, text] on three axes.

Read against diffusers 0.42.1, `pipelines/hunyuan_video`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from grat_cli.attention.adapter import ProcessorAdapter
from grat_cli.demo import DEMO_HUNYUAN
from grat_cli.errors import BadInput
from grat_cli.families.autoencoders import HunyuanVideoAutoencoder
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
    Pictures,
    VideoTraits,
    beginning_at,
    latent_frames,
    token_sides,
)
from grat_cli.families.shapes import CLIP_L, JointShape, TextEncoderShape, TransformerCall
from grat_cli.families.shared_decoding import tiles_over_ranks
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from grat_cli.attention.chunking import Forward
    from grat_cli.attention.layer import LayerAttention, Text
    from grat_kernels import Plan

_LONGEST_TEXT = 4096  # more than any, with the tokens of a picture
_TEXT_CHANNELS = 4096  # of the Llama that HunyuanVideo was trained with
# As in Tencent's own sample script: 50 steps, embedded guidance 6, shift 7, prompts of up to 256 tokens.
_HUNYUAN = ModelChoice(
    "hunyuan",
    "hunyuanvideo-community/HunyuanVideo",
    "hub",
    "hunyuan",
    "hunyuan",
    native_side=960,
    text_tokens=256,
    default_steps=50,
    default_guidance=6.0,
    default_shift=7.0,
    video=VideoTraits(width=1280, height=720, frames=129, fps=24),
)
# As in the sample script of Tencent's HunyuanVideo-I2V for videos that keep close to their picture.
_FROM_PICTURE = frozenset[PictureKind]({"start"})
_I2V = replace(
    _HUNYUAN,
    name="hunyuan-i2v",
    source="hunyuanvideo-community/HunyuanVideo-I2V",
    takes=_FROM_PICTURE,
    needs=_FROM_PICTURE,
)
_DEMO = ModelChoice(
    name="demo",
    source=str(DEMO_HUNYUAN.path),
    kind="folder",
    family="hunyuan",
    presets="hunyuan",
    native_side=192,
    text_tokens=DEMO_HUNYUAN.text_tokens,
    default_steps=DEMO_HUNYUAN.steps,
    default_guidance=DEMO_HUNYUAN.guidance,
    true_guidance=True,
    video=VideoTraits(DEMO_HUNYUAN.width, DEMO_HUNYUAN.height, DEMO_HUNYUAN.frames, DEMO_HUNYUAN.fps),
    is_demo=True,
)
# hunyuanvideo-community/HunyuanVideo, files {text_encoder,vae}/config.json; numbers of weights are those of the classes
# with these configurations.
_LLAMA_8B = TextEncoderShape(7_505_186_816, 32, 4096, 14336, 32, 351)
# Of HunyuanVideo-I2V, with a vision encoder and the language model's head: LlavaForConditionalGeneration of
# xtuner/llava-llama-3-8b-v1_1-transformers. A picture is 576 of its tokens, of which the pipeline keeps every fourth.
_LLAVA_8B = TextEncoderShape(8_355_272_704, 32, 4096, 14336, 32, 103 + 576 + 256)
_PICTURE_TOKENS, _EVERY = 144, 4
_AUTOENCODER = HunyuanVideoAutoencoder((128, 256, 512, 512), (3, 3, 3, 3), 16, 246_478_803)


@dataclass(frozen=True)
class HunyuanShape(JointShape):
    """A `HunyuanVideoTransformer3DModel`.

    Attributes:
        refiner_blocks: blocks that see text alone.
        picture_tokens: of a picture that videos start from, before the text.
        out_channels: of the latents; what comes in may have those of a picture and a mask besides.
    """

    refiner_blocks: int = 0
    picture_tokens: int = 0
    out_channels: int = 16

    rotates_text = False
    joins_in_single = True

    def joint_text(self, text_tokens: int) -> int:
        return text_tokens + self.picture_tokens

    @property
    def token_channels(self) -> int:
        return 4 * self.in_channels

    @property
    def predicted_channels(self) -> int:
        return 4 * self.out_channels

    @property
    def other_parameters(self) -> int:
        """With those of the refiner."""
        width = self.width
        refiner = self.embedder_parameters + self.text_channels * width + width + width**2 + width
        return super().other_parameters + refiner + self.refiner_blocks * (14 * width**2 + 15 * width)

    def linear_flop(self, image: int, text: int) -> float:
        return super().linear_flop(image, self.joint_text(text))

    def pipeline_bytes(self, plan: Plan, element: int) -> float:
        """The pipeline's own latents, which are fp32 where the transformer is not."""
        return plan.image_tokens * self.token_channels * element

    def feed_forward_bytes(self, call: TransformerCall) -> float:
        # Hidden states, what attention put out, the sum, its norm; then twice the inner layer.
        return 4 * call.joint + 8 * call.image

    def projection_bytes(self, call: TransformerCall) -> float:
        # What attention put out, joined from video and text, it and the inner layer side by side, the projection of
        # these, gated and not.
        return (1 + 1 + 5 + 1 + 1) * call.joint


class Hunyuan(Family):
    """See the module."""

    name = "hunyuan"
    title = "HunyuanVideo"
    medium: ClassVar[Medium] = "video"
    axes = 3
    pipelines = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")
    transformer = "HunyuanVideoTransformer3DModel"
    classes: ClassVar[Classes] = {
        "text_encoder": {"LlamaModel": "transformers", "LlavaForConditionalGeneration": "transformers"},
        "text_encoder_2": {"CLIPTextModel": "transformers"},
        "tokenizer": {"LlamaTokenizer": "transformers", "LlamaTokenizerFast": "transformers", **ANY_TOKENIZER},
        "tokenizer_2": CLIP_TOKENIZER,
        "transformer": {"HunyuanVideoTransformer3DModel": "diffusers"},
        "vae": {"AutoencoderKLHunyuanVideo": "diffusers"},
        "scheduler": SCHEDULER,
        "image_processor": dict.fromkeys(
            ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"), "transformers"
        ),
    }
    refused: ClassVar[Mapping[str, str]] = {
        "HunyuanSkyreelsImageToVideoPipeline": "it starts from a picture, which it adds to the channels of the latents",
        "HunyuanVideoFramepackPipeline": "it adds tokens of earlier frames to those of the video",
    }
    models = (_HUNYUAN, _I2V, _DEMO)
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hunyuan": ("full", "b", "planes", "lines", "bx", "far", "fast", "sta")
    }
    base = _HUNYUAN.source
    text_first = False
    text_encoders = (_LLAMA_8B, CLIP_L)
    autoencoder = _AUTOENCODER
    looks_at: ClassVar[frozenset[PictureKind]] = frozenset(["start"])
    large_encoder = "text_encoder"
    half_beside = "float16"  # as in its own example, in diffusers and on its model card
    lets_go = True
    full_note = (
        "All text is valid, and full attention runs without the padding mask of stock diffusers, "
        "which would keep torch from its fastest kernels."
    )
    masks_text = True
    named_in_files = ("token_refiner",)
    not_named_in_files = ("context_embedder_2.", "byt5_in.", "cond_type_embed")
    blocks_in_files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "num_layers": ("transformer_blocks", "double_blocks"),
        "num_single_layers": ("single_transformer_blocks", "single_blocks"),
    }
    shapes_in_files: ClassVar[Mapping[str, tuple[tuple[str, ...], int]]] = {
        "width": (("x_embedder.proj.weight", "img_in.proj.weight"), 0),
        "text_embed_dim": (("context_embedder.proj_in.weight", "txt_in.input_embedder.weight"), 1),
        "pooled_projection_dim": (("vector_in.in_layer.weight",), 1),
        "attention_head_dim": ((".attn.norm_q.weight", ".img_attn_q_norm.weight"), 0),
    }

    # ---- Which model

    def kin(self, name: str) -> ModelChoice:
        """See `Family`, as for all below."""
        return _I2V if "i2v" in name.lower() else _HUNYUAN

    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        # A small text encoder makes it kin of the demo. Defaults are those of diffusers' classes.
        like_hunyuan = transformer.get("text_embed_dim", _TEXT_CHANNELS) == _TEXT_CHANNELS
        # Its own scheduler's shift: a fine-tune may have another than HunyuanVideo.
        template = replace(_HUNYUAN, default_shift=None) if like_hunyuan else _DEMO
        if (condition := transformer.get("image_condition_type")) is not None:
            if condition == "latent_concat":
                raise BadInput(_NO_CONCATENATION)
            template = replace(template, takes=_FROM_PICTURE, needs=_FROM_PICTURE, is_demo=False)
        token_side = autoencoder.get("spatial_compression_ratio", 8) * transformer.get("patch_size", 2)
        frames_per_latent = autoencoder.get("temporal_compression_ratio", 4)
        return replace(
            template,
            token_side=token_side,
            size_multiple=max(template.size_multiple, token_side),
            true_guidance=not transformer.get("guidance_embeds", True),
            video=replace(template.require_video(), frames_per_latent=frames_per_latent),
        )

    def vocabulary(self) -> Mapping[str, list[str]]:
        from grat_cli.demo import video_vocabulary

        return video_vocabulary()

    # ---- Shapes

    def transformer_config(self, model: ModelChoice) -> dict[str, Any]:
        config = super().transformer_config(model)
        return {**config, "image_condition_type": "token_replace"} if "start" in model.takes else config

    def transformer_shape(self, config: Mapping[str, Any]) -> HunyuanShape:
        return HunyuanShape.of(
            config,
            "text_embed_dim",
            refiner_blocks=int(config["num_refiner_layers"]),
            out_channels=int(config["out_channels"]),
            picture_tokens=_PICTURE_TOKENS if config.get("image_condition_type") == "token_replace" else 0,
        )

    def text_encoders_of(self, model: ModelChoice) -> tuple[TextEncoderShape, ...]:
        return (_LLAVA_8B, CLIP_L) if "start" in model.needs else self.text_encoders

    def step_grids(self, model: ModelChoice) -> tuple[Grid, ...]:
        video = model.require_video()
        return (model.grid(video.width, video.height, video.frames),)

    def step_inputs(
        self, config: Mapping[str, Any], grid: Grid, text_len: int, normal: Callable[..., torch.Tensor]
    ) -> dict[str, Any]:
        import torch

        pooled = normal(1, config["pooled_projection_dim"])
        inputs = {
            "hidden_states": normal(*_latents_shape(config, grid)),
            "encoder_hidden_states": normal(1, text_len, config["text_embed_dim"]),
            "encoder_attention_mask": torch.ones(1, text_len, device=pooled.device, dtype=torch.bool),
            "pooled_projections": pooled,
            "timestep": torch.full((1,), 700, device=pooled.device),
        }
        # The pipeline multiplies the scale by 1000.
        return inputs | ({"guidance": torch.full_like(pooled[:, 0], 6000.0)} if config["guidance_embeds"] else {})

    # ---- Loading

    def pipeline_class(self, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        if "start" in kinds:
            from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as from_picture

            return from_picture.HunyuanVideoImageToVideoPipeline
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

        return HunyuanVideoPipeline

    def transformer_class(self) -> Any:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel

    def dtypes(self, parts: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """On a CUDA device see `half_beside`.

        On a CPU that multiplies bf16 the autoencoder does: 3-D convolutions are four to seven times as fast, and
        pixels are rounded to 8 bits anyway.
        """
        import torch

        dtypes = dict.fromkeys(parts, dtype)
        if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            dtypes |= {part: torch.float16 for part in parts if part != "transformer"}
        if device.type == "cpu" and dtype == torch.float32:
            abilities = getattr(torch.cpu, "get_capabilities", dict)()
            if abilities.get("avx512_bf16") or abilities.get("amx_bf16"):
                dtypes["vae"] = torch.bfloat16
        return dtypes

    def prepare(self, pipe: Any, tile: int | None = None) -> None:
        """Lets the autoencoder decode in overlapping tiles, a few frames at a time: only so do large videos fit."""
        if tile is None:
            pipe.vae.enable_tiling()
            return
        # A quarter of each tile overlaps with the next, as with the autoencoder's own.
        unit = pipe.vae.spatial_compression_ratio
        stride = max(unit, tile * 3 // 4 // unit * unit)
        pipe.vae.enable_tiling(
            tile_sample_min_height=tile,
            tile_sample_min_width=tile,
            tile_sample_stride_height=stride,
            tile_sample_stride_width=stride,
        )

    # ---- Making

    def about_stock(self, model: ModelChoice) -> str:
        return (
            f"Full attention is stock diffusers: it attends the padding of the text, to {model.text_tokens} tokens, "
            "under a mask, which the others cut off; full-list is full attention without it."
        )

    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        return _named(pipe.encode_prompt(prompt=prompt, max_sequence_length=tokens))

    def encode_text(
        self,
        pipe: Any,
        model: ModelChoice,
        prompt: str,
        negative: str | None,
        pictures: Pictures = Pictures(),  # noqa: B008
    ) -> dict[str, torch.Tensor]:
        """With tokens of the picture, as the pipeline itself has them; beside a negative prompt it looks at black."""
        import torch
        from PIL import Image

        if pictures.start is None:
            return super().encode_text(pipe, model, prompt, negative, pictures)
        tokens = model.text_tokens
        with torch.no_grad():
            text = _named(
                pipe.encode_prompt(
                    pictures.start, prompt, None, max_sequence_length=tokens, image_embed_interleave=_EVERY
                )
            )
            if negative is not None:
                black = Image.new("RGB", pictures.start.size)
                more = _named(pipe.encode_prompt(black, negative, None, max_sequence_length=tokens))
                text |= {f"negative_{name}": tensor for name, tensor in more.items()}
        return text

    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        masks = [mask for name, mask in text.items() if name.endswith("attention_mask")]
        return tuple(int(mask.sum(1).max()) for mask in masks)

    def denoise(self, pipe: Any, call: Call) -> torch.Tensor:
        # As an argument of the pipeline, latents would be turned to fp32, and the first timestep with them; after the
        # first step of a run both are in the transformer's dtype.
        if call.pictures.start is not None:
            return self._denoise_from_picture(pipe, call)
        begun = None if call.begun is None else call.begun.to(pipe._execution_device, pipe.transformer.dtype)
        with beginning_at(pipe, call.first_step, begun, call.history):
            return pipe(
                **call.arguments,
                height=call.height,
                width=call.width,
                num_frames=call.frames,
                num_inference_steps=call.steps,
                generator=call.generator,
                output_type="latent",
                callback_on_step_end=call.callback,
            ).frames

    def _denoise_from_picture(self, pipe: Any, call: Call) -> torch.Tensor:
        if pipe.transformer.config.image_condition_type != "token_replace":
            raise BadInput(_NO_CONCATENATION)
        with beginning_at(pipe, call.first_step), _with_latents(pipe, call.begun):
            return pipe(
                image=call.pictures.start,
                **call.arguments,
                height=call.height,
                width=call.width,
                num_frames=call.frames,
                num_inference_steps=call.steps,
                generator=call.generator,
                output_type="latent",
                callback_on_step_end=call.callback,
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

    def adapter_class(self) -> type[HunyuanAdapter]:
        return HunyuanAdapter


def _latents_shape(config: Mapping[str, Any], grid: Grid) -> tuple[int, ...]:
    patch = config["patch_size_t"], config["patch_size"], config["patch_size"]
    return (1, config["in_channels"], *(tokens * size for tokens, size in zip(grid.shape, patch, strict=True)))


# What of runs from a picture is refused: the pipeline's latents have a frame more than the video that it returns.
_NO_CONCATENATION = (
    "image-to-video by latent concatenation ends in four frames less than were asked for, which only "
    "`grat_cli.install` around its own pipeline can: use hunyuan-i2v, whose first frame is the picture"
)


def _named(encoded: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return dict(zip(("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"), encoded, strict=True))


@contextmanager
def _with_latents(pipe: Any, begun: torch.Tensor | None) -> Iterator[None]:
    """While inside, an image-to-video pipeline goes on from latents, beside those that it makes of the picture."""
    if begun is None:
        yield
        return
    stock = pipe.prepare_latents

    def prepare_latents(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _, of_picture = stock(*arguments, **options)
        return begun.to(of_picture.device), of_picture

    pipe.prepare_latents = prepare_latents
    try:
        yield
    finally:
        del pipe.prepare_latents


# ---- Attention


class HunyuanAdapter(ProcessorAdapter):
    """Tokens are put in order where they leave the patch embedding, and back where they leave the output projection.

    The refiner, which sees text alone, stays as it is.
    """

    text_first = Hunyuan.text_first
    contiguous = False

    def __init__(self, transformer: torch.nn.Module, grid: Grid, **options: Any) -> None:
        """See `ProcessorAdapter`."""
        from grat_cli.attention.padded_text import PaddedTexts

        super().__init__(transformer, grid, **options)
        self._texts = PaddedTexts()
        self._of_first_frame: torch.Tensor | None = None

    def blocks_of(self, model: Any) -> list[Any]:
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def stock_processors(self) -> tuple[type, ...]:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        return (HunyuanVideoAttnProcessor2_0,)

    def chunked_blocks(self) -> Mapping[type, Forward]:
        from diffusers.models.transformers import transformer_hunyuan_video as stock

        forward, replacing = self.forward_in_chunks(), _with_first_frame(lambda: self._of_first_frame)
        return {
            stock.HunyuanVideoTransformerBlock: forward,
            stock.HunyuanVideoSingleTransformerBlock: forward,
            stock.HunyuanVideoTokenReplaceTransformerBlock: replacing,
            stock.HunyuanVideoTokenReplaceSingleTransformerBlock: replacing,
        }

    def forward_in_chunks(self) -> Forward:
        """Forwards of double blocks, and of single ones, that take tokens in chunks."""
        from grat_cli.attention.chunking import joint_block

        def handed_on(given: Mapping[str, Any]) -> dict[str, Any]:
            positions = given.get("freqs_cis", given.get("image_rotary_emb"))
            return {"attention_mask": given.get("attention_mask"), "image_rotary_emb": positions}

        return joint_block(handed_on, text_first=False, joined=False, clipped=False)

    def obstacle(self) -> str | None:
        if self.is_compiled and self._replaces:
            return (
                "GRAT inside compiled blocks that replace tokens of the first frame is not supported: "
                "leave compiling out"
            )
        return None

    @contextmanager
    def attending(self, layers: Sequence[LayerAttention]) -> Iterator[None]:
        """See `Adapter.attending`.

        Blocks of image-to-video by token replacement modulate the first frame's tokens by another timestep, and take
        them for the first of all: in group order they are elsewhere. Such blocks are told by a mask, in chunks or not.
        """
        from grat_cli.attention.chunking import in_chunks

        with super().attending(layers), ExitStack() as stack:
            if self._replaces and self.chunking[0] is None:
                stack.enter_context(in_chunks(self.blocks, self.chunked_blocks(), self.grid.tokens + _LONGEST_TEXT))
            yield

    def enter(self, call: dict[str, Any], step: int) -> dict[str, Any]:
        """See `Adapter`."""
        if self._replaces:
            _, rows, columns = self.grid.shape
            self._of_first_frame = (self.order < rows * columns)[None, :, None]
        return call

    @property
    def _replaces(self) -> bool:
        return getattr(self.model.config, "image_condition_type", None) == "token_replace"

    def hooks(self) -> Sequence[tuple[torch.nn.Module, Callable[..., Any]]]:
        model = self.model
        return (model.rope, self.grouped(0)), (model.x_embedder, self.grouped(1)), (model.proj_out, self.restored(1))

    def read(self, call: dict[str, Any]) -> Text:
        self.require_grid(call["hidden_states"])
        text = self._texts.of(call["encoder_attention_mask"])
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            call[name] = call[name][:, : text.longest]
        return text

    def require_grid(self, latents: torch.Tensor) -> None:
        """Raises BadInput unless latents `[B, C, T, h, w]` are of the installation's size."""
        config = self.model.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        shape = tuple(size // side for size, side in zip(latents.shape[2:], patch, strict=True))
        if shape != self.grid.shape:
            installed, given = ("x".join(map(str, sizes)) for sizes in (self.grid.shape, shape))
            raise BadInput(
                f"GRAT was installed for {installed} video tokens (frames x rows x columns), the call has {given}: "
                f"{self.remedy(shape)}"
            )

    def remedy(self, grid: tuple[int, ...]) -> str:
        """What to do about a call with so many video tokens per axis, which are others than those of the install."""
        return "give the pipeline call the frames, height and width of the install"


def _with_first_frame(of_first_frame: Callable[[], torch.Tensor | None]) -> Forward:
    """What makes forwards of blocks that modulate tokens of the first frame by an embedding of their own.

    Args:
        of_first_frame: which video tokens they are, `[1, N, 1]`; None for the first, as stock blocks have it.
    """
    import inspect

    import torch

    from grat_cli.attention.chunking import by_chunks

    def make(block: Any, chunk: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        signature = inspect.signature(type(block).forward)
        is_double = hasattr(block, "norm1")

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            given = signature.bind(block, *args, **kwargs).arguments
            video, text, count = given["hidden_states"], given["encoder_hidden_states"], given["num_tokens"]
            first = of_first_frame()
            if first is None:
                first = (torch.arange(video.shape[1], device=video.device) < count)[None, :, None]
            embeddings = given["temb"], given["token_replace_emb"]
            attention = {
                "attention_mask": given.get("attention_mask"),
                "image_rotary_emb": given.get("freqs_cis", given.get("image_rotary_emb")),
            }
            if is_double:
                return double(video, text, first, embeddings, attention)
            return single(video, text, first, embeddings, attention)

        def attend(video: torch.Tensor, text: torch.Tensor, attention: dict[str, Any]) -> Any:
            return block.attn(hidden_states=video, encoder_hidden_states=text, **attention)

        def double(
            video: torch.Tensor, text: torch.Tensor, first: torch.Tensor, embeddings: Any, attention: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            usual, replaced = (_vectors(block.norm1, embedding, 6) for embedding in embeddings)
            of_text = _vectors(block.norm1_context, embeddings[0], 6)

            def of_video(part: int, where: torch.Tensor) -> torch.Tensor:
                return torch.where(where, replaced[part], usual[part])

            normed = by_chunks(
                lambda tokens, where: block.norm1.norm(tokens) * (1 + of_video(1, where)) + of_video(0, where),
                chunk,
                video,
                first,
            )
            normed_text = block.norm1_context.norm(text) * (1 + of_text[1]) + of_text[0]
            attended, attended_text = attend(normed, normed_text, attention)
            del normed

            def rest(tokens: torch.Tensor, attended: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
                tokens = tokens + attended * of_video(2, where)
                modulated = block.norm2(tokens) * (1 + of_video(4, where)) + of_video(3, where)
                return tokens + block.ff(modulated) * of_video(5, where)

            text = text + attended_text * of_text[2]
            modulated = block.norm2_context(text) * (1 + of_text[4]) + of_text[3]
            return by_chunks(rest, chunk, video, attended, first), text + of_text[5] * block.ff_context(modulated)

        def single(
            video: torch.Tensor, text: torch.Tensor, first: torch.Tensor, embeddings: Any, attention: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            usual, replaced = (_vectors(block.norm, embedding, 3) for embedding in embeddings)
            count, tokens = video.shape[1], torch.cat([video, text], dim=1)
            first = torch.nn.functional.pad(first, (0, 0, 0, text.shape[1]))

            def modulated(tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
                shift, scale = (torch.where(where, replaced[part], usual[part]) for part in (0, 1))
                return block.norm.norm(tokens) * (1 + scale) + shift

            normed = by_chunks(modulated, chunk, tokens, first)
            attended = torch.cat(attend(normed[:, :count], normed[:, count:], attention), dim=1)
            del normed

            def rest(tokens: torch.Tensor, attended: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
                wide = block.act_mlp(block.proj_mlp(modulated(tokens, where)))
                projected = block.proj_out(torch.cat([attended, wide], dim=2))
                return projected * torch.where(where, replaced[2], usual[2]) + tokens

            tokens = by_chunks(rest, chunk, tokens, attended, first)
            return tokens[:, :count], tokens[:, count:]

        return forward

    return make


def _vectors(norm: Any, embedding: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """Shifts, scales and gates `[B, 1, C]` of an adaptive norm."""
    return tuple(part[:, None] for part in norm.linear(norm.silu(embedding)).chunk(parts, dim=1))
