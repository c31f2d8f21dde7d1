"""Files that are written whole or not at all: under another name beside the output, which then takes its place."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from grat_cli.errors import CannotWrite

_LONGEST_BEGINNING_BYTES = 200  # of the 255 that file systems take


def part_path(path: Path, suffix: str = ".part") -> Path:
    """Where an output is while it is being written: beside it, hidden, with a name of this process."""
    return path.with_name(f"{_beginning(path)}{os.getpid()}{suffix}")


def _beginning(path: Path) -> str:
    """How the names of an output's parts begin."""
    kept = path.name.encode(errors="surrogateescape")[:_LONGEST_BEGINNING_BYTES]
    return f".{kept.decode(errors='ignore')}."


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], *, durable: bool = False) -> None:
    """Writes a file: afterwards it has all of the new content, or it is as it was before.

    Args:
        path: the file.
        write: gets the open file and writes the content.
        durable: also waits until the content is on the disk, so that it outlives a crash of the machine.

    Raises:
        CannotWrite: if it cannot be written.
    """
    part = part_path(path)
    try:
        with open(part, "xb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        discard(part)


def discard(part: Path) -> None:
    """Removes what was begun, if there is anything; an error while it was written is not hidden by one from here."""
    with contextlib.suppress(OSError):
        part.unlink()


def discard_leftovers(path: Path) -> None:
    """Removes what killed processes have left beside an output that they were writing."""
    beginning = _beginning(path)
    for leftover in path.parent.glob(glob.escape(beginning) + "*"):
        process = re.fullmatch(r"(\d+)\.[a-z]+", leftover.name.removeprefix(beginning))
        if process is None or _is_running(int(process[1])):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            discard(leftover)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # there, signal 0 would end it; and parts of killed processes stay
        return True
    try:
        os.kill(process, 0)
    except PermissionError:  # it is another user's
        return True
    except OSError:
        return False
    return True


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The error for a file that the system would not write."""
    return CannotWrite(f"cannot write {path}: {(error.strerror or str(error)).lower()}")


def _sync_folder(folder: Path) -> None:
    """Puts a renaming on the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
