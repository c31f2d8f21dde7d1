"""What is foretold of FLUX.2 from shapes alone, against diffusers: weights, operations, memory, references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_flux2
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from torch.utils.flop_counter import FlopCounterMode
from tracked_memory import track
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.bench.random_weights import parameter_count, random_transformer, step_inputs, step_model
from grat_cli.errors import BadInput
from grat_cli.estimates.components import components_of
from grat_cli.estimates.memory import Execution, denoise_moments
from grat_cli.estimates.planning import architecture_for, forecast
from grat_cli.families import FAMILIES
from grat_cli.families.autoencoders import Coding, Pixels, TinyAutoencoder, autoencoder_shape
from grat_cli.families.base import ModelChoice
from grat_cli.families.flux2 import Flux2Adapter
from grat_cli.families.shapes import Components
from grat_cli.models.catalogue import choose_model
from grat_cli.models.resolution import Resolution
from grat_cli.presets import load_preset
from grat_kernels import Backend, Grid

FLUX2 = FAMILIES["flux2"]
NAMES = [model.name for model in FLUX2.models]


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_transformers_are_those_of_diffusers(name: str) -> None:
    config = FLUX2.transformer_config(choose_model(name))
    assert FLUX2.transformer_shape(config).parameters == parameter_count(config)
    billions = {"flux2-dev": 32.2, "4b": 3.9, "9b": 9.1}
    assert round(parameter_count(config) / 1e9, 1) == next(size for end, size in billions.items() if name.endswith(end))


def test_weights_of_other_parts_are_those_of_their_classes() -> None:
    def count(model: Any) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    shared: Any = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
    qwen = {"vocab_size": 151_936, "num_hidden_layers": 36, **shared}
    mistral = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "vocab_size": 131_072,
        **shared,
    }
    pixtral = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "patch_size": 14,
    }
    with torch.device("meta"):
        small = Qwen3ForCausalLM(
            Qwen3Config(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True, **qwen)
        )
        large = Qwen3ForCausalLM(
            Qwen3Config(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False, **qwen)
        )
        largest = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=mistral,
                vision_config=pixtral,
                multimodal_projector_bias=False,
                tie_word_embeddings=False,
            )
        )
        autoencoder: Any = AutoencoderKLFlux2()
    encoders = {name: components_of(choose_model(name)).text_encoders[0].parameters for name in NAMES}
    assert encoders["flux2-dev"] == count(largest)
    assert encoders["flux2-klein-4b"] == encoders["flux2-klein-base-4b"] == count(small)
    assert encoders["flux2-klein-9b"] == encoders["flux2-klein-base-9b"] == count(large)
    assert FLUX2.autoencoder.parameters == count(autoencoder)


@pytest.mark.parametrize("references", [(), ((5, 3), (4, 4))])
def test_operations_are_those_that_are_counted(references: tuple[tuple[int, int], ...]) -> None:
    model: Any = tiny_flux2.transformer(num_attention_heads=4)
    inputs = tiny_flux2.inputs(12, 14, references=references)
    image, text = inputs["hidden_states"].shape[1], tiny_flux2.TEXT_TOKENS
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for operator, count in counts.items() if "mm" in str(operator) and "bmm" not in str(operator))
    assert FLUX2.transformer_shape(model.config).linear_flop(image, text) == pytest.approx(linear, rel=0.02)


class OneStep:
    """A run of one step."""

    def __init__(self, schedule: AttentionSchedule) -> None:
        self._schedule = schedule

    def current_step(self) -> int:
        return 0

    def schedule(self, text_len: int, references: int = 0) -> AttentionSchedule:
        return self._schedule


UNUSED = TinyAutoencoder((8,), (1,), 4, 0)


@pytest.mark.parametrize(
    ("layers", "preset", "dtype", "chunk", "references"),
    [
        ((1, 0), "flux2-x", torch.float32, None, 0),
        ((0, 1), "flux2-b", torch.float32, None, 0),
        ((0, 1), "flux2-far", torch.bfloat16, None, 0),
        ((1, 0), "flux2-b", torch.float32, None, 300),
        ((0, 1), "flux2-full", torch.float32, None, 300),
        ((1, 0), "flux2-b", torch.float32, 256, 0),
        ((0, 1), "flux2-b", torch.float32, 256, 0),
        ((0, 1), "flux2-b", torch.bfloat16, 256, 300),
    ],
)
def test_memory_of_a_step_is_what_torch_allocates(
    layers: tuple[int, int], preset: str, dtype: torch.dtype, chunk: int | None, references: int
) -> None:
    """Of real shape but a quarter as wide, and few layers: memory does not grow with their number, but for weights."""
    model, grid = step_model("flux2-klein-4b"), Grid((32, 32))
    narrow = {"num_attention_heads": 6, "joint_attention_dim": 1920}
    config = {**FLUX2.with_blocks(FLUX2.transformer_config(model), layers), **narrow}
    shape = FLUX2.transformer_shape(config)
    schedule = AttentionSchedule(load_preset(preset), grid, 512, True, 1, shape.layers, references=references)
    transformer = random_transformer(config, "cpu", dtype)

    def call() -> torch.Tensor:
        inputs = step_inputs(config, grid.shape, 512, "cpu", dtype)
        if references:
            latents, positions = torch.zeros(1, references, 128, dtype=dtype), torch.full((1, references, 4), 10)
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], latents], dim=1)
            inputs["img_ids"] = torch.cat([inputs["img_ids"], positions], dim=1)
        return transformer(**inputs)

    execution = Execution(str(dtype).removeprefix("torch."), on_cpu=True, chunk_tokens=chunk)
    foretold = denoise_moments(Components((), shape, UNUSED), list(schedule.plans), execution)
    adapter = Flux2Adapter(transformer, grid, chunk_tokens=chunk)
    with torch.no_grad(), adapter.attached(OneStep(schedule), Backend.SDPA):
        measured = track(call).peak_bytes
    print(f"foretold {max(foretold.values()) / 2**20:.1f} MiB, measured {measured / 2**20:.1f}")
    assert max(foretold.values()) == pytest.approx(measured, rel=0.15), foretold


def test_tokens_of_references_are_those_that_the_pipelines_make() -> None:
    dev, klein = choose_model("flux2-dev"), choose_model("flux2-klein-4b")
    nothing: Any = frozenset()

    def count(*sizes: tuple[int, int], kinds: Any = nothing, model: Any = dev) -> int:
        return FLUX2.reference_tokens(model, (512, 256), kinds, sizes)

    assert count() == 0
    assert count((512, 256), (100, 70)) == 32 * 16 + 6 * 4
    assert count((2048, 2048)) == 64 * 64
    assert count((3000, 1000)) == (1773 // 16) * (591 // 16)
    assert count(kinds=frozenset(["start", "mask"]), model=klein) == 32 * 16
    assert count((64, 64), kinds=frozenset(["start", "mask", "reference"]), model=klein) == 32 * 16 + 16
    with pytest.raises(BadInput, match="one picture at most beside a mask, not 2"):
        count((64, 64), (64, 64), kinds=frozenset(["start", "mask", "reference"]), model=klein)
    with pytest.raises(BadInput, match="cannot refer to a picture of 63x100: give one of 64 pixels a side or more"):
        count((63, 100))
    with pytest.raises(BadInput, match="no side 8 times as long as the other"):
        count((1000, 100))


def test_kin_are_told_by_their_names() -> None:
    hub = {
        "me/FLUX.2-dev-lora": ("flux2-dev", 48),
        "me/flux-2-klein-9B": ("flux2-klein-9b", 32),
        "me/Flux2-Klein-Base": ("flux2-klein-base-4b", 24),
    }
    for name, (kin, heads) in hub.items():
        chosen = choose_model(name)
        assert replace(chosen, name=kin, source=choose_model(kin).source, reason="chosen by name") == choose_model(kin)
        assert FLUX2.transformer_config(chosen)["num_attention_heads"] == heads
    assert choose_model("me/FLUX.1-dev-lora").family == "flux"


def test_references_count_in_plans() -> None:
    model, preset = choose_model("flux2-dev"), load_preset("flux2-far")
    alone, referring = (
        forecast(preset, model.name, architecture_for(model), Resolution(1024, 1024), references=references)
        for references in (0, 4096)
    )
    assert alone.as_dict()["tokens"] == {"image": 4096, "text": 512, "total": 4608}
    assert referring.as_dict()["tokens"] == {"image": 4096, "text": 512, "references": 4096, "total": 8704}
    assert alone.schedule.density < referring.schedule.density < 1
    assert referring.full_flop_per_step == pytest.approx(alone.full_flop_per_step * (8704 / 4608) ** 2)
    matrices = 2 * 26 / 2 * 6144**2 * model_layers(model) * 4096
    assert referring.linear_flop_per_call - alone.linear_flop_per_call == pytest.approx(matrices, rel=0.01)
    held = [
        max(denoise_moments(components_of(model), list(one.schedule.plans), Execution()).values())
        for one in (alone, referring)
    ]
    assert held[1] > 1.6 * held[0]


def model_layers(model: ModelChoice) -> int:
    return FLUX2.transformer_shape(FLUX2.transformer_config(model)).layers


@pytest.mark.parametrize(("channels", "side"), [((16, 32, 64, 64), 256), ((64, 128, 256, 256), 128)])
def test_memory_of_coding_is_what_torch_allocates(channels: tuple[int, ...], side: int) -> None:
    levels: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": channels,
    }
    autoencoder: Any = AutoencoderKLFlux2(**levels, norm_num_groups=8).eval()
    config = {**autoencoder.config, "_class_name": "AutoencoderKLFlux2"}
    shape, size, on_cpu = autoencoder_shape(config), Pixels(side, side), Coding(4, on_cpu=True)
    latents, pixels = torch.randn(1, 32, side // 8, side // 8), torch.randn(1, 3, side, side)
    with torch.no_grad():
        measured = [track(lambda: autoencoder.decode(latents)), track(lambda: autoencoder.encode(pixels))]
    for foretold, one in zip((shape.decode_moments, shape.encode_moments), measured, strict=True):
        # Without the pixels that are collected beside the autoencoder's own work.
        assert max(foretold(size, on_cpu).values()) - size.count * 4 == pytest.approx(one.peak_bytes, rel=0.15)
