"""What ranks compute that share calls of transformers; by one rank alone as well."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import combinations
import numpy as np
import pytest
import torch
from small_transformers import MODELS, Run
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import grat_cli
from grat_cli.attention.adapter import Adapter
from grat_cli.attention.context_parallel import Shared
from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import load_pipeline
from grat_cli.errors import RankLost
from grat_cli.presets import Preset
from grat_kernels import Backend

STEPS = 4


def adapter_of(name: str, ranks: ProcessGroup | None = None, **options: Any) -> Adapter:
    """Of the small transformer of a family."""
    kind = MODELS[name]
    return kind.adapter(kind.make(), kind.grids[0], ranks=ranks, **options)


def predictions(
    ranks: ProcessGroup | None, names: Sequence[str], steps: int = STEPS, fused: bool = False
) -> dict[str, torch.Tensor]:
    """Of the small transformer of each family, `[steps, ...]`, at steps with other plans."""
    made = {}
    for name in names:
        adapter = adapter_of(name, ranks, fused=fused)
        run = Run(adapter)
        with torch.no_grad(), adapter.attached(run, Backend.SDPA):
            outputs = []
            for run.step in range(steps):
                output: Any = adapter.model(**MODELS[name].inputs(adapter.grid))
                outputs.append(output[0] if isinstance(output, tuple) else output.sample)
        made[name] = torch.stack(outputs)
    return made


class Told:
    """Keeps what an observer is told of one call: exchanges by their bytes, and attentions."""

    def __init__(self) -> None:
        self.seen: list[int | str] = []
        self._inside = False

    def begin_call(self, step: int, density: float) -> None:
        self.seen.append("begin")

    def end_call(self) -> None:
        self.seen.append("end")

    def attention(self, inputs: Any = None) -> AbstractContextManager[None]:
        return self._one("attention")

    def exchange(self, sent_bytes: int) -> AbstractContextManager[None]:
        return self._one(sent_bytes)

    @contextmanager
    def _one(self, what: int | str) -> Iterator[None]:
        assert not self._inside
        self._inside = True
        yield
        self._inside = False
        self.seen.append(what)


def told(ranks: ProcessGroup) -> list[int | str]:
    """What an observer is told of a call of the small FLUX."""
    adapter, observer = adapter_of("flux", ranks), Told()
    with torch.no_grad(), adapter.attached(Run(adapter), Backend.SDPA, observer):
        adapter.model(**MODELS["flux"].inputs(adapter.grid))
    return observer.seen


def until_one_ends(ranks: ProcessGroup) -> float:
    """Seconds until a rank that asks for all tokens learns that the last one has ended; it asks for none."""
    began = time.monotonic()
    if ranks.rank() != ranks.size() - 1:
        with pytest.raises(RankLost, match="another rank of the run has ended"):
            Shared.of(ranks, 8).gathered(torch.zeros(8 // ranks.size()), 0)
    return time.monotonic() - began


class Picture(NamedTuple):
    """Pixels from 0 to 1, which layers a guard has widened when, and which layers were computed in the calls of each
    step, where that is counted."""

    pixels: np.ndarray
    widened: list[tuple[int, int]]
    computed: list[tuple[str, ...]]


PRESETS = {2: "flux", 3: "hunyuan"}  # by axes
# Of what `combinations` has, and with guidance by two calls.
GUIDED = {
    **{name: combinations.GUIDED[name] for name in ("Flux", "Qwen-Image", "HunyuanVideo", "Wan")},
    "HunyuanVideo-1.5": dict,
    "Wan A14B": dict,
}


def mesh_of(ranks: ProcessGroup | None, mesh: Mapping[str, int] | None) -> DeviceMesh | None:
    """Of all ranks by the sizes of dimensions, which all share calls by default; None for one alone."""
    if ranks is None:
        return None
    mesh = mesh or {"cp": ranks.size()}
    return init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))


def latents(
    ranks: ProcessGroup | None, names: Sequence[str], mesh: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Of the small pipelines of families with guidance and a far field, by ranks that share them as a mesh says."""
    parallel = mesh_of(ranks, mesh)
    made = {}
    for name in names:
        kind = combinations.CARRIED[name]
        pipe = kind.make()
        pipe.set_progress_bar_config(disable=True)
        far = [{"beyond": 0, "block": list(kind.block)}]
        attention = {"variant": "b", "group": list(kind.group), "radius": 0, "far": far}
        preset = Preset.model_validate({"name": "own", "model": PRESETS[len(kind.group)], "attention": attention})
        with grat_cli.install(pipe, preset, **kind.size, parallel=parallel):
            made[name] = pipe(
                **kind.size,
                **kind.text(),
                **GUIDED[name](),
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )[0]
    return made


def pictures(
    ranks: ProcessGroup | None, presets: Sequence[dict[str, Any]], mesh: Mapping[str, int] | None = None
) -> list[Picture]:
    """Of the demo model, 120x128 pixels, by `install` with each preset; ranks share them as a mesh says, all calls by
    default."""
    parallel = mesh_of(ranks, mesh)
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
        works = [installation.work and installation.work.of_step(step) for step in range(STEPS)]
        computed = [work.computed for work in works if work]
        made.append(Picture(pixels, [(one["step"], one["layer"]) for one in widened], computed))
    return made


def pictures_and_latents(
    ranks: ProcessGroup, presets: Sequence[dict[str, Any]], names: Sequence[str], mesh: Mapping[str, int]
) -> tuple[list[Picture], dict[str, torch.Tensor]]:
    """Both, in the same processes, which take longer to start than to compute."""
    return pictures(ranks, presets, mesh), latents(ranks, names, mesh)
