"""Files of prompts: a prompt per line, or objects with one each, as the public benchmarks give them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grat_cli.errors import BadInput, shortened
from grat_cli.files.json_objects import parsed
from grat_cli.files.places import typed_path
from grat_cli.files.texts import read_text

LARGEST_SEED = 2**63 - 1
MOST_OUTPUTS = 1000  # of a prompt
SUFFIXES = (".txt", ".jsonl", ".json")
# VBench's VBench_full_info.json (github.com/Vchitect/VBench) calls the prompt so.
_PROMPT_NAMES = ("prompt", "prompt_en")
_NEGATIVE_NAMES = ("negative", "negative_prompt")  # the latter in reports of grat
_COUNTS = ("seed", "n")
# What these benchmarks say of a prompt besides, for their evaluators.
_OF_BENCHMARKS = ("tag", "include", "exclude", "dimension", "auxiliary_info")
_LONGEST_BYTES = 1 << 26
_PICTURES = ("init_image", "mask", "control", "reference")
_LONGEST_PATH, _MOST_REFERENCES = 4096, 100


@dataclass(frozen=True)
class PromptEntry:
    """One prompt of a file.

    Attributes:
        place: where it stands, for people: `line 3`, or `entry 3` of a list.
        prompt: without spaces around it.
        item: its object, as it stands in the file; of a line of text, the prompt alone.
        negative: what to keep out, None where the entry does not say.
        seed: of its first sample, likewise.
        samples: how many, likewise.
        pictures: files that it is made from, by `init_image`, `mask`, `control` and `reference`; beside the file of
            prompts, where their paths are not absolute.
    """

    place: str
    prompt: str
    item: Mapping[str, Any]
    negative: str | None = None
    seed: int | None = None
    samples: int | None = None
    pictures: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)


def read_prompts(path: Path) -> list[PromptEntry]:
    """The prompts of a file, in its order.

    A `.txt` has one per line; empty lines are left out. A `.jsonl` has one object per line, a `.json` a list of them:
    `prompt` (or `prompt_en`), and if wanted `negative` (or `negative_prompt`), `seed`, `n`, and names of picture files
    under `init_image`, `mask`, `control` and `reference`, the last of which may be a list. Other keys are kept.

    Raises:
        BadInput: if it cannot be read, or an entry makes no sense, with its place.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path}: prompts stand in .txt, .jsonl or .json files: give it such a name")
    text = read_text(path, _LONGEST_BYTES)
    if path.suffix.lower() == ".json":
        entries = _of_list(text, path)
    else:
        # Not splitlines(), which also breaks lines at characters that a JSON string may hold as they are.
        lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
        parse = _of_line if path.suffix.lower() == ".jsonl" else _of_text
        entries = [parse(line, place, path) for place, line in lines if line]
    if not entries:
        raise BadInput(f"{path} has no prompts: write one per line")
    return entries


def unknown_keys(entries: Sequence[PromptEntry]) -> list[str]:
    """Keys of entries that mean nothing, neither here nor to the public benchmarks, in the order of the file."""
    known = {*_PROMPT_NAMES, *_NEGATIVE_NAMES, *_COUNTS, *_PICTURES, *_OF_BENCHMARKS}
    return list(dict.fromkeys(key for entry in entries for key in entry.item if key not in known))


def _of_text(line: str, place: str, path: Path) -> PromptEntry:
    return PromptEntry(place, line, {"prompt": line})


def _of_line(line: str, place: str, path: Path) -> PromptEntry:
    return _entry(_parsed(line, f"{path}, {place}"), place, path)


def _of_list(text: str, path: Path) -> list[PromptEntry]:
    content = _parsed(text, str(path))
    if not isinstance(content, list):
        raise BadInput(
            f"{path}: expected a list of objects, such as VBench_full_info.json; of one per line make a .jsonl"
        )
    return [_entry(item, f"entry {number}", path) for number, item in enumerate(content, start=1)]


def _parsed(text: str, where: str) -> Any:
    try:
        return parsed(text)
    except ValueError as error:
        reason = str(error).partition(":")[0].lower()
        raise BadInput(f'{where} is not valid JSON ({reason}): expected {{"prompt": "a red fox"}}') from error


def _entry(item: Any, place: str, path: Path) -> PromptEntry:
    """An object as an entry.

    Raises:
        BadInput: if it is none, or one of the keys that mean something has a value of the wrong kind.
    """
    where = f"{path}, {place}"
    if not isinstance(item, dict):
        raise BadInput(f'{where}: expected an object such as {{"prompt": "a red fox"}}, not {json.dumps(item)[:40]}')
    name = next((name for name in _PROMPT_NAMES if name in item), None)
    if name is None:
        raise BadInput(f'{where} has no prompt: expected {{"prompt": "a red fox", ...}}')
    prompt = item[name]
    negatives = [item[name] for name in _NEGATIVE_NAMES if item.get(name) is not None]
    negative = negatives[0] if negatives else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInput(f"{where}: {name} must be text, not {json.dumps(prompt)[:40]}")
    if not isinstance(negative, str | None):
        raise BadInput(f"{where}: negative must be text, not {shortened(json.dumps(negative), 40)}")
    if len(negatives) > 1 and negatives[1] != negative:
        raise BadInput(f"{where}: {' and '.join(_NEGATIVE_NAMES)} mean the same and differ: leave one out")
    if any("\ud800" <= character <= "\udfff" for character in json.dumps(item, ensure_ascii=False)):
        raise BadInput(f"{where}: the text has half a character (a lone surrogate): write the file again")
    return PromptEntry(
        place,
        prompt.strip(),
        item,
        negative,
        _whole_number(item.get("seed"), 0, LARGEST_SEED, f"{where}: seed"),
        _whole_number(item.get("n"), 1, MOST_OUTPUTS, f"{where}: n"),
        {name: files for name in _PICTURES if (files := _files(item.get(name), name, path, where))},
    )


def _files(value: Any, name: str, prompts: Path, where: str) -> tuple[Path, ...]:
    """One file, or of references a list of some."""
    names: list[Any] = value if isinstance(value, list) and name == "reference" else [] if value is None else [value]
    for one in names:
        if not isinstance(one, str) or not 0 < len(one) <= _LONGEST_PATH or "\0" in one:
            raise BadInput(f"{where}: {name} must be the name of a picture, not {json.dumps(value)[:40]}")
        typed_path(one, f"{where}: {name}")  # refuses what is no path
    if len(names) > _MOST_REFERENCES:
        raise BadInput(f"{where}: {len(names)} pictures under {name}, more than {_MOST_REFERENCES}")
    return tuple(prompts.parent / one for one in names)


def _whole_number(value: Any, least: int, most: int, what: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadInput(f"{what} must be a whole number from {least} to {most}, not {json.dumps(value)[:40]}")
    return value
