"""Attention layers as backends of diffusers' attention dispatcher, so that stock processors attend over spans.

Processors of diffusers hand query, key and value, `[B, N, H, D]` each, to `dispatch_attention_fn`, with the backend
that they name. Here each layer is such a backend while it is installed: the dispatcher tells a backend nothing of who
calls it, and layers have plans of their own. Read against diffusers 0.42.1, `models/attention_dispatch.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from grat_cli.attention.layer import LayerAttention
from grat_cli.errors import BadInput

_PREFIX = "grat layer "


@contextmanager
def registered(layers: Sequence[LayerAttention]) -> Iterator[None]:
    """While inside, each layer is a backend of the dispatcher."""
    names = [_name_of(layer) for layer in layers]
    try:
        for name, layer in zip(names, layers, strict=True):
            _AttentionBackendRegistry.register(name)(_backend_of(layer))
        yield
    finally:
        for name in names:
            for table in (_AttentionBackendRegistry._backends, _AttentionBackendRegistry._constraints):
                table.pop(name, None)
            _AttentionBackendRegistry._supported_arg_names.pop(name, None)


def processor_of(layer: LayerAttention, stock: Any) -> Any:
    """A copy of a stock processor whose attention is that of a layer."""
    own = copy.copy(stock)
    own._attention_backend = _name_of(layer)
    return own


def is_of_layer(processor: Any) -> bool:
    """Whether a processor is one of `processor_of`."""
    return str(getattr(getattr(processor, "_attention_backend", None), "value", "")).startswith(_PREFIX)


def _name_of(layer: LayerAttention) -> AttentionBackendName:
    """A backend's name as the dispatcher takes it; nobody can look it up, because enums take no new members."""
    value = f"{_PREFIX}{id(layer)}"
    name = str.__new__(AttentionBackendName, value)
    name._name_ = name._value_ = value
    return name


def _backend_of(layer: LayerAttention) -> Callable[..., torch.Tensor]:
    """A layer in the dispatcher's form.

    The mask is that of padded text, which a plan and `text_valid` stand for.

    Raises:
        BadInput: at a call that asks for what attention over spans does not have.
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

    return attend
