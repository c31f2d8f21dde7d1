"""`grat video`: videos from a prompt."""

from __future__ import annotations

import shlex
from datetime import datetime
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.console.output import Output


def video(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the video shows.", show_default=False)],
    res: options.VideoRes = None,
    aspect: options.Aspect = None,
    seconds: options.Seconds = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    seed: options.Seed = None,
    n: options.Count = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = None,
    preset: options.PresetName = None,
    variant: options.VariantName = None,
    group: options.Group = None,
    radius: options.Radius = None,
    share: options.Share = None,
    guard: options.Guard = None,
    set_items: options.SetItems = None,
    backend: options.BackendChoice = None,
    model: options.VideoModelName = None,
    base: options.Base = None,
    device: options.DeviceName = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = "none",
    quantize: options.Quantize = "none",
    out: options.Out = None,
    format: options.Format = None,
    crf: options.Crf = None,
    save_latents: options.SaveLatents = False,
    checkpoint_every: options.CheckpointEvery = None,
    overwrite: options.Overwrite = False,
    no_metadata: options.NoMetadata = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make videos from a prompt."""
    from grat_cli.commands import video_output
    from grat_cli.console.progress import duration
    from grat_cli.errors import BadInput
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import architecture_for, forecast
    from grat_cli.estimates.time import planned_seconds
    from grat_cli.files import outputs as media
    from grat_cli.files.videos import SUFFIXES, choose_video_format, require_encodable
    from grat_cli.generation.seeds import resolve_seeds
    from grat_cli.generation.selection import (
        DTYPES,
        guard_note,
        mismatch_note,
        require_backend,
        require_choice,
        require_device,
        select_preset,
        variant_word,
    )
    from grat_cli.generation.video_request import VideoRequest
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.offloading import OFFLOADS
    from grat_cli.models.quantization import QUANTIZATIONS
    from grat_cli.models.video_size import parse_video_size

    output = Output(as_json=as_json, quiet=quiet)

    # 1. What can be refused without looking at any model.
    if not prompt.strip():
        raise BadInput('the prompt is empty: try grat video "waves at night"')
    require_device(device)
    require_choice("--dtype", dtype, DTYPES)
    require_choice("--offload", offload, OFFLOADS)
    require_choice("--quantize", quantize, QUANTIZATIONS)
    chosen_format = choose_video_format(out, format)
    if checkpoint_every is not None and checkpoint_every < 0:
        raise BadInput(f"--checkpoint-every {checkpoint_every}: expected steps, 0 for none")
    seeds = resolve_seeds(seed, n)

    # 2. Model, preset, size; whether they fit one another.
    choice = choose_model(model, medium="video")
    chosen = select_preset(
        choice,
        preset=preset,
        variant=variant,
        group=group,
        radius=radius,
        share=share,
        backend=backend,
        steps=steps,
        guidance=guidance,
        guard=guard,
        set_items=set_items or (),
    )
    size = parse_video_size(res, aspect, seconds, frames, fps, choice)
    architecture = architecture_for(choice)
    expected = forecast(chosen, choice.name, architecture, size, dtype)
    require_backend(chosen.kernel.backend, device, dtype, architecture.head_dim, expected.main_plan.tokens)

    require_encodable(chosen_format, fps=size.fps, crf=crf)

    # 3. Where the videos go, before hours are spent on them.
    now = datetime.now().astimezone()
    word, suffix = variant_word(chosen), SUFFIXES[chosen_format]
    names = [media.default_name(now, prompt, str(size), word, seed, suffix) for seed in seeds]
    paths = media.output_paths(out, names, seeds, suffix)
    video_output.refuse_unwritable(paths, overwrite=overwrite)

    refuse_unfit_here(
        choice,
        lambda size, in_dtype: [forecast(chosen, choice.name, architecture, size, in_dtype)],
        size,
        device=device,
        dtype=dtype,
        offload=offload,
        quantize=quantize,
    )

    # 4. What it will be, and how long it will take.
    output.hint(f"{choice.name} ({choice.reason}), {size.resolution}, {size.frames} frames at {size.fps} per second")
    for note in size.notes:
        output.hint(note)
    output.hint(f"{chosen.name}: {chosen.attention.summary}, {chosen.sampling.steps} steps")
    if note := guard_note(chosen, dense=expected.schedule.density == 1):
        output.hint(note)
    if expected.schedule.density == 1 and chosen.attention.variant != "full":
        output.hint(f"at {size} every group attends all others: this is full attention")
    if note := mismatch_note(chosen, choice):
        output.hint(note)
    output.hint(f"seed {', '.join(map(str, seeds))}")
    planned = planned_seconds(expected, device, dtype)
    each = f", {duration(planned)} each" if len(seeds) > 1 else ""
    output.hint(f"planned time: about {duration(planned * len(seeds))}{each}")

    # 5. Make them, one by one; each is written as soon as it is done.
    every = (
        video_output.checkpoint_interval(planned, chosen.sampling.steps)
        if checkpoint_every is None
        else checkpoint_every
    )
    request = VideoRequest(
        prompt=prompt,
        preset=chosen,
        model=choice,
        width=size.width,
        height=size.height,
        seeds=seeds,
        negative_prompt=negative,
        device=device,
        dtype=dtype,
        offload=offload,
        quantize=quantize,
        base=base,
        frames=size.frames,
        fps=size.fps,
        outputs=tuple(paths),
        format=chosen_format,
        crf=crf,
        checkpoint_every=every,
        save_latents=save_latents,
        metadata=not no_metadata,
        overwrite=overwrite,
        command=shlex.join(["grat", *(context.find_root().obj or ())]),
    )
    video_output.make_videos(request, output)
