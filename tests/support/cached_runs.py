"""Runs of small random models with step caches, by one rank and by several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pytest
import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_hunyuan15
import tiny_qwen
import tiny_wan
import torch
from diffusers.hooks.faster_cache import FasterCacheConfig
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from flux_runs import GUIDED, HEIGHT, WIDTH, call, preset
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import grat_cli
from grat_cli.attention.context_parallel import Shared
from grat_cli.errors import BadInput
from grat_cli.presets import Preset
from grat_cli.presets.caches import Broadcast, Cache, Faster, FirstBlock, Mag, Taylor

STEPS = 7
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
RATIOS = (1.0, 1.01, 0.99, 1.01, 1.01, 0.99, 1.01)
# Each leaves out some attention of a run of so many steps of a small random model, whose steps differ much.
CACHES: dict[str, Cache] = {
    "first-block": FirstBlock(threshold=1.0),
    "mag": Mag(ratios=RATIOS, threshold=0.05),
    "taylor": Taylor(cache_interval=3, disable_cache_before_step=2),
    "lite": Taylor(cache_interval=3, disable_cache_before_step=2, use_lite_mode=True),
    "pab": Broadcast(timesteps=(0, 1000)),
    "faster": Faster(timesteps=(0, 1000)),
}


def run(pipe: Any, **arguments: Any) -> torch.Tensor:
    return call(pipe, num_inference_steps=STEPS, **arguments)


def stock_config(pipe: Any, name: str) -> Any:
    """The same caches, as a user of diffusers writes them down for Flux and HunyuanVideo."""

    def timestep() -> Any:
        # FasterCache cannot forecast before two steps are computed.
        early = name == "faster" and pipe.scheduler.step_index in (None, 0, 1)
        return 10_000 if early else pipe._current_timestep

    taylor = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
    configs: dict[str, Callable[[], Any]] = {
        "first-block": lambda: FirstBlockCacheConfig(threshold=1.0),
        "mag": lambda: MagCacheConfig(mag_ratios=list(RATIOS), num_inference_steps=STEPS, threshold=0.05),
        "taylor": lambda: TaylorSeerCacheConfig(**taylor),
        "lite": lambda: TaylorSeerCacheConfig(**taylor, use_lite_mode=True),
        "pab": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=timestep,
        ),
        "faster": lambda: FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 1000),
            is_guidance_distilled=True,
            current_timestep_callback=timestep,
        ),
    }
    return configs[name]()


def other_families() -> dict[str, tuple[Callable[[], Any], str, list[int], dict[str, Any], Callable[[Any], Any]]]:
    """Pipelines of the other families, their preset's model, groups, size, and what they make."""
    video = {"height": 48, "width": 80, "num_frames": 13}

    def of(**arguments: Any) -> Callable[[Any], Any]:
        def make(pipe: Any) -> Any:
            generator = torch.Generator().manual_seed(5)
            made = pipe(**arguments, num_inference_steps=STEPS, generator=generator, output_type="latent")
            return made.images if hasattr(made, "images") else made.frames

        return make

    picture = {"height": 144, "width": 208}
    guided_qwen = {**tiny_qwen.prompt(7), **tiny_qwen.negative_prompt(5), "true_cfg_scale": 2.0}
    waves = {"prompt": "waves at night under a red boat"}
    return {
        "qwen": (tiny_qwen.pipeline, "qwen", [4, 4], picture, of(**guided_qwen, **picture)),
        "flux2": (
            tiny_flux2.pipeline,
            "flux2",
            [4, 4],
            picture,
            of(**tiny_flux2.prompt(), **picture, guidance_scale=1.0),
        ),
        "hunyuan": (
            tiny_hunyuan.pipeline,
            "hunyuan",
            [2, 3, 3],
            video,
            of(**waves, **video, negative_prompt="", true_cfg_scale=3.0, max_sequence_length=16),
        ),
        "hunyuan15": (tiny_hunyuan15.pipeline, "hunyuan15", [2, 3, 3], video, of(**waves, **video)),
        "wan": (
            lambda: tiny_wan.pipeline("two"),
            "wan",
            [2, 3, 3],
            video,
            of(**waves, **video, guidance_scale=3.0, max_sequence_length=16),
        ),
    }


