"""Reads YAML as plain data, remembers the line of every value, and refuses what YAML reads as something else.

YAML 1.1 turns an unquoted `on` into true, `1:30` into 90 and `010` into 8. A preset that relies on such a reading
is more likely a slip than a wish, so it is an error with its line. So are repeated keys, aliases and tags (`!!int`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grat_cli.errors import BadInput
from grat_cli.files import texts

_LONGEST_BYTES = 1 << 20  # that of a preset tuned for sixty layers of forty heads is a tenth of it
_TAG = "tag:yaml.org,2002:"
_PLAIN_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class YamlSource:
    """Data and the node tree it came from.

    Attributes:
        data: dicts, lists, text, numbers, None.
        label: the file's name, for messages.
    """

    data: Any
    label: str
    _root: yaml.Node

    def line(self, path: Sequence[str | int]) -> int:
        """Line, counted from 1, of the key or item at `path`, or of the deepest part of the path that exists."""
        node, line = self._root, self._root.start_mark.line
        for part in path:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == part), None)
                if pair is None:
                    break
                node, line = pair[1], pair[0].start_mark.line
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line
            else:
                break
        return line + 1


def read_file(path: Path) -> YamlSource:
    """Reads a YAML file.

    Raises:
        BadInput: if it cannot be read, is not UTF-8 or not YAML, or says something other than it seems to.
    """
    return read_text(texts.read_text(path, _LONGEST_BYTES), str(path))


def read_text(text: str, label: str, *, numbered: bool = True) -> YamlSource:
    """Reads YAML from a string; `label` stands in messages where a file's name would, with the line if `numbered`."""

    def place(mark: yaml.Mark | None) -> str:
        return f"{label}:{mark.line + 1}" if mark and numbered else label

    loader = None
    try:
        # Not the loader on libyaml: deeply nested input overflows its stack and ends the process.
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise BadInput(f"{label} is empty")
        _refuse_surprises(root, place, loader.resolve, set())
        return YamlSource(loader.construct_document(root), label, root)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise BadInput(f"{place(getattr(error, 'problem_mark', None))}: not valid YAML: {problem}") from error
    except (ValueError, OverflowError) as error:  # a date or number that matches YAML's pattern but does not exist
        raise BadInput(f"{label}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise BadInput(f"{label}: not valid YAML: nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_surprises(
    node: yaml.Node, place: Callable[[yaml.Mark], str], resolve: Callable[..., str], seen: set[int]
) -> None:
    """Raises BadInput for what is read as something other than it looks like.

    Args:
        node: with all below it.
        place: words for where a mark is.
        resolve: the loader's own: which tag a node has that is given none.
        seen: nodes that have been looked at.
    """
    if id(node) in seen:
        raise BadInput(f"{place(node.start_mark)}: aliases (*name) are not supported: write the value out")
    seen.add(id(node))
    # A tag may contradict what it stands before, and then YAML's reader fails in ways of its own.
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if node.tag != resolve(type(node), node.value if isinstance(node, yaml.ScalarNode) else None, (plain, not plain)):
        tag = node.tag.replace(_TAG, "!!")
        raise BadInput(f"{place(node.start_mark)}: tags ({tag}) are not supported: write the value as it is")
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            where = place(key.start_mark)
            if key.tag == f"{_TAG}merge":
                raise BadInput(f"{where}: merge keys (<<) are not supported: write the values out")
            _refuse_surprises(key, place, resolve, seen)
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "lists or sections"
                raise BadInput(f"{where}: keys must be text, not {shown}")
            if key.value in keys:
                raise BadInput(f"{where}: {key.value!r} is given twice")
            keys.add(key.value)
            _refuse_surprises(value, place, resolve, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_surprises(item, place, resolve, seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        reading = _surprising_reading(node.tag.removeprefix(_TAG), node.value)
        if reading:
            where, text = place(node.start_mark), node.value
            raise BadInput(f"{where}: YAML reads {text} as {reading}: {_unmistakable(reading, text)}")


def _unmistakable(reading: str, text: str) -> str:
    """How to write what is meant, by what it is read as."""
    plain = [reading.removeprefix("the number ")]
    if re.fullmatch(r"[-+]?0[0-9_]*[1-9][0-9_]*", text):  # octal for YAML alone
        plain.insert(0, str(int(text)))
    number = "" if reading == "a date" else f"{' or '.join(dict.fromkeys(plain))}, or "
    return f"write {number}'{text}' in quotes for text"


def _surprising_reading(tag: str, text: str) -> str | None:
    """What an unquoted scalar becomes where that is not what it looks like."""
    if tag == "bool" and text.lower() not in ("true", "false"):
        return "true" if text.lower() in ("on", "yes") else "false"
    if tag == "int" and not _PLAIN_INTEGER.fullmatch(text):
        return f"the number {yaml.safe_load(text)}"
    if tag == "float" and (":" in text or "_" in text):
        return f"the number {yaml.safe_load(text)}"
    if tag == "timestamp":
        return "a date"
    return None
