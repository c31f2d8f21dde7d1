"""`grat batch`: many prompts with one loaded model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grat_cli.commands import options
from grat_cli.console.output import Output

if TYPE_CHECKING:
    from grat_cli.estimates.planning import Forecast
    from grat_cli.files.pictures import PictureFormat
    from grat_cli.generation.image_request import ImageRequest
    from grat_cli.generation.video_request import VideoRequest
    from grat_cli.models.catalogue import Medium, ModelChoice
    from grat_cli.presets import Preset

_FAILURES_NAMED = 3


def batch(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Prompts: .txt with one per line, .jsonl with an object per line, or .json with a list of them "
            "(prompt; if wanted negative, seed, n; other keys are kept).",
            show_default=False,
        ),
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="NAME",
            help="plain: grat's own names; geneval, vbench: the folders that these evaluators read.",
            show_default=False,
            rich_help_panel="Output",
            autocompletion=options.complete_layout,
        ),
    ] = "plain",
    res: Annotated[
        str | None,
        typer.Option(
            "--res",
            metavar="SIZE",
            help="As for grat image and grat video. Default: the model's own size.",
            show_default=False,
            rich_help_panel="Picture",
        ),
    ] = None,
    aspect: options.Aspect = None,
    seconds: options.Seconds = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            parser=options.number("--seed", int),
            metavar="SEED",
            help="Of the first sample of each prompt; the next ones take the seeds that follow. Default: 0.",
            show_default=False,
            rich_help_panel="Picture",
        ),
    ] = 0,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            parser=options.number("--n", int),
            metavar="COUNT",
            help="Samples of each prompt. Default: 1; 4 for geneval, 5 for vbench.",
            show_default=False,
            rich_help_panel="Picture",
        ),
    ] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = None,
    highres: options.Highres = None,
    preset: options.PresetName = None,
    variant: options.VariantName = None,
    group: options.Group = None,
    radius: options.Radius = None,
    share: options.Share = None,
    guard: options.Guard = None,
    set_items: options.SetItems = None,
    backend: options.BackendChoice = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="As for grat image and grat video. Default: flux-dev, or hunyuan for videos, with a CUDA device, "
            "else demo.",
            show_default=False,
            rich_help_panel="Model",
            autocompletion=options.complete_any_model,
        ),
    ] = None,
    base: options.Base = None,
    device: options.DeviceName = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = "none",
    quantize: options.Quantize = "none",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Where to write. Default: the current folder; for geneval and vbench one named after FILE.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="png, jpg, webp or tiff; of videos mp4, gif, webm or frames. Default: png, mp4.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    quality: options.Quality = None,
    crf: options.Crf = None,
    checkpoint_every: options.CheckpointEvery = None,
    overwrite: options.Overwrite = False,
    no_metadata: options.NoMetadata = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make pictures or videos of many prompts; typed again, it goes on with what is missing."""
    from grat_cli.errors import BadInput, NumericalFailure
    from grat_cli.files import outputs as media
    from grat_cli.files.pictures import choose_picture_format
    from grat_cli.files.prompts import read_prompts
    from grat_cli.generation.batch import Batch, Failure, make_samples, missing
    from grat_cli.generation.batch_layout import LAYOUTS, lay_out
    from grat_cli.generation.seeds import LARGEST_SEED, MOST_PICTURES
    from grat_cli.generation.selection import (
        DTYPES,
        mismatch_note,
        require_choice,
        require_device,
        select_preset,
        variant_word,
    )
    from grat_cli.generation.video_request import VideoRequest
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.offloading import OFFLOADS
    from grat_cli.models.quantization import QUANTIZATIONS
    from grat_cli.presets import HIGHRES_MODES

    output = Output(as_json=as_json, quiet=quiet)

    # 1. What can be refused without looking at any model.
    chosen_layout = LAYOUTS[require_choice("--layout", layout, tuple(LAYOUTS))]
    require_device(device)
    require_choice("--dtype", dtype, DTYPES)
    require_choice("--offload", offload, OFFLOADS)
    require_choice("--quantize", quantize, QUANTIZATIONS)
    if not 0 <= seed <= LARGEST_SEED:
        raise BadInput(f"--seed {seed}: seeds go from 0 to {LARGEST_SEED}")
    if n is not None and not 1 <= n <= MOST_PICTURES:
        raise BadInput(f"--n {n}: expected 1 to {MOST_PICTURES} samples")
    if out is not None and (out.is_file() or out.suffix.lower() in media.OUTPUT_SUFFIXES):
        raise BadInput(f"--out {out}: a batch goes into a folder: use --out {out.with_suffix('')}")
    if highres is not None:
        require_choice("--highres", highres, HIGHRES_MODES)
    entries = read_prompts(file)

    # 2. Model, preset, size; whether they fit one another and this machine.
    of_pictures = {"--highres": highres, "--quality": quality}
    of_videos = {
        "--aspect": aspect,
        "--seconds": seconds,
        "--frames": frames,
        "--fps": fps,
        "--crf": crf,
        "--checkpoint-every": checkpoint_every,
    }
    medium = _medium(chosen_layout.medium, chosen_layout.name, model, of_pictures, of_videos)
    choice = choose_model(model, medium)
    chosen = select_preset(
        choice,
        preset=preset,
        variant=variant,
        group=group,
        radius=radius,
        share=share,
        guard=guard,
        backend=backend,
        steps=steps,
        guidance=guidance,
        highres=highres,
        set_items=set_items or (),
    )
    output.hint(f"{choice.name} ({choice.reason}), {chosen.name}: {chosen.attention.summary}")
    if note := mismatch_note(chosen, choice):
        output.hint(note)
    if format is not None and chosen_layout.formats and format not in chosen_layout.formats:
        raise BadInput(f"--layout {layout} takes {' or '.join(chosen_layout.formats)} files, not {format}")
    machine = _Machine(device, dtype, offload, quantize, base)
    command = shlex.join(["grat", *(context.find_root().obj or ())])
    if medium == "image":
        picture_format = choose_picture_format(None, format)
        suffix = picture_format.suffixes[0]
        template = _picture_template(choice, chosen, machine, output, res=res, format=picture_format, quality=quality)
    else:
        size = res, aspect, seconds, frames, fps
        picture_format = None
        template, suffix = _video_template(
            choice, chosen, machine, output, size=size, format=format, crf=crf, every=checkpoint_every, command=command
        )

    # 3. Where everything goes, and what is there already.
    now, word = datetime.now().astimezone(), variant_word(chosen)
    title = template.size if isinstance(template, VideoRequest) else f"{template.width}x{template.height}"
    folder = out or (Path() if chosen_layout.name == "plain" else Path(f"{file.stem}-{chosen_layout.name}"))
    samples = lay_out(
        entries,
        chosen_layout,
        folder,
        suffix=suffix,
        first_seed=seed,
        samples=n,
        negative=negative,
        plain_name=lambda prompt, seed: media.default_name(now, prompt, title, word, seed, suffix),
    )
    whole = Batch(
        file,
        chosen_layout,
        folder,
        samples,
        template,
        command,
        picture_format=picture_format,
        quality=quality,
        embed=not no_metadata,
    )
    left = missing(whole, overwrite=overwrite)
    there = len(samples) - len(left)
    skipped = f", {there} of them are there already" if there else ""
    output.hint(f"prompts: {len(entries)}, {medium}s: {len(samples)}{skipped}")
    if repeated := len(entries) - len({sample.entry.place for sample in samples}):
        output.hint(f"{repeated} of the prompts stand there before, with the same seed: they are made once")

    # 4. Make the others, one by one; each is written as soon as it is done.
    made, failures = [], []
    with output.progress() as progress:
        if left:
            _note_expectations(template, [sample.entry.prompt for sample in left], progress)
        for result in make_samples(whole, left, progress):
            if isinstance(result, Failure):
                failures.append(result)
                progress.note(f"{result.sample.output.name} failed: {result.reason}")
                continue
            made.append(result[0])
            output.line(str(result[0].output))

    # 5. What came of it.
    output.data(
        {
            "layout": chosen_layout.name,
            "folder": str(folder / chosen_layout.folder),
            "made": [_sample_data(sample) for sample in made],
            "skipped": there,
            "failed": [{**_sample_data(failure.sample), "reason": failure.reason} for failure in failures],
        }
    )
    output.show(f"{len(made)} made, {there} there before, {len(failures)} failed, in {folder / chosen_layout.folder}")
    for failure in failures:
        output.show(f"failed: {failure.sample.entry.prompt} (seed {failure.sample.seed}): {failure.reason}")
    if failures:
        names = ", ".join(str(failure.sample.output) for failure in failures[:_FAILURES_NAMED])
        more = f" and {len(failures) - _FAILURES_NAMED} more" if len(failures) > _FAILURES_NAMED else ""
        raise NumericalFailure(
            f"{len(failures)} of {len(left)} failed: {names}{more}\n"
            "the same command tries these again; try --dtype float32 or bfloat16, or another --backend"
        )


