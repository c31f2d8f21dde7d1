"""Options that commands share, in groups, with what every command does with them."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from grat_cli.commands.parameters import option, switch
from grat_cli.console.output import Output

if TYPE_CHECKING:
    from grat_cli.models.catalogue import ModelChoice
    from grat_cli.models.weights import Weights
    from grat_cli.presets import Preset

PICTURE, VIDEO, ATTENTION, MODEL, OUTPUT = "Picture", "Video", "Attention", "Model", "Output"


def command_line(context: typer.Context) -> str:
    """The command as typed, for the record."""
    return shlex.join(["grat", *(context.find_root().obj or ())])


def complete_preset() -> list[str]:
    """Names of presets, for shell completion."""
    from grat_cli.presets import preset_names

    return preset_names()


def complete_variant() -> list[str]:
    """Names of variants, for shell completion."""
    from grat_cli.families import preset_variants

    return sorted({variant for variants in preset_variants().values() for variant in variants})


def complete_model() -> list[str]:
    """Names of models of images, for shell completion."""
    from grat_cli.models.catalogue import KNOWN_MODELS

    return list(KNOWN_MODELS["image"])


def complete_video_model() -> list[str]:
    """Names of models of videos, for shell completion."""
    from grat_cli.models.catalogue import KNOWN_MODELS

    return list(KNOWN_MODELS["video"])


def complete_any_model() -> list[str]:
    """Names of models, for shell completion."""
    return sorted({*complete_model(), *complete_video_model()})


def complete_backend() -> list[str]:
    """Names of backends, for shell completion."""
    from grat_cli.presets import BACKENDS

    return list(BACKENDS)


def complete_cache() -> list[str]:
    """Names of caches, for shell completion."""
    from grat_cli.presets import CACHES

    return [*CACHES, "none"]


def complete_highres() -> list[str]:
    """Ways to make large pictures, for shell completion."""
    from grat_cli.presets import HIGHRES_MODES

    return list(HIGHRES_MODES)


def complete_format() -> list[str]:
    """Names of video formats, for shell completion."""
    from grat_cli.files.videos import FORMATS

    return list(FORMATS)


def complete_layout() -> list[str]:
    """Names of layouts of a batch, for shell completion."""
    from grat_cli.generation.batch_layout import LAYOUTS

    return list(LAYOUTS)


def complete_picture_format() -> list[str]:
    """Names of picture formats, for shell completion."""
    from grat_cli.files.pictures import FORMATS

    return list(FORMATS)


@dataclass(frozen=True)
class SizeOptions:
    """Size of a picture or video."""

    res: str | None = option("SIZE", "As for grat image and grat video. Default: the model's own size.", PICTURE)
    aspect: str | None = option("W:H", "Shape of a video: 16:9, 9:16, 1:1, 4:3. Default: the model's own.", VIDEO)
    seconds: float | None = option("SECONDS", "Length of a video. Default: the model's own.", VIDEO)
    frames: int | None = option(
        "COUNT", "Length of a video in frames, in place of --seconds; rounded up to 4k+1.", VIDEO
    )
    fps: int | None = option("COUNT", "Frames per second. Default: the model's own.", VIDEO)

    @property
    def of_video(self) -> bool:
        """Whether any is given that only videos have."""
        return any(value is not None for value in (self.aspect, self.seconds, self.frames, self.fps))

    def size_for(self, choice: ModelChoice) -> Any:
        """Of what the model makes: a `Resolution` or a `VideoSize`.

        Raises:
            BadInput: as `parse_size`.
        """
        from grat_cli.models.video_size import parse_size

        return parse_size(choice, self.res, self.aspect, self.seconds, self.frames, self.fps)


@dataclass(frozen=True)
class SamplingOptions:
    """How denoising runs, and how often."""

    seed: str | None = option("SEED,...", "One seed or several: one picture or video each. Default: random.", PICTURE)
    n: int | None = option("COUNT", "So many pictures or videos, with consecutive seeds.", PICTURE)
    steps: int | None = option("COUNT", "Denoising steps. Default: the preset's.", PICTURE)
    guidance: float | None = option("SCALE", "How closely to follow the prompt. Default: the preset's.", PICTURE)
    negative: str | None = option("PROMPT", "What to keep out of the picture or video.", PICTURE, is_text=True)

    def seeds(self) -> tuple[int, ...]:
        """One for each output.

        Raises:
            BadInput: as `resolve_seeds`.
        """
        from grat_cli.generation.seeds import resolve_seeds

        return resolve_seeds(self.seed, self.n)


@dataclass(frozen=True)
class AttentionOptions:
    """What is attended, and by what."""

    preset: str | None = option(
        "NAME",
        "A preset by name or from a YAML file. Default: the recommended one (see grat presets).",
        ATTENTION,
        complete=complete_preset,
    )
    variant: str | None = option(
        "NAME",
        "full, b, b-wide, x, bx, far, sta, or for videos planes and lines: the model's preset of that name. "
        "With --preset: its variant instead.",
        ATTENTION,
        complete=complete_variant,
    )
    group: str | None = option("SIZE", "Tokens per group, such as 16x16, or 4x8x8 for videos.", ATTENTION)
    radius: str | None = option(
        "GROUPS", "For b and bx: how many groups away is attended, such as 2, 1x2 or 1x2x2.", ATTENTION
    )
    share: int | None = option("COUNT", "For x and bx: how many group coordinates must be equal.", ATTENTION)
    guard: float | None = option(
        "SHARE",
        "How much of full attention each layer has to keep, such as 0.9: those that are measured to keep less "
        "go wider while the run goes on. 0 for none. Default: the preset's.",
        ATTENTION,
    )
    cache: str | None = option(
        "NAME",
        "What steps take over from those before them: first-block, mag, taylor, pab or faster, also with settings: "
        "taylor:cache_interval=3,max_order=1; none for nothing. Default: the preset's.",
        ATTENTION,
        complete=complete_cache,
    )
    set_items: list[str] | None = option(
        "KEY=VALUE",
        "Any value of the preset, such as schedule.dense_steps=0.1; may be repeated.",
        ATTENTION,
        flag="--set",
    )
    backend: str | None = option(
        "NAME",
        "auto, reference, sdpa, flex, triton or gluon. One that is named runs or says why not (see grat env).",
        ATTENTION,
        complete=complete_backend,
    )

    def preset_for(
        self,
        choice: ModelChoice,
        sampling: SamplingOptions,
        highres: str | None = None,
        then: tuple[Preset, ModelChoice | None] | None = None,
    ) -> Preset:
        """The resolved preset of a run.

        Args:
            choice: the model.
            sampling: gives steps and guidance.
            highres: `--highres`.
            then: of an output that is repeated the preset, and its model.

        Raises:
            BadInput: as `select_preset`.
        """
        from grat_cli.generation.selection import select_preset

        return select_preset(
            choice,
            preset=self.preset,
            variant=self.variant,
            group=self.group,
            radius=self.radius,
            share=self.share,
            backend=self.backend,
            steps=sampling.steps,
            guidance=sampling.guidance,
            highres=highres,
            guard=self.guard,
            cache=self.cache,
            set_items=self.set_items or (),
            then=then,
        )


# Of `ModelOptions`: how weights come, for commands that measure with a model as it is.
OF_WEIGHTS = ("base", "text_encoder", "cast", "allow_pickle", "lora", "fuse_lora")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and on what and how it runs."""

    model: str | None = option(
        "NAME",
        "demo, flux-dev, flux2-dev, qwen-image or their kin, a Hub id, a folder, or a .safetensors or .gguf file. "
        "Default: flux-dev with a CUDA device, else demo.",
        MODEL,
        complete=complete_model,
        is_place=True,
    )
    base: str | None = option(
        "MODEL",
        "Folder, Hub id or name of a model with the text encoders and autoencoder for a file as --model.",
        MODEL,
        is_place=True,
    )
    text_encoder: str | None = option(
        "FILE",
        "A .safetensors file, or a GGUF one of T5, in place of the model's own large text encoder.",
        MODEL,
        is_place=True,
    )
    device: str = option("NAME", "auto, cpu, cuda, cuda:1 or mps.", MODEL, "auto")
    dtype: str = option("NAME", "auto, float32, bfloat16 or float16.", MODEL, "auto")
    offload: str = option(
        "HOW",
        "none, model, group or sequential: which weights wait in main memory until they are needed; "
        "auto: the fastest that fits.",
        MODEL,
        "none",
    )
    quantize: str = option(
        "HOW",
        "none, int8, fp8 (with torchao) or nf4 (with bitsandbytes): fewer bits for weights of transformer and "
        "large text encoder, on CUDA devices.",
        MODEL,
        "none",
    )
    lora: list[str] | None = option(
        "FILE|HUB-ID[:NAME][@SCALE]",
        "A LoRA in safetensors, such as style.safetensors@0.8 or owner/name:file.safetensors; may be repeated. "
        "Of models with two transformers behind high=, low= or both=.",
        MODEL,
    )
    fuse_lora: bool = switch("Add LoRAs to the weights once, not at every product: faster, and rounded.", MODEL)
    cast: str = option(
        "HOW",
        "none or fp8: the transformer's weights wait in 8 bits, and are turned to --dtype as each layer is called.",
        MODEL,
        "none",
    )
    allow_pickle: bool = switch("Read tensors from .bin, .pt and .ckpt files too, and nothing else of them.", MODEL)

    no_text_cache: bool = switch(
        "Encode the prompt even if it has been before, and keep nothing of it (see grat env).", MODEL
    )
    compile: bool = switch(
        "Compile the transformer's blocks at the first step, which takes a minute or so: for long runs and many "
        "outputs.",
        MODEL,
    )

    def check(self) -> None:
        """Refuses what is wrong whatever the model.

        Raises:
            BadInput: naming the option.
            ModelUnavailable: if a LoRA is not there.
        """
        from grat_cli.errors import BadInput
        from grat_cli.files.places import expanded
        from grat_cli.generation.selection import DTYPES, require_choice, require_device
        from grat_cli.models.offloading import OFFLOADS
        from grat_cli.models.quantization import CASTS, QUANTIZATIONS, require_cast

        require_device(self.device)
        require_choice("--dtype", self.dtype, DTYPES)
        require_choice("--offload", self.offload, OFFLOADS)
        require_choice("--quantize", self.quantize, QUANTIZATIONS)
        _ = self.weights
        require_choice("--cast", self.cast, CASTS)
        require_cast(self.cast, self.quantize)
        if self.text_encoder is not None and not os.path.isfile(expanded(self.text_encoder)):
            raise BadInput(f"--text-encoder {self.text_encoder}: there is no such file")

    @property
    def machine(self) -> dict[str, Any]:
        """On what and how it runs, as requests and `refuse_unfit_here` take it."""
        return {"device": self.device, "dtype": self.dtype, "offload": self.offload}

    @property
    def weights(self) -> Weights:
        """How the weights come.

        Raises:
            BadInput, ModelUnavailable: as `parse_loras`.
        """
        from grat_cli.models.weights import Weights

        loras = ()
        if self.lora:
            from grat_cli.models.lora import parse_loras

            loras = parse_loras(self.lora)
        return Weights(
            base=self.base,
            quantize=self.quantize,
            text_encoder=self.text_encoder,
            cast=self.cast,
            allow_pickle=self.allow_pickle,
            loras=loras,
            fuse_loras=self.fuse_lora,
        )

    def choice_for(self, preset: str | None, extent: SizeOptions) -> ModelChoice:
        """The model of a command that makes pictures and videos.

        Args:
            preset: `--preset`, which says what its family makes.
            extent: whose options may be those of videos.

        Raises:
            BadInput, ModelUnavailable: as `load_preset` and `choose_model`.
        """
        from grat_cli.generation.selection import choose_medium
        from grat_cli.models.catalogue import choose_model, models_for
        from grat_cli.presets import load_preset

        made_for = load_preset(preset).model if preset is not None else None
        medium = choose_medium(self.model, made_for, extent.of_video)
        usual = models_for(made_for, medium)
        bundled_alone = self.model is None and all(model.is_demo for model in usual)
        return choose_model(usual[0].name if bundled_alone else self.model, medium, self.base)


