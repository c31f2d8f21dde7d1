"""Attention inside a transformer, timed: one plan for a whole run, or stock attention as diffusers computes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from grat_cli.adapters.base import CallObserver
    from grat_kernels import Plan


class FixedPlan:
    """The same plan in every step and layer; an `adapters.base.Run` and its own schedule."""

    def __init__(self, plan: Plan, step: Callable[[], int] = lambda: 0) -> None:
        """`step` gives the denoising step of the call under way."""
        self._plan, self._step = plan, step

    def current_step(self) -> int:
        """See `adapters.base.Run`."""
        return self._step()

    def schedule(self, text_len: int) -> Any:
        """Itself.

        Raises:
            ValueError: if the call has another length of text than the plan.
        """
        if text_len != self._plan.text_len:
            raise ValueError(f"the plan is for {self._plan.text_len} text tokens, the call has {text_len}")
        return self

    def plan(self, step: int, layer: int) -> Plan:
        """The plan."""
        return self._plan

    def density_of_step(self, step: int) -> float:
        """Its density."""
        return self._plan.density


@contextmanager
def stock_attention(
    transformer: torch.nn.Module, observer: CallObserver, step: Callable[[], int] = lambda: 0, masked: bool = True
) -> Iterator[None]:
    """While inside, an observer is told of the transformer's calls and stock attentions; nothing else changes.

    Timed are the calls of `dispatch_attention_fn`, as an adapter times those of `span_attention`.

    Args:
        transformer: of diffusers, with stock attention processors.
        observer: told of calls and attentions.
        step: gives the denoising step of the call under way.
        masked: False leaves out masks, where all they say is that nothing is masked: a mask keeps torch from its
            fastest kernels.
    """
    module: Any = sys.modules[type(transformer).__module__]
    stock = module.dispatch_attention_fn

    def timed(*args: Any, **kwargs: Any) -> Any:
        if not masked:
            kwargs["attn_mask"] = None
        with observer.attention():
            return stock(*args, **kwargs)

    def begin(*_: Any) -> None:
        observer.begin_call(step(), 1.0)

    def end(*_: Any) -> None:
        observer.end_call()

    handles = [transformer.register_forward_pre_hook(begin), transformer.register_forward_hook(end)]
    module.dispatch_attention_fn = timed
    try:
        yield
    finally:
        module.dispatch_attention_fn = stock
        for handle in handles:
            handle.remove()
