"""A tiny random HunyuanVideo transformer of the real diffusers class, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

TEXT_TOKENS = 7
DOUBLE_BLOCKS, SINGLE_BLOCKS = 1, 2
LAYERS = DOUBLE_BLOCKS + SINGLE_BLOCKS
PATCH = 2


def transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    """3 layers, 2 heads of 16, random weights large enough that attention matters to the output."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": DOUBLE_BLOCKS,
        "num_single_layers": SINGLE_BLOCKS,
        "num_refiner_layers": 1,
        "patch_size": PATCH,
        "patch_size_t": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    }
    model = HunyuanVideoTransformer3DModel(**(config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "to_" in name or "add_" in name else 1.5)
    return model


def inputs(grid: tuple[int, ...], valid: tuple[int, ...] = (TEXT_TOKENS,), seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one transformer call on a grid of frames, rows and columns of tokens.

    Args:
        grid: tokens per axis.
        valid: valid text tokens of each sample.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns = grid
    batch = len(valid)
    mask = torch.arange(TEXT_TOKENS)[None, :] < torch.tensor(valid)[:, None]
    return {
        "hidden_states": torch.randn(batch, 4, frames, rows * PATCH, columns * PATCH, generator=generator),
        "timestep": torch.full((batch,), 700),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 32, generator=generator),
        "encoder_attention_mask": mask.float(),
        "pooled_projections": torch.randn(batch, 24, generator=generator),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }
