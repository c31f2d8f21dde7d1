"""Qwen-Image: pictures, from text or from pictures to refer to, with a joint sequence of [text, image, references].

Read against diffusers 0.42.1, `pipelines/qwenimage`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from grat_cli.attention.adapter import DispatchAdapter
from grat_cli.attention.layer import Text
from grat_cli.errors import BadInput
from grat_cli.families import picture_coding
from grat_cli.families.autoencoders import QwenImageAutoencoder
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
    beginning_at,
    token_sides,
)
from grat_cli.families.shapes import TextEncoderShape, TransformerCall, TransformerShape
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch.distributed import ProcessGroup

    from grat_cli.attention.chunking import Forward
    from grat_kernels import Plan

# Sizes, steps and guidance of all models: QwenLM/Qwen-Image, README.md, and its pipelines of diffusers, which cut
# prompts at 512 tokens.
_QWEN = ModelChoice(
    "qwen-image",
    "Qwen/Qwen-Image",
    "hub",
    "qwen",
    "qwen",
    native_side=1328,
    text_tokens=512,
    default_steps=50,
    default_guidance=4.0,
    true_guidance=True,
    takes=frozenset(["start", "mask"]),
)
_QWEN_2512 = replace(
    _QWEN,
    name="qwen-image-2512",
    source="Qwen/Qwen-Image-2512",
    negative_prompt="低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。构图混乱。文字模糊，扭曲。",
)
# The text encoder sees what is referred to as a token for each 28x28 pixels: of a megapixel, or of 384x384 pixels each.
_EDIT = replace(
    _QWEN,
    name="qwen-image-edit",
    source="Qwen/Qwen-Image-Edit",
    native_side=1024,
    text_tokens=512 + 1369,
    takes=frozenset(["reference"]),
    needs=frozenset(["reference"]),
)
_EDIT_2509 = replace(
    _EDIT,
    name="qwen-image-edit-2509",
    source="Qwen/Qwen-Image-Edit-2509",
    text_tokens=512 + 3 * 196,
    default_steps=40,
    most_references=3,
)
_EDIT_2511 = replace(_EDIT_2509, name="qwen-image-edit-2511", source="Qwen/Qwen-Image-Edit-2511")
_NOTHING = Pictures()
_LONGEST_TEXT = 1024  # that pipelines take
# In pixels: what references are brought to for the transformer, and for the text encoder by models of several.
_REFERENCE_AREA, _GLANCE_AREA = 1024 * 1024, 384 * 384

# Qwen/Qwen2.5-VL-7B-Instruct, config.json; numbers of weights are those of the classes with these configurations.
_QWEN_VL_7B = TextEncoderShape(8_292_166_656, 28, 3584, 18944, 28, 512 + 34)
_AUTOENCODER = QwenImageAutoencoder((96, 192, 384, 384), (3, 3, 3, 3), 16, 126_892_531)


@dataclass(frozen=True)
class QwenShape(TransformerShape):
    """A `QwenImageTransformer2DModel`.

    Attributes:
        depth: blocks.
        out_channels: of its prediction, numbers per token.
        modulates_apart: whether tokens of references are modulated otherwise than those of the image.
    """

    depth: int
    out_channels: int
    modulates_apart: bool

    rotates_text = False

    @property
    def blocks(self) -> Mapping[str, int]:
        """See `TransformerShape`, as for all below."""
        return {"blocks": self.depth}

    @property
    def token_channels(self) -> int:
        return self.in_channels

    @property
    def predicted_channels(self) -> int:
        return self.out_channels

    # ---- Weights

    @property
    def parameters(self) -> int:
        return self.depth * self.largest_block + self.other_parameters

    @property
    def largest_block(self) -> int:
        """For text and image each 12 matrices, modulation by 6 vectors, norms of heads."""
        return 2 * (18 * self.width**2 + 15 * self.width + 2 * self.head_dim)

    @property
    def other_parameters(self) -> int:
        width = self.width
        time = 256 * width + width + width**2 + width
        text = self.text_channels + self.text_channels * width + width
        image = self.in_channels * width + width + width * self.out_channels + self.out_channels
        return time + text + image + 2 * width**2 + 2 * width

    @property
    def largest_matrix(self) -> int:
        """Of modulation, which makes six vectors of one."""
        return 6 * self.width**2

    # ---- Operations

    def linear_flop(self, image: int, text: int) -> float:
        """A block has 12 weights per pair of channels for each token, and those of modulation for each sample."""
        width = self.width
        modulation = self.depth * (2 + self.modulates_apart) * 6 * width**2 + (1 + self.modulates_apart) * (
            256 * width + width**2
        )
        ends = image * (self.in_channels + self.out_channels) * width + text * self.text_channels * width
        return 2.0 * (12 * width**2 * self.depth * (image + text) + modulation + 2 * width**2 + ends)

    # ---- Memory

    def pipeline_bytes(self, plan: Plan, element: int) -> float:
        """The table of positions once more, in raster order: it is kept for the calls to come."""
        return plan.image_tokens * self.head_dim * 4

    def moments(self, call: TransformerCall) -> dict[str, float]:
        i, t, n = call.image, call.text, call.joint
        gates = i if self.modulates_apart else 0
        # Hidden states, their norms, and these modulated; in chunks the norms are gone.
        held = (2 if call.chunked else 3) * n + (0 if call.chunked else gates)
        # Query, key and value, apart and joined.
        joined = 3 * n + 3 * n
        moments = {
            "rotation of keys": held + 3 * n + max(1.0, (call.rotated - 1) / 3 * 2) * i,
            "attention": held + joined + 2 * call.summaries + call.attending,
            "projection of attention": held + joined + 2 * n,
        }
        if call.chunked:
            # Hidden states, what attention put out, the result; of a chunk the sum, its norm, this modulated, and
            # twice the inner layer.
            return moments | {"feed-forward": 3 * n + (1 + 1 + 1 + 8 + 2 * (gates > 0)) * call.chunk}
        # What attention put out, the sum, its norm, this modulated, and twice the inner layer.
        held += n + n
        return moments | {
            "feed-forward": held + gates + (2 + 8) * i,
            "feed-forward of text": held + gates + 3 * i + (2 + 8) * t,
        }


class Qwen(Family):
    """See the module."""

    name = "qwen"
    title = "Qwen-Image"
    medium: ClassVar[Medium] = "image"
    axes = 2
    pipelines = (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageEditInpaintPipeline",
    )
    transformer = "QwenImageTransformer2DModel"
    classes: ClassVar[Classes] = {
        "text_encoder": {"Qwen2_5_VLForConditionalGeneration": "transformers"},
        "tokenizer": {"Qwen2Tokenizer": "transformers", "Qwen2TokenizerFast": "transformers", **ANY_TOKENIZER},
        "transformer": {"QwenImageTransformer2DModel": "diffusers"},
        "vae": {"AutoencoderKLQwenImage": "diffusers"},
        "scheduler": SCHEDULER,
        "processor": {"Qwen2VLProcessor": "transformers"},
    }
    refused: ClassVar[Mapping[str, str]] = {
        "QwenImageControlNetPipeline": "a ControlNet's residuals are in raster order, the tokens are in group order",
        "QwenImageControlNetInpaintPipeline": "a ControlNet's residuals are in raster order, "
        "the tokens are in group order",
        "QwenImageLayeredPipeline": "it makes several pictures at once as layers, with positions on a third axis",
    }
    models = (_QWEN, _QWEN_2512, _EDIT, _EDIT_2509, _EDIT_2511)
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"qwen": ("full", "b", "x", "far", "fast")}
    larger: ClassVar[Mapping[str, str]] = {"qwen": "qwen-far"}
    base = _QWEN.source
    text_first = True
    text_encoders = (_QWEN_VL_7B,)
    autoencoder = _AUTOENCODER
    tile = QwenImageAutoencoder.tile
    looks_at: ClassVar[frozenset[PictureKind]] = frozenset(["reference"])
    large_encoder = "text_encoder"
    lets_go = True
    stages = True
    fits_positions = True
    named_in_files = ("txt_norm.weight",)
    blocks_in_files: ClassVar[Mapping[str, tuple[str, ...]]] = {"num_layers": ("transformer_blocks",)}
    shapes_in_files: ClassVar[Mapping[str, tuple[tuple[str, ...], int]]] = {
        "width": (("img_in.weight",), 0),
        "in_channels": (("img_in.weight",), 1),
        "joint_attention_dim": (("txt_in.weight",), 1),
        "attention_head_dim": ((".norm_q.weight",), 0),
    }

    # ---- Which model

    def kin(self, name: str) -> ModelChoice:
        """See `Family`, as for all below."""
        lower = name.lower()
        if "edit" in lower:
            if "2511" in lower:
                return _EDIT_2511
            return _EDIT_2509 if "2509" in lower or "plus" in lower else _EDIT
        return _QWEN_2512 if "2512" in lower else _QWEN

    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        token_side = 2 ** len(autoencoder.get("temperal_downsample") or (0, 0, 0)) * 2
        return replace(_QWEN, token_side=token_side, size_multiple=max(_QWEN.size_multiple, token_side))

    def of_index(
        self, choice: ModelChoice, class_name: str | None, parts: frozenset[str], options: Mapping[str, Any]
    ) -> ModelChoice:
        edits = {"QwenImageEditPipeline": _EDIT, "QwenImageEditInpaintPipeline": _EDIT}
        template = {**edits, "QwenImageEditPlusPipeline": _EDIT_2509}.get(class_name or "", _QWEN)
        return replace(
            template,
            source=choice.source,
            kind=choice.kind,
            token_side=choice.token_side,
            size_multiple=choice.size_multiple,
        )

    # ---- Shapes

    def bundled_config(self, model: ModelChoice) -> str:
        return _EDIT_2511.name if self.kin(model.name) is _EDIT_2511 else _QWEN.name

    def transformer_shape(self, config: Mapping[str, Any]) -> QwenShape:
        outputs = config.get("out_channels") or config["in_channels"]
        return QwenShape(
            heads=int(config["num_attention_heads"]),
            head_dim=int(config["attention_head_dim"]),
            in_channels=int(config["in_channels"]),
            text_channels=int(config["joint_attention_dim"]),
            depth=int(config["num_layers"]),
            out_channels=int(outputs) * int(config["patch_size"]) ** 2,
            modulates_apart=bool(config.get("zero_cond_t", False)),
        )

    def fresh_modules(self, config: Mapping[str, Any]) -> Mapping[str, torch.nn.Module]:
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

        return {"pos_embed": QwenEmbedRope(theta=10000, axes_dim=list(config["axes_dims_rope"]), scale_rope=True)}

    def step_grids(self, model: ModelChoice) -> tuple[Grid, ...]:
        """Of the side that it was trained at, and of twice that."""
        return tuple(model.grid(times * model.native_side, times * model.native_side) for times in (1, 2))

    def step_inputs(
        self, config: Mapping[str, Any], grid: Grid, text_len: int, normal: Callable[..., torch.Tensor]
    ) -> dict[str, Any]:
        import torch

        latents = normal(1, grid.tokens, config["in_channels"])
        return {
            "hidden_states": latents,
            "encoder_hidden_states": normal(1, text_len, config["joint_attention_dim"]),
            "timestep": torch.full_like(latents[:, 0, 0], 0.7),
            "img_shapes": [[(1, *grid.shape)]],
        }

    def reference_tokens(
        self,
        model: ModelChoice,
        size: tuple[int, int],
        kinds: frozenset[PictureKind],
        references: Sequence[tuple[int, int]],
    ) -> int:
        """Each is brought to about a megapixel, whatever the size of the output."""
        return sum(math.prod(_of_area(_REFERENCE_AREA, one)) // model.token_side**2 for one in references)

    # ---- Loading

    def pipeline_class(self, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import QwenImageEditPlusPipeline
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_img2img import QwenImageImg2ImgPipeline
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_inpaint import QwenImageInpaintPipeline

        if "reference" in kinds:
            return QwenImageEditPlusPipeline
        if "mask" in kinds:
            return QwenImageInpaintPipeline
        return QwenImageImg2ImgPipeline if kinds else QwenImagePipeline

    def pipeline_of(self, model: ModelChoice, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        if "reference" not in model.needs:
            return self.pipeline_class(kinds)
        of_one, of_several, _ = _edit_pipelines()
        return of_several if model.most_references > 1 else of_one

    def pipeline_for(self, pipe: Any, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        """Pipelines that edit stay what they are: which of them a model is for, its transformer does not tell."""
        return pipe if type(pipe) in _edit_pipelines() else super().pipeline_for(pipe, kinds)

    def transformer_class(self) -> Any:
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    def read_part(self, part: str, folder: Path, given: Mapping[str, Any]) -> Any:
        return TextAndPictures.of(folder, given["tokenizer"]) if part == "processor" else None

    # ---- Making

    def longest_text(self, pipe: Any, model: ModelChoice) -> int | None:
        if "Edit" in type(pipe).__name__:
            return None
        return pipe.prompt_template_encode_start_idx + model.text_tokens

    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        return _encoded(pipe, prompt, tokens)

    def encode_text(
        self, pipe: Any, model: ModelChoice, prompt: str, negative: str | None, pictures: Pictures = _NOTHING
    ) -> dict[str, torch.Tensor]:
        """An empty negative prompt is a blank, as on the models' cards."""
        import torch

        looked_at = _glances(pipe, pictures.references)
        with torch.no_grad():
            text = _encoded(pipe, prompt, model.text_tokens, **looked_at)
            if negative is not None:
                more = _encoded(pipe, negative or " ", model.text_tokens, **looked_at)
                text |= {f"negative_{name}": tensor for name, tensor in more.items()}
        return text

    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        return tuple(tensor.shape[1] for name, tensor in text.items() if name.endswith("prompt_embeds"))

    def denoise(self, pipe: Any, call: Call) -> torch.Tensor:
        if call.steps == 1 and pipe.scheduler.config.get("shift_terminal"):
            raise BadInput(f"the schedule of {self.title} stretches its steps to end at little noise: take 2 or more")
        arguments: dict[str, Any] = {"true_cfg_scale": 1.0, **call.arguments}
        pictures, first_step = call.pictures, call.first_step
        start = pictures.start if call.start is None else call.start
        if start is not None:
            strength = 1.0 if call.strength is None else call.strength
            arguments |= {"image": start, "strength": strength}
            if call.begun is not None:  # what `strength` leaves out is left out with the steps that are done
                first_step += int(max(call.steps - min(call.steps * strength, call.steps), 0))
                arguments["strength"] = 1.0
        if pictures.mask is not None:
            arguments["mask_image"] = pictures.mask
        if pictures.references:
            several = "Plus" in type(pipe).__name__
            arguments["image"] = list(pictures.references) if several else pictures.references[0]

        with contextlib.ExitStack() as stack:
            if call.begun is not None:
                stack.enter_context(beginning_at(pipe, first_step))
                if pictures.mask is None:
                    arguments["latents"] = call.begun
                else:
                    stack.enter_context(_inpainting_goes_on(pipe, call.begun, call.generator.initial_seed()))
            packed = pipe(
                **arguments,
                height=call.height,
                width=call.width,
                num_inference_steps=call.steps,
                generator=call.generator,
                output_type="latent",
                callback_on_step_end=call.callback,
                max_sequence_length=_LONGEST_TEXT,
            ).images
        return self.spatial(pipe, packed, call.width, call.height)

    def spatial(self, pipe: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).squeeze(2)

    def latents_shape(self, model: ModelChoice, grid: Grid, *, called: bool) -> tuple[int, ...]:
        channels = self.transformer_config(model)["in_channels"]
        return (1, grid.tokens, channels) if called else (1, channels // 4, *(2 * side for side in grid.shape))

    def as_called(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(latents, *latents.shape)

    def decode(
        self, pipe: Any, latents: torch.Tensor, tile: int | None = None, ranks: ProcessGroup | None = None
    ) -> torch.Tensor:
        def pixels_of(window: torch.Tensor) -> torch.Tensor:
            mean, deviation = _scaling(pipe.vae, window)
            return pipe.vae.decode((window * deviation + mean).unsqueeze(2), return_dict=False)[0].squeeze(2)

        return picture_coding.decode(pipe, latents, tile or self.tile, pixels_of, ranks).unsqueeze(2)

    def encode(self, pipe: Any, picture: Image.Image) -> torch.Tensor:
        def latents_of(window: torch.Tensor) -> torch.Tensor:
            latents = pipe.vae.encode(window.unsqueeze(2)).latent_dist.mode().squeeze(2)
            mean, deviation = _scaling(pipe.vae, latents)
            return (latents - mean) / deviation

        return picture_coding.encode(pipe, picture, self.tile, latents_of, pipe.vae.config.z_dim)

    # ---- Attention

    def grid(self, pipe: Any, height: int, width: int, num_frames: int | None = None) -> Grid:
        if num_frames is not None:
            raise BadInput(f"a {type(pipe).__name__} makes images: leave out num_frames")
        return Grid(token_sides(height, width, pipe.vae_scale_factor * 2))  # latents are packed two by two into tokens

    def adapter_class(self) -> type[QwenAdapter]:
        return QwenAdapter


# ---- Text and pictures


def _edit_pipelines() -> tuple[type, ...]:
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_inpaint import QwenImageEditInpaintPipeline
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import QwenImageEditPlusPipeline

    return QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageEditInpaintPipeline


def _of_area(area: int, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of about so many pixels in the shape of a size, in multiples of 32 as the pipelines take them.

    diffusers 0.42.1, `calculate_dimensions` of `pipeline_qwenimage_edit.py`.
    """
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    return round(width / 32) * 32, round(width / ratio / 32) * 32


def _encoded(pipe: Any, prompt: str, tokens: int, **looked_at: Any) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt `[1, text, C]` and their mask, as the pipeline takes them."""
    import torch

    embeddings, mask = pipe.encode_prompt(prompt=prompt, max_sequence_length=tokens, **looked_at)
    if mask is None:  # where all of it is valid
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    return {"prompt_embeds": embeddings, "prompt_embeds_mask": mask}


def _glances(pipe: Any, references: Sequence[Image.Image]) -> dict[str, Any]:
    """What the text encoder sees of pictures to refer to, as an argument of `encode_prompt`."""
    if not references:
        return {}
    several = "Plus" in type(pipe).__name__
    area = _GLANCE_AREA if several else _REFERENCE_AREA
    seen = []
    for picture in references:
        width, height = _of_area(area, picture.size)
        seen.append(pipe.image_processor.resize(picture, height, width))
    return {"image": seen if several else seen[0]}


def _scaling(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel of the autoencoder's own latents, `[1, C, 1, 1]`."""
    import torch

    mean, deviation = (
        torch.tensor(numbers).view(1, -1, 1, 1).to(like)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation


@contextlib.contextmanager
def _inpainting_goes_on(pipe: Any, latents: torch.Tensor, seed: int) -> Iterator[None]:
    """While inside, a pipeline that inpaints goes on with latents.

    Such a pipeline mixes its picture with the noise that it drew first, which is drawn anew: given latents, stock
    diffusers would lack both.
    """
    import torch

    stock = pipe.prepare_latents

    def prepare_latents(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        given = inspect.signature(stock).bind(*arguments, **options).arguments
        given |= {"generator": torch.Generator("cpu").manual_seed(seed), "latents": None}
        _, noise, picture = stock(**given)
        return latents.to(noise), noise, picture

    pipe.prepare_latents = prepare_latents
    try:
        yield
    finally:
        del pipe.prepare_latents


class TextAndPictures:
    """What makes a text encoder's inputs of text and pictures.

    Stands for `Qwen2VLProcessor`, which wants Torchvision for videos that nothing here has.
    """

    picture_token = "<|image_pad|>"

    def __init__(self, pictures: Any, tokenizer: Any) -> None:
        """Args:
        pictures: an image processor of Qwen2-VL.
        tokenizer: of the text.
        """
        self.image_processor, self.tokenizer = pictures, tokenizer

    @classmethod
    def of(cls, folder: Path, tokenizer: Any) -> TextAndPictures:
        """From the folder of a processor, and a tokenizer."""
        from transformers import Qwen2VLImageProcessor

        return cls(Qwen2VLImageProcessor.from_pretrained(folder, local_files_only=True), tokenizer)

    def __call__(
        self, text: Sequence[str], images: Any = None, padding: bool = True, return_tensors: str = "pt"
    ) -> Any:
        """Tokens, and pixels of the pictures in the order in which the texts name them.

        Args:
            text: with `<|image_pad|>` wherever a picture is.
            images: pictures, or one.
            padding: to the longest text.
            return_tensors: `pt`.
        """
        from transformers import BatchFeature

        if images is None:
            return BatchFeature(dict(self.tokenizer(list(text), padding=padding, return_tensors=return_tensors)))
        pictures = images if isinstance(images, (list, tuple)) else [images]
        # Texts of a batch share their pictures.
        pictures = [picture for _ in text for picture in pictures]
        seen = self.image_processor(images=pictures, return_tensors=return_tensors)
        merged = self.image_processor.merge_size**2
        counts = (seen["image_grid_thw"].prod(dim=1) // merged).tolist()
        if sum(one.count(self.picture_token) for one in text) != len(counts):
            raise BadInput(f"the prompt holds {self.picture_token}, which stands for pictures: leave it out")
        texts, left = [], iter(counts)
        for one in text:
            first, *rest = one.split(self.picture_token)
            texts.append(first + "".join(self.picture_token * next(left) + part for part in rest))
        tokens = self.tokenizer(texts, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**tokens, **seen})


# ---- Attention


class QwenAdapter(DispatchAdapter):
    """Image tokens are put in order outside the transformer, and their positions where these leave the rotary module.

    Tokens of references follow, and keep their places.
    """

    text_first = Qwen.text_first
    orders_calls = True

    def __init__(self, transformer: torch.nn.Module, grid: Grid, **options: Any) -> None:
        """See `DispatchAdapter`."""
        from grat_cli.attention.padded_text import PaddedTexts

        super().__init__(transformer, grid, **options)
        rows, columns = grid.shape
        moves = self.extrapolation is not None and self.extrapolation.moves((rows, columns))
        self._texts = PaddedTexts()
        self._fitted = FittedTables(self.model.pos_embed, self.extrapolation, grid) if moves else None

    def blocks_of(self, model: Any) -> list[Any]:
        return [*model.transformer_blocks]

    def stock_processors(self) -> tuple[type, ...]:
        from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

        return (QwenDoubleStreamAttnProcessor2_0,)

    def chunked_blocks(self) -> Mapping[type, Forward]:
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

        return {QwenImageTransformerBlock: _in_chunks}

    def obstacle(self) -> str | None:
        config = self.model.config
        if config.use_layer3d_rope or config.use_additional_t_cond:
            return (
                "a Qwen-Image that makes layers has positions on a third axis, which GRAT does not support: "
                f"use one of pictures, such as {_QWEN.source}"
            )
        if config.guidance_embeds:
            return "diffusers itself cannot run a Qwen-Image with embedded guidance: use one with guidance_embeds false"
        return None

    def hooks(self) -> Sequence[tuple[torch.nn.Module, Callable[..., Any]]]:
        def grouped(
            module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            image, text = output  # the module keeps tables, so they are never changed in place
            if self._fitted is None:
                return self.in_groups(image, 0), text
            return self._fitted.image_and_text(image, text)

        return ((self.model.pos_embed, grouped),)

    def read(self, call: dict[str, Any]) -> Text:
        _refuse_extras(call)
        references = self._references(call)
        mask = call.get("encoder_hidden_states_mask")
        if mask is None:
            return Text(call["encoder_hidden_states"].shape[1], None, references)
        text = self._texts.of(mask)
        call["encoder_hidden_states"] = call["encoder_hidden_states"][:, : text.longest]
        call["encoder_hidden_states_mask"] = None  # `valid` stands for it
        return text._replace(references=references)

    def enter(self, call: dict[str, Any], step: int) -> dict[str, Any]:
        if self._fitted is not None:
            self._fitted.prepare(self.order, call["timestep"], step)
        return call | {"hidden_states": self.in_groups(call["hidden_states"], 1)}

    def _references(self, call: Mapping[str, Any]) -> int:
        """Tokens of pictures to refer to.

        Raises:
            BadInput: if the call's image tokens are not those of the grid.
        """
        samples = call["img_shapes"]
        shapes = [[sample] if isinstance(sample[0], int) else list(sample) for sample in samples]
        (frames, rows, columns), *others = map(tuple, shapes[0])
        references = sum(map(math.prod, others))
        count = call["hidden_states"].shape[1]
        if (frames, rows, columns) != (1, *self.grid.shape) or count != self.grid.tokens + references:
            installed = "x".join(map(str, self.grid.shape))
            raise BadInput(
                f"GRAT was installed for {installed} image tokens, the call has {rows}x{columns} in {frames} layers, "
                f"{count} with those of references: give the pipeline call the height and width of the install"
            )
        if any(shape != shapes[0] for shape in shapes):
            raise BadInput("samples of a call differ in size or in the sizes of their references: make one at a time")
        return references


class FittedTables:
    """Rotary tables fitted to a larger grid than a model was trained on.

    Positions are counted from the middle of the picture, and text lies beyond its border: beyond that of the trained
    grid, where the model has learnt to find it.
    """

    def __init__(self, stock: Any, extrapolation: Any, grid: Grid) -> None:
        """Prepares.

        Args:
            stock: the transformer's `pos_embed`.
            extrapolation: how frequencies are fitted.
            grid: rows and columns of image tokens.
        """
        rows, columns = grid.shape
        self._stock, self._extrapolation, self._sides = stock, extrapolation, (rows, columns)
        self._made_for: tuple[Any, ...] = ()
        self._table: Any = None
        self._of_text: dict[tuple[Any, int], torch.Tensor] = {}

    def prepare(self, order: torch.Tensor, timestep: torch.Tensor, step: int) -> None:
        """Makes the table of the image tokens for a call, unless the last one serves.

        Args:
            order: raster index of each image token in the order of the call; tokens of references follow.
            timestep: of the call, `[B]`, from 1 in noise to 0; one for all.
            step: its number; positions that depend on time are made anew at each.
        """
        import torch

        from grat_cli.attention.extrapolation import frequencies

        fitting = self._extrapolation
        wanted = order.data_ptr(), order.device, step if fitting.positions == "dype" else None
        if self._made_for == wanted:
            return
        own = order[: math.prod(self._sides)]
        idle, *turning = self._stock.axes_dim
        angles = [torch.zeros(len(own), idle // 2, device=own.device)]
        places = own // self._sides[1], own % self._sides[1]
        ratios = fitting.ratios(self._sides)
        for axis, (channels, place, side) in enumerate(zip(turning, places, self._sides, strict=True)):
            turns = frequencies(
                channels,
                self._stock.theta,
                fitting.positions if ratios[axis] > 1 else "none",
                fitting.trained_grid[axis],
                ratios[axis],
                timestep[0],
                device=own.device,
                dtype=torch.float32,  # as in stock
            )
            centred = torch.arange(side, device=own.device, dtype=torch.float32) - (side - side // 2)
            angles.append(torch.outer(centred, turns)[place])
        joined = torch.cat(angles, dim=1)
        self._table, self._made_for = torch.polar(torch.ones_like(joined), joined), wanted

    def image_and_text(self, stock_image: torch.Tensor, stock_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables `[image, D / 2]` in the order of the call and `[text, D / 2]`, complex.

        Args:
            stock_image: the stock module's in raster order, behind which those of references are taken from.
            stock_text: likewise of the text.
        """
        import torch

        references = stock_image[math.prod(self._sides) :]
        place = stock_text.device, len(stock_text)
        if place not in self._of_text:
            trained = (min(sides) // 2 for sides in zip(self._sides, self._extrapolation.trained_grid, strict=True))
            start = max(trained)
            self._of_text[place] = self._stock.pos_freqs[start : start + len(stock_text)].to(stock_text.device)
        image = torch.cat([self._table, references]) if len(references) else self._table
        return image, self._of_text[place]


def _refuse_extras(call: Mapping[str, Any]) -> None:
    """Raises BadInput for inputs that carry image tokens in an order of their own."""
    if call.get("controlnet_block_samples") is not None:
        raise BadInput("ControlNet is not supported: its residuals are in raster order, the tokens are in group order")
    # `scale` is LoRA's, and changes no token order.
    extras = sorted(set(call.get("attention_kwargs") or {}) - {"scale"})
    if extras:
        raise BadInput(f"attention arguments {', '.join(extras)} are not supported: leave them out")


def _in_chunks(block: Any, chunk: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The forward of a `QwenImageTransformerBlock` in chunks of at most so many tokens."""
    import torch

    from grat_cli.attention.chunking import by_chunks

    signature, largest = inspect.signature(type(block).forward), torch.finfo(torch.float16).max

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given = signature.bind(block, *args, **kwargs).arguments
        temb, index = given["temb"], given.get("modulate_index")
        of_image = block.img_mod(temb).chunk(2, dim=-1)
        of_text = block.txt_mod(temb.chunk(2, dim=0)[0] if block.zero_cond_t else temb).chunk(2, dim=-1)
        streams = (
            (given["hidden_states"], of_image, block.img_norm1, block.img_norm2, block.img_mlp, index),
            (given["encoder_hidden_states"], of_text, block.txt_norm1, block.txt_norm2, block.txt_mlp, None),
        )

        normed = []
        for tokens, (first, _), norm, _, _, segments in streams:

            def modulated(tokens: torch.Tensor, *segments: torch.Tensor, norm: Any = norm, first: Any = first) -> Any:
                return block._modulate(norm(tokens), first, *segments)[0]

            normed.append(by_chunks(modulated, chunk, tokens, *([] if segments is None else [segments])))
        attended = block.attn(
            hidden_states=normed.pop(0),
            encoder_hidden_states=normed.pop(0),
            encoder_hidden_states_mask=given["encoder_hidden_states_mask"],
            image_rotary_emb=given.get("image_rotary_emb"),
            **(given.get("joint_attention_kwargs") or {}),
        )

        made = []
        for (tokens, (first, second), _, norm, feed_forward, segments), attention in zip(
            streams, attended, strict=True
        ):

            def rest(
                tokens: torch.Tensor,
                attention: torch.Tensor,
                *segments: torch.Tensor,
                norm: Any = norm,
                feed_forward: Any = feed_forward,
                first: Any = first,
                second: Any = second,
            ) -> torch.Tensor:
                tokens = tokens + _gate(first, *segments) * attention
                inner, gate = block._modulate(norm(tokens), second, *segments)
                tokens = tokens + gate * feed_forward(inner)
                return tokens.clip(-largest, largest) if tokens.dtype == torch.float16 else tokens

            made.append(by_chunks(rest, chunk, tokens, attention, *([] if segments is None else [segments])))
        image, text = made
        return text, image

    def _gate(parameters: torch.Tensor, *segments: torch.Tensor) -> torch.Tensor:
        """The gate `[B, 1 or N, C]` of a modulation's three vectors; references may have one of their own."""
        gate = parameters.chunk(3, dim=-1)[2]
        if not segments:
            return gate[:, None]
        of_image, of_references = gate.chunk(2, dim=0)
        return torch.where(segments[0].unsqueeze(-1) == 0, of_image[:, None], of_references[:, None])

    return forward
