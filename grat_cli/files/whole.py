"""Files that are written whole or not at all: under another name beside the output, which then takes its place.

Without leave to overwrite, what is whole takes a name that nobody has at that very moment, or it fails. What this
process has written itself, and nobody has changed since, is its own: that it may replace and remove. Parts have names
that nobody can foresee, are never opened through a link, and are locked while they are written, which tells them from
those that killed processes have left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from grat_cli.errors import CannotWrite

try:
    import fcntl
except ImportError:  # on Windows: nothing is locked there, and parts of killed processes stay
    fcntl = None

_LONGEST_BEGINNING_BYTES = 200  # of the 255 that file systems take
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_own: dict[str, tuple[int, ...]] = {}


def write_whole(
    path: Path, write: Callable[[IO[bytes]], Any], *, overwrite: bool = False, durable: bool = False
) -> None:
    """Writes a file: afterwards it has all of the new content, or it is as it was before.

    Args:
        path: the file.
        write: gets the open file and writes the content.
        overwrite: whether a file that is not this process's own may be replaced.
        durable: also waits until the content is on the disk, so that it outlives a crash of the machine.

    Raises:
        CannotWrite: if it cannot be written, or is there already.
    """
    try:
        with part_of(path) as part:
            with open(part, "r+b", opener=lambda name, flags: os.open(name, flags | _NO_LINK)) as file:
                write(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            place(part, path, overwrite=overwrite)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def part_of(path: Path, ending: str = ".part", *, folder: bool = False) -> Iterator[Path]:
    """A new, empty file or folder for an output until it is whole: beside it, hidden; gone afterwards if not placed.

    Raises:
        OSError: if it cannot be made.
    """
    part, lock = _new_part(path, ending, folder)
    try:
        yield part
    finally:
        discard(part)
        if lock is not None:
            os.close(lock)


def place(part: Path, path: Path, *, overwrite: bool = False) -> None:
    """Gives what is whole its name; a folder takes the place of nothing.

    Raises:
        OSError: if it cannot be moved there; FileExistsError if something is there that may not be replaced.
    """
    if part.is_dir():
        _place_folder(part, path)
        return
    if overwrite or is_own(path):
        os.replace(part, path)
    else:
        _place_file(part, path)
    adopt(path)


def _place_folder(part: Path, path: Path) -> None:
    if os.name != "nt":  # elsewhere a folder takes the place of an empty one: only one process can make that
        os.mkdir(path)
    try:
        os.rename(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


def _place_file(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # some file systems have no links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_LINK, 0o666))
        try:
            os.replace(part, path)
        except OSError:
            discard(path)
            raise
    else:
        part.unlink()


def adopt(path: Path) -> None:
    """Takes a file as it is now for this process's own: that of a run which it goes on with."""
    found = _identity(path)
    if found is not None:
        _own[os.path.abspath(path)] = found


def is_own(path: Path) -> bool:
    """Whether this process has written or adopted a file, and nobody has changed or replaced it since."""
    found = _identity(path)
    return found is not None and _own.get(os.path.abspath(path)) == found


def remove(path: Path, *, overwrite: bool = False) -> None:
    """Removes a file, and what killed processes have left of it; one that is not this process's own only if told."""
    discard_leftovers(path)
    if overwrite or is_own(path):
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    # A number of a file that is gone may be given to another one, but not with the same time.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def claimed(paths: Sequence[Path]) -> Iterator[None]:
    """Keeps other processes from making the same outputs meanwhile, where the system has locks.

    Raises:
        CannotWrite: if another process makes one of them.
    """
    with contextlib.ExitStack() as claims:
        for path in dict.fromkeys(paths):
            claims.enter_context(_claimed(path))
        yield


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    digest = sha256(os.fsencode(path.name)).hexdigest()[:16]
    claim = path.with_name(f".grat-claim-{digest}")
    lock = None
    while fcntl is not None and lock is None:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_RDWR | _NO_LINK, 0o666))
            lock = _lock(claim)
        except BlockingIOError:
            raise CannotWrite(f"another grat is making {path}: wait for it, or use another --out") from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # no locks on that file system
                discard(claim)
                break
            raise cannot_write(path, error) from error
    try:
        yield
    finally:
        if lock is not None:
            if not os.fstat(lock).st_size:  # whoever holds it may remove it
                discard(claim)
            os.close(lock)


def _new_part(path: Path, ending: str, folder: bool) -> tuple[Path, int | None]:
    """A part, and the descriptor that keeps it locked; None where there are no locks."""
    while True:
        part = path.with_name(f"{_beginning(path)}{secrets.token_hex(8)}{ending}")
        if folder:
            part.mkdir()
        else:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_LINK, 0o666))
        if fcntl is None:
            return part, None
        try:
            lock = _lock(part)
        except BlockingIOError:  # taken for a leftover, in the moment before it was locked
            continue
        except OSError:
            return part, None
        if lock is not None:
            return part, lock


def _lock(path: Path) -> int | None:
    """A descriptor that keeps a file or folder locked until it is closed; None if it is gone.

    Raises:
        BlockingIOError: if another process has locked it.
        OSError: if it cannot be locked, or is a link.
    """
    assert fcntl is not None
    try:
        lock = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NONBLOCK | _NO_LINK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.lstat(path)):
            return lock
    except FileNotFoundError:
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _beginning(path: Path) -> str:
    """How the names of an output's parts begin."""
    kept = os.fsencode(path.name)[:_LONGEST_BEGINNING_BYTES]
    return f".{kept.decode(sys.getfilesystemencoding(), 'ignore')}."


def discard(part: Path) -> None:
    """Removes what was begun, if there is anything; an error while it was written is not hidden by one from here."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            part.unlink()


def discard_leftovers(path: Path) -> None:
    """Removes what killed processes have left beside an output that they were writing: parts that nobody has locked."""
    if fcntl is None:
        return
    name = re.compile(re.escape(_beginning(path)) + r"[0-9a-f]{16}\.[a-z]+")
    for leftover in [found for found in path.parent.glob(".*") if name.fullmatch(found.name)]:
        with contextlib.suppress(OSError):
            lock = _lock(leftover)
            if lock is not None:
                discard(leftover)
                os.close(lock)


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The error for a file that the system would not write."""
    if isinstance(error, FileExistsError):
        return CannotWrite(f"cannot write {path}: it exists: use --overwrite, or another --out")
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
