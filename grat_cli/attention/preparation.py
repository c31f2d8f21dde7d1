"""Who makes what span attention takes out of projections: one fused kernel, or a model's own norms and functions.

Attention modules of diffusers name their norms alike: `norm_q` and `norm_k`, and where text has
weights of its own, `norm_added_q` and `norm_added_k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm

from grat_cli.errors import BadInput
from grat_kernels import HeadPlan, Plan, rope_norm
from grat_kernels.rope_norm import Joined, Norms, Projections

# Both are weights and an eps; what stock rounds in between is another matter.
_RMS_NORMS = (torch.nn.RMSNorm, RMSNorm)


def choose(
    wanted: bool | None,
    attentions: Sequence[Any],
    tokens: torch.Tensor,
    references: int = 0,
) -> tuple[bool, str]:
    """Whether the fused kernel prepares the attention of a call, and in words what does and why.

    Args:
        wanted: whether by the fused kernel; None for wherever it can run on a GPU.
        attentions: attention modules of the transformer.
        tokens: of the call, for their device and dtype.
        references: how many tokens of pictures to refer to are in the joint sequence.

    Raises:
        BadInput: if the fused kernel is wanted and cannot run.
    """
    if wanted is False:
        return False, "stock modules: the fused kernel was not wanted"
    device, dtype, head_dim = tokens.device, tokens.dtype, attentions[0].inner_dim // attentions[0].heads
    obstacle = next(filter(None, map(_norm_obstacle, attentions)), None)
    if references:
        obstacle = "the fused kernel knows no tokens of references"
    elif torch.is_autocast_enabled(device.type):
        obstacle = "under autocast projections are of another dtype than norms"
    if obstacle is None and wanted:
        obstacle = rope_norm.obstacle(device, dtype, head_dim)
    elif obstacle is None:
        chosen, reason = rope_norm.choose(device, dtype, head_dim)
        obstacle = None if chosen else reason
    if obstacle and wanted:
        raise BadInput(f"the fused kernel cannot run here: {obstacle}")
    return obstacle is None, f"stock modules: {obstacle}" if obstacle else "fused kernel"


def at_once(
    attention: Any, image: Projections, text: Projections | None, rotation: Any, plan: Plan | HeadPlan
) -> Joined:
    """The joint sequence normalised and rotated, and its far field pooled, by the fused kernel.

    Args:
        attention: the attention module; text that has no norms of its own there goes through those of the image.
        image: projections of the image tokens in the plan's order; without `text`, of the joint sequence.
        text: projections of the text tokens where they are apart.
        rotation: see `rope_norm.rope_norm`.
        plan: of the attention to come.
    """
    norms, text_norms = norms_of(attention, has_text=text is not None)
    return rope_norm.rope_norm(image, norms, rotation, plan, text=text, text_norms=text_norms, fused=True)


def norms_of(attention: Any, *, has_text: bool) -> tuple[Norms, Norms | None]:
    """Norms of queries and keys of the image, and where text is apart of the text, as the fused kernel takes them."""
    norms = _weights(attention.norm_q, attention.norm_k)
    if not has_text:
        return norms, None
    has_own = attention.added_kv_proj_dim is not None
    return norms, _weights(attention.norm_added_q, attention.norm_added_k) if has_own else norms


def as_stock(attention: Any, image: Projections, text: Projections | None, rotation: Any, text_first: bool) -> Joined:
    """The joint sequence, normalised and rotated by the modules and functions of stock attention.

    Args:
        attention: as for `at_once`, like those that follow.
        image: likewise.
        text: likewise.
        rotation: likewise.
        text_first: whether text comes first in the joint sequence.
    """
    query, key, value = _normed(attention.norm_q, image.query), _normed(attention.norm_k, image.key), image.value
    # Positions of the image alone, or of all tokens.
    of_image = rotation is not None and rotation[0].shape[0] == query.shape[1]
    if of_image:
        query, key = _rotated(query, rotation), _rotated(key, rotation)
    if text is not None:
        has_own = attention.added_kv_proj_dim is not None
        norms = (attention.norm_added_q, attention.norm_added_k) if has_own else (attention.norm_q, attention.norm_k)
        query = _joined(query, _normed(norms[0], text.query), text_first)
        key = _joined(key, _normed(norms[1], text.key), text_first)
        value = _joined(value, text.value, text_first)
    if rotation is not None and not of_image:
        query, key = _rotated(query, rotation), _rotated(key, rotation)
    return Joined(query, key, value, None)


def _joined(image: torch.Tensor, text: torch.Tensor, text_first: bool) -> torch.Tensor:
    return torch.cat([text, image] if text_first else [image, text], dim=1)


def _normed(norm: Any, tokens: torch.Tensor) -> torch.Tensor:
    return tokens if norm is None else norm(tokens)


def _rotated(tokens: torch.Tensor, rotation: Any) -> torch.Tensor:
    """Queries or keys `[B, N, H, D]` with their positions rotated in."""
    return cast(torch.Tensor, apply_rotary_emb(tokens, rotation, sequence_dim=1))


def _weights(query_norm: Any, key_norm: Any) -> Norms:
    return Norms(query_norm.weight, key_norm.weight, query_norm.eps)


def _norm_obstacle(attention: Any) -> str | None:
    """Why the norms of an attention must run as modules, or None where their weights are all there is to them."""
    names = ["norm_q", "norm_k"]
    if attention.added_kv_proj_dim is not None:
        names += ["norm_added_q", "norm_added_k"]
    norms = [getattr(attention, name) for name in names]
    for name, norm in zip(names, norms, strict=True):
        if type(norm) not in _RMS_NORMS or not norm.eps or getattr(norm, "bias", None) is not None:
            return f"{name} is not the RMS norm of the stock model"
        # Offloading and the like work by hooks, or replace a module's forward: weights may be elsewhere before.
        if "forward" in norm.__dict__ or norm._forward_pre_hooks or norm._forward_hooks:
            return f"{name} is hooked (sequential or group offloading)"
    if any(query.eps != key.eps for query, key in zip(norms[::2], norms[1::2], strict=True)):
        return "norms of queries and keys differ in eps"
    return None
