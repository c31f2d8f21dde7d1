"""An output is repeated: what its report says of the request, where its files are, and what differs here.

A report may come from anybody. All of it is read through models with bounds, a name in it is no more than a name, and
what it says decides neither where anything is written nor what may be replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

from grat_cli.errors import BadInput, printable
from grat_cli.families import family_of
from grat_cli.families.base import PictureKind
from grat_cli.files.fingerprint import fingerprint
from grat_cli.files.json_objects import validated
from grat_cli.files.outputs import read_provenance
from grat_cli.files.places import absolute, expanded
from grat_cli.generation.report import SCHEMA
from grat_cli.generation.stored import StoredForm, StoredModel, StoredRequest, request_of_report
from grat_cli.generation.told import MOST_REFERENCES, MOST_THREADS, KeptPicture, Seed, Sha256, Told
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


class _RepeatedFile(Told):
    """A file of weights, or a LoRA, by what it is known by."""

    part: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{0,80}$")] = ""
    name: Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_inside)]
    bytes: Annotated[int, Field(ge=0)] | None = None
    sha256: Sha256 | None = None


class _RepeatedModel(Told):
    revision: _Word | None = None
    weights: Annotated[tuple[_RepeatedFile, ...], Field(max_length=_MOST_FILES)] = ()
    loras: Annotated[tuple[_RepeatedFile, ...], Field(max_length=_MOST_FILES)] = ()


class _RepeatedDevice(Told):
    name: _Word
    model: _Word
    dtype: _Word
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None


class RepeatedReport(Told):
    """What a report says besides the request that decides the pixels.

    Attributes:
        seed: of the output.
        model: revision and files of its weights.
        device: that it was made on.
        versions: of what it was made with.
        pictures: that it was made from.
        decoded: of latents that were kept; None where the run itself went on to the end.
    """

    seed: Seed
    model: _RepeatedModel
    device: _RepeatedDevice
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
    told: RepeatedReport

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where files of its request are looked for: beside it, and in the working folder."""
        return self.file.parent, Path()

    def model(self, typed: str | None, base: str | None) -> ModelChoice:
        """Its model, or another that is given.

        Args:
            typed: the other one.
            base: where the other parts come from of one that is a file.

        Raises:
            BadInput: if it lay on the machine that made the output, and is not found here.
            ModelUnavailable: as `choose_model`.
        """
        if typed is not None:
            return choose_model(typed, self.stored.medium, base)
        stored = self.stored.model
        if stored.name in KNOWN_MODELS[self.stored.medium]:
            return choose_model(stored.name, medium=self.stored.medium)
        if stored.kind == "hub":
            self._require(HUB_ID.fullmatch(stored.source) is not None, "model.source: neither known nor a hub id")
            return choose_model(stored.source, medium=self.stored.medium)
        place = self._place_of_model(stored)
        return choose_model(str(place), self.stored.medium, base)

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
                said, option = f"was made from {picture.file}", OPTIONS[picture.kind]
                place = self._same_file(picture.file, picture.sha256, said, option)
                found.setdefault(picture.kind, []).append(place)
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
        known = KNOWN_MODELS[self.stored.medium]
        if typed is not None or stored is None or stored in known or HUB_ID.fullmatch(stored):
            return typed or stored
        self._require(_is_name(stored), "weights.base: neither a name nor a hub id")
        for folder in self.folders:
            if (folder / stored / "model_index.json").is_file():
                return str(absolute(folder / stored))
        raise BadInput(f"{self.file} was made with the folder {stored}, which is not here: give it with --base FOLDER")

    def weights(self, given: Weights) -> Weights:
        """How its weights come, with what is given of it.

        Raises:
            BadInput: if something of them is not found here.
        """
        asked = {name: value for name, value in vars(given).items() if value not in (None, (), False)}
        then = self.stored.weights.model_dump(mode="json") | {"base": None}
        if (encoder := then.get("text_encoder")) is not None:
            path = asked.get("text_encoder") or self._place(encoder, self.told.model.weights, "text-encoder")
            then["text_encoder"] = str(absolute(path))
        if "loras" in asked:
            then["loras"] = []
        for lora in then.get("loras", ()):
            if lora["kind"] == "file":
                lora["source"] = str(absolute(self._place(lora["source"], self.told.model.loras, "lora")))
        form: StoredForm = self._checked(validated, StoredForm, then)
        return replace(self._checked(form.as_weights), **asked | {"base": self.base(given.base)})

    def _names_of_pictures(self) -> list[tuple[PictureKind, str]]:
        stored = self.stored
        one: dict[PictureKind, str | None] = {
            "start": stored.init_image,
            "mask": stored.mask,
            "control": stored.control,
        }
        names: list[tuple[PictureKind, str]] = [(kind, name) for kind, name in one.items() if name is not None]
        return [*names, *(("reference", name) for name in stored.references)]

    def _place(self, name: str, told: Sequence[_RepeatedFile], option: str) -> Path:
        """Where a file of weights is found: of that name, and the same as then."""
        digest = next((one.sha256 for one in told if one.name == name), None)
        return self._same_file(name, digest, f"was made with {name}", f"--{option}")

    def _same_file(self, name: str, digest: str | None, said: str, option: str) -> Path:
        self._require(_is_name(name), f"{printable(name)[:80]}: Input should be the name of a file alone")
        others = []
        for folder in self.folders:
            place = folder / name
            if place.is_file() and digest is not None and _is_same(place, digest):
                return place
            others += [place] if place.is_file() else []
        why = f"and {others[0]} is another file" if others else "which is neither beside it nor in this folder"
        raise BadInput(f"{self.file} {said}, {why}: give it with {option} FILE")

    def _checked(self, read: Callable[..., Any], *data: Any) -> Any:
        try:
            return read(*data)
        except ValueError as error:
            raise BadInput(f"{self.file} cannot be repeated: {error}") from error

    def _place_of_model(self, stored: StoredModel) -> Path:
        self._require(_is_name(stored.source), "model.source: Input should be the name of a file or folder alone")
        others = []
        for folder in self.folders:
            place = folder / stored.source
            if not (place / "model_index.json").is_file() if stored.kind == "folder" else not place.is_file():
                continue
            if not self._has_other_weights(place, stored):
                return absolute(place)
            others.append(place)
        why = f"{others[0]} has other weights" if others else "which is neither beside it nor in this folder"
        what = "FOLDER" if stored.kind == "folder" else "FILE"
        raise BadInput(f"{self.file} was made by the model {stored.source}, {why}: give it with --model {what}")

    def _has_other_weights(self, place: Path, stored: StoredModel) -> bool:
        told = [one for one in self.told.model.weights if one.part and one.sha256]
        if stored.kind == "file":
            return any(not _is_same(place, str(one.sha256)) for one in told if one.part.startswith("transformer"))
        # One part may have come from a file of its own.
        there = [(path, one) for one in told if (path := place / one.part / one.name).is_file()]
        return any(not _is_same(path, str(one.sha256)) for path, one in there)

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
        from grat_cli.models.devices import can_compute_on, cpu_threads, device_name

        told, found = self.told, versions()
        differing = [
            f"{name} {told.versions[name] or 'missing'} then, {version or 'missing'} now"
            for name, version in found.items()
            if name in told.versions and told.versions[name] != version
        ]
        notes = [f"other versions: {', '.join(differing)}"] if differing else []
        devices = f"{told.device.model} ({told.device.name})", f"{device_name(device)} ({device})"
        if devices[0] != devices[1]:
            notes.append(f"another device: {devices[0]} then, {devices[1]} now")
        if told.device.dtype != dtype:
            notes.append(f"another dtype: {told.device.dtype} then, {dtype} now")
        threads = cpu_threads(device)
        if threads and told.device.threads and threads != told.device.threads:
            used = f"as many are used, not {threads}"
            if not can_compute_on(told.device.threads):
                used = f"too many for this machine, {threads} are used, and sums may be rounded in another order"
            notes.append(f"it was made on {told.device.threads} CPU threads: {used}")
        stored = self.stored.model
        then = told.model.revision if model.kind == "hub" and model.source == stored.source else None
        if then is not None and (revision := present_revision(model.source)) not in (None, then):
            notes.append(f"another revision of {model.source}: {then} then, {revision} now")
        notes += list(changed_files(model, weights, told.model.weights))
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
        return Repeatable(file, request_of_report(found), validated(RepeatedReport, found))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file} cannot be repeated: it is damaged, or of another version of grat: {error}") from error


def changed_files(model: ModelChoice, weights: Weights, told: Sequence[_RepeatedFile]) -> Iterator[str]:
    """What is no more what it was of the files of weights: a sentence for each that is missing or another one.

    Args:
        model: that is here.
        weights: how they come.
        told: of a report.
    """
    for one in told:
        path = _path_of(one, model, weights)
        if path is None or one.sha256 is None:
            continue
        if not path.is_file():
            yield f"other weights: {one.part} has no {one.name} here"
        elif not _is_same(path, one.sha256):
            yield f"other weights: {path.name} of {one.part} is another file than then"


def _path_of(one: _RepeatedFile, model: ModelChoice, weights: Weights) -> Path | None:
    """Where a file of weights of then is here; None of one that comes from a hub."""
    encoder = getattr(weights, "text_encoder", None)
    if encoder is not None and one.part == family_of(model).large_encoder:
        return expanded(encoder)
    if model.kind == "file" and one.part.startswith("transformer"):
        return expanded(model.source)
    place = weights.base if model.kind == "file" else model.source if model.kind == "folder" else None
    return expanded(place) / one.part / one.name if place and os.path.isdir(expanded(place)) else None


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
