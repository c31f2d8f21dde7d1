"""What ranks compute that share calls of small transformers; by one rank alone as well."""

from __future__ import annotations

from typing import Any

import torch
from small_transformers import MODELS, Run
from torch.distributed import ProcessGroup

from grat_kernels import Backend

STEPS = 4


def predictions(ranks: ProcessGroup | None, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Of the small transformer of each family, `[steps, ...]`, at steps with other plans."""
    made = {}
    for name in names:
        kind = MODELS[name]
        model, grid = kind.make(), kind.grids[0]
        adapter = kind.adapter(model, grid)
        run = Run(adapter)
        with torch.no_grad(), adapter.attached(run, Backend.SDPA, ranks=ranks):
            outputs = []
            for run.step in range(STEPS):
                output: Any = model(**kind.inputs(grid))
                outputs.append(output[0] if isinstance(output, tuple) else output.sample)
        made[name] = torch.stack(outputs)
    return made
