"""What is known of each model family, one file each; `base` says what a family is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grat_cli.families.base import Family, Medium, ModelChoice
from grat_cli.families.flux import Flux
from grat_cli.families.flux2 import Flux2
from grat_cli.families.hunyuan import Hunyuan
from grat_cli.families.hunyuan15 import Hunyuan15
from grat_cli.families.qwen import Qwen
from grat_cli.families.wan import Wan

_FAMILIES = Flux(), Flux2(), Qwen(), Hunyuan(), Hunyuan15(), Wan()
FAMILIES: Mapping[str, Family] = {family.name: family for family in _FAMILIES}


def family_of(model: ModelChoice) -> Family:
    """The family that a model belongs to."""
    return FAMILIES[model.family]


def family_of_pipeline(class_name: Any) -> Family | None:
    """The family that supports a pipeline class; None where none does."""
    return next((family for family in FAMILIES.values() if class_name in family.pipelines), None)


def family_of_transformer(transformer: Any) -> Family | None:
    """The family that a transformer, or what `torch.compile` made of one, belongs to; None where none knows it."""
    kinds = type(getattr(transformer, "_orig_mod", transformer)).__mro__
    return next((family for kind in kinds for family in FAMILIES.values() if family.transformer == kind.__name__), None)


def families_of(medium: Medium) -> tuple[Family, ...]:
    """The families that make pictures, or videos."""
    return tuple(family for family in FAMILIES.values() if family.medium == medium)


def family_of_class(class_name: str) -> Family:
    """The family that a transformer class belongs to.

    Raises:
        KeyError: if there is none.
    """
    return {family.transformer: family for family in FAMILIES.values()}[class_name]


def family_of_presets(model: str) -> Family:
    """The family that presets with this name as their `model` are made for."""
    return {name: family for family in FAMILIES.values() for name in family.presets}[model]


def preset_variants() -> Mapping[str, tuple[str, ...]]:
    """Variants of the presets that come with grat, by the name that they give as their `model`."""
    return {model: variants for family in FAMILIES.values() for model, variants in family.presets.items()}
