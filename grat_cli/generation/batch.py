"""Batches: many prompts with one loaded model. What is there whole is skipped, so that a batch can be gone on with.

Several workers may share one (`sharing`). Then whoever makes a sample has claimed it, and nothing is replaced but what
was there when it was claimed. A report is written before the claim is looked at for the last time, and the output moved
after that: so whoever takes over from a worker that was suspended in between finds its report, and uses the same name,
which the output of only one of them can take.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from grat_cli.console.progress import ProgressDisplay
from grat_cli.errors import BadInput, CannotWrite, Interrupted, NumericalFailure, first_line
from grat_cli.files.claims import Claim, ClaimLost, Claims
from grat_cli.files.fingerprint import fingerprint
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
from grat_cli.generation.checkpoint import Run, discard_run, read_run
from grat_cli.generation.denoising import Text
from grat_cli.generation.inputs import refuse_sizes
from grat_cli.generation.request import Request, check_pictures
from grat_cli.generation.run import Generator, take_up
from grat_cli.generation.sharing import FailureNotes, Shard, shared
from grat_cli.generation.stored import request_data, told_model
from grat_cli.models.devices import choose_device
from grat_cli.models.lora import own_name

# Outputs are made here, with all that is kept of one until it is written, and moved to their place whole.
UNFINISHED = "unfinished"
_NOT_SHOWN_OF_PRESETS = ("name", "description", "model", "kernel", "evidence")
# What says how an output is kept and told of, not what it shows.
_NOT_OF_THE_OUTPUT = ("command", "checkpoint_every", "preview_every", "save_latents", "text_cache")


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
        shard: that this worker begins with; None of one that works alone.
    """

    file: Path
    layout: Layout
    out: Path
    samples: Sequence[Sample]
    template: Request
    shard: Shard | None = None

    @property
    def overwrite(self) -> bool:
        """Whether outputs of other requests may be replaced."""
        return self.template.overwrite

    @cached_property
    def loras(self) -> dict[str, Any]:
        """What every sample says of the LoRAs that it is made with; nothing without any, as earlier versions."""
        told = [
            {
                "name": own_name(lora),
                "scale": lora.scale,
                "noise": lora.noise,
                "sha256": fingerprint(Path(lora.source)).sha256 if lora.kind == "file" else None,
            }
            for lora in self.template.weights.loras
        ]
        return _loras_told(told)

    def told(self, sample: Sample) -> dict[str, Any]:
        """What the report of a sample says of the batch: its place in the file, and all that stands there."""
        return {
            "file": self.file.name,
            "place": sample.entry.place,
            "sample": sample.index,
            "layout": self.layout.name,
            "item": _told_item(sample.entry),
        }


@dataclass(frozen=True)
class MadeHere:
    """A sample that this worker has made, and its report."""

    sample: Sample
    report: Mapping[str, Any]


@dataclass(frozen=True)
class MadeElsewhere:
    """A sample that another worker has made meanwhile."""

    sample: Sample


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
    folder = _Folder(batch)
    left = [found for sample in batch.samples if (found := folder.find(sample)) is not None]
    _make_folder(batch.out)
    for sample in left:
        for path in (sample.output, sample.report):
            _make_folder(path.parent)
        # A report of the same that lacks its output is what a killed process left.
        if same := _is_told_of(batch, sample):
            adopt(sample.report)
        try:
            refuse_unwritable([sample.output], overwrite=batch.overwrite)
            refuse_unwritable([sample.report], overwrite=batch.overwrite or same)
        except BadInput:
            if batch.shard is None or not _is_told_of(batch, sample):
                raise  # else another worker has just made it
    return left


