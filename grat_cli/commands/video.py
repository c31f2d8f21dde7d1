"""`grat video`: videos from a prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, changed, only, option


def video(
    context: typer.Context,
    prompt: Annotated[str, argument("PROMPT", "What the video shows.", is_text=True)],
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
                "demo, hunyuan, hunyuan15-720p, wan2.2-14b or their kin, a Hub id, a folder, or a .safetensors or "
                ".gguf file. Default: hunyuan with a CUDA device, else demo.",
                options.MODEL,
                complete=options.complete_video_model,
                is_place=True,
            )
        ),
    ],
    ranks: options.ParallelOptions,
    pictures: Annotated[
        options.PictureOptions,
        only(
            init_image=option("FILE", "A picture as the first frame, for models that go on from one.", options.VIDEO),
        ),
    ],
    out: Path | None = options.OUT,
    format: str | None = options.VIDEO_FORMAT,
    crf: int | None = options.CRF,
    keeping: options.KeepingOptions,
    overwrite: bool = options.OVERWRITE,
    no_metadata: bool = options.NO_METADATA,
    terminal: options.TerminalOptions,
) -> None:
    """Make videos from a prompt, or from a prompt and a picture."""
    from grat_cli.commands import making
    from grat_cli.commands.ranks import leave_to_others
    from grat_cli.console.progress import duration
    from grat_cli.errors import BadInput
    from grat_cli.estimates.time import planned_seconds
    from grat_cli.files.formats import choose_format
    from grat_cli.generation.selection import cache_note, guard_note, mismatch_note
    from grat_cli.models.catalogue import choose_model

    leave_to_others(context, ranks)
    output = terminal.output()

    # 1. What can be refused without looking at any model.
    if not prompt.strip():
        raise BadInput('the prompt is empty: try grat video "waves at night"')
    model.check()
    pictures.check()
    chosen_format, suffix = choose_format("video", out, format)
    seeds = sampling.seeds()

    # 2. Model, preset, size; whether they fit one another.
    choice = choose_model(model.model, "video", model.base)
    chosen = attention.preset_for(choice, sampling)
    size = extent.size_for(choice)
    request, (expected,) = making.planned_request(
        choice,
        chosen,
        size,
        model,
        format=chosen_format,
        quality=crf,
        checkpoint_every=keeping.checkpoint_every,
        negative=sampling.negative,
        pictures=pictures,
    )

    # 3. Where the videos go, and whether they fit, before hours are spent on them.
    request = replace(
        request,
        prompt=prompt,
        seeds=seeds,
        negative_prompt=sampling.negative,
        save_latents=keeping.save_latents,
        metadata=not no_metadata,
        overwrite=overwrite,
        command=options.command_line(context),
    )
    request = making.placed(request, out, suffix)
    making.refuse_unfit(request, size, ranks)

    # 4. What they will be, and how long it will take.
    output.hint(f"{choice.name} ({choice.reason}), {size.resolution}, {size.frames} frames at {size.fps} per second")
    output.hint(*size.notes)
    output.hint(f"{chosen.name}: {chosen.attention.summary}, {chosen.sampling.steps} steps")
    output.hint(guard_note(chosen, dense=expected.schedule.density == 1))
    output.hint(cache_note(chosen))
    if expected.schedule.density == 1 and chosen.attention.variant != "full":
        output.hint(f"at {size} every group attends all others: this is full attention")
    output.hint(mismatch_note(chosen, choice))
    output.hint(f"seed {', '.join(map(str, seeds))}")
    planned = planned_seconds(expected, model.device, model.dtype)
    each = f", {duration(planned)} each" if len(seeds) > 1 else ""
    output.hint(f"planned time: about {duration(planned * len(seeds))}{each}")

    # 5. Make them, one by one; each is written as soon as it is done.
    making.make(request, output, ranks)
