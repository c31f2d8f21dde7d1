"""Which preset a command runs with: from `--preset`, `--variant`, `--set` and the other flags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from grat_cli.errors import BadInput, choices
from grat_cli.families import family_of, family_of_presets
from grat_cli.families.base import Medium, ModelChoice
from grat_cli.models.catalogue import medium_of_name
from grat_cli.presets import VARIANTS, Preset, Sampling, load_preset, preset_names, resolve_preset

RECOMMENDED = "far"

# What of a preset says what it is, and what is attended when.
_OF_ATTENTION = {"name", "description", "model", "attention", "schedule", "evidence"}

DTYPES = ("auto", "float32", "bfloat16", "float16")


def select_preset(
    model: ModelChoice,
    *,
    preset: str | None = None,
    variant: str | None = None,
    group: str | None = None,
    radius: str | None = None,
    share: int | None = None,
    backend: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    highres: str | None = None,
    guard: float | None = None,
    cache: str | None = None,
    set_items: Sequence[str] = (),
    then: tuple[Preset, ModelChoice | None] | None = None,
) -> Preset:
    """The resolved preset of a run.

    Without `preset`, `variant` names one of the presets for the model's family; with it, `variant` replaces the
    preset's own. On videos `x` is short for `planes`, as the authors of GRAT-X published it, or with a share of 2 for
    `lines`. A preset that comes with grat serves all models of a family, so steps, guidance and shift are the model's.

    Of an output that is repeated, `then` is its preset and its model, None of one that is not known any more: what is
    not typed stays as it was, but for what only followed from another model or preset.

    Raises:
        BadInput: naming the option that does not fit.
    """
    variants = family_of(model).presets[model.presets]
    usual = None if then is None else _usual(*then)
    if then is not None and usual is not None and preset is None and variant is None and then[1] != model:
        word = usual.name.removeprefix(f"{usual.model}-")  # the same, of another model
        variant = word if word in variants else None
    elif then is not None and preset is None and (variant is None or usual is None):
        preset = then[0].name
    if preset is None:
        if variant == "x" and variant not in variants:
            variant = "lines" if share == 2 else "planes"
        if variant is not None and variant not in variants:
            raise BadInput(f"there is no variant {variant!r}: {choices(variant, variants)}")
        base = load_preset(f"{model.presets}-{variant or RECOMMENDED}")
        variant = None
    else:
        as_then = then is not None and preset == then[0].name
        base = then[0] if then is not None and as_then else load_preset(preset)
        if variant is not None and variant not in VARIANTS and variant in variants:
            raise BadInput(
                f"--variant {variant} is short for the preset {model.presets}-{variant}: leave out --preset, "
                f"or choose from {', '.join(VARIANTS)}"
            )
    if len(base.attention.group) != family_of(model).axes:
        raise BadInput(f"preset {base.name} is for {base.model} models, {model.name} is not one: see grat presets")
    if base.name in preset_names() and not (then is not None and base is then[0]):
        shift = model.default_shift if base.sampling.shift is None else base.sampling.shift
        sampling = Sampling(steps=model.default_steps, guidance=model.default_guidance, shift=shift)
        base = base.model_copy(update={"sampling": sampling})
    if then is not None and usual is not None and base is not then[0]:
        base = base.model_copy(update=_typed(then[0], usual, base))
    return resolve_preset(
        base,
        set_items=set_items,
        variant=variant,
        group=_sizes("--group", group, "16, 16x16 or 4x8x8"),
        radius=_sizes("--radius", radius, "2, 1x2 or 1x2x2"),
        share=share,
        backend=backend,
        steps=steps,
        guidance=guidance,
        highres=highres,
        guard=guard,
        cache=cache,
    )


def _usual(then: Preset, model: ModelChoice | None) -> Preset | None:
    """A preset as it is where nothing is typed; None of one that did not come with grat, or of an unknown model."""
    return select_preset(model, preset=then.name) if model is not None and then.name in preset_names() else None


def _typed(then: Preset, usual: Preset, base: Preset) -> dict[str, Any]:
    """What was typed for another preset besides its attention, for one that takes its place."""
    sections = Preset.model_fields.keys() - _OF_ATTENTION - {"sampling"}
    typed = {name: getattr(then, name) for name in sections if getattr(then, name) != getattr(usual, name)}
    pairs = zip(then.sampling, usual.sampling, strict=True)
    sampling = {name: value for (name, value), (_, other) in pairs if value != other}
    return {**typed, "sampling": base.sampling.model_copy(update=sampling)}


def choose_medium(model: str | None, made_for: str | None, of_video: bool) -> Medium:
    """What a command is to make that makes either.

    Args:
        model: `--model`, None where it was not given.
        made_for: `model` of a given preset, None without one.
        of_video: whether other options are those of videos.
    """
    media = (made_for and family_of_presets(made_for).medium, model and medium_of_name(model))
    return "video" if of_video or "video" in media else "image"


def variant_word(preset: Preset) -> str:
    """The variant in a file's name: `b`, `planes`, or `b-far` with a far field."""
    attention = preset.attention
    word: str = attention.variant
    if word == "x" and len(attention.group) == 3:
        word = {1: "planes", 2: "lines"}.get(attention.share or 1, word)
    return word + ("-far" if attention.far else "")


