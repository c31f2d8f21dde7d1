"""`grat image`: pictures from a prompt."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, option


def image(
    context: typer.Context,
    prompt: Annotated[str, argument("PROMPT", "What the picture shows.")],
    *,
    res: str | None = option(
        "SIZE",
        "1024, 1536x1024, 4k, 4mp, 16:9 or 16:9@4mp, in multiples of 16. Default: the model's own size.",
        options.PICTURE,
    ),
    sampling: options.SamplingOptions,
    init_image: Path | None = option("FILE", "A picture to start from (image-to-image).", options.PICTURE),
    strength: float | None = option(
        "SHARE",
        "How much of --init-image to redo, 0 to 1. Default: 0.7, of large pictures as the preset says.",
        options.PICTURE,
    ),
    highres: str | None = options.HIGHRES,
    attention: options.AttentionOptions,
    model: options.ModelOptions,
    preview: int | None = option(
        "STEPS",
        "Every so many steps, write a small picture of where it is to NAME.preview.png; removed at the end.",
        options.OUTPUT,
    ),
    out: Path | None = options.OUT,
    format: str | None = option(
        "NAME",
        "png, jpg, webp or tiff. Default: as --out ends, else png.",
        options.OUTPUT,
        complete=options.complete_picture_format,
    ),
    quality: int | None = options.QUALITY,
    overwrite: bool = options.OVERWRITE,
    no_metadata: bool = options.NO_METADATA,
    terminal: options.TerminalOptions,
) -> None:
    """Make pictures from a prompt."""
    from grat_cli.errors import BadInput
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import architecture_for, run_forecasts, schedule_for_stage
    from grat_cli.estimates.stages import stages_of, uses_highres
    from grat_cli.families.architectures import ARCHITECTURES
    from grat_cli.files import outputs
    from grat_cli.files.pictures import choose_picture_format, require_writable, write_picture
    from grat_cli.generation import report
    from grat_cli.generation.preview import Preview
    from grat_cli.generation.selection import guard_note, mismatch_note, require_backend, require_choice, variant_word
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.resolution import parse_resolution
    from grat_cli.presets import HIGHRES_MODES

    output = terminal.output()

    # 1. What can be refused without looking at any model.
    if not prompt.strip():
        raise BadInput('the prompt is empty: try grat image "a red fox in the snow"')
    model.check()
    if strength is not None and init_image is None:
        raise BadInput("--strength is for image-to-image: add --init-image FILE")
    if strength is not None and not 0 < strength <= 1:
        raise BadInput(f"--strength {strength:g}: expected more than 0 and at most 1")
    if init_image is not None and not init_image.is_file():
        raise BadInput(f"--init-image {init_image}: there is no such file")
    require_choice("--highres", highres, HIGHRES_MODES)
    seeds = sampling.seeds()
    chosen_format = choose_picture_format(out, format)
    if preview is not None and preview < 1:
        raise BadInput(f"--preview {preview}: expected a number of steps, such as --preview 5")

    # 2. Model, preset, size; whether they fit one another.
    choice = choose_model(model.model)
    chosen = attention.preset_for(choice, sampling, highres)
    resolution = parse_resolution(res, choice.native_side, choice.size_multiple)
    require_writable(chosen_format, resolution.width, resolution.height, quality)
    stages = stages_of(chosen, choice, resolution.width, resolution.height)
    if choice.name in ARCHITECTURES:  # of other models only the checkpoint knows the layers
        architecture = architecture_for(choice)
        schedules = [schedule_for_stage(stage, architecture) for stage in stages]
        tokens = schedules[-1].plans[0].tokens
        require_backend(chosen.kernel.backend, model.device, model.dtype, architecture.head_dim, tokens)
        if schedules[-1].density == 1 and stages[-1].preset.attention.variant != "full":
            output.hint(f"at {resolution} every group attends all others: this is full attention")
    if highres in ("cascade", "direct") and not uses_highres(chosen, choice, resolution.width, resolution.height):
        output.hint(f"{choice.name} makes {resolution} as it is: --highres {highres} changes nothing")

    # 3. Where the pictures go, before hours are spent on them.
    now = datetime.now().astimezone()
    word = variant_word(chosen)
    suffix = chosen_format.suffix_of(out)
    names = [outputs.default_name(now, prompt, str(resolution), word, seed, suffix) for seed in seeds]
    paths = outputs.output_paths(out, names, seeds, suffix)
    outputs.refuse_unwritable([*paths, *map(outputs.report_path, paths)], overwrite=overwrite)
    previews = {}
    if preview is not None:
        previews = {
            seed: Preview(outputs.preview_path(path), preview, choice.native_side, overwrite)
            for seed, path in zip(seeds, paths, strict=True)
        }
        outputs.refuse_unwritable([each.path for each in previews.values()], overwrite=overwrite)

    # 4. Whether they fit, before minutes are spent on loading.
    refuse_unfit_here(choice, partial(run_forecasts, chosen, choice), resolution, **model.machine)

    # 5. Make them, one by one; each is written as soon as it is done.
    from grat_cli.files.whole import claimed
    from grat_cli.generation.image_request import ImageRequest
    from grat_cli.generation.pictures import generate_images

    output.hint(f"{choice.name} ({choice.reason}), {resolution}, {chosen.sampling.steps} steps")
    if len(stages) > 1 and init_image is None:
        output.hint(f"stages: {', '.join(f'{stage.size} ({stage.steps} steps)' for stage in stages)}")
    output.hint(f"{chosen.name}: {chosen.attention.summary}")
    dense = choice.name in ARCHITECTURES and all(one.density == 1 for one in schedules)
    output.hint(guard_note(chosen, dense=dense))
    output.hint(f"seed {', '.join(map(str, seeds))}")
    output.hint(mismatch_note(chosen, choice))
    request = ImageRequest(
        prompt=prompt,
        preset=chosen,
        model=choice,
        width=resolution.width,
        height=resolution.height,
        seeds=seeds,
        negative_prompt=sampling.negative,
        **model.machine,
        init_image=init_image,
        strength=strength,
        base=model.base,
        previews=previews,
    )
    command = options.command_line(context)
    reports: list[dict[str, Any]] = []
    with claimed(paths), output.progress() as progress:
        for path, generated in zip(paths, generate_images(request, progress), strict=True):
            made = report.build_report(request, generated, command, datetime.now().astimezone())
            progress.phase("save")
            began = perf_counter()
            inside = None if no_metadata else report.provenance(made)
            whole = write_picture(
                generated.image,
                path,
                chosen_format,
                inside,
                overwrite=overwrite,
                quality=quality,
                written=progress.written,
            )
            if inside and not whole:
                progress.note(f"{path} has no room for how it was made: that is in {outputs.report_path(path).name}")
            if generated.seed in previews:
                previews[generated.seed].remove()
            made["phases"]["save"] = round((perf_counter() - began) * 1000, 3)
            outputs.write_json(made, outputs.report_path(path), overwrite=overwrite)
            reports.append(made)
            output.line(str(path))

    # 6. What it took.
    output.data({"images": [{"file": str(path), **made} for path, made in zip(paths, reports, strict=True)]})
    if len(reports) == 1:
        output.show(report.timing_table(reports[0]), report.phases_line(reports[0]))
    else:
        output.show(report.pictures_table(reports))
    output.show(*report.guard_lines(reports))
