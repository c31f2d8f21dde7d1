"""Headers of files of weights: which tensors they hold, in which form and how large, before any is read.

Safetensors: 8 bytes of length, then JSON (huggingface/safetensors, README). GGUF: counts, then keys with values, then
one record a tensor (ggml-org/ggml, docs/gguf.md). A file is a stranger's: lengths and counts are held to what the file
can hold before anything is read by them, which the reader of the gguf package leaves out (an array that claims 2^60
entries keeps it busy for ever). Needs the standard library alone.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from grat_cli.files.tensors import LONGEST_HEADER

if TYPE_CHECKING:
    from typing import TypeGuard

Format = Literal["safetensors", "gguf", "pickle"]

# Bits of a number of each type of safetensors.
_BITS: Mapping[str, int] = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16},
    **{"I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
# Name, numbers in a block and bytes of one, of each type of GGUF (ggml.h, `ggml_type`).
GGUF_TYPES: Mapping[int, tuple[str, int, int]] = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22)},
    **{7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8)},
    **{29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36)},
}
# Bytes of a value of each type of GGUF that is no string (8) and no array (9).
_SCALARS: Mapping[int, str] = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
}
_STRING, _ARRAY = 8, 9
_LONGEST_NAME, _LONGEST_TEXT, _MOST_DIMENSIONS, _MOST_NUMBERS = 255, 4096, 5, 1 << 42
_MOST_TENSORS = 1 << 17
_ZIP, _PICKLES = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: outermost first, as torch has it.
        type: as the format calls it, such as `BF16`, `F8_E4M3` or `Q4_K`.
        bytes: that it takes.
    """

    shape: tuple[int, ...]
    type: str
    bytes: int

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file of weights holds.

    Attributes:
        format: of the file.
        tensors: by name, in the file's order.
        facts: keys and values of a GGUF file that are single numbers, short texts, or lists of a few whole numbers.
    """

    format: Format
    tensors: Mapping[str, StoredTensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.numbers for tensor in self.tensors.values())

    @property
    def types(self) -> dict[str, int]:
        """Bytes by type, the one that takes most first."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def format_of(path: Path) -> Format:
    """Of a file of weights, by what it begins with: names lie.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is empty, or a pointer of Git LFS.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(_POINTER):
        raise ValueError("it is a pointer of Git LFS, not the weights: run `git lfs pull` in its folder")
    if start.startswith(b"GGUF"):
        return "gguf"
    return "pickle" if start.startswith((_ZIP, *_PICKLES)) else "safetensors"


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of one that it has not fetched.

    Raises:
        OSError: if it cannot be read.
    """
    if path.stat().st_size > 1024:
        return False
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def read_header(path: Path) -> Header:
    """What a file of weights holds; nothing else of it is read.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged, cut off, or a pickle, which has none.
    """
    kind = format_of(path)
    if kind == "pickle":
        raise ValueError("it is a pickle, of which nothing is known before all of it is read")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _gguf_header(file, size) if kind == "gguf" else _safetensors_header(file, size)


# ---- Safetensors