@dataclass(frozen=True)
class PictureOptions:
    """Pictures that an output is made from."""

    init_image: Path | None = option("FILE", "A picture to start from (image-to-image).", PICTURE)
    strength: float | None = option(
        "SHARE",
        "How much of --init-image to redo, 0 to 1. Default: 0.7, with --mask 1, of large pictures as the preset says.",
        PICTURE,
    )
    mask: Path | None = option(
        "FILE", "Of the size of --init-image, and white where that is made anew; the rest stays.", PICTURE
    )
    control: Path | None = option(
        "FILE", "Edges, depth or the like that the picture follows, ready made, for models of that kind.", PICTURE
    )
    reference: list[Path] | None = option(
        "FILE", "A picture that the prompt refers to, for models that edit; may be repeated.", PICTURE
    )

    def check(self) -> None:
        """Refuses what is wrong whatever the model.

        Raises:
            BadInput: naming the option.
        """
        from grat_cli.errors import BadInput

        if self.strength is not None and self.init_image is None:
            raise BadInput("--strength is for image-to-image: add --init-image FILE")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise BadInput(f"--strength {self.strength:g}: expected more than 0 and at most 1")
        files = {"--init-image": self.init_image, "--mask": self.mask, "--control": self.control}
        for name, file in [*files.items(), *(("--reference", file) for file in self.reference or ())]:
            if file is not None and not file.is_file():
                raise BadInput(f"{name} {file}: there is no such file")

    @property
    def given(self) -> dict[str, Any]:
        """As requests take them."""
        return {
            "init_image": self.init_image,
            "strength": self.strength,
            "mask": self.mask,
            "control": self.control,
            "references": tuple(self.reference or ()),
        }


