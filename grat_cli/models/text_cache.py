"""Embeddings of prompts that have been encoded before, so that text encoders need not be loaded for them again.

An entry is a file of tensors named after all that decides them: files of encoders and tokenizers, dtypes, device,
libraries, and the texts, which are not in it, but for what a note on one quotes. What it holds is checked before it is
used; a damaged entry is as good as none.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grat_cli.errors import BadInput, CannotWrite
from grat_cli.families import family_of
from grat_cli.families.base import ModelChoice, PictureKind
from grat_cli.files.cache_folder import cache_folder
from grat_cli.files.fingerprint import fingerprint
from grat_cli.files.places import expanded
from grat_cli.files.tensors import SUFFIX, read_tensors, write_tensors
from grat_cli.files.whole import cannot_write, discard_leftovers
from grat_cli.models.devices import cpu_threads, device_name
from grat_cli.models.environment import versions
from grat_cli.models.weights import Weights

if TYPE_CHECKING:
    import torch

SCHEMA = "grat.text/1"
MOST_BYTES = 1 << 30  # of all entries: a few hundred prompts of the largest encoders
_LARGEST_ENTRY = 1 << 28
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART = re.compile(r"\.([0-9a-f]{64}\.safetensors)\.[0-9a-f]{16}\.part")
_PACKAGES = ("grat", "torch", "diffusers", "transformers")
# What of `Weights` embeddings do not depend on; the folder of `base` is known by its files.
_NOT_OF_TEXT = ("base", "loras", "fuse_loras", "cast", "allow_pickle")

_Name = Annotated[str, Field(pattern=r"^(negative_)?(pooled_)?prompt_(embeds|attention_mask)(_mask)?(_2)?$")]
_Note = Annotated[str, Field(max_length=1000)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _StoredTensor(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["float32", "bfloat16", "float16", "int64", "int32", "bool", "uint8"]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 20)], ...], Field(min_length=1, max_length=4)]
    sha256: _Digest


class _StoredText(BaseModel):
    """What an entry says of itself."""

    model_config = ConfigDict(strict=True, extra="forbid")

    schema_: Annotated[str, Field(alias="schema")]
    key: _Digest
    tensors: Annotated[dict[_Name, _StoredTensor], Field(min_length=1, max_length=16)]
    notes: Annotated[tuple[_Note, ...], Field(max_length=16)]


@dataclass(frozen=True)
class Embedded:
    """A text as pipelines take it.

    Attributes:
        tensors: on the CPU, by the names of a pipeline's arguments, of `laid_out`.
        notes: what to know of how it was encoded, in sentences.
    """

    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...] = ()


def laid_out(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, each contiguous in memory of its own.

    Products round their sums by strides and alignment: a view into an encoder's output, or into a file, would give
    other last bits than an equal tensor.
    """
    import torch

    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class TextCache:
    """A folder of entries.

    Attributes:
        folder: which may not be there yet.
        most_bytes: of all entries; beyond it those go first that have not been used for longest.
    """

    folder: Path
    most_bytes: int = MOST_BYTES

    def read(self, key: str) -> Embedded | None:
        """The text of an entry; None where there is none, or a damaged one."""
        path = self._path(key)
        try:
            if not path.is_file() or path.stat().st_size > _LARGEST_ENTRY:
                return None
            held, about = read_tensors(path, SCHEMA, "an entry of the cache of texts")
            told = _StoredText.model_validate_json(json.dumps(about))
        except (BadInput, OSError, ValidationError):
            return None
        if told.key != key or _described(held) != {
            name: one.model_dump(mode="json") for name, one in told.tensors.items()
        }:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used last
        # In their own order, the prompt's first: files of tensors have another.
        return Embedded(laid_out({name: held[name] for name in told.tensors}), told.notes)

    def write(self, key: str, text: Embedded) -> None:
        """Keeps a text, and makes room for them. Those that are not finite, or too large, are not kept.

        Raises:
            CannotWrite: if there is no room, or no leave.
        """
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in text.tensors.items()}
        about = {"schema": SCHEMA, "key": key, "tensors": _described(held), "notes": list(text.notes)}
        fits = sum(tensor.nbytes for tensor in held.values()) <= min(_LARGEST_ENTRY, self.most_bytes) // 2
        if not fits or not all(tensor.isfinite().all() for tensor in held.values()):
            return
        _StoredText.model_validate_json(json.dumps(about))  # what is written can be read
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        write_tensors(self._path(key), held, about, overwrite=True)
        self._make_room(self._path(key))

    def entries(self) -> dict[Path, os.stat_result]:
        """Files of entries, the one first that has not been used for longest."""
        found = {}
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if _ENTRY.fullmatch(path.name) and not path.is_symlink():
                    with contextlib.suppress(OSError):
                        found[path] = path.stat()
        return dict(sorted(found.items(), key=lambda entry: entry[1].st_mtime_ns))

    def clear(self) -> int:
        """Removes all entries, and what killed processes have left of some; nothing else. Returns how many there were.

        Raises:
            CannotWrite: if one cannot be removed.
        """
        entries = self.entries()
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if match := _PART.fullmatch(path.name):
                    discard_leftovers(self.folder / match[1])
        for path in entries:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise CannotWrite(f"cannot remove {path}: {(error.strerror or str(error)).lower()}") from error
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # unless somebody else keeps something there
        return len(entries)

    def describe(self) -> dict[str, Any]:
        """Folder, number of entries and bytes, for people and machines."""
        entries = self.entries()
        total = sum(found.st_size for found in entries.values())
        return {"folder": str(self.folder), "entries": len(entries), "bytes": total, "most_bytes": self.most_bytes}

    def _make_room(self, newest: Path) -> None:
        entries = self.entries()
        total = sum(found.st_size for found in entries.values())
        for path, found in entries.items():
            if total <= self.most_bytes:
                return
            if path != newest:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= found.st_size

    def _path(self, key: str) -> Path:
        return self.folder / (key + SUFFIX)


