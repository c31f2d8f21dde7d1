"""Presets: loaded from YAML files, changed by flags and `--set`, written back as YAML.

Precedence: flag, then `--set section.key=value`, then the preset file, then the default. Messages name the file and
line, or the option, that gave the value they complain about.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from grat_cli.errors import BadInput, nearest
from grat_cli.presets.attention import (
    FIELDS_OF_VARIANT,
    LARGEST_COUNT,
    SPELLED_OUT,
    VARIANTS,
    Attention,
    Change,
    Choice,
    FarField,
    FarLevel,
    without_unused,
)
from grat_cli.presets.caches import KINDS, Cache, cache_from_text
from grat_cli.presets.problems import Problem, problem_of, shape_text
from grat_cli.presets.schema import (
    BACKENDS,
    HIGHRES_MODES,
    CheckEvidence,
    Evidence,
    HighResolution,
    Kernel,
    OverSteps,
    OverStepsEvidence,
    PatternEvidence,
    PositionsName,
    Preset,
    Rule,
    Sampling,
    Schedule,
    StageOverride,
    Table,
)
from grat_cli.presets.section import MOST_STEPS
from grat_cli.presets.yaml_source import YamlSource, read_file, read_text

__all__ = [
    "BACKENDS",
    "CACHES",
    "HIGHRES_MODES",
    "LARGEST_COUNT",
    "MOST_STEPS",
    "VARIANTS",
    "Attention",
    "Cache",
    "Change",
    "CheckEvidence",
    "Choice",
    "Evidence",
    "FarField",
    "FarLevel",
    "HighResolution",
    "Kernel",
    "OverSteps",
    "OverStepsEvidence",
    "PatternEvidence",
    "PositionsName",
    "Preset",
    "Rule",
    "Sampling",
    "Schedule",
    "StageOverride",
    "Table",
    "cache_from_text",
    "load_preset",
    "preset_from",
    "preset_names",
    "preset_yaml",
    "resolve_preset",
    "shape_text",
]

CACHES = tuple(KINDS)
KeyPath = tuple[str, ...]

_FLAG_PATHS: Mapping[str, KeyPath] = {
    "variant": ("attention", "variant"),
    "group": ("attention", "group"),
    "radius": ("attention", "radius"),
    "share": ("attention", "share"),
    "backend": ("kernel", "backend"),
    "steps": ("sampling", "steps"),
    "guidance": ("sampling", "guidance"),
    "highres": ("highres", "mode"),
    "guard": ("guard",),
    "cache": ("cache",),
}


def preset_names() -> list[str]:
    """Names of the presets that come with grat."""
    entries = files("grat_presets").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_preset(name_or_path: str) -> Preset:
    """A preset that comes with grat, by name, or one from a YAML file.

    Raises:
        BadInput: if there is none of that name, or the file is not a valid preset, with file, line and key.
    """
    if name_or_path in (names := preset_names()):
        text = (files("grat_presets") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        return preset_from(read_text(text, f"{name_or_path}.yaml"))
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or os.sep in name_or_path or os.path.isfile(path):
        return preset_from(read_file(path))
    closest = nearest(name_or_path, names)
    advice = f"did you mean {closest}?" if closest else "grat presets lists them"
    raise BadInput(f"there is no preset {name_or_path!r}: {advice}")


def preset_from(source: YamlSource) -> Preset:
    """Validates a preset that was read from YAML.

    Raises:
        BadInput: with file, line, key, what was expected and the nearest valid name.
    """
    try:
        return Preset.model_validate(source.data)
    except ValidationError as error:
        problems = sorted(
            (problem_of(details) for details in error.errors()), key=lambda problem: source.line(problem.path)
        )
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        place = f"{source.label}:{source.line(problems[0].path)}"
        raise BadInput(f"{place}: {_described(problems[0])}{more}") from error


def resolve_preset(base: Preset, *, set_items: Sequence[str] = (), **flags: Any) -> Preset:
    """The preset with `--set` items and flags applied.

    When the variant changes, fields that the new one has no use for go, and those that nobody gave take its defaults.

    Args:
        base: the preset.
        set_items: items such as `attention.radius=2`, values in YAML.
        flags: `variant`, `group` (a number for all axes or one per axis), `radius`, `share`, `backend`, `steps`,
            `guidance`, `highres` (its mode), `guard`, `cache` (as typed); None where not given.

    Raises:
        BadInput: naming the option that does not fit.
    """
    data = base.model_dump(context=SPELLED_OUT)
    origins: dict[KeyPath, str] = {}
    for item in set_items:
        path, value = _parsed_item(item)
        _place(data, path, value, item)
        origins[path] = f"--set {item}"
    for name, value in flags.items():
        path = _FLAG_PATHS[name]
        if value is not None:
            origins[path] = f"--{name} {shape_text(value) if isinstance(value, int | tuple) else value}"
            if name == "cache":
                typed = cache_from_text(str(value), "--cache")
                _place(data, path, None if typed is None else typed.model_dump(), name)
                continue
            if name == "group":
                value = _on_all_axes(value, len(base.attention.group), origins[path])
            _place(data, path, value, name)
    if not origins:
        return base
    _drop_fields_of_old_variant(data, base, origins)
    try:
        return Preset.model_validate(data)
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        raise BadInput(_blamed(problem, base, origins)) from error


def preset_yaml(preset: Preset) -> str:
    """The preset as YAML that loads to an equal one."""
    data = preset.model_dump(mode="json")
    data["attention"] = without_unused(data["attention"], preset.attention.variant)
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)


def _parsed_item(item: str) -> tuple[KeyPath, Any]:
    key, equals, text = item.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise BadInput(f"--set {item}: expected section.key=value, for example --set attention.radius=2")
    if not text.strip():
        raise BadInput(f"--set {item}: the value is missing: write null for none")
    return path, read_text(text, f"--set {item}", numbered=False).data


def _place(data: dict[str, Any], path: KeyPath, value: Any, item: str) -> None:
    section: Any = data
    for part in path[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise BadInput(f"--set {item}: {part} has no keys of its own: set it whole")
    section[path[-1]] = value


def _on_all_axes(group: int | tuple[int, ...], axes: int, origin: str) -> tuple[int, ...]:
    sizes = (group,) * axes if isinstance(group, int) else group
    if len(sizes) != axes:
        raise BadInput(f"{origin}: expected one size or {axes}, such as {'x'.join(['16'] * axes)}")
    return sizes


def _drop_fields_of_old_variant(data: dict[str, Any], base: Preset, origins: Mapping[KeyPath, str]) -> None:
    attention = data["attention"]
    if (
        ("attention",) in origins
        or not isinstance(attention, dict)
        or attention.get("variant") == base.attention.variant
    ):
        return
    given = {path[1]: attention[path[1]] for path in origins if path[0] == "attention"}
    if given["variant"] in FIELDS_OF_VARIANT:
        data["attention"] = {**without_unused(attention, given["variant"]), **given}


def _described(problem: Problem) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem.path).lstrip(".")
    return f"{path}: {problem.message}" if path else problem.message


def _blamed(problem: Problem, base: Preset, origins: Mapping[KeyPath, str]) -> str:
    """The problem with the option that caused it: the one at its path, else all that were given."""
    for path, origin in origins.items():
        if problem.path[: len(path)] == path or path[: len(problem.path)] == problem.path != ():
            return f"{origin}: {problem.message}"
    return f"preset {base.name} with {' '.join(origins.values())}: {_described(problem)}"
