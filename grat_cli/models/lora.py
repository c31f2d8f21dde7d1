"""LoRAs: what is typed of them, and what can be refused before a model is loaded. `lora_layers` adds them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grat_cli.errors import BadInput, ModelUnavailable, first_line, printable
from grat_cli.families import family_of
from grat_cli.families.base import NO_PICTURES, ModelChoice, PictureKind
from grat_cli.files.places import expanded
from grat_cli.models.catalogue import HUB_ID
from grat_cli.models.quantization import installed
from grat_cli.models.weights import Lora, Noise, Weights

SUFFIXES = (".safetensors", ".sft")
MOST_LORAS, LARGEST_SCALE = 32, 100.0
_NOISES: Mapping[str, Noise] = {"high": "high", "low": "low", "both": "both"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)
_LFS, _PICKLES = b"version https://git-lfs", (b"PK\x03\x04", b"\x80")
_MOST_KEYS, _LONGEST_NAME = 200_000, 120
_NO_LAYER = re.compile(r"\d{5}")  # conversions count up to the numbers that names of weights hold
# What other ways of adding to weights are known by, and why these are not read.
_OTHER_KINDS: Mapping[str, str] = {
    "dora_scale": "is a DoRA, of which diffusers would leave out the magnitudes",
    "lora_magnitude_vector": "is a DoRA, which is not supported",
    "lokr_": "is a LoKr, which is not supported",
    "hada_": "is a LoHa, which is not supported",
    "oft_": "is an OFT, which is not supported",
}


# ---- What is typed


def parse_loras(texts: Sequence[str]) -> tuple[Lora, ...]:
    """What `--lora` says, each time that it is given.

    Raises:
        BadInput: if one cannot be meant, or some cannot be meant together.
        ModelUnavailable: if a file is not there.
    """
    loras = tuple(map(parse_lora, texts))
    if len(loras) > MOST_LORAS:
        raise BadInput(f"{len(loras)} LoRAs are more than the {MOST_LORAS} that are taken: leave some out")
    refuse_alike(loras)
    return loras


def parse_lora(text: str) -> Lora:
    """One LoRA: `FILE|HUB-ID[:WEIGHT-NAME][@SCALE]`, behind `high=`, `low=` or `both=` for one of two transformers.

    What is there goes first: a file whose name holds `@`, `:` or `=` is that file. A scale is what follows the last `@`
    where that is a number, a weight's name what follows the `:` behind a folder or a hub id.

    Raises:
        BadInput, ModelUnavailable: as `parse_loras`.
    """
    if not text.strip() or "\0" in text:
        raise BadInput("--lora is empty: expected FILE or HUB-ID, such as --lora style.safetensors@0.8")
    word, equals, rest = text.partition("=")
    noise: Noise = "all"
    if equals and word in _NOISES and not _is_there(text):
        noise, text = _NOISES[word], rest
        if not text:
            raise BadInput(f"--lora {word}=: expected a file or hub id behind it")
    name, scale = text, 1.0
    head, at, tail = text.rpartition("@")
    if at and head and not _is_there(text):
        if _NUMBER.fullmatch(tail):
            name, scale = head, _scale(text, tail)
        elif _is_there(head):
            raise BadInput(f"--lora {text}: {tail!r} is no scale: expected a number such as 0.8")
    return _named(name, scale, noise)


def _scale(text: str, typed: str) -> float:
    scale = float(typed)
    if not math.isfinite(scale) or abs(scale) > LARGEST_SCALE:
        raise BadInput(f"--lora {text}: a scale is a number from -{LARGEST_SCALE:g} to {LARGEST_SCALE:g}, such as 0.8")
    return scale


def _named(name: str, scale: float, noise: Noise) -> Lora:
    """A LoRA by what stands before its scale."""
    path = _path(name)
    if _is_file(path):
        return Lora(source=str(path), scale=scale, noise=noise)
    folder, weight = path, None
    # A folder's name may hold colons, and so may that of a file in it.
    for colon in [] if _is_folder(path) else [match.start() for match in re.finditer(":", name)]:
        if _is_folder(before := _path(name[:colon])):
            folder, weight = before, name[colon + 1 :]
    if _is_folder(folder):
        return Lora(source=str(_in_folder(folder, weight)), scale=scale, noise=noise)
    if path.suffix.lower() in (*SUFFIXES, ".bin", ".pt", ".ckpt", ".pth") and ":" not in name:
        raise ModelUnavailable(f"there is no file {name}: check the path of --lora")
    hub_id, colon, weight = name.partition(":")
    if HUB_ID.fullmatch(hub_id):
        if colon and not is_weight_name(weight):
            raise BadInput(f"--lora {name}: expected the name of a file in the repository behind the colon")
        return Lora(source=hub_id, kind="hub", weight_name=weight or None, scale=scale, noise=noise)
    raise ModelUnavailable(f"there is no LoRA {name}: give a .safetensors file, or a hub id such as owner/name")


def is_weight_name(name: str | None) -> bool:
    """Whether a file of a repository can be called like that; None stands for its only one."""
    return name is None or (bool(name) and ".." not in Path(name).parts and not Path(name).is_absolute())


def _in_folder(folder: Path, name: str | None) -> Path:
    if name is not None:
        if not is_weight_name(name) or not _is_file(folder / name):
            raise ModelUnavailable(f"there is no file {name!r} in {folder}: check the name of --lora")
        return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(files) != 1:
        found = _listed([path.name for path in files]) if files else "no .safetensors file"
        raise ModelUnavailable(f"{folder} holds {found}: name the one that is meant, such as {folder}:NAME")
    return files[0]


def _path(name: str) -> Path:
    try:
        return expanded(name)
    except RuntimeError:  # the home of nobody
        return Path(name)


def _is_there(name: str) -> bool:
    return _is_file(_path(name)) or _is_folder(_path(name))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, and the like
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def refuse_alike(loras: Sequence[Lora]) -> None:
    """Makes sure that each LoRA is told from the others by its name: reports name files, and no folders.

    Raises:
        BadInput: if one is there twice, or two files have one name.
    """
    seen: dict[tuple[str, str | None], Lora] = {}
    for lora in loras:
        name = (Path(lora.source).name, None) if lora.kind == "file" else (lora.source, lora.weight_name)
        before = seen.setdefault(name, lora)
        if before is lora:
            continue
        if Path(before.source) != Path(lora.source):
            raise BadInput(
                f"two LoRAs are called {name[0]}, and reports could not tell which was which: rename one of them"
            )
        if before.noise == lora.noise or "both" in (before.noise, lora.noise):
            raise BadInput(f"--lora {name[0]} is given twice: give it once, with both scales added up")


def own_name(lora: Lora) -> str:
    """What a LoRA is called in reports: a file's own name, or hub id and weight's name."""
    if lora.kind == "file":
        return Path(lora.source).name
    return lora.source if lora.weight_name is None else f"{lora.source}:{lora.weight_name}"


# ---- What can be refused before a model is loaded


def refuse_loras(choice: ModelChoice, weights: Weights, pictures: frozenset[PictureKind] = NO_PICTURES) -> None:
    """Makes sure, before anything is loaded, that a model takes LoRAs, and that their files are some.

    Args:
        choice: the model.
        weights: how its weights come.
        pictures: kinds of the pictures that the pipeline is to take.

    Raises:
        BadInput: if model, options and LoRAs do not fit.
        ModelUnavailable: if a file is missing, damaged or of another kind.
    """
    if not weights.loras:
        if weights.fuse_loras:
            raise BadInput("--fuse-lora says how LoRAs are added, and there is none: add --lora FILE, or leave it out")
        return
    refuse_alike(weights.loras)
    family = family_of(choice)
    if not installed("peft"):
        raise BadInput("--lora needs peft, which is not installed: pip install 'grat-cli[lora]'")
    pipeline = family.pipeline_of(choice, choice.needs | pictures)
    if not hasattr(pipeline, "lora_state_dict"):
        raise BadInput(f"diffusers reads no LoRAs for {family.title} ({pipeline.__name__}): leave out --lora")
    if weights.fuse_loras and weights.quantize != "none":
        raise BadInput(
            f"--fuse-lora with --quantize {weights.quantize}: a sum would be rounded to few bits; leave out one of them"
        )
    for lora in weights.loras:
        if choice.transformers > 1 and lora.noise == "all":
            raise BadInput(
                f"{choice.name} has two transformers: say which one the LoRA is for, --lora high={own_name(lora)} "
                "(the first steps, of high noise), low= (the others), or both="
            )
        if choice.transformers == 1 and lora.noise != "all":
            raise BadInput(f"{choice.name} has one transformer: leave {lora.noise}= out of --lora")
        if lora.kind == "file":
            read_header(Path(lora.source), own_name(lora), "text_encoder" in pipeline._lora_loadable_modules)


def files_of_loras(
    choice: ModelChoice, weights: Weights, pictures: frozenset[PictureKind] = NO_PICTURES
) -> tuple[Path, ...]:
    """The file of each LoRA, those of the hub downloaded where they are not here; arguments as `refuse_loras`.

    Raises:
        BadInput, ModelUnavailable: as `refuse_loras`, and if one is out of reach.
    """
    refuse_loras(choice, weights, pictures)
    from grat_cli.models.hub import download_lora

    return tuple(
        Path(lora.source) if lora.kind == "file" else download_lora(lora.source, lora.weight_name, SUFFIXES)
        for lora in weights.loras
    )


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors.

    Attributes:
        keys: of the tensors.
        adapter: how the LoRA was trained, by the library that saved it; JSON, or empty.
    """

    keys: frozenset[str]
    adapter: str


