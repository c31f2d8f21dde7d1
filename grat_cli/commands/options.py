"""Options that commands share, as `Annotated` types."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.errors import BadInput

_PICTURE, _VIDEO, _ATTENTION, _MODEL, _OUTPUT = "Picture", "Video", "Attention", "Model", "Output"


def number(option: str, kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A parser of numbers whose complaint names the option; Typer's own words are longer and say less."""

    def parse(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            expected = "a whole number" if kind is int else "a number"
            raise BadInput(f"{option} {text}: expected {expected}")
        return number

    return parse


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


# Picture
Res = Annotated[
    str | None,
    typer.Option(
        "--res",
        metavar="SIZE",
        help="1024, 1536x1024, 4k, 4mp, 16:9 or 16:9@4mp, in multiples of 16. Default: the model's own size.",
        show_default=False,
        rich_help_panel=_PICTURE,
    ),
]
Aspect = Annotated[
    str | None,
    typer.Option(
        "--aspect",
        metavar="W:H",
        help="Shape of a video: 16:9, 9:16, 1:1, 4:3. Default: the model's own.",
        show_default=False,
        rich_help_panel=_VIDEO,
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        "--seconds",
        parser=number("--seconds", float),
        metavar="SECONDS",
        help="Length of a video. Default: the model's own.",
        show_default=False,
        rich_help_panel=_VIDEO,
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames",
        parser=number("--frames", int),
        metavar="COUNT",
        help="Length of a video in frames, in place of --seconds; rounded up to 4k+1.",
        show_default=False,
        rich_help_panel=_VIDEO,
    ),
]
Fps = Annotated[
    int | None,
    typer.Option(
        "--fps",
        parser=number("--fps", int),
        metavar="COUNT",
        help="Frames per second. Default: the model's own.",
        show_default=False,
        rich_help_panel=_VIDEO,
    ),
]
VideoRes = Annotated[
    str | None,
    typer.Option(
        "--res",
        metavar="SIZE",
        help="720p, 540p, 480p or 1280x720, in multiples of 16. Default: the model's own size.",
        show_default=False,
        rich_help_panel=_VIDEO,
    ),
]
Seed = Annotated[
    str | None,
    typer.Option(
        "--seed",
        metavar="SEED,...",
        help="One seed or several: one picture or video each. Default: random.",
        show_default=False,
        rich_help_panel=_PICTURE,
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--n",
        parser=number("--n", int),
        metavar="COUNT",
        help="So many pictures or videos, with consecutive seeds.",
        show_default=False,
        rich_help_panel=_PICTURE,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        parser=number("--steps", int),
        metavar="COUNT",
        help="Denoising steps. Default: the preset's.",
        show_default=False,
        rich_help_panel=_PICTURE,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        parser=number("--guidance", float),
        metavar="SCALE",
        help="How closely to follow the prompt. Default: the preset's.",
        show_default=False,
        rich_help_panel=_PICTURE,
    ),
]
Negative = Annotated[
    str | None,
    typer.Option(
        "--negative",
        metavar="PROMPT",
        help="What to keep out of the picture or video.",
        show_default=False,
        rich_help_panel=_PICTURE,
    ),
]
InitImage = Annotated[
    Path | None,
    typer.Option(
        "--init-image",
        metavar="FILE",
        help="A picture to start from (image-to-image).",
        show_default=False,
        rich_help_panel=_PICTURE,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        parser=number("--strength", float),
        metavar="SHARE",
        help="How much of --init-image to redo, 0 to 1. Default: 0.7, of large pictures as the preset says.",
        show_default=False,
        rich_help_panel=_PICTURE,
    ),
]
Highres = Annotated[
    str | None,
    typer.Option(
        "--highres",
        metavar="HOW",
        help="Of pictures larger than the model was trained at: cascade (a small one, redone at growing sizes), "
        "direct (from noise, with positions and attention fitted) or off. Default: the preset's, else cascade.",
        show_default=False,
        rich_help_panel=_PICTURE,
        autocompletion=complete_highres,
    ),
]

# Attention
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A preset by name or from a YAML file. Default: the recommended one (see grat presets).",
        show_default=False,
        rich_help_panel=_ATTENTION,
        autocompletion=complete_preset,
    ),
]
VariantName = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="full, b, b-wide, x, bx, far, sta, or for videos planes and lines: the model's preset of that name. "
        "With --preset: its variant instead.",
        show_default=False,
        rich_help_panel=_ATTENTION,
        autocompletion=complete_variant,
    ),
]
Group = Annotated[
    str | None,
    typer.Option(
        "--group",
        metavar="SIZE",
        help="Tokens per group, such as 16x16, or 4x8x8 for videos.",
        show_default=False,
        rich_help_panel=_ATTENTION,
    ),
]
Radius = Annotated[
    str | None,
    typer.Option(
        "--radius",
        metavar="GROUPS",
        help="For b and bx: how many groups away is attended, such as 2, 1x2 or 1x2x2.",
        show_default=False,
        rich_help_panel=_ATTENTION,
    ),
]
Share = Annotated[
    int | None,
    typer.Option(
        "--share",
        parser=number("--share", int),
        metavar="COUNT",
        help="For x and bx: how many group coordinates must be equal.",
        show_default=False,
        rich_help_panel=_ATTENTION,
    ),
]
SetItems = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any value of the preset, such as schedule.dense_steps=0.1; may be repeated.",
        show_default=False,
        rich_help_panel=_ATTENTION,
    ),
]
Guard = Annotated[
    float | None,
    typer.Option(
        "--guard",
        parser=number("--guard", float),
        metavar="SHARE",
        help="How much of full attention each layer has to keep, such as 0.9: those that are measured to keep less "
        "go wider while the run goes on. 0 for none. Default: the preset's.",
        show_default=False,
        rich_help_panel=_ATTENTION,
    ),
]
BackendChoice = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="auto, reference, sdpa, flex, triton, triton-ws or gluon. "
        "One that is named runs or says why not (see grat env).",
        show_default=False,
        rich_help_panel=_ATTENTION,
        autocompletion=complete_backend,
    ),
]

