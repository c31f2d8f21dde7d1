"""How much of full attention each variant of a whole run keeps, inside the model: recall and output error.

Full attention runs apart from the timed runs, and at a few steps of it each variant is judged on the queries, keys and
values that are there: what would it have attended, and how far would its output have been off? Variants are judged
side by side where their groups nest into one token order; others have passes of their own.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from grat_cli.attention.record import AttentionRecord, AttentionRecorder, observation_preset
from grat_cli.attention.schedule import MOST_GROUPS
from grat_cli.bench.inside_models import Host
from grat_cli.bench.measure import Progress, Unwatched
from grat_cli.bench.results import Fidelity
from grat_cli.fidelity.quality import half_interval
from grat_cli.fidelity.variants import Variant
from grat_cli.generation.request import Request
from grat_cli.generation.single import latents_of
from grat_cli.presets import Attention, ranges
from grat_cli.presets.schema import Schedule
from grat_kernels import Full, HeadPlan, Plan
from grat_kernels.geometry import cell_counts, nests

PROMPTS = 4  # at most
STEPS = 4
QUERIES = 32  # of each attention call: with all layers and heads, thousands in all


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        of_variant: by name of the variant.
        missing: why there is nothing, by name of the variant.
        sampled: what was looked at, for the record; None where nothing was.
    """

    of_variant: Mapping[str, Fidelity]
    missing: Mapping[str, str]
    sampled: Mapping[str, Any] | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is missing, in sentences."""
        return tuple(f"No recall of {name}: {reason}." for name, reason in self.missing.items())


def measure_fidelity(
    pipe: Any,
    request: Request,
    host: Host,
    variants: Sequence[Variant],
    orders: Sequence[tuple[str, int]],
    progress: Progress,
) -> Found:
    """Runs full attention and judges variants by it.

    Args:
        pipe: a loaded pipeline, which the family has prepared.
        request: of the outputs; its preset says how runs are sampled.
        host: the pipeline's transformer.
        variants: to be judged.
        orders: prompts with their seeds; the first `PROMPTS` of different prompts are looked at.
        progress: is told of every run.

    Raises:
        NumericalFailure: if latents turn NaN or infinite.
    """
    shares: dict[str, _Shares] = {}
    missing: dict[str, str] = {}
    recorded = ranges.spread(host.steps, STEPS)
    for variant in variants:
        judged = _judged(variant)
        if isinstance(judged, str):
            missing[variant.name] = judged
        else:
            shares[variant.name] = _shares(variant, judged, host, recorded)
    attentions = tuple(dict.fromkeys(itertools.chain.from_iterable(shares.values())))
    if not attentions:
        return Found({name: Fidelity(1.0, None, 0.0) for name in shares}, missing, None)

    chosen = tuple({prompt: (prompt, seed) for prompt, seed in reversed(orders)}.values())[::-1][:PROMPTS]
    passes = nesting_passes(attentions)
    records: dict[Attention, list[_Kept]] = {attention: [] for attention in attentions}
    adapter = host.adapter(request.grid)
    done, total = 0, len(passes) * len(chosen)
    for candidates in passes:
        preset = request.preset
        own = Attention(variant="full", group=candidates[0].group)
        plain = preset.model_copy(update={"attention": own, "schedule": Schedule(), "highres": None})
        watched = observation_preset(plain, candidates)
        for prompt, seed in chosen:
            recorder = AttentionRecorder(
                candidates, host.steps, adapter.layers, adapter.heads, rows=QUERIES, recorded=recorded, seed=seed
            )
            latents_of(pipe, request, watched, prompt, seed, Unwatched(), recorder)
            record = recorder.record()
            for number, attention in enumerate(candidates):
                records[attention].append(_Kept.of(record, number, recorded))
            done += 1
            progress.step(done, total)
    sampled = {
        "prompts": len(chosen),
        "steps": list(recorded),
        "queries": QUERIES,
        "layers": adapter.layers,
        "heads": adapter.heads,
        "runs": total,
    }
    return Found({name: _fidelity(of, records, len(chosen)) for name, of in shares.items()}, missing, sampled)


def nesting_passes(attentions: Sequence[Attention]) -> list[tuple[Attention, ...]]:
    """The attentions in as few groups as come from taking each into the first whose sizes it nests with."""
    passes: list[list[Attention]] = []
    for attention in attentions:
        for taken in passes:
            if _nest([*taken, attention]):
                taken.append(attention)
                break
        else:
            passes.append([attention])
    return [tuple(taken) for taken in passes]


def _nest(attentions: Sequence[Attention]) -> bool:
    cells = {cell for attention in attentions for cell in attention.cells}
    ordered = sorted(cells, key=math.prod, reverse=True)
    return all(nests(inner, outer) for outer, inner in itertools.pairwise(ordered))


class _Kept(NamedTuple):
    """What an attention keeps in a run: recall and mean square of the output error, `[steps looked at, L, H]` each."""

    recall: np.ndarray
    squared_error: np.ndarray

    @classmethod
    def of(cls, record: AttentionRecord, number: int, recorded: Sequence[int]) -> _Kept:
        """That of a record's candidate."""
        steps = list(recorded)
        return cls(record.recall[steps, ..., number], record.error[steps, ..., number])