def mismatch_note(preset: Preset, model: ModelChoice) -> str | None:
    """A sentence where a preset is used on another family than it was made for; it may be meant, so it is no error."""
    if preset.model == model.presets:
        return None
    return (
        f"{preset.name} was made for {preset.model} models; grat presets {model.presets} lists those for {model.name}"
    )


def guard_note(preset: Preset, *, dense: bool) -> str | None:
    """A sentence on the guard of a run that has one.

    Args:
        preset: of the run.
        dense: whether all of its attention is full.
    """
    if not preset.guard:
        return None
    if dense:
        return f"guard {preset.guard:g} has nothing to do: all attention is full"
    carried = ", and where less is carried to a reference there are more" if preset.schedule.over_steps else ""
    return f"guard {preset.guard:g}: layers that keep less of full attention go wider{carried}, which takes longer"


def cache_note(preset: Preset) -> str | None:
    """A sentence on the cache of a run that has one."""
    return preset.cache and f"cache {preset.cache.summary}: what steps do not compute is {preset.cache.skipped}"


def require_choice(option: str, word: str | None, known: Sequence[str]) -> None:
    """Raises BadInput, naming the nearest, unless a word is a known one; None stands for an option not given."""
    if word is not None and word not in known:
        raise BadInput(f"{option} {word}: {choices(word, known)}")


def require_backend(name: str, device: str, dtype: str, head_dim: int, tokens: int, *, choosing: bool = False) -> None:
    """Makes sure that a backend chosen by name can run, which is known long before the model is loaded.

    Args:
        name: of the backend; `auto` always runs.
        device: as for `devices.choose_device`.
        dtype: as for `devices.choose_dtype`.
        head_dim: channels per head.
        tokens: length of the joint sequence.
        choosing: whether groups choose by content what they attend.

    Raises:
        BadInput: if it cannot run here, with the reason.
    """
    if name == "auto":
        return
    from grat_cli.installation import backend_for
    from grat_cli.models.devices import choose_device, choose_dtype

    chosen_device = choose_device(device)
    backend_for(name, chosen_device, choose_dtype(dtype, chosen_device), head_dim, tokens, choosing=choosing)


def require_device(name: str | None) -> None:
    """Raises BadInput unless a name is that of a device, or None; whether it exists here is for torch to say."""
    if name is not None and not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,2})?", name, re.ASCII):
        raise BadInput(f"--device {name}: {choices(name, ('auto', 'cpu', 'cuda', 'cuda:1', 'mps'))}")


def _sizes(option: str, text: str | None, example: str) -> int | tuple[int, ...] | None:
    """`16` is a number for all axes, `4x8x8` one per axis."""
    if text is None:
        return None
    if not re.fullmatch(r"-?\d{1,6}(x-?\d{1,6})*", text, re.ASCII):
        raise BadInput(f"{option} {text}: expected whole numbers such as {example}")
    numbers = tuple(int(part) for part in text.split("x"))
    return numbers[0] if len(numbers) == 1 else numbers
