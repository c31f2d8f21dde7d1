"""Attentions as backends of diffusers' attention dispatcher, so that stock processors attend over spans.

Processors of diffusers hand query, key and value, `[B, N, H, D]` each, to `dispatch_attention_fn`, with the backend
that they name. Here each layer is such a backend while it is installed: the dispatcher tells a backend nothing of who
calls it, and layers have plans of their own. Read against diffusers 0.42.1, `models/attention_dispatch.py`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from grat_cli.attention.layer import LayerAttention
from grat_cli.errors import BadInput

_PREFIX = "grat layer "
_numbers = itertools.count()


class Named(NamedTuple):
    """A backend, and what a processor's `_attention_backend` says for it."""

    name: AttentionBackendName
    compute: Callable[..., torch.Tensor]


def named(compute: Callable[..., torch.Tensor]) -> Named:
    """A backend of a name of its own; nobody can look it up, because enums take no new members.

    Args:
        compute: takes the arguments of `dispatch_attention_fn`, by the names that backends have for them.
    """
    value = f"{_PREFIX}{next(_numbers)}"
    name = str.__new__(AttentionBackendName, value)
    name._name_ = name._value_ = value
    return Named(name, compute)


@contextmanager
def registered(backends: Sequence[Named]) -> Iterator[None]:
    """While inside, the dispatcher knows these backends."""
    tables = ("_backends", "_constraints", "_supported_arg_names")
    try:
        for backend in backends:
            _AttentionBackendRegistry.register(backend.name)(backend.compute)
        yield
    finally:
        for backend, table in itertools.product(backends, tables):
            getattr(_AttentionBackendRegistry, table).pop(backend.name, None)


def with_backend(processor: Any, backend: Named) -> Any:
    """A copy of a stock processor whose attention is a backend's; the processor itself may serve other attentions."""
    own = copy.copy(processor)
    own._attention_backend = backend.name
    return own


def is_of_layer(processor: Any) -> bool:
    """Whether a processor is one of `with_backend`."""
    return str(getattr(getattr(processor, "_attention_backend", None), "value", "")).startswith(_PREFIX)


def backend_of(layer: LayerAttention) -> Named:
    """A layer of a known model family as a backend.

    The mask that it is given is that of padded text, which a plan and `text_valid` stand for.
    """

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        if dropout_p or is_causal or scale is not None or key.shape != query.shape:
            raise BadInput("attention over spans is neither causal, dropped out, scaled otherwise, nor of shared heads")
        return layer(query, key, value)

    return named(attend)
