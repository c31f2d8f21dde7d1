"""What a preset may say: what to attend, when, with which kernel, and how to sample.

Validation is strict (text is not a number, a number is not text) and complete: a valid preset can be planned, up to
what depends on the grid. `grat_cli.presets` reads the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, cached_property
from importlib.resources import files
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_validator,
)

from grat_cli.errors import choices
from grat_cli.presets.attention import LARGEST_COUNT, Attention, Change, Sizes
from grat_cli.presets.caches import OF_ATTENTIONS, Cache, cache_from
from grat_cli.presets.over_steps import OverSteps, overlap
from grat_cli.presets.problems import invalid, nesting_sizes, problem_of, shape_text, shown
from grat_cli.presets.section import MOST_STEPS, Number, Range, Section, as_tuple
from grat_kernels.geometry import nests

BackendName = Literal["auto", "reference", "sdpa", "flex", "triton", "gluon"]
HighresMode = Literal["off", "cascade", "direct"]
PositionsName = Literal["none", "ntk", "yarn", "dype"]

BACKENDS: tuple[str, ...] = get_args(BackendName)
HIGHRES_MODES: tuple[str, ...] = get_args(HighresMode)
SMALLEST_CHUNK, _LARGEST_CHUNK = 256, 1_000_000_000
_SMALLEST_GROWTH = 1.1  # each stage makes a picture
_MOST_RULES, _MOST_LEVELS, _MOST_LAYERS, _LONGEST_TEXT, _LONGEST_NAME = 1000, 16, 1000, 10_000, 100
# Above so many image tokens (2,896 pixels a side with Flux) wide results take more memory than attention; chunks of
# the second size keep any device busy.
_MANY_TOKENS, _AUTO_CHUNK = 32_768, 16_384


@cache
def axes_by_model() -> Mapping[str, int]:
    """Axes of the token grid by what presets may be made for: as in the `full` preset that comes with grat for it."""
    found = {}
    for file in sorted(files("grat_presets").iterdir(), key=lambda file: file.name):
        if file.name.endswith("-full.yaml"):
            preset = yaml.safe_load(file.read_text(encoding="utf-8"))
            found[preset["model"]] = len(preset["attention"]["group"])
    return found


def _known_model(value: str) -> str:
    if value not in axes_by_model():
        raise ValueError(f"unknown value {shown(value)}: {choices(value, axes_by_model())}")
    return value


def _amount(value: Any) -> int | float:
    if type(value) is int and 0 <= value <= LARGEST_COUNT:
        return value
    if type(value) is float and 0.0 <= value <= 1.0:
        return value
    raise ValueError(f"expected a count of steps such as 3 or a fraction such as 0.1, not {shown(value)}")


def _strength(value: Any) -> float | tuple[float, ...]:
    numbers = value if isinstance(value, list | tuple) else [value]
    if not numbers or not all(type(number) in (int, float) and 0 < number <= 1 for number in numbers):
        raise ValueError(
            f"expected a share above 0 and up to 1, or one per stage such as [0.7, 0.5], not {shown(value)}"
        )
    return tuple(map(float, numbers)) if isinstance(value, list | tuple) else float(value)


def _strength_or_none(value: Any) -> float | tuple[float, ...] | None:
    return None if value is None else _strength(value)


def _chunk_tokens(value: Any) -> int | str | None:
    if value is None or value == "auto" or (type(value) is int and SMALLEST_CHUNK <= value <= _LARGEST_CHUNK):
        return value
    raise ValueError(
        f"expected auto, null or a whole number from {SMALLEST_CHUNK} to {_LARGEST_CHUNK:,}, not {shown(value)}"
    )


def _share_or_none(value: Any) -> float | None:
    if value is None or (type(value) in (int, float) and 0 <= value <= 1):
        return value
    raise ValueError(f"expected a share from 0 to 1, such as 0.9, or 0 for none, not {shown(value)}")


Amount = Annotated[int | float, BeforeValidator(_amount)]
ChunkTokens = Annotated[int | Literal["auto"] | None, BeforeValidator(_chunk_tokens)]
Figure = Annotated[float, Field(allow_inf_nan=False, ge=-1e15, le=1e15)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Text = Annotated[str, Field(max_length=_LONGEST_TEXT)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(as_tuple), Field(max_length=_MOST_RULES)]
Letter = Annotated[str, Field(pattern=r"^[A-Za-z]$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z]+$", max_length=_MOST_LAYERS)]


class Rule(Change):
    """Overrides the attention for some steps, layers and heads; ranges as in `ranges`, absent means all."""

    steps: Range = None
    layers: Range = None
    heads: Range = None


class Table(Section):
    """Which attention of the palette each layer and head takes; the compact form of many rules.

    Attributes:
        steps: when, a range; absent means always.
        layers: a word for each layer, with a letter of the palette for each head, or one for all of them.
    """

    steps: Range = None
    layers: Annotated[tuple[Word, ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=_MOST_LAYERS)]


def _over_steps(value: Any) -> Any:
    """One section stands for a list of it alone, and null for none."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(value)
    try:
        return (OverSteps.model_validate(value),)
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        raise invalid(problem.message, *problem.path) from error