def read_header(path: Path, name: str, takes_text: bool = True) -> Header:
    """Of a LoRA's file.

    Args:
        path: of it.
        name: for messages.
        takes_text: whether LoRAs of the model may be for its text encoder.

    Raises:
        ModelUnavailable: if it is missing, damaged, or no LoRA that is read.
        BadInput: if it is for more than the model takes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            beginning = file.read(64)
        if beginning.startswith(_LFS):
            raise ModelUnavailable(
                f"{name} is a pointer of Git LFS and not the file itself: get that with git lfs pull"
            )
        # The length of a header may begin like a pickle; the header itself does not.
        if beginning.startswith(_PICKLES) and beginning[8:9] != b"{":
            raise ModelUnavailable(
                f"{name} is a pickle, which may run code when it is read: get the LoRA as .safetensors, or convert it "
                "where you trust it: torch.load(..., weights_only=True), then safetensors.torch.save_file"
            )
        with safe_open(path, framework="np") as opened:
            keys, about = frozenset(opened.keys()), opened.metadata() or {}
    except FileNotFoundError:
        raise ModelUnavailable(f"{name} is not there any more: {path} is no file; put the LoRA back") from None
    except (SafetensorError, OSError, ValueError) as error:
        reason = "it is empty" if _is_file(path) and not path.stat().st_size else first_line(error)
        raise ModelUnavailable(f"{name} is damaged or no .safetensors file ({reason}): get it again") from error
    for mark, reason in _OTHER_KINDS.items():
        if any(mark in key for key in keys):
            raise BadInput(f"{name} {reason}: give a LoRA")
    if len(keys) > _MOST_KEYS or not any("lora" in key.lower() for key in keys):
        raise BadInput(
            f"{name} holds no LoRA: none of its {len(keys)} weights is one; a whole model is given with --model"
        )
    if strange := next((key for key in keys if _NO_LAYER.search(key)), None):
        raise ModelUnavailable(f"{name} is damaged: it names a layer that no model has, {shown(strange)}")
    of_text = sorted(key for key in keys if key.startswith(("lora_te", "text_encoder")))
    if of_text and not takes_text:
        raise BadInput(
            f"{name} is also for a text encoder ({len(of_text)} weights, such as {shown(of_text[0])}), which "
            "diffusers reads no LoRAs for with this model: it is of another model, or has to be split"
        )
    return Header(keys, about.get("lora_adapter_metadata", ""))


def shown(name: str) -> str:
    """A name out of a file, as messages have it."""
    text = printable(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."


def _listed(names: Sequence[str]) -> str:
    first = ", ".join(map(shown, names[:5]))
    return f"{first} and {len(names) - 5} more" if len(names) > 5 else first
