"""What a file of weights is known by, wherever it lies and whatever it is called."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
WHOLE_BYTES = 256 * MIB


@dataclass(frozen=True)
class Fingerprint:
    """Of a file.

    Attributes:
        bytes: its size.
        sha256: of all of it, or of its first and last MiB.
        whole: of which.
    """

    bytes: int
    sha256: str
    whole: bool


def fingerprint(path: Path) -> Fingerprint:
    """Of a file up to 256 MiB by all of it, of a larger one by its size, its first and its last MiB: weights of tens of
    gigabytes are not read once more for it, and headers of safetensors and GGUF begin a file.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= WHOLE_BYTES:
            return Fingerprint(size, hashlib.sha256(file.read()).hexdigest(), whole=True)
        told = hashlib.sha256(file.read(MIB))
        file.seek(size - MIB)
        told.update(file.read(MIB))
        return Fingerprint(size, told.hexdigest(), whole=False)
