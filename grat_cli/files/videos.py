"""Video files: mp4, webm, gif, or a folder of pictures; written frame by frame, and looked at afterwards."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, CannotWrite, choices
from grat_cli.files import ffmpeg, outputs, pictures
from grat_cli.files.gif_comment import append_comment
from grat_cli.files.places import is_folder, renamed
from grat_cli.files.whole import cannot_write, part_of, place

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {"mp4": ".mp4", "webm": ".webm", "gif": ".gif", "frames": ""}
FORMATS = tuple(SUFFIXES)
"""mp4: H.264; webm: VP9; gif: 256 colours per video; frames: a folder of PNG files."""

DEFAULT_CRF = {"mp4": 18, "webm": 24}
"""Constant rate factor where none is given: hardly told from the frames themselves. Smaller is better and larger."""

_CRF_RANGES = {"mp4": (1, 51), "webm": (0, 63)}  # 0 of H.264 is lossless, in a profile that browsers do not play
_ENCODERS = {"mp4": ("libx264",), "webm": ("libvpx-vp9",), "gif": ("libx264rgb", "gif")}
FASTEST, _FASTEST_GIF = 240, 50
# Frames are sRGB; without a word of the matrix, players guess it from the height of the video.
_COLOURS = (
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "iec61966-2-1", "-color_range", "tv"),
)
_ENCODING = {
    "mp4": (*_COLOURS, "-c:v", "libx264", "-movflags", "+faststart+use_metadata_tags"),
    "webm": (*_COLOURS, "-c:v", "libvpx-vp9", "-b:v", "0", "-row-mt", "1", "-cpu-used", "2"),
}


_FRAMES_FORMAT = ("PNG",)  # whatever else a file of that name may hold
_LOSSLESS = ("-c:v", "libx264rgb", "-preset", "ultrafast", "-qp", "0")


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


def choose_video_format(out: Path | None, format_name: str | None) -> str:
    """The format of the videos of a run: as named, else as the suffix of the output says, else mp4.

    Args:
        out: `--out`: a file, a folder, or None.
        format_name: `--format`, None where it was not given.

    Raises:
        BadInput: if there is no such format, or name and suffix contradict each other.
    """
    if format_name is not None and format_name not in FORMATS:
        raise BadInput(f"--format {format_name}: {choices(format_name, FORMATS)}")
    suffix = "" if out is None or is_folder(out) else out.suffix.lower()
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
    return renamed(out, suffix)


def require_encodable(format: str, *, fps: float, crf: int | None) -> None:
    """Makes sure, before any work is done, that a video of these settings can be encoded.

    Args:
        format: one of `FORMATS`.
        fps: frames per second.
        crf: `--crf`, None where it was not given.

    Raises:
        BadInput: if ffmpeg is missing or lacks the encoder, or a setting does not suit the format.
    """
    if not (math.isfinite(fps) and 0 < fps <= FASTEST):
        raise BadInput(f"--fps {fps:g}: expected more than 0 and at most {FASTEST}")
    if format == "gif" and fps > _FASTEST_GIF:
        raise BadInput(f"--fps {fps:g}: players show a gif with at most {_FASTEST_GIF} frames per second")
    if crf is not None:
        if format not in _CRF_RANGES:
            raise BadInput(f"--crf is for mp4 and webm: leave it out with --format {format}")
        low, high = _CRF_RANGES[format]
        if not low <= crf <= high:
            raise BadInput(f"--crf {crf}: expected {low} (best) to {high} (smallest) for {format}")
    if format in _ENCODERS:
        ffmpeg.require_encoders(_ENCODERS[format])


def write_video(
    frames: Iterable[np.ndarray],
    path: Path,
    *,
    fps: float,
    crf: int | None = None,
    format: str = "mp4",
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
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
        overwrite: whether a file that this process has not written may be replaced.

    Returns:
        how many frames were written.

    Raises:
        BadInput: if ffmpeg is missing.
        CannotWrite: if it cannot be written: no space, no permission, ffmpeg died.
        ValueError: if there are no frames, or they are not uint8 `[H, W, 3]` of one size.
    """
    checked = _checked(frames)
    if format == "frames" and os.path.lexists(path):
        raise CannotWrite(f"cannot write {path}: it exists, and folders are not overwritten: use another --out")
    try:
        with part_of(path, folder=format == "frames") as part:
            if format == "frames":
                count = _write_folder(checked, part, provenance)
            elif format == "gif":
                count = _write_gif(checked, path, part, fps, provenance)
            else:
                count = _write_encoded(checked, path, part, fps, crf, format, provenance)
            place(part, path, overwrite=overwrite)
    except OSError as error:
        raise cannot_write(path, error) from error
    return count


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
    part: Path,
    fps: float,
    crf: int | None,
    format: str,
    provenance: Mapping[str, Any] | None,
) -> int:
    # A file, since tags may be longer than a command line.
    with part_of(path, ".tags") as tags:
        tags.write_text(ffmpeg.metadata_text(_tags(provenance)), encoding="utf-8", newline="\n")
        arguments = [*ffmpeg.source(tags, "ffmetadata"), "-map", "0:v", "-map_metadata", "1"]
        arguments += ["-crf", str(DEFAULT_CRF[format] if crf is None else crf), *_ENCODING[format]]
        arguments += ffmpeg.target(part, format)
        return _encode(frames, fps, arguments, path, even=format == "mp4")