@dataclass(frozen=True)
class ParallelOptions:
    """How many GPUs make each output together, and how they share it."""

    gpus: int | None = option(
        "COUNT", "Make each output on so many GPUs of this machine together. On several machines: see torchrun.", MODEL
    )
    parallel: str | None = option(
        "HOW",
        "What the GPUs of an output share: cp=4 the tokens of each call, cp=2,cfg=2 also the two calls of guidance; "
        "auto chooses. Default: auto.",
        MODEL,
    )
    shard_weights: bool = switch(
        "Let the GPUs that share a call share the transformer's weights too, where one cannot hold them.", MODEL
    )

    def check(self) -> None:
        """Refuses what is wrong whatever the model.

        Raises:
            BadInput: naming the option.
        """
        from grat_cli.errors import BadInput
        from grat_cli.models.parallel import MOST_RANKS, parse_parallel

        if self.gpus is not None and not 1 <= self.gpus <= MOST_RANKS:
            raise BadInput(f"--gpus {self.gpus}: expected 1 or more, at most {MOST_RANKS}")
        if self.parallel is not None:
            parse_parallel(self.parallel)


@dataclass(frozen=True)
class KeepingOptions:
    """What is kept beside an output."""

    save_latents: bool = switch("Keep the latents beside the output, for grat decode.", OUTPUT)
    checkpoint_every: int | None = option(
        "STEPS",
        "Keep what is done beside the output, for grat resume; 0 for never. Default: about every two minutes.",
        OUTPUT,
    )


