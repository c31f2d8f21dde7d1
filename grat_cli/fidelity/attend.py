"""`grat attend`: a run with full attention, watched: how far it looks, and what candidate patterns keep of that."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from grat_cli.errors import BadInput, choices
from grat_cli.families import preset_variants
from grat_cli.fidelity.variants import NAMES, SHORT_NAMES, parse_variants, variant_for
from grat_cli.presets import Attention, Preset, load_preset, preset_names, ranges
from grat_cli.presets.problems import problem_of
from grat_cli.presets.schema import Schedule
from grat_kernels import Grid, Grouping, build_plan

if TYPE_CHECKING:
    import numpy as np

    from grat_cli.attention.query_record import QueryRecord
    from grat_cli.attention.record import AttentionRecord
    from grat_cli.generation.request import Progress, Request

_NUMBER = re.compile(r"\d{1,6}|\d?\.\d{1,9}|\d\.", re.ASCII)
# Patterns of groups by their short names.
_GROUPED = (*SHORT_NAMES, "sta")
DEFAULT_ROWS = 64
DEFAULT_STEPS = 5
# In fractions of rows and columns, of videos in the middle of time: the middle, and two places off both diagonals.
_DEFAULT_QUERIES = ((0.5, 0.5), (0.25, 0.75), (0.8, 0.35))


@dataclass(frozen=True)
class Candidate:
    """A pattern to judge.

    Attributes:
        name: for people.
        attention: what it attends.
    """

    name: str
    attention: Attention


@dataclass(frozen=True)
class Seen:
    """One output of a watched run.

    Attributes:
        seed: of its noise.
        output: frames uint8 `[H, W, 3]`; of a picture one.
        queries: where chosen queries look.
    """

    seed: int
    output: list[np.ndarray]
    queries: QueryRecord


@dataclass(frozen=True)
class Attended:
    """What a watched run gave.

    Attributes:
        candidates: that were judged.
        steps: that were recorded, counted from 0.
        rows: sampled queries per transformer call.
        record: means over all seeds.
        seen: one per seed.
        text_tokens: of the longest call.
        calls_per_step: transformer calls of a step: two with true guidance.
        device: where it ran.
        dtype: of the transformer.
        backend: how full attention was computed.
        revision: commit of the weights on the hub, None where it is not known.
        phases_ms: load, denoise and decode, of all seeds.
    """

    candidates: tuple[Candidate, ...]
    steps: tuple[int, ...]
    rows: int
    record: AttentionRecord
    seen: tuple[Seen, ...]
    text_tokens: int
    calls_per_step: int
    device: str
    dtype: str
    backend: str
    revision: str | None
    phases_ms: dict[str, float]


def candidates_for(text: str | None, preset: Preset, family: str, grid: Grid) -> tuple[Candidate, ...]:
    """The patterns of `--patterns`.

    Args:
        text: names as in `--compare` of `grat bench`, or of presets, with commas between them; None for the presets
            that come with grat for the family, and the run's own where that attends otherwise.
        preset: of the run.
        family: of the model.
        grid: image tokens.

    Raises:
        BadInput: for names that do not exist, patterns that no plan can have or that do not fit the grid, and sizes
            that do not nest.
    """
    if text is None:
        found = [
            Candidate(name, load_preset(name).attention)
            for name in (f"{family}-{variant}" for variant in preset_variants()[family])
            if name != f"{family}-full"
        ]
        if preset.attention not in [one.attention for one in found] and preset.attention.variant != "full":
            taken = preset.name in [one.name for one in found]
            found.insert(0, Candidate(f"{preset.name}, as set" if taken else preset.name, preset.attention))
    else:
        found = [_candidate(name.strip(), family, grid) for name in text.split(",")]
    for number, one in enumerate(found):
        if one.name in [earlier.name for earlier in found[:number]]:
            raise BadInput(f"--patterns names {one.name} twice: leave one out")
    cells = watched_preset(preset, found).cells
    for one in found:
        try:
            build_plan(Grouping(grid, one.attention.group, cells), one.attention.pattern())
        except ValueError as error:
            raise BadInput(f"--patterns {one.name}: {error}") from error
    return tuple(found)


def _candidate(name: str, family: str, grid: Grid) -> Candidate:
    word = name.partition(":")[0]
    if name in preset_names() or name.endswith((".yaml", ".yml")):
        preset = load_preset(name)
        if len(preset.attention.group) != grid.axes:
            raise BadInput(f"--patterns {name}: it is for {preset.model} models, whose tokens have other axes")
        if preset.attention.variant == "full":
            raise _is_full(name)
        return Candidate(preset.name, preset.attention)
    if word not in (*NAMES, *SHORT_NAMES):
        known = (*_GROUPED, *(f"{family}-{variant}" for variant in preset_variants()[family] if variant != "full"))
        raise BadInput(f"--patterns {name}: {choices(name, known)}" if name else "--patterns: a name is empty")
    (request,) = parse_variants(name, option="--patterns")
    variant = variant_for(request, grid, "--patterns")
    if request.cache:
        raise BadInput(f"--patterns {name}: caches are no pattern: leave it out")
    if request.kind in ("na", "clear"):
        raise BadInput(f"--patterns {name}: windows around each token are no pattern of groups; try b, x or far")
    if variant.grouping is None or variant.attention is None:
        raise _is_full(name)
    return Candidate(name, Attention.model_validate(variant.attention))


def _is_full(name: str) -> BadInput:
    return BadInput(f"--patterns {name}: full attention is what all others are judged by: leave it out")


def watched_preset(preset: Preset, candidates: Sequence[Candidate]) -> Preset:
    """The preset of a run in which the candidates can be judged.

    Raises:
        BadInput: if their sizes do not nest, with sizes that do.
    """
    from grat_cli.attention.record import observation_preset

    # The order has to keep the candidates' groups together, not those of the preset that gives the sampling.
    # Nor those of its schedule, which are full attention's here.
    others = {"schedule": Schedule(), "highres": None}
    try:
        of_first = preset.model_copy(update={"attention": candidates[0].attention, **others})
        return observation_preset(of_first, [one.attention for one in candidates])
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        raise BadInput(f"--patterns: {problem.message}, or judge them in two runs") from error


def recorded_steps(text: str | None, steps: int) -> tuple[int, ...]:
    """The steps of `--at`.

    Args:
        text: a count, or ranges as in presets with commas between them; None for five.
        steps: of the run.

    Raises:
        BadInput: if it is neither, or lies beyond the run.
    """
    if text is None or re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII):
        count = DEFAULT_STEPS if text is None else int(text)
        if count < 1:
            raise BadInput(f"--at {text}: expected 1 step or more")
        if text is not None and count > steps:
            raise BadInput(f"--at {text}: the run has {steps} steps: expected at most so many, or --at all")
        return ranges.spread(steps, count)
    if text.strip() == "all":
        return tuple(range(steps))
    found: set[int] = set()
    for part in text.split(","):
        try:
            covered = ranges.covered(part.strip(), steps)
        except ValueError as error:
            raise BadInput(f"--at {text}: {error}; or how many, such as --at 5") from error
        if not covered:
            raise BadInput(f"--at {text}: the run has {steps} steps, counted from 0 to {steps - 1}")
        found.update(covered)
    return tuple(sorted(found))


def queries_for(texts: Sequence[str], grid: Grid) -> tuple[tuple[int, ...], ...]:
    """The queries of `--query`: places on the grid.

    Args:
        texts: rows and columns, of videos frames before them: tokens counted from 0, or with a decimal point fractions
            of the axis. Without any, three places are chosen.
        grid: image tokens.

    Raises:
        BadInput: if one is no place on the grid, or given twice.
    """
    if not texts:
        middle = (0.5,) * (grid.axes - 2)
        return tuple(dict.fromkeys(_place((*middle, *place), grid) for place in _DEFAULT_QUERIES))
    found = []
    for text in texts:
        example = "0.5,0.25 or 16,8" if grid.axes == 2 else "0.5,0.5,0.25 or 4,16,8"
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != grid.axes or not all(
            re.fullmatch(r"\d{1,6}|\d?\.\d{1,9}|\d\.", part, re.ASCII) for part in parts
        ):
            axes = "row and column" if grid.axes == 2 else "frame, row and column"
            raise BadInput(f"--query {text}: expected {axes}, in tokens or as fractions, such as {example}")
        numbers = tuple(float(part) if "." in part else int(part) for part in parts)
        extents = "x".join(map(str, grid.shape))
        beyond = any(
            number > 1 if isinstance(number, float) else number >= extent
            for number, extent in zip(numbers, grid.shape, strict=True)
        )
        if beyond:
            raise BadInput(f"--query {text}: the grid has {extents} tokens, counted from 0, and fractions go to 1.0")
        place = _place(numbers, grid)
        if place in found:
            raise BadInput(f"--query {text}: that token is named twice: leave one out")
        found.append(place)
    return tuple(found)


def _place(numbers: Sequence[int | float], grid: Grid) -> tuple[int, ...]:
    return tuple(
        min(int(number * extent), extent - 1) if isinstance(number, float) else number
        for number, extent in zip(numbers, grid.shape, strict=True)
    )


def attend(
    request: Request,
    candidates: Sequence[Candidate],
    progress: Progress,
    *,
    seeds: Sequence[int],
    steps: Sequence[int],
    queries: Sequence[tuple[int, ...]],
    rows: int = DEFAULT_ROWS,
) -> Attended:
    """Runs a prompt with full attention, and records it.

    Args:
        request: prompt, preset, model, size and device.
        candidates: patterns to judge.
        progress: told of phases and steps.
        seeds: one output each.
        steps: that are recorded, counted from 0.
        queries: places on the grid whose attention is kept as maps.
        rows: queries that are drawn at each transformer call.

    Raises:
        ModelUnavailable: if the model is missing, gated or damaged.
        OutOfMemory: if the device has too little memory.
        NumericalFailure: if latents turn NaN, or nothing is shown.
    """
    import torch

    from grat_cli.attention.observers import Observers
    from grat_cli.attention.query_record import CallCounter, QueryRecorder
    from grat_cli.attention.record import AttentionRecorder
    from grat_cli.generation.machine import memory_advice, offload_chooser
    from grat_cli.generation.request import note_expectations
    from grat_cli.generation.single import frames_of, latents_of
    from grat_cli.models.devices import choose_device, choose_dtype
    from grat_cli.models.loading import load_model

    grid = request.grid
    phases: dict[str, float] = dict.fromkeys(("load", "denoise", "decode"), 0.0)
    watched = watched_preset(request.preset, candidates)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    seen, calls = [], CallCounter()
    with memory_advice(request, device), torch.no_grad():
        progress.phase("load")
        began = time.perf_counter()
        model = load_model(
            request.model,
            device=device,
            dtype=dtype,
            offload=request.offload,
            choose_offload=offload_chooser(request, device),
            weights=request.weights,
        )
        request.family.prepare(model.pipe)
        phases["load"] = 1000 * (time.perf_counter() - began)
        note_expectations(request, progress)
        for note in model.notes:
            progress.note(note)
        shape = request.family.transformer_shape(model.pipe.transformer.config)
        recorder = AttentionRecorder(
            [one.attention for one in candidates],
            request.preset.sampling.steps,
            shape.layers,
            shape.heads,
            rows=rows,
            recorded=frozenset(steps),
        )
        backend = ""
        for seed in seeds:
            maps = QueryRecorder(queries, grid, steps, shape.layers, shape.heads)
            progress.phase("denoise")
            began = time.perf_counter()
            latents, installation = latents_of(
                model.pipe, request, watched, request.prompt, seed, progress, Observers(recorder, maps, calls)
            )
            phases["denoise"] += 1000 * (time.perf_counter() - began)
            backend = installation.backend.value
            progress.phase("decode")
            began = time.perf_counter()
            seen.append(Seen(seed, frames_of(model.pipe, request, latents), maps.record()))
            phases["decode"] += 1000 * (time.perf_counter() - began)
    return Attended(
        tuple(candidates),
        tuple(steps),
        min(rows, grid.tokens),
        recorder.record(),
        tuple(seen),
        calls.text_tokens,
        calls.calls // (len(seeds) * request.preset.sampling.steps),
        str(device),
        str(dtype).removeprefix("torch."),
        backend,
        model.revision,
        phases,
    )
