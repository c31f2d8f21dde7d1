"""What commands that make outputs have in common: where these may go, making them one by one, what they took."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.commands.ranks import led, shared_by
from grat_cli.console import run_tables
from grat_cli.console.output import Output, bytes_text
from grat_cli.errors import BadInput
from grat_cli.files import formats, outputs
from grat_cli.files.whole import claimed, is_own
from grat_cli.generation import inputs
from grat_cli.generation.request import Request, check_pictures
from grat_cli.generation.selection import require_backend, variant_word
from grat_cli.models.loading import refuse_weights
from grat_cli.models.parallel import ALONE

if TYPE_CHECKING:
    from grat_cli.commands.options import ModelOptions, ParallelOptions, PictureOptions
    from grat_cli.estimates.planning import Forecast
    from grat_cli.families import ModelChoice
    from grat_cli.generation.checkpoint import Run
    from grat_cli.generation.finishing import Made
    from grat_cli.presets import Preset


def planned_request(
    choice: ModelChoice,
    preset: Preset,
    size: Any,
    model: ModelOptions,
    *,
    format: str,
    quality: int | None,
    checkpoint_every: int | None = None,
    negative: str | None = None,
    pictures: PictureOptions | None = None,
) -> tuple[Request, list[Forecast]]:
    """What is asked for but prompt, seeds and places, and what it will be, stage by stage.

    Args:
        choice: the model.
        preset: resolved.
        size: a `Resolution` or a `VideoSize`.
        model: on what and how it runs.
        format: of the outputs.
        quality: of their encoder.
        checkpoint_every: `--checkpoint-every`.
        negative: `--negative`.
        pictures: that outputs are made from.

    Raises:
        BadInput: if these do not fit one another, or cannot be written.
    """
    from grat_cli.estimates.planning import run_forecasts

    if checkpoint_every is not None and checkpoint_every < 0:
        raise BadInput(f"--checkpoint-every {checkpoint_every}: expected steps, 0 for none")
    fps = getattr(size, "fps", None)
    formats.require_writable(format, size.width, size.height, fps=fps, quality=quality)
    request = Request(
        prompt="",
        negative_prompt=negative,
        preset=preset,
        model=choice,
        width=size.width,
        height=size.height,
        frames=getattr(size, "frames", None),
        fps=fps,
        **model.machine,
        weights=model.weights,
        compile=model.compile,
        format=format,
        quality=quality,
        checkpoint_every=checkpoint_every,
        text_cache=not model.no_text_cache,
        **({} if pictures is None else pictures.given),
    )
    check_pictures(request)
    inputs.refuse_sizes(request)
    refuse_weights(choice, request.weights, request.kinds)
    references = inputs.reference_tokens(request)
    runs = run_forecasts(preset, choice, size, model.dtype, handed=request.handed, references=references)
    last = runs[-1]
    require_backend(
        preset.kernel.backend,
        model.device,
        model.dtype,
        last.architecture.head_dim,
        last.main_plan.tokens,
        choosing=any(run.preset.chooses for run in runs),
    )
    return request, runs


def refuse_unfit(request: Request, size: Any, ranks: ParallelOptions | None = None) -> None:
    """Makes sure, before anything is loaded, that a request fits the device that it is for, or the share of it that
    falls to each of several ranks.

    Raises:
        OutOfMemory: if it does not, with what does.
        BadInput: if the ranks cannot share it.
    """
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import run_forecasts

    refuse_unfit_here(
        request.model,
        partial(
            run_forecasts,
            request.preset,
            request.model,
            handed=request.handed,
            references=inputs.reference_tokens(request),
        ),
        size,
        device=request.device,
        dtype=request.dtype,
        offload=request.offload,
        weights=request.weights,
        parallel=ALONE if ranks is None else shared_by(request, ranks),
        shards_weights=ranks is not None and ranks.shard_weights,
    )


def placed(request: Request, out: Path | None, suffix: str, never: Path | None = None) -> Request:
    """The request with a place for the output of each seed.

    Args:
        request: with prompt and seeds.
        out: `--out`.
        suffix: of the files.
        never: a file that is replaced in no case, nor is what lies beside it under its name.

    Raises:
        BadInput: if something is there that may not be overwritten, or cannot be written.
    """
    now, word = datetime.now().astimezone(), variant_word(request.preset)
    names = [outputs.default_name(now, request.prompt, request.size, word, seed, suffix) for seed in request.seeds]
    paths = outputs.output_paths(out, names, request.seeds, suffix)
    kept = set() if never is None else {never.resolve(), outputs.report_path(never).resolve()}
    for path in paths:
        if kept & {path.resolve(), outputs.report_path(path).resolve()}:
            raise BadInput(f"{path} is what is repeated, and stays as it is: use another --out")
    refuse_unwritable(paths, overwrite=request.overwrite, previews=request.preview_every > 0)
    return replace(request, outputs=tuple(paths))


def refuse_unwritable(
    paths: Sequence[Path], *, overwrite: bool, own: Sequence[Path] = (), previews: bool = False
) -> None:
    """Makes sure, before any work is done, that outputs and what lies beside them can be written.

    Args:
        paths: of the outputs.
        overwrite: whether files that are there may be replaced.
        own: files of the run itself, which goes on.
        previews: whether there are any.

    Raises:
        BadInput: if something exists that may not be overwritten, or cannot be written.
    """
    beside = [*map(outputs.report_path, paths), *(map(outputs.preview_path, paths) if previews else ())]
    outputs.refuse_unwritable([path for path in (*paths, *beside) if not is_own(path)], overwrite=overwrite)
    goes_on = set(map(os.path.abspath, own))
    for path in paths:
        for kept in (outputs.checkpoint_path(path), outputs.latents_path(path)):
            if os.path.lexists(kept) and os.path.abspath(kept) not in goes_on and not overwrite:
                raise BadInput(f"{kept} of another run exists: go on with it (grat resume {kept}), or use --overwrite")


def make(request: Request, output: Output, ranks: ParallelOptions, begun: Run | None = None) -> None:
    """Makes the outputs of a request, names each as soon as it is written, and shows what they took."""
    from grat_cli.generation.run import generate

    made: list[Made] = []
    world = led(request, ranks, begun, output)
    with claimed(request.outputs), output.progress() as progress:
        for one in generate(request, progress, begun, world):
            made.append(one)
            output.file(one.path)
    if world is not None:
        world.leave()
    show(made, request, output)


def show(made: Sequence[Made], request: Request, output: Output) -> None:
    """What outputs took, for people and machines."""
    reports = [one.report for one in made]
    output.data({f"{request.model.medium}s": [{"file": str(one.path), **one.report} for one in made]})
    if len(reports) == 1:
        table, phases = run_tables.timing_table(reports[0]), run_tables.phases_line(reports[0])
        output.show(table, phases, memory_line(reports[0]))
    else:
        output.show(run_tables.pictures_table(reports))
    for lines in (run_tables.ranks_lines, run_tables.guard_lines, run_tables.cache_lines, run_tables.over_steps_lines):
        output.show(*lines(reports))


def memory_line(made: Mapping[str, Any]) -> str:
    """For example `peak memory: load 1.2 GiB, text 1.3 GiB, denoise 2.5 GiB (resident memory of the process)`."""
    peaks = ", ".join(f"{name} {bytes_text(count)}" for name, count in made["memory"].items())
    return f"peak memory: {peaks} ({made['peak_memory_kind']})"
