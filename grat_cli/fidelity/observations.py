"""What runs with full attention show of a model: kept in files, so that another target takes no new runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from grat_cli.attention.layer import AttentionInputs
from grat_cli.attention.observers import Observers
from grat_cli.attention.output_gram import OutputGramRecorder
from grat_cli.attention.record import AttentionRecorder
from grat_cli.errors import BadInput, first_line
from grat_cli.fidelity.knapsack import Floats
from grat_cli.files.json_objects import validated
from grat_cli.files.tensors import read_tensors, write_tensors
from grat_cli.generation.request import Progress, Request
from grat_cli.generation.single import latents_of
from grat_cli.presets import LARGEST_COUNT, Attention, Preset

if TYPE_CHECKING:
    import torch

SCHEMA = "grat.tune/2"
FILE = "observed-{:03d}.safetensors"
_ROUNDING, _MOST_QUERIES, _LARGEST_FIGURE = 1e-3, 1e12, 1e12
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Observations:
    """What candidates keep and lose of full attention, and how that changes over the steps.

    Means over prompts and sampled queries.

    Attributes:
        densities: of each candidate, `[C]`.
        queries: behind each figure, `[S, L]`; 0 at steps that were not observed.
        recall: softmax mass on what is attended token by token, text included, `[S, L, H, C]`.
        error: mean square of the output error, `[S, L, H, C]`.
        loss: mean square of the distance from full attention's output, `[S, L, H, C]`.
        gram: products of full attention's outputs at two steps, `[L, H, S, S]`; see `attention.output_gram`.
    """

    densities: Floats
    queries: np.ndarray
    recall: Floats
    error: Floats
    loss: Floats
    gram: Floats

    @classmethod
    def merged(cls, parts: Sequence[Observations]) -> Observations:
        """Several in one, each with the weight of its queries."""
        queries = np.stack([part.queries for part in parts])
        weights = queries / np.maximum(queries.sum(0), 1)

        def mean(name: str) -> Floats:
            return np.einsum("nsl,nslhc->slhc", weights, np.stack([getattr(part, name) for part in parts]))

        gram = np.mean([part.gram for part in parts], axis=0)
        return cls(parts[0].densities, queries.sum(0), mean("recall"), mean("error"), mean("loss"), gram)

    @property
    def steps_seen(self) -> np.ndarray:
        """Steps that were observed, in order."""
        return np.flatnonzero(self.queries[:, 0] > 0)

    def of_stretches(self, stretches: Sequence[range], name: str) -> Floats:
        """Means of a field over the observed steps of each stretch, `[T, L, H, C]`."""
        seen = self.queries[:, 0] > 0
        return np.stack([getattr(self, name)[list(steps)][seen[list(steps)]].mean(0) for steps in stretches])

    def of_steps(self, steps: Sequence[int], name: str) -> Floats:
        """A field at some steps, between observed ones by a straight line, `[T, L, H, C]`."""
        seen = self.steps_seen
        values = getattr(self, name)
        at = np.clip(steps, seen[0], seen[-1])
        after = np.searchsorted(seen, at)
        before = np.maximum(after - 1, 0)
        apart = np.maximum(seen[after] - seen[before], 1)
        share = np.where(after > before, (at - seen[before]) / apart, 0.0)[:, None, None, None]
        return (1 - share) * values[seen[before]] + share * values[seen[after]]


class Facts(BaseModel):
    """What else a run showed.

    Attributes:
        text_tokens: of the first transformer call.
        calls: of the transformer at a step, each sample of a batch for one.
        sigmas: of the steps, and what the last one ends at; None of a scheduler that has none.
    """

    model_config = ConfigDict(strict=True)

    text_tokens: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
    calls: Annotated[int, Field(ge=1, le=_MOST_CALLS)]
    sigmas: Annotated[list[Annotated[float, Field(ge=0, le=_LARGEST_FIGURE, allow_inf_nan=False)]] | None, Field()]


@dataclass(frozen=True)
class Observed:
    """One run with full attention.

    Attributes:
        observations: of it.
        facts: likewise.
        latents: after its last step.
    """

    observations: Observations
    facts: Facts
    latents: torch.Tensor


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


def observe(
    pipe: Any,
    asked: Request,
    observing: Preset,
    candidates: Sequence[Attention],
    prompt: str,
    seed: int,
    progress: Progress,
    *,
    rows: int,
    recorded: Sequence[int],
) -> Observed:
    """Runs a model with full attention and looks at it.

    Args:
        pipe: the model's pipeline.
        asked: of the output.
        observing: see `attention.record.observation_preset`.
        candidates: that are judged.
        prompt: what the output shows.
        seed: of its noise.
        progress: told of the steps.
        rows: queries that are sampled at each call.
        recorded: steps at which candidates are judged.

    Raises:
        NumericalFailure: if latents turn NaN or infinite.
    """
    shape = asked.family.transformer_shape(pipe.transformer.config)
    steps = observing.sampling.steps
    recorder = _Recorder(candidates, steps, shape.layers, shape.heads, rows=rows, recorded=recorded, seed=seed)
    of_outputs = OutputGramRecorder(steps, shape.layers, rows=rows, seed=seed)
    latents, _ = latents_of(pipe, asked, observing, prompt, seed, progress, Observers(recorder, of_outputs))
    record, outputs = recorder.record(), of_outputs.record()
    assert recorder.text_len is not None, "something was recorded"
    sigmas = getattr(pipe.scheduler, "sigmas", None)
    facts = Facts(
        text_tokens=recorder.text_len,
        calls=outputs.calls,
        sigmas=None if sigmas is None or len(sigmas) != steps + 1 else [float(sigma) for sigma in sigmas],
    )
    observations = Observations(
        record.densities, record.queries, record.recall, record.error, record.loss, outputs.gram
    )
    return Observed(observations, facts, latents.detach().cpu())


def write(path: Path, found: Observed, about: Mapping[str, Any]) -> None:
    """Writes what a run showed, and what it is of."""
    import torch

    values = {field.name: getattr(found.observations, field.name) for field in fields(Observations)}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
    write_tensors(path, tensors | {"latents": found.latents}, {"schema": SCHEMA, **about, **found.facts.model_dump()})


def read(path: Path, about: Mapping[str, Any], shape: tuple[int, int, int, int]) -> Observed:
    """What a file holds.

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
            "or give another --observations"
        )
    try:
        facts = validated(Facts, {name: found.get(name) for name in Facts.model_fields})
        observations = Observations(**{field.name: tensors[field.name].numpy() for field in fields(Observations)})
        latents = tensors["latents"]
        _require_whole(observations, shape, about["steps"])
        if not latents.is_floating_point() or not latents.isfinite().all():
            raise ValueError("its latents are no finite numbers")
        if facts.sigmas is not None and len(facts.sigmas) != shape[0] + 1:
            raise ValueError(f"its sigmas are {len(facts.sigmas)}, and not {shape[0] + 1}")
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({first_line(error)}): remove it") from error
    return Observed(observations, facts, latents)


