"""Where the outputs of a batch go: folders of this machine, or what fsspec knows by an address, such as s3://bucket/name.

Either takes paths below the folder that `store_of` names, whole files alone, and replaces nothing that it may not.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from grat_cli.errors import BadInput, CannotWrite, first_line
from grat_cli.files import outputs, whole
from grat_cli.files.cache_folder import cache_folder
from grat_cli.files.places import is_address, typed_path

# Object stores: what is put there is there whole or not at all, and renaming copies.
_WHOLE_PUTS = ("s3", "s3a", "gs", "gcs", "abfs", "az", "oci", "oss", "tos", "memory")
_UNFINISHED = "unfinished"


class Store(Protocol):
    """Takes outputs.

    Attributes:
        has_claims: whether all who write to it can see one another's claims (`claims`).
    """

    has_claims: bool

    def shown(self, path: Path) -> str:
        """What is at a path, for people, scripts and errors."""
        ...

    def unfinished(self, folder: Path) -> Path:
        """The folder of this machine in which outputs are made that go to a folder of the store."""
        ...

    def look(self, folder: Path) -> None:
        """Finds out, at once, what `exists` is asked for most."""
        ...

    def exists(self, path: Path) -> bool:
        """Whether something is there."""
        ...

    def matching(self, folder: Path, pattern: str) -> list[Path]:
        """Files in a folder, by name."""
        ...

    def reports(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """What reports say; those that are not there or damaged are left out."""
        ...

    def holds(self, content: bytes, path: Path) -> bool:
        """Whether a file is there with this content."""
        ...

    def require_room(self, path: Path, *, overwrite: bool) -> None:
        """Makes the folder of an output. Raises BadInput if that, or the output, cannot be written."""
        ...

    def adopt(self, path: Path) -> None:
        """What is there may be replaced by this process."""
        ...

    def write(self, text: str, path: Path, *, overwrite: bool) -> None:
        """Writes a file. Raises CannotWrite if that fails, or something is there that may not be replaced."""
        ...

    def place(self, part: Path, path: Path, *, overwrite: bool) -> None:
        """Moves a file or folder of this machine there. Raises CannotWrite as `write`."""
        ...

    def remove(self, path: Path) -> None:
        """Removes what this process has written itself, or adopted."""
        ...


class LocalStore:
    """Folders of this machine, or that it shares with others; see `whole` for what may be replaced."""

    has_claims = True

    def shown(self, path: Path) -> str:
        return str(path)

    def unfinished(self, folder: Path) -> Path:
        return folder / _UNFINISHED

    def look(self, folder: Path) -> None:
        """Nothing: to ask costs little."""

    def exists(self, path: Path) -> bool:
        return path.exists()

    def matching(self, folder: Path, pattern: str) -> list[Path]:
        return list(folder.glob(pattern))

    def reports(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        for path in paths:
            with contextlib.suppress(BadInput):
                yield path, outputs.read_provenance(path)

    def holds(self, content: bytes, path: Path) -> bool:
        return path.is_file() and path.read_bytes() == content

    def require_room(self, path: Path, *, overwrite: bool) -> None:
        make_folder(path.parent)
        outputs.refuse_unwritable([path], overwrite=overwrite)

    def adopt(self, path: Path) -> None:
        whole.adopt(path)

    def write(self, text: str, path: Path, *, overwrite: bool) -> None:
        outputs.write_text(text, path, overwrite=overwrite)

    def place(self, part: Path, path: Path, *, overwrite: bool) -> None:
        try:
            whole.place(part, path, overwrite=overwrite)
        except OSError as error:
            raise whole.cannot_write(path, error) from error

    def remove(self, path: Path) -> None:
        whole.remove(path)


class RemoteStore:
    """What is below an address; outputs are made in the cache folder first.

    Another process gets the address alone, and knows nothing of what this one has seen and written.
    """

    has_claims = False

    def __init__(self, address: str) -> None:
        """Connects to nothing yet."""
        self._address = address
        self._own: set[Path] = set()
        self._seen: set[str] | None = None

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str]]:
        return RemoteStore, (self._address,)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """fsspec's file system, and the folder in it.

        Raises:
            BadInput: if there is none for such addresses.
        """
        return _opened(self._address)

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @property
    def folder(self) -> Path:
        """Of the address; what goes below it has paths below this one."""
        return Path(self._opened[1])

    def shown(self, path: Path) -> str:
        below = path.relative_to(self.folder).as_posix()
        return self._address.rstrip("/") + ("" if below == "." else f"/{below}")

    def unfinished(self, folder: Path) -> Path:
        digest = sha256(self.shown(folder).encode()).hexdigest()[:16]
        return cache_folder() / _UNFINISHED / digest

    def look(self, folder: Path) -> None:
        with self._read(folder):
            self._files.invalidate_cache()
            self._seen = set(self._files.find(folder.as_posix())) if self._files.exists(folder.as_posix()) else set()

    def exists(self, path: Path) -> bool:
        if self._seen is not None:
            return path.as_posix() in self._seen
        return self._is_there(path)

    def matching(self, folder: Path, pattern: str) -> list[Path]:
        if self._seen is None:
            self.look(folder)
        found = [Path(name) for name in self._seen or ()]
        return [path for path in found if path.parent == folder and path.match(pattern)]

    def reports(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        wanted = {path.as_posix(): path for path in paths if self._seen is None or self.exists(path)}
        if not wanted:
            return
        with self._read(*wanted.values()):
            # Together, since each may take a while.
            found = self._files.cat(list(wanted), on_error="omit")
        for name, content in found.items():
            with contextlib.suppress(BadInput):
                yield wanted[name], outputs.checked_report(content, wanted[name])

    def holds(self, content: bytes, path: Path) -> bool:
        with self._read(path):
            return self.exists(path) and self._files.cat_file(path.as_posix()) == content

    def require_room(self, path: Path, *, overwrite: bool) -> None:
        if self.exists(path) and not overwrite:
            raise BadInput(f"{self.shown(path)} exists: use --overwrite, or another --out")

    def adopt(self, path: Path) -> None:
        self._own.add(path)

    def write(self, text: str, path: Path, *, overwrite: bool) -> None:
        content = text.encode(errors="backslashreplace")
        self._put(path, overwrite, lambda target: self._files.pipe_file(target, content))

    def place(self, part: Path, path: Path, *, overwrite: bool) -> None:
        self._put(path, overwrite, lambda target: self._files.put_file(str(part), target))
        whole.discard(part)

    def remove(self, path: Path) -> None:
        if path in self._own and self._is_there(path):
            with self._written(path):
                self._files.rm_file(path.as_posix())

    def _put(self, path: Path, overwrite: bool, put: Any) -> None:
        """Puts a file there whole: object stores do that themselves, elsewhere it is moved there."""
        target = path.as_posix()
        with self._written(path):
            if not overwrite and path not in self._own and self._is_there(path):
                raise CannotWrite(f"cannot write {self.shown(path)}: it exists: use --overwrite, or another --out")
            if self._address.partition("://")[0] in _WHOLE_PUTS:
                put(target)
            else:
                part = path.with_name(f".{secrets.token_hex(8)}.part").as_posix()
                self._files.makedirs(path.parent.as_posix(), exist_ok=True)
                try:
                    put(part)
                    self._files.mv(part, target)
                except BaseException:
                    with contextlib.suppress(Exception):
                        self._files.rm_file(part)
                    raise
        self.adopt(path)
        if self._seen is not None:
            self._seen.add(target)

    def _is_there(self, path: Path) -> bool:
        with self._read(path):
            self._files.invalidate_cache()
            return bool(self._files.exists(path.as_posix()))

    @contextlib.contextmanager
    def _read(self, path: Path, *_: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system has its own
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"cannot read {self.shown(path)}: {first_line(error)}") from error

    @contextlib.contextmanager
    def _written(self, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, BadInput):
                raise
            raise CannotWrite(f"cannot write {self.shown(path)}: {first_line(error)}") from error


LOCAL = LocalStore()


def store_of(text: str, option: str) -> tuple[Store, Path]:
    """Where to write, and the folder there, as typed.

    Args:
        text: a folder of this machine, or an address that fsspec knows.
        option: that it was typed for.

    Raises:
        BadInput: if no folder can have such a name, or nothing is known of such addresses.
    """
    if not is_address(text):
        return LOCAL, typed_path(text, option)
    try:
        _, folder = _opened(text)
    except BadInput as error:
        raise BadInput(f"{option} {text}: {error}") from error
    if not folder.strip("/"):
        raise BadInput(f"{option} {text}: give a folder there too")
    if text.lower().startswith("file://"):
        return LOCAL, typed_path(folder, option)
    store = RemoteStore(text)
    return store, store.folder


def _opened(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    Raises:
        BadInput: if it knows none, or that needs a package.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = address.partition("://")[0]
    try:
        return url_to_fs(address)
    except ImportError as error:
        known = known_implementations.get(protocol, {}).get("class", "")
        package = known.partition(".")[0]
        advice = f"pip install {package}" if package not in ("", "fsspec") else first_line(error)
        raise BadInput(f"a package for {protocol}:// is missing: {advice}") from error
    except ValueError as error:
        raise BadInput(f"{first_line(error)}: use s3://, gs:// or a folder") from error
    except Exception as error:  # each file system has its own
        raise BadInput(first_line(error)) from error


def make_folder(folder: Path) -> None:
    """Raises BadInput if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder}: {(error.strerror or str(error)).lower()}") from error
