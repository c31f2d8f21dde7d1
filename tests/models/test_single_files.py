"""Transformers from files of weights alone: every layout and form gives the model that it was made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.loaders.single_file_utils as single_file_utils
import gguf
import numpy as np
import other_layouts
import pytest
import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_hunyuan15
import tiny_qwen
import tiny_wan
import torch
from command_line import grat, refusal
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor
from PIL import Image
from safetensors.torch import load_file, save_file

import grat_cli
from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput, ModelUnavailable
from grat_cli.families import family_of_class
from grat_cli.files.fingerprint import fingerprint
from grat_cli.generation import stored
from grat_cli.generation.checkpoint import Run
from grat_cli.models import loading
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_model
from grat_cli.models.offloading import offload
from grat_cli.models.quantization import cast, require_movable
from grat_cli.models.single_file import plain, read_weights, transformer_of
from grat_cli.models.weights import Weights

CPU = torch.device("cpu")
WEIGHTS = load_file(DEMO_FLUX.path / "transformer" / "diffusion_pytorch_model.safetensors")
ORIGINAL = other_layouts.of_black_forest_labs(WEIGHTS)
E4M3 = torch.float8_e4m3fn
# Rounding to 3 bits behind the point, or to the smallest number that there is; the same of bfloat16, which follows.
E4M3_RELATIVE, E4M3_SMALLEST, BFLOAT16_RELATIVE = 2**-4, 2**-10, 2**-9

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def any_width(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with other_layouts.small_originals(monkeypatch):
        yield


def load(file: Path, dtype: torch.dtype = torch.float32, **how: Any) -> LoadedModel:
    """A file with the demo's other parts."""
    weights = replace(Weights(base="demo"), **how)
    return load_model(choose_model(str(file)), device=CPU, dtype=dtype, weights=weights)


def weights_in(transformer: Any) -> Tensors:
    """As they take part in products."""
    return {
        name: dequantize_gguf_tensor(weight).detach() for name, weight in transformer.state_dict(keep_vars=True).items()
    }


def write(path: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name].float(), weight.float()), name


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        *((ORIGINAL, prefix) for prefix in ("", "model.diffusion_model.", "module.")),
        *((WEIGHTS, prefix) for prefix in ("", "diffusion_model.", "transformer.")),
    ],
)
def test_a_file_in_either_layout_is_the_folder_exactly(tmp_path: Path, layout: Tensors, prefix: str) -> None:
    file = write(tmp_path / "tuned.safetensors", {prefix + name: weight for name, weight in layout.items()})
    assert_same(weights_in(load(file).pipe.transformer), WEIGHTS)