class Schedule(Section):
    """When the attention differs from the preset's own.

    Attributes:
        dense_steps: first steps with full attention in all layers, before any rule; a count or a fraction.
        palette: attentions by letter, each as it differs from the preset's own.
        tables: what each layer and head takes of the palette; later ones win.
        rules: overrides of all that; later rules win.
        over_steps: at which steps it is computed at all, by ranges of layers that share none; `dense_steps` are
            references.
    """

    dense_steps: Amount = 0
    palette: dict[Letter, Change] = Field(default_factory=dict)
    tables: Annotated[tuple[Table, ...], BeforeValidator(as_tuple), Field(max_length=_MOST_RULES)] = ()
    rules: Annotated[tuple[Rule, ...], BeforeValidator(as_tuple), Field(max_length=_MOST_RULES)] = ()
    over_steps: Annotated[tuple[OverSteps, ...], BeforeValidator(_over_steps), Field(max_length=_MOST_RULES)] = ()

    @model_validator(mode="after")
    def _check_layers_apart(self) -> Schedule:
        for later, section in enumerate(self.over_steps):
            for earlier, other in enumerate(self.over_steps[:later]):
                if overlap(section.layers, other.layers):
                    raise invalid(
                        f"shares layers with entry {earlier} of the list: give each layer to one of them",
                        *("over_steps", later, "layers"),
                    )
        return self

    @property
    def tells_heads_apart(self) -> bool:
        """Whether heads of a layer may attend differently."""
        words = (word for table in self.tables for word in table.layers)
        return any(rule.heads is not None for rule in self.rules) or any(len(word) > 1 for word in words)

    @field_serializer("over_steps", mode="wrap")
    def _write_one_as_it_is_given(self, value: Any, write: SerializerFunctionWrapHandler) -> Any:
        sections = write(value)
        return (sections[0] if sections else None) if len(sections) < 2 else sections


class Kernel(Section):
    """How attention is computed."""

    backend: BackendName = "auto"


class Sampling(Section):
    """How the picture is sampled; None leaves the model's own value."""

    steps: Steps = 28
    guidance: Annotated[Number, Field(ge=0)] | None = None
    shift: Annotated[Number, Field(gt=0)] | None = None


class StageOverride(Section):
    """What differs in one stage of a cascade; None leaves what stands elsewhere in the preset.

    Attributes:
        strength: in place of `highres.strength`.
        steps: in place of `highres.steps`.
        attention: in place of the preset's own, or of full attention in a short stage.
        schedule: in place of the preset's own.
    """

    strength: Annotated[float | None, BeforeValidator(_strength_or_none)] = None
    steps: Steps | None = None
    attention: Attention | None = None
    schedule: Schedule | None = None


