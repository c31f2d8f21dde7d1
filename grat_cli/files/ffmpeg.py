"""The ffmpeg program that comes with imageio-ffmpeg: where it is, running it, and the tags it writes into files."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from grat_cli.errors import BadInput, CannotWrite, printable

_ESCAPED = re.compile(r"([=;#\\\n\r])")
_HEADER = ";FFMETADATA1"
_LINES_KEPT = 50
# Of videos that people give: none of these demuxers opens a second file, as those of playlists and sequences do.
_VIDEO_FORMATS = "mov,matroska,gif"
UNKNOWN_FORMAT = "Format not on whitelist"
_PATIENCE_S = 10
_SAYS_NOTHING = ("Conversion failed!", "frame=")
_REASONS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Permission denied",
    "No such file or directory",
    "Not a directory",
)
_MISSING = (
    "install it again (pip install --force-reinstall imageio-ffmpeg), set IMAGEIO_FFMPEG_EXE to another ffmpeg, "
    "or use --format frames"
)


def executable() -> str:
    """Where ffmpeg is.

    Raises:
        BadInput: if there is none.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise BadInput(f"ffmpeg is missing: {_MISSING}") from error


def require_encoders(names: Iterable[str]) -> None:
    """Makes sure, before any work is done, that videos can be encoded.

    Args:
        names: ffmpeg's names, such as `libx264`.

    Raises:
        BadInput: if ffmpeg is missing, does not run, or lacks an encoder.
    """
    listed = run(["-encoders"]).stdout.decode(errors="replace")
    known = set(re.findall(r"^ V\S* (\S+)", listed, re.MULTILINE))
    for name in names:
        if name not in known:
            raise BadInput(
                f"{executable()} cannot encode with {name}: set IMAGEIO_FFMPEG_EXE to an ffmpeg that can, "
                "or use --format frames"
            )


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Runs ffmpeg to its end, without input from the terminal; whether it succeeded is the caller's to judge.

    Raises:
        BadInput: if ffmpeg is missing or does not start.
    """
    try:
        return subprocess.run(
            _command(arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            restore_signals=False,  # as in FrameSink
        )
    except OSError as error:
        raise _does_not_start(error) from error


def read_raw(path: Path, size_bytes: int) -> Iterator[bytes]:
    """The frames of a video file, each once whatever its time stamp, as far as they can be decoded.

    Args:
        path: of the file.
        size_bytes: of a frame in RGB, 8 bits per channel.

    Raises:
        BadInput: if ffmpeg is missing or does not start.
    """
    # A gif's delays would otherwise drop or repeat frames.
    raw = ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    try:
        process = subprocess.Popen(
            _command(["-loglevel", "error", *source(path), *raw]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # as in FrameSink
        )
    except OSError as error:
        raise _does_not_start(error) from error
    with process:
        assert process.stdout is not None
        try:
            while len(frame := process.stdout.read(size_bytes)) == size_bytes:
                yield frame
        finally:
            process.kill()


def source(path: Path, format: str | None = None) -> list[str]:
    """Arguments for reading a file, that file alone, whatever it is called and whatever is in it.

    Args:
        path: of the file; `file:` takes every character of it as it is.
        format: ffmpeg's name of what is in it, for files of our own; None for a video that was given.
    """
    kind = ["-format_whitelist", _VIDEO_FORMATS] if format is None else ["-f", format]
    return ["-protocol_whitelist", "file", *kind, "-i", f"file:{path}"]


def target(path: Path, format: str) -> list[str]:
    """Arguments for writing a file, whatever it is called; `format` is ffmpeg's name of what will be in it."""
    return ["-f", format, f"file:{path}"]


def _command(arguments: Sequence[str]) -> list[str]:
    """A command line of ffmpeg, which leaves the terminal alone."""
    return [executable(), "-hide_banner", "-nostdin", *arguments]


