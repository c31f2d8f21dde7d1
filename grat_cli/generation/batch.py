"""Batches: many prompts with one loaded model. What is there whole is skipped, so that a batch can be gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from grat_cli.console.progress import ProgressDisplay
from grat_cli.errors import BadInput, Interrupted, NumericalFailure
from grat_cli.files.outputs import (
    checkpoint_path,
    latents_path,
    read_provenance,
    refuse_unwritable,
    report_path,
    slug,
    write_json,
)
from grat_cli.files.prompts import PromptEntry
from grat_cli.files.whole import adopt, cannot_write, claimed, discard, place, remove
from grat_cli.generation.batch_layout import Layout, Sample, has_metadata, write_metadata
from grat_cli.generation.checkpoint import Run, discard_run, read_run, request_data
from grat_cli.generation.denoising import Text
from grat_cli.generation.inputs import refuse_sizes
from grat_cli.generation.request import Request, check_pictures
from grat_cli.generation.run import Generator, take_up
from grat_cli.models.devices import choose_device

# Outputs are made here, with all that is kept of one until it is written, and moved to their place whole.
UNFINISHED = "unfinished"
_NOT_SHOWN_OF_PRESETS = ("name", "description", "model", "kernel", "evidence")
# What says how an output is kept and told of, not what it shows.
_NOT_OF_THE_OUTPUT = ("command", "checkpoint_every", "preview_every", "save_latents")


@dataclass(frozen=True)
class Batch:
    """A batch, and how it is written.

    Attributes:
        file: of the prompts.
        layout: of its outputs.
        out: their folder.
        samples: all of them, those that are there already included.
        template: what is made of each prompt; prompt, negative prompt, seeds and outputs are replaced. Its `overwrite`
            says whether outputs of other requests may be replaced.
    """

    file: Path
    layout: Layout
    out: Path
    samples: Sequence[Sample]
    template: Request

    @property
    def overwrite(self) -> bool:
        """Whether outputs of other requests may be replaced."""
        return self.template.overwrite

    def told(self, sample: Sample) -> dict[str, Any]:
        """What the report of a sample says of the batch: its place in the file, and all that stands there."""
        return {
            "file": str(self.file),
            "place": sample.entry.place,
            "sample": sample.index,
            "layout": self.layout.name,
            "item": dict(sample.entry.item),
        }


@dataclass(frozen=True)
class Failure:
    """A sample that could not be made, and why, in one line."""

    sample: Sample
    reason: str


def missing(batch: Batch) -> list[Sample]:
    """The samples that are not there whole; makes sure that they can be written, and makes the folders for them.

    Of the plain layout, whose names hold a time, an output is there if a report in the folder says the same request.

    Args:
        batch: with all samples.

    Raises:
        BadInput: if something else is in the way, or cannot be written.
    """
    if batch.layout.name == "plain":
        left = _not_told_of(batch)
    else:
        left = [sample for sample in batch.samples if not _is_there(batch, sample)]
    _make_folder(batch.out)
    for sample in left:
        for path in (sample.output, sample.report):
            _make_folder(path.parent)
        # A report of the same that lacks its output is what a killed process left.
        if same := _facts_found(sample.report) == _facts_asked(batch.template, sample):
            adopt(sample.report)
        refuse_unwritable([sample.output], overwrite=batch.overwrite)
        refuse_unwritable([sample.report], overwrite=batch.overwrite or same)
    return left


def make_samples(
    batch: Batch, samples: Sequence[Sample], progress: ProgressDisplay
) -> Iterator[tuple[Sample, Mapping[str, Any]] | Failure]:
    """Makes samples one by one with one loaded model; each is written, its report too, before the next begins.

    Args:
        batch: that they belong to.
        samples: of `missing`, those of one prompt together.
        progress: told how it goes on.

    Yields:
        Each sample and its report, or its numerical failure, after which the others go on.

    Raises:
        BadInput, ModelUnavailable, OutOfMemory: as for `generate`.
        CannotWrite: if there is no room; what was made before is still there.
        Interrupted: by Ctrl-C, with how to go on.
    """
    if not samples:
        return
    done = 0
    try:
        # 1. What evaluators read beside the samples.
        for sample in {sample.metadata: sample for sample in samples}.values():
            write_metadata(sample, overwrite=batch.overwrite)

        # 2. Load the model, once.
        said = _SaidOnce(progress)
        worker = _Worker(batch, samples, said)

        # 3. Make one sample after another.
        progress.outputs(0, len(samples))
        for done, sample in enumerate(samples):
            said.begin()
            try:
                result = sample, worker.make(sample, is_last=done == len(samples) - 1)
            except NumericalFailure as error:
                result = Failure(sample, str(error).splitlines()[0])
            progress.outputs(done + 1, len(samples))
            yield result
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"interrupted after {done} of {len(samples)}; the same command goes on with the others"
        ) from None
    finally:
        _discard_if_empty(batch.out / UNFINISHED)


class _Worker:
    """A loaded model that makes the samples of a batch, each in a folder of its own until it is whole.

    All prompts are encoded first: afterwards the memory of the text encoders is free.
    """

    def __init__(self, batch: Batch, samples: Sequence[Sample], progress: _SaidOnce) -> None:
        self._batch, self._progress = batch, progress
        self._generator = Generator(_request(batch.template, samples[0]), progress)
        self._texts: dict[tuple[Any, ...], Text] = {}
        for sample in samples:
            request = _request(batch.template, sample)
            asked = request.prompt, request.negative_prompt, sample.pictures
            if asked not in self._texts:
                self._generator.take(request)
                self._texts[asked] = self._generator.encode(request)
        self._generator.release_text_encoders()

    def make(self, sample: Sample, *, is_last: bool) -> Mapping[str, Any]:
        """Makes and writes one, and returns its report."""
        # 1. Make it, but for what an earlier process has done of it.
        batch, unfinished = self._batch, self._batch.out / UNFINISHED
        _make_folder(unfinished)
        request = _request(batch.template, sample)
        work = unfinished / _work_name(request)
        # What lies there under that name was made of this very request.
        request = replace(request, outputs=(work,), overwrite=True)
        with claimed([work]):
            made = _finished(work)
            if made is None:
                text = self._texts[request.prompt, request.negative_prompt, sample.pictures]
                self._generator.take(request)
                try:
                    made = self._generator.make(request, self._begun(work, sample.seed), work, text, is_last=is_last)
                except NumericalFailure:
                    discard_run(work, overwrite=True)  # going on with it would fail again
                    raise
                made = made.report

            # 2. Move the report, then the output: one that is there has its report.
            told = {**made, "batch": batch.told(sample)}
            write_json(told, sample.report, overwrite=batch.overwrite)
            _move(work, sample.output, overwrite=batch.overwrite)
            remove(report_path(work), overwrite=True)
        return told

    def _begun(self, work: Path, seed: int) -> Run:
        """The run that an earlier process has left, else a new one."""
        for kept in (latents_path(work), checkpoint_path(work)):
            if not kept.is_file():
                continue
            try:
                run, _ = read_run(kept)
                run.refuse_other_weights(self._generator.revision, self._generator.files)
            except BadInput as error:
                self._progress.note(f"{error}: {work.stem} is begun anew")
                continue
            self._progress.note(f"{work.stem} goes on after step {run.done}")
            take_up(run, choose_device(self._batch.template.device), self._progress)
            return run
        return self._generator.new_run(seed)


class _SaidOnce:
    """A `generation_request.Progress` that passes on what it is told, but no note or phase twice in a batch."""

    def __init__(self, progress: ProgressDisplay) -> None:
        self._progress = progress
        self._notes: set[str] = set()
        self._phase = ""

    def begin(self) -> None:
        """A sample begins, whose first phase may be the last one's latest."""
        self._phase = ""

    def phase(self, name: str) -> None:
        if name != self._phase:
            self._progress.phase(name)
        self._phase = name

    def step(self, done: int, total: int) -> None:
        self._progress.step(done, total)

    def written(self, count: int) -> None:
        self._progress.written(count)

    def note(self, text: str) -> None:
        if text not in self._notes:
            self._progress.note(text)
        self._notes.add(text)


