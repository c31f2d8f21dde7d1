"""One layer's attention over spans: what it is computed from, who is told of it, and what computes it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from grat_cli.errors import BadInput

if TYPE_CHECKING:
    import torch

    from grat_cli.attention.carrying import CarriedLayer
    from grat_cli.attention.context_parallel import Shared
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
        heads: which of the layer's these are, where ranks share them; None for all.
        whole: plan of all heads of the layer, where ranks share them; None for `plan`.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    plan: Plan | HeadPlan
    scale: float
    text_valid: torch.Tensor | None = None
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None
    heads: range | None = None
    whole: Plan | HeadPlan | None = None

    @property
    def density(self) -> float:
        """Attended pairs over all pairs, mean over all heads of the layer."""
        return (self.plan if self.whole is None else self.whole).density


Attend = Callable[[AttentionInputs], "torch.Tensor"]


class CallObserver(Protocol):
    """Told of every transformer call, and of every attention and exchange inside it, so that timing stays outside."""

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call of denoising step `step` begins; `density` is the mean over its layers."""
        ...

    def end_call(self) -> None:
        """The transformer call has been issued."""
        ...

    def attention(self, inputs: AttentionInputs | None = None) -> AbstractContextManager[None]:
        """Surrounds one attention, without exchanges; `inputs` are None where it is not span attention."""
        ...

    def exchange(self, sent_bytes: int) -> AbstractContextManager[None]:
        """Surrounds one exchange between ranks that share the call, in which this one sends so many bytes to others.

        An observer to which it is all the same leaves this as it is.
        """
        return nullcontext()


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
        text_valid: valid text tokens of each sample `[B]` in the next call, None where all are valid.
        scaling: of the scores under a plan, beside 1/√D; likewise. None for none.
        number: by which compiled code finds it; see `operators`.
        over_steps: what of it is carried over steps; None where nothing is.
        shared: by which ranks the tokens of the next call are shared; None where one has them all.
    """

    text_valid: torch.Tensor | None = None
    scaling: Callable[[Plan | HeadPlan], Scaling] | None = None
    over_steps: CarriedLayer | None = None
    shared: Shared | None = None

    def __init__(self, layer: int, attend: Attend, observer: CallObserver | None) -> None:
        from grat_cli.attention.operators import numbered

        self._layer, self._attend = layer, attend
        self._observed = observer.attention if observer else nullcontext
        self._plan: Plan | HeadPlan | None = None
        self.number = numbered(self)

    @property
    def plan(self) -> Plan | HeadPlan:
        """What attends what in the call under way.

        Raises:
            BadInput: if none is.
        """
        if self._plan is None:
            raise BadInput(
                "a part of the transformer that GRAT is installed on was called past the transformer itself: "
                "call the pipeline, or the transformer as it is in the pipeline"
            )
        return self._plan

    @plan.setter
    def plan(self, plan: Plan | HeadPlan) -> None:
        self._plan = plan

    @property
    def prepared(self) -> Plan | HeadPlan:
        """The joint sequence that is prepared in the call under way, and the far field that is pooled with it: of the
        plan; where ranks share tokens, of this rank's, and the far field waits for all of them.

        Raises:
            BadInput: as for `plan`.
        """
        return self.plan if self.shared is None else self.shared.own_plan(self.plan)

    def forget(self) -> None:
        """The call is over: there is no plan until the next one."""
        self._plan = None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of the joint sequence, `[B, N, H, D]` like each input; see `AttentionInputs`.

        Compiled code calls an operator in its place, which knows of no summaries: see `operators`.
        """
        import torch

        query, key, value = _as_autocast(query, key, value)
        if torch.compiler.is_compiling():
            from grat_cli.attention import operators

            return operators.attend(query, key, value, self.number)
        return self.compute(query, key, value, summaries)

    def compute(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        may_change: bool = True,
    ) -> torch.Tensor:
        """The same, of inputs of one dtype, outside of compiled code.

        Args:
            query: `[B, N, H, D]`.
            key: likewise.
            value: likewise.
            summaries: see `AttentionInputs`.
            may_change: whether queries may be scaled where they are, and nobody changes the output where it is.
        """

        def attended(plan: Plan | HeadPlan) -> torch.Tensor:
            if self.shared is None:
                return attended_by_one(query, key, value, plan)
            attended_by_share = functools.partial(attended_by_one, whole=plan)
            return self.shared.attention(query, key, value, plan, attended_by_share)

        def attended_by_one(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            plan: Plan | HeadPlan,
            heads: range | None = None,
            whole: Plan | HeadPlan | None = None,
        ) -> torch.Tensor:
            scaling = Scaling() if self.scaling is None else self.scaling(plan)
            scaled = query
            # Scores are scaled through the queries, one more pass over them, because keys share their rotation tables
            # and kernels take one scale. Where all queries have one factor, which is then the kernel's, it costs
            # nothing.
            if scaling.queries is not None:
                scaled = query.mul_(scaling.queries) if may_change else query * scaling.queries
            scale = scaling.factor / math.sqrt(query.shape[-1])
            made = summaries if plan.summaries.blocks == self.plan.summaries.blocks else None
            inputs = AttentionInputs(self._layer, scaled, key, value, plan, scale, self.text_valid, made, heads, whole)
            with without_autocast(query.device), self._observed(inputs):
                return self._attend(inputs)

        if self.over_steps is None or not self.over_steps.takes_attention:
            return attended(self.plan)
        keeps, may_change = not may_change, may_change and not self.over_steps.has_base
        return self.over_steps.attention(query, attended, self.plan, copies=keeps)

    def carried(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor | None:
        """What is carried over steps to this call of compiled code, so that queries need not be made; else None.

        Args:
            shape: of queries, `[B, N, H, D]`.
            like: of their dtype and device.
        """
        import torch

        if self.over_steps is None:
            return None
        return self.over_steps.attention_carried(((torch.Size(shape), like.dtype, like.device),), copies=True)


def _as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors in the dtype in which torch's own attention would take them under `torch.autocast`."""
    import torch

    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """While inside, computations run in the dtype of what they are given."""
    import torch

    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


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
