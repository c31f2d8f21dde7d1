"""Picture files: PNG, JPEG, WebP and TIFF, each with the provenance of the picture inside.

Encoding is Pillow's. A picture of 8192 x 8192 pixels is 201 MB; all encoders but that of WebP take it row by row,
so that writing it costs a few megabytes more.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from grat_cli.errors import BadInput, choices, first_line
from grat_cli.files.places import is_folder, renamed
from grat_cli.files.whole import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

PROVENANCE_KEY = "grat"
# How files begin (PNG 1.2, section 3.1; JPEG, T.81, section B.1; TIFF 6.0, section 2).
_PNG, _JPEG, _TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"II*\0", b"MM\0*")
_LONGEST_PROVENANCE = 2**24
# A JPEG segment holds 65,533 bytes; the rest of the Exif data is far below a kilobyte (Exif 2.32, section 4.7.2).
_LONGEST_EXIF_TEXT = 64_000

# Exif's tag ImageDescription (Exif 2.32, section 4.6.4), in ASCII. Pillow writes no user comment into compressed TIFF.
_DESCRIPTION = 0x010E
_PREFIX = f"{PROVENANCE_KEY}="
# Likewise its orientation (section 4.6.4), of which these swap width and height.
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)
_PREDICTOR, _HORIZONTAL_DIFFERENCES = 317, 2

# Formats of which viewers show frame after frame; further pages of a TIFF or a camera's JPEG are not shown.
_MOVING = ("GIF", "PNG", "WEBP", "AVIF", "FLI")
# For these Pillow starts Ghostscript, or asks the system.
_PROGRAMS = ("EPS", "WMF")
_PROFILE = "icc_profile"

# Pictures of untrusted files above this are refused: a small file can claim any size. It is the largest that the
# planner takes, and 0.8 GB in memory.
MOST_PIXELS = 16_384 * 16_384


@dataclass(frozen=True)
class PictureFormat:
    """A kind of picture file.

    Attributes:
        name: as in `--format`.
        suffixes: of its files, the usual one first.
        pillow_name: Pillow's name of it.
        longest_side: most pixels a side, None for more than anyone has.
        quality: what is written without `--quality`; None where nothing is lost.
        options: for Pillow.
    """

    name: str
    suffixes: tuple[str, ...]
    pillow_name: str
    longest_side: int | None = None
    quality: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def suffix_of(self, out: Path | None) -> str:
        """That of `--out` where it has one of this format's, else the usual one."""
        own = "" if out is None else out.suffix
        return own if own.lower() in self.suffixes else self.suffixes[0]


FORMATS = {
    format.name: format
    for format in (
        # Of 8192x8192 pixels with the noise of a photograph, level 1 makes 99 MB in 6 s, 3 makes 94 MB in 10 s, and 6,
        # Pillow's own, 87 MB in 40 s of one core.
        PictureFormat("png", (".png",), "PNG", options={"compress_level": 3}),
        # libjpeg-turbo's JPEG_MAX_DIMENSION. Full resolution of colours: edges of saturated areas smear without it.
        PictureFormat("jpg", (".jpg", ".jpeg"), "JPEG", 65_500, 95, {"subsampling": 0}),
        # WEBP_MAX_DIMENSION.
        PictureFormat("webp", (".webp",), "WEBP", 16_383, 90),
        # LZW of differences (TIFF 6.0, sections 13 and 14), which every reader of TIFF knows. Deflate takes eight times
        # as long for 4% less.
        PictureFormat("tiff", (".tiff", ".tif"), "TIFF", options={"compression": "tiff_lzw"}),
    )
}
SUFFIXES = tuple(suffix for format in FORMATS.values() for suffix in format.suffixes)


def choose_picture_format(out: Path | None, format_name: str | None) -> PictureFormat:
    """The format of the pictures of a run: as named, else as the suffix of the output says, else PNG.

    Args:
        out: `--out`: a file, a folder, or None.
        format_name: `--format`, None where it was not given.

    Raises:
        BadInput: if there is no such format, or name and suffix contradict each other.
    """
    aliases = {"jpeg": "jpg", "tif": "tiff"}
    name = None if format_name is None else aliases.get(format_name.lower(), format_name.lower())
    if name is not None and name not in FORMATS:
        raise BadInput(f"--format {format_name}: {choices(name, tuple(FORMATS))}")
    is_file = out is not None and not is_folder(out)
    suffix = out.suffix.lower() if is_file and out is not None else ""
    by_suffix = next((format for format in FORMATS.values() if suffix in format.suffixes), None)
    if suffix and by_suffix is None:
        known = FORMATS[name or "png"].suffixes[0]
        assert out is not None
        raise BadInput(
            f"--out {out}: pictures are png, jpg, webp or tiff files: use {renamed(out, known)}, or an existing folder"
        )
    if name is None:
        return by_suffix or FORMATS["png"]
    if by_suffix not in (None, FORMATS[name]):
        assert out is not None
        raise BadInput(
            f"--out {out} is no {name} file: use --out {renamed(out, FORMATS[name].suffixes[0])}, or leave out --format"
        )
    return FORMATS[name]


