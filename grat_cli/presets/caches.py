"""Step caches: what a denoising step may take over from the steps before it, in place of computing it.

These are the caches of diffusers (0.42.1, `hooks/`), with its names and defaults; where a default is another, it says
whose. What they do to a transformer is in `grat_cli.attention.caching`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from grat_cli.errors import BadInput, choices
from grat_cli.presets.problems import invalid, problem_of, shown
from grat_cli.presets.section import Number, Section, as_tuple

_MOST_STEPS = 1_000
_LARGEST_TIMESTEP = 1_000


def _timesteps(value: Any) -> tuple[float, float]:
    """From `100-800` or `[100, 800]`."""
    parts = re.fullmatch(r"(\d{1,4})-(\d{1,4})", value, re.ASCII) if isinstance(value, str) else None
    ends = [int(part) for part in parts.groups()] if parts else value
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(type(end) in (int, float) for end in ends):
        first, last = map(float, ends)
        if 0 <= first < last <= _LARGEST_TIMESTEP:
            return first, last
    raise ValueError(f"expected timesteps from 0 to {_LARGEST_TIMESTEP}, such as 100-800, not {shown(value)}")


Timesteps = Annotated[tuple[float, float], BeforeValidator(_timesteps)]
SkipRange = Annotated[int, Field(ge=2, le=_MOST_STEPS)]
Steps = Annotated[int, Field(ge=0, le=_MOST_STEPS)]
Ratios = Annotated[
    tuple[Annotated[Number, Field(gt=0, le=100)], ...],
    BeforeValidator(as_tuple),
    Field(min_length=2, max_length=_MOST_STEPS),
]


class _Cache(Section):
    """What all caches have."""

    skipped: ClassVar[str] = "reused"
    """What happens to what is not computed."""

    @property
    def summary(self) -> str:
        """For people, with what differs from the defaults, such as `first-block, threshold 0.1`."""
        kind, *names = type(self).model_fields
        changed = [
            f"{name} {_text(value)}"
            for name in names
            if (value := getattr(self, name)) != type(self).model_fields[name].default
        ]
        return ", ".join([getattr(self, kind), *changed])


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(f"{end:g}" for end in value) if len(value) == 2 else f"of {len(value)} numbers"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


class FirstBlock(_Cache):
    """Computes the first block; where it says nearly the same as before, all others are taken over. Alone of all, it
    waits for the device at every call, to know.

    Attributes:
        threshold: mean change of the first block's residual, over its mean size, up to which nothing more is computed.
            0.08 is ParaAttention's for Flux, which this cache is from (`docs/source/en/optimization/para_attn.md` of
            diffusers, where 0.06 is that of HunyuanVideo); diffusers has 0.05.
    """

    kind: Literal["first-block"] = "first-block"
    threshold: Annotated[Number, Field(ge=0, le=10)] = 0.08


class Mag(_Cache):
    """Takes all blocks over for as long as the known change of their size from step to step adds up to little
    (MagCache, arXiv 2506.09045).

    Attributes:
        threshold: sum of these changes up to which nothing is computed.
        max_skip_steps: most steps in a row without computing.
        retention_ratio: share of the first steps that are computed.
        ratios: size of each step's residual over that of the step before; those of another number of steps are
            stretched. None for those that diffusers has for Flux.
        calibrate: whether to compute everything, and report the ratios of the run.
    """

    kind: Literal["mag"] = "mag"
    threshold: Annotated[Number, Field(ge=0, le=10)] = 0.06
    max_skip_steps: Annotated[int, Field(ge=1, le=_MOST_STEPS)] = 3
    retention_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.2
    ratios: Ratios | None = None
    calibrate: bool = False


class Taylor(_Cache):
    """Forecasts the output of each attention from its last computed ones (TaylorSeer, arXiv 2503.06923).

    Attributes:
        cache_interval: steps from one that is computed to the next.
        max_order: of the series; each order keeps one more output of each attention.
        disable_cache_before_step: first steps, which are computed; from nothing nothing is forecast.
        disable_cache_after_step: step from which on all are computed; None for none.
        use_lite_mode: whether the prediction is forecast as a whole, which keeps next to nothing, and computes next to
            nothing in steps between.
        taylor_factors_dtype: what is kept; `auto` is the transformer's own dtype, diffusers has bfloat16.
    """

    skipped: ClassVar[str] = "forecast"

    kind: Literal["taylor"] = "taylor"
    cache_interval: SkipRange = 5
    max_order: Annotated[int, Field(ge=0, le=4)] = 1
    disable_cache_before_step: Annotated[int, Field(ge=1, le=_MOST_STEPS)] = 3
    disable_cache_after_step: Steps | None = None
    use_lite_mode: bool = False
    taylor_factors_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Broadcast(_Cache):
    """Takes attention over in every other step (Pyramid Attention Broadcast, arXiv 2408.12588).

    Attributes:
        skip_range: steps from one that is computed to the next.
        timesteps: between which attention is taken over, of 1000 (noise) to 0.
        cross_skip_range: as `skip_range`, of attention to text alone; None computes it always.
    """

    kind: Literal["pab"] = "pab"
    skip_range: SkipRange = 2
    timesteps: Timesteps = (100.0, 800.0)
    cross_skip_range: SkipRange | None = None


class Faster(_Cache):
    """Forecasts attention in every other step from the two before (FasterCache, arXiv 2410.19355).

    The part of it that leaves out the calls of true guidance needs both in one batch, which no pipeline here makes.

    Attributes:
        skip_range: steps from one that is computed to the next.
        timesteps: between which attention is forecast, of 1000 (noise) to 0.
        weight: how much of the change between the two is added.
    """

    skipped: ClassVar[str] = "forecast"

    kind: Literal["faster"] = "faster"
    skip_range: SkipRange = 2
    timesteps: Timesteps = (0.0, 681.0)
    weight: Annotated[Number, Field(ge=0, le=1)] = 0.5


# They take the place of attentions, and so does what is carried over steps; the others that of whole blocks.
OF_ATTENTIONS = (Taylor, Broadcast, Faster)

Cache = FirstBlock | Mag | Taylor | Broadcast | Faster
KINDS: Mapping[str, type[Cache]] = {
    str(kind.model_fields["kind"].default): kind for kind in (FirstBlock, Mag, Taylor, Broadcast, Faster)
}


def cache_from(value: Any) -> Cache | None:
    """A cache from what a preset says: a kind alone, a section with its `kind`, or null.

    Raises:
        ValueError, PydanticCustomError: if it is none.
    """
    if value is None or isinstance(value, tuple(KINDS.values())):
        return value
    section = {"kind": value} if isinstance(value, str) else value
    if not isinstance(section, dict):
        raise ValueError(f"expected {', '.join(KINDS)}, or a section with a kind, not {shown(value)}")
    kind = section.get("kind")
    if kind is None:
        raise invalid(f"is missing: {choices('', KINDS)}", "kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise invalid(f"unknown value {shown(kind)}: {choices(str(kind), KINDS)}", "kind")
    try:
        return KINDS[kind].model_validate(section)
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        raise invalid(problem.message, *problem.path) from error


def cache_from_text(text: str, option: str) -> Cache | None:
    """A cache as it is typed: `taylor`, `taylor:cache_interval=3,max_order=2`, or `none`; colons do for commas.

    Args:
        text: what is typed.
        option: that it is typed for.

    Raises:
        BadInput: naming the nearest kind, or what is wrong with a value.
    """
    word, _, rest = text.partition(":")
    if word == "none" and not rest:
        return None
    if word not in KINDS:
        raise BadInput(f"{option} {text}: {choices(word, (*KINDS, 'none'))}")
    section: dict[str, Any] = {"kind": word}
    names = [name for name in KINDS[word].model_fields if name != "kind"]
    for item in re.split("[,:]", rest) if rest else ():
        name, equals, value = item.partition("=")
        if name not in names:
            raise BadInput(f"{option} {text}: {word} has no {name!r}: {choices(name, names)}")
        if not equals or not value.strip():
            raise BadInput(f"{option} {text}: expected {name}=VALUE")
        if name in section:
            raise BadInput(f"{option} {text}: {name} is given twice")
        section[name] = _typed(value)
    try:
        return cache_from(section)
    except ValueError as error:
        raise BadInput(f"{option} {text}: {_where(error)}") from error


def _typed(value: str) -> Any:
    """A number, true, false or null as YAML has them; else the text."""
    try:
        return yaml.safe_load(value) if re.fullmatch(r"[\w.+-]{1,40}", value, re.ASCII) else value
    except (yaml.YAMLError, ValueError):
        return value


def _where(error: ValueError) -> str:
    context = getattr(error, "context", None) or {}
    path = ".".join(map(str, context.get("path", ())))
    return f"{path}: {context['message']}" if path else str(context.get("message", error))
