"""Which attention runs at which step in which layer and head of one run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from enum import IntEnum
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from grat_cli.errors import BadInput
from grat_cli.presets import LARGEST_COUNT, Attention, Preset, Table, ranges, shape_text
from grat_cli.presets.over_steps import Keep
from grat_kernels import Full, Grid, Grouping, HeadPlan, Pattern, Plan, Segments, build_head_plan, build_plan
from grat_kernels.geometry import IntArray, cell_counts
from grat_kernels.plan import Parts

# Planning compares every group with every other, a stretch at a time: memory stays small, time grows with the square.
# 2^14 groups, a million tokens in groups of 8x8, take 1.5 s of one core; a criss-cross of them has 133 million keys in
# packed tiles, 1.1 GB on the device.
MOST_GROUPS = 16_384

_Grouped: TypeAlias = tuple[Grouping, Pattern]
# Whose attention each head of a layer has (0 the preset's own, i its i-th rule's, -1 dense), and a `Width`.
_Entry: TypeAlias = tuple[tuple[int, ...], int]


class Width(IntEnum):
    """How far a layer has gone from the attention that the preset gives it."""

    OWN = 0
    WIDER = 1
    """The next wider pattern (`wider`), or full attention where that is none or attends everything."""
    FULL = 2


StepKind = Literal["reference", "carried", "mixed"]
STEP_KINDS: tuple[StepKind, ...] = ("reference", "carried", "mixed")


def kind_of_step(carried: Iterable[bool]) -> StepKind | None:
    """What a step is, given of each layer that is carried over steps whether it is carried to this one; `mixed` where
    layers differ, and None where there is no such layer."""
    found = set(carried)
    if not found:
        return None
    if len(found) > 1:
        return "mixed"
    return "carried" if True in found else "reference"


class Carried(NamedTuple):
    """How a layer's attention is carried over steps, at one of them.

    Attributes:
        is_reference: whether it is computed at the step, rather than carried to it.
        is_kept: whether a later step is one that it is carried to.
        slope: at the step, see `presets.OverSteps`; 0 where outputs are reused as they are.
        keep: where what is carried is kept, likewise.
        extrapolates: whether what is carried ever has a slope.
        base: what is computed at every step, and the rest carried; None where the whole is.
    """

    is_reference: bool
    is_kept: bool
    slope: float
    keep: Keep
    extrapolates: bool
    base: Plan | None


def wider(attention: Attention) -> Attention:
    """The next wider pattern over the same groups, far levels kept; full attention is its own.

    What is chosen by content keeps more of full attention than as much of what is near: a choice takes twice as many.
    """
    if attention.far and attention.far.choose:
        chosen = attention.far.choose
        twice = {name: min(2 * getattr(chosen, name), LARGEST_COUNT) for name in ("exact", "fine")}
        return attention.changed({"far": attention.far.model_copy(update={"choose": chosen.model_copy(update=twice)})})
    if attention.variant == "x":
        return attention.changed({"variant": "bx"})
    if attention.variant == "sta":
        return attention.changed({"window": _grown(attention.window, 2)})
    return attention if attention.variant == "full" else attention.changed({"radius": _grown(attention.radius, 1)})


def _grown(sizes: int | tuple[int, ...] | None, by: int) -> int | list[int]:
    assert sizes is not None, "the variant has them"
    return sizes + by if isinstance(sizes, int) else [size + by for size in sizes]


def segments_of(text_len: int, text_first: bool, references: int = 0) -> Segments:
    """What a model's joint sequence holds besides image tokens: text, and behind the image tokens of references."""
    if not references:
        return Segments.of_text(text_len, text_first)
    return Segments((text_len,), (references,), 0) if text_first else Segments((), (references, text_len), 1)


