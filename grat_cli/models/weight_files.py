"""Files of weights in a model's folder: which of them are read, and what they are known by afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grat_cli.errors import ModelUnavailable, printable
from grat_cli.files.fingerprint import Fingerprint, fingerprint
from grat_cli.files.json_objects import read_json
from grat_cli.files.weight_headers import is_pointer, read_header
from grat_cli.models.single_file import pickle_refusal

# As diffusers and transformers name them: STEM[.VARIANT][-00001-of-00002].safetensors, or the variant after the shard.
_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(\.(?P<variant>[A-Za-z0-9_]{1,32}))?(?P<shard>-\d+-of-\d+)?"
    r"(\.(?P<late>[A-Za-z0-9_]{1,32}))?\.(?P<suffix>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<of>[A-Za-z0-9_]{1,32}))?\.json)?"
)
_VARIANTS = ("fp16", "bf16")  # preferred in this order
_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class WeightFile:
    """A file that weights were read from.

    Attributes:
        part: of the pipeline.
        name: of the file alone.
        fingerprint: what it is known by.
        types: bytes of its tensors by type, such as `BF16` or `Q4_K`; empty for a pickle.
    """

    part: str
    name: str
    fingerprint: Fingerprint
    types: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"part": self.part, "name": self.name, **asdict(self.fingerprint), "types": self.types}


@dataclass(frozen=True)
class Stored:
    """In which of several forms a folder's weights are read.

    Attributes:
        variant: as `from_pretrained` takes it; None for the plain files.
        is_pickle: whether they are pickles.
    """

    variant: str | None
    is_pickle: bool


def variant_of(folder: Path) -> Stored:
    """The plain files where there are any, else those of one variant; pickles where there is nothing else."""
    return _stored([path.name for path in folder.iterdir()])


def names_read(names: Iterable[str]) -> list[str]:
    """Which of the names of files in a part's folder are those of weights that would be read; none of pickles."""
    names = sorted(names)
    stored = _stored(names)
    return [] if stored.is_pickle else [match.string for match in _read(names, stored) if not match["index"]]


def _stored(names: Iterable[str]) -> Stored:
    for is_pickle, suffix in enumerate(_SUFFIXES):
        variants = {_variant(match) for match in _matches(names) if match["suffix"] == suffix[1:]}
        if None in variants:
            return Stored(None, bool(is_pickle))
        if variants:
            known = [variant for variant in _VARIANTS if variant in variants]
            return Stored(known[0] if known else min(filter(None, variants)), bool(is_pickle))
    return Stored(None, False)


def _matches(names: Iterable[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := _NAME.fullmatch(name))]


def _read(names: Iterable[str], stored: Stored) -> list[re.Match[str]]:
    """Files of weights, and their index where there is one, that are read in a form."""
    suffix = "bin" if stored.is_pickle else "safetensors"
    return [match for match in _matches(names) if (_variant(match), match["suffix"]) == (stored.variant, suffix)]


def _variant(match: re.Match[str]) -> str | None:
    return match["variant"] or match["late"] or match["of"]


def files_of_part(folder: Path) -> tuple[WeightFile, ...]:
    """Those that the weights of a part are read from.

    Raises:
        OSError, ValueError: if one cannot be read.
    """
    read = _read([path.name for path in folder.iterdir()], variant_of(folder))
    names = {match.string for match in read if not match["index"]}
    for index in (match.string for match in read if match["index"]):
        names = set(read_json(folder / index)["weight_map"].values())
    return tuple(known_file(folder / name, folder.name) for name in sorted(names))


def known_file(path: Path, part: str) -> WeightFile:
    """A file and what it is known by; large ones are not read once more for it.

    Raises:
        OSError: if it cannot be read.
    """
    try:
        types = read_header(path).types
    except ValueError:  # a pickle
        types = {}
    return WeightFile(part, path.name, fingerprint(path), types)


def require_fetched(folder: Path, what: str) -> None:
    """Makes sure that the files of a part are there, and no pointers of Git LFS in their place.

    Args:
        folder: of the part.
        what: it is, for messages.

    Raises:
        ModelUnavailable: if one is such a pointer.
        OSError: if they cannot be read.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_pointer(path):
            raise ModelUnavailable(
                f"{what} is not there: {printable(path.name)} is a pointer of Git LFS\n"
                "run `git lfs pull` in the model's folder"
            )


def require_no_pickle(folder: Path, what: str, *, allow_pickle: bool) -> None:
    """Raises ModelUnavailable if a part's weights are pickles and may not be, with what to do."""
    if variant_of(folder).is_pickle and not allow_pickle:
        raise pickle_refusal(f"{what}, a .bin file,")
