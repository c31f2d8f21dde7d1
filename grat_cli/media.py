"""Output files: their names, the promise not to overwrite, and the provenance inside them."""

from __future__ import annotations

import json
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from grat_cli import ffmpeg, tensor_files
from grat_cli.errors import BadInput
from grat_cli.gif_comment import read_comments
from grat_cli.whole_files import part_path, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

PROVENANCE_KEY = "grat"
OUTPUT_SUFFIXES = (".png", ".mp4", ".webm", ".gif")
GIF_COMMENT_PREFIX = b"grat="
FIRST_FRAME = "frame-0001.png"
_EBML_SIGNATURE = b"\x1aE\xdf\xa3"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LONGEST_PROVENANCE = 2**24


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
    """The first words of a prompt in lower-case ASCII letters and digits, joined by dashes."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", ascii_text)
    name = "-".join(words)[: longest + 1]
    # Drop a word that was cut, unless it is the only one.
    return (name.rpartition("-")[0] or name[:longest]) if len(name) > longest else name or "untitled"


def output_paths(out: Path | None, names: Sequence[str], seeds: Sequence[int], suffix: str = ".png") -> list[Path]:
    """Where the pictures or videos go.

    Args:
        out: `--out`: a file, a folder, or None for the current folder.
        names: default name of each output.
        seeds: seed of each output; with several, a file gets `-s{seed}` before its suffix.
        suffix: of the format; empty where each output is a folder of frames, which may have any name.

    Raises:
        BadInput: if `out` names a file of another format.
    """
    if out is None or out.is_dir() or str(out).endswith(os.sep):
        return [(out or Path()) / name for name in names]
    if suffix and out.suffix.lower() != suffix:
        format_word = suffix[1:].upper() if suffix == ".png" else suffix[1:]
        things = "pictures" if suffix == ".png" else "these videos"
        raise BadInput(
            f"--out {out}: {things} are {format_word} files: use {out.with_suffix(suffix)}, or an existing folder"
        )
    if len(seeds) == 1:
        return [out]
    stem, ending = (out.stem, out.suffix) if suffix else (out.name, "")
    return [out.with_name(f"{stem}-s{seed}{ending}") for seed in seeds]


def report_path(output: Path) -> Path:
    """Where the report of a picture or video goes."""
    return _beside(output, ".json")


def latents_path(output: Path) -> Path:
    """Where the latents of a video go."""
    return _beside(output, ".latents.safetensors")


def checkpoint_path(output: Path) -> Path:
    """Where the checkpoint of a run that makes a video goes."""
    return _beside(output, ".checkpoint.safetensors")


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
        raise BadInput(f"the folder {folder} does not exist: create it first (mkdir -p {folder}), or use another --out")
    if path.is_dir():
        raise BadInput(f"{path} is a folder: use another --out")
    if os.path.lexists(path) and not overwrite:
        raise BadInput(f"{path} exists: use --overwrite, or another --out")
    probe = part_path(path)
    with open(probe, "xb"):
        pass
    probe.unlink()


def write_png(image: Image, path: Path, provenance: Mapping[str, Any] | None) -> None:
    """Writes a picture, whole or not at all, with its provenance in an iTXt chunk named `grat`.

    Raises:
        CannotWrite: if it cannot be written.
    """
    write_whole(path, lambda file: save_png(image, file, provenance))


def save_png(image: Image, file: IO[bytes], provenance: Mapping[str, Any] | None) -> None:
    """Puts a picture into an open file, as `write_png` does."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if provenance is not None:
        chunks.add_itxt(PROVENANCE_KEY, _json_text(provenance))
    image.save(file, format="PNG", pnginfo=chunks)


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, whole or not at all.

    Raises:
        CannotWrite: if it cannot be written.
    """
    write_text(_json_text(data, indent=2) + "\n", path)


def _json_text(data: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON that people can read; in ASCII where a prompt was typed in bytes that are no text."""
    text = json.dumps(data, ensure_ascii=False, indent=indent, allow_nan=False)
    readable = not any("\ud800" <= character <= "\udfff" for character in text)
    return text if readable else json.dumps(data, indent=indent, allow_nan=False)


def write_text(text: str, path: Path) -> None:
    """Writes text, whole or not at all.

    Raises:
        CannotWrite: if it cannot be written.
    """
    write_whole(path, lambda file: file.write(text.encode()))


def read_provenance(path: Path) -> dict[str, Any]:
    """What made an output: from the file itself, else from the report beside it; or from a report.

    Args:
        path: a picture, a video, a folder of frames, latents, a checkpoint, or a report.

    Raises:
        BadInput: if there is no such file, or nothing of grat's in it.
    """
    try:
        if path.suffix.lower() == ".json":
            return _checked(path.read_bytes(), path)
        embedded = _embedded(path / FIRST_FRAME if path.is_dir() else path)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    if embedded is not None:
        return _checked(embedded, path)
    report = path.with_suffix(".json") if path.is_file() else report_path(path)
    if report.is_file():
        return read_provenance(report)
    raise BadInput(f"{path} does not say how it was made, and there is no {report.name} beside it")


def _embedded(path: Path) -> bytes | str | None:
    """The provenance in a file of any kind, as JSON text."""
    if path.suffix.lower() == tensor_files.SUFFIX:
        about = tensor_files.read_about(path)
        return None if about is None else json.dumps(about)
    with open(path, "rb") as file:
        start = file.read(12)
        file.seek(0)
        if start.startswith(_PNG_SIGNATURE):
            return _in_png(file, path)
        if start.startswith(b"GIF8"):
            return next(
                (c[len(GIF_COMMENT_PREFIX) :] for c in read_comments(file) if c.startswith(GIF_COMMENT_PREFIX)), None
            )
    if start[4:8] == b"ftyp" or start.startswith(_EBML_SIGNATURE):
        return ffmpeg.read_tags(path).get(PROVENANCE_KEY)
    return None


def _in_png(file: IO[bytes], path: Path) -> bytes | None:
    """The provenance in a PNG, read chunk by chunk: no need to decode half a gigapixel for a line of text."""
    file.seek(len(_PNG_SIGNATURE))
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind != b"iTXt" or length > _LONGEST_PROVENANCE:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        chunk, checksum = file.read(length), file.read(4)
        keyword, _, rest = chunk.partition(b"\0")
        if keyword == PROVENANCE_KEY.encode():
            if checksum != struct.pack(">I", zlib.crc32(kind + chunk)):
                raise BadInput(f"the provenance in {path} is damaged: its checksum is wrong")
            # Compression flag and method, language, translated keyword, then the text (PNG 1.2, section 4.2.3.3).
            return rest[2:].split(b"\0", 2)[2]
    return None


def _checked(text: bytes | str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not a report of grat: it is not valid JSON") from error
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("grat."):
        raise BadInput(f"{path} is not a report of grat")
    return data
