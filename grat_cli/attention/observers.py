"""Several observers of one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grat_cli.attention.layer import AttentionInputs, CallObserver


class Observers:
    """Tells each of several observers, in order; an `layer.CallObserver`.

    Around an attention or exchange the last one is innermost, so that a stopwatch does not count what the others do.
    """

    def __init__(self, *observers: CallObserver) -> None:
        self._observers = observers

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call begins."""
        for observer in self._observers:
            observer.begin_call(step, density)

    def end_call(self) -> None:
        """It has been issued."""
        for observer in self._observers:
            observer.end_call()

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        """Surrounds one attention."""
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.attention(inputs))
            yield

    @contextmanager
    def exchange(self, sent_bytes: int) -> Iterator[None]:
        """Surrounds one exchange between ranks."""
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.exchange(sent_bytes))
            yield