@dataclass(frozen=True)
class TerminalOptions:
    """What is printed."""

    as_json: bool = switch("Print the result as JSON.", OUTPUT, flag="--json")
    quiet: bool = switch("Print nothing but the result's names.", OUTPUT)
    # Read by app.run, because a mistake among the other options must already obey it.
    debug: bool = switch("Show a traceback with errors.", OUTPUT)

    def output(self) -> Output:
        """Where results and hints go.

        Raises:
            BadInput: as `Output`.
        """
        return Output(as_json=self.as_json, quiet=self.quiet)


# Those that stand alone
HIGHRES = option(
    "HOW",
    "Of pictures larger than the model was trained at: cascade (a small one, redone at growing sizes), "
    "direct (from noise, with positions and attention fitted) or off. Default: the preset's, else cascade.",
    PICTURE,
    complete=complete_highres,
)
EITHER_MODEL = option(
    "NAME",
    "As for grat image and grat video; demo with --frames or --seconds makes a video. "
    "Default: flux-dev with a CUDA device, else demo.",
    MODEL,
    complete=complete_any_model,
    is_place=True,
)
PREVIEW = option(
    "STEPS",
    "Every so many steps, write a small picture of where it is to NAME.preview.png; removed at the end.",
    OUTPUT,
)
OUT = option("PATH", "File or folder to write to. Default: a telling name in the current folder.", OUTPUT)
OUT_BESIDE = option("PATH", "File or folder to write to. Default: beside FILE, by its name.", OUTPUT)
VIDEO_FORMAT = option(
    "NAME",
    "mp4, gif, webm or frames (a folder of PNG files). Default: as --out ends, else mp4.",
    OUTPUT,
    complete=complete_format,
)
QUALITY = option("NUMBER", "Of jpg and webp: 1 (smallest) to 100 (best). Default: 95, 90 for webp.", OUTPUT)
CRF = option("NUMBER", "Quality of mp4 and webm; smaller is better and larger. Default: 18, 24 for webm.", OUTPUT)
OVERWRITE = switch("Replace existing files.", OUTPUT)
NO_METADATA = switch("Keep prompt and settings out of the file itself.", OUTPUT)