def _request(template: Request, sample: Sample) -> Request:
    """The request of one sample."""
    prompt, negative, seed = sample.asked
    told = {"prompt": prompt, "negative_prompt": negative, "seeds": (seed,), "outputs": (sample.output,)}
    return replace(template, **told, **pictures_of(sample.entry))


def pictures_of(entry: PromptEntry) -> dict[str, Any]:
    """The pictures of an entry, as requests take them."""
    one = {name: next(iter(entry.pictures.get(name, ())), None) for name in ("init_image", "mask", "control")}
    return {**one, "references": entry.pictures.get("reference", ())}


def refuse_pictures(batch: Batch) -> None:
    """Makes sure, before anything is loaded, that a model takes the pictures of each sample, and that they are there.

    Raises:
        BadInput: if not, with the place of the entry.
    """
    for sample in {sample.entry.place: sample for sample in batch.samples}.values():
        request = _request(batch.template, sample)
        try:
            check_pictures(request)
            refuse_sizes(request)
        except BadInput as error:
            raise BadInput(f"{batch.file}, {sample.entry.place}: {error}") from error


def _work_name(request: Request) -> str:
    """A name that an output has while it is made, the same whenever the same is asked for."""
    data = {name: value for name, value in request_data(request).items() if name not in _NOT_OF_THE_OUTPUT}
    digest = sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
    return f"{slug(request.prompt)}-s{request.seeds[0]}-{digest}{request.outputs[0].suffix}"


