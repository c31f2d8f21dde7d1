"""`grat_cli.install` on whole pipelines of FLUX.2, against stock diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_flux2
import torch
from accelerate import cpu_offload
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint import Flux2KleinInpaintPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein_kv import Flux2KleinKVPipeline
from flux_runs import relative_difference
from PIL import Image

import grat_cli
from grat_cli.errors import BadInput
from grat_cli.families import FAMILIES
from grat_cli.families.time_shift import shift_of, time_shift
from grat_cli.models.catalogue import choose_model
from grat_cli.presets import Preset
from grat_kernels import Grid

HEIGHT, WIDTH = 144, 208  # 9 x 13 tokens: ragged groups of 4
GRID = Grid((HEIGHT // 16, WIDTH // 16))
FLUX2 = FAMILIES["flux2"]
# Three steps of a model whose layers differ by a few fp32 roundings.
RELATIVE = 2e-5


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def preset(variant: str = "full", **attention: Any) -> Preset:
    return Preset.model_validate(
        {
            "name": "test",
            "model": "flux2",
            "attention": {"variant": variant, "group": [4, 4], **attention},
            "kernel": {"backend": "sdpa"},
        }
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def mask() -> Image.Image:
    of_pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    of_pixels[HEIGHT // 4 : -HEIGHT // 4, WIDTH // 3 :] = 255
    return Image.fromarray(of_pixels)


def call(pipe: Any, batch: int = 1, **arguments: Any) -> torch.Tensor:
    """Latents for seed 5."""
    defaults = {
        **tiny_flux2.prompt(batch),
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
    }
    return pipe(**(defaults | arguments)).images


GUIDED: dict[str, Any] = {**tiny_flux2.negative_prompt(), "guidance_scale": 3.0}
REFERENCES: dict[str, Any] = {"image": [picture(80, 112, 1), picture(100, 64, 2)]}
AROUND_MASK: dict[str, Any] = {"image": picture(WIDTH, HEIGHT), "mask_image": mask(), "strength": 0.7}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Flux2Pipeline, {"guidance_scale": 4.0}),
        (Flux2Pipeline, {"batch": 2, **REFERENCES}),
        (Flux2KleinPipeline, {}),
        (Flux2KleinPipeline, {"batch": 2, "image": picture(WIDTH, HEIGHT)}),
        (Flux2KleinPipeline, {**GUIDED, **REFERENCES}),
        (Flux2KleinInpaintPipeline, AROUND_MASK),
        (Flux2KleinInpaintPipeline, {**AROUND_MASK, **GUIDED, "image_reference": picture(80, 112, 1)}),
    ],
)
def test_full_attention_equals_the_stock_pipeline(kind: type[Any], arguments: dict[str, Any]) -> None:
    pipe = tiny_flux2.pipeline(kind)
    expected = call(pipe, **arguments)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        assert relative_difference(call(pipe, **arguments), expected) < RELATIVE
    with grat_cli.install(pipe, preset("b", radius=0), height=HEIGHT, width=WIDTH):
        assert relative_difference(call(pipe, **arguments), expected) > 0.01
    assert torch.equal(call(pipe, **arguments), expected)


@pytest.mark.parametrize("kind", [Flux2Pipeline, Flux2KleinPipeline])
def test_in_bfloat16_it_is_as_near_to_exact_as_stock(kind: type[Any]) -> None:
    pipe = tiny_flux2.pipeline(kind).to(torch.bfloat16)
    arguments = {**REFERENCES, "prompt_embeds": tiny_flux2.prompt()["prompt_embeds"].bfloat16()}
    # bf16 noise is not fp32 noise: the same is given to both.
    noise = torch.randn(1, tiny_flux2.TOKEN_CHANNELS, *GRID.shape, generator=torch.Generator().manual_seed(5))
    exact = call(tiny_flux2.pipeline(kind), **REFERENCES, latents=noise.bfloat16().float())
    stock = relative_difference(call(pipe, **arguments, latents=noise).float(), exact)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        ours = relative_difference(call(pipe, **arguments, latents=noise).float(), exact)
    assert 0 < ours < 2 * stock + 2**-8


def test_references_are_planned_for() -> None:
    pipe = tiny_flux2.pipeline()
    tokens = FLUX2.reference_tokens(
        choose_model("flux2-klein-4b"), (WIDTH, HEIGHT), frozenset(["reference"]), [(80, 112), (100, 64)]
    )
    with grat_cli.install(pipe, preset("x", share=1), height=HEIGHT, width=WIDTH) as installation:
        call(pipe, **REFERENCES)
        (plan,) = installation.last_schedule.plans
        assert plan.tokens == tiny_flux2.TEXT_TOKENS + GRID.tokens + tokens
        call(pipe)
        assert installation.last_schedule.plans[0].tokens == tiny_flux2.TEXT_TOKENS + GRID.tokens


def test_what_does_not_fit_is_refused() -> None:
    pipe = tiny_flux2.pipeline()
    with pytest.raises(BadInput, match="multiples of 16 for this model, not 150 and 208: the nearest are 144 and 208"):
        grat_cli.install(pipe, preset(), height=150, width=WIDTH).__enter__()
    with pytest.raises(BadInput, match="leave out num_frames"):
        grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH, num_frames=5).__enter__()
    with pytest.raises(BadInput, match=r"Flux2KleinKVPipeline is not supported .*references come before the image"):
        grat_cli.install(tiny_flux2.pipeline(Flux2KleinKVPipeline), preset(), height=144, width=208).__enter__()
    with (
        pytest.raises(BadInput, match=r"installed for 9x13 = 117 image tokens, .* give the pipeline call the height"),
        grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH),
    ):
        call(pipe, height=WIDTH, width=HEIGHT)


def test_the_time_shift_is_that_of_the_pipeline_and_ends_where_flux2_does() -> None:
    pipe = tiny_flux2.pipeline()
    stock = pipe.scheduler

    def steps_of(shift: float | None, tokens: int, steps: int = 4) -> tuple[float, torch.Tensor]:
        """The shift that is told, and the sigmas that a call of so many tokens gets."""
        with time_shift(pipe, tokens, shift, FLUX2.given_shift(pipe, tokens, steps)) as told:
            pipe.scheduler.set_timesteps(
                sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps)
            )
            sigmas = pipe.scheduler.sigmas
        assert pipe.scheduler is stock
        return told, sigmas

    for tokens in (1024, 4096, 16_384):
        told, sigmas = steps_of(None, tokens)
        assert told == pytest.approx(np.exp(compute_empirical_mu(tokens, 4)))
        stock.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4), mu=compute_empirical_mu(tokens, 4))
        assert torch.equal(sigmas, stock.sigmas)
    largest = steps_of(None, 16_384)
    beyond = steps_of(None, 65_536)
    assert beyond[0] == largest[0] == shift_of(stock, 65_536, None, FLUX2.given_shift(pipe, 65_536, 4))
    assert torch.allclose(beyond[1], largest[1])
    assert steps_of(3.0, 65_536)[0] == 3.0

    with pytest.warns(UserWarning, match=r"mu = 11\.5, far beyond 3\.23"):
        grat_cli.install(pipe, preset(), height=4096, width=4096).__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grat_cli.install(pipe, preset(), height=2048, width=2048).__enter__()


def _sequential(pipe: Any) -> None:
    # The autoencoder's statistics are buffers, which diffusers leaves where they are.
    for part in (pipe.vae, pipe.transformer):
        cpu_offload(part, execution_device=torch.device("cpu"), offload_buffers=part is pipe.transformer)


def _groups(kind: str) -> Callable[[Any], None]:
    cpu = torch.device("cpu")
    return lambda pipe: apply_group_offloading(pipe.transformer, cpu, cpu, kind, num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [lambda pipe: None, _sequential, _groups("block_level"), _groups("leaf_level")])
def test_it_is_the_same_picture_in_chunks_and_offloaded(offload: Callable[[Any], None]) -> None:
    def latents(pipe: Any, chunk_tokens: int | None) -> torch.Tensor:
        with grat_cli.install(pipe, preset("x", share=1), height=400, width=496, chunk_tokens=chunk_tokens):
            return call(pipe, height=400, width=496, **REFERENCES)

    pipe = tiny_flux2.pipeline()
    offload(pipe)
    assert torch.equal(latents(pipe, 256), latents(tiny_flux2.pipeline(), None))


def test_attention_that_is_broadcast_over_steps_equals_that_of_stock() -> None:
    """diffusers' Pyramid Attention Broadcast wraps attention modules, processors stay inside."""
    pipe = tiny_flux2.pipeline()
    without = call(pipe, num_inference_steps=6)
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    expected = call(pipe, num_inference_steps=6)
    with grat_cli.install(pipe, preset(), height=HEIGHT, width=WIDTH):
        assert relative_difference(call(pipe, num_inference_steps=6), expected) < RELATIVE
    assert relative_difference(without, expected) > 0.01
