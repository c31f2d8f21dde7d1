"""Options that are declared once, in groups, as parameters of commands.

A group is a frozen dataclass whose fields are made by `option` or `switch`. A command takes whole groups, and by
keyword, so that they stand in the order of its help text:

    def plan(*, size: SizeOptions, sampling: Annotated[SamplingOptions, only("steps")], gpu: str | None = option(...)):

`with_options`, which `app` applies to each command, puts the fields of the groups in their place; those that `only`
leaves out keep their defaults.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from grat_cli.errors import BadInput, ModelUnavailable
from grat_cli.files.places import expanded, refuse_impossible, typed_path


def option(
    metavar: str,
    help: str,
    panel: str | None = None,
    default: Any = None,
    *,
    flag: str | None = None,
    complete: Callable[..., list[str]] | None = None,
    show_default: bool = False,
    is_text: bool = False,
    is_place: bool = False,
) -> Any:
    """A field of a group, or the default of a command's parameter, that is an option with a value.

    Args:
        metavar: what its value is called in the help text.
        help: what it does.
        panel: of the help text.
        default: where it is not given.
        flag: as typed; None for the name of the field or parameter.
        complete: for shell completion.
        show_default: whether the help text gives the default, which it otherwise says in words.
        is_text: whether a model reads the value, and no file or preset has it for a name.
        is_place: whether it names a model by its path, if not otherwise.
    """
    settings = {"help": help, "rich_help_panel": panel, "metavar": metavar, "show_default": show_default}
    metadata = {"flag": flag, "is_text": is_text, "is_place": is_place, **settings, "autocompletion": complete}
    return field(default=default, metadata=metadata)


def switch(help: str, panel: str | None = None, *, flag: str | None = None) -> Any:
    """Likewise an option without a value."""
    return field(default=False, metadata={"flag": flag, "help": help, "rich_help_panel": panel})


@dataclass(frozen=True)
class _Argument:
    """What `argument` is given."""

    metavar: str
    help: str
    complete: Callable[..., list[str]] | None
    is_text: bool


def argument(
    metavar: str, help: str, complete: Callable[..., list[str]] | None = None, *, is_text: bool = False
) -> Any:
    """In `Annotated`: a parameter of a command that is no option; the help text says its default in words."""
    return _Argument(metavar, help, complete, is_text)


@dataclass(frozen=True)
class _Shown:
    """Which fields of a group a command has: all, or those of these names; and those that differ for it."""

    names: tuple[str, ...] | None
    instead: Mapping[str, Any]
    as_then: bool = False

    def of(self, group: Any) -> dict[str, Field[Any]]:
        """By name, in the group's order."""
        reworded = _reworded_as_then if self.as_then else _reworded
        return {
            each.name: reworded(each, self.instead.get(each.name, each))
            for each in fields(group)
            if self.names is None or each.name in self.names or each.name in self.instead
        }


def _reworded(declared: Field[Any], instead: Field[Any] | str) -> Field[Any]:
    if not isinstance(instead, str):
        return instead
    default: Any = declared.default
    return field(default=default, metadata={**declared.metadata, "help": instead})


def _reworded_as_then(declared: Field[Any], instead: Field[Any] | str) -> Field[Any]:
    meant = _reworded(declared, instead)
    if meant.default is False:
        return meant
    text = meant.metadata["help"].partition(" Default: ")[0]
    default: Any = None
    return field(default=default, metadata={**meant.metadata, "help": f"{text} Default: as then."})


def only(*names: str, **instead: Any) -> _Shown:
    """In `Annotated[Group, only(...)]`: the command has these fields alone, some with another help text or anew."""
    return _Shown(names, instead)


def changed(**instead: Any) -> _Shown:
    """In `Annotated[Group, changed(...)]`: the command has all fields, these with another help text or anew."""
    return _Shown(None, instead)


def as_then(**instead: Any) -> _Shown:
    """Likewise where an earlier output says what is not given: fields are None then, but for switches."""
    return _Shown(None, instead, as_then=True)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it: with the fields of its groups in place of these."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, tuple[str, ...]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        group, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(group):
            shown = next((note for note in notes if isinstance(note, _Shown)), changed()).of(group)
            groups[name] = group, tuple(shown)
            types = get_type_hints(group)
            parameters += [_parameter(each, types[each], declared) for each, declared in shown.items()]
        elif isinstance(parameter.default, Field):
            parameters.append(_parameter(name, hint, parameter.default))
        else:
            if notes and isinstance(notes[0], _Argument):
                hint = _annotation_of_argument(group, notes[0])
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        _require_working_folder()
        built = {name: group(**{each: values.pop(each) for each in names}) for name, (group, names) in groups.items()}
        command(**values, **built)

    setattr(call, "__signature__", inspect.Signature(parameters))  # noqa: B010
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameter(name: str, hint: Any, declared: Field[Any]) -> inspect.Parameter:
    settings = dict(declared.metadata)
    flag = settings.pop("flag") or f"--{name.replace('_', '-')}"
    kind = {"is_text": settings.pop("is_text", False), "is_place": settings.pop("is_place", False)}
    if (parser := _parser(hint, flag, **kind)) is not None:
        settings["parser"] = parser
    annotation = Annotated[hint, typer.Option(flag, **settings)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=declared.default, annotation=annotation)


def _annotation_of_argument(hint: Any, declared: _Argument) -> Any:
    parser = _parser(hint, declared.metavar, is_text=declared.is_text)
    settings: dict[str, Any] = {} if parser is None else {"parser": parser}
    told = typer.Argument(
        metavar=declared.metavar, help=declared.help, show_default=False, autocompletion=declared.complete, **settings
    )
    return Annotated[hint, told]


def _parser(hint: Any, flag: str, *, is_text: bool, is_place: bool = False) -> Callable[[str], Any] | None:
    """The parser of a value of a type; None where Typer has one that says enough."""
    kinds = {hint, *get_args(hint), *(kind for part in get_args(hint) for kind in get_args(part))}
    for kind in (int, float):
        if kind in kinds:
            return _number(flag, kind)
    if Path in kinds:
        return functools.partial(typed_path, option=flag)
    return functools.partial(_text, flag) if is_text else functools.partial(_place, flag) if is_place else None


def _text(flag: str, text: str) -> str:
    """What was typed, as the text that it is: UTF-8, also where the system's language would have it read otherwise.

    Raises:
        BadInput: if it is none.
    """
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise BadInput(f"{flag} {text}: it is not UTF-8 text: type it anew, or set the terminal to UTF-8") from error


def _place(flag: str, text: str) -> str:
    """The name of a model, which may be a path.

    Raises:
        ModelUnavailable: if it is one that there cannot be.
    """
    if text.startswith("~") and expanded(text) == Path(text):
        raise ModelUnavailable(f"{flag} {text}: there is no home folder of that name: write the path out")
    try:
        refuse_impossible(text, flag)
    except BadInput as error:
        raise ModelUnavailable(str(error)) from error
    return text


def _require_working_folder() -> None:
    """Raises BadInput where somebody has removed it: most paths lead from there."""
    try:
        os.getcwd()
    except OSError as error:
        raise BadInput("the folder that grat is started in is gone: cd to one that is there") from error


def _number(flag: str, kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A parser of numbers whose complaint names the option; Typer's own words are longer and say less."""

    def parse(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            expected = "a whole number" if kind is int else "a number"
            raise BadInput(f"{flag} {text}: expected {expected}")
        return number

    return parse
