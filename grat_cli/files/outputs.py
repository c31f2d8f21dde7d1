"""Output files: their names, the promise not to overwrite, and the provenance inside them."""

from __future__ import annotations

import json
import os
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput
from grat_cli.files import ffmpeg, pictures, tensors, texts
from grat_cli.files.gif_comment import read_comments
from grat_cli.files.json_objects import parsed
from grat_cli.files.places import LONGEST_NAME_BYTES, is_folder, means_folder, renamed
from grat_cli.files.whole import part_of, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

PROVENANCE_KEY = pictures.PROVENANCE_KEY
OUTPUT_SUFFIXES = (*pictures.SUFFIXES, ".mp4", ".webm", ".gif")
GIF_COMMENT_PREFIX = b"grat="
FIRST_FRAME = "frame-0001.png"
_LONGEST_REPORT = 1 << 26
_EBML_SIGNATURE = b"\x1aE\xdf\xa3"

LONGEST_SLUG_BYTES = 100
"""So that all that is put around and behind it stays within `LONGEST_NAME_BYTES`."""

_ACCENTED = re.compile(r"([a-z])[\u0300-\u036f]+")  # decomposed
_SELECTORS = "\ufe0e\ufe0f\u20e3"  # of how a pictograph looks
_WITHIN_WORDS = "\u200c\u200d"
_LONGEST_ENDING = ".checkpoint.safetensors"  # of what may lie beside an output


def default_name(when: datetime, prompt: str, size: str, variant: str, seed: int, suffix: str = ".png") -> str:
    """For example `grat-20250131-142501-a-red-fox-1024x1024-b-s7.png`.

    Args:
        when: when the run began.
        prompt: of which the first words are shown.
        size: `1024x1024` of a picture, `1280x720x129` of a video: width, height, frames.
        variant: of attention.
        seed: of this output.
        suffix: of the format; empty for a folder of frames.
    """
    return f"grat-{when:%Y%m%d-%H%M%S}-{slug(prompt)}-{size}-{variant}-s{seed}{suffix}"


def slug(prompt: str, longest: int = 40) -> str:
    """The first words of a prompt in lower-case letters and digits of any script, joined by dashes.

    Latin letters lose their accents, pictographs are named (`fox-face`), and what the file system's encoding has no
    character for is left out.

    Args:
        prompt: any text.
        longest: characters; of UTF-8 it is at most `LONGEST_SLUG_BYTES`.
    """
    name = "-".join(_words(prompt))
    kept = _within(name, longest, LONGEST_SLUG_BYTES)
    if kept != name and name[len(kept)] != "-":
        # Drop a word that was cut, unless it is the only one.
        kept = kept.rpartition("-")[0] or kept
    return kept.rstrip("-") or "untitled"


def _words(prompt: str) -> list[str]:
    plain = _ACCENTED.sub(r"\1", unicodedata.normalize("NFKD", prompt).lower())
    words = [""]
    for character in unicodedata.normalize("NFC", plain):
        kind = unicodedata.category(character)
        if kind[0] in "LN" and _is_storable(character):
            words[-1] += character
        elif kind[0] == "M" and words[-1] and _is_storable(character) and character not in _SELECTORS:
            words[-1] += character  # a vowel of many scripts
        elif character not in _WITHIN_WORDS:
            named = unicodedata.name(character, "") if kind == "So" else ""
            words += [*re.findall(r"[a-z0-9]+", named.lower()), ""]
    return [word for word in words if word]


def _is_storable(character: str) -> bool:
    try:
        os.fsencode(character)
    except UnicodeEncodeError:
        return False
    return True


def _within(text: str, characters: int, size_bytes: int) -> str:
    """The beginning of a text of so many characters and bytes of UTF-8, with no letter taken from its marks."""
    kept = text[:characters].encode()[:size_bytes].decode(errors="ignore")
    while kept and len(kept) < len(text) and unicodedata.category(text[len(kept)])[0] == "M":
        kept = kept[:-1]
    return kept


def output_paths(out: Path | None, names: Sequence[str], seeds: Sequence[int], suffix: str = ".png") -> list[Path]:
    """Where the pictures or videos go.

    Args:
        out: `--out`: a file, a folder, or None for the current folder.
        names: default name of each output.
        seeds: seed of each output; with several, a file gets `-s{seed}` before its suffix.
        suffix: of the format; empty where each output is a folder of frames, which may have any name.

    Raises:
        BadInput: if `out` names a file of another format, or is so long that nothing can lie beside it.
    """
    is_new_folder_of_frames = out is not None and not suffix and means_folder(out) and not out.is_dir()
    if out is None or (is_folder(out) and not is_new_folder_of_frames):
        return [Path(out or "", name) for name in names]
    if suffix and out.suffix.lower() != suffix.lower():
        format_word = suffix[1:].upper() if suffix == ".png" else suffix[1:]
        things = "these pictures" if suffix in pictures.SUFFIXES else "these videos"
        raise BadInput(
            f"--out {out}: {things} are {format_word} files: use {renamed(out, suffix)}, or an existing folder"
        )
    stem, ending = (out.stem, out.suffix) if suffix else (out.name, "")
    paths = [out] if len(seeds) == 1 else [out.with_name(f"{stem}-s{seed}{ending}") for seed in seeds]
    for path in paths:
        excess = len(os.fsencode(_beside(path, _LONGEST_ENDING).name)) - LONGEST_NAME_BYTES
        if excess > 0:
            raise BadInput(
                f"--out {path.name[:40]}...: the name is too long for what is kept beside it: "
                f"make it {excess} bytes shorter"
            )
    return paths


