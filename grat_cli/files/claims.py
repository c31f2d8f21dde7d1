"""Which of several processes does what: claims in a folder that all of them see, on one machine or on many.

A claim on NAME is a folder `NAME.claim` with one empty file in it, whose name no claim has had before. Its owner
touches that file every few seconds; one that nobody has touched for long is of an owner that is dead or suspended.

Why there is never more than one owner, and no live one loses its claim to a race:

- The folder is made under another name, with its file in it, and then renamed. A folder can take the place of nothing
  or of an empty folder (rename(2)), so of all that try one succeeds, and no file is added to a folder in its place.
- A claim ends when that very file is removed, by its owner or by whoever has watched it lie untouched. Since names do
  not come back, one that is late with this finds nothing to remove, least of all the claim of a new owner; and having
  removed it gives no claim: for that everybody renames a folder, as before.
- An owner that was suspended and wakes finds its file gone, and has to look (`require`) before what it did counts.

Clocks of two machines are never compared: what counts is for how long a process has itself seen no change.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from grat_cli.errors import CannotWrite, GratError
from grat_cli.files.whole import cannot_write, discard_leftovers, part_of

ENDING = ".claim"
BEAT_S = 10.0
SILENT_S = 60.0
"""So long after its owner's last touch that others have seen, a claim is free."""

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # of a rename: something is there
_GONE = (errno.ENOENT, errno.ENOTDIR, getattr(errno, "ESTALE", errno.ENOENT))
_MOST_TRIES = 100


class ClaimLost(GratError):
    """Another process has taken over what this one had claimed, since it gave no sign of life."""


class Claim:
    """What one process has to itself while a `with` block lasts; a thread touches it meanwhile.

    A process may send it to one that works for it, which touches it too; it ends for both.
    """

    def __init__(self, file: Path, beat_s: float) -> None:
        self._file, self._beat_s = file, beat_s
        self._over, self._lost = threading.Event(), False
        threading.Thread(target=self._beat, name="grat-claim", daemon=True).start()

    def __reduce__(self) -> tuple[type[Claim], tuple[Path, float]]:
        return Claim, (self._file.absolute(), self._beat_s)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._file.unlink()
        _remove_if_empty(self._file.parent)

    @property
    def lost(self) -> bool:
        """Whether another process is known to have taken over; costs nothing."""
        return self._lost

    def is_held(self) -> bool:
        """Whether it is still this process's own; asks the file system, and on a server that.

        Raises:
            CannotWrite: if that cannot be found out.
        """
        try:
            self._touch()
        except OSError as error:
            raise cannot_write(self._file, error) from error
        return not self._lost

    def require(self) -> None:
        """Raises ClaimLost if it is not; CannotWrite as `is_held`."""
        if not self.is_held():
            raise ClaimLost(f"{self._file.parent.stem} was taken over by another process: this one gave no sign")

    def _touch(self) -> None:
        try:
            os.utime(self._file)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._lost = True

    def _beat(self) -> None:
        while not (self._over.wait(self._beat_s) or self._lost):
            with contextlib.suppress(OSError):  # of a server that may come back
                self._touch()


# What lies at the place of a claim: names in its folder, each with the time of its last change, or one empty name.
_Seen = tuple[tuple[str, int], ...]


@dataclass
class _Watch:
    """What was seen of a claim, since when it has been the same, and when it was looked at last."""

    seen: _Seen
    silent_s: float
    looked_s: float


class Claims:
    """The claims in a folder, as one process sees them."""

    def __init__(self, folder: Path, *, beat_s: float = BEAT_S, silent_s: float = SILENT_S) -> None:
        """Looks at nothing yet; the folder is made when it is needed.

        Args:
            folder: of the claims.
            beat_s: between two touches of a claim.
            silent_s: without a touch after which a claim is free; several times `beat_s`, and the same for everybody.
        """
        self._folder, self._beat_s, self._silent_s = folder, beat_s, silent_s
        self._watched: dict[str, _Watch] = {}

    def take(self, name: str) -> Claim | None:
        """A claim on something, for a `with` block; None while another process has it.

        Args:
            name: the same for all processes; part of a file's name.

        Raises:
            CannotWrite: if claims cannot be written here.
        """
        path = self._folder / f"{name}{ENDING}"
        try:
            if not _look(path) or self._is_dead(name, path):
                return self._placed(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        return None

    def clear(self, names: Iterable[str]) -> None:
        """Removes what claims there are on things that are done, whoever has left them."""
        for name in names:
            path = self._folder / f"{name}{ENDING}"
            with contextlib.suppress(OSError, CannotWrite):
                _remove(path, _look(path))

    def _placed(self, path: Path) -> Claim | None:
        token = secrets.token_hex(16)
        for left in reversed(range(_MOST_TRIES)):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                discard_leftovers(path)
                with part_of(path, folder=True) as part:
                    os.close(os.open(part / token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                    return Claim(path / token, self._beat_s) if _renamed(part, path, token) else None
            except (FileNotFoundError, FileExistsError):  # another process found the folder empty, and removed it
                if not left:
                    raise
        return None

    def _is_dead(self, name: str, path: Path) -> bool:
        """Whether nothing has changed for so long; what lies there is removed then."""
        seen, now = _look(path), time.monotonic()
        watch = self._watched.get(name)
        if watch is None or watch.seen != seen:
            self._watched[name] = _Watch(seen, 0.0, now)
            return not seen
        # Not more at once: where this process was itself suspended, the owner may have been too, and wakes as well.
        watch.silent_s += min(now - watch.looked_s, self._beat_s)
        watch.looked_s = now
        if watch.silent_s < self._silent_s:
            return False
        del self._watched[name]
        _remove(path, seen)
        return True


def _renamed(part: Path, path: Path, token: str) -> bool:
    _remove_if_empty(path)  # on Windows a folder takes the place of nothing
    try:
        os.rename(part, path)
    except OSError as error:
        # A server may answer so to a request that was sent twice, and had been done.
        if os.path.lexists(path / token):
            return True
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _look(path: Path) -> _Seen:
    """What lies there, through no link; nothing where there is nothing, or an empty folder."""
    try:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            return (("", found.st_mtime_ns),)
        return tuple(sorted((name, os.lstat(path / name).st_mtime_ns) for name in os.listdir(path)))
    except (FileNotFoundError, NotADirectoryError):  # or it changes just now: whoever comes next sees more
        return ()


def _remove(path: Path, seen: _Seen) -> None:
    """Removes what was seen, and nothing that came since.

    Raises:
        CannotWrite: if it cannot be removed, such as a folder with something in it, which no claim has.
    """
    for name, _ in seen:
        inside = path / name if name else path
        try:
            if name and stat.S_ISDIR(os.lstat(inside).st_mode):
                inside.rmdir()
            else:
                inside.unlink()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if not name and path.is_dir() and not path.is_symlink():  # another process was here, and has a claim now
                continue
            raise CannotWrite(f"{inside} is no claim of grat, and in the way of one: remove it") from error
    _remove_if_empty(path)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
