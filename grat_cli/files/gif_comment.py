"""A comment in a GIF file (GIF89a, section 24): ffmpeg writes none."""

from __future__ import annotations

import os
from typing import IO

_TRAILER = b"\x3b"
_EXTENSION, _COMMENT, _IMAGE = 0x21, 0xFE, 0x2C


def append_comment(file: IO[bytes], comment: bytes) -> None:
    """Puts a comment after the last picture.

    Args:
        file: a whole GIF, open for reading and writing.
        comment: at least one byte.

    Raises:
        ValueError: if the file does not end as a GIF does.
    """
    file.seek(-1, os.SEEK_END)
    if file.read(1) != _TRAILER:
        raise ValueError("not a whole GIF: its trailer is missing")
    file.seek(-1, os.SEEK_END)
    file.write(bytes((_EXTENSION, _COMMENT)))
    for start in range(0, len(comment), 255):
        block = comment[start : start + 255]
        file.write(bytes((len(block),)) + block)
    file.write(b"\0" + _TRAILER)


def read_comments(file: IO[bytes]) -> list[bytes]:
    """The comments of a GIF, as far as the file is whole; none of any other file."""
    comments: list[bytes] = []
    if file.read(6) not in (b"GIF87a", b"GIF89a"):
        return comments
    screen = file.read(7)
    if len(screen) < 7:
        return comments
    _skip_colours(file, screen[4])
    while kind := file.read(1):
        if kind[0] == _EXTENSION:
            label = file.read(1)
            blocks = _blocks(file)
            if label == bytes((_COMMENT,)):
                comments.append(blocks)
        elif kind[0] == _IMAGE:
            descriptor = file.read(9)
            if len(descriptor) < 9:
                break
            _skip_colours(file, descriptor[8])
            file.read(1)  # bits per code
            _blocks(file)
        else:
            break
    return comments


def _skip_colours(file: IO[bytes], flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), os.SEEK_CUR)


def _blocks(file: IO[bytes]) -> bytes:
    """A run of blocks of at most 255 bytes, each with its length before it, up to an empty one."""
    blocks = []
    while (length := file.read(1)) and length[0]:
        blocks.append(file.read(length[0]))
    return b"".join(blocks)
