"""Text and bytes from files that someone else may have written: up to a length, and whatever is wrong is bad input."""

from __future__ import annotations

from pathlib import Path

from grat_cli.errors import BadInput


def read_bytes(path: Path, longest: int) -> bytes:
    """All that is in a file.

    Args:
        path: of the file.
        longest: bytes of what makes sense; a device that never ends is not read further.

    Raises:
        BadInput: if it cannot be read, or is longer.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(longest + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise unreadable(path, error) from error
    if len(content) > longest:
        raise BadInput(f"{path} is longer than {longest >> 20} MiB: such a file is not read")
    return content


def read_text(path: Path, longest: int) -> str:
    """The same as text in UTF-8, without a byte order mark.

    Raises:
        BadInput: as for `read_bytes`, or if it is no such text.
    """
    try:
        return read_bytes(path, longest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: save it as UTF-8") from error


def unreadable(path: Path, error: Exception) -> BadInput:
    """The error for a file that the system would not read."""
    return BadInput(f"cannot read {path}: {(getattr(error, 'strerror', None) or str(error)).lower()}")
