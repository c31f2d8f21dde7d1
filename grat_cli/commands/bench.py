"""`grat bench`: full attention against sparse attention, measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import only, option, switch

_WHAT, _SIZE, _HOW = "What", "Size", "How"
_LORA = "For image, video and highres: a LoRA that every row has, as for grat image; may be repeated."
_FUSE = "For image, video and highres: add LoRAs to the weights once, not at every product."


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


@dataclass(frozen=True)
class BenchOptions:
    """What `BenchRequest` takes by the same names."""

    level: str = option(
        "NAME",
        "attention: one call on random numbers. step: one denoising step of a real architecture. "
        "image and video: whole runs, and how close they come to those of full attention. "
        "highres: pictures beyond the trained size, from noise and by the cascade, against the small ones.",
        _WHAT,
        "attention",
        complete=complete_level,
        show_default=True,
    )
    compare: str | None = option(
        "NAME,...",
        "full, full-list, na, clear, sta, grat-b, grat-x, grat-bx, grat-far, grat-choose, also with parameters: "
        "grat-b:radius=2, na:window=49, grat-x:share=2, grat-far:block=8x8:group=16x16, "
        "grat-choose:exact=8:fine=32:block=8x8:means=4x4. Short for some: "
        "b, x, bx, far, choose, and for videos planes and lines. For attention also grat-heads, for heads that differ. "
        "For image and video also presets, by name or from a YAML file, with their schedules, and each with a cache: "
        "far+first-block, demo-tuned+taylor:cache_interval=3; and full attention in fewer steps: full:steps=10. "
        "For highres: off, direct, cascade. Default: full,na,grat-b for attention.",
        _WHAT,
        complete=complete_compare,
    )
    cache: str | None = option(
        "NAME,...",
        "For image and video: caches, as for grat image with colons between settings; full attention and each of "
        "--compare is made once more with each.",
        _WHAT,
        complete=options.complete_cache,
    )
    peers: str | None = option(
        "NAME,...",
        "Other projects' kernels, where they are installed: natten, flex, flashinfer, sage, pisa.",
        _WHAT,
        complete=complete_peers,
    )
    model: str | None = option(
        "NAME",
        "For step, image, video and highres. Default: as for grat image and grat video.",
        _WHAT,
        complete=options.complete_any_model,
        is_place=True,
    )
    prompts: str | None = option(
        "COUNT|FILE",
        "For image, video and highres: so many of the built-in prompts, or a text file with one on each "
        "line. Default: 4 for pictures, 3 for videos.",
        _WHAT,
    )
    preset: str | None = option(
        "NAME",
        "For highres: a preset by name or from a YAML file. Default: demo-4x or flux-4k.",
        _WHAT,
        complete=options.complete_preset,
    )
    res: str | None = option(
        "SIZE,...",
        "Pixels, as for grat image: 4096 or 4096x2048, several with commas. For video 720p or 1280x720.",
        _SIZE,
    )
    frames: int | None = option(
        "COUNT", "For video: frames of each. Default: as many as the model was trained at.", _SIZE
    )
    grid: str | None = option(
        "TOKENS,...",
        "Image tokens per axis: 128x128, or 33x45x80 for a video, several with commas. "
        "Default: 128x128 on a CPU, else --res 4096.",
        _SIZE,
    )
    text: int | None = option(
        "COUNT", "Text tokens. Default: 512 on two axes (Flux), 256 on three (HunyuanVideo).", _SIZE
    )
    heads: int | None = option("COUNT", "Attention heads. Default: 4 on a CPU, else 24.", _SIZE)
    head_dim: int | None = option("CHANNELS", "Channels per head. Default: 64 on a CPU, else 128.", _SIZE)
    layers: str | None = option(
        "DOUBLE,SINGLE",
        "For step: so many blocks of both kinds, such as 2,4, for smaller machines. Default: the model's.",
        _SIZE,
    )
    weights: str | None = option(
        "NAME",
        "For step: random, or own for those that a model comes with (demo). Times do not depend on it. "
        "Default: own where there are any.",
        _WHAT,
        complete=complete_weights,
    )
    backend: str = option(
        "NAME", "Of grat's own attention, as for grat image.", _HOW, "auto", complete=options.complete_backend
    )
    reps: int | None = option(
        "COUNT", "Timed calls of each row, after a warm-up. Default: 5; for attention on a GPU, 20.", _HOW
    )
    steps: int | None = option(
        "COUNT", "For image, video and highres: denoising steps. Default: the model's own.", _HOW
    )
    no_recall: bool = switch(
        "For image and video: leave out recall and output error, which take a further run of full attention "
        "for each of up to 4 prompts.",
        _HOW,
    )
    max_seconds: float | None = option(
        "SECONDS",
        "Most time for one row; one that would take longer is skipped, and says so. "
        "Default: 60 for attention, 600 for a step, no limit for pictures and videos.",
        _HOW,
    )


def bench(
    context: typer.Context,
    *,
    asked: BenchOptions,
    machine: Annotated[options.ModelOptions, only("device", "dtype", lora=_LORA, fuse_lora=_FUSE)],
    out: Path | None = option(
        "NAME",
        "Where to write NAME.json, NAME.md and NAME.html; an existing folder gets a telling name. "
        "Default: one in the current folder.",
        options.OUTPUT,
    ),
    overwrite: bool = options.OVERWRITE,
    terminal: options.TerminalOptions,
) -> None:
    """Measure full against sparse attention: time, memory, error; a table, JSON, Markdown and a page."""
    from grat_cli.bench.files import result_paths, write_results
    from grat_cli.bench.request import BenchRequest
    from grat_cli.files import outputs

    output = terminal.output()

    # 1. What can be refused before anything is loaded.
    request = BenchRequest(
        **{**vars(asked), "no_recall": asked.no_recall or None},
        device=machine.device,
        dtype=machine.dtype,
        lora=machine.lora,
        fuse_lora=machine.fuse_lora or None,
        command=options.command_line(context),
    )
    request.check()
    paths = result_paths(out, asked.level)
    outputs.refuse_unwritable(list(paths.values()), overwrite=overwrite)

    # 2. Measure.
    from grat_cli.bench.levels import run_level

    result, sheet = run_level(request, output)

    # 3. Write and show.
    from grat_cli.bench.tables import bench_tables

    result, written = write_results(result, sheet, paths, overwrite=overwrite)
    output.data(result.as_dict())
    output.show(*bench_tables(result), "")
    for path in written:
        output.file(path)
    rows = [row for case in result.cases for row in case.rows]
    if all(row.skipped for row in rows) and (failed := [row for row in rows if row.not_finite]):
        from grat_cli.errors import NumericalFailure

        raise NumericalFailure(f"no variant could be measured; {failed[0].name}: {failed[0].skipped}")
