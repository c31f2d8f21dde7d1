"""`grat bench`: full attention against sparse attention, measured."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.console.output import Output

_WHAT, _SIZE, _HOW = "What", "Size", "How"


def complete_compare(incomplete: str) -> list[str]:
    """The list so far with each name that may follow, for shell completion."""
    from grat_cli.fidelity.variants import NAMES, SHORT_NAMES
    from grat_cli.presets import preset_names

    return _continued(incomplete, (*NAMES, *SHORT_NAMES, *preset_names()))


def complete_peers(incomplete: str) -> list[str]:
    """Likewise for --peers."""
    from grat_cli.fidelity.variants import PEERS

    return _continued(incomplete, PEERS)


def complete_level() -> list[str]:
    """Names of levels, for shell completion."""
    from grat_cli.bench.request import LEVELS

    return list(LEVELS)


def complete_weights() -> list[str]:
    """Kinds of weights, for shell completion."""
    from grat_cli.bench.request import WEIGHTS

    return list(WEIGHTS)


def _continued(incomplete: str, names: tuple[str, ...]) -> list[str]:
    done, comma, begun = incomplete.rpartition(",")
    taken = done.split(",")
    return [f"{done}{comma}{name}" for name in names if name.startswith(begun) and name not in taken]


def bench(
    context: typer.Context,
    level: Annotated[
        str,
        typer.Option(
            "--level",
            metavar="NAME",
            help="attention: one call on random numbers. step: one denoising step of a real architecture. "
            "image and video: whole runs, and how close they come to those of full attention. "
            "highres: pictures beyond the trained size, from noise and by the cascade, against the small ones.",
            rich_help_panel=_WHAT,
            autocompletion=complete_level,
        ),
    ] = "attention",
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="NAME,...",
            help="full, full-list, na, clear, sta, grat-b, grat-x, grat-bx, grat-far, also with parameters: "
            "grat-b:radius=2, na:window=49, grat-x:share=2, grat-far:block=8x8:group=16x16. Short for some: "
            "b, x, bx, far, and for videos planes and lines. For attention also grat-heads, for heads that differ. "
            "For image and video also presets, by name or from a YAML file, with their schedules. "
            "For highres: off, direct, cascade. Default: full,na,grat-b for attention.",
            show_default=False,
            rich_help_panel=_WHAT,
            autocompletion=complete_compare,
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers",
            metavar="NAME,...",
            help="Other projects' kernels, where they are installed: natten, flex, flashinfer, sage, pisa.",
            show_default=False,
            rich_help_panel=_WHAT,
            autocompletion=complete_peers,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="For step, image, video and highres. Default: as for grat image and grat video.",
            show_default=False,
            rich_help_panel=_WHAT,
            autocompletion=options.complete_any_model,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="COUNT|FILE",
            help="For image, video and highres: so many of the built-in prompts, or a text file with one on each "
            "line. Default: 4 for pictures, 3 for videos.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="For highres: a preset by name or from a YAML file. Default: demo-4x or flux-4k.",
            show_default=False,
            rich_help_panel=_WHAT,
            autocompletion=options.complete_preset,
        ),
    ] = None,
    res: Annotated[
        str | None,
        typer.Option(
            "--res",
            metavar="SIZE,...",
            help="Pixels, as for grat image: 4096 or 4096x2048, several with commas. For video 720p or 1280x720.",
            show_default=False,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames",
            parser=options.number("--frames", int),
            metavar="COUNT",
            help="For video: frames of each. Default: as many as the model was trained at.",
            show_default=False,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            "--grid",
            metavar="TOKENS,...",
            help="Image tokens per axis: 128x128, or 33x45x80 for a video, several with commas. "
            "Default: 128x128 on a CPU, else --res 4096.",
            show_default=False,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    text: Annotated[
        int | None,
        typer.Option(
            "--text",
            parser=options.number("--text", int),
            metavar="COUNT",
            help="Text tokens. Default: 512 on two axes (Flux), 256 on three (HunyuanVideo).",
            show_default=False,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads",
            parser=options.number("--heads", int),
            metavar="COUNT",
            help="Attention heads. Default: 4 on a CPU, else 24.",
            show_default=False,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            "--head-dim",
            parser=options.number("--head-dim", int),
            metavar="CHANNELS",
            help="Channels per head. Default: 64 on a CPU, else 128.",
            show_default=False,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="DOUBLE,SINGLE",
            help="For step: so many blocks of both kinds, such as 2,4, for smaller machines. Default: the model's.",
            show_default=False,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="NAME",
            help="For step: random, or own for those that a model comes with (demo). Times do not depend on it. "
            "Default: own where there are any.",
            show_default=False,
            rich_help_panel=_WHAT,
            autocompletion=complete_weights,
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="Of grat's own attention, as for grat image.",
            show_default=False,
            rich_help_panel=_HOW,
            autocompletion=options.complete_backend,
        ),
    ] = "auto",
    reps: Annotated[
        int | None,
        typer.Option(
            "--reps",
            parser=options.number("--reps", int),
            metavar="COUNT",
            help="Timed calls of each row, after a warm-up. Default: 5; for attention on a GPU, 20.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            parser=options.number("--steps", int),
            metavar="COUNT",
            help="For image, video and highres: denoising steps. Default: the model's own.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    no_recall: Annotated[
        bool,
        typer.Option(
            "--no-recall",
            help="For image and video: leave out recall and output error, which take a further run of full attention "
            "for each of up to 4 prompts.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            "--max-seconds",
            parser=options.number("--max-seconds", float),
            metavar="SECONDS",
            help="Most time for one row; one that would take longer is skipped, and says so. "
            "Default: 60 for attention, 600 for a step, no limit for pictures and videos.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    device: options.DeviceName = "auto",
    dtype: options.Dtype = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="NAME",
            help="Where to write NAME.json, NAME.md and NAME.html; an existing folder gets a telling name. "
            "Default: one in the current folder.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure full against sparse attention: time, memory, error; a table, JSON, Markdown and a page."""
    from grat_cli.bench.files import result_paths, write_results
    from grat_cli.bench.request import BenchRequest
    from grat_cli.files import outputs

    output = Output(as_json=as_json, quiet=quiet)

    # 1. What can be refused before anything is loaded.
    request = BenchRequest(
        level=level,
        compare=compare,
        peers=peers,
        model=model,
        prompts=prompts,
        preset=preset,
        res=res,
        frames=frames,
        grid=grid,
        text=text,
        heads=heads,
        head_dim=head_dim,
        layers=layers,
        weights=weights,
        backend=backend,
        reps=reps,
        steps=steps,
        no_recall=no_recall or None,
        max_seconds=max_seconds,
        device=device,
        dtype=dtype,
        command=shlex.join(["grat", *(context.find_root().obj or ())]),
    )
    request.check()
    paths = result_paths(out, level)
    outputs.refuse_unwritable(list(paths.values()), overwrite=overwrite)

    # 2. Measure.
    from grat_cli.bench.levels import run_level

    result, sheet = run_level(request, output)

    # 3. Write and show.
    from grat_cli.bench.tables import bench_tables

    result, written = write_results(result, sheet, paths)
    output.data(result.as_dict())
    output.show(*bench_tables(result), "")
    for path in written:
        output.line(str(path))
