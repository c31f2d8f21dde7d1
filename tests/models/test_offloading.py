"""Which weights wait in main memory, which are stored in fewer bits, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_flux
import torch
from diffusers.hooks import group_offloading
from diffusers.quantizers import quantization_config as of_diffusers
from transformers.utils import quantization_config as of_transformers

import grat_cli
from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput
from grat_cli.models import loading, offloading, quantization
from grat_cli.models.catalogue import choose_model
from grat_cli.models.environment import versions
from grat_cli.models.loading import load_model
from grat_cli.models.offloading import choose_offload, offload
from grat_cli.models.quantization import QUANTIZATIONS, configurations, require_quantization
from grat_cli.models.weights import Weights

GB = 10**9
NEEDED = {"none": 40 * GB, "model": 30 * GB, "group": 12 * GB, "sequential": 9 * GB}
CPU: Any = torch.device("cpu")
CUDA: Any = SimpleNamespace(type="cuda")


def test_auto_is_the_fastest_kind_that_fits() -> None:
    assert choose_offload(NEEDED, 80 * GB) == ("none", "needs about 40.0 GB of 80.0 GB that are free")
    assert choose_offload(NEEDED, 40 * GB)[0] == "none"
    kind, reason = choose_offload(NEEDED, 24 * GB)
    assert kind == "group"
    assert reason == "needs about 12.0 GB of 24.0 GB that are free; none 40.0 GB, model 30.0 GB"
    kind, reason = choose_offload(NEEDED, 8 * GB)
    assert kind == "sequential"
    assert reason == "needs least, about 9.0 GB, which is more than the 8.0 GB that are free"


def test_group_offloading_moves_every_block_and_leaves_the_autoencoder_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, plain = tiny_flux.pipeline(), tiny_flux.pipeline()
    moved: list[int] = []
    stock = group_offloading.ModuleGroup.onload_
    monkeypatch.setattr(
        group_offloading.ModuleGroup,
        "onload_",
        lambda group: (moved.extend(id(module) for module in group.modules), stock(group))[1],
    )
    offload(pipe, "group", CPU)
    assert pipe._execution_device == CPU
    assert not hasattr(pipe.vae, "_diffusers_hook")

    def picture(pipe: Any) -> torch.Tensor:
        with grat_cli.install(pipe, "demo-x", height=64, width=64):
            return pipe(
                **tiny_flux.prompt(),
                height=64,
                width=64,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images

    assert torch.equal(picture(pipe), picture(plain))
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    assert {id(block) for block in blocks} <= set(moved)


def test_streams_are_asked_for_on_cuda_alone() -> None:
    asked: list[dict[str, Any]] = []
    pipe = SimpleNamespace(enable_group_offload=lambda **options: asked.append(options))
    for device in (CUDA, SimpleNamespace(type="mps")):
        offload(pipe, "group", device)  # type: ignore[arg-type]
    assert [options["use_stream"] for options in asked] == [True, False]
    assert asked[0]["exclude_modules"] == ["vae"]


def test_the_model_says_what_auto_became() -> None:
    model = load_model(choose_model("demo"), device=CPU, dtype=torch.float32, offload="auto")
    assert (model.offload, model.offload_reason) == ("none", "the run is on cpu")


@pytest.mark.parametrize("kind", ["model", "group", "sequential"])
def test_offload_needs_a_gpu(kind: str) -> None:
    with pytest.raises(BadInput, match="moves parts of the model off a GPU, and the run is on the CPU"):
        offloading.require_offload(kind, CPU)


def test_quantization_needs_its_package_a_gpu_and_something_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "installed", lambda package: False)
    require_quantization("none", CPU)
    refused = {
        "--quantize int8 needs torchao, which is not installed: pip install torchao": ("int8", CUDA, {}),
        "--quantize nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes": ("nf4", CUDA, {}),
        "is for CUDA devices, and the run is on cpu": ("fp8", CPU, {}),
        "the demo has a few million weights": ("int8", CUDA, {"is_demo": True}),
        "unknown quantization 'int4': did you mean": ("int4", CUDA, {}),
    }
    for message, (kind, device, options) in refused.items():
        with pytest.raises(BadInput, match=message.replace("(", r"\(")):
            require_quantization(kind, device, **options)

    monkeypatch.setattr(quantization, "installed", lambda package: True)
    require_quantization("int8", CUDA, offload="group")
    require_quantization("nf4", CUDA, offload="model")
    for kind, offload_kind in (("nf4", "group"), ("nf4", "sequential"), ("int8", "sequential")):
        with pytest.raises(BadInput, match=f"--quantize {kind} with --offload {offload_kind}"):
            require_quantization(kind, CUDA, offload=offload_kind)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(BadInput, match=r"fp8 needs compute capability 8\.9 or more, this device has 8\.6: use int8"):
        require_quantization("fp8", CUDA)


class _Recorded:
    """Stands in for the configuration classes of packages that are not installed here."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Any:
    torchao = ModuleType("torchao")
    torchao.quantization = SimpleNamespace(Int8WeightOnlyConfig=lambda: "int8", Float8WeightOnlyConfig=lambda: "fp8")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    for library in (of_diffusers, of_transformers):
        for name in ("TorchAoConfig", "BitsAndBytesConfig"):
            monkeypatch.setattr(library, name, type(f"{library.__name__}.{name}", (_Recorded,), {}))
    return of_diffusers, of_transformers


def test_transformer_and_large_encoder_are_quantized_and_nothing_else(stand_ins: Any) -> None:
    diffusers, transformers = stand_ins
    assert configurations("none", "text_encoder_2", torch.bfloat16) == {}
    for kind in ("int8", "fp8"):
        made = configurations(kind, "text_encoder_2", torch.bfloat16)
        assert {part: type(config) for part, config in made.items()} == {
            "transformer": diffusers.TorchAoConfig,
            "text_encoder_2": transformers.TorchAoConfig,
        }
        assert [config.arguments for config in made.values()] == [(kind,)] * 2
    made = configurations("nf4", "text_encoder", torch.float16)
    assert list(made) == ["transformer", "text_encoder"]
    assert made["text_encoder"].options == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float16,
    }


def test_parts_are_loaded_with_their_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    stock = loading._load_part
    monkeypatch.setattr(loading, "require_quantization", lambda *arguments, **options: None)
    monkeypatch.setattr(
        loading, "configurations", lambda *arguments: {"transformer": "for transformer", "text_encoder_2": "for T5"}
    )

    def load_part(loader: Any, folder: Any, part: str, how: Any) -> Any:
        given[part] = how.quantized.get(part)
        return stock(loader, folder, part, replace(how, quantized={}))

    monkeypatch.setattr(loading, "_load_part", load_part)
    load_model(choose_model("demo"), device=CPU, dtype=torch.float32, weights=Weights(quantize="int8"))
    assert given == {
        "text_encoder": None,
        "text_encoder_2": "for T5",
        "transformer": "for transformer",
        "vae": None,
    }
    asked: list[dict[str, Any]] = []
    loader = SimpleNamespace(
        from_pretrained=lambda folder, **options: (
            asked.append(options),
            ("part", {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}),
        )[1]
    )
    how = loading._How({"transformer": torch.float32}, Weights(), {"transformer": "config"})
    assert stock(loader, DEMO_FLUX.path / "transformer", "transformer", how) == "part"
    assert asked[0]["quantization_config"] == "config"


def test_versions_tell_what_is_installed() -> None:
    assert {quantization.PACKAGES[kind] for kind in QUANTIZATIONS[1:]} <= set(versions())
