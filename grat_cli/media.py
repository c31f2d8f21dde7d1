"""Output files: their names, the promise not to overwrite, and the provenance inside them."""

from __future__ import annotations

import json
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from grat_cli.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

PROVENANCE_KEY = "grat"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LONGEST_PROVENANCE = 2**24


def default_name(when: datetime, prompt: str, size: str, variant: str, seed: int) -> str:
    """For example `grat-20250131-142501-a-red-fox-1024x1024-b-s7.png`."""
    return f"grat-{when:%Y%m%d-%H%M%S}-{slug(prompt)}-{size}-{variant}-s{seed}.png"


def slug(prompt: str, longest: int = 40) -> str:
    """The first words of a prompt in lower-case ASCII letters and digits, joined by dashes."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", ascii_text)
    name = "-".join(words)[: longest + 1]
    # Drop a word that was cut, unless it is the only one.
    return (name.rpartition("-")[0] or name[:longest]) if len(name) > longest else name or "untitled"


def output_paths(out: Path | None, names: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Where the pictures go.

    Args:
        out: `--out`: a file, a folder, or None for the current folder.
        names: default name of each picture.
        seeds: seed of each picture; with several, a file gets `-s{seed}` before its suffix.

    Raises:
        BadInput: if `out` names a file that is not a PNG.
    """
    if out is None or out.is_dir() or str(out).endswith(os.sep):
        return [(out or Path()) / name for name in names]
    if out.suffix.lower() != ".png":
        raise BadInput(f"--out {out}: pictures are PNG files: use {out.with_suffix('.png')}, or an existing folder")
    if len(seeds) == 1:
        return [out]
    return [out.with_name(f"{out.stem}-s{seed}{out.suffix}") for seed in seeds]


def report_path(picture: Path) -> Path:
    """Where the report of a picture goes."""
    return picture.with_suffix(".json")


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
    probe = _temporary(path)
    with open(probe, "xb"):
        pass
    probe.unlink()


def write_png(image: Image, path: Path, provenance: Mapping[str, Any] | None) -> None:
    """Writes a picture, whole or not at all, with its provenance in an iTXt chunk named `grat`.

    Raises:
        BadInput: if it cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if provenance is not None:
        chunks.add_itxt(PROVENANCE_KEY, json.dumps(provenance, ensure_ascii=False))
    _write(path, lambda file: image.save(file, format="PNG", pnginfo=chunks))


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, whole or not at all.

    Raises:
        BadInput: if it cannot be written.
    """
    write_text(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes text, whole or not at all.

    Raises:
        BadInput: if it cannot be written.
    """
    _write(path, lambda file: file.write(text.encode()))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.part")


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_provenance(path: Path) -> dict[str, Any]:
    """What made an output: from the picture itself, else from the report beside it; or from a report.

    Raises:
        BadInput: if there is no such file, or nothing of grat's in it.
    """
    try:
        if path.suffix.lower() == ".json":
            return _checked(path.read_bytes(), path)
        embedded = _embedded(path)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    if embedded is not None:
        return _checked(embedded, path)
    if report_path(path).is_file():
        return read_provenance(report_path(path))
    raise BadInput(f"{path} does not say how it was made, and there is no {report_path(path).name} beside it")


def _embedded(path: Path) -> bytes | None:
    """The provenance in a PNG, read chunk by chunk: no need to decode half a gigapixel for a line of text."""
    with open(path, "rb") as file:
        if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
            return None
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


def _checked(text: bytes, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not a report of grat: it is not valid JSON") from error
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("grat."):
        raise BadInput(f"{path} is not a report of grat")
    return data
