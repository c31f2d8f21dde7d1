"""Attentions as backends of diffusers' attention dispatcher, so that stock processors attend over spans.

Processors of diffusers hand query, key and value, `[B, N, H, D]` each, to `dispatch_attention_fn`, with the backend
that they name. Here there is one more, for the layers of all known models: which layer calls it, it is told by what the
processor names for its sequence's way over several devices, the one thing besides tensors that the dispatcher hands on.
One name for all layers keeps code that is compiled around them the same. Attentions of a transformer that is not known
are backends of their own while GRAT is tried on it. Read against diffusers 0.42.1, `models/attention_dispatch.py`.
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


def with_layer(processor: Any, layer: LayerAttention) -> Any:
    """A copy of a stock processor whose attention is a layer's of a known model."""
    if _LAYERS.name not in _AttentionBackendRegistry._backends:
        # Never taken back: compiled code remembers what the dispatcher knew when it was made.
        _AttentionBackendRegistry.register(_LAYERS.name)(_LAYERS.compute)
    own = with_backend(processor, _LAYERS)
    own._parallel_config = layer
    return own


def attends_by(processor: Any, layer: LayerAttention) -> bool:
    """Whether a processor of `with_layer` still is as it was made."""
    return processor._attention_backend is _LAYERS.name and processor._parallel_config is layer


def is_of_layer(processor: Any) -> bool:
    """Whether a processor is one of `with_backend` or `with_layer`."""
    return str(getattr(getattr(processor, "_attention_backend", None), "value", "")).startswith(_PREFIX)


def _attend(
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
    """Attention of the layer that a processor of `with_layer` names.

    The mask that it is given is that of padded text, which a plan and `text_valid` stand for.
    """
    if dropout_p or is_causal or scale is not None or key.shape != query.shape:
        raise BadInput("attention over spans is neither causal, dropped out, scaled otherwise, nor of shared heads")
    attended: torch.Tensor = _parallel_config(query, key, value)
    return attended


_LAYERS = named(_attend)