def _require_whole(found: Observations, shape: tuple[int, int, int, int], observed: Sequence[int]) -> None:
    """Raises ValueError unless observations have figures of so many steps, layers, heads and candidates."""
    steps, layers, heads, candidates = shape
    known = {
        "densities": ((candidates,), 0, _LARGEST_FIGURE),  # a choice among few blocks may cost more than all
        "queries": ((steps, layers), 0, _MOST_QUERIES),
        "recall": (shape, -_ROUNDING, 1 + _ROUNDING),
        "error": (shape, -_ROUNDING, _LARGEST_FIGURE),
        "loss": (shape, -_ROUNDING, _LARGEST_FIGURE),
        "gram": ((layers, heads, steps, steps), -_LARGEST_FIGURE, _LARGEST_FIGURE),
    }
    for name, (wanted, least, most) in known.items():
        values = getattr(found, name)
        kinds = "iu" if name == "queries" else "f"
        if values.shape != wanted or values.dtype.kind not in kinds:
            raise ValueError(f"its {name} is {list(values.shape)}, {values.dtype}, and not {list(wanted)}")
        if not ((values >= least) & (values <= most)).all():  # NaN is neither
            raise ValueError(f"its {name} goes beyond {max(least, -most):g} to {most:g}")
    if not (found.queries[list(observed)] > 0).all():
        raise ValueError("its queries are none at a step that was observed")
    if not np.allclose(found.gram, found.gram.swapaxes(2, 3)) or (np.diagonal(found.gram, axis1=2, axis2=3) < 0).any():
        raise ValueError("its gram is not one of products")
