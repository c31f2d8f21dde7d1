"""Batches: many prompts with one loaded model. What is there whole is skipped, so that a batch can be gone on with."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from grat_cli.console.progress import ProgressDisplay
from grat_cli.errors import BadInput, Interrupted
from grat_cli.files.claims import Claims
from grat_cli.generation.batch_folder import Batch, Folder, is_told_of, key_of
from grat_cli.generation.batch_layout import Sample, write_metadata
from grat_cli.generation.batch_worker import Failure, Result, SaidOnce, Sharing, Worker

if TYPE_CHECKING:
    from grat_cli.generation.cluster import Cluster


def missing(batch: Batch) -> list[Sample]:
    """The samples that are not there whole; makes sure that they can be written, and makes the folders for them.

    Of the plain layout, whose names hold a time, an output is there if a report in the folder says the same request.

    Args:
        batch: with all samples.

    Raises:
        BadInput: if something else is in the way, or cannot be written.
    """
    folder = Folder(batch)
    left = [found for sample in batch.samples if (found := folder.find(sample)) is not None]
    store = batch.store
    for sample in left:
        # A report of the same that lacks its output is what a killed process left.
        if same := is_told_of(batch, sample):
            store.adopt(sample.report)
        try:
            store.require_room(sample.output, overwrite=batch.overwrite)
            store.require_room(sample.report, overwrite=batch.overwrite or same)
        except BadInput:
            if batch.shard is None or not is_told_of(batch, sample):
                raise  # else another worker has just made it
    return left


def make_samples(
    batch: Batch, samples: Sequence[Sample], progress: ProgressDisplay, cluster: Cluster | None = None
) -> Generator[Result]:
    """Makes samples, here one by one with one loaded model; each is written, its report too, as soon as it is made.

    Args:
        batch: that they belong to.
        samples: of `missing`, those of one prompt together.
        progress: told how it goes on.
        cluster: that makes them in place of this process.

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
    try:
        # 1. What evaluators read beside the samples.
        for sample in {sample.metadata: sample for sample in samples}.values():
            write_metadata(sample, batch.store, overwrite=batch.overwrite)

        # 2. Load the model, once, and make one sample after another.
        results = cluster.results(batch, samples, progress) if cluster else _made_here(batch, samples, progress)
        with closing(results):
            for done, result in enumerate(results, 1):
                if not isinstance(result, Failure):
                    there.append(key_of(batch, result.sample))
                progress.outputs(done, len(samples))
                yield result
        Claims(batch.unfinished).clear(there)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"interrupted after {done} of {len(samples)}; the same command goes on with the others"
        ) from None
    finally:
        _discard_if_empty(batch.unfinished)


def _made_here(batch: Batch, samples: Sequence[Sample], progress: ProgressDisplay) -> Generator[Result]:
    sharing = None if batch.shard is None else Sharing(batch, batch.shard, samples)
    worker = Worker(batch, samples, SaidOnce(progress))
    progress.outputs(0, len(samples))
    yield from worker.alone(samples) if sharing is None else sharing.results(worker, progress)


def _discard_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # it is not there, or a video is begun in it
        return
