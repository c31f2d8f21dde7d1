"""What an adapter is: the one place that knows how a model family's transformer is put together."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from grat_cli.attention.schedule import AttentionSchedule
    from grat_kernels import Backend, HeadPlan, Plan


class Run(Protocol):
    """What an adapter asks while a pipeline runs. Answers never wait for the device."""

    def current_step(self) -> int:
        """The denoising step of the call under way, counted from 0 over the steps that are run."""
        ...

    def schedule(self, text_len: int) -> AttentionSchedule:
        """Plans for every step, layer and head of a joint sequence with `text_len` text tokens."""
        ...


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


class Adapter(Protocol):
    """One model family: runs its transformer on permuted tokens with span attention, and undoes it."""

    text_first: bool
    """Whether text tokens come before image tokens in the joint sequence."""

    preparation: str | None
    """What normalises, rotates and joins queries and keys, and why; None before the first call."""

    chunking: tuple[int | None, str]
    """How many tokens at most run through feed-forward and modulation at once, None for all; and why."""

    @property
    def layers(self) -> int:
        """Number of attention layers that take a plan."""
        ...

    @property
    def heads(self) -> int:
        """Heads of each."""
        ...

    def attached(
        self, run: Run, backend: Backend, observer: CallObserver | None = None
    ) -> AbstractContextManager[None]:
        """While inside, the transformer attends over spans; leaving restores it exactly, also after an exception.

        Args:
            run: gives plans and the step of each call.
            backend: how span attention is computed.
            observer: told of calls and attentions, or None.

        Raises:
            BadInput: if the transformer is in a state that is not supported, with the reason.
        """
        ...
