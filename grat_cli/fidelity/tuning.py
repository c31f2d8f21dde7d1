"""Fits a preset to a model: which pattern each layer, head and stretch of steps takes, for a density that is wanted.

A few runs with full attention tell, on sampled queries, how far from its output each pattern of a palette comes, in
every layer and head and at some steps (`attention_record`). Then each takes one, so that all together lose least
(`knapsack`). What is lost is the squared distance from the output of full attention, not over its length: heads that
say little may be wrong. On the demo model it is in proportion to how far the final latents move, whichever layer
loses it; weights by step, taken from such runs, brought nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from grat_cli.attention.adapter import AttentionInputs
from grat_cli.attention.record import AttentionRecorder, observation_preset
from grat_cli.errors import BadInput, first_line
from grat_cli.fidelity.fitted_preset import schedule_of, stretches_of
from grat_cli.fidelity.knapsack import Choice, Floats, greedy_path
from grat_cli.fidelity.quality import Likeness, likeness, summary
from grat_cli.files.json_objects import validated
from grat_cli.files.tensors import read_tensors, write_tensors
from grat_cli.files.whole import part_of
from grat_cli.generation.request import Progress, Request
from grat_cli.generation.single import frames_of, latents_of
from grat_cli.models.devices import choose_device, choose_dtype
from grat_cli.models.loading import LoadedModel, load_model
from grat_cli.presets import LARGEST_COUNT, Attention, CheckEvidence, Evidence, PatternEvidence, Preset, ranges

SCHEMA = "grat.tune/1"
_FILE = "observed-{:03d}.safetensors"
_ROUNDING, _MOST_QUERIES, _LARGEST_FIGURE = 1e-3, 1e12, 1e12


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """What to tune.

    Attributes:
        request: model, size, device, and the preset whose sampling, kernel and memory settings are kept.
        prompts: that are observed; the n-th with seed n.
        candidates: patterns to choose from; their groups and blocks must nest.
        density: wanted of the whole run, or None.
        recall: wanted of the whole run where no density is.
        checked: prompts, best others than those observed, whose outputs are compared with those of full attention.
        stretches: parts of the run that choose by themselves, as long as one another.
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
    checked: tuple[str, ...] = ()
    stretches: int = 4
    observed: int = 2
    rows: int = 64
    folder: Path
    name: str

    def steps_of_stretches(self) -> list[range]:
        """Steps of each stretch.

        Raises:
            BadInput: if there are more stretches than steps.
        """
        steps = self.request.preset.sampling.steps
        if self.stretches > steps:
            raise BadInput(f"a run of {steps} steps has no {self.stretches} stretches: use fewer, or more steps")
        return [ranges.covered(text, steps) for text in stretches_of(self.stretches)]

    def steps_observed(self) -> list[int]:
        """Steps that are looked at: in each stretch the middles of so many equal parts."""
        stretches = self.steps_of_stretches()
        return sorted({steps[place] for steps in stretches for place in ranges.spread(len(steps), self.observed)})


@dataclass(frozen=True)
class Observations:
    """What candidates keep and lose of full attention, means over prompts and sampled queries.

    Attributes:
        densities: of each candidate, `[C]`.
        queries: behind each figure, `[S, L]`; 0 at steps that were not observed.
        recall: softmax mass on what is attended token by token, text included, `[S, L, H, C]`.
        error: mean square of the output error, `[S, L, H, C]`.
        loss: mean square of the distance from full attention's output, `[S, L, H, C]`.
    """

    densities: Floats
    queries: np.ndarray
    recall: Floats
    error: Floats
    loss: Floats

    @classmethod
    def merged(cls, parts: Sequence[Observations]) -> Observations:
        """Several in one, each with the weight of its queries."""
        queries = np.stack([part.queries for part in parts])
        weights = queries / np.maximum(queries.sum(0), 1)

        def mean(name: str) -> Floats:
            return np.einsum("nsl,nslhc->slhc", weights, np.stack([getattr(part, name) for part in parts]))

        return cls(parts[0].densities, queries.sum(0), mean("recall"), mean("error"), mean("loss"))

    def of_stretches(self, stretches: Sequence[range], name: str) -> Floats:
        """Means of a field over the observed steps of each stretch, `[T, L, H, C]`."""
        seen = self.queries[:, 0] > 0
        return np.stack([getattr(self, name)[list(steps)][seen[list(steps)]].mean(0) for steps in stretches])


