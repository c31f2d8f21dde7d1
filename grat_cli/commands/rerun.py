"""`grat rerun`: a picture or video once more, from what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, as_then, option

if TYPE_CHECKING:
    from grat_cli.families.base import Medium, PictureKind
    from grat_cli.generation.repeating import Repeatable
    from grat_cli.generation.stored import StoredRequest

_OUTPUTS: Mapping[Medium, str] = {"image": "pictures", "video": "videos"}
_KINDS: Mapping[str, PictureKind] = {"init_image": "start", "mask": "mask", "control": "control"}


def rerun(
    context: typer.Context,
    file: Annotated[Path, argument("FILE", "A picture or video by grat, or its report.")],
    *,
    prompt: str | None = option("PROMPT", "What it shows. Default: as then.", options.PICTURE, is_text=True),
    extent: Annotated[options.SizeOptions, as_then()],
    sampling: Annotated[options.SamplingOptions, as_then()],
    pictures: Annotated[
        options.PictureOptions,
        as_then(
            init_image="A picture to start from, or a video's first frame; it and the other pictures of then are found "
            "by their names, beside FILE and in this folder."
        ),
    ],
    highres: str | None = options.HIGHRES,
    attention: Annotated[options.AttentionOptions, as_then()],
    model: Annotated[options.ModelOptions, as_then(model=options.EITHER_MODEL)],
    ranks: options.ParallelOptions,
    preview: int | None = options.PREVIEW,
    out: Path | None = options.OUT,
    format: str | None = option(
        "NAME", "As for grat image and grat video. Default: as --out ends, else as then.", options.OUTPUT
    ),
    quality: int | None = options.QUALITY,
    crf: int | None = options.CRF,
    keeping: options.KeepingOptions,
    overwrite: bool = options.OVERWRITE,
    no_metadata: bool = options.NO_METADATA,
    terminal: options.TerminalOptions,
) -> None:
    """Make a picture or video once more, to the same pixels, or with other options."""
    from grat_cli.commands import making
    from grat_cli.commands.ranks import leave_to_others
    from grat_cli.errors import BadInput
    from grat_cli.files import formats
    from grat_cli.generation.repeating import read_repeatable
    from grat_cli.generation.seeds import resolve_seeds
    from grat_cli.generation.selection import mismatch_note, require_choice
    from grat_cli.models.catalogue import KNOWN_MODELS
    from grat_cli.models.video_size import parse_size
    from grat_cli.presets import HIGHRES_MODES

    leave_to_others(context, ranks)
    output = terminal.output()

    # 1. What can be refused without looking at any model.
    require_choice("--highres", highres, HIGHRES_MODES)
    if preview is not None and preview < 1:
        raise BadInput(f"--preview {preview}: expected a number of steps, such as --preview 5")
    if prompt is not None and not prompt.strip():
        raise BadInput("--prompt is empty: leave it out for the one then")
    repeatable = read_repeatable(file)
    stored, told = repeatable.stored, repeatable.told
    machine = _filled(model, stored)
    machine.check()
    _refuse_other_medium(
        repeatable,
        {
            "image": {
                **{"--highres": highres, "--mask": pictures.mask, "--control": pictures.control},
                **{"--reference": pictures.reference, "--strength": pictures.strength},
                **{"--preview": preview, "--quality": quality},
            },
            "video": {f"--{name}": value for name, value in vars(extent).items() if name != "res"} | {"--crf": crf},
        },
    )
    seeds = resolve_seeds(str(told.seed) if sampling.seed is None else sampling.seed, sampling.n)

    # 2. What was asked for then, with what is to be different now.
    choice = repeatable.model(model.model, repeatable.base(model.base))
    of = choice if model.model is None else KNOWN_MODELS[stored.medium].get(stored.model.name)
    chosen = attention.preset_for(choice, sampling, highres, then=(stored.preset, of))
    size = parse_size(choice, *_size(stored, extent))
    found = repeatable.pictures(
        {
            **{"start": _one(pictures.init_image), "mask": _one(pictures.mask), "control": _one(pictures.control)},
            "reference": pictures.reference or (),
        }
    )
    given = {
        "strength": stored.strength if pictures.strength is None else pictures.strength,
        **{name: next(iter(found.get(kind, ())), None) for name, kind in _KINDS.items()},
        "reference": found.get("reference"),
    }
    pictures = options.PictureOptions(**given)
    pictures.check()
    chosen_format, suffix = formats.choose_format(stored.medium, out, formats.kept_format(out, format, stored.format))
    encoding = crf if quality is None else quality
    same_encoding = encoding is None and chosen_format == stored.format
    request, runs = making.planned_request(
        choice,
        chosen,
        size,
        machine,
        format=chosen_format,
        quality=stored.quality if same_encoding else encoding,
        checkpoint_every=keeping.checkpoint_every,
        negative=stored.negative_prompt if sampling.negative is None else sampling.negative,
        pictures=pictures,
    )
    request = replace(
        request,
        prompt=stored.prompt if prompt is None else prompt,
        seeds=seeds,
        weights=repeatable.weights(model.weights),
        preview_every=preview or 0,
        save_latents=keeping.save_latents,
        metadata=not no_metadata,
        overwrite=overwrite,
        command=options.command_line(context),
    )

    # 3. Where the outputs go, and whether they fit.
    request = making.placed(request, out, suffix, never=file)
    making.refuse_unfit(request, size, ranks)

    # 4. What they will be, and what is no more as it was.
    from grat_cli.generation.run import compute_on
    from grat_cli.models.devices import choose_device, choose_dtype

    output.hint(f"{choice.name}, {request.title}, {sum(run.schedule.steps for run in runs)} steps")
    output.hint(*getattr(size, "notes", ()))
    output.hint(f"{chosen.name}: {chosen.attention.summary}")
    output.hint(mismatch_note(chosen, choice))
    output.hint(f"seed {', '.join(map(str, seeds))}")
    device = choose_device(request.device)
    dtype = str(choose_dtype(request.dtype, device)).removeprefix("torch.")
    output.hint(*repeatable.differences(choice, request.weights, device, dtype))
    compute_on(told.device.threads, device)

    # 5. Make them, one by one; each is written as soon as it is done.
    making.make(request, output, ranks)


def _one(path: Path | None) -> Sequence[Path]:
    return () if path is None else (path,)


def _refuse_other_medium(repeatable: Repeatable, of_one: Mapping[Medium, Mapping[str, Any]]) -> None:
    """Raises BadInput for an option that suits another medium alone than the output's.

    Args:
        repeatable: the output.
        of_one: options that suit one alone, with what was given for them or None.
    """
    from grat_cli.errors import BadInput

    for medium, given in of_one.items():
        for flag, value in given.items():
            if value is not None and medium != repeatable.stored.medium:
                raise BadInput(f"{flag} is for {_OUTPUTS[medium]}, and {repeatable.file} is none: leave it out")


def _filled(model: options.ModelOptions, stored: StoredRequest) -> options.ModelOptions:
    """On what and how it runs: as given, else as then; what is said elsewhere has its default."""
    left = [each for each in fields(model) if getattr(model, each.name) in (None, False) and each.name != "model"]
    return replace(model, **{each.name: getattr(stored, each.name, each.default) for each in left})


def _size(stored: StoredRequest, extent: options.SizeOptions) -> tuple[Any, ...]:
    """As then, but for what is given; as `parse_size` takes it."""
    res = f"{stored.width}x{stored.height}" if extent.res is None and extent.aspect is None else extent.res
    frames = stored.frames if extent.frames is None and extent.seconds is None else extent.frames
    return res, extent.aspect, extent.seconds, frames, stored.fps if extent.fps is None else extent.fps
