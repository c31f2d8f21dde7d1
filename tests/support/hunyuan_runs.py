"""What tests of HunyuanVideo share: masks in raster order, distances, the state of a transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

from grat_kernels import Grid

GROUP = (2, 3, 3)


def raster_mask(grid: Grid, radius: int | tuple[int, ...] | None, share: int | None) -> np.ndarray:
    """What GRAT-B or GRAT-X allows between video tokens, `[N, N]` in raster order; without the project's own code."""
    coordinates = np.stack(np.unravel_index(np.arange(grid.tokens), grid.shape), axis=1) // GROUP
    apart = np.abs(coordinates[:, None] - coordinates[None, :])
    if radius is not None:
        return np.asarray((apart <= radius).all(-1))
    return np.asarray((apart == 0).sum(-1) >= share)


class StockUnderMask:
    """Stock attention under a mask between video tokens; text as stock has it."""

    def __init__(self, video: np.ndarray) -> None:
        self.video, self.stock = torch.from_numpy(video), HunyuanVideoAttnProcessor2_0()

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any, image_rotary_emb: Any
    ) -> Any:
        count = len(self.video)
        mask = attention_mask.expand(-1, -1, attention_mask.shape[-1], -1).clone()
        mask[:, :, :count, :count] &= self.video
        return self.stock(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)  # pyright: ignore


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


def under_masks(model: Any, inputs: dict[str, Any], *masks: np.ndarray) -> torch.Tensor:
    """The stock prediction with a mask a layer."""
    for layer, attention in enumerate(attentions(model)):
        attention.set_processor(StockUnderMask(masks[layer % len(masks)]))
    try:
        return model(**inputs)[0]
    finally:
        for attention in attentions(model):
            attention.set_processor(HunyuanVideoAttnProcessor2_0())


def snapshot(model: Any) -> list[Any]:
    """Everything that the adapter may touch."""
    hooks = [
        (list(module._forward_pre_hooks), list(module._forward_hooks))
        for module in (model, model.rope, model.x_embedder, model.proj_out)
    ]
    return [[id(attention.processor) for attention in attentions(model)], hooks, sorted(model.__dict__)]
