"""What ranks compute that share calls of transformers; by one rank alone as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from small_transformers import MODELS, Run
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

import grat_cli
from grat_cli.attention.adapter import Adapter
from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import load_pipeline
from grat_cli.presets import Preset
from grat_kernels import Backend

STEPS = 4


def adapter_of(name: str, ranks: ProcessGroup | None = None) -> Adapter:
    """Of the small transformer of a family."""
    kind = MODELS[name]
    return kind.adapter(kind.make(), kind.grids[0], ranks=ranks)


def predictions(ranks: ProcessGroup | None, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Of the small transformer of each family, `[steps, ...]`, at steps with other plans."""
    made = {}
    for name in names:
        adapter = adapter_of(name, ranks)
        run = Run(adapter)
        with torch.no_grad(), adapter.attached(run, Backend.SDPA):
            outputs = []
            for run.step in range(STEPS):
                output: Any = adapter.model(**MODELS[name].inputs(adapter.grid))
                outputs.append(output[0] if isinstance(output, tuple) else output.sample)
        made[name] = torch.stack(outputs)
    return made


class Picture(NamedTuple):
    """Pixels from 0 to 1, and which layers a guard has widened when."""

    pixels: np.ndarray
    widened: list[tuple[int, int]]


def pictures(
    ranks: ProcessGroup | None, presets: Sequence[dict[str, Any]], mesh: Mapping[str, int] | None = None
) -> list[Picture]:
    """Of the demo model, 120x128 pixels, by `install` with each preset; ranks share them as a mesh says, all calls by
    default."""
    parallel = None
    if ranks is not None:
        mesh = mesh or {"cp": ranks.size()}
        parallel = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    pipe: Any = load_pipeline(DEMO_FLUX.path)
    pipe.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"height": 120, "width": 128}
    made = []
    for preset in presets:
        with grat_cli.install(pipe, Preset.model_validate(preset), **size, parallel=parallel) as installation:
            pixels = pipe(
                "a red fox in the snow",
                negative_prompt="",
                true_cfg_scale=DEMO_FLUX.guidance,
                num_inference_steps=STEPS,
                max_sequence_length=DEMO_FLUX.text_tokens,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
                **size,
            ).images[0]
        widened = installation.guard.report()["widened"] if installation.guard else []
        made.append(Picture(pixels, [(one["step"], one["layer"]) for one in widened]))
    return made