def _safetensors_header(file: IO[bytes], size: int) -> Header:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= min(LONGEST_HEADER, size - 8):
        raise ValueError("it is cut off, or no file of weights")
    try:
        content = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise ValueError("its header is no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("its header holds no object")
    content.pop("__metadata__", None)
    if len(content) > _MOST_TENSORS:
        raise ValueError(f"it claims to hold {len(content):,} tensors")
    return Header("safetensors", {name: _entry(name, entry, size - 8 - length) for name, entry in content.items()})


def _entry(name: str, entry: Any, room: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise ValueError("its header describes no tensors")
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (_is_list_of_counts(shape) and _is_list_of_counts(offsets) and len(offsets) == 2 and isinstance(kind, str)):
        raise ValueError(f"{ascii(name)[1:-1][:80]} in its header is no tensor")
    if kind not in _BITS:
        raise ValueError(f"{ascii(name)[1:-1][:80]} is of the type {ascii(kind)[1:-1][:20]}, which is not known")
    begin, end = offsets
    if not begin <= end <= room or math.prod(shape) * _BITS[kind] != (end - begin) * 8:
        raise ValueError(f"{ascii(name)[1:-1][:80]} does not lie within the file: it is cut off or damaged")
    return StoredTensor(tuple(shape), kind, end - begin)


def _is_list_of_counts(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(number) is int and 0 <= number < 1 << 62 for number in value)
    )


# ---- GGUF


class _Cursor:
    """Reads a GGUF header piece by piece, never beyond the file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, min(size, LONGEST_HEADER)
        self.position = 0

    def take(self, count: int) -> bytes:
        self.skip(count, read=True)
        taken = self._file.read(count)
        if len(taken) < count:
            raise ValueError("it is cut off")
        return taken

    def skip(self, count: int, *, read: bool = False) -> None:
        if count > self._left:
            raise ValueError("it is cut off, or its header is damaged")
        self._left -= count
        self.position += count
        if not read:
            self._file.seek(count, os.SEEK_CUR)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, longest: int) -> str | None:
        """None for one that is longer than that."""
        length = self.number("Q")
        if length > longest:
            self.skip(length)
            return None
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise ValueError("a text in its header is no UTF-8") from None


def _gguf_header(file: IO[bytes], size: int) -> Header:
    cursor = _Cursor(file, size)
    cursor.take(4)
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        about = "was written for big-endian machines" if swapped in (2, 3) else f"is of version {version}"
        raise ValueError(f"it is a GGUF file that {about}, of which 2 and 3 for little-endian ones are read")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if max(tensors, keys) > _MOST_TENSORS:
        raise ValueError(f"it claims to hold {max(tensors, keys):,} tensors or keys")
    facts: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.text(_LONGEST_TEXT)
        value = _value(cursor, cursor.number("I"))
        if name is None or name in facts:
            raise ValueError("a key in its header is too long, or there twice")
        facts[name] = value
    records = [_record(cursor) for _ in range(tensors)]
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError("its alignment is no power of two")
    room = size - -(-cursor.position // alignment) * alignment
    found: dict[str, StoredTensor] = {}
    for name, tensor, offset in records:
        if name in found:
            raise ValueError(f"{ascii(name)[1:-1][:80]} is there twice")
        if offset % alignment or offset + tensor.bytes > room:
            raise ValueError(f"{ascii(name)[1:-1][:80]} does not lie within the file: it is cut off or damaged")
        found[name] = tensor
    return Header("gguf", found, {name: value for name, value in facts.items() if value is not None})


def _value(cursor: _Cursor, kind: int) -> Any:
    """A value that may be asked for; None for long ones, which are passed over."""
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text(_LONGEST_TEXT)
    if kind != _ARRAY:
        raise ValueError(f"its header has a value of type {kind}, which is not known")
    inner, count = cursor.number("I"), cursor.number("Q")
    if inner in _SCALARS:
        code = _SCALARS[inner]
        if count <= _MOST_DIMENSIONS:
            return [cursor.number(code) for _ in range(count)]
        cursor.skip(count * struct.calcsize(f"<{code}"))
        return None
    if inner != _STRING:
        raise ValueError(f"its header has a list of values of type {inner}, which is not known")
    # Each takes 8 bytes at least, so that the file's end ends this.
    for _ in range(count):
        cursor.skip(cursor.number("Q"))
    return None


def _record(cursor: _Cursor) -> tuple[str, StoredTensor, int]:
    """Name, tensor and offset."""
    name = cursor.text(_LONGEST_NAME)
    dimensions = cursor.number("I")
    if name is None or dimensions > _MOST_DIMENSIONS:
        raise ValueError("a tensor in its header has a name too long, or too many dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in GGUF_TYPES:
        raise ValueError(f"{ascii(name)[1:-1][:80]} is of the type {kind}, which is not known")
    type_name, block, block_bytes = GGUF_TYPES[kind]
    numbers = math.prod(shape)
    if numbers > _MOST_NUMBERS or (shape[-1] if shape else 1) % block:
        raise ValueError(f"{ascii(name)[1:-1][:80]} is not of whole blocks of {block}, or absurdly large")
    return name, StoredTensor(shape, type_name, numbers // block * block_bytes), offset
