"""`grat batch`: many prompts with one loaded model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, changed, only, option

if TYPE_CHECKING:
    from grat_cli.files.prompts import PromptEntry
    from grat_cli.files.stores import Store
    from grat_cli.generation.cluster import Cluster
    from grat_cli.models.catalogue import Medium

_FAILURES_NAMED, _KEYS_NAMED = 3, 8
_MOST_WORKERS = 100_000
_OUTPUTS: Mapping[Medium, str] = {"image": "pictures", "video": "videos"}


def batch(
    context: typer.Context,
    file: Annotated[
        Path,
        argument(
            "FILE",
            "Prompts: .txt with one per line, .jsonl with an object per line, or .json with a list of them "
            "(prompt; if wanted negative or negative_prompt, seed, n, and picture files: init_image, mask, control, "
            "reference; "
            "other keys are kept).",
        ),
    ],
    *,
    layout: str = option(
        "NAME",
        "plain: grat's own names; geneval, vbench: the folders that these evaluators read.",
        options.OUTPUT,
        "plain",
        complete=options.complete_layout,
    ),
    extent: options.SizeOptions,
    seed: int = option(
        "SEED",
        "Of the first sample of each prompt; the next ones take the seeds that follow. Default: 0.",
        options.PICTURE,
        0,
    ),
    n: int | None = option(
        "COUNT", "Samples of each prompt. Default: 1; 4 for geneval, 5 for vbench.", options.PICTURE
    ),
    sampling: Annotated[options.SamplingOptions, only("steps", "guidance", "negative")],
    highres: str | None = options.HIGHRES,
    attention: options.AttentionOptions,
    model: Annotated[
        options.ModelOptions,
        changed(
            model=option(
                "NAME",
                "As for grat image and grat video. Default: flux-dev, or hunyuan for videos, with a CUDA device, "
                "else demo.",
                options.MODEL,
                complete=options.complete_any_model,
                is_place=True,
            )
        ),
    ],
    out: str | None = option(
        "FOLDER",
        "Where to write, or an address that fsspec knows, such as s3://BUCKET/NAME. Default: the current folder; for "
        "geneval and vbench one named after FILE.",
        options.OUTPUT,
    ),
    format: str | None = option(
        "NAME", "png, jpg, webp or tiff; of videos mp4, gif, webm or frames. Default: png, mp4.", options.OUTPUT
    ),
    quality: int | None = options.QUALITY,
    crf: int | None = options.CRF,
    keeping: Annotated[options.KeepingOptions, only("checkpoint_every")],
    shard: str | None = option(
        "PART",
        "Share the batch with other workers that write to the same folder: 2/8 begins with the second of eight parts, "
        "then helps with what is left of the others; auto: as torchrun or a Slurm array says.",
        options.OUTPUT,
    ),
    ray: str | None = option(
        "ADDRESS",
        "Deal the batch out to a Ray cluster, a worker with the model per GPU: local for those of this machine, auto, "
        "HOST:6379 or ray://HOST:10001. --out is a folder that all machines see, or an address.",
        options.OUTPUT,
    ),
    workers: int | None = option(
        "COUNT", "Of --ray, at most. Default: a worker per GPU, where there is none per core.", options.OUTPUT
    ),
    overwrite: bool = options.OVERWRITE,
    no_metadata: bool = options.NO_METADATA,
    terminal: options.TerminalOptions,
) -> None:
    """Make pictures or videos of many prompts; typed again, it goes on with what is missing."""
    from grat_cli.commands import making
    from grat_cli.console.progress import duration
    from grat_cli.console.worker_table import worker_table
    from grat_cli.errors import BadInput, NumericalFailure
    from grat_cli.estimates.time import planned_seconds
    from grat_cli.files import outputs
    from grat_cli.files.formats import choose_format
    from grat_cli.files.prompts import LARGEST_SEED, MOST_OUTPUTS, read_prompts, unknown_keys
    from grat_cli.files.stores import store_of
    from grat_cli.generation.batch import make_samples, missing
    from grat_cli.generation.batch_folder import Batch, refuse_pictures
    from grat_cli.generation.batch_layout import LAYOUTS, lay_out
    from grat_cli.generation.batch_worker import Failure, MadeElsewhere
    from grat_cli.generation.request import note_expectations
    from grat_cli.generation.selection import mismatch_note, require_choice, variant_word
    from grat_cli.generation.sharing import Shard, of_launcher, parse_shard
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.devices import device_of_worker
    from grat_cli.presets import HIGHRES_MODES

    output = terminal.output()

    # 1. What can be refused without looking at any model.
    require_choice("--layout", layout, tuple(LAYOUTS))
    chosen_layout = LAYOUTS[layout]
    model.check()
    if not 0 <= seed <= LARGEST_SEED:
        raise BadInput(f"--seed {seed}: seeds go from 0 to {LARGEST_SEED}")
    if n is not None and not 1 <= n <= MOST_OUTPUTS:
        raise BadInput(f"--n {n}: expected 1 to {MOST_OUTPUTS} samples")
    default = "." if chosen_layout.name == "plain" else f"{file.stem}-{chosen_layout.name}"
    store, folder = store_of(default if out is None else out, "--out")
    if out and ((store.has_claims and folder.is_file()) or folder.suffix.lower() in outputs.OUTPUT_SUFFIXES):
        raise BadInput(f"--out {out}: a batch goes into a folder: use --out {out.removesuffix(folder.suffix)}")
    if shard is not None and not store.has_claims:
        raise BadInput(f"--out {out}: workers of --shard meet in a folder that all see: use one, or --ray")
    require_choice("--highres", highres, HIGHRES_MODES)
    part = None if shard is None else parse_shard(shard, os.environ)
    if part is None and (started := of_launcher(os.environ)) and started.count > 1:
        raise BadInput(f"torchrun has started {started.count} of this batch: add --shard auto, so that they share it")
    cluster = _cluster(ray, workers, shard, model)
    entries = read_prompts(file)
    if ignored := unknown_keys(entries):
        named = ", ".join(ignored[:_KEYS_NAMED]) + (" and more" if len(ignored) > _KEYS_NAMED else "")
        output.hint(f"{file}: kept, but without meaning here: {named}")

    # 2. Model, preset, size; whether they fit one another and this machine.
    of_one: dict[Medium, dict[str, Any]] = {
        "image": {"--highres": highres, "--quality": quality},
        "video": {f"--{name}": value for name, value in vars(extent).items() if name != "res"} | {"--crf": crf},
    }
    if cluster and not cluster.is_here and model.device == "cuda":
        model = replace(model, device="auto")  # this machine may have none
    if part is not None:
        model = replace(model, device=device_of_worker(model.device, part.local_rank))
    medium = _medium(chosen_layout.medium, chosen_layout.name, model.model, of_one)
    choice = choose_model(model.model, medium, model.base)
    chosen = attention.preset_for(choice, sampling, highres)
    output.hint(f"{choice.name} ({choice.reason}), {chosen.name}: {chosen.attention.summary}")
    output.hint(mismatch_note(chosen, choice))
    if format is not None and chosen_layout.formats and format not in chosen_layout.formats:
        raise BadInput(f"--layout {layout} takes {' or '.join(chosen_layout.formats)} files, not {format}")
    chosen_format, suffix = choose_format(medium, None, format)
    if not suffix and not store.has_claims:
        raise BadInput(f"--format {format}: frames go to a folder of a machine: use another format, or another --out")
    size = extent.size_for(choice)
    template, runs = making.planned_request(
        choice,
        chosen,
        size,
        model,
        format=chosen_format,
        quality=crf if quality is None else quality,
        checkpoint_every=keeping.checkpoint_every,
        pictures=_pictures(entries),
    )
    if cluster is None or cluster.is_here:
        making.refuse_unfit(template, size)
    template = replace(template, metadata=not no_metadata, overwrite=overwrite, command=options.command_line(context))
    output.hint(*getattr(size, "notes", ()))
    stages = ", ".join(f"{run.size} ({run.schedule.steps} steps)" for run in runs)
    planned = f": about {duration(planned_seconds(runs[0], model.device, model.dtype))} each" if template.fps else ""
    output.hint(f"{'stages: ' if len(runs) > 1 else ''}{stages}{planned}")

    # 3. Where everything goes, and what is there already.
    now, word = datetime.now().astimezone(), variant_word(chosen)
    samples = lay_out(
        entries,
        chosen_layout,
        folder,
        suffix=suffix,
        first_seed=seed,
        samples=n,
        negative=sampling.negative,
        plain_name=lambda prompt, seed: outputs.default_name(now, prompt, template.size, word, seed, suffix),
    )
    whole = Batch(file, chosen_layout, folder, samples, template, Shard(1, 1) if cluster else part, store)
    refuse_pictures(whole)
    left = missing(whole)
    there = len(samples) - len(left)
    skipped = f", {there} of them are there already" if there else ""
    output.hint(f"prompts: {len(entries)}, {medium}s: {len(samples)}{skipped}")
    if repeated := len(entries) - len({sample.entry.place for sample in samples}):
        output.hint(f"{repeated} of the prompts stand there before, with the same seed: they are made once")

    # 4. Make the others, one by one; each is written as soon as it is done.
    made, others, failures = [], 0, []
    with output.progress() as progress:
        if left:
            words = " ".join(dict.fromkeys(" ".join(sample.entry.prompt for sample in left).split()))
            note_expectations(replace(template, prompt=words), progress)
        with closing(make_samples(whole, left, progress, cluster)) as results:
            for result in results:
                if isinstance(result, Failure):
                    failures.append(result)
                    progress.note(f"{result.sample.output.name} failed: {result.reason}")
                elif isinstance(result, MadeElsewhere):
                    others += 1
                else:
                    made.append(result.sample)
                    if store.has_claims:
                        output.file(result.sample.output)
                    else:
                        output.line(store.shown(result.sample.output))

    # 5. What came of it.
    where = store.shown(folder / chosen_layout.folder)
    workers_then = [row for row in cluster.workers if row.device] if cluster else []
    output.data(
        {
            "layout": chosen_layout.name,
            "folder": where,
            "made": [_sample_data(sample, store) for sample in made],
            "made_by_others": others,
            **({"workers": [asdict(row) for row in workers_then]} if cluster else {}),
            "skipped": there,
            "failed": [{**_sample_data(failure.sample, store), "reason": failure.reason} for failure in failures],
        }
    )
    if workers_then:
        output.show(worker_table(workers_then, output.console.width, is_live=False))
    by_others = f" {others} made by others," if part or others else ""
    output.show(f"{len(made)} made,{by_others} {there} there before, {len(failures)} failed, in {where}")
    for failure in failures:
        output.show(f"failed: {failure.sample.entry.prompt} (seed {failure.sample.seed}): {failure.reason}")
    if failures:
        names = ", ".join(store.shown(failure.sample.output) for failure in failures[:_FAILURES_NAMED])
        more = f" and {len(failures) - _FAILURES_NAMED} more" if len(failures) > _FAILURES_NAMED else ""
        raise NumericalFailure(
            f"{len(failures)} of {len(left)} failed: {names}{more}\n"
            f"{failures[0].reason}; the same command tries these again"
        )


def _medium(of_layout: Medium | None, layout: str, model: str | None, of_one: dict[Medium, dict[str, Any]]) -> Medium:
    """Whether pictures or videos are meant: as the layout says, else the model's name, else the options.

    Args:
        of_layout: what the layout is for, None for either.
        layout: its name.
        model: `--model`, None where it was not given.
        of_one: options that suit one alone, with what was given for them or None.

    Raises:
        BadInput: if these contradict one another.
    """
    from grat_cli.errors import BadInput
    from grat_cli.models.catalogue import medium_of_name

    given = {one: [option for option, value in own.items() if value is not None] for one, own in of_one.items()}
    named = medium_of_name(model) if model else None
    medium: Medium = of_layout or named or ("video" if given["video"] else "image")
    if named not in (None, medium):
        raise BadInput(f"--layout {layout} is for {medium}s, and {model} makes {named}s: give another --model")
    for other, outputs in _OUTPUTS.items():
        if given[other] and other != medium:
            raise BadInput(f"{given[other][0]} is for {outputs}, and these are {medium}s: leave it out")
    return medium


def _cluster(
    address: str | None, workers: int | None, shard: str | None, model: options.ModelOptions
) -> Cluster | None:
    """The cluster of `--ray`, None without it.

    Raises:
        BadInput: if Ray is not installed, or another option says otherwise.
    """
    from importlib.util import find_spec

    from grat_cli.errors import BadInput, ModelUnavailable

    if address is None:
        if workers is not None:
            raise BadInput(f"--workers {workers} is for --ray: give that too, or leave it out")
        return None
    if workers is not None and not 1 <= workers <= _MOST_WORKERS:
        raise BadInput(f"--workers {workers}: expected 1 to {_MOST_WORKERS}")
    if shard is not None:
        raise BadInput("--ray and --shard exclude each other: with --ray one process deals the batch out to all")
    if model.device not in ("auto", "cuda", "cpu"):
        raise BadInput(f"--device {model.device}: workers of --ray get a GPU each: use cuda, or cpu")
    if find_spec("ray") is None:
        raise BadInput("--ray needs Ray, which is not installed: pip install 'grat-cli[ray]'")
    from grat_cli.generation import cluster

    if address != cluster.HERE and model.model is None:
        raise ModelUnavailable(
            f"--ray {address}: give a --model, since this machine cannot know what suits the cluster"
        )
    return cluster.Cluster(address, workers, model.device)


def _pictures(entries: Sequence[PromptEntry]) -> options.PictureOptions:
    """Those of the first entry, by which a batch is planned."""
    from grat_cli.generation.batch_folder import pictures_of

    given = pictures_of(entries[0])
    references = list(given.pop("references"))
    return options.PictureOptions(**given, reference=references)


def _sample_data(sample: Any, store: Store) -> dict[str, Any]:
    prompt, negative, seed = sample.asked
    return {
        "file": store.shown(sample.output),
        "report": store.shown(sample.report),
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": seed,
    }
