"""An output is repeated: what its report says of the request, where its files are, and what differs here.

A report may come from anybody. All of it is read through models with bounds, a name in it is no more than a name, and
what it says decides neither where anything is written nor what may be replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from grat_cli.errors import BadInput
from grat_cli.families.base import PictureKind
from grat_cli.files.fingerprint import fingerprint
from grat_cli.files.json_objects import validated
from grat_cli.files.outputs import read_provenance
from grat_cli.generation.report import SCHEMA
from grat_cli.generation.stored import StoredModel, StoredRequest, request_of_report
from grat_cli.generation.told import MOST_REFERENCES, KeptPicture, Seed, Sha256
from grat_cli.models.catalogue import HUB_ID, KNOWN_MODELS, choose_model
from grat_cli.models.environment import versions
from grat_cli.models.hub import present_revision
from grat_cli.models.picture_kinds import OPTIONS

if TYPE_CHECKING:
    import torch

    from grat_cli.families import ModelChoice
    from grat_cli.models.weights import Weights

_MOST_FILES = 1000


def _name_alone(text: str) -> str:
    if Path(text).name != text or text == ".." or not text.isprintable() or "\\" in text:
        raise ValueError("Input should be the name of a file alone")
    return text


def _inside(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not text.isprintable() or "\\" in text:
        raise ValueError("Input should be a path within a folder")
    return text


_Word = Annotated[str, StringConstraints(max_length=200)]


class _ToldFile(BaseModel):
    """A file of weights, or a LoRA, by what it is known by."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_inside)]
    bytes: Annotated[int, Field(ge=0)] | None = None
    sha256: Sha256 | None = None


class _ToldModel(BaseModel):
    model_config = ConfigDict(strict=True)

    revision: _Word | None = None
    weights: Annotated[tuple[_ToldFile, ...], Field(max_length=_MOST_FILES)] = ()
    loras: Annotated[tuple[_ToldFile, ...], Field(max_length=_MOST_FILES)] = ()


class _ToldDevice(BaseModel):
    model_config = ConfigDict(strict=True)

    name: _Word
    model: _Word
    dtype: _Word
    threads: Annotated[int, Field(ge=1, le=4096)] | None


class Told(BaseModel):
    """What a report says besides the request that decides the pixels.

    Attributes:
        seed: of the output.
        model: revision and files of its weights.
        device: that it was made on.
        versions: of what it was made with.
        pictures: that it was made from.
        decoded: of latents that were kept; None where the run itself went on to the end.
    """

    model_config = ConfigDict(strict=True)

    seed: Seed
    model: _ToldModel
    device: _ToldDevice
    versions: dict[_Word, _Word | None]
    pictures: Annotated[tuple[KeptPicture, ...], Field(max_length=MOST_REFERENCES + 3)] = ()
    decoded: dict[str, Any] | None = None


