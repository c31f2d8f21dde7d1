"""Where the samples of a batch go: names of grat's own, or the folders that public evaluators read.

- `plain`: grat's default names, with the report of each beside it.
- `geneval` (GenEval, arXiv 2310.11513; evaluation/evaluate_images.py of github.com/djghosh13/geneval reads it):
  `00000/metadata.jsonl`, the prompt's own object, and `00000/samples/0000.png` and so on; one numbered folder per
  prompt, in the order of the file. It skips folders whose names are not digits, so reports are in `reports/`.
- `vbench` (VBench, arXiv 2311.17982; vbench/__init__.py of github.com/Vchitect/VBench): `videos/{prompt}-{index}.mp4`.
  It takes the suffix of all videos from whatever file it finds first in the folder, so nothing else may be there:
  reports are in `reports/` beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grat_cli.errors import BadInput, CannotWrite, printable, shortened
from grat_cli.files.outputs import report_path
from grat_cli.files.places import LONGEST_NAME_BYTES
from grat_cli.files.prompts import LARGEST_SEED, PromptEntry
from grat_cli.files.stores import Store
from grat_cli.models.catalogue import Medium

REPORTS = "reports"
VIDEOS = "videos"
_NEEDED_BY_GENEVAL = ("prompt", "tag", "include")


@dataclass(frozen=True)
class Layout:
    """A way to lay samples out.

    Attributes:
        name: as in `--layout`.
        medium: what it is for, None for both.
        samples: of each prompt, if nobody says how many.
        formats: that may be written, the usual one first; empty for any.
        folder: the part of the output's folder that its evaluator is given.
    """

    name: str
    medium: Medium | None = None
    samples: int = 1
    formats: tuple[str, ...] = ()
    folder: str = ""


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("plain"),
        Layout("geneval", "image", 4, ("png",)),
        # Its load_video knows .mp4 and .gif.
        Layout("vbench", "video", 5, ("mp4", "gif"), VIDEOS),
    )
}


@dataclass(frozen=True)
class Sample:
    """One picture or video of a batch.

    Attributes:
        entry: its prompt.
        index: among the samples of the prompt, from 0.
        seed: of its noise.
        negative: what to keep out, or None.
        output: where it goes.
        report: where its report goes.
        metadata: file that holds the prompt's object, None where the layout has none.
    """

    entry: PromptEntry
    index: int
    seed: int
    negative: str | None
    output: Path
    report: Path
    metadata: Path | None = None

    @property
    def asked(self) -> tuple[str, str | None, int]:
        """All that tells one sample from another: prompt, negative prompt, seed."""
        return self.entry.prompt, self.negative, self.seed

    @property
    def pictures(self) -> tuple[tuple[str, tuple[Path, ...]], ...]:
        """What it is made from, by kind; of those that are asked for in the same words each is another."""
        return tuple(self.entry.pictures.items())


def lay_out(
    entries: Sequence[PromptEntry],
    layout: Layout,
    out: Path,
    *,
    suffix: str,
    first_seed: int,
    samples: int | None,
    negative: str | None,
    plain_name: Callable[[str, int], str],
) -> list[Sample]:
    """The samples of all prompts, in order; what would be made twice under one name is there once.

    Args:
        entries: of the prompt file.
        layout: where they go.
        out: folder.
        suffix: of the format.
        first_seed: of each prompt whose entry gives none; its further samples take the seeds that follow.
        samples: of each prompt whose entry does not say, None for the layout's own number.
        negative: of each prompt whose entry has none.
        plain_name: grat's name of a prompt and seed.

    Raises:
        BadInput: if an entry does not fit the layout, or two that differ would have one name.
    """
    drafts: list[Sample] = []
    for number, entry in enumerate(entries):
        _refuse_unfit(entry, layout, suffix)
        seed = first_seed if entry.seed is None else entry.seed
        for index in range(entry.samples or samples or layout.samples):
            if seed + index > LARGEST_SEED:
                raise BadInput(f"{entry.place}: sample {index} goes past the largest seed, {LARGEST_SEED}")
            kept_out = negative if entry.negative is None else entry.negative
            output, report, metadata = _places(entry, number, index, layout, out, suffix)
            drafts.append(Sample(entry, index, seed + index, kept_out, output, report, metadata))
    if layout.name == "plain":
        return _with_plain_names(drafts, out, plain_name)
    return _without_repetitions(drafts)


def write_metadata(sample: Sample, store: Store, *, overwrite: bool = False) -> None:
    """Writes the object of a sample's prompt, where its layout wants that and it is not there.

    Raises:
        CannotWrite: if it cannot be written.
    """
    if sample.metadata is not None and not has_metadata(sample, store):
        try:
            store.write(metadata_text(sample), sample.metadata, overwrite=overwrite)
        except CannotWrite:
            if not has_metadata(sample, store):  # else another worker has written the same just now
                raise


def has_metadata(sample: Sample, store: Store) -> bool:
    """Whether the object of a sample's prompt is where its layout wants it."""
    return sample.metadata is not None and store.holds(metadata_text(sample).encode(), sample.metadata)