def _write_gif(
    frames: Iterator[np.ndarray], path: Path, part: Path, fps: float, provenance: Mapping[str, Any] | None
) -> int:
    """Two passes over a lossless file beside the output: one palette for the whole video, without holding it."""
    with part_of(path, ".lossless") as lossless:
        count = _encode(frames, fps, [*_LOSSLESS, *ffmpeg.target(lossless, "matroska")], path, even=False)
        twice = 2 * ffmpeg.source(lossless, "matroska")
        palette = "[0:v]palettegen[palette];[1:v][palette]paletteuse"
        done = ffmpeg.run(["-loglevel", "error", "-y", *twice, "-lavfi", palette, *ffmpeg.target(part, "gif")])
        if done.returncode:
            raise ffmpeg.failure(path, done.returncode, done.stderr)
        if provenance is not None:
            with open(part, "r+b") as file:
                append_comment(file, outputs.GIF_COMMENT_PREFIX + json.dumps(provenance, allow_nan=False).encode())
    return count


def _write_folder(frames: Iterator[np.ndarray], part: Path, provenance: Mapping[str, Any] | None) -> int:
    from PIL import Image

    count = 0
    for count, frame in enumerate(frames, 1):
        with open(part / frame_name(count), "xb") as file:
            pictures.save_picture(Image.fromarray(frame), file, pictures.FORMATS["png"], provenance)
    return count


def frame_name(number: int) -> str:
    """File name of a frame in a folder, counted from 1."""
    return f"frame-{number:04d}.png"


def _encode(frames: Iterator[np.ndarray], fps: float, arguments: Sequence[str], output: Path, *, even: bool) -> int:
    """Feeds the frames to an ffmpeg, and returns how many they were.

    Args:
        frames: at least one.
        fps: frames per second.
        arguments: what ffmpeg does with them.
        output: the file that the user knows, for messages.
        even: repeat the last row or column where their number is odd.
    """
    import numpy as np

    first = next(frames)
    rows, columns = (side % 2 if even else 0 for side in first.shape[:2])
    size = f"{first.shape[1] + columns}x{first.shape[0] + rows}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", size, "-framerate", str(fps), "-i", "pipe:0"]
    count = 0
    with ffmpeg.FrameSink([*raw, *arguments], output) as sink:
        for frame in chain((first,), frames):
            if rows or columns:
                frame = np.pad(frame, ((0, rows), (0, columns), (0, 0)), mode="edge")
            sink.write(np.ascontiguousarray(frame).data)
            count += 1
    return count


