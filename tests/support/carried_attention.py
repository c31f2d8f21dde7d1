"""Attention carried over steps as its formula says it, around stock diffusers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch


class Carried:
    """Outputs of attentions at reference steps as they are, and at steps between what follows from the last two."""

    def __init__(self, pipe: Any, references: Sequence[int], slope: Callable[[int], float]) -> None:
        self._pipe, self._references, self._slope = pipe, references, slope
        self._kept: dict[tuple[Any, int, int], Any] = {}  # by place, call of its step, and step
        self._calls: Counter[tuple[Any, int]] = Counter()

    def output(self, place: Any, compute: Callable[[], Any]) -> Any:
        """Of the attention at a place."""
        scheduler = self._pipe.scheduler
        step = (scheduler.begin_index or 0) if scheduler.step_index is None else scheduler.step_index
        call = self._calls[place, step]
        self._calls[place, step] += 1
        known = sorted(of for at, of_call, of in self._kept if (at, of_call) == (place, call))
        if step in self._references or not known:
            self._kept[place, call, step] = made = compute()
            return made
        last, before = known[-1], known[-2] if len(known) > 1 else known[-1]
        factor = self._slope(step) * (step - last) / max(last - before, 1)
        one, other = (self._kept[place, call, of] for of in (last, before))
        if isinstance(one, tuple):
            return tuple(a + factor * (a - b) for a, b in zip(one, other, strict=True))
        return one + factor * (one - other)


@contextmanager
def stock_carried(
    pipe: Any, where: Literal["module", "attention"], references: Sequence[int], slope: Callable[[int], float]
) -> Iterator[None]:
    """While inside, a stock pipeline's attentions are carried: whole attention modules by their processors, or what
    they hand to diffusers' dispatcher."""
    carried = Carried(pipe, references, slope)
    with pytest.MonkeyPatch.context() as patch:
        for transformer in filter(None, (pipe.transformer, getattr(pipe, "transformer_2", None))):
            if where == "attention":
                _carry_dispatched(transformer, carried, patch)
                continue
            for name, module in transformer.named_modules():
                # Cross-attention, and that of a refiner of text, stay as they are.
                if hasattr(module, "processor") and "attn2" not in name and "refiner" not in name:
                    patch.setattr(module, "processor", _processor(module.processor, module, carried))
        yield


def _processor(stock: Any, place: Any, carried: Carried) -> Any:
    def processor(*args: Any, **kwargs: Any) -> Any:
        return carried.output(place, lambda: stock(*args, **kwargs))

    processor.__call__ = stock.__call__  # whose arguments attention modules look at
    return processor


def _carry_dispatched(transformer: Any, carried: Carried, patch: pytest.MonkeyPatch) -> None:
    import sys

    of_class: Any = sys.modules[type(transformer).__module__]
    stock, turn = of_class.dispatch_attention_fn, Counter()
    patch.setattr(transformer, "forward", _counting(transformer.forward, turn))

    def dispatch(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        turn["layer"] += 1
        return carried.output(turn["layer"], lambda: stock(*args, **kwargs))

    patch.setattr(of_class, "dispatch_attention_fn", dispatch)


def _counting(forward: Any, turn: Counter[str]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        turn.clear()
        return forward(*args, **kwargs)

    return counted
