"""LoRAs in pipelines of each family: what stock diffusers makes of the same files, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import lora_files
import pytest
import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_qwen
import tiny_wan
import torch
from accelerate import cpu_offload
from diffusers.pipelines.flux.pipeline_flux_fill import FluxFillPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import diffusers_layout, layers_of, other_layout, write

import grat_cli
from grat_cli.errors import BadInput, ModelUnavailable
from grat_cli.families import FAMILIES
from grat_cli.models.catalogue import choose_model
from grat_cli.models.lora_layers import AppliedLora, apply_loras
from grat_cli.models.weights import Lora, Weights
from grat_cli.presets import Preset

# Two computations of one fp32 denoising, whose LoRA is added at another place or in another order.
RELATIVE = 2e-5


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Case:
    """A family, how its pipeline is called, and layers of its original by the layouts that diffusers reads.

    Attributes:
        build: makes the pipeline, always the same.
        model: a name of the family.
        arguments: of a call.
        size: of it.
        group: of its tokens.
        layouts: tensors of a LoRA.
    """

    build: Callable[[], Any]
    model: str
    arguments: Callable[[], Mapping[str, Any]]
    size: Mapping[str, int]
    group: tuple[int, ...]
    layouts: Mapping[str, Callable[[Any], lora_files.Tensors]]

    @property
    def choice(self) -> Any:
        return choose_model(self.model, "video" if len(self.group) == 3 else "image")

    def call(self, pipe: Any) -> torch.Tensor:
        made = pipe(
            **self.arguments(),
            **self.size,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        )
        return made.frames if hasattr(made, "frames") else made.images

    def preset(self, variant: str = "full", **attention: Any) -> Preset:
        return Preset.model_validate(
            {
                "name": "test",
                "model": self.choice.presets,
                "attention": {"variant": variant, "group": list(self.group), **attention},
                "kernel": {"backend": "sdpa"},
            }
        )

    def installed(self, pipe: Any, preset: Preset | None = None, **options: Any) -> torch.Tensor:
        with grat_cli.install(pipe, preset or self.preset(), **self.size, **options):
            return self.call(pipe)


def own_layout(pipe: Any) -> lora_files.Tensors:
    """Of every linear layer of the transformer."""
    return diffusers_layout(layers_of(pipe.transformer))


def kohya_flux(pipe: Any) -> lora_files.Tensors:
    layers = {
        "double_blocks_0_img_attn_qkv": (32, 96),
        "double_blocks_0_txt_attn_qkv": (32, 96),
        "double_blocks_0_txt_mlp_2": (128, 32),
        "double_blocks_0_img_mod_lin": (32, 192),
        "single_blocks_0_modulation_lin": (32, 96),
        "single_blocks_1_linear2": (160, 32),
    }
    return other_layout(layers, "lora_unet_", alpha=6.0)


def xlabs_flux(pipe: Any) -> lora_files.Tensors:
    layers = {
        "double_blocks.0.processor.qkv_lora1": (32, 96),
        "double_blocks.0.processor.proj_lora2": (32, 32),
        "single_blocks.1.processor.qkv_lora": (32, 96),
    }
    return other_layout(layers, "", ("down", "up"))


FLUX2_LAYERS = {
    "double_blocks{}0{}img_attn{}qkv": (32, 96),
    "double_blocks{}0{}txt_mlp{}2": (96, 32),
    "single_blocks{}1{}linear1": (32, 288),
    "single_blocks{}0{}linear2": (128, 32),
}


def named(layers: Mapping[str, tuple[int, int]], mark: str) -> dict[str, tuple[int, int]]:
    return {name.replace("{}", mark): widths for name, widths in layers.items()}


WAN_LAYERS = {
    f"blocks{{}}{block}{{}}{name}": widths
    for block in range(2)
    for name, widths in {
        **{f"{attention}_attn{{}}{one}": (24, 24) for attention in ("self", "cross") for one in "qkvo"},
        "ffn{}0": (24, 32),
        "ffn{}2": (32, 24),
    }.items()
}


def hunyuan_original(pipe: Any) -> lora_files.Tensors:
    layers = {"double_blocks.0.img_attn_qkv": (32, 96), "double_blocks.0.txt_mlp.fc1": (32, 128)}
    return other_layout(layers, "transformer.", ("lora_A", "lora_B"))


QWEN_LAYERS = {"transformer_blocks{}1{}attn{}to_q": (32, 32), "transformer_blocks{}0{}img_mlp{}net{}2": (128, 32)}
WAN: dict[str, Callable[[Any], lora_files.Tensors]] = {
    "diffusers": own_layout,
    "kohya": lambda pipe: other_layout(named(WAN_LAYERS, "_"), "lora_unet_", alpha=2.0),
    "original": lambda pipe: other_layout(named(WAN_LAYERS, "."), "diffusion_model.", ("lora_A", "lora_B")),
}
CASES = {
    "flux": Case(
        tiny_flux.pipeline,
        "flux-dev",
        tiny_flux.prompt,
        {"height": 144, "width": 208},
        (4, 4),
        {"diffusers": own_layout, "kohya": kohya_flux, "original": xlabs_flux},
    ),
    "flux2": Case(
        tiny_flux2.pipeline,
        "flux2-klein-4b",
        lambda: {**tiny_flux2.prompt(), "guidance_scale": 1.0},
        {"height": 144, "width": 208},
        (4, 4),
        {
            "diffusers": own_layout,
            "kohya": lambda pipe: other_layout(named(FLUX2_LAYERS, "_"), "lora_unet_", alpha=6.0),
            "original": lambda pipe: other_layout(named(FLUX2_LAYERS, "."), "diffusion_model.", ("lora_A", "lora_B")),
        },
    ),
    "qwen": Case(
        tiny_qwen.pipeline,
        "qwen-image",
        lambda: {**tiny_qwen.prompt(7), "true_cfg_scale": 1.0},
        {"height": 144, "width": 208},
        (4, 4),
        {
            "diffusers": own_layout,
            "kohya": lambda pipe: other_layout(named(QWEN_LAYERS, "_"), "lora_unet_", alpha=6.0),
            "original": lambda pipe: other_layout(
                named(QWEN_LAYERS, "."), "diffusion_model.", ("lora_A", "lora_B"), alpha=6.0
            ),
        },
    ),
    "wan": Case(
        tiny_wan.pipeline,
        "wan2.1-1.3b",
        lambda: {"prompt": "snow", "guidance_scale": 1.0, "max_sequence_length": 16},
        {"height": 48, "width": 80, "num_frames": 13},
        (2, 3, 3),
        WAN,
    ),
    "hunyuan": Case(
        tiny_hunyuan.pipeline,
        "hunyuan",
        lambda: {"prompt": "waves at night", "max_sequence_length": 16},
        {"height": 80, "width": 112, "num_frames": 13},
        (2, 3, 3),
        {"diffusers": own_layout, "original": hunyuan_original},
    ),
}


@pytest.fixture(scope="module")
def built() -> Callable[[str], Any]:
    """A pipeline of a family, to be changed at will."""
    made: dict[str, Any] = {}

    def build(family: str) -> Any:
        if family not in made:
            made[family] = CASES[family].build()
        return copy.deepcopy(made[family])

    return build


def apply(pipe: Any, model: Any, *loras: Path | Lora, fuse: bool = False) -> tuple[AppliedLora, ...]:
    asked = tuple(lora if isinstance(lora, Lora) else Lora(source=str(lora)) for lora in loras)
    files = [Path(lora.source) for lora in asked]
    return apply_loras(pipe, model, Weights(loras=asked, fuse_loras=fuse), files)


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for family, case in CASES.items() for layout in case.layouts]
)
def test_each_layout_works_as_in_stock_diffusers(
    family: str, layout: str, built: Callable[[str], Any], tmp_path: Path
) -> None:
    case, stock, ours = CASES[family], built(family), built(family)
    file = write(tmp_path / "a.safetensors", case.layouts[layout](stock))
    plain = case.call(stock)
    stock.load_lora_weights(str(file), use_safetensors=True)
    (applied,) = apply(ours, case.choice, file)
    expected = case.call(stock)
    assert applied.left_out == 0
    assert applied.layers >= 2
    assert difference(expected, plain) > 0.01
    assert difference(case.installed(ours), expected) < RELATIVE
    assert difference(case.installed(ours, chunk_tokens=256), expected) < RELATIVE
    if layout == "diffusers":
        fused = built(family)
        apply(fused, case.choice, file, fuse=True)
        assert not any("lora" in name for name, _ in fused.transformer.named_modules())
        assert difference(case.installed(fused), expected) < RELATIVE
        sparse = case.preset("b", radius=0)
        assert difference(case.installed(ours, sparse), expected) > 0.001
        assert difference(case.installed(ours, sparse), case.installed(fused, sparse)) < RELATIVE


# ---- Scales and factors


@pytest.fixture
def flux(built: Callable[[str], Any]) -> Any:
    return built("flux")


FLUX = CASES["flux"]


def merged(pipe: Any, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> Any:
    """With products added to its weights by hand."""
    for name, (down, up) in layers.items():
        pipe.transformer.get_submodule(name).weight += scale * up @ down
    return pipe


def pairs(tensors: lora_files.Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("transformer."): (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
        for name in names
    }


def attention_layers(pipe: Any, seed: int = 0, **how: Any) -> lora_files.Tensors:
    return diffusers_layout(layers_of(pipe.transformer, "attn"), seed=seed, **how)


def test_a_scale_of_zero_is_none_and_one_below_it_leads_away(flux: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", attention_layers(flux))
    plain = FLUX.call(flux)
    expected = FLUX.call(merged(copy.deepcopy(flux), pairs(attention_layers(flux)), -0.5))
    for scale, wanted in ((0.0, plain), (-0.5, expected)):
        for fuse in (False, True):
            pipe = copy.deepcopy(flux)
            apply(pipe, FLUX.choice, Lora(source=str(file), scale=scale), fuse=fuse)
            made = FLUX.installed(pipe)
            assert difference(made, wanted) < RELATIVE
            assert (scale == 0) == (difference(made, plain) < RELATIVE)


def test_loras_add_up_each_with_its_scale(flux: Any, tmp_path: Path) -> None:
    first = attention_layers(flux, rank=2)
    second = diffusers_layout(layers_of(flux.transformer, "to_q", "proj_mlp", "norm1"), seed=1, rank=5)
    files = [write(tmp_path / f"{name}.safetensors", own) for name, own in (("a", first), ("b", second))]
    expected = FLUX.call(merged(merged(copy.deepcopy(flux), pairs(first), 0.75), pairs(second), 0.5))
    for fuse in (False, True):
        pipe = copy.deepcopy(flux)
        loras = [Lora(source=str(file), scale=scale) for file, scale in zip(files, (0.75, 0.5), strict=True)]
        applied = apply(pipe, FLUX.choice, *loras, fuse=fuse)
        assert [(one.name, one.scale, one.fused) for one in applied] == [
            ("a.safetensors", 0.75, fuse),
            ("b.safetensors", 0.5, fuse),
        ]
        assert difference(FLUX.installed(pipe), expected) < RELATIVE


ADAPTER = {
    "transformer.r": 4,
    "transformer.lora_alpha": 6,
    "transformer.init_lora_weights": "gaussian",
    "transformer.target_modules": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"],
}


@pytest.mark.parametrize(
    ("adapter", "factor"),
    [
        (ADAPTER, lambda name: 1.5),
        (ADAPTER | {"transformer.use_rslora": True}, lambda name: 3.0),
        (
            ADAPTER | {"transformer.alpha_pattern": {"to_q": 2, "^single_transformer_blocks.0.attn.to_k": 8}},
            lambda name: 0.5 if name.endswith("to_q") else 2.0 if "single" in name and "0.attn.to_k" in name else 1.5,
        ),
    ],
)
def test_the_configuration_that_peft_saves_gives_the_factors(
    adapter: Mapping[str, Any], factor: Callable[[str], float], flux: Any, tmp_path: Path
) -> None:
    tensors = attention_layers(flux)
    file = write(tmp_path / "a.safetensors", tensors, adapter)
    scaled = {name: (down, up * factor(name)) for name, (down, up) in pairs(tensors).items()}
    expected = FLUX.call(merged(copy.deepcopy(flux), scaled, 1.0))
    if "transformer.alpha_pattern" not in adapter:
        stock = copy.deepcopy(flux)
        stock.load_lora_weights(str(file), use_safetensors=True)
        assert difference(FLUX.call(stock), expected) < RELATIVE
    apply(flux, FLUX.choice, file)
    assert difference(FLUX.installed(flux), expected) < RELATIVE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer.use_dora": True}, "was trained with use_dora, which is not supported"),
        ({"transformer.megatron_config": {"a": 1}}, "was trained with megatron_config"),
        ({"transformer.modules_to_save": ["x"]}, "was trained with modules_to_save"),
        ({"transformer.alpha_pattern": {"(a+)+$": 2}}, r"by the pattern \(a\+\)\+\$, and not by names"),
        ({"transformer.lora_alpha": "6\x1b"}, "its lora_adapter_metadata cannot be read"),
        ({"transformer.lora_alpha": 1e300}, "its lora_adapter_metadata cannot be read"),
    ],
)
def test_what_a_configuration_asks_for_beyond_factors_is_refused(
    changes: Mapping[str, Any], words: str, flux: Any, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.safetensors", attention_layers(flux), ADAPTER | dict(changes))
    with pytest.raises((BadInput, ModelUnavailable), match=words):
        apply(flux, FLUX.choice, file)


def test_alphas_by_layer_are_factors(flux: Any, tmp_path: Path) -> None:
    tensors = attention_layers(flux)
    names = list(pairs(tensors))
    alphas = {f"transformer.{name}.alpha": torch.tensor(2.0 * (1 + number % 3)) for number, name in enumerate(names)}
    scaled = {
        name: (down, up * float(alphas[f"transformer.{name}.alpha"]) / lora_files.RANK)
        for name, (down, up) in pairs(tensors).items()
    }
    expected = FLUX.call(merged(copy.deepcopy(flux), scaled, 1.0))
    (applied,) = apply(flux, FLUX.choice, write(tmp_path / "a.safetensors", tensors | alphas))
    assert applied.left_out == 0
    assert difference(FLUX.installed(flux), expected) < RELATIVE


# ---- Which part


@pytest.mark.parametrize("noise", ["high", "low", "both"])
def test_of_two_transformers_the_named_ones_have_it(noise: Any, tmp_path: Path) -> None:
    case, pipe = CASES["wan"], tiny_wan.pipeline("two")
    model = replace(case.choice, transformers=2)
    file = write(tmp_path / "a.safetensors", own_layout(pipe))
    stock = copy.deepcopy(pipe)
    if noise != "low":
        stock.load_lora_weights(str(file), adapter_name="a")
    if noise != "high":
        stock.load_lora_weights(str(file), adapter_name="b", load_into_transformer_2=True)
    (applied,) = apply(pipe, model, Lora(source=str(file), noise=noise))
    assert applied.told()["noise"] == noise
    parts = {"high": ("transformer",), "low": ("transformer_2",)}.get(noise, ("transformer", "transformer_2"))
    assert applied.parts == parts
    expected = case.call(stock)
    assert difference(case.installed(pipe), expected) < RELATIVE


def test_a_file_for_each_of_two_transformers(tmp_path: Path) -> None:
    case, pipe = CASES["wan"], tiny_wan.pipeline("two")
    files = [
        write(tmp_path / f"{name}.safetensors", diffusers_layout(layers_of(pipe.transformer), seed=seed))
        for seed, name in enumerate("ab")
    ]
    stock = copy.deepcopy(pipe)
    stock.load_lora_weights(str(files[0]), adapter_name="a")
    stock.load_lora_weights(str(files[1]), adapter_name="b", load_into_transformer_2=True)
    stock.transformer.set_adapters("a", 0.5)
    stock.transformer_2.set_adapters("b", 2.0)
    high, low = Lora(source=str(files[0]), noise="high", scale=0.5), Lora(source=str(files[1]), noise="low", scale=2.0)
    apply(pipe, replace(case.choice, transformers=2), high, low)
    assert difference(case.installed(pipe), case.call(stock)) < RELATIVE


@pytest.mark.parametrize("fuse", [False, True])
def test_a_text_encoder_has_its_share(fuse: bool, tmp_path: Path) -> None:
    from grat_cli.models.loading import load_model

    demo = choose_model("demo")
    stock = load_model(demo, device=torch.device("cpu"), dtype=torch.float32).pipe
    ours = copy.deepcopy(stock)
    of_text = diffusers_layout(layers_of(stock.text_encoder, "q_proj", "fc1"), part="text_encoder")
    tensors = attention_layers(stock) | {
        name.replace("text_encoder.", "text_encoder.text_model.", 1): tensor for name, tensor in of_text.items()
    }
    file = write(tmp_path / "a.safetensors", tensors)

    def encoded(pipe: Any) -> torch.Tensor:
        return pipe.encode_prompt("a red fox", None)[1]

    plain = encoded(stock)
    stock.load_lora_weights(str(file), adapter_name="a")
    stock.set_adapters("a", 0.5)
    (applied,) = apply(ours, demo, Lora(source=str(file), scale=0.5), fuse=fuse)
    assert (applied.parts, applied.left_out) == (("transformer", "text_encoder"), 0)
    assert difference(encoded(stock), plain) > 0.01
    assert difference(encoded(ours), encoded(stock)) < RELATIVE
    assert any("lora" in name for name, _ in ours.text_encoder.named_modules()) != fuse


def test_an_input_with_more_channels_than_it_was_trained_at_takes_it_for_the_first(tmp_path: Path) -> None:
    plain = tiny_flux.transformer()
    wide = tiny_flux.pipeline(
        FluxFillPipeline, transformer=tiny_flux.transformer(in_channels=48, out_channels=16, guidance_embeds=True)
    )
    layers = layers_of(plain, "x_embedder", "to_q")
    tensors = diffusers_layout(layers)
    stock = copy.deepcopy(wide)
    stock.load_lora_weights(dict(tensors))
    apply(wide, FLUX.choice, write(tmp_path / "a.safetensors", tensors))
    call = tiny_flux.inputs(4, 6) | {"hidden_states": torch.randn(1, 24, 48), "guidance": torch.tensor([3.5])}
    assert difference(wide.transformer(**call)[0], stock.transformer(**call)[0]) < RELATIVE


def test_halves_are_of_the_dtype_of_the_model_and_nothing_is_trained(flux: Any, tmp_path: Path) -> None:
    flux.transformer.to(torch.bfloat16)
    apply(flux, FLUX.choice, write(tmp_path / "a.safetensors", attention_layers(flux)))
    own = {name: weight for name, weight in flux.transformer.named_parameters() if "lora_" in name}
    assert own
    assert {weight.dtype for weight in own.values()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in flux.transformer.parameters())


# ---- What does not fit


def without(tensors: lora_files.Tensors, *words: str) -> lora_files.Tensors:
    return {name: tensor for name, tensor in tensors.items() if not any(word in name for word in words)}


def test_weights_without_a_place_are_told(flux: Any, tmp_path: Path) -> None:
    deeper = tiny_flux.transformer(num_single_layers=3)
    tensors = diffusers_layout(layers_of(deeper, "to_q")) | {
        "time_in.lora_A.weight": torch.zeros(4, 8),
        "lora_unet_x.alpha": torch.tensor(1.0),
    }
    (applied,) = apply(flux, FLUX.choice, write(tmp_path / "a.safetensors", tensors))
    assert (applied.layers, applied.left_out) == (3, 4)
    assert applied.note == (
        "a.safetensors: 4 of its weights have no place in the model and are left out, such as time_in.lora_A.weight"
    )


@pytest.mark.parametrize("family", list(CASES))
def test_a_lora_of_another_family_is_refused(family: str, built: Callable[[str], Any], tmp_path: Path) -> None:
    case = CASES[family]
    for other, of_other in CASES.items():
        layouts = ("diffusers", "original") if other != family else ()
        for layout, tensors in ((layout, of_other.layouts[layout]) for layout in layouts):
            file = write(tmp_path / f"{other}-{layout}.safetensors", tensors(built(other)))
            pipe = built(family)
            with pytest.raises((BadInput, ModelUnavailable), match=f"^{file.name} ") as caught:
                apply(pipe, case.choice, file)
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 400


def wider(tensors: lora_files.Tensors) -> lora_files.Tensors:
    return {name: torch.cat([tensor] * 2, dim=1 if "lora_A" in name else 0) for name, tensor in tensors.items()}


BROKEN: dict[str, tuple[Callable[[lora_files.Tensors], lora_files.Tensors], str]] = {
    "wider": (wider, r"is of another model than flux-dev: its .* takes 64 channels to 64, that of the model 32 to 32"),
    "half": (lambda own: without(own, "blocks.0.attn.to_q.lora_B"), "is incomplete: of .* it has one half"),
    "ranks": (
        lambda own: {name: tensor[:2] if "to_q.lora_A" in name else tensor for name, tensor in own.items()},
        "is damaged: the halves of .* do not fit each other",
    ),
    "nan": (lambda own: {name: tensor * torch.nan for name, tensor in own.items()}, "is damaged: .* no finite numbers"),
    "integers": (lambda own: {name: tensor.long() for name, tensor in own.items()}, "is damaged: .* no finite numbers"),
    "flat": (
        lambda own: {name: tensor.flatten() for name, tensor in own.items()},
        "is damaged: the halves of .* do not fit",
    ),
    "prefix": (
        lambda own: {name.removeprefix("transformer."): tensor for name, tensor in own.items()},
        "is of another model than flux-dev: none of its .* weights has a place there",
    ),
    "input": (
        lambda own: {
            f"transformer.x_embedder.lora_{half}.weight": torch.zeros(shape)
            for half, shape in (("A", (4, 32)), ("B", (32, 4)))
        },
        "widens the input of the model from 16 to 32 channels",
    ),
    "alpha": (
        lambda own: {
            f"lora_unet_double_blocks_0_img_attn_proj.{name}": tensor
            for name, tensor in (
                ("lora_down.weight", torch.zeros(4, 32)),
                ("lora_up.weight", torch.zeros(32, 4)),
                ("alpha", torch.tensor(-1.0)),
            )
        },
        "is damaged: .*alpha is no number that can be",
    ),
    "unknown": (
        lambda own: {f"lora_unet_odd_block_{name}.lora_down.weight": tensor for name, tensor in own.items()},
        "is no LoRA of Flux, as far as diffusers can tell",
    ),
}


@pytest.mark.parametrize("damage", list(BROKEN))
def test_files_that_do_not_fit_are_refused_in_a_line(damage: str, flux: Any, tmp_path: Path) -> None:
    change, words = BROKEN[damage]
    file = write(tmp_path / "a.safetensors", change(attention_layers(flux)))
    with pytest.raises((BadInput, ModelUnavailable), match=f"^a.safetensors {words}") as caught:
        apply(flux, FLUX.choice, file)
    assert len(str(caught.value).splitlines()) == 1


MARKS = ("transformer.", "lora_unet_", "lora_A", "lora_B", "lora_down", ".weight", ".", "blocks", "0", "attn", "to_q")
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shorter": lambda tensor: tensor[:1],
    "none": lambda tensor: tensor[:0],
    "flat": lambda tensor: tensor.reshape(-1),
    "deeper": lambda tensor: tensor[..., None, None],
    "bytes": lambda tensor: tensor.to(torch.uint8),
    "half": lambda tensor: tensor.half(),
    "eighth": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "infinite": lambda tensor: tensor * torch.inf,
}


@given(
    family=st.sampled_from(["flux", "wan", "qwen"]),
    layout=st.sampled_from(["diffusers", "kohya", "original"]),
    renamed=st.lists(st.tuples(st.integers(0, 99), *[st.sampled_from((*MARKS, "", "9999", ".alpha"))] * 2), max_size=3),
    changed=st.lists(st.tuples(st.integers(0, 99), st.sampled_from(list(CHANGES))), max_size=2),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_added_or_refused_in_a_line(
    built: Callable[[str], Any], tmp_path: Path, family: str, layout: str, renamed: list[Any], changed: list[Any]
) -> None:
    case, pipe = CASES[family], built(family)
    tensors = case.layouts[layout](pipe)
    for number, mark, other in renamed:
        name = list(tensors)[number % len(tensors)]
        tensors[name.replace(mark, other, 1) if mark else name + other] = tensors.pop(name)
    for number, change in changed:
        name = list(tensors)[number % len(tensors)]
        tensors[name] = CHANGES[change](tensors[name]) if tensors[name].ndim else tensors[name]
    file = write(tmp_path / "a.safetensors", tensors)
    try:
        (applied,) = apply(pipe, case.choice, file)
        made = 2 * applied.layers
    except (BadInput, ModelUnavailable) as error:
        made, said = 0, str(error)
        if len(said.splitlines()) != 1 or not said.startswith("a.safetensors "):
            raise
    assert made == sum("lora_" in name for name, _ in pipe.transformer.named_parameters()) or not made


def quantized(pipe: Any) -> Any:
    """With queries in 8 bits, as a GGUF file has them."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quantize

    kind = GGMLQuantizationType.Q8_0
    for name, layer in list(pipe.transformer.named_modules()):
        if name.endswith("to_q"):
            own = GGUFLinear(layer.in_features, layer.out_features, bias=True, compute_dtype=torch.float32)
            packed = torch.from_numpy(quantize(layer.weight.numpy(), kind))
            parameter: Any = GGUFParameter
            own.weight = parameter(packed, quant_type=kind)
            own.bias = layer.bias
            pipe.transformer.set_submodule(name, own)
    return pipe