def require_writable(format: PictureFormat, width: int, height: int, quality: int | None) -> None:
    """Makes sure, before any work is done, that a picture can be written in a format.

    Raises:
        BadInput: if it is too large for the format, or the quality does not suit it.
    """
    if quality is not None:
        if format.quality is None:
            raise BadInput(f"--quality is for jpg and webp, {format.name} loses nothing: leave it out")
        if not 1 <= quality <= 100:
            raise BadInput(f"--quality {quality}: expected 1 (smallest) to 100 (best)")
    if format.longest_side is not None and max(width, height) > format.longest_side:
        raise BadInput(
            f"{format.name} pictures have at most {format.longest_side:,} pixels a side, not {width}x{height}: "
            "use --format png or tiff"
        )


def write_picture(
    image: Image,
    path: Path,
    format: PictureFormat,
    provenance: Mapping[str, Any] | None,
    *,
    overwrite: bool = False,
    quality: int | None = None,
    written: Callable[[int], None] | None = None,
) -> bool:
    """Writes a picture, whole or not at all; `overwrite` as for `write_whole`, all else as for `save_picture`.

    Raises:
        CannotWrite: if it cannot be written.
    """
    inside = False

    def write(file: IO[bytes]) -> None:
        nonlocal inside
        inside = save_picture(image, file, format, provenance, quality=quality, written=written)

    write_whole(path, write, overwrite=overwrite)
    return inside


def save_picture(
    image: Image,
    file: IO[bytes],
    format: PictureFormat,
    provenance: Mapping[str, Any] | None,
    *,
    quality: int | None = None,
    written: Callable[[int], None] | None = None,
) -> bool:
    """Puts a picture into an open file, with its provenance inside.

    That is an iTXt chunk named `grat` in a PNG, and in the others Exif's description, `grat=` and JSON in ASCII.

    Args:
        image: RGB.
        file: to write to.
        format: of `FORMATS`.
        provenance: what made it, None for nothing.
        quality: 1 to 100, of formats that have one; None for the format's own.
        written: is told how many bytes have been written, time and again; not of TIFF.

    Returns:
        Whether the provenance is inside: all but PNG hold 64,000 bytes of it, and what is longer is left out.
    """
    from PIL.Image import Exif

    options, exif = dict(format.options), Exif()
    if format.quality is not None:
        options["quality"] = format.quality if quality is None else quality
    inside = provenance is not None
    if format.name == "png":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        if provenance is not None:
            options["pnginfo"].add_itxt(PROVENANCE_KEY, json_text(provenance))
    elif provenance is not None:
        description = _PREFIX + json.dumps(provenance, allow_nan=False)
        inside = len(description) <= _LONGEST_EXIF_TEXT
        if inside:
            exif[_DESCRIPTION] = description
    # Pillow takes a TIFF's tags, those of Exif among them, under another name.
    if format.name == "tiff":
        exif[_PREDICTOR] = _HORIZONTAL_DIFFERENCES
        options["tiffinfo"] = exif
    elif inside and format.name != "png":
        options["exif"] = exif
    # libtiff seeks and writes into the file by itself; to be told of every byte, one would have to hold all of them.
    target: Any = file if written is None or format.name == "tiff" else _Counted(file, written)
    image.save(target, format=format.pillow_name, **options)
    return inside


class _Counted(io.RawIOBase):
    """A file that tells how many bytes have been written to it."""

    def __init__(self, file: IO[bytes], written: Callable[[int], None]) -> None:
        self._file, self._written = file, written
        self._bytes = 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._bytes += len(data)
        self._written(self._bytes)
        return len(data)


