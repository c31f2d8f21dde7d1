"""`grat plan`: what a run will cost, before any download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, changed, only, option
from grat_cli.console.output import Mode, bytes_text, fact_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grat_cli.estimates.fleet import Fleet
    from grat_cli.estimates.memory import RunMemory
    from grat_cli.estimates.planning import Forecast
    from grat_cli.models.catalogue import ModelChoice

_VARIANTS_OF_VIDEOS = ("planes", "lines")
_FEW_PATTERNS = 6  # are listed one by one


def plan(
    preset_name: Annotated[
        str | None,
        argument(
            "PRESET",
            "A preset by name or from a YAML file. Default: the model's recommended one.",
            options.complete_preset,
        ),
    ] = None,
    *,
    extent: Annotated[
        options.SizeOptions,
        changed(res="As for grat image; of a video 720p, 540p, 480p or 1280x720. Default: the model's own size."),
    ],
    sampling: Annotated[options.SamplingOptions, only("steps", "guidance")],
    pictures: options.PictureOptions,
    highres: str | None = options.HIGHRES,
    attention: Annotated[options.AttentionOptions, only("preset", "variant", "group", "radius", "share", "set_items")],
    model: Annotated[
        options.ModelOptions,
        only(
            "dtype",
            model=option(
                "NAME",
                "As for grat image and grat video. Default: what the preset is for, else flux-dev; "
                "hunyuan with options of videos.",
                options.MODEL,
                complete=options.complete_any_model,
                is_place=True,
            ),
        ),
    ],
    gpu: str | None = option(
        "NAME",
        "Plan for h200, h100, a100-80, a100-40, 5090, 4090, l40s and others, or cpu, which is measured. "
        "Default: the GPU of this machine.",
        options.MODEL,
    ),
    weights: Annotated[options.ModelOptions, only("offload", "quantize", "cast", "lora", "fuse_lora")],
    ranks: Annotated[
        options.ParallelOptions, changed(gpus="Plan for so many GPUs of a machine that make each output together.")
    ],
    fleet: int | None = option(
        "COUNT", "What so many such machines make in an hour, and what stops more of them.", options.MODEL
    ),
    picture: Path | None = option("FILE.png", "Draw the pattern into a file instead of the terminal.", options.OUTPUT),
    overwrite: bool = options.OVERWRITE,
    terminal: options.TerminalOptions,
) -> None:
    """Show tokens, density, attention work, memory and the pattern of a run, without loading a model."""
    from grat_cli.console.pattern import text_picture
    from grat_cli.errors import BadInput
    from grat_cli.estimates.components import components_of, with_loras
    from grat_cli.estimates.fitting import judge, refuse_unfit, what_fits
    from grat_cli.estimates.fleet import WORKERS, Fleet
    from grat_cli.estimates.hardware import GPUS, Device, device_named, present_cpu, present_gpu
    from grat_cli.estimates.memory import component_weights
    from grat_cli.estimates.planning import run_forecasts
    from grat_cli.estimates.several_gpus import MOST_OF_MACHINE, several_gpus
    from grat_cli.estimates.stages import stage_data, stages_of
    from grat_cli.estimates.time import phase_seconds
    from grat_cli.files import outputs
    from grat_cli.files.pictures import picture_size
    from grat_cli.files.places import renamed
    from grat_cli.generation import inputs
    from grat_cli.generation.request import Request, check_pictures
    from grat_cli.generation.selection import choose_medium, mismatch_note, require_choice
    from grat_cli.models.catalogue import choose_model, is_known, models_for
    from grat_cli.models.hub_metadata import ask_hub
    from grat_cli.models.parallel import ALONE, choose_parallel
    from grat_cli.models.resolution import Resolution
    from grat_cli.models.sharding import require_sharding
    from grat_cli.presets import HIGHRES_MODES, load_preset

    output = terminal.output()
    weights.check()
    if preset_name and attention.preset:
        raise BadInput(f"two presets are given, {preset_name} and {attention.preset}: leave one out")
    model.check()
    ranks.check()
    if ranks.gpus is None and (ranks.parallel is not None or ranks.shard_weights):
        name = "--shard-weights" if ranks.parallel is None else "--parallel"
        raise BadInput(f"{name} is for several GPUs: add --gpus COUNT")
    if ranks.shard_weights:
        require_sharding(weights.offload, quantize=weights.quantize, cast=weights.cast)
    if fleet is not None and fleet < 1:
        raise BadInput(f"--fleet {fleet}: expected 1 or more machines")
    pictures.check()
    require_choice("--highres", highres, HIGHRES_MODES)
    attention = replace(attention, preset=attention.preset or preset_name)

    # 1. A preset says which family it is for; without one, options and names tell images from videos.
    made_for = load_preset(attention.preset).model if attention.preset is not None else None
    of_video = extent.of_video or (made_for is None and attention.variant in _VARIANTS_OF_VIDEOS)
    medium = choose_medium(model.model, made_for, of_video)
    choice = choose_model(models_for(made_for, medium)[0].name if model.model is None else model.model, medium)
    told: Mapping[str, int] | None = None
    if choice.kind == "hub" and not is_known(choice):
        answer = ask_hub(choice.source, medium)
        if isinstance(answer, str):
            output.hint(f"the hub tells nothing of {choice.name} ({answer}): shapes are those of its nearest kin")
        else:
            choice, told = answer.choice, answer.parameters
            output.hint(f"shapes and weights of {choice.name} are those that the hub tells")
    chosen = attention.preset_for(choice, sampling, highres)

    # 2. The size, and everything that follows from it.
    size = extent.size_for(choice)
    output.hint(*getattr(size, "notes", ()))
    if picture is not None:
        if picture.suffix.lower() != ".png":
            raise BadInput(f"--picture {picture}: pictures are PNG files: use {renamed(picture, '.png')}")
        outputs.refuse_unwritable([picture], overwrite=overwrite)
    device = device_named(gpu) if gpu is not None else present_gpu() or (present_cpu() if choice.is_demo else None)
    dtype = "float32" if device is not None and device.kind == "cpu" and model.dtype == "auto" else model.dtype
    stages: list[dict[str, Any]] = []
    asked = Request(
        prompt="",
        preset=chosen,
        model=choice,
        width=size.width,
        height=size.height,
        frames=getattr(size, "frames", None),
        **pictures.given,
    )
    check_pictures(asked)
    inputs.refuse_sizes(asked)
    given: dict[str, Any] = {"handed": asked.handed, "strength": asked.strength}
    if asked.init_image is not None and not asked.handed:
        given["start"] = Resolution(*inputs.start_size(asked, picture_size(asked.init_image)))
    references = inputs.reference_tokens(asked)

    def forecasts(size: Any) -> list[Forecast]:
        return run_forecasts(chosen, choice, size, dtype, references=references, **given)

    runs = forecasts(size)
    result = runs[-1]  # the last stage costs most
    if isinstance(size, Resolution):
        parts = zip(stages_of(chosen, choice, size.width, size.height, **given), runs, strict=True)
        stages = [stage_data(stage, made.schedule) for stage, made in parts]

    # 3. Memory and time by phase, on the device that is meant.
    components = with_loras(components_of(choice, told), weights.weights)
    if components.transformer_bytes is not None and (weights.quantize, weights.cast) != ("none", "none"):
        raise BadInput(f"{choice.name} is quantized already: leave out --quantize and --cast")
    if device is not None and device.kind == "cpu" and (weights.offload, weights.quantize) != ("none", "none"):
        raise BadInput("--offload and --quantize are for GPUs: leave them out, or give --gpu with one of them")
    parallel = ALONE
    if ranks.gpus is not None:
        heads, wanted = result.architecture.transformer.heads, ranks.parallel or "auto"
        calls, shards = min(stage.calls_per_step for stage in runs), ranks.shard_weights
        parallel = choose_parallel(wanted, ranks.gpus, heads, calls, shards_weights=shards)
    how: dict[str, Any] = {
        "offload": weights.offload,
        "quantize": weights.quantize,
        "cast": weights.cast,
        "parallel": parallel,
        "shards_weights": ranks.shard_weights,
    }
    verdict = judge(runs, components, choice, device or GPUS["h200"], **how, at_size=forecasts)
    # Measuring a CPU takes seconds, and loads torch: only where it is asked for.
    timed = device is not None and (device.kind == "cuda" or gpu is not None)
    took = phase_seconds(runs, components, verdict.execution, verdict.device, dtype) if timed else {}
    several = None
    if ranks.gpus is not None:
        several = several_gpus(runs, components, verdict.execution, device or Device("unknown", "unknown", 0))
    fleets: list[Fleet] = []
    if fleet is not None:
        if not took:
            raise BadInput("--fleet needs the time of an output: add --gpu h200, or another of those known")
        seconds = sum(spent for phase, spent in took.items() if phase != "load")
        stored_bytes = sum(component_weights(components, verdict.execution).values())
        fleets = [
            Fleet(count, parallel.ranks, seconds, stored_bytes, verdict.device.power)
            for count in sorted({fleet, *WORKERS})
        ]

    # 4. Show it.
    stored = _stored_in(choice)
    output.hint(mismatch_note(chosen, choice))
    if chosen.cache:
        output.hint(f"cache {chosen.cache.summary}: its memory is counted, the time that it saves is not")
    if several is not None and parallel.ranks > MOST_OF_MACHINE:
        output.hint(f"{parallel.ranks} GPUs are more than a machine has: between machines the link is slower than told")
    if any(section.is_spaced for section in chosen.schedule.over_steps):
        output.hint("references are told as if steps were even: the run spaces them by the sigmas of its schedule")
    output.data(
        {
            **result.as_dict(),
            "preset": chosen.model_dump(mode="json"),
            "stages": stages,
            "phases": [
                {
                    "phase": phase.phase,
                    "peak_bytes": round(phase.peak),
                    "weights_bytes": round(phase.weights),
                    "at": phase.moment,
                    "seconds": took.get(phase.phase),
                }
                for phase in verdict.memory.phases
            ],
            "load_seconds": took.get("load"),
            "offload": verdict.execution.offload,
            "quantize": weights.quantize,
            "cast": weights.cast,
            "file": stored,
            "verdict": verdict.as_dict() if device else None,
            "gpus": None if several is None else several.as_dict(),
            "fleet": [each.as_dict() for each in fleets],
        }
    )
    facts = _facts(result, stages)
    if stored is not None:
        facts["weights"] = f"{stored['weights']:,} in {Path(choice.source).name}: {_types_text(stored['types'])}"
    output.show(fact_table(facts), "", _phase_table(verdict.memory, took))
    if verdict.execution.offload != "none":
        waiting = bytes_text(verdict.memory.offloaded)
        output.show(f"--offload {verdict.execution.offload}: {waiting} of weights wait in main memory")
    if several is not None:
        output.show("", *several.lines)
    if fleets:
        output.show("", _fleet_table(fleets), *next(each for each in fleets if each.workers == fleet).lines)
    if took and verdict.device.kind == "cuda":
        output.show("Times are estimates from data sheets, not measured.")
    if device is None:
        output.show(what_fits(runs, components, choice, **how))
    elif verdict.fits:
        output.show(verdict.sentence)
    if picture is not None:
        from grat_cli.estimates.pattern_figure import pattern_figure

        outputs.write_png(pattern_figure(result.schedule, result.preset), picture, None, overwrite=overwrite)
        output.file(picture)
    elif output.mode is Mode.HUMAN:
        output.show("", text_picture(result.main_plan, min(output.console.width, 80)))
    elif output.mode is Mode.QUIET:
        output.line(f"{result.schedule.density:.6f}")
    if device is not None:
        refuse_unfit(verdict)


def _phase_table(memory: RunMemory, seconds: Mapping[str, float]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("phase", style="dim", no_wrap=True)
    for name in ("weights", "peak", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("at the peak", overflow="fold")
    if "load" in seconds:
        table.add_row("load", "", "", _time(seconds["load"]), "")
    for phase in memory.phases:
        took = seconds.get(phase.phase)
        table.add_row(
            phase.phase,
            bytes_text(phase.weights),
            bytes_text(phase.peak),
            "" if took is None else _time(took),
            phase.moment,
        )
    return table


def _fleet_table(fleets: Sequence[Fleet]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("machines", "outputs/h", "weights in", "claims"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what breaks first", overflow="fold")
    for each in fleets:
        table.add_row(
            f"{each.workers:,}",
            f"{each.outputs_per_hour:,.0f}" if each.outputs_per_hour >= 100 else f"{each.outputs_per_hour:.3g}",
            _time(each.loading),
            f"{each.looking:.1%}" if each.looking < 10 else ">1,000%",
            each.breaks,
        )
    return table


def _stored_in(choice: ModelChoice) -> dict[str, Any] | None:
    """What the header of a file tells; None where the model is no file."""
    from grat_cli.files.weight_headers import read_header

    if choice.kind != "file":
        return None
    header = read_header(Path(choice.source))
    return {"format": header.format, "weights": header.numbers, "types": header.types}


def _types_text(types: Mapping[str, int]) -> str:
    """`Q8_0 11.8 GiB, F32 3.2 MiB`."""
    return ", ".join(f"{name} {bytes_text(count)}" for name, count in types.items() if count)


def _time(seconds: float) -> str:
    from grat_cli.console.progress import duration

    return duration(seconds) if seconds >= 0.5 else "<1 s"


def _facts(result: Forecast, stages: list[dict[str, Any]]) -> dict[str, str]:
    from grat_cli.console.pattern import NOT_ATTENDED, marks
    from grat_cli.console.run_tables import over_steps_summary, work_text
    from grat_cli.models.video_size import VideoSize
    from grat_kernels.analysis import reach, tile_efficiency

    schedule, main = result.schedule, result.main_plan
    references = main.tokens - main.image_tokens - main.text_len
    of_video = isinstance(result.size, VideoSize)
    full, planned = result.full_flop_per_step, result.planned_flop_per_step
    unit, scale = ("PFLOP", 1e15) if full >= 1e15 else ("TFLOP", 1e12) if full >= 1e12 else ("GFLOP", 1e9)
    everything = bool((marks(main) != NOT_ATTENDED).all())
    if main.pattern.choice and main.pattern.choice.exact:
        beyond = " by content"
    else:
        beyond = ", all beyond through means" if main.pattern.far_levels and everything else ""
    facts = {
        "preset": result.preset.name,
        "attention": result.preset.attention.summary,
        "model": result.model,
        "size": f"{result.size.resolution} pixels, {result.size.frames} frames, {result.size.seconds:.2f} s"
        if isinstance(result.size, VideoSize)
        else f"{result.size} pixels",
        "tokens": f"{main.image_tokens:,} {'video' if of_video else 'image'} ({_extents(schedule.grid.shape)}) "
        f"+ {main.text_len} text{f' + {references:,} of references' if references else ''}",
        "groups": f"{len(main.grouping.sizes):,} ({_extents(main.grouping.counts)})",
        "density": f"{schedule.density:.4f} of all query-key pairs",
        "ideal speed-up": f"{schedule.ideal_speedup:.1f}x, attention alone",
        "tile efficiency": f"{tile_efficiency(main):.0%} of 128x128 tiles",
        "reach": f"{reach(main):.0f} tokens{beyond}",
        "attention work": f"{planned / scale:.3g} of {full / scale:.3g} {unit} per step",
        "Q, K, V, O": f"{bytes_text(result.qkvo_bytes)} in {result.dtype}",
    }
    if len(schedule.plans) > 1:
        shares = [f"density {plan.density:.4f} in {share:.0%}" for plan, share in schedule.shares.items()]
        densities = [plan.density for plan in schedule.plans]
        what = (
            f"{', '.join(shares)} of them"
            if len(shares) <= _FEW_PATTERNS
            else f"{len(shares)} patterns, densities {min(densities):.4f} to {max(densities):.4f}"
        )
        facts["schedule"] = f"{schedule.steps} steps, {schedule.layers} layers, {schedule.heads} heads: {what}"
    if over_steps := result.over_steps:
        where = "in main memory" if result.kept().host else "on the device"
        facts["over steps"] = f"{over_steps_summary(over_steps)} {where}"
    if over_steps or schedule.parts.selection:
        facts["work"] = work_text(schedule.parts._asdict())
    if len(stages) > 1:
        facts["stages"] = "\n".join(map(_stage_text, stages)) + "\n(figures above are of the last one)"
    return facts


def _stage_text(stage: dict[str, Any]) -> str:
    """`4096x4096: 66,048 tokens, density 0.063, 17 steps, b radius 1, ...`."""
    return (
        f"{stage['width']}x{stage['height']}: {stage['tokens']:,} tokens, density {stage['density']:.4f}, "
        f"{stage['steps']} steps, {stage['attention']}"
    )


def _extents(counts: tuple[int, ...]) -> str:
    """`33 frames x 45 rows x 80`, or without frames."""
    words = ("frames", "rows")[-(len(counts) - 1) :]
    return " x ".join([*(f"{count} {word}" for count, word in zip(counts, words, strict=False)), str(counts[-1])])
