"""Video files: mp4, webm, gif, or a folder of pictures; written frame by frame, and looked at afterwards."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli import ffmpeg, media
from grat_cli.errors import BadInput, choices
from grat_cli.whole_files import cannot_write, part_path

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {"mp4": ".mp4", "webm": ".webm", "gif": ".gif", "frames": ""}
FORMATS = tuple(SUFFIXES)
"""mp4: H.264; webm: VP9; gif: 256 colours per video; frames: a folder of PNG files."""

DEFAULT_CRF = {"mp4": 18, "webm": 24}
"""Constant rate factor where none is given: hardly told from the frames themselves. Smaller is better and larger."""

_CRF_RANGES = {"mp4": (1, 51), "webm": (0, 63)}  # 0 of H.264 is lossless, in a profile that browsers do not play
_ENCODERS = {"mp4": "libx264", "webm": "libvpx-vp9", "gif": "gif"}
_FASTEST_GIF = 50
# Frames are sRGB; without a word of the matrix, players guess it from the height of the video.
_COLOURS = (
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "iec61966-2-1", "-color_range", "tv"),
)
_ENCODING = {
    "mp4": (*_COLOURS, "-c:v", "libx264", "-movflags", "+faststart+use_metadata_tags", "-f", "mp4"),
    "webm": (*_COLOURS, "-c:v", "libvpx-vp9", "-b:v", "0", "-row-mt", "1", "-cpu-used", "2", "-f", "webm"),
}


@dataclass(frozen=True)
class VideoFacts:
    """What a video file really is, by ffmpeg's or its own account.

    Attributes:
        width, height: pixels.
        frames: frames that can be decoded.
        fps: frames per second; None of a folder of frames.
        seconds: duration, to a hundredth; None of a folder of frames.
        codec: ffmpeg's name: h264, vp9, gif, png.
    """

    width: int
    height: int
    frames: int
    fps: float | None
    seconds: float | None
    codec: str


def choose_format(out: Path | None, format_name: str | None) -> str:
    """The format of the videos of a run: as named, else as the suffix of the output says, else mp4.

    Args:
        out: `--out`: a file, a folder, or None.
        format_name: `--format`, None where it was not given.

    Raises:
        BadInput: if there is no such format, or name and suffix contradict each other.
    """
    if format_name is not None and format_name not in FORMATS:
        raise BadInput(f"--format {format_name}: {choices(format_name, FORMATS)}")
    suffix = "" if out is None or out.is_dir() else out.suffix.lower()
    named = next((name for name, known in SUFFIXES.items() if known and known == suffix), None)
    if format_name is None:
        if named is None and suffix:
            raise BadInput(f"--out {out}: videos are mp4, webm or gif files: use {_with_suffix(out, '.mp4')}")
        return named or "mp4"
    if named not in (None, format_name):
        raise BadInput(
            f"--out {out} is no {'folder of frames' if format_name == 'frames' else f'{format_name} file'}: "
            f"use --out {_with_suffix(out, SUFFIXES[format_name])}, or leave out --format"
        )
    return format_name


def _with_suffix(out: Path | None, suffix: str) -> Path:
    assert out is not None
    return out.with_suffix(suffix)


def require_encodable(format: str, *, fps: float, crf: int | None) -> None:
    """Makes sure, before any work is done, that a video of these settings can be encoded.

    Args:
        format: one of `FORMATS`.
        fps: frames per second.
        crf: `--crf`, None where it was not given.

    Raises:
        BadInput: if ffmpeg is missing or lacks the encoder, or a setting does not suit the format.
    """
    if not (math.isfinite(fps) and 0 < fps <= 240):
        raise BadInput(f"--fps {fps:g}: expected more than 0 and at most 240")
    if format == "gif" and fps > _FASTEST_GIF:
        raise BadInput(f"--fps {fps:g}: players show a gif with at most {_FASTEST_GIF} frames per second")
    if crf is not None:
        if format not in _CRF_RANGES:
            raise BadInput(f"--crf is for mp4 and webm: leave it out with --format {format}")
        low, high = _CRF_RANGES[format]
        if not low <= crf <= high:
            raise BadInput(f"--crf {crf}: expected {low} (best) to {high} (smallest) for {format}")
    if format in _ENCODERS:
        ffmpeg.require_encoder(_ENCODERS[format])


def write_video(
    frames: Iterable[np.ndarray],
    path: Path,
    *,
    fps: float,
    crf: int | None = None,
    format: str = "mp4",
    provenance: Mapping[str, Any] | None = None,
) -> int:
    """Writes a video, whole or not at all, as its frames come.

    One frame is held at a time. H.264 with yuv420p takes even sides only: an odd width or height gets one more column
    or row in an mp4, a copy of the last one, so that no pixel is scaled or lost; the other formats keep odd sizes.

    Args:
        frames: uint8 `[H, W, 3]`, all of one size; consumed once. Where the iterable raises, nothing is written.
        path: the file, or for `frames` the folder, which must not exist.
        fps: frames per second; a folder of frames does not know it.
        crf: quality of mp4 and webm; `DEFAULT_CRF` where None.
        format: one of `FORMATS`.
        provenance: what made the video, as JSON data, put into the file's metadata: into each frame of a folder. Its
            `prompt` becomes the title and comment that players show.

    Returns:
        how many frames were written.

    Raises:
        BadInput: if ffmpeg is missing.
        CannotWrite: if it cannot be written: no space, no permission, ffmpeg died.
        ValueError: if there are no frames, or they are not uint8 `[H, W, 3]` of one size.
    """
    write = {"mp4": _write_encoded, "webm": _write_encoded}[format]
    return write(_checked(frames), path, fps=fps, crf=crf, format=format, provenance=provenance)


def _checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    import numpy as np

    shape = None
    for number, frame in enumerate(frames, 1):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"frame {number} is {frame.dtype} {list(frame.shape)}, expected uint8 [H, W, 3]")
        if shape not in (None, frame.shape):
            raise ValueError(f"frame {number} is {list(frame.shape)}, the first one was {list(shape)}")
        shape = frame.shape
        yield frame
    if shape is None:
        raise ValueError("a video needs at least one frame")


def _write_encoded(
    frames: Iterator[np.ndarray],
    path: Path,
    *,
    fps: float,
    crf: int | None,
    format: str,
    provenance: Mapping[str, Any] | None,
) -> int:
    import numpy as np

    part, tags = part_path(path), part_path(path, ".tags")
    count = 0
    first = next(frames)
    odd_rows, odd_columns = (side % 2 if format == "mp4" else 0 for side in first.shape[:2])
    size = f"{first.shape[1] + odd_columns}x{first.shape[0] + odd_rows}"
    try:
        tags.write_text(ffmpeg.metadata_text(_tags(provenance)), encoding="utf-8", newline="\n")
        arguments = [
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", size, "-framerate", str(fps), "-i", "pipe:0"),
            *("-f", "ffmetadata", "-i", ffmpeg.url(tags), "-map", "0:v", "-map_metadata", "1"),
            *("-crf", str(DEFAULT_CRF[format] if crf is None else crf), *_ENCODING[format], ffmpeg.url(part)),
        ]
        with ffmpeg.FrameSink(arguments, path) as sink:
            for frame in _with_first(first, frames):
                if odd_rows or odd_columns:
                    frame = np.pad(frame, ((0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
                sink.write(np.ascontiguousarray(frame).data)
                count += 1
        os.replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)
        tags.unlink(missing_ok=True)
    return count


def _with_first(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _tags(provenance: Mapping[str, Any] | None) -> dict[str, str]:
    if provenance is None:
        return {}
    # Pure ASCII passes every container and every terminal unharmed; the prompt stands beside it for people.
    tags = {media.PROVENANCE_KEY: json.dumps(provenance, allow_nan=False)}
    if prompt := provenance.get("prompt"):
        readable = str(prompt).replace("\0", " ").encode("utf-8", "replace").decode()
        tags |= {"title": readable, "comment": readable}
    return tags


_DURATION = re.compile(r"^  Duration: (\d+):(\d\d):(\d\d\.\d+)", re.MULTILINE)
_STREAM = re.compile(r"^  Stream #0:\d+.*?: Video: (\w+).*?, (\d+)x(\d+)[ ,].*?, ([\d.]+) fps", re.MULTILINE)
_FRAMES = re.compile(r"(?:^|[\r\n])frame= *(\d+)")


def probe_video(path: Path) -> VideoFacts:
    """Decodes a video file from end to end, and says what is in it; of a folder of frames, counts them.

    Raises:
        BadInput: if there is no such file, it is no video, or it is damaged; or ffmpeg is missing.
    """
    if not path.is_file():
        raise BadInput(f"cannot read {path}: no such file")
    arguments = ["-i", ffmpeg.url(path), "-map", "0:v:0", "-fps_mode", "passthrough", "-f", "null", "-"]
    done = ffmpeg.run(["-xerror", *arguments])
    log = done.stderr.decode(errors="replace")
    stream, duration, counted = _STREAM.search(log), _DURATION.search(log), _FRAMES.findall(log)
    if done.returncode or stream is None or duration is None or not counted:
        raise BadInput(f"{path} is not a whole video: {ffmpeg.last_line(done.stderr) or 'ffmpeg cannot read it'}")
    codec, width, height, fps = stream.groups()
    hours, minutes, seconds = duration.groups()
    frames, length = int(counted[-1]), int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    # A gif has a delay per frame, in hundredths of a second: only the mean is its rate.
    rate = round(frames / length, 3) if codec == "gif" and length else float(fps)
    return VideoFacts(int(width), int(height), frames, rate, length, codec)