class HighResolution(Section):
    """How pictures larger than the model was trained at come about.

    Attributes:
        mode: `cascade` makes a picture of the trained area and redoes it at growing sizes; `direct` makes the asked
            size from noise, with positions and attention fitted to it; `off` leaves everything as at the trained size.
        growth: side of a stage over that of the one before, about; None goes from the base to the asked size at once.
        upscale: between stages, `pixel` (decode, Lanczos, encode) or `latent` (bicubic).
        strength: share of a stage's steps that are run on the upscaled picture, one number or one per stage.
        steps: of a stage, before strength; None for those of `sampling`.
        guidance: of the stages; None for that of `sampling`.
        shift: fixed time shift of the stages; None for that of `sampling`, or the model's own.
        positions: how rotary frequencies are fitted to more tokens (`grat_cli.attention.extrapolation`).
        proportional_attention: whether scores are scaled by the number of keys (`grat_cli.attention.extrapolation`).
        low_resolution_guidance: weight of the upscaled picture's low frequencies in each prediction (I-Max, arXiv
            2410.07536).
        dense_below: stages of at most so many image tokens compute full attention at every step, as the base does: the
            whole schedule, `over_steps` included, is that of larger ones.
        stages: overrides of the stages after the base, first to last.
    """

    mode: HighresMode = "cascade"
    growth: Annotated[Number, Field(ge=_SMALLEST_GROWTH)] | None = 2.0
    upscale: Literal["pixel", "latent"] = "pixel"
    strength: Annotated[float | tuple[float, ...], BeforeValidator(_strength)] = 0.6
    steps: Steps | None = None
    guidance: Annotated[Number, Field(ge=0)] | None = None
    shift: Annotated[Number, Field(gt=0)] | None = None
    positions: PositionsName = "ntk"
    proportional_attention: bool = True
    low_resolution_guidance: Annotated[Number, Field(ge=0, le=1)] = 0.0
    dense_below: Annotated[int, Field(ge=0, le=_LARGEST_CHUNK)] = 8192
    stages: Annotated[tuple[StageOverride, ...], BeforeValidator(as_tuple), Field(max_length=_MOST_LEVELS)] = ()


class Memory(Section):
    """What keeps large runs within memory.

    Attributes:
        chunk_tokens: feed-forward and modulation run on at most so many tokens at once; None on all; `auto` on all up
            to 32,768 image tokens, on 16,384 above.
    """

    chunk_tokens: ChunkTokens = "auto"


def chunk_for(wanted: int | Literal["auto"] | None, tokens: int) -> int | None:
    """How many tokens at most run through feed-forward and modulation at once, of so many; None for all.

    Args:
        wanted: see `Memory`.
        tokens: image tokens.
    """
    if wanted == "auto":
        return _AUTO_CHUNK if tokens > _MANY_TOKENS else None
    return wanted


class PatternEvidence(Section):
    """A pattern of a tuned preset, and what it would keep were it used throughout.

    Attributes:
        attention: what it is.
        share: of steps, layers and heads alike that take it.
        density: attended pairs over all pairs.
        recall: softmax mass of full attention on what is attended token by token, text included.
        output_error: root mean square of the distance from full attention's output, over that output's length.
        loss: mean square of that distance itself.
    """

    attention: Text
    share: Figure
    density: Figure
    recall: Figure
    output_error: Figure
    loss: Figure


class CheckEvidence(Section):
    """How close outputs of a tuned preset came to those of full attention, from the same prompts and seeds.

    Attributes:
        prompts: that were compared.
        density: of these runs.
        ssim: mean over the outputs.
        ssim_interval: half of its 95 % interval; None of a single output.
        psnr_db: mean over the outputs.
    """

    prompts: Texts
    density: Figure
    ssim: Figure
    ssim_interval: Figure | None = None
    psnr_db: Figure