def metadata_text(sample: Sample) -> str:
    """The object of a sample's prompt, on one line."""
    return json.dumps(sample.entry.item, ensure_ascii=False) + "\n"


def _places(
    entry: PromptEntry, number: int, index: int, layout: Layout, out: Path, suffix: str
) -> tuple[Path, Path, Path | None]:
    """Output, report and metadata of a sample; in the plain layout they are named later."""
    if layout.name == "geneval":
        folder = out / f"{number:05}"
        report = out / REPORTS / f"{number:05}-{index:04}.json"
        return folder / "samples" / f"{index:04}{suffix}", report, folder / "metadata.jsonl"
    name = f"{entry.prompt}-{index}"
    return out / layout.folder / f"{name}{suffix}", out / REPORTS / f"{name}.json", None


def _refuse_unfit(entry: PromptEntry, layout: Layout, suffix: str) -> None:
    if layout.name == "geneval":
        lacking = [key for key in _NEEDED_BY_GENEVAL if key not in entry.item]
        if lacking:
            raise BadInput(
                f"{entry.place} has no {' and no '.join(lacking)}, which GenEval's evaluator needs: "
                "give its evaluation_metadata.jsonl, or use --layout plain"
            )
    if layout.name == "vbench":
        shown = shortened(entry.prompt, 40)
        if set(entry.prompt) & {"/", os.sep} or printable(entry.prompt) != entry.prompt:
            raise BadInput(
                f"{entry.place}: VBench names videos after their prompts, and {shown!r} cannot be part of a file's "
                "name (a slash or a control character is in it): change the prompt, or use --layout plain"
            )
        # The report's suffix is the longest.
        length = len(f"{entry.prompt}-999{max(suffix, '.json', key=len)}".encode())
        if length > LONGEST_NAME_BYTES:
            raise BadInput(
                f"{entry.place}: VBench names videos after their prompts, and {shown!r} is "
                f"{length - LONGEST_NAME_BYTES} bytes too long for a file's name: shorten it, or use --layout plain"
            )


def _with_plain_names(drafts: Sequence[Sample], out: Path, plain_name: Callable[[str, int], str]) -> list[Sample]:
    """Each of what is asked for once, under a name of its own: prompts that begin alike look alike in one."""
    named: dict[tuple[object, ...], Sample] = {}
    taken: set[str] = set()
    for draft in drafts:
        if (draft.asked, draft.pictures) in named:
            continue
        name = plain_name(draft.entry.prompt, draft.seed)
        stem, ending = os.path.splitext(name)
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}{ending}"
        taken.add(name)
        named[draft.asked, draft.pictures] = replace(draft, output=out / name, report=report_path(out / name))
    return list(named.values())


def _without_repetitions(drafts: Sequence[Sample]) -> list[Sample]:
    """Each output once.

    Raises:
        BadInput: if an output is asked for in two ways.
    """
    found: dict[Path, Sample] = {}
    for draft in drafts:
        first = found.setdefault(draft.output, draft)
        if (first.asked, first.pictures) != (draft.asked, draft.pictures):
            raise BadInput(
                f"{first.entry.place} and {draft.entry.place} have the same prompt, and with it the same file name, "
                "but another seed, negative prompt or picture: leave one out, or use --layout plain"
            )
    return list(found.values())