def _is_there(batch: Batch, sample: Sample) -> bool:
    """Whether a sample is at its place, whole, and of the same request.

    Raises:
        BadInput: if something else is, and may not be overwritten.
    """
    metadata, overwrite = sample.metadata, batch.overwrite
    if metadata is not None and not overwrite and os.path.lexists(metadata) and not has_metadata(sample):
        raise BadInput(
            f"{metadata} is of another prompt than {sample.entry.place} of {batch.file}: "
            "use another --out, or --overwrite"
        )
    if not sample.output.exists():
        return False
    asked, found = _facts_asked(batch.template, sample), _facts_found(sample.report)
    if found == asked:
        return True
    if not overwrite:
        if found is None:
            raise BadInput(f"{sample.output} exists and has no report: use another --out, or --overwrite")
        told, wanted = json.loads(found), json.loads(asked)
        others = ", ".join(name for name in wanted if wanted[name] != told.get(name))
        raise BadInput(
            f"{sample.output} was made with other options ({others}): "
            "to go on, give the same as then; or another --out, or --overwrite"
        )
    return False


def _not_told_of(batch: Batch) -> list[Sample]:
    """The samples that no report in a folder of plain names tells of; one whose output is lost keeps its name."""
    suffix = batch.samples[0].output.suffix
    outputs = {_facts_found(path): path.with_name(path.stem + suffix) for path in sorted(batch.out.glob("grat-*.json"))}
    left = []
    for sample in batch.samples:
        output = outputs.get(_facts_asked(batch.template, sample))
        if output is None:
            left.append(sample)
        elif not output.exists():
            left.append(replace(sample, output=output, report=report_path(output)))
    return left


def _facts_asked(template: Request, sample: Sample) -> str:
    """All that decides what a sample shows, as JSON; device, dtype and kernels do not, but for rounding."""
    request = _request(template, sample)
    facts = {
        "prompt": request.prompt,
        "negative prompt": request.negative_prompt,
        "seed": sample.seed,
        "size": [request.width, request.height],
        "model": request.model.source,
        "quantization": [request.weights.quantize, request.weights.cast],
        "text encoder": request.weights.text_encoder and Path(request.weights.text_encoder).name,
        "pictures": [path.name for files in sample.entry.pictures.values() for path in files],
        **_facts_of_preset(request.preset.model_dump(mode="json")),
    }
    if request.frames:
        facts["size"] += [request.frames]
        facts["frame rate"] = request.fps
    return json.dumps(facts)


def _facts_found(path: Path) -> str | None:
    """The same as a report tells it; None where there is none, or another kind of file."""
    try:
        told = read_provenance(path)
        facts = {
            "prompt": told["prompt"],
            "negative prompt": told["negative_prompt"],
            "seed": told["seed"],
            "size": [told["width"], told["height"]],
            "model": told["model"]["source"],
            "quantization": [told["device"]["quantize"], told["device"].get("cast", "none")],
            "text encoder": told["model"].get("text_encoder"),
            "pictures": [picture["file"] for picture in told.get("pictures", ())],
            **_facts_of_preset(told["preset"]),
        }
        if "frames" in told:
            facts["size"] += [told["frames"]]
            facts["frame rate"] = told["fps"]
    except (BadInput, KeyError, TypeError, AttributeError):
        return None
    return json.dumps(facts)


def _facts_of_preset(preset: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in preset.items() if name not in _NOT_SHOWN_OF_PRESETS}


def _finished(work: Path) -> Mapping[str, Any] | None:
    """The report of a video that is written, and was not moved because the process ended just then."""
    if not report_path(work).is_file():
        if work.is_dir():  # of frames, which nothing takes the place of
            discard(work)
        return None
    discard_run(work, overwrite=True)
    return read_provenance(report_path(work)) if work.exists() else None


def _move(work: Path, output: Path, *, overwrite: bool) -> None:
    """Puts what is whole in its place.

    Raises:
        CannotWrite: if it cannot be put there, or something is there that may not be replaced.
    """
    try:
        place(work, output, overwrite=overwrite)
    except OSError as error:
        raise cannot_write(output, error) from error


def _make_folder(folder: Path) -> None:
    """Raises BadInput if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder}: {(error.strerror or str(error)).lower()}") from error


def _discard_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # it is not there, or a video is begun in it
        return
