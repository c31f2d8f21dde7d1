"""Tensors in a `.safetensors` file together with JSON that says what they are.

The JSON is in the metadata key `grat` of the header, which is plain text, so that reading it takes no torch.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput
from grat_cli.files.json_objects import parsed
from grat_cli.files.texts import unreadable
from grat_cli.files.whole import write_whole

if TYPE_CHECKING:
    import torch

SUFFIX = ".safetensors"
KEY = "grat"
# The limit of the safetensors library itself.
LONGEST_HEADER = 100_000_000
_LONGEST_OWN_HEADER = 1 << 25  # a run of the most steps that there may be is half of it


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes tensors bit for bit, whole or not at all, and waits until they are on the disk.

    Args:
        path: the file.
        tensors: by name, of any shape, dtype and device.
        about: what they are: JSON data with the key `schema`.
        overwrite: whether files that this process has not written may be replaced.

    Raises:
        CannotWrite: if it cannot be written.
    """
    from safetensors.torch import save

    text = json.dumps(about, allow_nan=False)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {KEY: text})
    write_whole(path, lambda file: file.write(content), overwrite=overwrite, durable=True)


def read_tensors(path: Path, schema: str, what: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, on the CPU, and what they are.

    Args:
        path: the file.
        schema: the one schema that is understood, such as `grat.latents/1`.
        what: what such a file is, for messages: "a latents file".

    Raises:
        BadInput: if there is no such file, or it is another kind of file, of another version, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = read_about(path)
    if about is None:
        raise BadInput(f"{path} is not {what} of grat")
    _require_schema(path, about, schema, what)
    try:
        return load_file(path), about
    # What torch does not know of a type or shape is a LookupError, an AttributeError or a RuntimeError.
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{path} is damaged or cut off ({error}): it cannot be used") from error


def read_about(path: Path) -> dict[str, Any] | None:
    """The JSON in a file's header, None where there is none of grat's. Loads no torch and no tensor.

    Raises:
        BadInput: if the file cannot be read, or is no safetensors file.
    """
    damaged = f"{path} is not a safetensors file, or it is damaged"
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= min(_LONGEST_OWN_HEADER, os.fstat(file.fileno()).st_size - 8):
                raise BadInput(damaged)
            header = json.loads(file.read(length))
            text = header["__metadata__"][KEY] if KEY in header.get("__metadata__", {}) else None
            about = None if text is None else parsed(text)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(damaged) from error
    if about is not None and not isinstance(about, dict):
        raise BadInput(damaged)
    return about


def _require_schema(path: Path, about: Mapping[str, Any], schema: str, what: str) -> None:
    found = str(about.get("schema"))[:80]
    if found == schema:
        return
    if found.rpartition("/")[0] == schema.rpartition("/")[0]:
        raise BadInput(
            f"{path} has the format {found}, this version of grat reads {schema}: use the grat that wrote it"
        )
    raise BadInput(f"{path} is not {what} of grat: it says {found}")
