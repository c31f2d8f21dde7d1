"""The ffmpeg program that comes with imageio-ffmpeg: where it is, running it, and the tags it writes into files."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from grat_cli.errors import BadInput, CannotWrite

_ESCAPED = re.compile(r"([=;#\\\n])")
_HEADER = ";FFMETADATA1"
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


def require_encoder(encoder: str) -> None:
    """Makes sure, before any work is done, that videos can be encoded.

    Args:
        encoder: ffmpeg's name, such as `libx264`.

    Raises:
        BadInput: if ffmpeg is missing, does not run, or lacks the encoder.
    """
    found = run(["-encoders"])
    if not re.search(rf"^ V\S* {re.escape(encoder)} ", found.stdout.decode(errors="replace"), re.MULTILINE):
        raise BadInput(
            f"{executable()} cannot encode with {encoder}: set IMAGEIO_FFMPEG_EXE to an ffmpeg that can, "
            "or use --format frames"
        )


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Runs ffmpeg to its end, without input from the terminal; whether it succeeded is the caller's to judge.

    Raises:
        BadInput: if ffmpeg is missing or does not start.
    """
    try:
        return subprocess.run(
            [executable(), "-hide_banner", "-nostdin", *arguments], stdin=subprocess.DEVNULL, capture_output=True
        )
    except OSError as error:
        raise _does_not_start(error) from error


def url(path: Path) -> str:
    """A path as ffmpeg takes it, whatever characters it has: neither an option nor another protocol."""
    return f"file:{path}"


class FrameSink:
    """An ffmpeg that reads raw frames and writes a file.

    Leaving the `with` block normally waits until the file is complete; leaving it by an exception ends ffmpeg at once.

    Args:
        arguments: everything after `ffmpeg`; the frames come as `-i pipe:0`.
        output: the file that the user knows, for messages.

    Raises:
        BadInput: if ffmpeg is missing or does not start.
        CannotWrite: if ffmpeg ends early or says that it failed; with its own last line.
    """

    def __init__(self, arguments: Sequence[str], output: Path) -> None:
        self._output = output
        # A file rather than a pipe: nobody has to read it while frames are written.
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _finish
        try:
            self._process = subprocess.Popen(
                [executable(), "-hide_banner", "-nostats", "-loglevel", "error", "-y", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                # A file too large for its limit is an error to report, not a signal to die from.
                restore_signals=False,
                # Ctrl-C is for this program, which ends ffmpeg.
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise _does_not_start(error) from error
        except BaseException:
            self._log.close()
            raise

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
            self._log.close()

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
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = 0
        self._log.seek(0)
        return failure(self._output, code, self._log.read())

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
    for reason in ("No space left on device", "File too large", "Permission denied", "Disk quota exceeded"):
        if reason in text:
            return CannotWrite(f"cannot write {output}: {reason.lower()}")
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return CannotWrite(f"cannot write {output}: ffmpeg was ended by {names.get(-code, f'signal {-code}')}")
    return CannotWrite(f"cannot write {output}: ffmpeg failed: {last_line(log) or f'exit status {code}'}")


def last_line(log: bytes) -> str:
    """The last line of ffmpeg's log that says something, without the part of the program that says it."""
    lines = [re.sub(r"^(\[[^\]]*\] )+", "", line).strip() for line in log.decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and line != "Conversion failed!"), "")


def metadata_text(tags: Mapping[str, str]) -> str:
    """Tags in the syntax of ffmpeg's metadata files; any text without NUL comes back from `tags_of`."""
    lines = [f"{escaped(key)}={escaped(value)}" for key, value in tags.items()]
    return "\n".join([_HEADER, *lines, ""])


def escaped(text: str) -> str:
    r"""Text with a backslash before `=`, `;`, `#`, `\` and newlines (ffmpeg-formats, section 9, "Metadata")."""
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
    found = run(["-loglevel", "error", "-i", url(path), "-f", "ffmetadata", "-"])
    return {key.lower(): value for key, value in tags_of(found.stdout.decode(errors="replace")).items()}


def _does_not_start(error: OSError) -> BadInput:
    return BadInput(f"{executable()} does not start ({(error.strerror or str(error)).lower()}): {_MISSING}")
