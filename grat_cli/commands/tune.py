"""`grat tune`: a preset fitted to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grat_cli.commands import options
from grat_cli.console.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grat_cli.presets import Evidence


def tune(
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="COUNT|FILE",
            help="Prompts to observe the model with: so many of the built-in ones, or a text file with one on each "
            "line. Four to eight are enough.",
            show_default=False,
        ),
    ],
    target_density: Annotated[
        float | None,
        typer.Option(
            "--target-density",
            parser=options.number("--target-density", float),
            metavar="SHARE",
            help="Attended pairs over all pairs, text included, as grat plan gives it: 0.15.",
            show_default=False,
            rich_help_panel="Target",
        ),
    ] = None,
    target_recall: Annotated[
        float | None,
        typer.Option(
            "--target-recall",
            parser=options.number("--target-recall", float),
            metavar="SHARE",
            help="Softmax mass of full attention on what is attended token by token: 0.8.",
            show_default=False,
            rich_help_panel="Target",
        ),
    ] = None,
    check: Annotated[
        int,
        typer.Option(
            "--check",
            parser=options.number("--check", int),
            metavar="COUNT",
            help="Compare so many outputs of the preset with those of full attention, of other seeds and, where the "
            "built-in prompts go as far, other prompts. Default: 4.",
            show_default=False,
            rich_help_panel="Target",
        ),
    ] = "4",  # pyright: ignore[reportArgumentType]
    stretches: Annotated[
        int,
        typer.Option(
            "--stretches",
            parser=options.number("--stretches", int),
            metavar="COUNT",
            help="Parts of the run that choose by themselves. Default: 4.",
            show_default=False,
            rich_help_panel="Observation",
        ),
    ] = "4",  # pyright: ignore[reportArgumentType]
    rows: Annotated[
        int,
        typer.Option(
            "--rows",
            parser=options.number("--rows", int),
            metavar="COUNT",
            help="Queries drawn at each transformer call. Default: 64.",
            show_default=False,
            rich_help_panel="Observation",
        ),
    ] = "64",  # pyright: ignore[reportArgumentType]
    observations: Annotated[
        Path | None,
        typer.Option(
            "--observations",
            metavar="FOLDER",
            help="Where observations are kept: a run that was broken off goes on, and another target takes no new "
            "runs. Default: one named after model and size in the current folder.",
            show_default=False,
            rich_help_panel="Observation",
        ),
    ] = None,
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
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="A preset whose groups and sampling are kept. Default: that of --variant b.",
            show_default=False,
            rich_help_panel="Attention",
            autocompletion=options.complete_preset,
        ),
    ] = None,
    group: options.Group = None,
    set_items: options.SetItems = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="As for grat image and grat video; demo with --frames or --seconds makes a video. "
            "Default: flux-dev with a CUDA device, else demo.",
            show_default=False,
            rich_help_panel="Model",
            autocompletion=options.complete_any_model,
        ),
    ] = None,
    device: options.DeviceName = "auto",
    dtype: options.Dtype = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.yaml",
            help="The preset. Default: a file in the current folder, named after family and target.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fit a preset to a model: the pattern of each layer, head and stretch of steps, for a density or recall."""
    from grat_cli.errors import BadInput
    from grat_cli.fidelity.palette import palette
    from grat_cli.fidelity.prompts import chosen_prompts
    from grat_cli.files import outputs
    from grat_cli.generation.selection import DTYPES, choose_medium, require_choice, require_device, select_preset
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.resolution import parse_resolution
    from grat_cli.models.video_size import parse_video_size
    from grat_cli.presets import load_preset, preset_yaml

    output = Output(as_json=as_json, quiet=quiet)

    # 1. What can be refused without looking at any model.
    if (target_density is None) == (target_recall is None):
        raise BadInput("give one target: --target-density 0.15 or --target-recall 0.8")
    for option, value in (("--target-density", target_density), ("--target-recall", target_recall)):
        if value is not None and not 0 < value <= 1:
            raise BadInput(f"{option} {value:g}: expected a share above 0 and up to 1")
    for option, count, least in (("--check", check, 0), ("--stretches", stretches, 1), ("--rows", rows, 2)):
        if count < least:
            raise BadInput(f"{option} {count}: expected {least} or more")
    require_device(device)
    require_choice("--dtype", dtype, DTYPES)

    # 2. Model, size and patterns.
    family = load_preset(preset).model if preset is not None else None
    medium = choose_medium(model, family, any(option is not None for option in (aspect, seconds, frames)))
    choice = choose_model("demo" if model is None and family == "demo" else model, medium)
    # Only groups and sampling are kept of it; a far field of its own might not fit other groups.
    chosen = select_preset(
        choice,
        preset=preset,
        variant=None if preset else "b",
        group=group,
        steps=steps,
        guidance=guidance,
        set_items=set_items or (),
    )
    size: Any = (
        parse_resolution(res, choice.native_side, choice.size_multiple)
        if medium == "image"
        else parse_video_size(res, aspect, seconds, frames, None, choice)
    )
    target = f"d{target_density:g}" if target_density is not None else f"r{target_recall:g}"
    file = out or Path(f"{choice.presets}-tuned-{target}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise BadInput(f"--out {file}: presets are YAML files: use {file.with_suffix('.yaml')}")
    outputs.refuse_unwritable([file], overwrite=overwrite)

    # 3. Observe, choose, check.
    from grat_cli.fidelity.tuning import TuneRequest, tune
    from grat_cli.generation.makers import request_for

    built_in = _built_in(medium)
    observed = chosen_prompts(prompts, built_in, "prompts")
    fresh = [prompt for prompt in built_in if prompt not in observed] if prompts.isdigit() else []
    frames_asked = getattr(size, "frames", None)
    extent = f"{size.width}x{size.height}" + (f"x{frames_asked}" if frames_asked else "")
    request = TuneRequest(
        request=request_for(
            choice,
            chosen,
            observed[0],
            width=size.width,
            height=size.height,
            frames=frames_asked,
            device=device,
            dtype=dtype,
        ),
        prompts=observed,
        candidates=palette(chosen.attention.group),
        density=target_density,
        recall=target_recall,
        checked=tuple((fresh + list(observed) * check)[:check]),
        stretches=stretches,
        rows=rows,
        folder=observations or Path(f"grat-tune-{choice.name.replace('/', '-')}-{extent}"),
        name=file.stem,
    )
    output.hint(f"{choice.name} ({choice.reason}), {size}, {chosen.sampling.steps} steps")
    for note in getattr(size, "notes", ()):
        output.hint(note)
    output.hint(f"{len(request.candidates)} patterns of groups of {'x'.join(map(str, chosen.attention.group))}")
    with output.progress() as progress:
        fitted = tune(request, progress)

    # 4. Write and show.
    outputs.write_text(preset_yaml(fitted), file)
    evidence = fitted.evidence
    assert evidence is not None, "a tuned preset has its evidence"
    output.data({"preset": str(file), "observations": str(request.folder), **evidence.model_dump(mode="json")})
    output.show(_patterns(evidence), "", _sentence(evidence))
    output.hint(f"{request.folder} keeps what was observed: another target takes no new runs; remove it when done")
    output.line(str(file))


def _built_in(medium: str) -> tuple[str, ...]:
    if medium == "video":
        from grat_cli.bench import video_level

        return video_level.PROMPTS
    from grat_cli.bench import image_level

    return image_level.PROMPTS


def _patterns(evidence: Evidence) -> RenderableType:
    """The patterns in use."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("pattern", overflow="fold")
    for name in ("used", "density", "recall", "output error"):
        table.add_column(name, justify="right", no_wrap=True)
    for pattern in evidence.patterns:
        figures = (f"{pattern.density:.3f}", f"{pattern.recall:.3f}", f"{pattern.output_error:.3f}")
        table.add_row(pattern.attention, f"{pattern.share:.0%}", *figures)
    whole = (f"{evidence.density:.3f}", f"{evidence.recall:.3f}", f"{evidence.output_error:.3f}")
    table.add_row("all of them, as chosen", "", *whole, style="bold")
    return table


def _sentence(evidence: Evidence) -> str:
    words = f"Foretold: density {evidence.density:.3f}, recall {evidence.recall:.3f}."
    check = evidence.check
    if check is None:
        return words
    interval = "" if check.ssim_interval is None else f" ± {check.ssim_interval:.3f}"
    return (
        f"{words} Measured over {len(check.prompts)} outputs: density {check.density:.3f}, "
        f"SSIM to full attention {check.ssim:.3f}{interval}, PSNR {check.psnr_db:.1f} dB."
    )
