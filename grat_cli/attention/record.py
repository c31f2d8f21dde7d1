"""Records, while a model runs with full attention, how far it looks and what patterns would keep of that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from grat_cli.attention.layer import AttentionInputs, CallObserver
from grat_cli.attention.recall import BINS, RowStatistics, row_statistics, sample_positions
from grat_cli.errors import BadInput
from grat_cli.presets import Attention, Preset
from grat_kernels import Full, Grouping, Plan, build_plan


def observation_preset(preset: Preset, candidates: Sequence[Attention]) -> Preset:
    """A preset of full attention at every step, in a token order in which all candidates can be judged.

    Args:
        preset: whose model and sampling it takes.
        candidates: patterns to be judged.

    Raises:
        ValidationError: if their groups and blocks do not nest.
    """
    # Rules say which groups and blocks the order has to keep together; the last one wins everywhere.
    rules = [attention.model_dump(mode="json", exclude_none=True) for attention in candidates]
    return Preset.model_validate(
        preset.model_dump()
        | {
            "attention": {"variant": "full", "group": list(preset.attention.group)},
            "schedule": {"rules": [*rules, {"variant": "full"}]},
            "highres": None,
            "cache": None,
        }
    )


@dataclass(frozen=True)
class StandardErrors:
    """Standard errors of means over sampled queries, as estimates of the means over all queries of the same calls.

    Queries of a call are drawn without repetition, so the variance of their mean is (1 - n / N) s² / n, with n of N
    queries drawn and s² their sample variance (Cochran, Sampling Techniques, chapter 2); calls are strata of equal
    weight, drawn anew. NaN where a call gave one query of several.

    Attributes:
        text: of `AttentionRecord.text`, `[...]`.
        image: of `AttentionRecord.image`, `[..., C]`.
        recall: of `AttentionRecord.recall`, `[..., C]`.
        error: of `AttentionRecord.error`, `[..., C]`.
    """

    text: np.ndarray
    image: np.ndarray
    recall: np.ndarray
    error: np.ndarray


@dataclass
class AttentionRecord:
    """Means over prompts, calls and sampled queries.

    Attributes:
        candidates: the patterns that were judged.
        densities: attended pairs over all pairs of each, `[C]`.
        queries: sampled queries behind each figure, `[S, L]`: 0 where nothing was recorded.
        text: softmax mass on text, `[S, L, H]`.
        image: softmax mass on the image keys that a candidate attends token by token, `[S, L, H, C]`.
        image_deviation: its standard deviation over the queries, `[S, L, H, C]`.
        error: mean square of the output error, `[S, L, H, C]`.
        loss: mean square of the distance from full attention's output, `[S, L, H, C]`: the error, not over its length.
        distances: softmax mass on image keys by distance, `[S, L, H, BINS]`; see `recall.RowStatistics`.
        of_heads: standard errors of all these means, `[S, L, H]`.
        of_layers: of their means over heads, `[S, L]`.
        of_steps: of their means over layers and heads, `[S]`; not those of layers over the root of their number,
            because all layers of a call see the same queries.
    """

    candidates: tuple[Attention, ...]
    densities: np.ndarray
    queries: np.ndarray
    text: np.ndarray
    image: np.ndarray
    image_deviation: np.ndarray
    error: np.ndarray
    loss: np.ndarray
    distances: np.ndarray
    of_heads: StandardErrors
    of_layers: StandardErrors
    of_steps: StandardErrors

    @property
    def recall(self) -> np.ndarray:
        """Softmax mass on all that a candidate attends token by token, text included, `[S, L, H, C]`."""
        return self.text[..., None] + self.image


class AttentionRecorder(CallObserver):
    """Judges candidates at every attention of a run with full attention; an `layer.CallObserver`.

    Queries are drawn anew for every call, the same ones for all layers of it.

    Args:
        candidates: patterns to judge.
        steps: denoising steps of a run.
        layers: attention layers of the transformer.
        heads: heads of each.
        rows: queries that are sampled at each call.
        recorded: steps that are looked at; all by default.
        seed: of the sampling.
    """

    def __init__(
        self,
        candidates: Sequence[Attention],
        steps: int,
        layers: int,
        heads: int,
        *,
        rows: int = 64,
        recorded: Collection[int] | None = None,
        seed: int = 0,
    ) -> None:
        self._candidates = tuple(candidates)
        self._rows, self._seed = rows, seed
        self._recorded = range(steps) if recorded is None else recorded
        self._step, self._calls = 0, 0
        self._plans: dict[int, tuple[Plan, tuple[Plan, ...]]] = {}
        shape = steps, layers, heads
        self._queries = np.zeros(shape[:2], np.int64)
        self._text = np.zeros(shape)
        self._image, self._image_squared, self._error, self._loss = (
            np.zeros((*shape, len(self._candidates))) for _ in range(4)
        )
        self._distances = np.zeros((*shape, BINS))
        # Sums of n² times the variance of a call's mean over its n queries, of all that has a standard error.
        columns = 1 + 3 * len(self._candidates)
        self._spread_of_heads = np.zeros((*shape, columns))
        self._spread_of_layers = np.zeros((*shape[:2], columns))
        self._spread_of_steps = np.zeros((steps, columns))
        self._queries_of_steps = np.zeros(steps, np.int64)
        # Of the call under way, by sample: sums over layers of the means over heads, `[n, columns]`; how many layers.
        self._over_layers: dict[int, tuple[np.ndarray, int, int]] = {}
        self._densities: np.ndarray | None = None

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call begins."""
        self._step = step
        self._calls += 1
        self._over_layers = {}

    def end_call(self) -> None:
        """It ends."""
        for total, layers, population in self._over_layers.values():
            self._spread_of_steps[self._step] += _spread(total / layers, population)
            self._queries_of_steps[self._step] += len(total)
        self._over_layers = {}

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        """Looks at one attention; this waits for the device."""
        if inputs is not None and self._step in self._recorded:
            with torch.no_grad():
                self._judge(inputs)
        yield

    def record(self) -> AttentionRecord:
        """What has been seen.

        Raises:
            BadInput: if nothing has.
        """
        if self._densities is None:
            raise BadInput("no attention was recorded: the pipeline has not been called")
        count = np.maximum(self._queries, 1)[..., None]
        image = self._image / count[..., None]
        variance = self._image_squared / count[..., None] - image**2
        return AttentionRecord(
            self._candidates,
            self._densities,
            self._queries,
            self._text / count,
            image,
            np.sqrt(np.maximum(variance, 0)),
            self._error / count[..., None],
            self._loss / count[..., None],
            self._distances / count[..., None],
            _standard_errors(self._spread_of_heads, self._queries[..., None]),
            _standard_errors(self._spread_of_layers, self._queries),
            _standard_errors(self._spread_of_steps, self._queries_of_steps),
        )

    def _judge(self, inputs: AttentionInputs) -> None:
        plans = self._plans_for(inputs)
        at = self._step, inputs.layer
        for sample in range(inputs.query.shape[0]):
            positions = sample_positions(plans[0], self._rows, self._seed + 1_000_003 * self._calls + sample)
            found = row_statistics(
                inputs.query[sample],
                inputs.key[sample],
                inputs.value[sample],
                plans,
                positions,
                inputs.scale,
                None if inputs.text_valid is None else int(inputs.text_valid[sample]),
            )
            count = len(positions)
            self._queries[at] += count
            self._text[at] += found.text.sum(0).double().cpu().numpy()
            self._distances[at] += count * found.distances.double().cpu().numpy()
            for number, kept in enumerate(found.kept):
                image, error = kept.image.double(), kept.error.double()
                self._image[at][:, number] += image.sum(0).cpu().numpy()
                self._image_squared[at][:, number] += image.square().sum(0).cpu().numpy()
                self._error[at][:, number] += error.square().sum(0).cpu().numpy()
                self._loss[at][:, number] += (error * found.output).square().sum(0).cpu().numpy()
            self._note_spread(at, sample, found, plans[0].image_tokens)

    def _note_spread(self, at: tuple[int, int], sample: int, found: RowStatistics, population: int) -> None:
        """Adds what the standard errors of a layer of a call need.

        Args:
            at: step and layer.
            sample: of the call.
            found: of its queries.
            population: how many queries there were to draw from.
        """
        text = found.text.double()
        images = [kept.image.double() for kept in found.kept]
        columns = [text, *images, *(text + image for image in images), *(k.error.double() ** 2 for k in found.kept)]
        values = torch.stack(columns, -1).cpu().numpy()  # [n, H, columns]
        self._spread_of_heads[at] += _spread(values, population)
        of_layer = values.mean(1)
        self._spread_of_layers[at] += _spread(of_layer, population)
        total, layers, _ = self._over_layers.get(sample, (0.0, 0, 0))
        self._over_layers[sample] = total + of_layer, layers + 1, population

    def _plans_for(self, inputs: AttentionInputs) -> tuple[Plan, ...]:
        """The candidates' plans for the sequence of a call.

        Raises:
            BadInput: if the call is not one of full attention, which everything is measured by.
        """
        full = inputs.plan
        if not isinstance(full, Plan) or not isinstance(full.pattern, Full):
            raise BadInput("attention is recorded of runs with full attention: install an `observation_preset`")
        if full.key not in self._plans:
            order = full.grouping
            built = tuple(
                build_plan(
                    Grouping(order.grid, candidate.group, order.cells),
                    candidate.pattern(),
                    segments=full.segments,
                )
                for candidate in self._candidates
            )
            self._plans[full.key] = full, built  # the plan is kept, so that no other takes its key
            if self._densities is None:
                self._densities = np.array([plan.density for plan in built])
        return self._plans[full.key][1]


def _spread(values: np.ndarray, population: int) -> np.ndarray:
    """n² times the variance of the mean of n values that were drawn without repetition, `[...]` from `[n, ...]`."""
    count = len(values)
    if count == population:
        return np.zeros(values.shape[1:])
    if count == 1:
        return np.full(values.shape[1:], np.nan)
    return count * (1 - count / population) * values.var(0, ddof=1)


def _standard_errors(spread: np.ndarray, queries: np.ndarray) -> StandardErrors:
    """From sums of `_spread` over calls, `[..., columns]`, and how many queries those had, `[...]`."""
    errors = np.sqrt(spread) / np.maximum(queries, 1)[..., None]
    text, others = errors[..., 0], errors[..., 1:]
    image, recall, error = np.split(others, 3, axis=-1)
    return StandardErrors(text, image, recall, error)