def test_a_file_of_a_whole_pipeline_gives_its_transformer_alone(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{name}": weight for name, weight in ORIGINAL.items()}
    beside = {"vae.decoder.conv_in.weight": torch.ones(1), "text_encoders.t5xxl.shared.weight": torch.ones(1)}
    file = write(tmp_path / "checkpoint.safetensors", tensors | beside)
    loaded = load(file)
    assert_same(weights_in(loaded.pipe.transformer), WEIGHTS)
    assert loaded.notes == (f"{file} holds a transformer and other parts: these are those of demo all the same",)


@pytest.mark.parametrize("name", ["tuned.SAFETENSORS", "tuned.sft", "Tuned.Sft"])
def test_names_of_files_end_as_people_write_them(tmp_path: Path, name: str) -> None:
    assert_same(weights_in(load(write(tmp_path / name, WEIGHTS)).pipe.transformer), WEIGHTS)


@pytest.mark.parametrize("newer", [False, True], ids=["older names", "newer names"])
@pytest.mark.parametrize("layout", [WEIGHTS, ORIGINAL], ids=["of diffusers", "of Black Forest Labs"])
def test_scaled_8_bit_floats_have_their_scales(tmp_path: Path, layout: Tensors, newer: bool) -> None:
    stored = other_layouts.scaled_fp8(layout, newer=newer)
    found = weights_in(load(write(tmp_path / "fp8.safetensors", stored)).pipe.transformer)
    matrices = 0
    for name, weight in WEIGHTS.items():
        if weight.dim() != 2:
            assert torch.equal(found[name], weight.float()), name
            continue
        matrices += 1
        # The scale is that of the matrix that this was a part of, which has the larger numbers.
        scale = max(float(tensor.float().abs().max()) for tensor in layout.values() if tensor.dim() == 2) / 448
        bound = torch.maximum(weight.float().abs() * E4M3_RELATIVE, torch.tensor(scale * E4M3_SMALLEST))
        assert bool(((found[name] - weight.float()).abs() <= bound).all()), name
    assert matrices > 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_floats_become_the_product_with_their_scale_rounded_once(dtype: torch.dtype) -> None:
    weight = torch.linspace(-448, 448, 8 * 6).reshape(8, 6).to(E4M3)
    for scale in (torch.tensor(0.37), torch.rand(8) + 0.1, torch.rand(8, 1) + 0.1, torch.rand(4, 2) + 0.1):
        found = plain({"a.weight": weight, "a.scale_weight": scale, "a.bias": torch.ones(8)}, dtype)
        rows = scale.reshape(-1, *scale.shape[1:2]) if scale.dim() else scale.reshape(1)
        columns = rows.shape[1] if rows.dim() == 2 else 1
        each = rows.reshape(-1, 1, columns, 1).expand(-1, 8 // rows.shape[0], columns, 6 // columns).reshape(8, 6)
        assert torch.equal(found["a.weight"], (weight.double() * each.double()).float().to(dtype))
        assert found.keys() == {"a.weight", "a.bias"}


def test_8_bit_floats_without_a_scale_are_what_they_say(tmp_path: Path) -> None:
    stored = {name: weight.to(E4M3) if weight.dim() == 2 else weight for name, weight in ORIGINAL.items()}
    found = weights_in(load(write(tmp_path / "fp8.safetensors", stored)).pipe.transformer)
    assert_same(found, {name: w.to(E4M3).float() if w.dim() == 2 else w for name, w in WEIGHTS.items()})


def scale_of_nothing(tensors: Tensors) -> None:
    tensors["nothing.scale_weight"] = torch.ones(())


def scale_of_no_8_bits(tensors: Tensors) -> None:
    tensors["img_in.weight"] = tensors["img_in.weight"].float()


def scale_not_finite(tensors: Tensors) -> None:
    tensors["img_in.scale_weight"] = torch.tensor(float("nan"))


def scale_of_zero(tensors: Tensors) -> None:
    tensors["img_in.scale_weight"] = torch.zeros(())


def scale_of_another_shape(tensors: Tensors) -> None:
    tensors["img_in.scale_weight"] = torch.ones(7)


def empty_scale(tensors: Tensors) -> None:
    tensors["img_in.scale_weight"] = torch.ones(0)


def stored_in_another_way(tensors: Tensors) -> None:
    tensors["img_in.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)


def stored_as_nonsense(tensors: Tensors) -> None:
    tensors["img_in.comfy_quant"] = torch.tensor([255, 0], dtype=torch.uint8)


def packed(tensors: Tensors) -> None:
    tensors["time_in.in_layer.weight"] = tensors["time_in.in_layer.weight"].view(torch.uint8)
    tensors.pop("time_in.in_layer.scale_weight")


def one_more(tensors: Tensors) -> None:
    tensors["img_in.more"] = torch.ones(3)


def one_less(tensors: Tensors) -> None:
    tensors.pop("final_layer.linear.bias")


def another_shape(tensors: Tensors) -> None:
    tensors["final_layer.linear.bias"] = torch.ones(5)


def half_prefixed(tensors: Tensors) -> None:
    tensors["model.diffusion_model.img_in.bias"] = tensors.pop("img_in.bias")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (scale_of_nothing, "nothing has a scale, and no weight of 8-bit floats"),
        (scale_of_no_8_bits, "img_in has a scale, and no weight of 8-bit floats"),
        (scale_not_finite, "scale of img_in.weight is no positive number"),
        (scale_of_zero, "scale of img_in.weight is no positive number"),
        (empty_scale, "scale of img_in.weight is no positive number"),
        (scale_of_another_shape, "scale of img_in.weight does not fit it"),
        (stored_in_another_way, "img_in.comfy_quant is stored as nvfp4, and only float8_e4m3fn is read"),
        (stored_as_nonsense, "img_in.comfy_quant is stored as None"),
        (packed, "linear_1.weight is stored as uint8, in no way of quantizing that is read"),
        (one_more, "holds 1 weights that demo has no place for, such as img_in.more"),
        (one_less, "it lacks final_layer.linear.bias"),
        (another_shape, "proj_out.bias is 5, and that of demo 16"),
        (half_prefixed, "only some of its weights are named model.diffusion_model"),
    ],
)
def test_what_is_amiss_with_a_file_is_told(tmp_path: Path, damage: Callable[[Tensors], None], says: str) -> None:
    tensors = other_layouts.scaled_fp8(ORIGINAL)
    damage(tensors)
    with pytest.raises(ModelUnavailable, match=f"fp8.safetensors is damaged, incomplete or not Flux's .*{says}"):
        load(write(tmp_path / "fp8.safetensors", tensors))


# ---- GGUF


def bound_of(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """How far quantized numbers may lie from their own, from the formats (ggml-quants.c): half of what a block counts
    by, all of it for the number at the end that has no counterpart; the 16-bit scale of a block, and products in 16
    bits, are rounded besides."""
    blocks = weight.float().reshape(-1, 32).abs().amax(1, keepdim=True)
    levels = {"Q8_0": 127, "Q4_0": 8, "Q5_0": 16}[kind]
    counted = blocks / levels
    rounded = levels * counted * 2**-11 * 2 + levels * 2**-25
    return (counted * (0.5 if kind == "Q8_0" else 1.0) + rounded).expand(-1, 32).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
@pytest.mark.parametrize("layout", [WEIGHTS, ORIGINAL], ids=["of diffusers", "of Black Forest Labs"])
def test_quantized_gguf_is_the_folder_within_its_quantization(tmp_path: Path, layout: Tensors, kind: str) -> None:
    other_layouts.write_gguf(tmp_path / "tuned.gguf", layout, kind)
    transformer = load(tmp_path / "tuned.gguf").pipe.transformer
    assert sum(isinstance(module, GGUFLinear) for module in transformer.modules()) > 30
    for name, found in weights_in(transformer).items():
        weight = WEIGHTS[name].float()
        if weight.dim() != 2:
            assert torch.equal(found.float(), weight), name
        elif weight.shape[1] % 32 == 0:
            assert bool(((found.float() - weight).abs() <= bound_of(kind, weight)).all()), name


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_gguf_in_full_precision_is_the_folder_exactly(tmp_path: Path, kind: str) -> None:
    other_layouts.write_gguf(tmp_path / "tuned.gguf", ORIGINAL, kind)
    transformer = load(tmp_path / "tuned.gguf").pipe.transformer
    assert not any(isinstance(module, GGUFLinear) for module in transformer.modules())
    assert_same(weights_in(transformer), WEIGHTS)


K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@pytest.mark.parametrize("kind", K_TYPES)
def test_blocks_of_256_are_turned_back_as_the_gguf_package_does(tmp_path: Path, kind: str) -> None:
    """That package turns these back and makes none: blocks are drawn at random, with scales that are numbers."""
    model = tiny_flux.transformer(num_attention_heads=4, attention_head_dim=64, axes_dims_rope=(16, 24, 24))
    type_ = gguf.GGMLQuantizationType[kind]
    _, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}[kind]
    draw = np.random.default_rng(0)
    writer, wanted = gguf.GGUFWriter(str(tmp_path / "k.gguf"), "flux"), {}
    for name, weight in model.state_dict().items():
        if weight.dim() != 2 or weight.shape[1] % 256:
            writer.add_tensor(name, weight.numpy(), raw_dtype=gguf.GGMLQuantizationType.F32)
            wanted[name] = weight
            continue
        blocks = draw.integers(0, 256, (weight.numel() // 256, block_bytes), dtype=np.uint8)
        for place in scales:
            small = draw.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16)
            blocks[:, place : place + 2] = small.view(np.uint8)
        data = blocks.reshape(weight.shape[0], -1)
        writer.add_tensor(name, data, raw_dtype=type_)
        wanted[name] = torch.from_numpy(gguf.quants.dequantize(data, type_)).reshape(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_config(tmp_path / "base" / "transformer")
    tensors = read_weights(tmp_path / "k.gguf", torch.float32, allow_pickle=False)
    read = transformer_of(type(model), tensors, dict(model.config), str(tmp_path / "base"), torch.float32)
    for name, found in weights_in(read).items():
        largest = float(wanted[name].abs().max())
        # In 16 bits a product of two scales, a product with them, and a difference of two such.
        torch.testing.assert_close(found.float(), wanted[name], rtol=2**-9, atol=largest * 2**-9, msg=name)


def of_family(name: str) -> tuple[Any, Any]:
    """A tiny transformer, and arguments of a call."""
    if name == "flux":
        return tiny_flux.transformer(guidance=False), tiny_flux.inputs(4, 6)
    if name == "flux2":
        return tiny_flux2.transformer(), tiny_flux2.inputs(4, 6)
    if name == "qwen":
        return tiny_qwen.transformer(), tiny_qwen.inputs((4, 6))
    if name == "hunyuan":
        return tiny_hunyuan.transformer(), tiny_hunyuan.inputs((2, 4, 6))
    return tiny_wan.transformer(), tiny_wan.inputs((2, 4, 6))


FAMILIES = ("flux", "flux2", "qwen", "hunyuan", "wan")


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_every_family_run_as_the_transformer_that_they_were_made_of(tmp_path: Path, family: str) -> None:
    stock, inputs = of_family(family)
    stock.save_config(tmp_path / "transformer")
    weights = stock.state_dict()
    write(tmp_path / "own.safetensors", {f"model.diffusion_model.{name}": w for name, w in weights.items()})
    other_layouts.write_gguf(tmp_path / "same.gguf", weights, "F32")
    other_layouts.write_gguf(tmp_path / "small.gguf", weights, "Q8_0")

    def read(file: str) -> Any:
        tensors = read_weights(tmp_path / file, torch.float32, allow_pickle=False)
        found = transformer_of(type(stock), tensors, dict(stock.config), str(tmp_path), torch.float32)
        loading._restore_precision(found, family_of_class(type(stock).__name__).fresh_modules(stock.config))
        return found

    with torch.no_grad():
        wanted = stock(**inputs)[0]
        for file in ("own.safetensors", "same.gguf"):
            found = read(file)
            assert_same(found.state_dict(), weights)
            # Sums depend on where in memory a matrix begins.
            torch.testing.assert_close(found(**inputs)[0], wanted, rtol=1e-5, atol=1e-5, msg=file)
        quantized = read("small.gguf")
        # What takes part in products is what is stored, turned back: the same numbers in a plain model do the same.
        plainly = type(stock).from_config(dict(stock.config)).eval()
        plainly.load_state_dict({name: weight.float() for name, weight in weights_in(quantized).items()})
        torch.testing.assert_close(quantized(**inputs)[0], plainly(**inputs)[0], rtol=1e-5, atol=1e-5)
        assert float((quantized(**inputs)[0] - wanted).abs().max()) < 0.1 * float(wanted.abs().max())


def test_wans_own_layout_is_read_with_what_has_five_dimensions(tmp_path: Path) -> None:
    """In GGUF such weights are stored in four dimensions, or fewer, and their shape is noted."""
    stock = tiny_wan.transformer()
    stock.save_config(tmp_path / "transformer")
    original = other_layouts.of_wan(stock.state_dict())
    write(tmp_path / "own.safetensors", {f"model.diffusion_model.{name}": w for name, w in original.items()})
    writer = gguf.GGUFWriter(str(tmp_path / "own.gguf"), "wan")
    for name, weight in original.items():
        data = weight.numpy()
        if data.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
            data = data.reshape(data.shape[0], -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in ("own.safetensors", "own.gguf"):
        tensors = read_weights(tmp_path / file, torch.float32, allow_pickle=False)
        found = transformer_of(type(stock), tensors, dict(stock.config), str(tmp_path), torch.float32)
        assert_same(found.state_dict(), stock.state_dict())


@pytest.mark.parametrize("shape", [[1 << 30], [-4, -4], [0]])
def test_original_shapes_of_gguf_that_lie_are_told(tmp_path: Path, shape: list[int]) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "flux")
    writer.add_array("comfy.gguf.orig_shape.a", shape)
    writer.add_tensor("a", np.ones(16, np.float32), raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelUnavailable, match="a does not hold as many numbers as its original shape says"):
        load(tmp_path / "odd.gguf")


def test_originals_of_another_width_are_told(tmp_path: Path) -> None:
    """diffusers has the full model's in its code; `small_originals` is not at work here."""
    file = write(tmp_path / "narrow.safetensors", ORIGINAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file_utils, "torch", torch)
        with pytest.raises(ModelUnavailable, match="its matrices are not those of the full model, whose layout it has"):
            load(file)


def test_hunyuanvideo_15_has_no_files_of_a_transformer_alone() -> None:
    stock = tiny_hunyuan15.transformer()
    with pytest.raises(ModelUnavailable, match=r"no file of a HunyuanVideo15Transformer3DModel alone: give a folder"):
        transformer_of(type(stock), stock.state_dict(), dict(stock.config), "base", torch.float32)


# ---- In a run


def test_a_gguf_file_makes_a_picture_and_is_told_in_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other_layouts.write_gguf(Path("tuned.gguf"), ORIGINAL, "Q8_0")
    made = ("--model", "tuned.gguf", "--base", "demo", "--res", "64", "--steps", "2", "--seed", "2")
    result = grat("image", "a red fox", *made, "--out", "a.png")
    assert result.code == 0, result.err
    model = json.loads(Path("a.json").read_text())["model"]
    assert [(file["part"], file["name"]) for file in model["weights"]] == [
        ("transformer", "tuned.gguf"),
        ("text_encoder", "model.safetensors"),
        ("text_encoder_2", "model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
    ]
    told = model["weights"][0]
    assert list(told["types"]) == ["Q8_0", "F32", "F16"]
    assert told["types"]["Q8_0"] > 10 * told["types"]["F32"]
    size = Path("tuned.gguf").stat().st_size
    assert {name: told[name] for name in ("bytes", "sha256", "whole")} == asdict(fingerprint(Path("tuned.gguf")))
    assert 0.95 * size < sum(told["types"].values()) <= told["bytes"] == size


def test_a_run_from_a_file_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints keep where the other parts are, and whether casts are used; never that pickles may be read."""
    monkeypatch.chdir(tmp_path)
    encoder = shutil.copy(DEMO_FLUX.path / "text_encoder_2" / "model.safetensors", "t5.safetensors")
    weights = Weights(base="demo", cast="fp8", text_encoder=encoder, allow_pickle=True)
    data = stored._weights_data(weights)
    told = {"base": "demo", "quantize": "none", "cast": "fp8", "text_encoder": str(Path(encoder).resolve())}
    assert data == {**told, "loras": (), "fuse_loras": False}
    read = stored.StoredForm.model_validate(data).as_weights()
    assert read == Weights(base="demo", cast="fp8", text_encoder=str(Path(encoder).resolve()))
    for wrong in ({"allow_pickle": True}, {"text_encoder": "t5.safetensors"}, {"cast": "fp4"}, {"base": "nothing"}):
        with pytest.raises(ValueError, match=r"allow_pickle|text_encoder|cast|base"):
            stored.StoredForm.model_validate({**data, **wrong}).as_weights()


def test_a_file_is_what_its_base_is_but_for_its_weights(tmp_path: Path) -> None:
    file = write(tmp_path / "tuned.safetensors", ORIGINAL)
    demo = choose_model("demo")
    own: dict[str, Any] = {"name": str(file), "source": str(file), "kind": "file", "reason": "a file of that name"}
    wanted = replace(demo, **own, is_demo=False, other_parts=demo.source)
    assert choose_model(str(file), base="demo") == wanted
    folder = shutil.copytree(DEMO_FLUX.path, tmp_path / "folder")
    assert choose_model(str(file), base=str(folder)).text_tokens == demo.text_tokens
    assert choose_model(str(file), base="flux-dev").default_steps == 28
    assert choose_model(str(file), base="owner/flux").default_steps == 4  # nothing is known but the file
    save_file(tiny_qwen.transformer().state_dict(), tmp_path / "qwen.safetensors")
    with pytest.raises(BadInput, match="transformer of Qwen-Image, and demo is Flux: try --base Qwen/Qwen-Image"):
        choose_model(str(tmp_path / "qwen.safetensors"), base="demo")


def test_a_picture_from_a_file_is_that_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other_layouts.write_gguf(Path("same.gguf"), ORIGINAL, "BF16")
    write(Path("same.safetensors"), {f"model.diffusion_model.{name}": weight for name, weight in ORIGINAL.items()})
    made = ("--res", "64", "--steps", "2", "--seed", "2", "--guidance", "2")
    for model in (("demo",), ("same.gguf", "--base", "demo"), ("same.safetensors", "--base", "demo")):
        assert grat("image", "a red fox", "--model", *model, *made, "--out", f"{model[0]}.png").code == 0
    pictures = [np.asarray(Image.open(f"{name}.png")) for name in ("demo", "same.gguf", "same.safetensors")]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


def test_a_video_from_a_gguf_file_is_that_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = tiny_wan.pipeline()
    pipe.save_pretrained("folder")
    other_layouts.write_gguf(Path("wan.gguf"), other_layouts.of_wan(pipe.transformer.state_dict()), "F32")
    asked = (
        "--res",
        "64x64",
        "--frames",
        "5",
        "--steps",
        "2",
        "--seed",
        "1",
        "--variant",
        "full",
        "--format",
        "frames",
    )
    for number, model in enumerate((("folder",), ("wan.gguf", "--base", "folder"))):
        result = grat("video", "a fox", "--model", *model, *asked, "--out", str(number))
        assert result.code == 0, result.err
    first, second = (sorted(Path(folder).glob("*.png")) for folder in ("0", "1"))
    assert len(first) == 5
    for one, other in zip(first, second, strict=True):
        assert np.abs(np.asarray(Image.open(one), np.int16) - np.asarray(Image.open(other), np.int16)).max() <= 1


def test_a_lora_is_no_transformer(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", {"transformer.x_embedder.lora_A.weight": torch.ones(4, 16)})
    with pytest.raises(ModelUnavailable, match="it is a LoRA, which goes with a model: give it as --lora"):
        load(file)


def test_other_parts_may_be_those_of_a_model_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "tuned.safetensors", WEIGHTS)
    by_name, by_folder = load(file, base="demo").pipe, load(file, base=str(DEMO_FLUX.path)).pipe
    assert_same(by_name.text_encoder_2.state_dict(), by_folder.text_encoder_2.state_dict())


def test_weights_of_another_file_are_not_gone_on_with(tmp_path: Path) -> None:
    files = load(write(tmp_path / "tuned.safetensors", WEIGHTS)).files
    begun = Run(seed=1, total=4, report={"model": {"revision": None, "weights": [file.as_dict() for file in files]}})
    begun.refuse_other_weights(None, files)
    weights = WEIGHTS | {"proj_out.bias": WEIGHTS["proj_out.bias"] + 1}
    others = load(write(tmp_path / "tuned.safetensors", weights)).files
    with pytest.raises(BadInput, match=r"begun with another tuned\.safetensors as transformer than is here"):
        begun.refuse_other_weights(None, others)


# ---- Offloading and casts


def small_pipeline(form: str, folder: Path) -> Any:
    pipe = tiny_flux.pipeline()
    if form == "cast":
        cast(pipe.transformer, "fp8", torch.float32)
        return pipe
    stock = pipe.transformer
    stock.save_config(folder / "transformer")
    other_layouts.write_gguf(folder / "tiny.gguf", stock.state_dict(), "Q8_0")
    tensors = read_weights(folder / "tiny.gguf", torch.float32, allow_pickle=False)
    pipe.transformer = transformer_of(type(stock), tensors, dict(stock.config), str(folder), torch.float32)
    return pipe


def picture(pipe: Any) -> torch.Tensor:
    with grat_cli.install(pipe, "demo-x", height=64, width=64):
        return pipe(
            **tiny_flux.prompt(),
            height=64,
            width=64,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images


@pytest.mark.parametrize("form", ["gguf", "cast"])
def test_weights_in_fewer_bits_are_offloaded_as_any_others(tmp_path: Path, form: str) -> None:
    wanted = picture(small_pipeline(form, tmp_path))
    for kind in ("model", "group"):
        pipe = small_pipeline(form, tmp_path)
        require_movable(pipe.transformer, "fp8" if form == "cast" else "none", kind, CPU)
        offload(pipe, kind, CPU)
        assert torch.equal(picture(pipe), wanted), kind
    pipe = small_pipeline(form, tmp_path)
    with pytest.raises(
        BadInput, match=r"--offload sequential: its hooks rebuild weights.* use --offload group or model"
    ):
        require_movable(pipe.transformer, "fp8" if form == "cast" else "none", "sequential", CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cast_computes_with_what_its_8_bits_are(family: str) -> None:
    """As if weights of these layers had been rounded to 8 bits once."""
    rounded, inputs = of_family(family)
    stock = of_family(family)[0]
    cast(stock, "fp8", torch.float32)
    assert stock.dtype == torch.float32
    casts = {name for name, weight in stock.named_parameters() if weight.dtype == E4M3}
    assert len(casts) > 0.3 * len(list(stock.named_parameters()))
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if name in casts:
                weight.copy_(weight.to(E4M3).float())
        torch.testing.assert_close(stock(**inputs)[0], rounded(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert all(weight.dtype == E4M3 for name, weight in stock.named_parameters() if name in casts)


def test_a_cast_run_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("image", "a red fox", "--model", "demo", "--res", "64", "--steps", "2", "--seed", "2", "--variant", "full")
    for number, how in enumerate(((), ("--cast", "fp8"))):
        assert grat(*asked, *how, "--out", f"{number}.png").code == 0
    told = json.loads(Path("1.json").read_text())["device"]
    assert (told["cast"], told["dtype"], told["quantize"]) == ("fp8", "float32", "none")
    pictures = [np.asarray(Image.open(f"{number}.png"), np.float32) for number in range(2)]
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 10
    says = "--cast fp8 with --quantize int8: both say in which form weights wait: leave one of them out"
    assert says in refusal(*asked, "--cast", "fp8", "--quantize", "int8")
    assert "--cast fp4: did you mean 'fp8'?" in refusal(*asked, "--cast", "fp4")
    other_layouts.write_gguf(Path("tuned.gguf"), WEIGHTS, "Q8_0")
    said = refusal(*asked[:2], "--model", "tuned.gguf", "--base", "demo", "--res", "64", "--cast", "fp8")
    assert "--cast fp8: the weights are quantized already, gguf: leave it out" in said


@pytest.mark.parametrize(
    ("by", "offload", "device", "says"),
    [
        ("bitsandbytes", "none", "cpu", "for CUDA devices, and the run is on cpu"),
        ("bitsandbytes", "group", "cuda", "bitsandbytes with --offload group: scales are beside them"),
        ("torchao", "sequential", "cuda", "weights quantized by torchao with --offload sequential"),
    ],
)
def test_what_is_quantized_is_moved_only_where_that_works(by: str, offload: str, device: Any, says: str) -> None:
    config = SimpleNamespace(quant_method=SimpleNamespace(value=by))
    part = SimpleNamespace(hf_quantizer=SimpleNamespace(quantization_config=config))
    with pytest.raises(BadInput, match=says):
        require_movable(part, "none", offload, torch.device(device))
    require_movable(part, "none", "model", torch.device("cuda"))