def report_path(output: Path) -> Path:
    """Where the report of a picture or video goes."""
    return _beside(output, ".json")


def preview_path(output: Path) -> Path:
    """Where previews of a picture go while it is being made."""
    return _beside(output, ".preview.png")


def latents_path(output: Path) -> Path:
    """Where the latents of an output go."""
    return _beside(output, ".latents.safetensors")


def checkpoint_path(output: Path) -> Path:
    """Where the checkpoint of the run that makes an output goes."""
    return _beside(output, _LONGEST_ENDING)


def kept_beside(output: Path) -> list[Path]:
    """Latents and checkpoint of an output, those of them that are there; beside a folder without a name there are none.

    A name may be so long that nothing can lie beside it.
    """
    if not output.name:
        return []
    return [path for path in (latents_path(output), checkpoint_path(output)) if os.path.isfile(path)]


def _beside(output: Path, suffix: str) -> Path:
    """The same name with another suffix; a folder of frames has none to replace, even if there is a dot in its name."""
    is_file = output.suffix.lower() in OUTPUT_SUFFIXES
    return output.with_name((output.stem if is_file else output.name) + suffix)


def refuse_unwritable(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Makes sure, before any work is done, that the files can be written.

    Raises:
        BadInput: if one exists and may not be overwritten, or its folder is missing or not writable.
    """
    for path in paths:
        try:
            _refuse_unwritable(path, overwrite)
        except OSError as error:
            raise BadInput(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error


def _refuse_unwritable(path: Path, overwrite: bool) -> None:
    folder = path.parent
    if not folder.is_dir():
        made = shlex.quote(str(folder))
        raise BadInput(f"the folder {folder} does not exist: create it first (mkdir -p {made}), or use another --out")
    if path.is_dir():
        raise BadInput(f"{path} is a folder: use another --out")
    if os.path.lexists(path) and not overwrite:
        raise BadInput(f"{path} exists: use --overwrite, or another --out")
    with part_of(path):
        pass


def write_png(image: Image, path: Path, provenance: Mapping[str, Any] | None, *, overwrite: bool = False) -> None:
    """Writes a PNG, whole or not at all, with its provenance in an iTXt chunk named `grat`.

    Raises:
        CannotWrite: if it cannot be written.
    """
    pictures.write_picture(image, path, pictures.FORMATS["png"], provenance, overwrite=overwrite)


def write_json(data: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Writes JSON, whole or not at all.

    Raises:
        CannotWrite: if it cannot be written.
    """
    write_text(json_text(data), path, overwrite=overwrite)


def json_text(data: Mapping[str, Any]) -> str:
    """JSON as it is written to files."""
    return pictures.json_text(data, indent=2) + "\n"


def write_text(text: str, path: Path, *, overwrite: bool = False) -> None:
    """Writes text in UTF-8, whole or not at all; names of files that are no text are written out in it.

    Raises:
        CannotWrite: if it cannot be written.
    """
    write_whole(path, lambda file: file.write(text.encode(errors="backslashreplace")), overwrite=overwrite)


def read_provenance(path: Path) -> dict[str, Any]:
    """What made an output: from the file itself, else from the report beside it; or from a report.

    Args:
        path: a picture, a video, a folder of frames, latents, a checkpoint, or a report.

    Raises:
        BadInput: if there is no such file, or nothing of grat's in it.
    """
    if path.suffix.lower() == ".json":
        return checked_report(texts.read_bytes(path, _LONGEST_REPORT), path)
    if (embedded := embedded_provenance(path)) is not None:
        return embedded
    report = path.with_suffix(".json") if path.is_file() else report_path(path)
    if report.is_file():
        return read_provenance(report)
    raise BadInput(f"{path} does not say how it was made, and there is no {report.name} beside it")


def embedded_provenance(path: Path) -> dict[str, Any] | None:
    """What made an output, from the file itself or the first of a folder of frames; None where it does not say.

    Raises:
        BadInput: if there is no such file, or what it says is damaged.
    """
    try:
        is_folder = path.is_dir()
        if is_folder and not (path / FIRST_FRAME).is_file():
            raise BadInput(f"{path} is no folder of frames: there is no {FIRST_FRAME} in it")
        embedded = _embedded(path / FIRST_FRAME if is_folder else path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise texts.unreadable(path, error) from error
    return None if embedded is None else checked_report(embedded, path)


def _embedded(path: Path) -> bytes | str | None:
    """The provenance in a file of any kind, as JSON text."""
    if path.suffix.lower() == tensors.SUFFIX:
        about = tensors.read_about(path)
        return None if about is None else json.dumps(about)
    with open(path, "rb") as file:
        start = file.read(12)
        file.seek(0)
        if start.startswith(b"GIF8"):
            return next(
                (c[len(GIF_COMMENT_PREFIX) :] for c in read_comments(file) if c.startswith(GIF_COMMENT_PREFIX)), None
            )
        if pictures.is_picture(start):
            return pictures.embedded_provenance(file, path)
    if start[4:8] == b"ftyp" or start.startswith(_EBML_SIGNATURE):
        return ffmpeg.read_tags(path).get(PROVENANCE_KEY)
    return None


def checked_report(text: bytes | str, path: Path) -> dict[str, Any]:
    """What a report of grat says.

    Args:
        text: of it.
        path: that it was read from.

    Raises:
        BadInput: if it is none.
    """
    try:
        data = parsed(text)
    except ValueError as error:
        raise BadInput(f"{path} is not a report of grat: it is not valid JSON") from error
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("grat."):
        raise BadInput(f"{path} is not a report of grat")
    return data
