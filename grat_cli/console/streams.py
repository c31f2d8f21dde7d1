"""stdout and stderr as they may be: closed, full, without a reader, or of an encoding that lacks characters.

An output that took hours is not lost because its name cannot be printed. While `steady_streams` lasts, whatever prints
(this program, its libraries, tracebacks) writes to streams that take any text and never fail; what did is told at the
end.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# In ASCII, where a terminal has no such character.
_PLAIN = {
    "±": "+/-",
    "×": "x",
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "≥": ">=",
    "≤": "<=",
}
_HANDLER = "grat.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_PLAIN.get(one, one.encode("unicode_escape").decode()) for one in found), error.end


codecs.register_error(_HANDLER, _plain)


def in_encoding(text: str, encoding: str | None) -> str:
    """Text with what an encoding has no character for written in ASCII; None stands for one that has all."""
    if encoding is None or text.isascii():
        return text
    try:
        return text.encode(encoding, _HANDLER).decode(encoding)
    except LookupError:  # no such encoding
        return text.encode("ascii", _HANDLER).decode()


class SteadyStream:
    """A text stream that takes any text and does not fail: after its first failure it takes everything and drops it.

    Attributes:
        failure: what it was, None as long as all went well.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Wraps a stream; None, as Python has it where a program is started with a closed one, drops everything."""
        self._stream = stream
        self.failure: OSError | ValueError | None = None

    def __getattr__(self, name: str) -> Any:
        """Whatever else libraries ask of a stream: its encoding, descriptor, buffer."""
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        """Of the stream; UTF-8 of one in memory."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a person reads it."""
        try:
            return self._stream is not None and self.failure is None and self._stream.isatty()
        except ValueError:  # closed meanwhile
            return False

    def write(self, text: str) -> int:
        """Writes, in ASCII what the encoding lacks."""
        if self._stream is not None and self.failure is None:
            try:
                self._stream.write(in_encoding(text, getattr(self._stream, "encoding", None)))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def write_name(self, name: str) -> None:
        """Writes the name of a file as it is, byte by byte: a script opens it."""
        binary = getattr(self._stream, "buffer", None)
        if binary is None:
            self.write(name)
        elif self.failure is None:
            self.flush()
            try:
                binary.write(os.fsencode(name))
            except (OSError, ValueError) as error:
                self._give_up(error)

    def flush(self) -> None:
        """Hands over what was written."""
        if self._stream is not None and self.failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: OSError | ValueError) -> None:
        self.failure = error
        # What waits in its buffer would fail once more when Python ends, and change the exit code.
        with suppress(OSError, ValueError, AttributeError):
            descriptor = cast(TextIO, self._stream).fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)

    @property
    def reader_left(self) -> bool:
        """Whether it failed because whoever read it had enough, as `head` has."""
        return isinstance(self.failure, BrokenPipeError) or getattr(self.failure, "errno", None) == errno.EPIPE

    @property
    def obstacle(self) -> str | None:
        """Why not all could be written, in words; None where it could, or nobody wanted more."""
        if self.failure is None or self.reader_left:
            return None
        return (getattr(self.failure, "strerror", None) or str(self.failure)).lower()


@contextmanager
def steady_streams() -> Iterator[SteadyStream]:
    """While it lasts, stdout and stderr are steady; yields stdout, which says whether it failed."""
    before = sys.stdout, sys.stderr
    out, error = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, error)
    try:
        yield out
        out.flush()
        error.flush()
    finally:
        sys.stdout, sys.stderr = before


def open_closed_descriptors() -> None:
    """Takes the places of stdin, stdout and stderr where they are closed.

    The next file that is opened would get them, and what a library in C writes to stderr would end up in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one, as those below are taken
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