def json_text(data: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON that people can read; in ASCII where a prompt was typed in bytes that are no text."""
    text = json.dumps(data, ensure_ascii=False, indent=indent, allow_nan=False)
    readable = not any("\ud800" <= character <= "\udfff" for character in text)
    return text if readable else json.dumps(data, indent=indent, allow_nan=False)


def is_picture(start: bytes) -> bool:
    """Whether a file that begins with these 12 bytes is one of `FORMATS`."""
    return start.startswith((_PNG, _JPEG, *_TIFF)) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def embedded_provenance(file: IO[bytes], path: Path) -> bytes | None:
    """The provenance in an open picture, as JSON text, or None; pixels are not decoded.

    Raises:
        BadInput: if it is damaged.
    """
    start = file.read(len(_PNG))
    file.seek(0)
    if start == _PNG:
        return _in_png(file, path)
    from PIL import Image

    try:
        with _any_size(), Image.open(file, formats=[format.pillow_name for format in FORMATS.values()]) as picture:
            description = picture.getexif().get(_DESCRIPTION)
    # Pillow's readers raise whatever a damaged file leads them to: struct.error, TypeError, KeyError, EOFError.
    except Exception:
        return None
    if isinstance(description, str) and description.startswith(_PREFIX):
        return description[len(_PREFIX) :].encode()
    return None


def _in_png(file: IO[bytes], path: Path) -> bytes | None:
    """The provenance in a PNG, read chunk by chunk: no need to decode half a gigapixel for a line of text."""
    file.seek(len(_PNG))
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
            return _text_of_chunk(rest, path)
    return None


def _text_of_chunk(rest: bytes, path: Path) -> bytes:
    """The text of an iTXt chunk after its keyword: compression flag and method, language, translated keyword, text.

    Programs that pack pictures anew may compress it (PNG 1.2, section 4.2.3.3).
    """
    damaged = f"the provenance in {path} is damaged"
    packed, fields = rest[:1] == b"\1", rest[2:].split(b"\0", 2)
    if len(fields) < 3:
        raise BadInput(f"{damaged}: it is too short")
    if not packed:
        return fields[2]
    try:
        return zlib.decompressobj().decompress(fields[2], _LONGEST_PROVENANCE)
    except zlib.error as error:
        raise BadInput(f"{damaged}: {error}") from error


def read_picture(path: Path, formats: Sequence[str] | None = None) -> Image:
    """A picture of any format and mode that Pillow reads, upright, as RGB, as a viewer shows it.

    Of 16 bits the upper eight are taken, transparent parts are white, colours are those of the profile inside. Those of
    up to `MOST_PIXELS` are read, where Pillow by itself would warn of 89 megapixels and refuse 179.

    Args:
        path: of the file.
        formats: Pillow's names of those that it may have; None for all.

    Raises:
        BadInput: if it cannot be read as a picture, is larger, moves, or has numbers that are no shades.
    """
    from PIL import ImageOps

    with _opened(path, formats) as picture:
        return _as_shown(ImageOps.exif_transpose(picture), path)


def picture_size(path: Path, formats: Sequence[str] | None = None) -> tuple[int, int]:
    """Width and height of what `read_picture` reads, from the beginning of the file; pixels are not decoded.

    Raises:
        BadInput: as for `read_picture`.
    """
    with _opened(path, formats) as picture:
        turned = picture.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
        return (picture.height, picture.width) if turned else picture.size


@contextmanager
def _opened(path: Path, formats: Sequence[str] | None) -> Iterator[Image]:
    """A picture whose size is known; whatever is wrong with it is BadInput."""
    from PIL import Image

    try:
        with _any_size(), Image.open(path, formats=list(formats or _readable_formats())) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise BadInput(
                    f"{path} has {picture.width}x{picture.height} pixels, more than 16384x16384: scale it down first"
                )
            _refuse_unshown(picture, path)
            yield picture
    except FileNotFoundError:
        raise BadInput(f"there is no picture {path}: check the path") from None
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # as in embedded_provenance
        raise BadInput(f"{path} cannot be read as a picture: {first_line(error)}") from error


def _readable_formats() -> list[str]:
    """Pillow's names of the formats that are read: not those for which it starts another program."""
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name not in _PROGRAMS]


def _refuse_unshown(picture: Image, path: Path) -> None:
    """Raises BadInput for what viewers show in ways of their own."""
    moving = getattr(picture, "n_frames", 1) if picture.format in _MOVING else 1
    if moving > 1:
        raise BadInput(f"{path} moves, in {moving} frames: save the one that is meant as a PNG")
    if picture.mode == "F" or (picture.mode.startswith("I") and not _is_of_16_bits(picture)):
        kind = "floating-point" if picture.mode == "F" else "32-bit"
        raise BadInput(
            f"{path} has {kind} numbers, which have no white of their own: save it with 8 or 16 bits per channel"
        )


def _is_of_16_bits(picture: Image) -> bool:
    # Pillow has the 16 bits of a PNG or PGM in 32.
    return picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM")


def _as_shown(picture: Image, path: Path) -> Image:
    """Pixels of any mode as RGB."""
    from PIL import Image

    if picture.mode.startswith("I"):
        import numpy as np

        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return _colours(picture)
    layer = picture.convert("RGBA")
    seen = Image.new("RGB", picture.size, "white")
    seen.paste(_colours(layer.convert("RGB"), picture.info.get(_PROFILE)), mask=layer.getchannel("A"))
    return seen


def _colours(picture: Image, profile: Any = None) -> Image:
    """The colours that a picture's profile means, in sRGB; as they stand where there is none, or none that fits."""
    from PIL import ImageCms

    profile = profile or picture.info.get(_PROFILE)
    if not isinstance(profile, bytes) or picture.mode not in ("L", "RGB", "CMYK"):
        return picture.convert("RGB")
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return picture.convert("RGB")
        shown = ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture.convert("RGB")
    return shown or picture.convert("RGB")


@contextmanager
def _any_size() -> Iterator[None]:
    """Suspends Pillow's guard against files that claim huge sizes: who reads in this context minds the size.

    It is a variable of the module, read whenever a file is opened or decoded; afterwards it is as before.
    """
    from PIL import Image

    guard = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = guard
