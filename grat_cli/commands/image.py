"""`grat image`: pictures from a prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, option


def image(
    context: typer.Context,
    prompt: Annotated[str, argument("PROMPT", "What the picture shows.", is_text=True)],
    *,
    res: str | None = option(
        "SIZE",
        "1024, 1536x1024, 4k, 4mp, 16:9 or 16:9@4mp, in multiples of 16. Default: the model's own size.",
        options.PICTURE,
    ),
    sampling: options.SamplingOptions,
    pictures: options.PictureOptions,
    highres: str | None = options.HIGHRES,
    attention: options.AttentionOptions,
    model: options.ModelOptions,
    ranks: options.ParallelOptions,
    preview: int | None = options.PREVIEW,
    out: Path | None = options.OUT,
    format: str | None = option(
        "NAME",
        "png, jpg, webp or tiff. Default: as --out ends, else png.",
        options.OUTPUT,
        complete=options.complete_picture_format,
    ),
    quality: int | None = options.QUALITY,
    keeping: options.KeepingOptions,
    overwrite: bool = options.OVERWRITE,
    no_metadata: bool = options.NO_METADATA,
    terminal: options.TerminalOptions,
) -> None:
    """Make pictures from a prompt, or from a prompt and pictures."""
    from grat_cli.commands import making
    from grat_cli.commands.ranks import leave_to_others
    from grat_cli.errors import BadInput
    from grat_cli.estimates.stages import stages_of, uses_highres
    from grat_cli.files.formats import choose_format
    from grat_cli.generation.selection import cache_note, guard_note, mismatch_note, require_choice
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.resolution import parse_resolution
    from grat_cli.presets import HIGHRES_MODES

    leave_to_others(context, ranks)
    output = terminal.output()

    # 1. What can be refused without looking at any model.
    if not prompt.strip():
        raise BadInput('the prompt is empty: try grat image "a red fox in the snow"')
    model.check()
    pictures.check()
    require_choice("--highres", highres, HIGHRES_MODES)
    seeds = sampling.seeds()
    chosen_format, suffix = choose_format("image", out, format)
    if preview is not None and preview < 1:
        raise BadInput(f"--preview {preview}: expected a number of steps, such as --preview 5")

    # 2. Model, preset, size; whether they fit one another.
    choice = choose_model(model.model, base=model.base)
    chosen = attention.preset_for(choice, sampling, highres)
    size = parse_resolution(res, choice.native_side, choice.size_multiple)
    request, runs = making.planned_request(
        choice,
        chosen,
        size,
        model,
        format=chosen_format,
        quality=quality,
        checkpoint_every=keeping.checkpoint_every,
        negative=sampling.negative,
        pictures=pictures,
    )
    stages = stages_of(chosen, choice, size.width, size.height, handed=request.handed)
    if runs[-1].schedule.density == 1 and stages[-1].preset.attention.variant != "full":
        output.hint(f"at {size} every group attends all others: this is full attention")
    large = uses_highres(chosen, choice, size.width, size.height) and not request.handed
    if highres in ("cascade", "direct") and not large:
        output.hint(f"{choice.name} makes {size} as it is: --highres {highres} changes nothing")

    # 3. Where the pictures go, and whether they fit, before hours are spent on them.
    request = replace(
        request,
        prompt=prompt,
        seeds=seeds,
        negative_prompt=sampling.negative,
        preview_every=preview or 0,
        save_latents=keeping.save_latents,
        metadata=not no_metadata,
        overwrite=overwrite,
        command=options.command_line(context),
    )
    request = making.placed(request, out, suffix)
    making.refuse_unfit(request, size, ranks)

    # 4. What they will be.
    output.hint(f"{choice.name} ({choice.reason}), {size}, {chosen.sampling.steps} steps")
    if len(stages) > 1 and pictures.init_image is None:
        output.hint(f"stages: {', '.join(f'{stage.size} ({stage.steps} steps)' for stage in stages)}")
    output.hint(f"{chosen.name}: {chosen.attention.summary}")
    output.hint(guard_note(chosen, dense=all(run.schedule.density == 1 for run in runs)))
    output.hint(cache_note(chosen))
    output.hint(f"seed {', '.join(map(str, seeds))}")
    output.hint(mismatch_note(chosen, choice))

    # 5. Make them, one by one; each is written as soon as it is done.
    making.make(request, output, ranks)
