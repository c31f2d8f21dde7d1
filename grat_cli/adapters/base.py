"""What an adapter is: the one place that knows how a model family's transformer is put together."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from grat_cli.schedule import AttentionSchedule
    from grat_kernels import Backend


class Run(Protocol):
    """What an adapter asks while a pipeline runs. Answers never wait for the device."""

    def current_step(self) -> int:
        """The denoising step of the call under way, counted from 0 over the steps that are run."""
        ...

    def schedule(self, text_len: int) -> AttentionSchedule:
        """Plans for every step, layer and head of a joint sequence with `text_len` text tokens."""
        ...


class CallObserver(Protocol):
    """Told of every transformer call and every attention inside it, so that timing stays outside the model."""

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call of denoising step `step` begins; `density` is the mean over its layers."""
        ...

    def end_call(self) -> None:
        """The transformer call has been issued."""
        ...

    def attention(self) -> AbstractContextManager[None]:
        """Surrounds one span attention."""
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
