"""What tests of HunyuanVideo-1.5 share: stock attention under masks, runs, the state of a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny_hunyuan15
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_hunyuan_video15 as stock
from hunyuan_runs import GROUP

from grat_cli.presets import Preset
from grat_kernels import Grid, Grouping, Pattern, Plan, build_plan


class Run:
    """A run with a plan a layer; it keeps the lengths of text that it is asked for."""

    def __init__(self, grid: Grid, *patterns: Pattern) -> None:
        self.grid, self.patterns, self.text_lengths = grid, patterns, []

    def current_step(self) -> int:
        return 0

    def schedule(self, text_len: int, references: int = 0) -> Any:
        self.text_lengths.append(text_len)
        return self

    def density_of_step(self, step: int) -> float:
        return 1.0

    def plan(self, step: int, layer: int) -> Plan:
        pattern = self.patterns[layer % len(self.patterns)]
        return build_plan(Grouping(self.grid, GROUP), pattern, self.text_lengths[-1], text_first=False)


@contextmanager
def under_masks(*masks: np.ndarray) -> Iterator[None]:
    """While inside, stock attention runs under a mask between video tokens, one a layer in turn."""
    called: list[torch.Tensor] = []

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any, **options: Any) -> Any:
        mask = torch.from_numpy(masks[len(called) % len(masks)])
        called.append(mask)
        attn_mask = attn_mask.clone()
        attn_mask[:, :, : len(mask), : len(mask)] &= mask
        return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "dispatch_attention_fn", masked)
        yield
    assert called


def snapshot(pipe: Any) -> list[Any]:
    """Everything that `install` and a run may touch."""
    model = pipe.transformer
    modules = (model, model.rope, model.x_embedder, model.proj_out)
    hooks = [(list(module._forward_pre_hooks), list(module._forward_hooks)) for module in modules]
    processors = [id(block.attn.processor) for block in model.transformer_blocks]
    parts = (pipe, pipe.scheduler, pipe.guider, pipe.video_processor, model)
    return [processors, hooks, [sorted(vars(part)) for part in parts], id(pipe.guider), id(pipe.scheduler)]


def preset(variant: str = "full", schedule: dict[str, Any] | None = None, **attention: Any) -> Preset:
    return Preset.model_validate(
        {
            "name": "test",
            "model": "hunyuan15",
            "attention": {"variant": variant, "group": list(GROUP), **attention},
            "schedule": schedule or {},
            "kernel": {"backend": "sdpa"},
        }
    )


LONG, SHORT, QUOTING = "waves at night under a red boat", "snow", 'a sign that says "go home" on a wall'
STEPS = 3
# 4 x 5 x 7 tokens: ragged groups of 2x3x3. A picture's shape chooses the size: 4 x 3 x 5.
SIZE: dict[str, Any] = {"height": 80, "width": 112, "num_frames": 13}
SIZE_OF_PICTURE: dict[str, Any] = {"height": 48, "width": 80, "num_frames": 13}


def call(pipe: Any, prompt: str | list[str] = LONG, **arguments: Any) -> torch.Tensor:
    """Latents that a pipeline from text makes for seed 5."""
    defaults = {
        "prompt": prompt,
        **SIZE,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
    }
    return pipe(**(defaults | arguments)).frames


def call_with_picture(pipe: Any, prompt: str | list[str] = LONG, **arguments: Any) -> torch.Tensor:
    """Likewise of one that starts from a picture."""
    size = SIZE_OF_PICTURE
    defaults = {
        "image": tiny_hunyuan15.first_frame(2 * size["width"], 2 * size["height"]),
        "prompt": prompt,
        "num_frames": size["num_frames"],
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
    }
    return pipe(**(defaults | arguments)).frames


def unguided(pipe: Any) -> Any:
    """The pipeline with a guider that does nothing."""
    pipe.guider = pipe.guider.new(enabled=False)
    return pipe
