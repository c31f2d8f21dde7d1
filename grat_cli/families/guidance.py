"""How strongly, and by which of two means, a picture or video is steered towards its prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grat_cli.families import family_of
from grat_cli.families.base import ModelChoice
from grat_cli.presets import Preset

# On top of distilled guidance, which steers towards the prompt already, little is needed to steer away from another.
NEGATIVE_PROMPT_SCALE = 2.0


@dataclass(frozen=True)
class Guidance:
    """Arguments of a pipeline call.

    Attributes:
        scale: what steers, for reports; None where nothing does.
        arguments: of the pipeline call.
        negative_prompt: to be encoded for true classifier-free guidance, which calls the transformer twice per step;
            None for one call.
        notes: for the user.
    """

    scale: float | None
    arguments: dict[str, float] = field(default_factory=dict)
    negative_prompt: str | None = None
    notes: tuple[str, ...] = ()


def encoded_negative(model: ModelChoice, preset: Preset, negative_prompt: str | None) -> str | None:
    """The negative prompt of `choose_guidance`, which is known before a model is loaded."""
    if not model.true_guidance:
        return negative_prompt
    given = preset.sampling.guidance
    scale = model.default_guidance if given is None else given
    if scale is None or scale <= 1:
        return None
    return model.negative_prompt if negative_prompt is None else negative_prompt


def calls_per_step(model: ModelChoice, preset: Preset, negative_prompt: str | None) -> int:
    """Transformer calls of a step, by the guidance of `choose_guidance`; known before a model is loaded."""
    return 1 if encoded_negative(model, preset, negative_prompt) is None else 2


def choose_guidance(pipe: Any, model: ModelChoice, preset: Preset, negative_prompt: str | None) -> Guidance:
    """The guidance for a model.

    Some models are guided by true classifier-free guidance, with a negative prompt of their own or an empty one; some
    have guidance distilled into an embedding; some take none. A negative prompt always means true classifier-free
    guidance.
    """
    family, given = family_of(model), preset.sampling.guidance
    scale = model.default_guidance if given is None else given
    if model.true_guidance:
        negative = encoded_negative(model, preset, negative_prompt)
        if negative is None:
            ignored = ("without guidance above 1 the negative prompt has no effect",) if negative_prompt else ()
            return Guidance(None, family.guided(model, None), notes=ignored)
        return Guidance(scale, family.guided(model, scale), negative)

    if pipe.transformer.config.guidance_embeds:
        embedded = {"guidance_scale": 0.0 if scale is None else scale}
        if negative_prompt is None:
            return Guidance(scale, embedded)
        note = f"the negative prompt takes a second transformer call per step, with a scale of {NEGATIVE_PROMPT_SCALE}"
        return Guidance(scale, embedded | {"true_cfg_scale": NEGATIVE_PROMPT_SCALE}, negative_prompt, (note,))

    if negative_prompt is not None:
        scale = scale if scale is not None and scale > 1 else NEGATIVE_PROMPT_SCALE
        note = f"the negative prompt takes a second transformer call per step, with a scale of {scale}"
        return Guidance(scale, {"true_cfg_scale": scale}, negative_prompt, (note,))
    ignored = (f"{model.name} takes no guidance: {given} is not used",) if given else ()
    return Guidance(None, {"guidance_scale": 0.0}, notes=ignored)
