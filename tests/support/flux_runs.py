"""Runs and pipelines of the tiny Flux with patterns, and what stock diffusers is given in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tiny_flux
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grat_cli.presets import Preset
from grat_kernels import Grid, Grouping, HeadPlan, Pattern, Plan, build_plan

# Two computations of one fp32 forward pass: sums of a few hundred terms in another order, through three layers.
RELATIVE = 5e-6
GROUP = (4, 4)


class Schedule:
    """A schedule from a function of step and layer."""

    def __init__(self, plan: Callable[[int, int], Plan | HeadPlan]) -> None:
        self.plan = plan

    def density_of_step(self, step: int) -> float:
        return float(np.mean([self.plan(step, layer).density for layer in range(tiny_flux.LAYERS)]))


class Run:
    """A run that stands at one step."""

    def __init__(self, plan: Callable[[int, int], Plan | HeadPlan], step: int = 0) -> None:
        self.plans, self.step, self.text_lengths = plan, step, []

    def current_step(self) -> int:
        return self.step

    def schedule(self, text_len: int, references: int = 0) -> Any:
        self.text_lengths.append(text_len)
        return Schedule(self.plans)


def plan_of(grid: Grid, pattern: Pattern, cells: tuple[tuple[int, int], ...] = (GROUP,)) -> Plan:
    return build_plan(Grouping(grid, GROUP, cells), pattern, tiny_flux.TEXT_TOKENS, text_first=True)


def run_with(grid: Grid, pattern: Pattern) -> Any:
    plan = plan_of(grid, pattern)
    return Run(lambda step, layer: plan)


def raster_mask(grid: Grid, radius: int | None, same_row_or_column: bool, references: int = 0) -> torch.Tensor:
    """What GRAT-B or GRAT-X allows, `[N, N]` in raster order, text first and references last; written without the
    project's own code."""
    row, column = np.divmod(np.arange(grid.tokens), grid.shape[1])
    rows, columns = row // GROUP[0], column // GROUP[1]
    row_distance = np.abs(rows[:, None] - rows[None, :])
    column_distance = np.abs(columns[:, None] - columns[None, :])
    near = np.maximum(row_distance, column_distance) <= (-1 if radius is None else radius)
    cross = same_row_or_column & ((row_distance == 0) | (column_distance == 0))
    mask = np.ones((tiny_flux.TEXT_TOKENS + grid.tokens + references,) * 2, bool)
    of_image = slice(tiny_flux.TEXT_TOKENS, tiny_flux.TEXT_TOKENS + grid.tokens)
    mask[of_image, of_image] = near | cross
    return torch.from_numpy(mask)


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


def snapshot(model: Any) -> tuple[Any, ...]:
    """Everything that an adapter may touch."""
    processors = [block.attn.processor for block in (*model.transformer_blocks, *model.single_transformer_blocks)]
    hooks = [
        list(getattr(model, name).items())
        for name in (
            "_forward_pre_hooks",
            "_forward_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_with_kwargs",
        )
    ]
    return [id(processor) for processor in processors], hooks, sorted(model.__dict__), set(vars(type(model)))


class NoHostReads(TorchDispatchMode):
    """Fails on operations that make the host wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"), name
        return function(*args, **(kwargs or {}))


# Whole pipelines

HEIGHT, WIDTH = 144, 208  # 18 x 26 tokens: ragged groups of 4
GRID = Grid((HEIGHT // tiny_flux.PIXELS_PER_TOKEN, WIDTH // tiny_flux.PIXELS_PER_TOKEN))
# Three steps of a model whose layers differ by a few fp32 roundings.
RELATIVE_OF_PIPELINES = 2e-5


def preset(variant: str = "full", schedule: dict[str, Any] | None = None, **attention: Any) -> Preset:
    return Preset.model_validate(
        {
            "name": "test",
            "model": "flux",
            "attention": {"variant": variant, "group": [4, 4], **attention},
            "schedule": schedule or {},
            "kernel": {"backend": "sdpa"},
        }
    )


GUIDED: dict[str, Any] = {**tiny_flux.negative_prompt(), "true_cfg_scale": 2.0}


def call(pipe: Any, batch: int = 1, height: int = HEIGHT, width: int = WIDTH, **arguments: Any) -> Any:
    """What the pipeline returns for seed 5: latents, unless another output is asked for."""
    defaults = {
        **tiny_flux.prompt(batch),
        "height": height,
        "width": width,
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
    }
    return pipe(**(defaults | arguments)).images