class OverStepsEvidence(Section):
    """How a search over steps went.

    Attributes:
        references: steps that are computed, of the runs that were observed.
        slopes: that outputs are carried with after each of them; 0 where none are, or they are reused as they are.
        kept_bytes: what a run keeps from step to step.
        pairs: attention work of a run by part, over all pairs: of image tokens as queries; the first three add up to
            the density.
        text: of text as queries.
        selection: of choosing by content.
        forming: of means.
        prompts: whose latents were measured.
        runs: that were measured.
        error: mean square of the distance of the last latents from those of full attention, over the variance of these;
            mean over the prompts. None where nothing was measured.
        carried_error: the same of full attention at the references that were tried first: what carrying alone does.
    """

    references: Annotated[tuple[int, ...], BeforeValidator(as_tuple), Field(max_length=_MOST_RULES)]
    slopes: Annotated[tuple[Figure, ...], BeforeValidator(as_tuple), Field(max_length=_MOST_RULES)]
    kept_bytes: Annotated[int, Field(ge=0, le=10**15)]
    pairs: Figure
    text: Figure
    selection: Figure
    forming: Figure
    prompts: Texts
    runs: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
    error: Figure | None = None
    carried_error: Figure | None = None


class Evidence(Section):
    """What a tuned preset rests on; it changes nothing.

    Attributes:
        model: that was observed.
        revision: of its weights, where known.
        size: of the outputs.
        tokens: image tokens on each axis.
        text_tokens: of the joint sequence.
        steps: of each run.
        prompts: that were observed.
        target: what was wanted.
        density: foretold for the whole run.
        recall: likewise, of the steps that are computed; see `PatternEvidence`.
        output_error: likewise.
        loss: likewise.
        patterns: those in use, sparsest first.
        over_steps: None where every step is computed.
        check: None where nothing was checked.
    """

    model: Text
    revision: Text | None = None
    size: Text
    tokens: Sizes
    text_tokens: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
    steps: Steps
    prompts: Texts
    target: Text
    density: Figure
    recall: Figure
    output_error: Figure
    loss: Figure
    patterns: Annotated[tuple[PatternEvidence, ...], BeforeValidator(as_tuple), Field(max_length=_MOST_RULES)]
    over_steps: OverStepsEvidence | None = None
    check: CheckEvidence | None = None