# The share of a run that each attention serves, `[steps looked at, L, H]`: every step counts with the nearest one that
# is looked at. What is missing to 1 is full attention.
_Shares = Mapping[Attention, np.ndarray]


def _judged(variant: Variant) -> tuple[Attention, ...] | str:
    """The attentions that a variant is made of, full attention left out; or why it cannot be judged."""
    if variant.obstacle:
        return variant.obstacle
    if variant.preset is not None:
        attentions = tuple(dict.fromkeys(variant.preset.attentions))
    elif variant.kind == "na" and variant.window is not None:
        # Neighbourhood attention is sliding tiles of one token. A window as wide as an axis covers it, odd or not.
        window = [width + 1 - width % 2 for width in variant.window]
        section = {"variant": "sta", "group": [1] * len(window), "window": window}
        attentions = (Attention.model_validate(section),)
    elif variant.attention is not None:
        attentions = (Attention.model_validate(dict(variant.attention)),)
    elif isinstance(variant.pattern, Full):
        attentions = ()
    elif variant.kind == "clear":
        return "a disc around each token is no pattern of groups"
    else:
        return "presets cannot say it"
    for attention in attentions:
        groups = math.prod(cell_counts(variant.grid, attention.group))
        if groups > MOST_GROUPS:
            return f"{groups:,} groups are more than can be planned ({MOST_GROUPS:,})"
    return tuple(attention for attention in attentions if not isinstance(attention.pattern(), Full))


def _shares(variant: Variant, judged: Sequence[Attention], host: Host, recorded: Sequence[int]) -> _Shares:
    adapter = host.adapter(variant.grid)
    shape = len(recorded), adapter.layers, adapter.heads
    nearest = [min(range(len(recorded)), key=lambda place: abs(recorded[place] - step)) for step in range(host.steps)]
    part = 1 / (host.steps * adapter.layers * adapter.heads)
    shares = {attention: np.zeros(shape) for attention in judged}
    if variant.preset is None:
        for attention in judged:
            np.add.at(shares[attention], nearest, part)
        return shares
    schedule = host.schedule(variant.preset, variant.grid)
    by_plan = {(attention.group, attention.pattern()): attention for attention in judged}
    for step, place in enumerate(nearest):
        for layer in range(adapter.layers):
            for head, plan in enumerate(_plans_of_heads(schedule.plan(step, layer), adapter.heads)):
                if not isinstance(plan.pattern, Full):
                    shares[by_plan[plan.grouping.group, plan.pattern]][place, layer, head] += part
    return {attention: served for attention, served in shares.items() if served.any()}


def _plans_of_heads(plan: Plan | HeadPlan, heads: int) -> list[Plan]:
    if isinstance(plan, HeadPlan):
        return [plan.classes[number] for number in plan.class_of_head]
    return [plan] * heads


def _fidelity(shares: _Shares, records: Mapping[Attention, Sequence[_Kept]], prompts: int) -> Fidelity:
    """What a variant keeps over a whole run, from what its attentions keep in each prompt's."""

    def total(figure: Callable[[_Kept], np.ndarray], prompt: int) -> float:
        return sum(float((served * figure(records[attention][prompt])).sum()) for attention, served in shares.items())

    lost = [total(lambda kept: 1 - kept.recall, prompt) for prompt in range(prompts)]
    squares = [total(lambda kept: kept.squared_error, prompt) for prompt in range(prompts)]
    recalls = [1 - share for share in lost]
    return Fidelity(statistics.mean(recalls), half_interval(recalls), math.sqrt(statistics.mean(squares)))
