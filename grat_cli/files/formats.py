"""Formats of outputs: which there are, and writing a picture or video in any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.files import pictures, videos
from grat_cli.files.places import is_folder

if TYPE_CHECKING:
    import numpy as np

SUFFIXES: Mapping[str, str] = {name: format.suffixes[0] for name, format in pictures.FORMATS.items()} | videos.SUFFIXES
"""Usual ending by name of the format; empty for a folder of frames."""


def choose_format(medium: str, out: Path | None, name: str | None) -> tuple[str, str]:
    """The format of the outputs of a run, and the ending of their names.

    Args:
        medium: `image` or `video`.
        out: `--out`: a file, a folder, or None.
        name: `--format`, None where it was not given.

    Raises:
        BadInput: if there is no such format, or name and ending contradict each other.
    """
    choose = {"image": pictures.choose_picture_format, "video": videos.choose_video_format}[medium]
    chosen = choose(out, name)
    if isinstance(chosen, pictures.PictureFormat):
        return chosen.name, chosen.suffix_of(out)
    return chosen, SUFFIXES[chosen]


def kept_format(out: Path | None, name: str | None, then: str) -> str | None:
    """`--format` of an output that follows an earlier one: as typed, None where `--out` ends in one, else as then."""
    ends_in_one = out is not None and bool(out.suffix) and not is_folder(out)
    return then if name is None and not ends_in_one else name


def require_writable(format: str, width: int, height: int, *, fps: int | None, quality: int | None) -> None:
    """Makes sure, before any work is done, that an output can be written in a format.

    Args:
        format: one of `SUFFIXES`.
        width: in pixels.
        height: in pixels.
        fps: frames per second of a video.
        quality: of the encoder.

    Raises:
        BadInput: if it is too large for the format, or a setting does not suit it, or the encoder is not here.
    """
    if format in videos.FORMATS:
        assert fps is not None, "a video has frames per second"
        videos.require_encodable(format, fps=fps, crf=quality)
    else:
        pictures.require_writable(pictures.FORMATS[format], width, height, quality)


def require_whole(path: Path, format: str) -> None:
    """Decodes a picture or video from end to end.

    Raises:
        BadInput: if it cannot be.
    """
    if format in videos.FORMATS:
        videos.probe_video(path)
    else:
        pictures.read_picture(path)


def write_output(
    frames: Iterable[np.ndarray],
    path: Path,
    format: str,
    *,
    fps: int | None = None,
    quality: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    written: Callable[[int], None] | None = None,
) -> bool:
    """Writes a picture or video, whole or not at all.

    Args:
        frames: uint8 `[H, W, 3]`, consumed once; of a picture one.
        path: the file, or the folder of frames.
        format: one of `SUFFIXES`.
        fps: frames per second of a video.
        quality: of the encoder, by the format's own scale; None for its own choice.
        provenance: what made it, None for nothing.
        overwrite: as for `write_whole`.
        written: is told how many bytes of a picture have been written, time and again.

    Returns:
        Whether the provenance is inside: some formats have no room for much of it.

    Raises:
        CannotWrite: if it cannot be written, or is there already.
    """
    if format in videos.FORMATS:
        assert fps is not None, "a video has frames per second"
        videos.write_video(
            frames, path, fps=fps, crf=quality, format=format, provenance=provenance, overwrite=overwrite
        )
        return provenance is not None
    from PIL import Image

    (frame,) = frames
    return pictures.write_picture(
        Image.fromarray(frame),
        path,
        pictures.FORMATS[format],
        provenance,
        quality=quality,
        overwrite=overwrite,
        written=written,
    )