def test_weights_in_few_bits_have_a_lora_beside_them_and_are_not_fused(flux: Any, tmp_path: Path) -> None:
    tensors = diffusers_layout(layers_of(flux.transformer, "to_q", "to_k"))
    file = write(tmp_path / "a.safetensors", {name: tensor.half() for name, tensor in tensors.items()})
    stock = quantized(copy.deepcopy(flux))
    stock.load_lora_weights(str(file))
    with pytest.raises(BadInput, match="--fuse-lora: flux-dev is quantized, and a sum would be rounded to few bits"):
        apply(quantized(copy.deepcopy(flux)), FLUX.choice, file, fuse=True)
    plain = FLUX.call(quantized(flux))
    apply(flux, FLUX.choice, file)
    assert {weight.dtype for name, weight in flux.transformer.named_parameters() if "lora_" in name} == {torch.float32}
    made = FLUX.installed(flux)
    assert difference(made, plain) > 0.01
    assert difference(made, FLUX.call(stock)) < 0.002  # in which halves are products in fp16


@pytest.mark.parametrize("kind", ["model", "group", "sequential"])
def test_offloaded_models_have_it(kind: str, flux: Any, tmp_path: Path) -> None:
    from grat_cli.models.offloading import offload

    apply(flux, FLUX.choice, write(tmp_path / "a.safetensors", own_layout(flux)))
    expected = FLUX.installed(flux)
    if kind == "sequential":
        # As the pipeline's own method, which refuses CPUs.
        for block in (*flux.transformer.transformer_blocks, *flux.transformer.single_transformer_blocks):
            cpu_offload(block, execution_device=torch.device("cpu"), offload_buffers=True)
        assert any(weight.is_meta for name, weight in flux.transformer.named_parameters() if "lora_A" in name)
    else:
        offload(flux, kind, torch.device("cpu"))
    assert difference(FLUX.installed(flux, chunk_tokens=256), expected) < RELATIVE


def test_a_lora_from_text_fits_a_model_that_goes_on_from_a_picture(tmp_path: Path) -> None:
    case, pipe = CASES["wan"], tiny_wan.pipeline("picture")
    stock = copy.deepcopy(pipe)
    file = write(tmp_path / "a.safetensors", diffusers_layout(layers_of(tiny_wan.transformer())))
    stock.load_lora_weights(str(file))
    (applied,) = apply(pipe, case.choice, file)
    assert applied.left_out == 0
    text = FAMILIES["wan"].encode_text(pipe, case.choice, "snow", None)
    given = {"prompt_embeds": text["prompt_embeds"], "guidance_scale": 1.0, "image": tiny_wan.picture(80, 48)}
    case = replace(case, arguments=lambda: given)
    assert difference(case.installed(pipe), case.call(stock)) < RELATIVE


def test_diffusers_reads_loras_for_all_pipelines_but_those_that_are_refused() -> None:
    for family in FAMILIES.values():
        for name in family.pipelines:
            has = hasattr(getattr(diffusers, name), "lora_state_dict")
            assert has == (family.name != "hunyuan15"), name
