"""Joint attention of text and image tokens as stock diffusers has it, with span attention in place of dense attention.

Serves attention modules whose parts have diffusers' usual names: `to_q`, `norm_q`, `to_out`, and where text has weights
of its own, `add_q_proj`, `norm_added_q`, `to_add_out`.
"""

from __future__ import annotations

from typing import Any

import torch

from grat_cli.attention import operators, preparation
from grat_cli.attention.layer import LayerAttention
from grat_kernels.rope_norm import Projections


class SpanAttentionProcessor:
    """The processor of one attention module.

    Attributes:
        attention: of the layer.
        fused: whether norms, rotation, joining of text and image, and far-field means are one kernel; the adapter sets
            it before every transformer call.
    """

    fused = False

    def __init__(self, attention: LayerAttention, *, text_first: bool, contiguous: bool) -> None:
        """Attends by a layer.

        Args:
            attention: the layer.
            text_first: whether text comes first in the joint sequence.
            contiguous: whether text and image are made contiguous before the output projections.
        """
        self.attention = attention
        self._text_first, self._contiguous = text_first, contiguous

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one block.

        Args:
            attn: the block's attention module.
            hidden_states: image tokens `[B, image, C]` in group order; or without `encoder_hidden_states` all tokens.
            encoder_hidden_states: text tokens `[B, text, C]` where they are apart.
            attention_mask: which text is valid; the layer's `text_valid` says the same.
            image_rotary_emb: a pair, cosines and sines `[rows, D]`, in group order; see `rope_norm.rope_norm`.

        Returns:
            Image and text tokens where they were apart, else all tokens.
        """
        image = _projected(attn, hidden_states, of_text=False)
        text = None
        if encoder_hidden_states is not None:  # without weights of its own it goes through those of the image
            text = _projected(attn, encoder_hidden_states, of_text=attn.added_kv_proj_dim is not None)
        if self.fused and torch.compiler.is_compiling():
            norms, text_norms = preparation.norms_of(attn, has_text=text is not None)
            attended = operators.prepare_and_attend(
                image, norms, image_rotary_emb, self.attention.number, text, text_norms
            ).flatten(2, 3)
        else:
            if self.fused:
                joined = preparation.at_once(attn, image, text, image_rotary_emb, self.attention.prepared)
            else:
                joined = preparation.as_stock(attn, image, text, image_rotary_emb, self._text_first)
            del image, text  # else the projections would be kept for as long as attention runs
            attended = self.attention(*joined).flatten(2, 3)
        if encoder_hidden_states is None:
            return attended
        if self._text_first:
            text, image = attended.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        else:
            image, text = attended.tensor_split([hidden_states.shape[1]], dim=1)
        if self._contiguous:
            image, text = image.contiguous(), text.contiguous()
        if getattr(attn, "to_out", None) is not None:
            projection, dropout = attn.to_out
            image = dropout(projection(image))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return image, text


def _projected(attn: Any, tokens: torch.Tensor, of_text: bool) -> Projections:
    """Query, key and value, `[B, N, H, D]` each."""
    if getattr(attn, "fused_projections", False):
        projected = (attn.to_added_qkv if of_text else attn.to_qkv)(tokens).chunk(3, dim=-1)
    elif of_text:
        projected = attn.add_q_proj(tokens), attn.add_k_proj(tokens), attn.add_v_proj(tokens)
    else:
        projected = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    head_dim = attn.inner_dim // attn.heads
    return Projections(*(tensor.unflatten(-1, (-1, head_dim)) for tensor in projected))