@dataclass(frozen=True)
class _Machine:
    """On what and how everything runs."""

    device: str
    dtype: str
    offload: str
    quantize: str
    base: str | None


def _medium(
    of_layout: Medium | None,
    layout: str,
    model: str | None,
    of_pictures: Mapping[str, Any],
    of_videos: Mapping[str, Any],
) -> Medium:
    """Whether pictures or videos are meant: as the layout says, else the model's name, else the options.

    Raises:
        BadInput: if these contradict one another.
    """
    from grat_cli.errors import BadInput
    from grat_cli.models.catalogue import medium_of_name

    given = [option for option, value in of_videos.items() if value is not None]
    named = medium_of_name(model) if model else None
    medium: Medium = of_layout or named or ("video" if given else "image")
    if named not in (None, medium):
        raise BadInput(f"--layout {layout} is for {medium}s, and {model} makes {named}s: give another --model")
    if medium == "video":
        given = [option for option, value in of_pictures.items() if value is not None]
    if given:
        other = "pictures" if medium == "video" else "videos"
        raise BadInput(f"{given[0]} is for {other}, and these are {medium}s: leave it out")
    return medium


def _picture_template(
    choice: ModelChoice,
    chosen: Preset,
    machine: _Machine,
    output: Output,
    *,
    res: str | None,
    format: PictureFormat,
    quality: int | None,
) -> ImageRequest:
    """What is made of each prompt.

    Raises:
        BadInput, OutOfMemory: if it cannot be made here.
    """
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import architecture_for, schedule_for_stage, stage_forecasts
    from grat_cli.estimates.stages import stages_of
    from grat_cli.files.pictures import require_writable
    from grat_cli.generation.image_request import ImageRequest
    from grat_cli.generation.selection import require_backend
    from grat_cli.models.catalogue import is_known
    from grat_cli.models.resolution import parse_resolution

    size = parse_resolution(res, choice.native_side, choice.size_multiple)
    require_writable(format, size.width, size.height, quality)
    stages = stages_of(chosen, choice, size.width, size.height)
    if is_known(choice):  # of other models only the checkpoint knows the layers
        architecture = architecture_for(choice)
        tokens = schedule_for_stage(stages[-1], architecture).plans[0].tokens
        require_backend(chosen.kernel.backend, machine.device, machine.dtype, architecture.head_dim, tokens)

    def forecasts(size: Any, in_dtype: str) -> list[Forecast]:
        parts = stages_of(chosen, choice, size.width, size.height)
        return stage_forecasts(parts, choice.name, architecture_for(choice), in_dtype)

    refuse_unfit_here(
        choice,
        forecasts,
        size,
        device=machine.device,
        dtype=machine.dtype,
        offload=machine.offload,
        quantize=machine.quantize,
    )
    if len(stages) == 1:
        output.hint(f"{size}, {stages[0].steps} steps")
    else:
        output.hint(f"stages: {', '.join(f'{stage.size} ({stage.steps} steps)' for stage in stages)}")
    return ImageRequest(
        "",
        chosen,
        choice,
        size.width,
        size.height,
        (),
        device=machine.device,
        dtype=machine.dtype,
        offload=machine.offload,
        quantize=machine.quantize,
        base=machine.base,
    )