def make_samples(
    batch: Batch, samples: Sequence[Sample], progress: ProgressDisplay
) -> Iterator[MadeHere | MadeElsewhere | Failure]:
    """Makes samples one by one with one loaded model; each is written, its report too, before the next begins.

    Args:
        batch: that they belong to.
        samples: of `missing`, those of one prompt together.
        progress: told how it goes on.

    Yields:
        What came of each sample; after a failure the others go on.

    Raises:
        BadInput, ModelUnavailable, OutOfMemory: as for `generate`.
        CannotWrite: if there is no room; what was made before is still there.
        Interrupted: by Ctrl-C, with how to go on.
    """
    if not samples:
        return
    done, there = 0, []
    sharing = None if batch.shard is None else _Sharing(batch, batch.shard, samples)
    try:
        # 1. What evaluators read beside the samples.
        for sample in {sample.metadata: sample for sample in samples}.values():
            write_metadata(sample, overwrite=batch.overwrite)

        # 2. Load the model, once.
        said = _SaidOnce(progress)
        worker = _Worker(batch, samples, said)

        # 3. Make one sample after another.
        progress.outputs(0, len(samples))
        results = worker.alone(samples) if sharing is None else sharing.results(worker, progress)
        for done, result in enumerate(results, 1):
            if not isinstance(result, Failure):
                there.append(_key(batch, result.sample))
            progress.outputs(done, len(samples))
            yield result
        Claims(batch.out / UNFINISHED).clear(there)
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
        first, *later = (_request(batch.template, sample) for sample in samples)
        self._generator = Generator(first, progress, later=later)
        self._texts: dict[tuple[Any, ...], Text] = {}
        for sample in samples:
            request = _request(batch.template, sample)
            asked = request.prompt, request.negative_prompt, sample.pictures
            if asked not in self._texts:
                self._generator.take(request)
                self._texts[asked] = self._generator.encode(request)
        self._generator.release_text_encoders()

    def alone(self, samples: Sequence[Sample]) -> Iterator[MadeHere | Failure]:
        """Makes all, in order; outputs that another process makes just now are refused."""
        FailureNotes(self._batch.out / UNFINISHED).remove_all()
        for number, sample in enumerate(samples):
            with claimed([self._work(sample)]):
                result = self.make(sample, is_last=number == len(samples) - 1)
            yield result

    def make(self, sample: Sample, claim: Claim | None = None, *, is_last: bool = False) -> MadeHere | Failure:
        """Makes and writes one.

        Args:
            sample: to make.
            claim: on it, of a worker that shares the batch.
            is_last: whether the transformer is not needed afterwards.

        Raises:
            ClaimLost: if another worker has taken over.
        """
        batch = self._batch
        work = self._work(sample)
        self._progress.begin(claim)
        try:
            # 1. Make it, but for what an earlier process has done of it.
            made = self._made(sample, work, is_last=is_last)

            # 2. Move the report, then the output: one that is there has its report.
            told = {**made, "batch": batch.told(sample)}
            if claim is not None:
                claim.require()
                if batch.overwrite or _is_told_of(batch, sample):
                    adopt(sample.report)
            write_json(told, sample.report, overwrite=self._replaces)
            if claim is not None:
                claim.require()
            _move(work, sample.output, overwrite=self._replaces)
            remove(report_path(work), overwrite=True)
        except NumericalFailure as error:
            discard_run(work, overwrite=True)  # going on with it would fail again
            return Failure(sample, str(error).splitlines()[0])
        return MadeHere(sample, told)

    def withdraw(self, sample: Sample) -> None:
        """Removes what this process has itself left of a sample that another has made, or goes on with."""
        work = self._work(sample)
        for path in (report_path(work), *(() if work.is_dir() else (work,))):
            remove(path)
        discard_run(work)
        if not sample.output.exists():
            remove(sample.report)

    @property
    def _replaces(self) -> bool:
        """Whether whatever lies at an output's place is replaced; workers that share a batch adopt what they may."""
        return self._batch.overwrite and self._batch.shard is None

    def _work(self, sample: Sample) -> Path:
        """Where a sample is made."""
        _make_folder(self._batch.out / UNFINISHED)
        return self._batch.out / UNFINISHED / _work_name(_request(self._batch.template, sample))

    def _made(self, sample: Sample, work: Path, *, is_last: bool) -> Mapping[str, Any]:
        """The report of a sample that is whole, in `work`."""
        made = _finished(work)
        if made is not None:
            return made
        # What lies there under that name was made of this very request.
        request = replace(_request(self._batch.template, sample), outputs=(work,), overwrite=True)
        text = self._texts[request.prompt, request.negative_prompt, sample.pictures]
        self._generator.take(request)
        return self._generator.make(request, self._begun(work, sample.seed), work, text, is_last=is_last).report

    def _begun(self, work: Path, seed: int) -> Run:
        """The run that an earlier process has left, else a new one."""
        for kept in (latents_path(work), checkpoint_path(work)):
            if not kept.is_file():
                continue
            try:
                run, _ = read_run(kept)
                self._generator.refuse_other_weights(run)
            except BadInput as error:
                self._progress.note(f"{error}: {work.stem} is begun anew")
                continue
            self._progress.note(f"{work.stem} goes on after step {run.done}")
            take_up(run, choose_device(self._batch.template.device), self._progress)
            return run
        return self._generator.new_run(seed)