def tune(request: TuneRequest, progress: Progress) -> Preset:
    """A preset fitted to a model, with its evidence.

    Raises:
        BadInput: if the request does not fit the model, or no choice meets the target.
        ModelUnavailable: if the model is missing, gated or damaged.
        NumericalFailure: if latents turn NaN or infinite.
    """
    # 1. What can be refused before anything is loaded.
    asked, base = request.request, request.request.preset
    observing = observation_preset(base, request.candidates)
    request.steps_observed()
    _make_folder(request.folder)
    device = choose_device(request.request.device)

    # 2. Runs with full attention, one per prompt; those that are on file are not repeated.
    progress.phase("load")
    model = load_model(asked.model, device=device, dtype=choose_dtype(asked.dtype, device), weights=asked.weights)
    for note in model.notes:
        progress.note(note)
    asked.family.prepare(model.pipe)
    parts = []
    shape = asked.family.transformer_shape(model.pipe.transformer.config)
    for number, prompt in enumerate(request.prompts):
        about = _about(request, model, prompt, number)
        path = request.folder / _FILE.format(number)
        if not path.exists():
            progress.phase(f"observing {number + 1} of {len(request.prompts)}: {prompt}")
            found, text_tokens = _observed(model.pipe, request, observing, prompt, number, progress)
            _write(path, found, about | {"text_tokens": text_tokens})
        parts.append(_read(path, about, (base.sampling.steps, shape.layers, shape.heads, len(request.candidates))))
    observations = Observations.merged([part for part, _ in parts])
    text_tokens = parts[0][1]  # as the densities: those of the first prompt

    # 3. What each stretch, layer and head takes.
    choice = choose(request, observations)
    own, schedule = schedule_of(request.candidates, choice, stretches_of(request.stretches))
    preset = Preset.model_validate(
        base.model_dump()
        | {
            "name": request.name,
            "description": f"Fitted to {asked.model.name} at {asked.title} for a {_target(request)}: "
            f"{len(schedule.palette)} patterns by layer, head and stretch of steps.",
            "attention": own.model_dump(),
            "schedule": schedule.model_dump(),
        }
    )

    # 4. How close its outputs come to those of full attention.
    full = Preset.model_validate(
        base.model_dump() | {"attention": {"variant": "full", "group": list(own.group)}, "schedule": {}}
    )
    likenesses, density = [], None
    for number, prompt in enumerate(request.checked):
        progress.phase(f"checking {number + 1} of {len(request.checked)}: {prompt}")
        outputs = []
        for used in (full, preset):
            latents, installation = latents_of(model.pipe, asked, used, prompt, len(request.prompts) + number, progress)
            outputs.append(frames_of(model.pipe, asked, latents))
            density = installation.last_schedule.density
        likenesses.append(likeness(*outputs))

    # 5. The evidence.
    evidence = _evidence(request, model.revision, observations, choice, text_tokens, density, likenesses)
    return preset.model_copy(update={"evidence": evidence})


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


def _about(request: TuneRequest, model: LoadedModel, prompt: str, seed: int) -> dict[str, Any]:
    """What an observation is of: all that changes it."""
    asked = request.request
    loras = [lora.told() for lora in model.loras]
    return {
        "model": asked.model.name,
        "revision": model.revision,
        **({"loras": loras} if loras else {}),
        "size": asked.size,
        "sampling": asked.preset.sampling.model_dump(),
        "steps": request.steps_observed(),
        "rows": request.rows,
        "candidates": [candidate.model_dump(mode="json") for candidate in request.candidates],
        "prompt": prompt,
        "seed": seed,
    }


class _Recorder(AttentionRecorder):
    """Also keeps the text length of the first call, which densities are of.

    Attributes:
        text_len: in tokens; None before that.
    """

    text_len: int | None = None

    def attention(self, inputs: AttentionInputs | None = None) -> AbstractContextManager[None]:
        """See `AttentionRecorder`."""
        if inputs is not None and self.text_len is None:
            self.text_len = inputs.plan.text_len
        return super().attention(inputs)


def _observed(
    pipe: Any,
    request: TuneRequest,
    observing: Preset,
    prompt: str,
    seed: int,
    progress: Progress,
) -> tuple[Observations, int]:
    """What a run with full attention shows, and the text tokens that its densities are of."""
    shape = request.request.family.transformer_shape(pipe.transformer.config)
    recorder = _Recorder(
        request.candidates,
        observing.sampling.steps,
        shape.layers,
        shape.heads,
        rows=request.rows,
        recorded=request.steps_observed(),
        seed=seed,
    )
    latents_of(pipe, request.request, observing, prompt, seed, progress, recorder)
    record = recorder.record()
    assert recorder.text_len is not None, "something was recorded"
    return Observations(record.densities, record.queries, record.recall, record.error, record.loss), recorder.text_len


def _write(path: Path, found: Observations, about: Mapping[str, Any]) -> None:
    import torch

    tensors = {
        field.name: torch.from_numpy(np.ascontiguousarray(getattr(found, field.name))) for field in fields(found)
    }
    write_tensors(path, tensors, {"schema": SCHEMA, **about})


