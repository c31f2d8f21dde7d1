"""`grat video`: videos from a prompt."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, changed, option, switch


def video(
    context: typer.Context,
    prompt: Annotated[str, argument("PROMPT", "What the video shows.")],
    *,
    extent: Annotated[
        options.SizeOptions,
        changed(
            res=option(
                "SIZE",
                "720p, 540p, 480p or 1280x720, in multiples of 16. Default: the model's own size.",
                options.VIDEO,
            )
        ),
    ],
    sampling: options.SamplingOptions,
    attention: options.AttentionOptions,
    model: Annotated[
        options.ModelOptions,
        changed(
            model=option(
                "NAME",
                "demo, hunyuan, a Hub id, a folder or a .safetensors file. "
                "Default: hunyuan with a CUDA device, else demo.",
                options.MODEL,
                complete=options.complete_video_model,
            )
        ),
    ],
    out: Path | None = options.OUT,
    format: str | None = options.VIDEO_FORMAT,
    crf: int | None = options.CRF,
    save_latents: bool = switch("Keep the latents beside the video, for grat decode.", options.OUTPUT),
    checkpoint_every: int | None = options.CHECKPOINT_EVERY,
    overwrite: bool = options.OVERWRITE,
    no_metadata: bool = options.NO_METADATA,
    terminal: options.TerminalOptions,
) -> None:
    """Make videos from a prompt."""
    from grat_cli.commands import video_output
    from grat_cli.console.progress import duration
    from grat_cli.errors import BadInput
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import run_forecasts
    from grat_cli.estimates.time import planned_seconds
    from grat_cli.files import outputs as media
    from grat_cli.files.videos import SUFFIXES, choose_video_format, require_encodable
    from grat_cli.generation.selection import guard_note, mismatch_note, require_backend, variant_word
    from grat_cli.generation.video_request import VideoRequest
    from grat_cli.models.catalogue import choose_model

    output = terminal.output()

    # 1. What can be refused without looking at any model.
    if not prompt.strip():
        raise BadInput('the prompt is empty: try grat video "waves at night"')
    model.check()
    chosen_format = choose_video_format(out, format)
    if checkpoint_every is not None and checkpoint_every < 0:
        raise BadInput(f"--checkpoint-every {checkpoint_every}: expected steps, 0 for none")
    seeds = sampling.seeds()

    # 2. Model, preset, size; whether they fit one another.
    choice = choose_model(model.model, medium="video")
    chosen = attention.preset_for(choice, sampling)
    size = extent.video_size(choice)
    (expected,) = run_forecasts(chosen, choice, size, model.dtype)
    head_dim, tokens = expected.architecture.head_dim, expected.main_plan.tokens
    require_backend(chosen.kernel.backend, model.device, model.dtype, head_dim, tokens)
    require_encodable(chosen_format, fps=size.fps, crf=crf)

    # 3. Where the videos go, before hours are spent on them.
    now = datetime.now().astimezone()
    word, suffix = variant_word(chosen), SUFFIXES[chosen_format]
    names = [media.default_name(now, prompt, str(size), word, seed, suffix) for seed in seeds]
    paths = media.output_paths(out, names, seeds, suffix)
    video_output.refuse_unwritable(paths, overwrite=overwrite)

    refuse_unfit_here(choice, partial(run_forecasts, chosen, choice), size, **model.machine)

    # 4. What it will be, and how long it will take.
    output.hint(f"{choice.name} ({choice.reason}), {size.resolution}, {size.frames} frames at {size.fps} per second")
    output.hint(*size.notes)
    output.hint(f"{chosen.name}: {chosen.attention.summary}, {chosen.sampling.steps} steps")
    output.hint(guard_note(chosen, dense=expected.schedule.density == 1))
    if expected.schedule.density == 1 and chosen.attention.variant != "full":
        output.hint(f"at {size} every group attends all others: this is full attention")
    output.hint(mismatch_note(chosen, choice))
    output.hint(f"seed {', '.join(map(str, seeds))}")
    planned = planned_seconds(expected, model.device, model.dtype)
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
        negative_prompt=sampling.negative,
        **model.machine,
        base=model.base,
        frames=size.frames,
        fps=size.fps,
        outputs=tuple(paths),
        format=chosen_format,
        crf=crf,
        checkpoint_every=every,
        save_latents=save_latents,
        metadata=not no_metadata,
        overwrite=overwrite,
        command=options.command_line(context),
    )
    video_output.make_videos(request, output)