class _Sharing:
    """What a worker does with the samples of a batch that others make too."""

    def __init__(self, batch: Batch, shard: Shard, samples: Sequence[Sample]) -> None:
        """Looks at what earlier runs have left, before those of this one leave anything.

        Raises:
            BadInput: if two samples cannot be told apart by their reports.
        """
        self._batch = batch
        self._folder, self._notes = _Folder(batch), FailureNotes(batch.out / UNFINISHED)
        known: dict[str, Sample] = {}
        for sample in batch.samples:
            if (other := known.setdefault(_key(batch, sample), sample)) is not sample:
                raise BadInput(
                    f"{other.entry.place} and {sample.entry.place} ask for the same, with pictures of the same names: "
                    "rename one, or leave out --shard"
                )
        left = {_key(batch, sample): sample for sample in samples}
        self._left = {key: left[key] for key in shard.ordered(list(known)) if key in left}

    def results(self, worker: _Worker, progress: ProgressDisplay) -> Iterator[MadeHere | MadeElsewhere | Failure]:
        """What comes of each, whoever makes it."""

        def make(key: str, sample: Sample, claim: Claim) -> MadeHere | MadeElsewhere | Failure:
            return self._make(worker, key, sample, claim)

        return shared(self._left, Claims(self._batch.out / UNFINISHED), self._look, make, progress.waiting)

    def _look(self, key: str, sample: Sample) -> MadeElsewhere | Failure | None:
        """What came of a sample, as far as is known."""
        try:
            if self._folder.find(sample) is None:
                return MadeElsewhere(sample)
        except BadInput as error:
            return Failure(sample, first_line(error))
        reason = self._notes.read(key)
        return None if reason is None else Failure(sample, reason)

    def _make(self, worker: _Worker, key: str, sample: Sample, claim: Claim) -> MadeHere | MadeElsewhere | Failure:
        """The same of one that is claimed, which is made if nobody has."""
        self._folder.look()
        result = self._look(key, sample)
        if result is None:
            result = self._tried(worker, self._folder.find(sample) or sample, claim)
            if isinstance(result, Failure):
                self._notes.write(key, result.reason)
        if not isinstance(result, Failure):
            self._notes.remove(key)
        return result

    def _tried(self, worker: _Worker, sample: Sample, claim: Claim) -> MadeHere | MadeElsewhere | Failure:
        if self._batch.overwrite:
            adopt(sample.output)
        try:
            return worker.make(sample, claim)
        except (ClaimLost, CannotWrite) as error:
            is_held = claim.is_held()
            self._folder.look()
            if is_held and self._folder.find(sample) is not None:
                raise
            worker.withdraw(sample)
            if not is_held:
                raise ClaimLost(str(error)) from error
            return MadeElsewhere(sample)  # by a worker that this one has taken over from, just before it noticed
        except BadInput as error:
            return Failure(sample, first_line(error))


class _SaidOnce:
    """A `generation_request.Progress` that passes on what it is told, but no note or phase twice in a batch.

    Whatever it is told of a sample that is claimed, it breaks off where the claim is lost.
    """

    def __init__(self, progress: ProgressDisplay) -> None:
        self._progress = progress
        self._notes: set[str] = set()
        self._phase = ""
        self._claim: Claim | None = None

    def begin(self, claim: Claim | None) -> None:
        """A sample begins, whose first phase may be the last one's latest."""
        self._phase, self._claim = "", claim

    def phase(self, name: str) -> None:
        self._go_on()
        if name != self._phase:
            self._progress.phase(name)
        self._phase = name

    def step(self, done: int, total: int) -> None:
        self._go_on()
        self._progress.step(done, total)

    def written(self, count: int) -> None:
        self._go_on()
        self._progress.written(count)

    def _go_on(self) -> None:
        if self._claim is not None and self._claim.lost:
            self._claim.require()

    def work(self, text: str) -> None:
        self._progress.work(text)

    def note(self, text: str) -> None:
        if text not in self._notes:
            self._progress.note(text)
        self._notes.add(text)


