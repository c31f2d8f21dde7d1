"""Which kinds of pictures a model takes, how they are typed, and what to say where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping

from grat_cli.errors import BadInput
from grat_cli.families import families_of
from grat_cli.families.base import Medium, ModelChoice, PictureKind

OPTIONS: Mapping[PictureKind, str] = {
    "start": "--init-image",
    "mask": "--mask",
    "control": "--control",
    "reference": "--reference",
}
"""What each kind is typed as, in the order in which they are told."""


def models_that_take(kind: PictureKind, medium: Medium) -> list[str]:
    """Names of the known models of a medium that take pictures of a kind."""
    models = [model for family in families_of(medium) for model in family.models]
    return [model.name for model in models if kind in model.takes]


def refuse_pictures(
    model: ModelChoice,
    kinds: frozenset[PictureKind],
    *,
    references: int = 0,
    strength: float | None = None,
    negative_prompt: str | None = None,
) -> None:
    """Makes sure, before any file is looked at, that a model takes what is given, and is given what it needs.

    Args:
        model: which.
        kinds: of the pictures that are given.
        references: how many to refer to.
        strength: as typed.
        negative_prompt: likewise.

    Raises:
        BadInput: if not, with the models that do, or what to add or leave out.
    """
    for kind, option in OPTIONS.items():
        if kind in kinds and kind not in model.takes:
            names = models_that_take(kind, model.medium)
            others = f"give --model {'one of ' * (len(names) > 1)}{', '.join(names)}, or" if names else ""
            others = others or f"no model of {model.medium}s does,"
            raise BadInput(f"{model.name} takes no {option}: {others} leave it out")
    if lacking := model.needs - kinds:
        needed, added = _options(model.needs), _options(lacking)
        raise BadInput(f"{model.name} needs {needed}: add {added}, or choose another --model")
    if "mask" in kinds and "start" not in kinds:
        raise BadInput("--mask says where a picture is made anew: add the picture with --init-image FILE")
    ways = [option for kind, option in OPTIONS.items() if kind in kinds and kind != "mask"]
    if len(ways) > 1:
        raise BadInput(f"{' and '.join(ways)} are not given at once: leave out all but one")
    if references > model.most_references:
        at_most = "one picture" if model.most_references == 1 else f"{model.most_references} pictures"
        raise BadInput(f"{model.name} refers to {at_most} at once, not {references}: give --reference less often")
    if strength is not None and kinds and not model.redoes(kinds):
        raise BadInput(
            f"--strength is for a picture that is redone, and {model.name} takes {_options(kinds)} as given: "
            "leave it out"
        )
    if negative_prompt is not None and not model.takes_negative:
        raise BadInput(f"{model.name} takes no negative prompt: leave out --negative")


def _options(kinds: frozenset[PictureKind]) -> str:
    return " and ".join(f"{option} FILE" for kind, option in OPTIONS.items() if kind in kinds)
