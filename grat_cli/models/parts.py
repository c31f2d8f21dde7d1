"""What a pipeline's files may ask for: classes from a table, weights beside them, and no code of their own.

A model's folder is data from a stranger. Its `model_index.json` names a class for each part, and loaders of diffusers
and transformers follow more keys than that: to modules, kernels on the hub, files elsewhere, pickles. Here all of them
are read, bounded, and either known or refused, before a library sees the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from grat_cli.errors import ModelUnavailable, first_line, printable, shortened
from grat_cli.families.base import Classes
from grat_cli.files.json_objects import read_json
from grat_cli.models.quantization import PACKAGES, installed
from grat_cli.models.weight_files import require_fetched, require_no_pickle

_GET_AGAIN = "get the folder again, or use --model demo"
# Keys that make a loader run a module, or read files of any name.
_REACHING_OUT = (
    *("auto_map", "custom_pipelines", "transformers_weights", "configuration_files"),
    *("fast_tokenizer_files", "init_inputs"),
)
_CONFIGURATIONS = (
    *("config.json", "scheduler_config.json", "tokenizer_config.json", "guider_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
# Which shard holds which weight, of the plain files or of a variant.
_SHARDS = re.compile(r".*\.index(\.[^.]*)?\.json")
# Anything else may be a kernel on the hub, which is code.
_ATTENTIONS = (None, "eager", "sdpa")
# What a tokenizer's configuration may set to the path of any file; files beside it are found without.
TOKENIZER_PATHS = ("vocab_file", "merges_file", "vocab", "merges", "gguf_file", "tokenizer_object")

# So that a name can be shown as it is.
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,79}$")]


class PipelineIndex(BaseModel):
    """A `model_index.json`.

    Attributes:
        class_name: of the pipeline; None where it is not said.
        parts: library and class of each part; None where the pipeline does without it.
        options: what else the pipeline is made with.
    """

    class_name: _Name | None
    parts: dict[_Name, tuple[_Name | None, _Name | None]] = Field(max_length=32)
    options: dict[_Name, bool | Annotated[float, Field(ge=-1e6, le=1e6)] | None] = Field(max_length=32)

    @model_validator(mode="before")
    @classmethod
    def _sorted_out(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        parts = {key: value for key, value in content.items() if isinstance(value, list) and not key.startswith("_")}
        own = {key: value for key, value in content.items() if not key.startswith("_")}
        options = {key: value for key, value in own.items() if value is None or isinstance(value, bool | int | float)}
        return {"class_name": content.get("_class_name"), "parts": parts, "options": options}

    def classes(self, name: str, permitted: Classes) -> dict[str, tuple[str, str]]:
        """Library and class of each part that the pipeline has.

        Args:
            name: the model, for messages.
            permitted: of each part the classes that it may be of, and their library.

        Raises:
            ModelUnavailable: if one is not in the table.
        """
        found = {part: (library, kind) for part, (library, kind) in self.parts.items() if library and kind}
        for part, (library, kind) in found.items():
            known = permitted.get(part, {})
            if known.get(kind) != library:
                wanted = f"only {' or '.join(known)} can be" if known else "there is no part of that name"
                raise ModelUnavailable(
                    f"{part} of {name} is a {kind} of {library}, which is not supported: {wanted}; {_GET_AGAIN}"
                )
        return found


def read_index(path: Path) -> PipelineIndex:
    """A `model_index.json`.

    Raises:
        FileNotFoundError: if there is none.
        ModelUnavailable: if it cannot be read, or is none.
    """
    try:
        return PipelineIndex.model_validate(read_json(path))
    except FileNotFoundError:
        raise
    except ValidationError as error:
        raise ModelUnavailable(f"{path} is damaged ({validation_problem(error)}): {_GET_AGAIN}") from error
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} cannot be read ({first_line(error)}): {_GET_AGAIN}") from error


def validation_problem(error: ValidationError) -> str:
    """The first thing that is wrong with a file's content, without that content."""
    problem = error.errors(include_input=False, include_url=False)[0]
    return printable(".".join(str(key) for key in problem["loc"] if key != "[key]"))[:80] + f": {problem['msg']}"


def load_class(library: str, kind: str) -> Any:
    """A class of `PipelineIndex.classes`, or of a table."""
    return getattr(import_module(library), kind)


def require_plain_part(folder: Path, what: str, *, allow_pickle: bool = False, has_weights: bool = False) -> None:
    """Makes sure that loading a part of a pipeline runs no code and reads nothing but safetensors beside it.

    Args:
        folder: of the part.
        what: it is, for messages.
        allow_pickle: whether tensors may be read from pickles beside it.
        has_weights: whether weights are read from it.

    Raises:
        ModelUnavailable: if its files ask for more.
        OSError: if they cannot be read.
        ValueError: if they are damaged.
    """
    require_fetched(folder, what)
    for path in sorted(folder.glob("*.json")):
        if path.name == "adapter_config.json":
            raise _reaches_out(what, path.name, "an adapter, which is loaded from anywhere")
        if _SHARDS.fullmatch(path.name):
            names = set(map(str, read_json(path)["weight_map"].values()))
            suffix = ".bin" if allow_pickle and ".bin." in path.name else ".safetensors"
            strange = sorted(name for name in names if Path(name).name != name or not name.endswith(suffix))
            if strange and (suffix == ".bin" or ".bin." not in path.name):
                raise _reaches_out(what, path.name, f"{shortened(printable(strange[0]), 80)}, no {suffix} beside it")
        elif path.name in _CONFIGURATIONS:
            require_plain_config(read_json(path), what, path.name)
    if has_weights:
        require_no_pickle(folder, what, allow_pickle=allow_pickle)


def require_plain_config(config: Mapping[str, Any], what: str, file: str = "config.json") -> None:
    """The same of a configuration alone; arguments and errors are those of `require_plain_part`."""
    for entries in _objects(config):
        for key in _REACHING_OUT:
            if entries.get(key):
                raise _reaches_out(what, file, f"{key}, which runs or reads what is no part of the model")
        for key in ("attn_implementation", "_attn_implementation"):
            if entries.get(key) not in _ATTENTIONS:
                raise _reaches_out(what, file, f"{key}, which may run code from the hub")
        quantization = entries.get("quantization_config")
        method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else None
        if method is not None and method not in PACKAGES.values():
            raise _reaches_out(what, file, f"weights quantized by none of {', '.join(sorted(set(PACKAGES.values())))}")
        if method is not None and not installed(method):
            raise ModelUnavailable(f"{what} is quantized by {method}, which is not installed: pip install {method}")
        if method == "bitsandbytes":
            import torch

            if not torch.cuda.is_available():
                raise ModelUnavailable(
                    f"{what} is quantized by bitsandbytes, which takes a CUDA device, and there is none here: "
                    "get the model as its makers saved it"
                )
        # Libraries repeat some in warnings. A tokenizer's may hold control characters: they are its tokens.
        texts = (text for pair in entries.items() for text in pair if isinstance(text, str))
        if file != "tokenizer_config.json" and not all(text.isprintable() for text in texts):
            raise ValueError(f"{file} holds control characters")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside JSON data: libraries look into some that are nested."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _reaches_out(what: str, file: str, asked: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{what} is not loaded: its {file} asks for {asked}\n"
        "get the model from its makers, in diffusers' own layout with .safetensors, or use --model demo"
    )