def _request(template: Request, sample: Sample) -> Request:
    """The request of one sample."""
    prompt, negative, seed = sample.asked
    told = {"prompt": prompt, "negative_prompt": negative, "seeds": (seed,), "outputs": (sample.output,)}
    return replace(template, **told, **pictures_of(sample.entry))


def _told_item(entry: PromptEntry) -> dict[str, Any]:
    """What stands in the file, with the names of pictures alone."""
    names = {
        kind: [path.name for path in paths] if isinstance(entry.item.get(kind), list) else paths[0].name
        for kind, paths in entry.pictures.items()
        if paths
    }
    return {**entry.item, **names}


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
    data["device"] = request.device.partition(":")[0]  # any of its kind goes on
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
    asked, found = _facts_asked(batch, sample), _facts_found(sample.report)
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


class _Folder:
    """What is there of a batch, as far as has been looked.

    Of the plain layout, whose names hold a time, an output is known by its report, of which each is read once.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch, self._by_reports = batch, batch.layout.name == "plain"
        self._read: set[Path] = set()
        self._outputs: dict[str, list[Path]] = {}
        self.look()

    def look(self) -> None:
        """Reads the reports that came since."""
        if not self._by_reports:
            return
        suffix = self._batch.samples[0].output.suffix
        for report in sorted(set(self._batch.out.glob("grat-*.json")) - self._read):
            if (facts := _facts_found(report)) is not None:
                self._read.add(report)
                self._outputs.setdefault(facts, []).append(report.with_name(report.stem + suffix))

    def find(self, sample: Sample) -> Sample | None:
        """The sample as it is to be made, None if it is there; one whose output is lost keeps its name.

        Raises:
            BadInput: if something else is in its way, and may not be overwritten.
        """
        if not self._by_reports:
            return None if _is_there(self._batch, sample) else sample
        outputs = self._outputs.get(_facts_asked(self._batch, sample), ())
        if any(output.exists() for output in outputs):
            return None
        return replace(sample, output=outputs[-1], report=report_path(outputs[-1])) if outputs else sample


def _key(batch: Batch, sample: Sample) -> str:
    """A name of a sample that is the same for all workers, whatever each calls its output."""
    place = str(sample.output.relative_to(batch.out)) if batch.layout.name != "plain" else sample.output.suffix
    return sha256(json.dumps([_facts_asked(batch, sample), place]).encode()).hexdigest()[:32]


def _is_told_of(batch: Batch, sample: Sample) -> bool:
    """Whether the report at a sample's place is of that very sample."""
    return _facts_found(sample.report) == _facts_asked(batch, sample)


def _facts_asked(batch: Batch, sample: Sample) -> str:
    """All that decides what a sample shows, as JSON; device, dtype and kernels do not, but for rounding."""
    request = _request(batch.template, sample)
    facts = {
        "prompt": request.prompt,
        "negative prompt": request.negative_prompt,
        "seed": sample.seed,
        "size": [request.width, request.height],
        "model": told_model(request.model)["source"],
        **batch.loras,
        "quantization": [request.weights.quantize, request.weights.cast],
        "text encoder": request.weights.text_encoder and Path(request.weights.text_encoder).name,
        "pictures": [path.name for files in sample.entry.pictures.values() for path in files],
        **_facts_of_preset(request.preset.model_dump(mode="json")),
    }
    if request.frames:
        facts["size"] += [request.frames]
        facts["frame rate"] = request.fps
    return json.dumps(facts)


def _loras_told(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """LoRAs of a report by what tells them apart: files by what they hold, those of the hub by their names."""
    known = [
        [lora["name"], lora["scale"], lora["noise"], None if "/" in lora["name"] else lora["sha256"]] for lora in told
    ]
    return {"LoRAs": known} if known else {}


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
            **_loras_told(told["model"].get("loras", ())),
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