class FrameSink:
    """An ffmpeg that reads raw frames and writes a file.

    Leaving the `with` block normally waits until the file is complete; leaving it by an exception ends ffmpeg at once.

    Args:
        arguments: what the first input, the frames at `-i pipe:0`, is like; other inputs of `source`; a `target`.
        output: the file that the user knows, for messages.

    Raises:
        BadInput: if ffmpeg is missing or does not start.
        CannotWrite: if ffmpeg ends early or says that it failed; with its own last line.
    """

    def __init__(self, arguments: Sequence[str], output: Path) -> None:
        self._output = output
        try:
            self._process = subprocess.Popen(
                _command(["-nostats", "-loglevel", "error", "-y", "-protocol_whitelist", "pipe", *arguments]),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                # A file that grows over its limit is an error to report, not a signal to die from.
                restore_signals=False,
                # Ctrl-C is for this program, which ends ffmpeg.
                start_new_session=True,
            )
        except OSError as error:
            raise _does_not_start(error) from error
        # Read as it comes, or a talkative ffmpeg would wait for ever; a file would need room on a disk that may be full
        self._log: deque[bytes] = deque(maxlen=_LINES_KEPT)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            self._log.extend(lines)

    def write(self, frame: memoryview | bytes) -> None:
        """One frame, as raw bytes.

        Raises:
            CannotWrite: if ffmpeg has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frame)
        except OSError as error:
            raise self._failure() from error

    def __enter__(self) -> FrameSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._process.kill()
            self._close_input()
            self._process.wait()
            self._reader.join(_PATIENCE_S)

    def _finish(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError as error:
            raise self._failure() from error
        if self._process.wait():
            raise self._failure()

    def _failure(self) -> CannotWrite:
        """Why ffmpeg ended; it has closed its input, so it is about to end if it has not."""
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = 0
        self._reader.join(_PATIENCE_S)
        return failure(self._output, code, b"".join(self._log))

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what was buffered for a process that is gone
            self._process.stdin.close()


def failure(output: Path, code: int, log: bytes) -> CannotWrite:
    """The error for an ffmpeg that failed.

    Args:
        output: the file that the user knows.
        code: exit status, negative for the signal that ended it.
        log: what it wrote to stderr.
    """
    text = log.decode(errors="replace")
    for reason in _REASONS:
        if reason in text:
            return CannotWrite(f"cannot write {output}: {reason.lower()}")
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return CannotWrite(f"cannot write {output}: ffmpeg was ended by {names.get(-code, f'signal {-code}')}")
    return CannotWrite(f"cannot write {output}: ffmpeg failed: {last_line(log) or f'exit status {code}'}")


def last_line(log: bytes) -> str:
    """The last line of ffmpeg's log that says what is wrong, without the part of the program that says it."""
    lines = [re.sub(r"^(\[[^\]]*\] )+", "", line).strip() for line in log.decode(errors="replace").splitlines()]
    return printable(next((line for line in reversed(lines) if line and not line.startswith(_SAYS_NOTHING)), ""))


def metadata_text(tags: Mapping[str, str]) -> str:
    """Tags in the syntax of ffmpeg's metadata files; `tags_of` undoes it.

    Raises:
        ValueError: for text with NUL, or with a backslash at its end: ffmpeg's reader takes the newline after it for
            an escaped one, even where that backslash is itself escaped.
    """
    for key, value in tags.items():
        if "\0" in value or value.endswith("\\"):
            raise ValueError(f"ffmpeg's metadata files cannot hold this {key}: {value!r}")
    lines = [f"{escaped(key)}={escaped(value)}" for key, value in tags.items()]
    return "\n".join([_HEADER, *lines, ""])


def escaped(text: str) -> str:
    r"""Text with a backslash before `=`, `;`, `#`, `\` and line ends (ffmpeg-formats, section "Metadata")."""
    return _ESCAPED.sub(r"\\\1", text)


def tags_of(text: str) -> dict[str, str]:
    """The tags of the file as a whole in ffmpeg's metadata syntax: those before the first section."""
    tags: dict[str, str] = {}
    # A line ends at a newline with no backslash before it: characters and escaped characters, then the end.
    for match in re.finditer(r"((?:[^\\\n]|\\.)*)(?:\n|\Z)", text, re.DOTALL):
        line = match[1]
        if line.startswith("["):
            break
        if line.startswith((";", "#")):
            continue
        pair = re.fullmatch(r"((?:[^\\=]|\\.)*)=(.*)", line, re.DOTALL)
        if pair is not None:
            key, value = (re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in pair.groups())
            tags[key] = value
    return tags


def read_tags(path: Path) -> dict[str, str]:
    """The tags of a video file, keys in lower case, as far as ffmpeg can read it; none of a damaged one.

    Raises:
        BadInput: if ffmpeg is missing.
    """
    found = run(["-loglevel", "error", *source(path), "-f", "ffmetadata", "pipe:1"])
    return {key.lower(): value for key, value in tags_of(found.stdout.decode(errors="replace")).items()}


def _does_not_start(error: OSError) -> BadInput:
    return BadInput(f"{executable()} does not start ({(error.strerror or str(error)).lower()}): {_MISSING}")