def _tags(provenance: Mapping[str, Any] | None) -> dict[str, str]:
    if provenance is None:
        return {}
    # Pure ASCII passes every container and every terminal unharmed; the prompt stands beside it for people.
    tags = {outputs.PROVENANCE_KEY: json.dumps(provenance, allow_nan=False)}
    if prompt := provenance.get("prompt"):
        readable = str(prompt).replace("\0", " ").encode("utf-8", "replace").decode()
        readable += " " if readable.endswith("\\") else ""
        tags |= {"title": readable, "comment": readable}
    return tags


_DURATION = re.compile(r"^  Duration: (\d+):(\d\d):(\d\d\.\d+)", re.MULTILINE)
_STREAM = re.compile(r"^  Stream #0:\d+.*?: Video: (\w+).*?, (\d+)x(\d+)\b.*?, ([\d.]+) fps", re.MULTILINE)
_FRAMES = re.compile(r"^frame=(\d+)$", re.MULTILINE)


def probe_video(path: Path) -> VideoFacts:
    """Decodes a video file from end to end, and says what is in it; of a folder of frames, counts them.

    Raises:
        BadInput: if there is no such file, it is no video, or it is damaged; or ffmpeg is missing.
    """
    if path.is_dir():
        return _probe_folder(path)
    if not path.is_file():
        raise BadInput(f"cannot read {path}: no such file")
    arguments = [*ffmpeg.source(path), "-map", "0:v:0", "-fps_mode", "passthrough", "-f", "null", "-"]
    done = ffmpeg.run(["-xerror", "-nostats", "-progress", "pipe:1", *arguments])
    log = done.stderr.decode(errors="replace")
    about_input = log.partition("\nOutput #")[0]
    stream, duration, counted = (
        _STREAM.search(about_input),
        _DURATION.search(about_input),
        _FRAMES.findall(done.stdout.decode()),
    )
    if ffmpeg.UNKNOWN_FORMAT in log:
        raise BadInput(f"{path} is not a video: give an mp4, webm or gif file")
    if stream is None or duration is None:
        raise BadInput(f"{path} is not a video: {ffmpeg.last_line(done.stderr) or 'ffmpeg cannot read it'}")
    if done.returncode or not counted:
        raise BadInput(f"{path} is not a whole video: it is damaged or cut off")
    codec, width, height, fps = stream.groups()
    if int(width) * int(height) > pictures.MOST_PIXELS:
        raise BadInput(f"{path} has frames of {width}x{height} pixels, more than 16384x16384: scale it down first")
    hours, minutes, seconds = duration.groups()
    frames, length = int(counted[-1]), int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    # A gif has a delay per frame, in hundredths of a second: only the mean is its rate.
    rate = round(frames / length, 2) if codec == "gif" and length else float(fps)
    return VideoFacts(int(width), int(height), frames, rate, length, codec)


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video file, or of a folder of frames, one by one.

    Yields:
        uint8 `[H, W, 3]`, RGB.

    Raises:
        BadInput: as `probe_video`.
    """
    import numpy as np

    facts = probe_video(path)
    if path.is_dir():
        for number in range(1, facts.frames + 1):
            frame = pictures.read_picture(path / frame_name(number), _FRAMES_FORMAT)
            if frame.size != (facts.width, facts.height):
                raise BadInput(
                    f"{path / frame_name(number)} is {frame.width}x{frame.height}, and {frame_name(1)} "
                    f"{facts.width}x{facts.height}: these are no frames of one video"
                )
            yield np.asarray(frame)
        return
    for frame in ffmpeg.read_raw(path, facts.height * facts.width * 3):
        yield np.frombuffer(frame, np.uint8).reshape(facts.height, facts.width, 3)


def _probe_folder(path: Path) -> VideoFacts:
    count = 0
    while (path / frame_name(count + 1)).is_file():
        count += 1
    if not count:
        raise BadInput(f"{path} is no folder of frames: there is no {frame_name(1)} in it")
    width, height = pictures.picture_size(path / frame_name(1), _FRAMES_FORMAT)
    return VideoFacts(width, height, count, None, None, "png")