class Asked(NamedTuple):
    """A run.

    Attributes:
        family: whose small pipeline runs; `flux guided` is Flux with true guidance.
        cache: one of `CACHES`, or as it is typed.
        guard: a share, or 0.
        own: when the caller enables the cache himself: `before` it is installed, or `inside`, where no work is counted.
        mesh: ranks by dimension.
    """

    family: str
    cache: str
    guard: float = 0.0
    own: Literal["before", "inside"] | None = None
    mesh: Mapping[str, int] | None = None


class Cached(NamedTuple):
    """Its latents; of each step the density and the layers that were computed; ratios; and whether a file can keep what
    the cache holds."""

    latents: torch.Tensor
    works: list[tuple[float, tuple[str, ...]]]
    ratios: tuple[float, ...]
    is_keepable: bool


def cached_runs(ranks: ProcessGroup | None, runs: Sequence[Asked]) -> list[Cached]:
    """What each comes to, by ranks that share all calls where no mesh is asked for."""
    return [_cached_run(ranks, asked) for asked in runs]


def _cached_run(ranks: ProcessGroup | None, asked: Asked) -> Cached:
    parallel = _mesh(ranks, asked.mesh)
    make: Callable[[Any], Any] = run
    if asked.family in ("flux", "flux guided"):
        pipe: Any = tiny_flux.pipeline()
        rules = [{"layers": "1", "heads": "1", "variant": "full"}]
        chosen, size = preset("b", {"rules": rules}, radius=0), SIZE
        if asked.family != "flux":
            make = functools.partial(run, **GUIDED)
    else:
        make_pipe, model, group, size, make = other_families()[asked.family]
        pipe = make_pipe()
        attention = {"group": group, "variant": "b", "radius": 0}
        chosen = Preset.model_validate({"name": "t", "model": model, "attention": attention})
    cache = CACHES.get(asked.cache, asked.cache) if asked.own is None else None
    if asked.own == "before":
        pipe.transformer.enable_cache(stock_config(pipe, asked.cache))
    with (
        torch.no_grad(),
        grat_cli.install(pipe, chosen, **size, guard=asked.guard, cache=cache, parallel=parallel) as installation,
    ):
        if asked.own == "inside":
            pipe.transformer.enable_cache(stock_config(pipe, asked.cache))
        latents, caches = make(pipe), installation.caches
        found = [installation.work and installation.work.of_step(step) for step in range(STEPS)]
        assert caches is not None
        works = [(work.density, work.computed) for work in found if work]
        return Cached(latents, works, caches.ratios, caches.snapshot() is not None)


def _mesh(ranks: ProcessGroup | None, asked: Mapping[str, int] | None = None) -> DeviceMesh | None:
    if ranks is None:
        return None
    mesh = asked or {"cp": ranks.size()}
    return init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))


def refused_run(ranks: ProcessGroup, config: Any) -> str:
    """What the small Wan says of a cache that the caller enables inside."""
    make_pipe, model, group, size, make = other_families()["wan"]
    pipe: Any = make_pipe()
    chosen = Preset.model_validate({"name": "t", "model": model, "attention": {"group": group, "variant": "b"}})
    with torch.no_grad(), grat_cli.install(pipe, chosen, **size, parallel=_mesh(ranks)):
        pipe.transformer.enable_cache(config)
        with pytest.raises(BadInput) as caught:
            make(pipe)
    return str(caught.value)


def shared_means(ranks: ProcessGroup | None, text_first: bool = True) -> torch.Tensor:
    """Means of two figures, of 5 tokens of the text and 7 besides it, and of the latter alone."""
    drawn = torch.Generator().manual_seed(0)
    text, tokens = torch.rand(2, 5, 3, generator=drawn), torch.rand(2, 7, 3, generator=drawn)
    if ranks is None:
        return torch.stack([torch.cat([text, tokens], dim=1).mean(), tokens.mean()])
    shared = Shared.of(ranks, 7)
    own = tokens[:, shared.own]
    joint = torch.cat([text, own] if text_first else [own, text], dim=1)
    return shared.means([joint, own], text_first=text_first)
