"""Who makes the samples of a batch: a loaded model, alone or as one of several workers.

Of those that share a batch (`sharing`), whoever makes a sample has claimed it, and nothing is replaced but what was
there when it was claimed. A report is written before the claim is looked at for the last time, and the output moved
after that: so whoever takes over from a worker that was suspended in between finds its report, and uses the same name,
which the output of only one of them can take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from grat_cli.console.progress import ProgressDisplay
from grat_cli.errors import BadInput, CannotWrite, NumericalFailure, first_line
from grat_cli.files.claims import Claim, ClaimLost, Claims
from grat_cli.files.outputs import checkpoint_path, json_text, latents_path, read_provenance, report_path
from grat_cli.files.stores import make_folder
from grat_cli.files.whole import claimed, discard, remove
from grat_cli.generation.batch_folder import Batch, Folder, is_told_of, key_of, request_of, work_name
from grat_cli.generation.batch_layout import Sample
from grat_cli.generation.checkpoint import Run, discard_run, read_run
from grat_cli.generation.denoising import Text
from grat_cli.generation.run import Generator, take_up
from grat_cli.generation.sharing import FailureNotes, Shard, shared
from grat_cli.models.devices import choose_device


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


Result: TypeAlias = MadeHere | MadeElsewhere | Failure


class Worker:
    """A loaded model that makes the samples of a batch, each in a folder of its own until it is whole.

    All prompts are encoded first: afterwards the memory of the text encoders is free.
    """

    def __init__(self, batch: Batch, samples: Sequence[Sample], progress: SaidOnce) -> None:
        self._batch, self._progress = batch, progress
        first, *later = (request_of(batch.template, sample) for sample in samples)
        self._generator = Generator(first, progress, later=later)
        self._texts: dict[tuple[Any, ...], Text] = {}
        for sample in samples:
            request = request_of(batch.template, sample)
            asked = request.prompt, request.negative_prompt, sample.pictures
            if asked not in self._texts:
                self._generator.take(request)
                self._texts[asked] = self._generator.encode(request)
        self._generator.release_text_encoders()

    def alone(self, samples: Sequence[Sample]) -> Iterator[MadeHere | Failure]:
        """Makes all, in order; outputs that another process makes just now are refused."""
        FailureNotes(self._batch.unfinished).remove_all()
        for number, sample in enumerate(samples):
            yield self._make_alone(sample, is_last=number == len(samples) - 1)

    def make_unclaimed(self, sample: Sample) -> Result:
        """Makes and writes one that no other worker was given, unless one that has died did so.

        Raises:
            CannotWrite: if it cannot be written.
        """
        try:
            if self._batch.store.exists(sample.output) and is_told_of(self._batch, sample):
                return MadeElsewhere(sample)
            return self._make_alone(sample)
        except CannotWrite:
            raise
        except BadInput as error:
            return Failure(sample, first_line(error))

    def _make_alone(self, sample: Sample, *, is_last: bool = False) -> MadeHere | Failure:
        with claimed([self._work(sample)]):
            return self.make(sample, is_last=is_last)

    def make(self, sample: Sample, claim: Claim | None = None, *, is_last: bool = False) -> MadeHere | Failure:
        """Makes and writes one.

        Args:
            sample: to make.
            claim: on it, of a worker that shares the batch.
            is_last: whether the transformer is not needed afterwards.

        Raises:
            ClaimLost: if another worker has taken over.
        """
        batch, store = self._batch, self._batch.store
        work = self._work(sample)
        replaces = batch.overwrite and claim is None  # of workers with claims, each adopts what it may replace
        self._progress.begin(claim)
        try:
            # 1. Make it, but for what an earlier process has done of it.
            made = self._made(sample, work, is_last=is_last)

            # 2. Move the report, then the output: one that is there has its report.
            told = {**made, "batch": batch.told(sample)}
            if claim is not None:
                claim.require()
            if batch.shard is not None and (batch.overwrite or is_told_of(batch, sample)):
                store.adopt(sample.report)
            store.write(json_text(told), sample.report, overwrite=replaces)
            if claim is not None:
                claim.require()
            store.place(work, sample.output, overwrite=replaces)
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
        if not self._batch.store.exists(sample.output):
            self._batch.store.remove(sample.report)

    def _work(self, sample: Sample) -> Path:
        """Where a sample is made."""
        make_folder(self._batch.unfinished)
        return self._batch.unfinished / work_name(request_of(self._batch.template, sample))

    def _made(self, sample: Sample, work: Path, *, is_last: bool) -> Mapping[str, Any]:
        """The report of a sample that is whole, in `work`."""
        if (finished := _finished(work)) is not None:
            return finished
        # What lies there under that name was made of this very request.
        request = replace(request_of(self._batch.template, sample), outputs=(work,), overwrite=True)
        text = self._texts[request.prompt, request.negative_prompt, sample.pictures]
        self._generator.take(request)
        made = self._generator.make(request, self._begun(work, sample.seed), work, text, is_last=is_last)
        assert made is not None, "a process alone writes what it makes"
        return made.report

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


class Sharing:
    """What a worker does with the samples of a batch that others make too.

    Attributes:
        claims: of all workers.
        left: the samples that are missing, by names that all workers know them by.
    """

    def __init__(self, batch: Batch, shard: Shard, samples: Sequence[Sample]) -> None:
        """Looks at what earlier runs have left, before those of this one leave anything.

        Args:
            batch: that is shared.
            shard: that this worker begins with.
            samples: that are missing.

        Raises:
            BadInput: if two samples cannot be told apart by their reports.
        """
        self._batch, self.claims = batch, Claims(batch.unfinished)
        self._folder, self._notes = Folder(batch), FailureNotes(batch.unfinished)
        known: dict[str, Sample] = {}
        for sample in batch.samples:
            if (other := known.setdefault(key_of(batch, sample), sample)) is not sample:
                raise BadInput(
                    f"{other.entry.place} and {sample.entry.place} ask for the same, with pictures of the same names: "
                    "rename one, or leave out --shard or --ray"
                )
        left = {key_of(batch, sample): sample for sample in samples}
        self.left = {key: left[key] for key in shard.ordered(list(known)) if key in left}

    def results(self, worker: Worker, progress: ProgressDisplay) -> Iterator[Result]:
        """What comes of each, whoever makes it."""

        def make(key: str, sample: Sample, claim: Claim) -> Result:
            return self.make(worker, key, sample, claim)

        return shared(self.left, self.claims, self.look, make, progress.waiting)

    def look(self, key: str, sample: Sample) -> MadeElsewhere | Failure | None:
        """What came of a sample, as far as is known."""
        try:
            if self._folder.find(sample) is None:
                return MadeElsewhere(sample)
        except BadInput as error:
            return Failure(sample, first_line(error))
        reason = self._notes.read(key)
        return None if reason is None else Failure(sample, reason)

    def make(self, worker: Worker, key: str, sample: Sample, claim: Claim) -> Result:
        """The same of one that is claimed, which is made if nobody has.

        Raises:
            ClaimLost: if another worker goes on with it.
            CannotWrite: if there is no room for it.
        """
        self.look_again()
        found = self.settled(key, sample)
        return self.tried(worker, key, found, claim) if isinstance(found, Sample) else found

    def look_again(self) -> None:
        """Finds out what others have made since."""
        self._folder.look()

    def settled(self, key: str, sample: Sample) -> MadeElsewhere | Failure | Sample:
        """What came of a sample that is claimed; else the sample, under the name that it has, or is to have."""
        result = self.look(key, sample)
        if isinstance(result, MadeElsewhere):
            self._notes.remove(key)
        return result or self._folder.find(sample) or sample

    def tried(self, worker: Worker, key: str, sample: Sample, claim: Claim) -> Result:
        """What comes of a sample that is claimed and not there. Errors are those of `make`."""
        result = self._tried(worker, sample, claim)
        if isinstance(result, Failure):
            self._notes.write(key, result.reason)
        else:
            self._notes.remove(key)
        return result

    def _tried(self, worker: Worker, sample: Sample, claim: Claim) -> Result:
        if self._batch.overwrite:
            self._batch.store.adopt(sample.output)
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


class SaidOnce:
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


def _finished(work: Path) -> Mapping[str, Any] | None:
    """The report of a video that is written, and was not moved because the process ended just then."""
    if not report_path(work).is_file():
        if work.is_dir():  # of frames, which nothing takes the place of
            discard(work)
        return None
    discard_run(work, overwrite=True)
    return read_provenance(report_path(work)) if work.exists() else None
