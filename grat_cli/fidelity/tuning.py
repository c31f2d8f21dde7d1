"""Fits a preset to a model: which steps are computed, and which pattern each layer and head takes, for a density.

A few runs with full attention tell, on sampled queries, how far from its output each pattern of a palette comes, in
every layer and head and at some steps, and how outputs change from step to step (`observations`). Then each takes one,
so that all together lose least (`knapsack`). What is lost is the squared distance from the output of full attention,
not over its length: heads that say little may be wrong. On the demo model it is in proportion to how far the final
latents move, whichever layer loses it.

Where outputs are carried over steps, the steps that are computed are searched too, first by what is foretold, then by
measured runs (`step_search`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grat_cli.attention.record import observation_preset
from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.errors import BadInput
from grat_cli.estimates.over_steps import kept_bytes
from grat_cli.fidelity import observations as observing
from grat_cli.fidelity.evidence import Chosen, evidence_of, figures
from grat_cli.fidelity.fitted_preset import schedule_of, share_of, stretches_from, stretches_of
from grat_cli.fidelity.knapsack import Choice, Floats, greedy_path
from grat_cli.fidelity.measured_runs import MeasuredRun, Measurements, relative_error
from grat_cli.fidelity.observations import Facts, Observations, Observed
from grat_cli.fidelity.quality import likeness
from grat_cli.fidelity.references import MOST_STEPS
from grat_cli.fidelity.step_search import Foreteller, Search, Setting
from grat_cli.files.whole import part_of
from grat_cli.generation.request import Progress, Request
from grat_cli.generation.single import frames_of, latents_of
from grat_cli.models.devices import choose_device, choose_dtype
from grat_cli.models.loading import LoadedModel, load_model
from grat_cli.presets import Attention, OverStepsEvidence, Preset, ranges

_MOST_MEASURED = 4
_GIB = 1 << 30


@dataclass(frozen=True)
class StepSearch:
    """How steps are searched.

    Attributes:
        references: fewest and most steps that are computed; None for all that the density allows.
        runs: of the model that may be made to measure settings.
        keep: where outputs are kept, one of `presets.over_steps.KEEPS`.
        most_gib: that may be kept, or None.
    """

    references: tuple[int, int] | None = None
    runs: int = 40
    keep: str = "device"
    most_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """What to tune.

    Attributes:
        request: model, size, device, and the preset whose groups, sampling, kernel and memory settings are kept; its
            guard and cache are not.
        prompts: that are observed; the n-th with seed n.
        candidates: patterns to choose from; their groups and blocks must nest.
        density: wanted of the whole run, or None.
        recall: wanted of the whole run where no density is.
        over_steps: how steps are searched, for a density; None where every step is computed.
        checked: prompts, best others than those observed, whose outputs are compared with those of full attention.
        stretches: parts of the run that are observed alike, as long as one another; they choose by themselves where
            every step is computed.
        observed: steps of each that are looked at.
        rows: queries that are sampled at each call.
        folder: where what was observed is kept, so that a run that was broken off goes on.
        name: of the preset.
    """

    request: Request
    prompts: tuple[str, ...]
    candidates: tuple[Attention, ...]
    density: float | None = None
    recall: float | None = None
    over_steps: StepSearch | None = None
    checked: tuple[str, ...] = ()
    stretches: int = 4
    observed: int = 2
    rows: int = 64
    folder: Path
    name: str

    @property
    def steps(self) -> int:
        """Of a run."""
        return self.request.preset.sampling.steps

    @property
    def target(self) -> str:
        """What is wanted, in words."""
        return f"density of {self.density:g}" if self.density is not None else f"recall of {self.recall:g}"

    def steps_of_stretches(self) -> list[range]:
        """Steps of each stretch.

        Raises:
            BadInput: if there are more stretches than steps.
        """
        if self.stretches > self.steps:
            raise BadInput(
                f"a run of {self.steps} steps has no {self.stretches} stretches: use --stretches {self.steps}, or more "
                "--steps"
            )
        return [ranges.covered(text, self.steps) for text in stretches_of(self.stretches)]

    def steps_observed(self) -> list[int]:
        """Steps that are looked at: in each stretch the middles of so many equal parts."""
        stretches = self.steps_of_stretches()
        return sorted({steps[place] for steps in stretches for place in ranges.spread(len(steps), self.observed)})


def tune(request: TuneRequest, progress: Progress) -> Preset:
    """A preset fitted to a model, with its evidence.

    Raises:
        BadInput: if the request does not fit the model, or no choice meets the target.
        ModelUnavailable: if the model is missing, gated or damaged.
        NumericalFailure: if latents turn NaN or infinite.
    """
    # 1. What can be refused before anything is loaded.
    request = _uncorrected(request, progress)
    asked, base = request.request, request.request.preset
    if request.over_steps is not None:
        _require_searchable(request.steps, request.over_steps)
    full = observation_preset(base, request.candidates)
    request.steps_observed()
    _make_folder(request.folder)
    device = choose_device(request.request.device)

    # 2. Runs with full attention, one per prompt; those that are on file are not repeated.
    progress.phase("load")
    model = load_model(asked.model, device=device, dtype=choose_dtype(asked.dtype, device), weights=asked.weights)
    for note in model.notes:
        progress.note(note)
    asked.family.prepare(model.pipe)
    seen = [_observed(request, model, full, number, progress) for number in range(len(request.prompts))]
    observations = Observations.merged([one.observations for one in seen])

    # 3. What each layer and head takes, and when.
    if request.over_steps is None:
        chosen, over_steps = _of_stretches(request, observations), None
    else:
        chosen, over_steps = _over_steps(request, request.over_steps, model, observations, seen, progress)
    preset = _preset(request, chosen)

    # 4. How close its outputs come to those of full attention.
    likenesses, density = [], None
    for number, prompt in enumerate(request.checked):
        progress.phase(f"checking {number + 1} of {len(request.checked)}: {prompt}")
        outputs = []
        for used in (_full(base), preset):
            latents, installation = latents_of(model.pipe, asked, used, prompt, len(request.prompts) + number, progress)
            outputs.append(frames_of(model.pipe, asked, latents))
            density = installation.last_schedule.density
        likenesses.append(likeness(*outputs))

    # 5. The evidence.
    evidence = evidence_of(
        asked,
        chosen,
        revision=model.revision,
        target=request.target,
        prompts=request.prompts,
        text_tokens=seen[0].facts.text_tokens,  # as the densities: those of the first prompt
        over_steps=over_steps,
        checked=request.checked,
        checked_density=density,
        likenesses=likenesses,
    )
    return preset.model_copy(update={"evidence": evidence})


def _uncorrected(request: TuneRequest, progress: Progress) -> TuneRequest:
    """The request without what makes runs compute more than their schedule says, or less."""
    base = request.request.preset
    left_out = [name for name, given in (("guard", base.guard), ("cache", base.cache)) if given]
    if not left_out:
        return request
    progress.note(f"the {' and '.join(left_out)} of preset {base.name} would change what is measured: left out")
    asked = replace(request.request, preset=base.model_copy(update=dict.fromkeys(left_out)))
    return replace(request, request=asked)


def _require_searchable(steps: int, search: StepSearch) -> None:
    """Raises BadInput unless steps can be searched in a run of so many."""
    if steps > MOST_STEPS:
        raise BadInput(
            f"a search over {steps} steps would take too long: use --steps {MOST_STEPS} at most, or --no-over-steps"
        )
    if search.references is not None and search.references[0] > steps:
        raise BadInput(
            f"--references {search.references[0]}: the run has {steps} steps: use fewer references, or more --steps"
        )


def choose(request: TuneRequest, observations: Observations) -> Choice:
    """The candidate of each stretch, layer and head, `[T, L, H]`: least loss for the density wanted, or the first
    choice on the way there that has the recall wanted.

    Raises:
        BadInput: if none is as sparse.
    """
    stretches = request.steps_of_stretches()
    losses = observations.of_stretches(stretches, "loss")
    shape, candidates = losses.shape[:3], losses.shape[3]
    # A stretch counts as often as it has steps.
    weights = np.array([len(steps) for steps in stretches]) / np.mean([len(steps) for steps in stretches])
    costs = np.broadcast_to(observations.densities, losses.shape) * weights[:, None, None, None]
    losses = losses * weights[:, None, None, None]
    path = greedy_path(costs.reshape(-1, candidates), losses.reshape(-1, candidates))
    if request.density is not None:
        try:
            return path.within(request.density).reshape(shape)
        except ValueError as error:
            raise BadInput(
                f"no choice of these patterns has a density of {request.density:g}: {error}, text included"
            ) from error
    assert request.recall is not None, "either a density or a recall is wanted"
    recalls = observations.of_stretches(stretches, "recall") * weights[:, None, None, None]
    recalls = recalls.reshape(-1, candidates)
    everyone = np.arange(len(recalls))
    start = recalls[everyone, path.start]
    latest, total, needed = start.copy(), start.sum(), request.recall * len(recalls)
    moves = 0
    while total < needed - 1e-9 and moves < len(path.units):
        unit = path.units[moves]
        gained = recalls[unit, path.candidates[moves]]
        total += gained - latest[unit]
        latest[unit] = gained
        moves += 1
    return path.after(moves).reshape(shape)


def _of_stretches(request: TuneRequest, observations: Observations) -> Chosen:
    """What each stretch of steps takes, all of which are computed."""
    stretches = request.steps_of_stretches()
    return Chosen(
        candidates=request.candidates,
        densities=observations.densities,
        choice=choose(request, observations),
        weights=np.array([len(steps) for steps in stretches]) / request.steps,
        values=lambda name: observations.of_stretches(stretches, name),
        stretches=stretches_of(request.stretches),
    )


def _over_steps(
    request: TuneRequest,
    search: StepSearch,
    model: LoadedModel,
    observations: Observations,
    seen: list[Observed],
    progress: Progress,
) -> tuple[Chosen, OverStepsEvidence]:
    """What each step that is computed takes, and how it was found.

    Raises:
        BadInput: if no setting is as sparse, or all keep more than they may.
    """
    # 1. What may be kept of each layer and call: an output and how it changes, or the output alone.
    assert request.density is not None, "a search over steps has a density for its target"
    asked, facts = request.request, seen[0].facts
    of_outputs = _bytes_of_outputs(request, search, model, facts)
    limit = float("inf") if search.most_gib is None else search.most_gib * _GIB
    if of_outputs > limit:
        raise BadInput(
            f"outputs of all layers are {of_outputs / _GIB:.3g} GiB, more than --max-kept {search.most_gib:g}: give "
            f"more, {'' if search.keep == 'fp8' else '--keep fp8, '}or --no-over-steps"
        )
    extrapolates = 2 * of_outputs <= limit
    if not extrapolates:
        progress.note(
            f"outputs and how they change are {2 * of_outputs / _GIB:.3g} GiB, more than --max-kept "
            f"{search.most_gib:g}: outputs are reused as they are"
        )

    # 2. What is foretold.
    weights = _weights(facts.sigmas, request.steps)
    foreteller = Foreteller(observations, request.density, weights, extrapolates=extrapolates)
    fewest, most = search.references or (1, request.steps)
    counts = range(fewest, min(most, foreteller.most) + 1)
    if not counts:
        sparsest = observations.densities.min()
        raise BadInput(
            f"no choice of these patterns has a density of {request.density:g}: the sparsest one has {sparsest:.4f} at "
            f"each step that is computed, {fewest * sparsest / request.steps:.4f} of the whole run at {fewest} of "
            f"{request.steps} steps"
        )

    # 3. What is measured.
    prompts = request.prompts[:_MOST_MEASURED]

    def chosen_by(setting: Setting) -> Chosen:
        return _chosen_at_references(request, search, observations, setting)

    def run(preset: Preset, number: int) -> MeasuredRun:
        latents, _ = latents_of(model.pipe, asked, preset, prompts[number], number, progress)
        return MeasuredRun(error=relative_error(latents, seen[number].latents))

    def measure(setting: Setting, least: float) -> float:
        steps, slopes = (", ".join(f"{one:g}" for one in some) for some in (setting.references, setting.slopes))
        of_full = "" if setting.patterns else "full attention at "
        progress.phase(f"measuring ({measurements.left} runs left): {of_full}steps {steps}; slopes {slopes}")
        return measurements.ratio(_preset(request, chosen_by(setting)), least)

    def error_of(setting: Setting) -> float:
        return figures(measurements.error(_preset(request, chosen_by(setting))))

    about = [_about(request, model, number, observed=False) for number in range(len(prompts))]
    measurements = Measurements(request.folder, about, run, search.runs)
    found = Search(foreteller, measure, lambda: measurements.lasts).best_of(counts)
    setting = found.setting
    chosen = chosen_by(setting)
    parts = _schedule(request, model, facts, _preset(request, chosen)).parts
    kept = 0 if len(setting.references) == request.steps else of_outputs * (2 if any(setting.slopes) else 1)
    evidence = OverStepsEvidence(
        references=setting.references,
        slopes=setting.slopes,
        kept_bytes=kept,
        **{name: figures(part) for name, part in parts._asdict().items()},
        prompts=prompts,
        runs=search.runs - measurements.left,
        error=None if found.error is None else error_of(setting),
        carried_error=None if found.exact is None else error_of(found.exact),
    )
    return chosen, evidence


def _bytes_of_outputs(request: TuneRequest, search: StepSearch, model: LoadedModel, facts: Facts) -> int:
    """What the latest outputs of all layers take, in all calls of a step."""
    asked, transformer = request.request, model.pipe.transformer
    reused = {"reference": [0], "between": "reuse", "keep": search.keep}
    preset = Preset.model_validate(_full(asked.preset).model_dump() | {"schedule": {"over_steps": reused}})
    shape = asked.family.transformer_shape(transformer.config)
    schedules = [_schedule(request, model, facts, preset)] * facts.calls
    return round(kept_bytes(schedules, shape, transformer.dtype.itemsize).total)


def _schedule(request: TuneRequest, model: LoadedModel, facts: Facts, preset: Preset) -> AttentionSchedule:
    """A preset laid out over a run."""
    asked = request.request
    shape = asked.family.transformer_shape(model.pipe.transformer.config)
    return AttentionSchedule(
        preset, asked.grid, facts.text_tokens, asked.family.text_first, request.steps, shape.layers, shape.heads
    )


def _full(preset: Preset) -> Preset:
    """The preset with full attention at every step."""
    attention = {"variant": "full", "group": list(preset.attention.group)}
    return Preset.model_validate(preset.model_dump() | {"attention": attention, "schedule": {}})


def _chosen_at_references(
    request: TuneRequest, search: StepSearch, observations: Observations, setting: Setting
) -> Chosen:
    steps, count = request.steps, len(setting.references)
    carried: dict[str, Any] = {
        "reference": [share_of(step, steps) for step in setting.references],
        "between": "extrapolate" if any(setting.slopes) else "reuse",
        "keep": search.keep,
    }
    stretches = stretches_from(setting.references, steps)
    if any(setting.slopes):
        carried["slope"] = [
            {"steps": text, "slope": slope} for text, slope in zip(stretches, setting.slopes, strict=True) if slope
        ]
    return Chosen(
        candidates=request.candidates,
        densities=observations.densities,
        choice=setting.choice,
        weights=np.full(count, 1 / count),
        values=lambda name: observations.of_steps(setting.references, name),
        stretches=stretches,
        computed=count / steps,
        over_steps=carried if count < steps else None,
    )


def _weights(sigmas: list[float] | None, steps: int) -> Floats:
    """Of the loss at each step: how far latents go there; they add up to 1.

    Not its square, by which the error of latents grows at the step itself: errors of early steps grow further later.
    """
    lengths = np.abs(np.diff(sigmas)) if sigmas is not None else np.ones(steps)
    return lengths / lengths.sum() if lengths.any() else np.full(steps, 1 / steps)


def _preset(request: TuneRequest, chosen: Chosen) -> Preset:
    """What was chosen, as a preset."""
    base = request.request.preset
    own, schedule = schedule_of(chosen.candidates, chosen.choice, chosen.stretches)
    over_steps = {} if chosen.over_steps is None else {"over_steps": chosen.over_steps}
    computed = "" if chosen.over_steps is None else f", {len(chosen.choice)} of {request.steps} steps computed"
    return Preset.model_validate(
        base.model_dump()
        | {
            "name": request.name,
            "description": f"Fitted to {request.request.model.name} at {request.request.title} for a {request.target}: "
            f"{len(schedule.palette)} patterns by layer, head and stretch of steps{computed}.",
            "attention": own.model_dump(),
            "schedule": schedule.model_dump() | over_steps,
        }
    )


def _observed(request: TuneRequest, model: LoadedModel, full: Preset, number: int, progress: Progress) -> Observed:
    """What the run with one of the prompts shows, from its file where there is one."""
    asked, prompt = request.request, request.prompts[number]
    shape = asked.family.transformer_shape(model.pipe.transformer.config)
    about = _about(request, model, number)
    path = request.folder / observing.FILE.format(number)
    if not path.exists():
        progress.phase(f"observing {number + 1} of {len(request.prompts)}: {prompt}")
        found = observing.observe(
            model.pipe,
            asked,
            full,
            request.candidates,
            prompt,
            number,
            progress,
            rows=request.rows,
            recorded=request.steps_observed(),
        )
        observing.write(path, found, about)
    return observing.read(path, about, (request.steps, shape.layers, shape.heads, len(request.candidates)))


def _about(request: TuneRequest, model: LoadedModel, number: int, *, observed: bool = True) -> dict[str, Any]:
    """What a run is of: all that changes it.

    Args:
        request: of the run.
        model: likewise.
        number: of the prompt.
        observed: whether it is one that is looked at.
    """
    asked = request.request
    loras = [lora.told() for lora in model.loras]
    looked_at = {
        "steps": request.steps_observed(),
        "rows": request.rows,
        "candidates": [candidate.model_dump(mode="json") for candidate in request.candidates],
    }
    return {
        "model": asked.model.name,
        "revision": model.revision,
        **({"loras": loras} if loras else {}),
        "size": asked.size,
        "sampling": asked.preset.sampling.model_dump(),
        **(looked_at if observed else {}),
        "prompt": request.prompts[number],
        "seed": number,
    }


def _make_folder(folder: Path) -> None:
    """Raises BadInput if it cannot be made, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part_of(folder / observing.FILE.format(0)):
            pass
    except OSError as error:
        raise BadInput(
            f"--observations {folder}: {(error.strerror or str(error)).lower()}: give a folder that can be written to"
        ) from error