class AttentionSchedule:
    """A preset laid out over the steps, layers and heads of a run. All its plans share one token order.

    Of a joint sequence of `text_len` text tokens before or after the image tokens, and behind them `references` tokens
    of pictures to refer to, which attend everything and are attended by everything as text is. Where the
    preset's `over_steps` spaces its references by sigmas, these are `sigmas`, of each step and what the last one ends
    at, or even ones.

    Attributes:
        grid: the image tokens.
        steps: denoising steps of the run.
        layers: attention layers of the transformer.
        heads: heads of each.
        plans: the distinct plans, in order of first use.
        density: attended pairs over all pairs, mean over the run; those of layers that are carried to a step are none.

    Raises:
        BadInput: if preset and grid, steps, layers or heads do not fit.
    """

    def __init__(
        self,
        preset: Preset,
        grid: Grid,
        text_len: int,
        text_first: bool = True,
        steps: int = 1,
        layers: int = 1,
        heads: int = 1,
        references: int = 0,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self.grid, self.steps, self.layers, self.heads = grid, steps, layers, heads
        self._segments = segments_of(text_len, text_first, references)
        _refuse_unfit(preset, grid)
        cells = preset.cells
        self._groupings = {cell: Grouping(grid, cell, cells) for cell in cells}

        # Entry [step, layer, head] says whose attention applies: its number in this list, or -1 for dense.
        palette = preset.attention_of_palette
        attentions = (preset.attention, *preset.attention_of_rules, *palette.values())
        choice = np.zeros((steps, layers, heads), np.int64)
        number_of_letter = {letter: len(attentions) - len(palette) + at for at, letter in enumerate(palette)}
        for number, table in enumerate(preset.schedule.tables, start=1):
            at = _slice(table.steps, steps, "steps", f"table {number}", preset)
            choice[at] = _of_letters(table, number_of_letter, layers, heads, f"table {number} of preset {preset.name}")
        for number, rule in enumerate(preset.schedule.rules, start=1):
            choice[
                _slice(rule.steps, steps, "steps", f"rule {number}", preset),
                _slice(rule.layers, layers, "layers", f"rule {number}", preset),
                _slice(rule.heads, heads, "heads", f"rule {number}", preset),
            ] = number
        dense_steps = ranges.leading(preset.schedule.dense_steps, steps)
        if dense_steps > steps:
            raise BadInput(
                f"schedule.dense_steps is {dense_steps}, but the run has {steps} steps: "
                f"use fewer, or a fraction: --set schedule.dense_steps=0.1"
            )
        choice[:dense_steps] = -1
        self._lay_over_steps(preset, dense_steps, sigmas)

        # Plans that have been built, by what they were built from; those that are not in use wait for wider layers.
        self._attentions = attentions
        self._built: dict[_Grouped, Plan] = {}
        self._built_by_head: dict[tuple[_Grouped, ...], HeadPlan] = {}
        self._choice = choice
        self._lay_out(np.zeros((steps, layers), np.int64))

    def _lay_over_steps(self, preset: Preset, dense_steps: int, sigmas: Sequence[float] | None) -> None:
        """Which of the preset's `over_steps` each layer has, and where it is a reference, `[steps, sections]`."""
        self._sections = tuple(zip(preset.schedule.over_steps, preset.bases_of_over_steps, strict=True))
        self._section_of_layer: list[int | None] = [None] * self.layers
        self._is_reference = np.zeros((self.steps, len(self._sections)), bool)
        self._is_reference[:dense_steps] = True
        for number, (section, _) in enumerate(self._sections):
            name = f"over_steps {number + 1}" if len(self._sections) > 1 else "over_steps"
            covered = _slice(section.layers, self.layers, "layers", name, preset)
            for layer in range(self.layers)[covered]:
                if (other := self._section_of_layer[layer]) is not None:
                    raise BadInput(
                        f"over_steps {other + 1} and {number + 1} of preset {preset.name} both have layer {layer}: "
                        "give each layer to one of them"
                    )
                self._section_of_layer[layer] = number
            try:
                self._is_reference[list(section.reference_steps(self.steps, sigmas)), number] = True
            except ValueError as error:
                raise BadInput(
                    f"{name} of preset {preset.name} {error}: change its reference, or take it out"
                ) from error

    def widened(self, widths: IntArray, references: npt.NDArray[np.bool_] | None = None) -> AttentionSchedule:
        """This schedule with layers wider at some steps, and more references; it stays as it is itself.

        Args:
            widths: a `Width` for every step and layer, `[steps, layers]`.
            references: which steps are references besides, `[steps, sections]`; None for no more.
        """
        other = copy(self)
        if references is not None:
            other._is_reference = self._is_reference | references
        for name in ("shares", "parts", "_carried"):  # those of the layout before
            other.__dict__.pop(name, None)
        other._lay_out(widths)
        return other

    def _lay_out(self, widths: IntArray) -> None:
        """Gives every step and layer its plan; patterns that are equal share one."""
        self._entries: list[list[_Entry]] = [
            [(tuple(by_head), width) for by_head, width in zip(row, of_row, strict=True)]
            for row, of_row in zip(self._choice.tolist(), widths.tolist(), strict=True)
        ]
        entries = dict.fromkeys(entry for row in self._entries for entry in row)
        try:
            patterns = {entry: self._patterns(entry) for entry in entries}
            used = dict.fromkeys(pattern for by_head in patterns.values() for pattern in by_head)
            bases = [None if base is None else self._grouped(base) for _, base in self._sections]
            used |= dict.fromkeys(base for base in bases if base is not None)
            self._bases = [None if base is None else self._plan_of_pattern(base) for base in bases]
            self.plans: tuple[Plan, ...] = tuple(self._plan_of_pattern(pattern) for pattern in used)
            plan_of_entry = {entry: self._plan_of_heads(by_head) for entry, by_head in patterns.items()}
        except ValueError as error:
            raise BadInput(str(error)) from error
        self._plans: list[list[Plan | HeadPlan]] = [[plan_of_entry[entry] for entry in row] for row in self._entries]
        self.density = float(np.mean([self.density_of_step(step) for step in range(self.steps)]))

    def described(self, step: int, layer: int) -> str:
        """The attention of a step and layer for people, such as `b radius 2, groups 4x4`; `full` where it is that."""
        by_head, width = self._entries[step][layer]
        attentions = [self._attention(number, width) for number in dict.fromkeys(by_head)]
        texts = ["full" if one is None or one.variant == "full" else one.summary for one in attentions]
        return " and ".join(dict.fromkeys(texts))

    def plan(self, step: int, layer: int) -> Plan | HeadPlan:
        """The plan of a step and layer, both counted from 0; by head where heads of the layer attend differently.

        Where the layer is carried to the step, it is that of the base where there is one, else `reference_plan`.
        """
        carried = self.carried(step, layer)
        if carried is None or carried.is_reference or carried.base is None:
            return self._plans[step][layer]
        return carried.base

    def reference_plan(self, step: int, layer: int) -> Plan | HeadPlan:
        """The plan of the layer at the step if it is a reference, or if nothing is carried to it after all."""
        return self._plans[step][layer]

    @property
    def is_over_steps(self) -> bool:
        """Whether any layer is carried over steps."""
        return bool(self.layers_over_steps)

    @property
    def sections(self) -> int:
        """How many sections of `over_steps` there are."""
        return len(self._sections)

    def section_of(self, layer: int) -> int | None:
        """By which of them a layer is carried, counted from 0; None for one that is computed at every step."""
        return self._section_of_layer[layer]

    def references(self, section: int) -> tuple[int, ...]:
        """The steps that are references of a section, in order."""
        return tuple(np.flatnonzero(self._is_reference[:, section]).tolist())

    def carried(self, step: int, layer: int) -> Carried | None:
        """How a layer is carried over steps, at one of them; None for one that is computed at every step."""
        number = self._section_of_layer[layer]
        return None if number is None else self._carried[step][number]

    @cached_property
    def _carried(self) -> list[list[Carried]]:
        """Of each step, by the number of its section."""
        of_sections = []
        for number, (section, _) in enumerate(self._sections):
            is_reference = self._is_reference[:, number]
            slopes = [section.slope_at(step, self.steps) for step in range(self.steps)]
            to_carry = np.flatnonzero(~is_reference)
            last = to_carry[-1] if len(to_carry) else 0
            extrapolates = any(slopes[step] for step in to_carry)
            of_sections.append(
                [
                    Carried(
                        bool(is_reference[step]), step < last, slope, section.keep, extrapolates, self._bases[number]
                    )
                    for step, slope in enumerate(slopes)
                ]
            )
        return [list(of_step) for of_step in zip(*of_sections, strict=True)]

    def computed(self, step: int, layer: int) -> list[Plan | HeadPlan]:
        """The plans of the attentions that are computed at a step in a layer: none where it is carried as a whole."""
        own, carried = self._plans[step][layer], self.carried(step, layer)
        if carried is None:
            return [own]
        base: list[Plan | HeadPlan] = [] if carried.base is None else [carried.base]
        if not carried.is_reference:
            return base
        return [own, *base] if carried.is_kept else [own]

    def density_of_step(self, step: int) -> float:
        """Attended pairs over all pairs, mean over the layers of a step."""
        plans = [self.computed(step, layer) for layer in range(self.layers)]
        return float(np.mean([sum(plan.density for plan in of_layer) for of_layer in plans]))

    @property
    def ideal_speedup(self) -> float:
        """How much less attention work the run has than with full attention."""
        return 1 / self.density

    @cached_property
    def shares(self) -> dict[Plan, float]:
        """The share of the run's attention, of all steps, layers and heads alike, that each distinct plan serves.

        Layers that are carried to a step have none of it, and those whose base is computed besides have it twice.
        """
        served = dict.fromkeys(self.plans, 0)
        calls = np.ndindex(self.steps, self.layers)
        for plan in (plan for step, layer in calls for plan in self.computed(step, layer)):
            if isinstance(plan, HeadPlan):
                for number, member in enumerate(plan.classes):
                    served[self._built[member.grouping, member.pattern]] += len(plan.heads_of(number))
            else:
                served[plan] += self.heads
        return {plan: count / (self.steps * self.layers * self.heads) for plan, count in served.items()}

    @cached_property
    def parts(self) -> Parts:
        """The run's attention work by part over all pairs, mean over steps, layers and heads."""
        calls = np.ndindex(self.steps, self.layers)
        computed = Counter(plan for step, layer in calls for plan in self.computed(step, layer))
        total = np.sum(
            [np.multiply(count, plan.parts.over(plan.tokens**2)) for plan, count in computed.items()], axis=0
        )
        return Parts(*(total / (self.steps * self.layers)).tolist())

    def kind_of_step(self, step: int) -> StepKind | None:
        """What a step is to the layers that are carried over steps; None where there are none."""
        rules = (self.carried(step, layer) for layer in range(self.layers))
        return kind_of_step(not rule.is_reference for rule in rules if rule is not None)

    @property
    def layers_over_steps(self) -> list[int]:
        """Layers that are carried over steps."""
        return [layer for layer, number in enumerate(self._section_of_layer) if number is not None]

    def _plan_of_pattern(self, pattern: _Grouped) -> Plan:
        if pattern not in self._built:
            self._built[pattern] = build_plan(*pattern, segments=self._segments)
        return self._built[pattern]

    def _plan_of_heads(self, pattern_of_head: tuple[_Grouped, ...]) -> Plan | HeadPlan:
        """One plan where all heads attend alike, else a plan by head."""
        classes = tuple(dict.fromkeys(pattern_of_head))
        if len(classes) == 1:
            return self._plan_of_pattern(classes[0])
        if pattern_of_head not in self._built_by_head:
            class_of_head = tuple(classes.index(pattern) for pattern in pattern_of_head)
            self._built_by_head[pattern_of_head] = build_head_plan(classes, class_of_head, segments=self._segments)
        return self._built_by_head[pattern_of_head]

    def _patterns(self, entry: _Entry) -> tuple[_Grouped, ...]:
        """Groups and pattern of each head."""
        by_head, width = entry
        grouped = {number: self._grouped(self._attention(number, width)) for number in dict.fromkeys(by_head)}
        return tuple(grouped[number] for number in by_head)

    def _attention(self, number: int, width: int) -> Attention | None:
        """What a number of an entry stands for at a width; None is full attention."""
        if number < 0 or width == Width.FULL:
            return None
        own = self._attentions[number]
        if width == Width.OWN:
            return own
        before, after = (self._plan_of_pattern(self._grouped(one)) for one in (own, wider(own)))
        return wider(own) if before.density < after.density < 1 else None

    def _grouped(self, attention: Attention | None) -> _Grouped:
        """Groups and pattern of an attention; None is full, which the coarsest groups describe most briefly."""
        pattern: Pattern = Full() if attention is None else attention.pattern()
        cell = next(iter(self._groupings)) if attention is None or isinstance(pattern, Full) else attention.group
        return self._groupings[cell], pattern


def _refuse_unfit(preset: Preset, grid: Grid) -> None:
    if len(preset.attention.group) != grid.axes:
        axes = len(preset.attention.group)
        raise BadInput(
            f"preset {preset.name} is for tokens on {axes} axes, this model's have {grid.axes}: see `grat presets`"
        )
    for attention in preset.attentions:
        groups = math.prod(cell_counts(grid, attention.group))
        if groups > MOST_GROUPS:
            larger = attention.group
            while math.prod(cell_counts(grid, larger)) > MOST_GROUPS:
                larger = tuple(2 * size for size in larger)
            raise BadInput(
                f"groups of {shape_text(attention.group)} cut {shape_text(grid.shape)} tokens into "
                f"{groups:,} groups, more than {MOST_GROUPS:,}: use larger ones, such as --group {shape_text(larger)}"
            )


def _of_letters(table: Table, numbers: dict[str, int], layers: int, heads: int, name: str) -> npt.NDArray[np.int64]:
    """The number of each layer's and head's attention, `[layers, heads]`.

    Raises:
        BadInput: if the table is for another number of layers or heads.
    """
    if len(table.layers) != layers:
        raise BadInput(f"{name} has {len(table.layers)} layers, the model has {layers}: it was made for another one")
    chosen = np.empty((layers, heads), np.int64)
    for layer, word in enumerate(table.layers):
        if len(word) not in (1, heads):
            raise BadInput(
                f"layer {layer} in {name} has {len(word)} letters, the model has {heads} heads: it was made for another"
            )
        chosen[layer] = [numbers[letter] for letter in word]
    return chosen


def _slice(spec: int | str | None, count: int, what: str, whose: str, preset: Preset) -> slice:
    if spec is None:
        return slice(None)
    covered = ranges.covered(spec, count)
    # Shares of few steps may hold none of them: that is what a share of a shorter run is.
    if not covered and "." not in str(spec):
        raise BadInput(
            f"{whose} of preset {preset.name} is for {what} {spec}, but the run has {count} {what}, "
            f"counted from 0: change its {what}, or take it out"
        )
    return slice(covered.start, covered.stop)
