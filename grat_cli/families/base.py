"""What a model family is: all that the rest of grat asks of one.

A family is one file beside this one, listed in `grat_cli.families`. Facts are read without torch; methods that take a
pipeline import what they need when they run.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from grat_cli.errors import BadInput
from grat_cli.families.autoencoders import AutoencoderShape, autoencoder_shape
from grat_cli.families.resumption import LaterSteps
from grat_cli.families.shapes import TextEncoderShape, TransformerShape
from grat_cli.files.json_objects import read_json
from grat_cli.files.weight_headers import format_of, read_header
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch.distributed import ProcessGroup

    from grat_cli.attention.adapter import Adapter
    from grat_cli.attention.extrapolation import Extrapolation
    from grat_cli.attention.layer import Attend
    from grat_cli.families.time_shift import GivenShift
    from grat_cli.presets.schema import ChunkTokens

Medium = Literal["image", "video"]
PictureKind = Literal["start", "mask", "control", "reference"]
NO_PICTURES: frozenset[PictureKind] = frozenset()
Classes = Mapping[str, Mapping[str, str]]
"""Of each part of a pipeline: the classes that it may be of, and the library of each."""

# The generic tokenizers that transformers 5 saves any other as.
ANY_TOKENIZER = dict.fromkeys(("TokenizersBackend", "PreTrainedTokenizerFast"), "transformers")
CLIP_TOKENIZER = {"CLIPTokenizer": "transformers", "CLIPTokenizerFast": "transformers", **ANY_TOKENIZER}
SCHEDULER = {"FlowMatchEulerDiscreteScheduler": "diffusers"}


@dataclass(frozen=True)
class VideoTraits:
    """What videos a model was trained on.

    Attributes:
        width: in pixels.
        height: in pixels.
        frames: of a video.
        fps: frames per second.
        frames_per_latent: frames that a frame of latents stands for; videos have `k * frames_per_latent + 1` frames.
    """

    width: int
    height: int
    frames: int
    fps: int
    frames_per_latent: int = 4


@dataclass(frozen=True)
class ModelChoice:
    """A model, and the settings it was trained for.

    Attributes:
        name: as typed, or as chosen where nothing was typed.
        source: hub id, folder, or file of a transformer alone.
        kind: which of these three.
        family: name of the family that it belongs to.
        presets: which presets are made for it; the name that they give as their `model`.
        reason: why this model.
        native_side: height and width in pixels that it was trained at; for videos, the side of a square as large.
        token_side: pixels per side of an image token.
        size_multiple: heights and widths must be multiples of it.
        text_tokens: length that prompts are padded or cut to.
        default_steps: denoising steps that suit it.
        default_guidance: guidance that suits it, None where it takes none.
        default_shift: time shift that suits it, None for that of its scheduler.
        true_guidance: whether its guidance is true classifier-free guidance, with a second transformer call per step.
        video: what videos it makes; None for a model of images.
        is_demo: whether it is a bundled model, which knows a few hundred words.
        largest_pixels: most pixels of a picture that it is made for, where there are no stages for larger ones.
        takes: pictures that it may be given.
        needs: those of them that it makes nothing without.
        most_references: most pictures that it refers to at once.
        takes_negative: whether it can be steered away from a negative prompt.
        negative_prompt: what true guidance leads away from where nothing is typed.
        transformers: how many take turns over the steps.
        later_guidance: guidance of the second of these, by that of the first.
        config: name of its transformer's bundled configuration, where a family has several of a kind.
        other_parts: of a file: the folder with the other parts, whose transformer it replaces; empty where that is not
            on this machine.
    """

    name: str
    source: str
    kind: Literal["hub", "folder", "file"]
    family: str
    presets: str
    reason: str = "chosen by name"
    native_side: int = 1024
    token_side: int = 16
    size_multiple: int = 16
    text_tokens: int = 512
    default_steps: int = 28
    default_guidance: float | None = 3.5
    default_shift: float | None = None
    true_guidance: bool = False
    video: VideoTraits | None = None
    is_demo: bool = False
    largest_pixels: int | None = None
    takes_negative: bool = True
    takes: frozenset[PictureKind] = NO_PICTURES
    needs: frozenset[PictureKind] = NO_PICTURES
    most_references: int = 1
    negative_prompt: str = ""
    transformers: int = 1
    later_guidance: float = 1.0
    config: str = ""
    other_parts: str = ""

    @property
    def folder(self) -> Path | None:
        """Where its configurations are; None where they are not known before it is loaded."""
        place = self.source if self.kind == "folder" else self.other_parts
        return Path(place) if place else None

    def redoes(self, kinds: frozenset[PictureKind]) -> bool:
        """Whether it redoes a picture to start from at a strength, where it is given such pictures.

        A video goes on from its first frame, and a model that makes nothing without `start` takes it as it is.
        """
        return "start" in kinds and self.video is None and "start" not in self.needs

    @property
    def medium(self) -> Medium:
        """What it makes."""
        return "video" if self.video else "image"

    def grid(self, width: int, height: int, frames: int | None = None) -> Grid:
        """Image tokens of a picture, or of a video of so many frames.

        Raises:
            BadInput: if the model makes the other medium.
        """
        sides = height // self.token_side, width // self.token_side
        if frames is None:
            return Grid(sides)
        return Grid(((frames - 1) // self.require_video().frames_per_latent + 1, *sides))

    def require_video(self) -> VideoTraits:
        """What videos it makes.

        Raises:
            BadInput: if it makes pictures.
        """
        if not self.video:
            raise BadInput(f"{self.name} makes images: give --model a model of videos, such as hunyuan or demo")
        return self.video


@dataclass(frozen=True)
class Pictures:
    """Pictures that a pipeline takes as they are, and encodes itself.

    Attributes:
        start: the first frame of a video, or what lies around `mask`; of the output's size.
        mask: white where `start` is made anew; likewise.
        control: edges, depth or the like that the output follows; likewise.
        references: what the output refers to, each of its own size.
    """

    start: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None
    references: tuple[Image.Image, ...] = ()

    @property
    def kinds(self) -> frozenset[PictureKind]:
        """Which there are."""
        given: dict[PictureKind, bool] = {
            "start": self.start is not None,
            "mask": self.mask is not None,
            "control": self.control is not None,
            "reference": bool(self.references),
        }
        return frozenset(kind for kind, is_there in given.items() if is_there)


@dataclass(frozen=True)
class Call:
    """One call of a pipeline, for latents.

    Attributes:
        width: in pixels.
        height: in pixels.
        frames: of a video; None for a picture.
        steps: of the sampling, of which those before `strength` are left out.
        arguments: text and guidance, as the pipeline takes them.
        generator: of the noise, on the CPU, so that a seed gives the same one on every device; where `pictures` are
            given, as it was when the call began, also of a call that goes on, which encodes them once more.
        callback: the pipeline's `callback_on_step_end`.
        start: latents `[1, C, h, w]` to start from; None for noise.
        strength: share of the steps that are run on `start`, or on that of `pictures`.
        pictures: what the pipeline is given besides.
        begun: latents as the callback has had them after `first_step` steps of this call; None from its beginning.
        first_step: steps of this call that are done.
        history: what the scheduler remembered after them; of `resumption.remembered`.
    """

    width: int
    height: int
    frames: int | None
    steps: int
    arguments: Mapping[str, Any]
    generator: torch.Generator
    callback: Callable[..., dict[str, Any]] | None = None
    start: torch.Tensor | None = None
    strength: float | None = None
    pictures: Pictures = Pictures()
    begun: torch.Tensor | None = None
    first_step: int = 0
    history: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Family(ABC):
    """All that is known of a model family.

    Attributes:
        name: of the family.
        title: for people.
        medium: what it makes.
        axes: of the token grid.
        pipelines: names of the pipeline classes of diffusers that are supported, the one from text first.
        transformer: name of the transformer's class.
        refused: pipelines that may be taken for supported ones, and why they are not.
        not_driven: further pipelines of its transformer, around which `install` works where a call does nothing that
            the adapter refuses, and why commands make nothing with them.
        classes: of each part of a pipeline the classes that may stand in `model_index.json`, with their library.
        optional: parts that some of its models do without.
        not_loaded: parts that are never used.
        read_as: classes of `classes`, and what of the same library is read from their files in their place.
        models: that are known by name; the first is the one for machines with a CUDA device.
        marks: what names of its checkpoints hold, of their letters and digits alone; of several families that a name
            fits, it is the one with the longest. By default the family's own name.
        presets: variants of the presets that come with grat, by the name that presets give as their `model`.
        larger: likewise the preset for outputs four times as large as those that a model was trained on.
        base: hub id of a pipeline whose other parts suit a file of a transformer alone.
        text_first: whether text comes before the image tokens in the joint sequence.
        text_encoders: of the known models that are not bundled.
        autoencoder: likewise.
        tile: side in pixels of what its autoencoder decodes at once, where nothing else is asked for.
        looks_at: kinds of pictures that the encoders of text look at as well.
        large_encoder: the part, beside the transformer, that is large enough to be quantized.
        autoencoder_dtype: dtype of the autoencoder, where that is always the same.
        half_beside: dtype of the parts beside the transformer where that is in half precision on a CUDA device; None
            for the transformer's own.
        lets_go: whether parts are let go of once a run is done with them.
        full_note: what to know of full attention when it is measured.
        masks_text: whether stock attention runs over padded text under a mask.
        stages: whether outputs that are much larger than those it was trained on come about in stages.
        fits_positions: whether positions and scores can be fitted to larger outputs than it was trained on.
        configs: where the configurations of its transformers are bundled.
        named_in_files: parts of names of weights, one of which is in every file of its transformers.
        not_named_in_files: likewise, none of which is.
        blocks_in_files: names of lists of blocks in files, by the field of a configuration that counts them.
        shapes_in_files: ends of names of weights in files, and an axis, by the field that has that axis' size; `width`
            is that of hidden states, and no field.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    medium: ClassVar[Medium]
    axes: ClassVar[int]
    pipelines: ClassVar[tuple[str, ...]]
    transformer: ClassVar[str]
    refused: ClassVar[Mapping[str, str]]
    not_driven: ClassVar[Mapping[str, str]] = {}
    classes: ClassVar[Classes]
    optional: ClassVar[frozenset[str]] = frozenset()
    not_loaded: ClassVar[frozenset[str]] = frozenset()
    read_as: ClassVar[Mapping[str, str]] = {}
    models: ClassVar[tuple[ModelChoice, ...]]
    marks: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, tuple[str, ...]]]
    larger: ClassVar[Mapping[str, str]] = {}
    base: ClassVar[str]
    text_first: ClassVar[bool]
    text_encoders: ClassVar[tuple[TextEncoderShape, ...]]
    autoencoder: ClassVar[AutoencoderShape]
    tile: ClassVar[int] = 256
    looks_at: ClassVar[frozenset[PictureKind]] = NO_PICTURES
    large_encoder: ClassVar[str]
    autoencoder_dtype: ClassVar[str | None] = None
    half_beside: ClassVar[str | None] = None
    lets_go: ClassVar[bool] = False
    full_note: ClassVar[str] = ""
    masks_text: ClassVar[bool] = False
    stages: ClassVar[bool] = False
    fits_positions: ClassVar[bool] = False
    configs: ClassVar[Path] = Path(__file__).parent / "configs"
    named_in_files: ClassVar[tuple[str, ...]]
    not_named_in_files: ClassVar[tuple[str, ...]] = ()
    blocks_in_files: ClassVar[Mapping[str, tuple[str, ...]]]
    shapes_in_files: ClassVar[Mapping[str, tuple[tuple[str, ...], int]]]

    # ---- Which model

    @abstractmethod
    def kin(self, name: str) -> ModelChoice:
        """The known model that another checkpoint, of which nothing but a name is known, is most likely kin to."""

    @abstractmethod
    def of_folder(self, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> ModelChoice:
        """The known model that a folder's is kin to, with what its configurations say of tokens and guidance."""

    def of_index(
        self, choice: ModelChoice, class_name: str | None, parts: frozenset[str], options: Mapping[str, Any]
    ) -> ModelChoice:
        """A folder's model with what its `model_index.json` says besides.

        Args:
            choice: of `of_folder`, with the folder as its source.
            class_name: of the pipeline that the folder was saved from.
            parts: that it has.
            options: further settings of the pipeline.
        """
        return choice

    def matching_base(self, embeds_guidance: bool) -> str:
        """What to give as `--base` for a file with or without embedded guidance."""
        return f"try --base {self.base}" if embeds_guidance else "give --base what it was made from"

    def vocabulary(self) -> Mapping[str, list[str]]:
        """The words that its bundled demo knows, by kind; those of `subjects` are what it shows."""
        return {}

    # ---- Shapes

    def transformer_config(self, model: ModelChoice) -> dict[str, Any]:
        """The configuration of a model's transformer: its folder's own, else that of the known model it is kin to.

        Raises:
            OSError, ValueError: if it is missing or damaged.
        """
        if model.folder is not None:
            return read_json(model.folder / "transformer" / "config.json")
        config = read_json(self.configs / f"{self.bundled_config(model)}.json")
        if model.kind == "file" and format_of(Path(model.source)) != "pickle":  # of which nothing is known
            shapes = {name: tensor.shape for name, tensor in read_header(Path(model.source)).tensors.items()}
            return self.config_of_file(config, shapes)
        return config

    def holds(self, names: Collection[str]) -> bool:
        """Whether weights of a file, by these names, are those of one of its transformers."""

        def named(parts: tuple[str, ...]) -> bool:
            return any(part in name for part in parts for name in names)

        return named(self.named_in_files) and not named(self.not_named_in_files)

    def config_of_file(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """A configuration with what weights of a file tell: how many blocks, how wide, of how many channels.

        Args:
            config: of the known model that it is most likely kin to.
            shapes: of the weights, by their names in whichever layout.

        Raises:
            ValueError: if they are of no such transformer.
        """
        found = dict(config)
        for field_name, lists in self.blocks_in_files.items():
            place = re.compile(rf"(?:^|\.)(?:{'|'.join(lists)})\.(\d{{1,4}})\.")
            numbers = {int(match[1]) for match in map(place.search, shapes) if match}
            found[field_name] = max(numbers, default=-1) + 1
        sizes: dict[str, int] = {}
        for field_name, (ends, axis) in self.shapes_in_files.items():
            # What begins with a dot is in blocks, and all else outside of them.
            inside, outside = tuple(end for end in ends if end[0] == "."), tuple(end for end in ends if end[0] != ".")
            told = (
                shape
                for name, shape in shapes.items()
                if name.endswith(inside if "blocks." in name else outside) and len(shape) > axis
            )
            if (shape := next(told, None)) is not None:
                sizes[field_name] = shape[axis]
        width = sizes.pop("width", 0)
        found |= sizes
        heads_dim = found["attention_head_dim"]
        if min(width, heads_dim) < 1 or width % heads_dim or not any(found[name] for name in self.blocks_in_files):
            raise ValueError(f"its tensors are not those of a transformer of {self.title}")
        found["num_attention_heads"] = width // heads_dim
        if "guidance_embeds" in found:
            found["guidance_embeds"] = any("guidance" in name for name in shapes)
        return found

    def of_file(self, name: str, config: Mapping[str, Any]) -> ModelChoice:
        """The known model that a file's is kin to.

        Args:
            name: of the file.
            config: of `config_of_file`.
        """
        return self.kin(name)

    def bundled_config(self, model: ModelChoice) -> str:
        """Which of the bundled configurations is that of a model from a hub, or of one that it is kin to."""
        known = [one for one in self.models if one.kind == "hub"]
        guided = model.default_guidance is not None
        return next((one for one in known if (one.default_guidance is not None) == guided), known[0]).name

    def with_blocks(self, config: Mapping[str, Any], blocks: tuple[int, ...]) -> dict[str, Any]:
        """A transformer's configuration with other numbers of blocks, as many as its shape has kinds of them."""
        return {**config, **dict(zip(("num_layers", "num_single_layers"), blocks, strict=False))}

    def fresh_modules(self, config: Mapping[str, Any]) -> Mapping[str, torch.nn.Module]:
        """Modules of a transformer, by their names, that hold tensors which are no weights, such as rotary tables."""
        return {}

    @abstractmethod
    def transformer_shape(self, config: Mapping[str, Any]) -> TransformerShape:
        """The shape of a transformer, from its configuration.

        Raises:
            LookupError, ValueError, TypeError: if a field is missing or damaged.
        """

    def autoencoder_of(self, model: ModelChoice) -> AutoencoderShape:
        """The autoencoder of a known model that is not bundled."""
        return self.autoencoder

    def text_encoders_of(self, model: ModelChoice) -> tuple[TextEncoderShape, ...]:
        """Likewise its text encoders, with what encodes pictures beside them."""
        return self.text_encoders

    def autoencoder_shape(self, config: Mapping[str, Any], parameters: int = 0) -> AutoencoderShape:
        """The shape of an autoencoder, from its configuration; see `autoencoders.autoencoder_shape`."""
        return autoencoder_shape(config, parameters)

    @abstractmethod
    def step_grids(self, model: ModelChoice) -> tuple[Grid, ...]:
        """Image tokens at which a step of a model is measured where no size is asked for."""

    @abstractmethod
    def step_inputs(
        self, config: Mapping[str, Any], grid: Grid, text_len: int, normal: Callable[..., torch.Tensor]
    ) -> dict[str, Any]:
        """Keyword arguments of one transformer call of one sample, with latents and text drawn at random.

        Args:
            config: of the transformer.
            grid: image tokens.
            text_len: text tokens, all of them valid.
            normal: numbers of a normal distribution, in the dtype of latents and text, of a shape.
        """

    def reference_tokens(
        self,
        model: ModelChoice,
        size: tuple[int, int],
        kinds: frozenset[PictureKind],
        references: Sequence[tuple[int, int]],
    ) -> int:
        """Tokens of pictures that follow the image tokens.

        Args:
            model: which refers to them.
            size: width and height of the output, in pixels.
            kinds: of all pictures that the output is made from.
            references: width and height of each picture to refer to.

        Raises:
            BadInput: if the model cannot refer to one of them.
        """
        return 0

    # ---- Loading

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Parts of a pipeline that encode text, and are for nothing else."""
        return tuple(part for part in self.classes if part.startswith(("text_encoder", "tokenizer")))

    @abstractmethod
    def pipeline_class(self, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        """The pipeline class of diffusers that takes such pictures."""

    def pipeline_of(self, model: ModelChoice, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        """That of a model, where models differ."""
        return self.pipeline_class(kinds)

    def read_part(self, part: str, folder: Path, given: Mapping[str, Any]) -> Any:
        """A part of a pipeline that its own class does not read here, such as a processor; None for all others.

        Args:
            part: its name.
            folder: its files.
            given: the parts that are loaded already.
        """
        return None

    @abstractmethod
    def transformer_class(self) -> Any:
        """The transformer class of diffusers."""

    def dtypes(self, parts: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of each part of a pipeline that runs in `dtype`."""
        return dict.fromkeys(parts, dtype)

    def prepare(self, pipe: Any, tile: int | None = None) -> None:  # noqa: B027 most families need nothing
        """Sets a loaded pipeline up, once.

        Args:
            pipe: the pipeline.
            tile: side in pixels of what the autoencoder decodes at once, None for its own.
        """

    # ---- Making

    def given_shift(self, pipe: Any, image_tokens: int, steps: int) -> GivenShift | None:
        """The time shift that a pipeline hands its scheduler, where it is not along the line of `time_shift`."""
        return None

    def about_stock(self, model: ModelChoice) -> str:
        """What to know of full attention by stock diffusers where it is compared with others, in a sentence."""
        return "Full attention is stock diffusers."

    @abstractmethod
    def encode_prompt(self, pipe: Any, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
        """A prompt as the pipeline takes it, padded or cut to so many tokens, by the names of its arguments."""

    def longest_text(self, pipe: Any, model: ModelChoice) -> int | None:
        """Tokens of a prompt, its template included, of which a pipeline takes embeddings; None for all it reads."""
        return None

    def guided(self, model: ModelChoice, scale: float | None) -> dict[str, float]:
        """Arguments of a pipeline call for true classifier-free guidance of a strength; None for none."""
        return {} if scale is None else {"true_cfg_scale": scale}

    def encode_text(
        self, pipe: Any, model: ModelChoice, prompt: str, negative: str | None, pictures: Pictures = Pictures()
    ) -> dict[str, torch.Tensor]:
        """Prompt and negative prompt as the pipeline takes them.

        Args:
            pipe: a pipeline of the family.
            model: whose text length is taken.
            prompt: what is shown.
            negative: of `guidance.Guidance`: None where the transformer is called once per step.
            pictures: that encoders of text and pictures look at.
        """
        import torch

        with torch.no_grad():
            text = self.encode_prompt(pipe, prompt, model.text_tokens)
            if negative is not None:
                more = self.encode_prompt(pipe, negative, model.text_tokens)
                text |= {f"negative_{name}": tensor for name, tensor in more.items()}
        return text

    @abstractmethod
    def text_lens(self, text: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        """Text tokens in the joint sequence of each transformer call of a step."""

    def pipeline_for(self, pipe: Any, kinds: frozenset[PictureKind] = NO_PICTURES) -> Any:
        """The pipeline that takes such pictures; it shares the components of `pipe`, hooks included."""
        return self.in_class(pipe, self.pipeline_class(kinds))

    def in_class(self, pipe: Any, kind: Any) -> Any:
        """A pipeline of a class of the family, of the components of `pipe`, hooks included; `pipe` if it is one."""
        if type(pipe) is kind:
            return pipe
        parameters = signature(kind).parameters
        # Parts, and options such as when transformers take turns, which are in its configuration.
        given = {name: pipe.config[name] for name in parameters if name in pipe.config} | pipe.components
        other = kind(**{name: part for name, part in given.items() if name in parameters})
        other.set_progress_bar_config(disable=True)
        return other

    @abstractmethod
    def denoise(self, pipe: Any, call: Call) -> torch.Tensor:
        """Latents of one output as `spatial` gives them, made by a pipeline of `pipeline_for`."""

    def spatial(self, pipe: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Latents as a callback has them, as `[1, C, (T,) h, w]`; most pipelines of videos have them so."""
        return latents

    @abstractmethod
    def latents_shape(self, model: ModelChoice, grid: Grid, *, called: bool) -> tuple[int, ...]:
        """Of latents of so many image tokens, as a callback has them if `called`, else as `spatial` gives them.

        Raises:
            OSError, ValueError, LookupError: as for `transformer_config`, or if a field is missing.
        """

    def as_called(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """Spatial latents as a callback has them: undoes `spatial`."""
        return latents

    @abstractmethod
    def decode(
        self, pipe: Any, latents: torch.Tensor, tile: int | None = None, ranks: ProcessGroup | None = None
    ) -> torch.Tensor:
        """Pixels `[1, 3, T, H, W]` from about -1 to 1 of spatial latents; a picture has one frame.

        Args:
            pipe: a pipeline, or what is left of one that has an autoencoder.
            latents: as the pipeline denoises them.
            tile: side in pixels of what is decoded at once; None for the family's own.
            ranks: that share the tiles, and all have the same latents; what is decoded as a whole, each decodes.

        Raises:
            NumericalFailure: if there are NaN or infinite pixels, where that is told tile by tile.
        """

    def encode(self, pipe: Any, picture: Image.Image) -> torch.Tensor:
        """Latents `[1, C, h, w]` of a picture, scaled as the pipeline denoises them.

        Raises:
            BadInput: if the family makes nothing from pictures.
        """
        raise BadInput(f"{self.title} starts from no picture: leave out --init-image")

    # ---- Attention

    def transformers(self, pipe: Any) -> tuple[Any, ...]:
        """The transformers of a pipeline, all of one class and shape, which take turns over a run's steps."""
        return (pipe.transformer,)

    def mag_ratios(self, config: Mapping[str, Any]) -> Sequence[float] | None:
        """Ratios of `presets.caches.Mag` that are known for a transformer of a configuration; None where none are."""
        return None

    @abstractmethod
    def grid(self, pipe: Any, height: int, width: int, num_frames: int | None = None) -> Grid:
        """The image tokens of a pipeline's calls of a size in pixels.

        Raises:
            BadInput: if the pipeline cannot make that size.
        """

    @abstractmethod
    def adapter_class(self) -> type[Adapter]:
        """What runs a transformer of the family on image tokens in group order."""

    def adapter(
        self,
        transformer: torch.nn.Module,
        grid: Grid,
        *,
        extrapolation: Extrapolation | None = None,
        chunk_tokens: ChunkTokens = "auto",
        fused: bool | None = None,
        attend: Attend | None = None,
        ranks: ProcessGroup | None = None,
    ) -> Adapter:
        """An adapter of a transformer; see `attention.adapter` for the options.

        Raises:
            BadInput: if positions are to be fitted and cannot be, or an option does not suit the adapter.
        """
        if extrapolation is not None and not self.fits_positions:
            raise BadInput(f"positions of {self.title} are not fitted: leave out extrapolation")
        options: dict[str, Any] = {"chunk_tokens": chunk_tokens, "fused": fused, "attend": attend, "ranks": ranks}
        return self.adapter_class()(transformer, grid, extrapolation=extrapolation, **options)


def token_sides(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of image tokens of so many pixels a side.

    Raises:
        BadInput: if they do not fill the picture.
    """
    if height % side or width % side:
        nearest = (max(side, round(size / side) * side) for size in (height, width))
        raise BadInput(
            f"height and width must be multiples of {side} for this model, not {height} and {width}: "
            f"the nearest are {' and '.join(map(str, nearest))}"
        )
    return height // side, width // side


def len_of_run(steps: int, strength: float) -> int:
    """Steps that are run at a strength, as diffusers counts them (`FluxImg2ImgPipeline.get_timesteps`)."""
    return steps - int(max(steps - steps * strength, 0))


def latent_frames(pipe: Any, num_frames: int | None, unit: int) -> int:
    """Frames of latents, each of which but the first stands for so many frames of a video.

    Raises:
        BadInput: if no number of frames is given, or one that does not fit.
    """
    if num_frames is None:
        raise BadInput(f"a {type(pipe).__name__} makes videos: give num_frames, such as num_frames=129")
    if num_frames < 1 or (num_frames - 1) % unit:
        fewer = max(0, num_frames - 1) // unit * unit + 1
        raise BadInput(f"num_frames must be {unit}k+1 for this model, not {num_frames}: use {fewer} or {fewer + unit}")
    return (num_frames - 1) // unit + 1


@contextmanager
def beginning_at(
    pipe: Any,
    step: int,
    latents: torch.Tensor | None = None,
    history: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Iterator[None]:
    """While inside, calls of a pipeline begin at a later step than their first.

    Args:
        pipe: a pipeline whose scheduler counts its steps.
        step: of the schedule; those before it are left out.
        latents: that `prepare_latents` returns in place of its own; None leaves it as it is.
        history: what the scheduler remembered before this step; of `resumption.remembered`.
    """
    stock = pipe.scheduler
    with contextlib.ExitStack() as stack:
        if step:
            pipe.scheduler = LaterSteps(stock, step, history)
            stack.callback(setattr, pipe, "scheduler", stock)
        if latents is not None:
            pipe.prepare_latents = lambda *arguments, **options: latents
            stack.callback(delattr, pipe, "prepare_latents")
        yield