class Preset(Section):
    """A resolved preset.

    Attributes:
        model: which models it is made for; see `axes_by_model`.
        highres: how large pictures come about; None takes the defaults of the section.
        guard: share of full attention that each layer has to keep: those that keep less, by what is measured while the
            run goes on, go wider (`grat_cli.attention.guard`), in every stage; where less would have been carried over
            steps, references come twice as often. 0 or None for no guard.
        cache: what steps take over from those before them, in every stage; None for nothing.
        evidence: of a tuned one.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=_LONGEST_NAME)]
    description: Text = ""
    model: Annotated[str, AfterValidator(_known_model)]
    attention: Attention
    schedule: Schedule = Schedule()
    kernel: Kernel = Kernel()
    sampling: Sampling = Sampling()
    memory: Memory = Memory()
    highres: HighResolution | None = None
    guard: Annotated[float | None, BeforeValidator(_share_or_none)] = None
    cache: Annotated[Cache | None, BeforeValidator(cache_from)] = None
    evidence: Evidence | None = None

    @model_validator(mode="after")
    def _check_axes_and_nesting(self) -> Preset:
        axes = axes_by_model()[self.model]
        if len(self.attention.group) != axes:
            raise invalid(
                f"expected {axes} sizes for {self.model}, not {shown(self.attention.group)}", "attention", "group"
            )
        for path, attention in self._derived.items():
            if len(attention.group) != axes:
                raise invalid(f"the tokens of {self.model} models have {axes} axes", "schedule", *path, "group")
        cells = self.cells
        for outer, inner in pairwise(cells):
            if not nests(inner, outer):
                raise invalid(
                    "a run has one token order, so all groups and blocks must nest, "
                    f"but {shape_text(inner)} does not in {shape_text(outer)}: use {nesting_sizes(inner, outer)}",
                    "schedule",
                )
        return self

    @model_validator(mode="after")
    def _check_tables(self) -> Preset:
        palette = self.schedule.palette
        for index, table in enumerate(self.schedule.tables):
            for number, word in enumerate(table.layers):
                for letter in sorted(set(word) - set(palette)):
                    raise invalid(
                        f"{letter} is none of the palette's letters, {', '.join(palette) or 'which has none'}",
                        *("schedule", "tables", index, "layers", number),
                    )
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> Preset:
        if self.schedule.over_steps and isinstance(self.cache, OF_ATTENTIONS):
            raise invalid(
                f"{self.cache.kind} and schedule.over_steps take the same place: leave out one of the two", "cache"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Preset:
        if self.highres is None:
            return self
        if (axes := len(self.attention.group)) > 2:
            raise invalid(f"{self.model} models make videos, which have {axes} axes: leave it out", "highres")
        for index in range(len(self.highres.stages)):
            self.of_stage(index)
        return self

    def of_stage(self, index: int) -> Preset:
        """The preset with attention and schedule as the override of a stage has them, and no stages of its own.

        Raises:
            ValidationError: if they do not fit each other.
        """
        override = self.highres.stages[index] if self.highres and index < len(self.highres.stages) else StageOverride()
        changes = {name: value for name in ("attention", "schedule") if (value := getattr(override, name)) is not None}
        data = {**self.model_dump(), **{name: section.model_dump() for name, section in changes.items()}}
        try:
            return Preset.model_validate({**data, "highres": None})
        except ValidationError as error:
            problem = problem_of(error.errors()[0])
            raise invalid(problem.message, "highres", "stages", index, *problem.path) from error

    @cached_property
    def _derived(self) -> dict[tuple[str | int, ...], Attention]:
        """What rules, palette and bases make of the preset's attention, by where they stand in the schedule."""
        places: dict[tuple[str | int, ...], Change] = {
            ("rules", number): rule for number, rule in enumerate(self.schedule.rules)
        }
        places |= {("palette", letter): change for letter, change in self.schedule.palette.items()}
        sections = self.schedule.over_steps
        for number, section in enumerate(sections):
            if section.base is not None:
                at = (number,) if len(sections) > 1 else ()
                places[("over_steps", *at, "base")] = section.base
        derived = {}
        for place, change in places.items():
            try:
                derived[place] = self.attention.changed(change.changes)
            except ValidationError as error:
                problem = problem_of(error.errors()[0])
                raise invalid(problem.message, "schedule", *place, *problem.path) from error
        return derived

    @property
    def attention_of_rules(self) -> tuple[Attention, ...]:
        """What each rule of the schedule makes of the preset's attention."""
        return tuple(attention for (section, *_), attention in self._derived.items() if section == "rules")

    @property
    def attention_of_palette(self) -> dict[str, Attention]:
        """What each letter of the schedule's palette makes of it."""
        return {str(at[-1]): made for (section, *at), made in self._derived.items() if section == "palette"}

    @property
    def bases_of_over_steps(self) -> tuple[Attention | None, ...]:
        """What the base of each of the schedule's `over_steps` makes of it; None where there is none."""
        made = iter(attention for (section, *_), attention in self._derived.items() if section == "over_steps")
        return tuple(None if section.base is None else next(made) for section in self.schedule.over_steps)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The preset's own attention, and all that rules, palette and bases make of it."""
        return (self.attention, *self._derived.values())

    @property
    def chooses(self) -> bool:
        """Whether anything of it chooses by content what it attends."""
        return any(attention.far is not None and attention.far.choose is not None for attention in self.attentions)

    @cached_property
    def cells(self) -> tuple[tuple[int, ...], ...]:
        """All groups and blocks of the preset and its schedule, coarsest first: the token order of the run."""
        sizes = {cell for attention in self.attentions for cell in attention.cells}
        return tuple(sorted(sizes, key=lambda cell: (math.prod(cell), cell), reverse=True))
