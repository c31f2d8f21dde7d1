"""A layer's attention as operators, so that code compiled around it keeps one graph and serves all layers and steps.

A plan, a schedule and observers are objects of Python, which differ between layers and steps: a graph that held them
would be made anew for each. Here a graph holds the number of a layer in a tensor, which is an input of it like weights
are, and the layer is looked up when the graph runs. Shapes of the outputs depend on those of the inputs alone.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch

from grat_kernels import HeadPlan, Plan, rope_norm
from grat_kernels.rope_norm import Norms, Projections


class Layer(Protocol):
    """What operators ask of a `layer.LayerAttention`."""

    @property
    def prepared(self) -> Plan | HeadPlan:
        """The joint sequence that is prepared in the call under way, and its far field."""
        ...

    def compute(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        may_change: bool = True,
    ) -> torch.Tensor:
        """Its attention."""
        ...

    def carried(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor | None:
        """What stands for it at a step, or None."""
        ...


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def numbered(layer: Layer) -> torch.Tensor:
    """The number of a layer, by which operators find it as long as it is kept: an integer in main memory, so that
    reading it waits for no device."""
    number = next(_numbers)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """`LayerAttention.compute` of a layer by its number, `[B, N, H, D]`."""
    attended: torch.Tensor = _attend(query, key, value, number)
    return attended


def prepare_and_attend(
    image: Projections,
    norms: Norms,
    rotation: Any,
    number: torch.Tensor,
    text: Projections | None = None,
    text_norms: Norms | None = None,
) -> torch.Tensor:
    """Attention of a layer by its number to what the fused kernel makes of projections, `[B, N, H, D]`.

    Arguments are those of `rope_norm.rope_norm`. How many rows of summaries that makes depends on the plan, so both are
    one operator.
    """
    text, text_norms = text or Projections(None, None, None), text_norms or norms  # type: ignore[arg-type]
    cosines, sines = rotation or (None, None)
    attended: torch.Tensor = _prepare_and_attend(
        *image, *text, *norms[:2], *text_norms[:2], cosines, sines, norms.eps, text_norms.eps, number
    )
    return attended


@torch.library.custom_op("grat::layer_attention", mutates_args=())
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return _LAYERS[int(number)].compute(query, key, value, may_change=False).contiguous()


@_attend.register_fake
def _(query: torch.Tensor, *_others: object) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("grat::prepared_layer_attention", mutates_args=())
def _prepare_and_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    text_query_weight: torch.Tensor | None,
    text_key_weight: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    eps: float,
    text_eps: float,
    number: torch.Tensor,
) -> torch.Tensor:
    layer, text, text_norms = _LAYERS[int(number)], None, None
    if (carried := layer.carried(_joint_shape(query, text_query), query)) is not None:
        return carried
    if text_query is not None and text_key is not None and text_value is not None:
        text = Projections(text_query, text_key, text_value)
        text_norms = Norms(text_query_weight, text_key_weight, text_eps)
    rotation = None if cosines is None or sines is None else (cosines, sines)
    joined = rope_norm.rope_norm(
        Projections(query, key, value),
        Norms(query_weight, key_weight, eps),
        rotation,
        layer.prepared,
        text=text,
        text_norms=text_norms,
        fused=True,
    )
    return layer.compute(*joined).contiguous()


@_prepare_and_attend.register_fake
def _(
    query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor, text_query: torch.Tensor | None, *_others: object
) -> torch.Tensor:
    return query.new_empty(_joint_shape(query, text_query))


def _joint_shape(query: torch.Tensor, text_query: torch.Tensor | None) -> tuple[int, ...]:
    """`[B, N, H, D]` of image and text together."""
    batch, tokens, heads, channels = query.shape
    return batch, tokens + (0 if text_query is None else text_query.shape[1]), heads, channels