def _read(path: Path, about: Mapping[str, Any], shape: tuple[int, int, int, int]) -> tuple[Observations, int]:
    """What a file holds, and its text tokens.

    Args:
        path: of the file.
        about: what it is to be of.
        shape: its steps, layers, heads and candidates.

    Raises:
        BadInput: if it is of something else, or damaged.
    """
    tensors, found = read_tensors(path, SCHEMA, "an observation of grat tune")
    # Through JSON, as what is on file has been.
    if json.loads(json.dumps(about)) != {key: found.get(key) for key in about}:
        raise BadInput(
            f"{path} is of another model, size, prompt or palette: remove the folder {path.parent}, "
            "or give another --out"
        )
    try:
        told = validated(_Told, found)
        observations = Observations(**{field.name: tensors[field.name].numpy() for field in fields(Observations)})
        _require_whole(observations, shape, about["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({first_line(error)}): remove it") from error
    return observations, told.text_tokens


class _Told(BaseModel):
    """What an observation says besides what it is of."""

    model_config = ConfigDict(strict=True)

    text_tokens: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


def _require_whole(found: Observations, shape: tuple[int, int, int, int], observed: Sequence[int]) -> None:
    """Raises ValueError unless observations have figures of so many steps, layers, heads and candidates."""
    steps, layers, _, candidates = shape
    known = {
        "densities": ((candidates,), 1 + _ROUNDING),
        "queries": ((steps, layers), _MOST_QUERIES),
        "recall": (shape, 1 + _ROUNDING),
        "error": (shape, _LARGEST_FIGURE),
        "loss": (shape, _LARGEST_FIGURE),
    }
    for name, (wanted, most) in known.items():
        values = getattr(found, name)
        kinds = "iu" if name == "queries" else "f"
        if values.shape != wanted or values.dtype.kind not in kinds:
            raise ValueError(f"its {name} is {list(values.shape)}, {values.dtype}, and not {list(wanted)}")
        if not ((values >= -_ROUNDING) & (values <= most)).all():  # NaN is neither
            raise ValueError(f"its {name} goes beyond 0 to {most:g}")
    if not (found.queries[list(observed)] > 0).all():
        raise ValueError("its queries are none at a step that was observed")


def _make_folder(folder: Path) -> None:
    """Raises BadInput if it cannot be made, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part_of(folder / _FILE.format(0)):
            pass
    except OSError as error:
        raise BadInput(
            f"--observations {folder}: {(error.strerror or str(error)).lower()}: give a folder that can be written to"
        ) from error


def _evidence(
    request: TuneRequest,
    revision: str | None,
    observations: Observations,
    choice: Choice,
    text_tokens: int,
    measured_density: float | None,
    likenesses: Sequence[Likeness],
) -> Evidence:
    stretches = request.steps_of_stretches()
    weights = np.array([len(steps) for steps in stretches]) / request.request.preset.sampling.steps

    def chosen(name: str) -> float:
        """Mean over the run of what was chosen."""
        values = np.take_along_axis(observations.of_stretches(stretches, name), choice[..., None], axis=3)[..., 0]
        return float(weights @ values.mean((1, 2)))

    def fixed(name: str) -> Floats:
        """Of each candidate, were it used throughout."""
        return weights @ observations.of_stretches(stretches, name).mean((1, 2))

    costs = weights @ observations.densities[choice].mean((1, 2))
    recalls, errors, losses = fixed("recall"), np.sqrt(fixed("error")), fixed("loss")
    used = sorted(set(choice.ravel().tolist()), key=lambda number: float(observations.densities[number]))
    quality = summary(likenesses) if likenesses else None
    return Evidence(
        model=request.request.model.name,
        revision=revision,
        size=request.request.title,
        tokens=request.request.grid.shape,
        text_tokens=text_tokens,
        steps=request.request.preset.sampling.steps,
        prompts=request.prompts,
        target=_target(request),
        density=_figures(costs),
        recall=_figures(chosen("recall")),
        output_error=_figures(np.sqrt(chosen("error"))),
        loss=_figures(chosen("loss")),
        patterns=tuple(
            PatternEvidence(
                attention=request.candidates[number].summary,
                share=_figures((choice == number).mean()),
                density=_figures(observations.densities[number]),
                recall=_figures(recalls[number]),
                output_error=_figures(errors[number]),
                loss=_figures(losses[number]),
            )
            for number in used
        ),
        check=None
        if quality is None
        else CheckEvidence(
            prompts=request.checked,
            density=_figures(measured_density),
            ssim=_figures(quality.ssim),
            ssim_interval=None if quality.ssim_interval is None else _figures(quality.ssim_interval),
            psnr_db=_figures(quality.psnr_db),
        ),
    )


def _target(request: TuneRequest) -> str:
    return f"density of {request.density:g}" if request.density is not None else f"recall of {request.recall:g}"


def _figures(value: Any) -> float:
    """Four significant figures: more would promise too much."""
    return float(f"{float(value):.4g}")
