"""Paths as people type them: to files that there may be, or to folders that there may not be yet."""

from __future__ import annotations

import os
import re
from pathlib import Path

from grat_cli.errors import BadInput

LONGEST_NAME_BYTES = 255
"""Of a file, on the file systems of Linux, macOS and Windows."""

_LONGEST_PATH_BYTES = 4095  # Linux's PATH_MAX, without its NUL
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


class TypedPath(type(Path())):  # pyright: ignore[reportUntypedBaseClass] - of the system
    """A path that remembers how it was typed; paths that are made of it do not.

    Attributes:
        ends_with_slash: so that a folder is meant, whether or not there is one.
    """

    ends_with_slash = False


def is_address(text: str) -> bool:
    """Whether a text is an address, such as https://... or s3://..., and no path."""
    return _ADDRESS.match(text) is not None


def typed_path(text: str, option: str) -> Path:
    """A path as it was typed, so that `is_folder` knows one that is meant.

    Args:
        text: as typed.
        option: that it was typed for.

    Raises:
        BadInput: if it is an address on the web, or no file can have it for a name.
    """
    if is_address(text):
        raise BadInput(f"{option} {text}: expected a file of this machine, not an address: download it first")
    refuse_impossible(text, option)
    path = TypedPath(text)
    path.ends_with_slash = text.endswith(_SEPARATORS)
    return path


def refuse_impossible(text: str, option: str) -> None:
    """Raises BadInput for what no file can have for a path."""
    if not text:
        raise BadInput(f"{option} is empty: give a path, or leave it out")
    if "\0" in text:
        raise BadInput(f"{option} {text}: no path holds a NUL")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        if error.encoding == "utf-8":
            raise BadInput(f"{option} {text}: it holds half a character: type it anew") from error
        raise BadInput(
            f"{option} {text}: names of files are {error.encoding} here: set LC_ALL=C.UTF-8, or use another"
        ) from error
    names = re.split(rb"[/\\]" if os.altsep else rb"/", encoded)
    for what, length, most in (
        ("name", max(map(len, names)), LONGEST_NAME_BYTES),
        ("path", len(encoded), _LONGEST_PATH_BYTES),
    ):
        if length > most:
            raise BadInput(f"{option} {text[:40]}...: a {what} of {length} bytes is too long: use at most {most}")


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, or was typed as one."""
    return path.is_dir() or means_folder(path)


def means_folder(path: Path) -> bool:
    """Whether a path was typed as a folder."""
    return isinstance(path, TypedPath) and path.ends_with_slash


def renamed(path: Path, suffix: str) -> Path:
    """The same path with another suffix, to advise; of a folder that has no name of its own, a file in it."""
    return path.with_suffix(suffix) if path.name else path / f"NAME{suffix}"


def expanded(name: str | Path) -> Path:
    """A path with the home folder in place of `~`; of nobody's that is known here, as it stands."""
    return Path(os.path.expanduser(name))


def absolute(name: str | Path) -> Path:
    """A path from the root on, by the names that were typed: what a link leads to may have another, or no suffix, as
    in the cache of the Hugging Face hub."""
    return Path(os.path.abspath(expanded(name)))