# Model
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="demo, flux-dev, flux-schnell, a Hub id, a folder or a .safetensors file. "
        "Default: flux-dev with a CUDA device, else demo.",
        show_default=False,
        rich_help_panel=_MODEL,
        autocompletion=complete_model,
    ),
]
VideoModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="demo, hunyuan, a Hub id, a folder or a .safetensors file. "
        "Default: hunyuan with a CUDA device, else demo.",
        show_default=False,
        rich_help_panel=_MODEL,
        autocompletion=complete_video_model,
    ),
]
DecodeModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="The model whose autoencoder decodes. Default: the one that made the latents.",
        show_default=False,
        rich_help_panel=_MODEL,
        autocompletion=complete_video_model,
    ),
]
DecodeDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1 or mps. Default: as for the latents.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DecodeDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="auto, float32, bfloat16 or float16. Default: as for the latents.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Folder or Hub id with the text encoders and autoencoder for a .safetensors --model.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.", show_default=False, rich_help_panel=_MODEL
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="auto, float32, bfloat16 or float16.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        "--offload",
        metavar="HOW",
        help="none, model, group or sequential: which weights wait in main memory until they are needed; "
        "auto: the fastest that fits.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        "--quantize",
        metavar="HOW",
        help="none, int8, fp8 (with torchao) or nf4 (with bitsandbytes): fewer bits for weights of transformer and "
        "large text encoder, on CUDA devices.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="Plan for h200, h100, a100-80, a100-40, 5090, 4090, l40s and others, or cpu, which is measured. "
        "Default: the GPU of this machine.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]

# Output
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="PATH",
        help="File or folder to write to. Default: a telling name in the current folder.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="mp4, gif, webm or frames (a folder of PNG files). Default: as --out ends, else mp4.",
        show_default=False,
        rich_help_panel=_OUTPUT,
        autocompletion=complete_format,
    ),
]
PictureFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="png, jpg, webp or tiff. Default: as --out ends, else png.",
        show_default=False,
        rich_help_panel=_OUTPUT,
        autocompletion=complete_picture_format,
    ),
]
PreviewEvery = Annotated[
    int | None,
    typer.Option(
        "--preview",
        parser=number("--preview", int),
        metavar="STEPS",
        help="Every so many steps, write a small picture of where it is to NAME.preview.png; removed at the end.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Quality = Annotated[
    int | None,
    typer.Option(
        "--quality",
        parser=number("--quality", int),
        metavar="NUMBER",
        help="Of jpg and webp: 1 (smallest) to 100 (best). Default: 95, 90 for webp.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Crf = Annotated[
    int | None,
    typer.Option(
        "--crf",
        parser=number("--crf", int),
        metavar="NUMBER",
        help="Quality of mp4 and webm; smaller is better and larger. Default: 18, 24 for webm.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
SaveLatents = Annotated[
    bool,
    typer.Option("--save-latents", help="Keep the latents beside the video, for grat decode.", rich_help_panel=_OUTPUT),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-every",
        parser=number("--checkpoint-every", int),
        metavar="STEPS",
        help="Keep what is done beside the video, for grat resume; 0 for never. "
        "Default: about every two minutes of runs planned over five.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Tile = Annotated[
    int | None,
    typer.Option(
        "--tile",
        parser=number("--tile", int),
        metavar="PIXELS",
        help="Side of the tiles that are decoded one by one; smaller ones take less memory. Default: 256.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=_OUTPUT)]
NoMetadata = Annotated[
    bool,
    typer.Option("--no-metadata", help="Keep prompt and settings out of the file itself.", rich_help_panel=_OUTPUT),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but the result's names.", rich_help_panel=_OUTPUT)]
# Read by app.run, because a mistake among the other options must already obey it.
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.", rich_help_panel=_OUTPUT)]