def text_cache() -> TextCache:
    """That of the user."""
    return TextCache(cache_folder() / "texts")


def _described(held: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Dtype, shape and digest of each tensor."""
    import torch

    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sha256": sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest(),
        }
        for name, tensor in held.items()
    }


def is_kept(model: ModelChoice, kinds: frozenset[PictureKind], weights: Weights) -> bool:
    """Whether embeddings of a model are kept: of text alone, by encoders as they are.

    Args:
        model: which.
        kinds: of the pictures that an output is made from.
        weights: how they come; LoRAs may be for text encoders, too.
    """
    return not family_of(model).looks_at & kinds and not any(map(_touches_text, getattr(weights, "loras", ())))


def _touches_text(lora: Any) -> bool:
    from safetensors import SafetensorError, safe_open

    if lora.kind != "file":  # what a hub's holds is not known before it is here
        return True
    try:
        with safe_open(lora.source, "np") as file:
            return any(key.startswith(("lora_te", "text_encoder")) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):  # loading says more of what is wrong
        return True


def encoders_identity(
    folder: Path,
    model: ModelChoice,
    dtypes: Mapping[str, torch.dtype],
    weights: Weights,
    device: torch.device,
) -> dict[str, Any]:
    """All that decides the embeddings of a text but the text itself, as plain data.

    Args:
        folder: of the pipeline's parts.
        model: which.
        dtypes: of its parts.
        weights: how they come.
        device: where encoders run; sums are rounded in another order on others, and on other numbers of threads.

    Raises:
        OSError: if files cannot be read.
    """
    family, found = family_of(model), versions()
    files = [path for part in family.text_parts for path in sorted((folder / part).rglob("*")) if path.is_file()]
    return {
        "family": family.name,
        "tokens": model.text_tokens,
        "files": {
            str(path.relative_to(folder)): asdict(fingerprint(path)) for path in [folder / "model_index.json", *files]
        },
        "dtypes": {part: str(dtype) for part, dtype in dtypes.items()},
        "weights": {name: _known(value) for name, value in asdict(weights).items() if name not in _NOT_OF_TEXT},
        "device": [device.type, device_name(device), cpu_threads(device)],
        "versions": {name: found[name] for name in _PACKAGES},
    }


def _known(value: Any) -> Any:
    """A file by what it holds."""
    is_file = isinstance(value, str) and os.path.isfile(expanded(value))
    return asdict(fingerprint(expanded(value))) if is_file else value


def text_key(identity: Mapping[str, Any], prompt: str, negative: str | None) -> str:
    """The name of an entry.

    Args:
        identity: of `encoders_identity`.
        prompt: what is shown.
        negative: what is led away from; None for one transformer call per step.
    """
    text = json.dumps({**identity, "schema": SCHEMA, "prompt": prompt, "negative": negative}, sort_keys=True)
    return sha256(text.encode()).hexdigest()
