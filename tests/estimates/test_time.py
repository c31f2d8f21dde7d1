"""The time that a video is foretold to take: its operations against those that torch counts, and the arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_hunyuan
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from grat_cli.estimates.planning import Architecture, Forecast, architecture_for, forecast
from grat_cli.estimates.time import Rates, estimate, estimate_at, planned_seconds
from grat_cli.families.autoencoders import HunyuanVideoAutoencoder, Pixels
from grat_cli.families.hunyuan import HunyuanShape
from grat_cli.generation.selection import select_preset
from grat_cli.models.catalogue import choose_model
from grat_cli.models.video_size import VideoSize

SHAPE = HunyuanShape(2, 64, 4, 32, double_blocks=1, single_blocks=2, pooled_channels=24, guidance_embeds=False)
SMALL = Architecture(
    replace(choose_model("demo", "video"), text_tokens=32),
    SHAPE,
    HunyuanVideoAutoencoder((8, 16, 16, 16), (2, 2, 2, 2), 4, 0),
)
SIZE = VideoSize(256, 144, 33, 24)


def plan_of(variant: str, architecture: Architecture = SMALL, size: VideoSize = SIZE, **flags: Any) -> Forecast:
    return forecast(select_preset(choose_model("demo", "video"), variant=variant, **flags), "demo", architecture, size)


@pytest.mark.parametrize(
    ("size", "tiled"), [(SIZE, False), (VideoSize(96, 64, 9, 24), False), (VideoSize(448, 272, 21, 24), True)]
)
def test_operations_of_decoding_are_those_that_torch_counts(size: VideoSize, tiled: bool) -> None:
    with torch.device("meta"):
        config: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 1}
        autoencoder = AutoencoderKLHunyuanVideo(**config, norm_num_groups=1, mid_block_add_attention=False)
        latents = torch.empty(1, 4, (size.frames - 1) // 4 + 1, size.height // 8, size.width // 8)
    if tiled:
        autoencoder.enable_tiling()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.decode(latents)
    assert SMALL.autoencoder.decode_flop(Pixels.of(size)) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_linear_layers_are_those_that_torch_counts() -> None:
    """A tenth may be left out: what a step does once, whatever the number of tokens."""
    inputs = tiny_hunyuan.inputs((4, 8, 8), (tiny_hunyuan.TEXT_TOKENS,))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny_hunyuan.transformer()(**inputs)
    counted = counter.get_flop_counts()["Global"]
    linear = sum(flop for operator, flop in counted.items() if str(operator) in ("aten.addmm", "aten.mm"))
    small = replace(SHAPE, head_dim=16, double_blocks=0, single_blocks=tiny_hunyuan.LAYERS)
    assert small.linear_flop(4 * 8 * 8, tiny_hunyuan.TEXT_TOKENS) == pytest.approx(linear, rel=0.1)


def test_linear_layers_of_hunyuan_are_its_weights() -> None:
    """Two operations per weight and token: double blocks have weights for video and text apart, used by either."""
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1)
    single = sum(
        module.weight.numel()
        for name, module in model.single_transformer_blocks.named_modules()
        if isinstance(module, torch.nn.Linear) and "norm" not in name
    )
    assert architecture_for(choose_model("hunyuan", "video")).transformer.linear_flop(1, 0) == 60 * 2 * single


def test_time_follows_from_operations_and_rates() -> None:
    full, lines = plan_of("full"), plan_of("lines")
    rates = Rates(attention=1e9, linear=2e9, convolution=5e8)
    tokens = 9 * 9 * 16 + 32
    calls = 20 * 2  # steps, and classifier-free guidance
    attention = calls * 3 * 4 * tokens**2 * 128 / 1e9
    linear = calls * 24 * 128**2 * 3 * tokens / 2e9
    assert estimate_at(full, rates).denoise == pytest.approx(attention + linear)
    assert estimate_at(lines, rates).denoise == pytest.approx(attention * lines.schedule.density + linear)
    decoding = SMALL.autoencoder.decode_flop(Pixels.of(SIZE)) / 5e8
    assert estimate_at(full, rates).decode == pytest.approx(decoding)
    assert estimate_at(full, rates).total == pytest.approx(attention + linear + decoding)
    once = plan_of("full", guidance=1)
    assert estimate_at(once, rates).denoise == pytest.approx((attention + linear) / 2)
    assert estimate_at(plan_of("full", steps=5), rates).denoise == pytest.approx((attention + linear) / 4)


@pytest.mark.parametrize("variant", ["full", "far"])
def test_rates_are_measured_on_this_machine(variant: str) -> None:
    found = estimate(plan_of(variant), "cpu")
    # A small video on any machine that runs tests: not nothing, and not an hour.
    assert 0.01 < found.denoise < 3600
    assert 0.01 < found.decode < 3600
    assert 0.02 < planned_seconds(plan_of(variant), "cpu", "float32") < 7200
