"""`grat bench`: full attention against sparse attention, measured."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grat_cli import options
from grat_cli.output import Output

if TYPE_CHECKING:
    from grat_cli.bench.results import BenchResult
    from grat_cli.bench.sizes import Size
    from grat_cli.bench.variants import Request
    from grat_cli.bench.whole_runs import Pictures

LEVELS = ("attention", "step", "image", "video", "highres")
WEIGHTS = ("own", "random")
_COMPARE = {
    "attention": "full,na,grat-b",
    "step": "full,grat-b,grat-far",
    "image": "full,grat-b,grat-x,grat-far",
    "video": "full,planes,lines,b,bx,far",
    "highres": "off,direct,cascade",
}
_HIGHRES = {"demo": "4x", "flux": "4k"}  # the preset of a family for pictures four times the trained side
_WHAT, _SIZE, _HOW = "What", "Size", "How"

# Flux: a token stands for 16x16 pixels, and 512 come from the text. HunyuanVideo, on three axes, takes up to 256.
_TOKEN_SIDE, _NATIVE_SIDE = 16, 1024
_TEXT_TOKENS = {2: 512, 3: 256}
# Shows the effect in a minute on two CPU cores; on a GPU, Flux at 4096x4096.
_CPU_GRID, _CPU_HEADS, _CPU_HEAD_DIM, _CPU_REPETITIONS = "128x128", 4, 64, 5
_GPU_RES, _GPU_HEADS, _GPU_HEAD_DIM, _GPU_REPETITIONS = "4096", 24, 128, 20
_MAX_SECONDS = {"attention": 60.0, "step": 600.0, "image": None, "video": None, "highres": None}

# Which options say something to which level; the others are refused rather than ignored.
_ONLY_FOR = {
    "--peers": ("attention",),
    "--heads": ("attention",),
    "--head-dim": ("attention",),
    "--grid": ("attention", "step"),
    "--text": ("attention", "step"),
    "--reps": ("attention", "step"),
    "--model": ("step", "image", "video", "highres"),
    "--layers": ("step",),
    "--weights": ("step",),
    "--prompts": ("image", "video", "highres"),
    "--frames": ("video",),
    "--steps": ("image", "video", "highres"),
    "--preset": ("highres",),
}


def complete_compare(incomplete: str) -> list[str]:
    """The list so far with each name that may follow, for shell completion."""
    from grat_cli.bench.variants import NAMES, SHORT_NAMES

    return _continued(incomplete, (*NAMES, *SHORT_NAMES))


def complete_peers(incomplete: str) -> list[str]:
    """Likewise for --peers."""
    from grat_cli.bench.variants import PEERS

    return _continued(incomplete, PEERS)


def complete_level() -> list[str]:
    """Names of levels, for shell completion."""
    return list(LEVELS)


def complete_weights() -> list[str]:
    """Kinds of weights, for shell completion."""
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
            "b, x, bx, far, and for videos planes and lines. For highres: off, direct, cascade. "
            "Default: full,na,grat-b for attention.",
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
    from grat_cli import media
    from grat_cli.bench.results import WHOLE_RUNS
    from grat_cli.bench.variants import parse_peers, parse_variants
    from grat_cli.errors import BadInput
    from grat_cli.presets import BACKENDS
    from grat_cli.selection import DTYPES, require_choice, require_device

    output = Output(as_json=as_json, quiet=quiet)

    # 1. What can be refused before anything is loaded.
    require_choice("--level", level, LEVELS)
    typed = {
        "--peers": peers,
        "--heads": heads,
        "--head-dim": head_dim,
        "--grid": grid,
        "--text": text,
        "--reps": reps,
        "--model": model,
        "--layers": layers,
        "--weights": weights,
        "--prompts": prompts,
        "--frames": frames,
        "--steps": steps,
        "--preset": preset,
    }
    for option, value in typed.items():
        if value is not None and level not in _ONLY_FOR[option]:
            raise BadInput(f"{option} says nothing to --level {level}: it is for {' and '.join(_ONLY_FOR[option])}")
    for option, value, least in (
        ("--text", text, 0),
        ("--heads", heads, 1),
        ("--head-dim", head_dim, 1),
        ("--reps", reps, 1),
        ("--steps", steps, 1),
    ):
        if value is not None and value < least:
            raise BadInput(f"{option} {value}: expected {least} or more")
    if max_seconds is not None and max_seconds <= 0:
        raise BadInput(f"--max-seconds {max_seconds:g}: expected more than 0")
    require_device(device)
    require_choice("--dtype", dtype, DTYPES)
    require_choice("--backend", backend, BACKENDS)
    if weights is not None:
        require_choice("--weights", weights, WEIGHTS)
    listed = compare if compare is not None else _COMPARE[level]
    modes = _modes(listed) if level == "highres" else ()
    requests = () if level == "highres" else parse_variants(listed)
    peer_names = parse_peers(peers) if peers is not None else ()
    stem = _stem(out, f"grat-bench-{datetime.now():%Y%m%d-%H%M%S}-{level}")
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "md", "html")}
    if level in WHOLE_RUNS:
        paths["png"] = stem.with_name(f"{stem.name}.png")
    media.refuse_unwritable(list(paths.values()), overwrite=overwrite)
    command = shlex.join(["grat", *(context.find_root().obj or ())])
    limit = _MAX_SECONDS[level] if max_seconds is None else max_seconds
    common = {"backend": backend, "max_seconds": limit, "command": command}

    # 2. Measure.
    sheet = None
    if level == "attention":
        sizes = [*_picture_sizes(res, text), *_grid_sizes(grid, text)]
        result = _attention(
            output, requests, sizes, peer_names, text, heads, head_dim, reps, device=device, dtype=dtype, **common
        )
    elif level == "step":
        result = _step(
            output, requests, model, weights, res, grid, text, layers, reps, device=device, dtype=dtype, **common
        )
    else:
        common |= {"device": device, "dtype": dtype, "steps": steps}
        if level == "highres":
            result, sheet = _highres(output, modes, model, preset, res, prompts, **common)
        elif level == "image":
            result, sheet = _image(output, requests, model, res, prompts, **common)
        else:
            result, sheet = _video(output, requests, model, res, frames, prompts, **common)

    # 3. Write and show.
    from grat_cli.bench.markdown import as_markdown
    from grat_cli.bench.page import as_html
    from grat_cli.bench.tables import bench_tables

    picture = None
    if sheet is not None:
        media.write_png(sheet, paths["png"], None)
        picture = paths["png"].read_bytes()
        result = replace(result, contact_sheet=paths["png"].name)
    media.write_json(result.as_dict(), paths["json"])
    media.write_text(as_markdown(result), paths["md"])
    media.write_text(as_html(result, picture), paths["html"])
    output.data(result.as_dict())
    output.show(*bench_tables(result), "")
    for kind, path in paths.items():
        if kind != "png" or sheet is not None:
            output.line(str(path))


def _attention(
    output: Output,
    requests: tuple[Request, ...],
    sizes: list[Size],
    peers: tuple[str, ...],
    text: int | None,
    heads: int | None,
    head_dim: int | None,
    reps: int | None,
    *,
    device: str,
    dtype: str,
    backend: str,
    max_seconds: float | None,
    command: str,
) -> BenchResult:
    from grat_cli.bench.attention_level import run_attention_level
    from grat_cli.devices import choose_device, choose_dtype
    from grat_cli.selection import require_backend

    chosen = choose_device(device)
    on_cpu = chosen.type == "cpu"
    if not sizes:
        sizes = _grid_sizes(_CPU_GRID, text) if on_cpu else _picture_sizes(_GPU_RES, text)
    head_dim = head_dim or (_CPU_HEAD_DIM if on_cpu else _GPU_HEAD_DIM)
    require_backend(backend, device, dtype, head_dim, max(size.tokens for size in sizes))
    with output.progress() as progress:
        return run_attention_level(
            requests,
            sizes,
            heads=heads or (_CPU_HEADS if on_cpu else _GPU_HEADS),
            head_dim=head_dim,
            dtype=choose_dtype(dtype, chosen),
            device=chosen,
            backends=(backend,),
            peers=peers,
            repetitions=reps or (_CPU_REPETITIONS if on_cpu else _GPU_REPETITIONS),
            max_seconds=max_seconds,
            command=command,
            progress=progress,
        )


def _step(
    output: Output,
    requests: tuple[Request, ...],
    model: str | None,
    weights: str | None,
    res: str | None,
    grid: str | None,
    text: int | None,
    layers: str | None,
    reps: int | None,
    **common: Any,
) -> BenchResult:
    from grat_cli.bench.random_weights import step_model
    from grat_cli.bench.step_level import StepSettings, run_step_level
    from grat_cli.errors import BadInput
    from grat_cli.models import choose_model

    chosen = step_model(model or choose_model(None).name)
    blocks = None
    if layers is not None:
        if not re.fullmatch(r"\d{1,4},\d{1,4}", layers, re.ASCII):
            raise BadInput(f"--layers {layers}: expected double and single blocks, such as 2,4")
        double, single = map(int, layers.split(","))
        blocks = double, single
    if res is not None and chosen.axes != 2:
        raise BadInput(f"--res is for pictures; give {chosen.name} tokens, such as --grid 33x45x80")
    pictures = _picture_sizes(res, text, chosen.pixels_per_token[-1])
    settings = StepSettings(
        model=chosen.name,
        compare=_without_full(requests),
        grids=tuple(size.grid.shape for size in [*pictures, *_grid_sizes(grid, text)]),
        layers=blocks,
        weights=weights,
        text_len=text,
        **({} if reps is None else {"repetitions": reps}),
        **common,
    )
    with output.progress() as progress:
        return run_step_level(settings, progress)


def _image(
    output: Output,
    requests: tuple[Request, ...],
    model: str | None,
    res: str | None,
    prompts: str | None,
    **common: Any,
) -> tuple[BenchResult, Any]:
    """The result and, where there are pictures, the contact sheet."""
    from grat_cli.bench.image_level import PROMPTS, ImageSettings, run_image_level
    from grat_cli.errors import BadInput
    from grat_cli.models import choose_model
    from grat_cli.resolution import parse_resolution

    choice = choose_model(model)
    if res is not None and "," in res:
        raise BadInput(f"--res {res}: --level image makes pictures of one size")
    resolution = parse_resolution(res, choice.native_side, choice.size_multiple)
    settings = ImageSettings(
        model=choice,
        compare=_without_full(requests),
        width=resolution.width,
        height=resolution.height,
        **({} if prompts is None else {"prompts": _prompts(prompts, PROMPTS)}),
        **common,
    )
    output.hint(f"{choice.name} ({choice.reason}), {resolution}")
    with output.progress() as progress:
        result, pictures = run_image_level(settings, progress)
    return result, _contact_sheet(pictures)


def _video(
    output: Output,
    requests: tuple[Request, ...],
    model: str | None,
    res: str | None,
    frames: int | None,
    prompts: str | None,
    **common: Any,
) -> tuple[BenchResult, Any]:
    """The result and, where there are videos, the contact sheet."""
    from grat_cli.bench.video_level import PROMPTS, VideoSettings, run_video_level
    from grat_cli.errors import BadInput
    from grat_cli.models import choose_model
    from grat_cli.video_size import parse_video_size

    choice = choose_model(model, "video")
    if res is not None and "," in res:
        raise BadInput(f"--res {res}: --level video makes videos of one size")
    size = parse_video_size(res, None, None, frames, None, choice)
    settings = VideoSettings(
        model=choice,
        compare=_without_full(requests),
        width=size.width,
        height=size.height,
        frames=size.frames,
        **({} if prompts is None else {"prompts": _prompts(prompts, PROMPTS)}),
        **common,
    )
    output.hint(f"{choice.name} ({choice.reason}), {size}")
    for note in size.notes:
        output.hint(note)
    with output.progress() as progress:
        result, pictures = run_video_level(settings, progress)
    return result, _contact_sheet(pictures)


def _highres(
    output: Output,
    modes: tuple[str, ...],
    model: str | None,
    preset: str | None,
    res: str | None,
    prompts: str | None,
    *,
    steps: int | None,
    device: str,
    dtype: str,
    command: str,
    backend: str,
    max_seconds: float | None,
) -> tuple[BenchResult, Any]:
    """The result and the contact sheet."""
    from grat_cli.bench.highres_level import HighresSettings, run_highres_level
    from grat_cli.bench.image_level import PROMPTS
    from grat_cli.errors import BadInput
    from grat_cli.models import choose_model
    from grat_cli.resolution import parse_resolution
    from grat_cli.selection import select_preset

    if max_seconds is not None:
        raise BadInput("--max-seconds says nothing to --level highres: give fewer --prompts")
    choice = choose_model(model)
    if res is not None and "," in res:
        raise BadInput(f"--res {res}: --level highres makes pictures of one size")
    resolution = parse_resolution(res or str(4 * choice.native_side), choice.native_side, choice.size_multiple)
    chosen = select_preset(choice, preset=preset or f"{choice.family}-{_HIGHRES[choice.family]}", steps=steps)
    chosen = chosen.model_copy(update={"kernel": chosen.kernel.model_copy(update={"backend": backend})})
    settings = HighresSettings(
        model=choice,
        preset=chosen,
        width=resolution.width,
        height=resolution.height,
        compare=modes,
        device=device,
        dtype=dtype,
        command=command,
        **({} if prompts is None else {"prompts": _prompts(prompts, PROMPTS)}),
    )
    output.hint(f"{choice.name} ({choice.reason}), {resolution}, {chosen.name}")
    with output.progress() as progress:
        result, pictures = run_highres_level(settings, progress)
    return result, _contact_sheet(pictures)


def _modes(text: str) -> tuple[str, ...]:
    """The ways to make large pictures in `--compare`."""
    from grat_cli.bench.highres_level import MODES
    from grat_cli.errors import BadInput, choices

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in MODES:
            raise BadInput(f"--compare {name}: {choices(name, MODES)}")
    return names


def _contact_sheet(pictures: Pictures) -> Any:
    """The sheet; None where every variant was skipped."""
    from grat_cli.bench.contact_sheet import draw

    return draw(pictures.rows, pictures.column_titles) if any(made for _, made in pictures.rows) else None


def _without_full(requests: tuple[Request, ...]) -> tuple[Request, ...]:
    """The requests beside full attention, which these levels always measure."""
    return tuple(request for request in requests if request.kind != "full")


def _prompts(text: str, built_in: tuple[str, ...]) -> tuple[str, ...]:
    from grat_cli.errors import BadInput

    if text.isascii() and text.isdigit():
        if not 1 <= int(text) <= len(built_in):
            raise BadInput(f"--prompts {text}: there are {len(built_in)} built-in prompts")
        return built_in[: int(text)]
    path = Path(text)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts {text}: expected a count or a text file with a prompt on each line") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise BadInput(f"--prompts {text}: the file is empty")
    return found


def _picture_sizes(res: str | None, text: int | None, token_side: int = _TOKEN_SIDE) -> list[Size]:
    """The sizes of `--res`."""
    from grat_cli.bench.sizes import Size
    from grat_cli.resolution import parse_resolution
    from grat_kernels import Grid

    sizes = []
    for item in res.split(",") if res is not None else ():
        resolution = parse_resolution(item, _NATIVE_SIDE, _TOKEN_SIDE)
        grid = Grid((resolution.height // token_side, resolution.width // token_side))
        sizes.append(Size(f"{resolution} pixels", grid, _TEXT_TOKENS[2] if text is None else text))
    return sizes


def _grid_sizes(grid: str | None, text: int | None) -> list[Size]:
    """The sizes of `--grid`.

    Raises:
        BadInput: if one is not two or three positive numbers.
    """
    from grat_cli.bench.sizes import Size
    from grat_cli.errors import BadInput
    from grat_kernels import Grid

    sizes = []
    for item in grid.split(",") if grid is not None else ():
        if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){1,2}", item.strip(), re.ASCII):
            raise BadInput(f"--grid {item}: expected image tokens per axis, such as 128x128 or 33x45x80")
        shape = tuple(map(int, item.strip().split("x")))
        title = f"{item.strip()} tokens"
        sizes.append(Size(title, Grid(shape), _TEXT_TOKENS[len(shape)] if text is None else text))
    return sizes


def _stem(out: Path | None, name: str) -> Path:
    """Path of the results without their suffix."""
    if out is None or out.is_dir() or str(out).endswith(os.sep):
        return (out or Path()) / name
    return out.with_suffix("") if out.suffix in (".json", ".md", ".html") else out