def _video_template(
    choice: ModelChoice,
    chosen: Preset,
    machine: _Machine,
    output: Output,
    *,
    size: tuple[str | None, str | None, float | None, int | None, int | None],
    format: str | None,
    crf: int | None,
    every: int | None,
    command: str,
) -> tuple[VideoRequest, str]:
    """What is made of each prompt, and the suffix of the files.

    Args:
        choice: the model.
        chosen: the preset.
        machine: on what.
        output: told the size and the planned time.
        size: `--res`, `--aspect`, `--seconds`, `--frames` and `--fps` as typed.
        format: `--format`.
        crf: `--crf`.
        every: `--checkpoint-every`.
        command: the command line as typed.

    Raises:
        BadInput, OutOfMemory: if it cannot be made here.
    """
    from grat_cli.commands import video_output
    from grat_cli.console.progress import duration
    from grat_cli.errors import BadInput
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import architecture_for, forecast
    from grat_cli.estimates.time import planned_seconds
    from grat_cli.files.videos import SUFFIXES, choose_video_format, require_encodable
    from grat_cli.generation.selection import require_backend
    from grat_cli.generation.video_request import VideoRequest
    from grat_cli.models.video_size import parse_video_size

    if every is not None and every < 0:
        raise BadInput(f"--checkpoint-every {every}: expected steps, 0 for none")
    video_format = choose_video_format(None, format)
    parsed = parse_video_size(*size, choice)
    architecture = architecture_for(choice)
    expected = forecast(chosen, choice.name, architecture, parsed, machine.dtype)
    tokens = expected.main_plan.tokens
    require_backend(chosen.kernel.backend, machine.device, machine.dtype, architecture.head_dim, tokens)
    require_encodable(video_format, fps=parsed.fps, crf=crf)
    refuse_unfit_here(
        choice,
        lambda size, in_dtype: [forecast(chosen, choice.name, architecture, size, in_dtype)],
        parsed,
        device=machine.device,
        dtype=machine.dtype,
        offload=machine.offload,
        quantize=machine.quantize,
    )
    for note in parsed.notes:
        output.hint(note)
    planned = planned_seconds(expected, machine.device, machine.dtype)
    steps = chosen.sampling.steps
    output.hint(f"{parsed}, {parsed.fps} frames per second, {steps} steps: about {duration(planned)} each, as planned")
    request = VideoRequest(
        "",
        chosen,
        choice,
        parsed.width,
        parsed.height,
        (),
        device=machine.device,
        dtype=machine.dtype,
        offload=machine.offload,
        quantize=machine.quantize,
        base=machine.base,
        frames=parsed.frames,
        fps=parsed.fps,
        outputs=(),
        format=video_format,
        crf=crf,
        checkpoint_every=video_output.checkpoint_interval(planned, steps) if every is None else every,
        command=command,
    )
    return request, SUFFIXES[video_format]


def _note_expectations(template: ImageRequest | VideoRequest, prompts: list[str], progress: Any) -> None:
    """Says beforehand what the model cannot make of any prompt."""
    from dataclasses import replace

    from grat_cli.generation import image_request, video_request
    from grat_cli.generation.video_request import VideoRequest

    words = " ".join(dict.fromkeys(" ".join(prompts).split()))
    if isinstance(template, VideoRequest):
        video_request.note_expectations(replace(template, prompt=words), progress)
    else:
        image_request.note_expectations(replace(template, prompt=words), progress)


def _sample_data(sample: Any) -> dict[str, Any]:
    prompt, negative, seed = sample.asked
    return {
        "file": str(sample.output),
        "report": str(sample.report),
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": seed,
    }
