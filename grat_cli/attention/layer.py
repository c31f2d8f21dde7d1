"""One layer's attention over spans: what it is computed from, who is told of it, and what computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from grat_kernels import Backend, HeadPlan, Plan


class AttentionInputs(NamedTuple):
    """What one span attention is computed from.

    Attributes:
        layer: of the transformer, counted from 0, double blocks first.
        query: `[B, N, H, D]`, normalised, rotated, image tokens in the plan's order.
        key: likewise.
        value: likewise.
        plan: what attends what.
        scale: factor on the scores.
        text_valid: valid text tokens of each sample, `[B]`, or None for all.
        summaries: means of keys and values for the far field, `[B, R, H, D]` each, where they are made already.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    plan: Plan | HeadPlan
    scale: float
    text_valid: torch.Tensor | None = None
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None


Attend = Callable[[AttentionInputs], "torch.Tensor"]


class CallObserver(Protocol):
    """Told of every transformer call and every attention inside it, so that timing stays outside the model."""

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call of denoising step `step` begins; `density` is the mean over its layers."""
        ...

    def end_call(self) -> None:
        """The transformer call has been issued."""
        ...

    def attention(self, inputs: AttentionInputs | None = None) -> AbstractContextManager[None]:
        """Surrounds one attention; `inputs` are None where it is not span attention."""
        ...


class Text(NamedTuple):
    """What a call's joint sequence holds besides image tokens.

    Attributes:
        longest: the longest valid length of its texts.
        valid: the valid length of each sample's text `[B]`, where they differ.
        references: tokens of pictures to refer to, behind the image tokens.
    """

    longest: int
    valid: torch.Tensor | None = None
    references: int = 0


class Scaling(NamedTuple):
    """Of scores, beside 1/√D: a factor for all queries, and one for each, `[N, 1 or H, 1]` fp32, or None."""

    factor: float = 1.0
    queries: torch.Tensor | None = None


class LayerAttention:
    """Attention of one layer; the adapter sets its attributes before every transformer call.

    Attributes:
        plan: what attends what in the next call.
        text_valid: valid text tokens of each sample `[B]` in the next call, None where all are valid.
        scaling: of the scores, beside 1/√D; likewise.
    """

    plan: Plan | HeadPlan
    text_valid: torch.Tensor | None = None
    scaling = Scaling()

    def __init__(self, layer: int, attend: Attend, observer: CallObserver | None) -> None:
        self._layer, self._attend = layer, attend
        self._observed = observer.attention if observer else nullcontext

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of the joint sequence, `[B, N, H, D]` like each input; see `AttentionInputs`."""
        # Scores are scaled through the queries, one more pass over them, because keys share their rotation tables and
        # kernels take one scale. Where all queries have one factor, which is then the kernel's, it costs nothing.
        if self.scaling.queries is not None:
            query.mul_(self.scaling.queries)
        scale = self.scaling.factor / math.sqrt(query.shape[-1])
        inputs = AttentionInputs(self._layer, query, key, value, self.plan, scale, self.text_valid, summaries)
        with self._observed(inputs):
            return self._attend(inputs)


def over_spans(backend: Backend) -> Attend:
    """What computes span attention by a backend."""
    from grat_kernels import span_attention

    def attend(inputs: AttentionInputs) -> torch.Tensor:
        return span_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.plan,
            inputs.text_valid,
            inputs.scale,
            backend,
            summaries=inputs.summaries,
        )

    return attend
