"""`grat image`: pictures from a prompt."""

from __future__ import annotations

import shlex
from datetime import datetime
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grat_cli.commands import options
from grat_cli.console.output import Output

if TYPE_CHECKING:
    from grat_cli.estimates.planning import Forecast


def image(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.", show_default=False)],
    res: options.Res = None,
    seed: options.Seed = None,
    n: options.Count = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = None,
    init_image: options.InitImage = None,
    strength: options.Strength = None,
    highres: options.Highres = None,
    preset: options.PresetName = None,
    variant: options.VariantName = None,
    group: options.Group = None,
    radius: options.Radius = None,
    share: options.Share = None,
    guard: options.Guard = None,
    set_items: options.SetItems = None,
    backend: options.BackendChoice = None,
    model: options.ModelName = None,
    base: options.Base = None,
    device: options.DeviceName = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = "none",
    quantize: options.Quantize = "none",
    preview: options.PreviewEvery = None,
    out: options.Out = None,
    format: options.PictureFormat = None,
    quality: options.Quality = None,
    overwrite: options.Overwrite = False,
    no_metadata: options.NoMetadata = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make pictures from a prompt."""
    from grat_cli.errors import BadInput
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import architecture_for, schedule_for_stage, stage_forecasts
    from grat_cli.estimates.stages import stages_of, uses_highres
    from grat_cli.files import outputs
    from grat_cli.files.pictures import choose_picture_format, require_writable, write_picture
    from grat_cli.generation import report
    from grat_cli.generation.preview import Preview
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
    from grat_cli.models.catalogue import choose_model, is_known
    from grat_cli.models.offloading import OFFLOADS
    from grat_cli.models.quantization import QUANTIZATIONS
    from grat_cli.models.resolution import parse_resolution
    from grat_cli.presets import HIGHRES_MODES

    output = Output(as_json=as_json, quiet=quiet)

    # 1. What can be refused without looking at any model.
    if not prompt.strip():
        raise BadInput('the prompt is empty: try grat image "a red fox in the snow"')
    require_device(device)
    require_choice("--dtype", dtype, DTYPES)
    require_choice("--offload", offload, OFFLOADS)
    require_choice("--quantize", quantize, QUANTIZATIONS)
    if strength is not None and init_image is None:
        raise BadInput("--strength is for image-to-image: add --init-image FILE")
    if strength is not None and not 0 < strength <= 1:
        raise BadInput(f"--strength {strength:g}: expected more than 0 and at most 1")
    if init_image is not None and not init_image.is_file():
        raise BadInput(f"--init-image {init_image}: there is no such file")
    if highres is not None:
        require_choice("--highres", highres, HIGHRES_MODES)
    seeds = resolve_seeds(seed, n)
    chosen_format = choose_picture_format(out, format)
    if preview is not None and preview < 1:
        raise BadInput(f"--preview {preview}: expected a number of steps, such as --preview 5")

    # 2. Model, preset, size; whether they fit one another.
    choice = choose_model(model)
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
        highres=highres,
        guard=guard,
        set_items=set_items or (),
    )
    resolution = parse_resolution(res, choice.native_side, choice.size_multiple)
    require_writable(chosen_format, resolution.width, resolution.height, quality)
    stages = stages_of(chosen, choice, resolution.width, resolution.height)
    if is_known(choice):  # of other models only the checkpoint knows the layers
        architecture = architecture_for(choice)
        schedules = [schedule_for_stage(stage, architecture) for stage in stages]
        tokens = schedules[-1].plans[0].tokens
        require_backend(chosen.kernel.backend, device, dtype, architecture.head_dim, tokens)
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
            seed: Preview(outputs.preview_path(path), preview, choice.native_side)
            for seed, path in zip(seeds, paths, strict=True)
        }
        outputs.refuse_unwritable([each.path for each in previews.values()], overwrite=True)

    # 4. Whether they fit, before minutes are spent on loading.
    def forecasts(size: Any, in_dtype: str) -> list[Forecast]:
        return stage_forecasts(
            stages_of(chosen, choice, size.width, size.height), choice.name, architecture_for(choice), in_dtype
        )

    refuse_unfit_here(choice, forecasts, resolution, device=device, dtype=dtype, offload=offload, quantize=quantize)

    # 5. Make them, one by one; each is written as soon as it is done.
    from grat_cli.generation.image_request import ImageRequest
    from grat_cli.generation.pictures import generate_images

    output.hint(f"{choice.name} ({choice.reason}), {resolution}, {chosen.sampling.steps} steps")
    if len(stages) > 1 and init_image is None:
        output.hint(f"stages: {', '.join(f'{stage.size} ({stage.steps} steps)' for stage in stages)}")
    output.hint(f"{chosen.name}: {chosen.attention.summary}")
    if note := guard_note(chosen, dense=is_known(choice) and all(one.density == 1 for one in schedules)):
        output.hint(note)
    output.hint(f"seed {', '.join(map(str, seeds))}")
    if note := mismatch_note(chosen, choice):
        output.hint(note)
    request = ImageRequest(
        prompt=prompt,
        preset=chosen,
        model=choice,
        width=resolution.width,
        height=resolution.height,
        seeds=seeds,
        negative_prompt=negative,
        device=device,
        dtype=dtype,
        offload=offload,
        quantize=quantize,
        init_image=init_image,
        strength=strength,
        base=base,
        previews=previews,
    )
    command = shlex.join(["grat", *(context.find_root().obj or ())])
    reports: list[dict[str, Any]] = []
    with output.progress() as progress:
        for path, generated in zip(paths, generate_images(request, progress), strict=True):
            made = report.build_report(request, generated, command, datetime.now().astimezone())
            progress.phase("save")
            began = perf_counter()
            inside = None if no_metadata else report.provenance(made)
            whole = write_picture(
                generated.image, path, chosen_format, inside, quality=quality, written=progress.written
            )
            if inside and not whole:
                progress.note(f"{path} has no room for how it was made: that is in {outputs.report_path(path).name}")
            if generated.seed in previews:
                previews[generated.seed].remove()
            made["phases"]["save"] = round((perf_counter() - began) * 1000, 3)
            outputs.write_json(made, outputs.report_path(path))
            reports.append(made)
            output.line(str(path))

    # 6. What it took.
    output.data({"images": [{"file": str(path), **made} for path, made in zip(paths, reports, strict=True)]})
    if len(reports) == 1:
        output.show(report.timing_table(reports[0]), report.phases_line(reports[0]))
    else:
        output.show(report.pictures_table(reports))
    output.show(*report.guard_lines(reports))