@dataclass(frozen=True)
class Repeatable:
    """An output that can be repeated.

    Attributes:
        file: that was named: the output, or its report.
        stored: what was asked for, with names of files in place of paths.
        told: what else decides its pixels.
    """

    file: Path
    stored: StoredRequest
    told: Told

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where files of its request are looked for: beside it, and in the working folder."""
        return self.file.parent, Path()

    def model(self, typed: str | None) -> ModelChoice:
        """Its model, or another that is given.

        Raises:
            BadInput: if it lay on the machine that made the output, and is not found here.
            ModelUnavailable: as `choose_model`.
        """
        if typed is not None:
            return choose_model(typed, medium=self.stored.medium)
        stored = self.stored.model
        if stored.name in KNOWN_MODELS[self.stored.medium]:
            return choose_model(stored.name, medium=self.stored.medium)
        if stored.kind == "hub":
            self._require(HUB_ID.fullmatch(stored.source) is not None, "model.source: neither known nor a hub id")
            return choose_model(stored.source, medium=self.stored.medium)
        place = self._place_of_model(stored)
        return choose_model(str(place), medium=self.stored.medium)

    def pictures(self, given: Mapping[PictureKind, Sequence[Path]]) -> dict[PictureKind, list[Path]]:
        """The files that it is made from: those that are given, else those of its names that are the same.

        Args:
            given: files by what they are.

        Raises:
            BadInput: if one is missing or another picture, with the option that gives it.
        """
        found: dict[PictureKind, list[Path]] = {kind: list(paths) for kind, paths in given.items() if paths}
        for picture in self.told.pictures:
            if not given.get(picture.kind):
                found.setdefault(picture.kind, []).append(self._place_of_picture(picture))
        asked = self._names_of_pictures()
        told = [(picture.kind, picture.file) for picture in self.told.pictures]
        self._require(sorted(told) == sorted(asked), "pictures: they are not those of the request")
        return found

    def base(self, typed: str | None) -> str | None:
        """Where the other parts of a model come from that is a file: a hub id, or a folder that is found here.

        Raises:
            BadInput: if it is a folder that is not found.
        """
        stored = self.stored.weights.base
        if typed is not None or stored is None or HUB_ID.fullmatch(stored):
            return typed or stored
        self._require(_is_name(stored), "weights.base: neither a name nor a hub id")
        for folder in self.folders:
            if (folder / stored / "model_index.json").is_file():
                return str((folder / stored).resolve())
        raise BadInput(f"{self.file} was made with the folder {stored}, which is not here: give it with --base FOLDER")

    def weights(self, given: Weights) -> Weights:
        """How its weights come, with what is given of it.

        Raises:
            BadInput: if something of them is not found here.
        """
        asked = {name: value for name, value in vars(given).items() if value not in (None, (), False)}
        base = self.base(given.base)
        return replace(self.stored.weights.model_copy(update={"base": None}).as_weights(), **asked | {"base": base})

    def _names_of_pictures(self) -> list[tuple[PictureKind, str]]:
        stored = self.stored
        one: dict[PictureKind, str | None] = {
            "start": stored.init_image,
            "mask": stored.mask,
            "control": stored.control,
        }
        names: list[tuple[PictureKind, str]] = [(kind, name) for kind, name in one.items() if name is not None]
        return [*names, *(("reference", name) for name in stored.references)]

    def _place_of_picture(self, picture: KeptPicture) -> Path:
        self._require(_is_name(picture.file), "pictures.file: Input should be the name of a file alone")
        option, others = OPTIONS[picture.kind], []
        for folder in self.folders:
            place = folder / picture.file
            if not place.is_file():
                continue
            if picture.sha256 is not None and _is_same(place, picture.sha256):
                return place
            others.append(place)
        why = f"{others[0]} is another picture" if others else "which is neither beside it nor in this folder"
        raise BadInput(f"{self.file} was made from {picture.file}, {why}: give it with {option} FILE")

    def _place_of_model(self, stored: StoredModel) -> Path:
        self._require(_is_name(stored.source), "model.source: Input should be the name of a file or folder alone")
        others = []
        for folder in self.folders:
            place = folder / stored.source
            if not (place / "model_index.json").is_file() if stored.kind == "folder" else not place.is_file():
                continue
            if not list(changed_files(place, self.told.model.weights)):
                return place.resolve()
            others.append(place)
        why = f"{others[0]} has other weights" if others else "which is neither beside it nor in this folder"
        what = "FOLDER" if stored.kind == "folder" else "FILE"
        raise BadInput(f"{self.file} was made by the model {stored.source}, {why}: give it with --model {what}")

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            raise BadInput(f"{self.file} cannot be repeated: {problem}")

    def differences(self, model: ModelChoice, weights: Weights, device: torch.device, dtype: str) -> list[str]:
        """What differs here from what it was made with, but for what is asked for anew; a sentence each.

        Args:
            model: that is to make it.
            weights: how they come.
            device: where.
            dtype: of the transformer.
        """
        from grat_cli.models.devices import cpu_threads, device_name

        told, found = self.told, versions()
        differing = [
            f"{name} {told.versions[name] or 'missing'} then, {version or 'missing'} now"
            for name, version in found.items()
            if name in told.versions and told.versions[name] != version
        ]
        notes = [f"other versions: {', '.join(differing)}"] if differing else []
        then, now = f"{told.device.model} ({told.device.name})", f"{device_name(device)} ({device})"
        if then != now:
            notes.append(f"another device: {then} then, {now} now")
        if told.device.dtype != dtype:
            notes.append(f"another dtype: {told.device.dtype} then, {dtype} now")
        threads = cpu_threads(device)
        if threads and told.device.threads and threads != told.device.threads:
            notes.append(f"it was made on {told.device.threads} CPU threads: as many are used, not {threads}")
        stored = self.stored.model
        if model.kind == "hub" and model.source == stored.source and told.model.revision:
            if (revision := present_revision(model.source)) not in (None, told.model.revision):
                notes.append(f"another revision of {model.source}: {told.model.revision} then, {revision} now")
        elif model.kind != "hub" and told.model.weights:
            notes += list(changed_files(Path(model.source), told.model.weights))
        if told.decoded is not None:
            notes.append("it was decoded from latents that were kept: here the run itself goes on to the end")
        return notes


def read_repeatable(file: Path) -> Repeatable:
    """What an output says of how it was made, whole enough to repeat it.

    Args:
        file: a picture, a video, a folder of frames, or a report.

    Raises:
        BadInput: if it says nothing, or not enough, or is damaged.
    """
    found = read_provenance(file)
    if found.get("schema") != SCHEMA:
        raise BadInput(f"{file} is no output, but what was kept of a run: grat resume or grat decode goes on with it")
    if "asked" not in found:
        raise BadInput(
            f"{file} was made by an older grat, and does not say all that was asked for: "
            "grat info shows the command, to be typed again"
        )
    try:
        return Repeatable(file, request_of_report(found), validated(Told, found))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file} cannot be repeated: it is damaged, or of another version of grat: {error}") from error


def changed_files(place: Path, told: Sequence[_ToldFile]) -> Iterator[str]:
    """What is no more what it was of a model's files: a sentence for each that is missing or another one.

    Args:
        place: its folder or file.
        told: of a report; those of a folder by their paths in it.
    """
    for one in told:
        path = place / one.name if place.is_dir() else place
        if one.sha256 is None:
            continue
        if not path.is_file():
            yield f"{one.name} of the model is missing"
        elif not _is_same(path, one.sha256):
            yield f"other weights: {one.name} of the model is another file than then"


def _is_name(text: str) -> bool:
    try:
        return _name_alone(text) == text
    except ValueError:
        return False


def _is_same(path: Path, sha256: str) -> bool:
    try:
        return fingerprint(path).sha256 == sha256
    except OSError:
        return False
