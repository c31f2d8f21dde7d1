"""Runs the level that `grat bench` is asked for: options become the settings of the level."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from grat_cli.bench.request import BenchRequest
from grat_cli.bench.sizes import grid_sizes, picture_sizes
from grat_cli.console.output import Output
from grat_cli.errors import BadInput
from grat_cli.fidelity.prompts import built_in_prompts, chosen_prompts

if TYPE_CHECKING:
    from PIL import Image

    from grat_cli.bench.results import BenchResult
    from grat_cli.bench.whole_runs import Pictures
    from grat_cli.families import Medium

# Shows the effect in a minute on two CPU cores; on a GPU, Flux at 4096x4096.
_CPU_GRID, _CPU_HEADS, _CPU_HEAD_DIM, _CPU_REPETITIONS = "128x128", 4, 64, 5
_GPU_RES, _GPU_HEADS, _GPU_HEAD_DIM, _GPU_REPETITIONS = "4096", 24, 128, 20


def run_level(request: BenchRequest, output: Output) -> tuple[BenchResult, Image.Image | None]:
    """The result and, of whole runs, the contact sheet; None where there is none, as every variant was skipped.

    Raises:
        BadInput: if options do not fit one another or the model.
        ModelUnavailable: if the model is missing, gated or damaged.
        OutOfMemory: if a model's weights alone do not fit.
    """
    return {"attention": _attention, "step": _step, "image": _whole, "video": _whole, "highres": _highres}[
        request.level
    ](request, output)


def _attention(request: BenchRequest, output: Output) -> tuple[BenchResult, None]:
    from grat_cli.bench.attention_level import run_attention_level
    from grat_cli.generation.selection import require_backend
    from grat_cli.models.devices import choose_device, choose_dtype

    sizes = request.sizes()
    device = choose_device(request.device)
    on_cpu = device.type == "cpu"
    if not sizes:
        sizes = grid_sizes(_CPU_GRID, request.text) if on_cpu else picture_sizes(_GPU_RES, request.text)
    head_dim = request.head_dim or (_CPU_HEAD_DIM if on_cpu else _GPU_HEAD_DIM)
    longest = max(size.tokens for size in sizes)
    require_backend(request.backend, request.device, request.dtype, head_dim, longest)
    with output.progress() as progress:
        result = run_attention_level(
            request.variants,
            sizes,
            heads=request.heads or (_CPU_HEADS if on_cpu else _GPU_HEADS),
            head_dim=head_dim,
            dtype=choose_dtype(request.dtype, device),
            device=device,
            backends=(request.backend,),
            peers=request.peer_names,
            repetitions=request.reps or (_CPU_REPETITIONS if on_cpu else _GPU_REPETITIONS),
            max_seconds=request.most_seconds,
            command=request.command,
            progress=progress,
        )
    return result, None


def _step(request: BenchRequest, output: Output) -> tuple[BenchResult, None]:
    from grat_cli.bench.random_weights import step_model
    from grat_cli.bench.step_level import StepSettings, run_step_level
    from grat_cli.models.catalogue import choose_model

    model = step_model(request.model or choose_model(None).name)
    blocks = None
    if request.layers is not None:
        if not re.fullmatch(r"\d{1,4}(,\d{1,4})?", request.layers, re.ASCII):
            raise BadInput(f"--layers {request.layers}: expected numbers of blocks of each kind, such as 2,4")
        blocks = tuple(map(int, request.layers.split(",")))
    if request.res is not None and model.video:
        raise BadInput(f"--res is for pictures; give {model.name} tokens, such as --grid 33x45x80")
    settings = StepSettings(
        model=model.name,
        compare=request.variants_beside_full,
        grids=tuple(size.grid.shape for size in request.sizes(model.token_side)),
        layers=blocks,
        weights=request.weights,
        text_len=request.text,
        **({} if request.reps is None else {"repetitions": request.reps}),
        **_common(request),
    )
    with output.progress() as progress:
        return run_step_level(settings, progress), None


def _whole(request: BenchRequest, output: Output) -> tuple[BenchResult, Image.Image | None]:
    from grat_cli.bench.whole_runs import RunSettings, compare_runs
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.video_size import parse_size

    medium: Medium = "video" if request.level == "video" else "image"
    model = choose_model(request.model, medium)
    _refuse_several_sizes(request, f"{medium}s" if model.video else "pictures")
    size = parse_size(model, request.res, frames=request.frames)
    settings = RunSettings(
        model=model,
        compare=request.variants_beside_full,
        prompts=_prompts(request, medium, 3 if model.video else 4),
        width=size.width,
        height=size.height,
        frames=getattr(size, "frames", None),
        steps=request.steps,
        recall=not request.no_recall,
        added=request.added,
        **_common(request),
    )
    output.hint(f"{model.name} ({model.reason}), {size}")
    output.hint(*getattr(size, "notes", ()))
    with output.progress() as progress:
        result, pictures = compare_runs(settings, progress)
    return result, _contact_sheet(pictures)


def _highres(request: BenchRequest, output: Output) -> tuple[BenchResult, Image.Image | None]:
    from grat_cli.bench.highres_level import HighresSettings, run_highres_level
    from grat_cli.families import family_of
    from grat_cli.generation.selection import select_preset
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.resolution import parse_resolution

    if request.max_seconds is not None:
        raise BadInput("--max-seconds says nothing to --level highres: give fewer --prompts")
    model = choose_model(request.model)
    _refuse_several_sizes(request, "pictures")
    resolution = parse_resolution(request.res or str(4 * model.native_side), model.native_side, model.size_multiple)
    name = request.preset or family_of(model).larger[model.presets]
    preset = select_preset(model, preset=name, steps=request.steps)
    preset = preset.model_copy(update={"kernel": preset.kernel.model_copy(update={"backend": request.backend})})
    settings = HighresSettings(
        model=model,
        preset=preset,
        width=resolution.width,
        height=resolution.height,
        compare=request.modes,
        device=request.device,
        dtype=request.dtype,
        command=request.command,
        prompts=_prompts(request, "image", 4),
        added=request.added,
    )
    output.hint(f"{model.name} ({model.reason}), {resolution}, {preset.name}")
    with output.progress() as progress:
        result, pictures = run_highres_level(settings, progress)
    return result, _contact_sheet(pictures)


def _common(request: BenchRequest) -> dict[str, Any]:
    """Settings of steps and whole runs alike."""
    return {
        "device": request.device,
        "dtype": request.dtype,
        "backend": request.backend,
        "max_seconds": request.most_seconds,
        "command": request.command,
    }


def _prompts(request: BenchRequest, medium: Medium, usual: int) -> tuple[str, ...]:
    """Those of `--prompts`, else so many of the built-in ones."""
    built_in = built_in_prompts(medium)
    return built_in[:usual] if request.prompts is None else chosen_prompts(request.prompts, built_in)


def _refuse_several_sizes(request: BenchRequest, what: str) -> None:
    if request.res is not None and "," in request.res:
        raise BadInput(f"--res {request.res}: --level {request.level} makes {what} of one size")


def _contact_sheet(pictures: Pictures) -> Image.Image | None:
    """The sheet; None where every variant was skipped, or none has anything to show."""
    from grat_cli.pages.contact_sheet import draw

    return draw(pictures.rows, pictures.column_titles) if any(made for _, made in pictures.rows) else None
