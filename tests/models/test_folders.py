"""Folders as people have them: variants, shards, pickles, pointers, quantized weights; and what is not supported."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import diffusers
import gguf
import other_layouts
import pytest
import torch
from command_line import grat, refusal
from safetensors.torch import load_file, save_file

from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import ModelUnavailable
from grat_cli.families import FAMILIES
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_model
from grat_cli.models.weight_files import files_of_part, variant_of
from grat_cli.models.weights import Weights

CPU = torch.device("cpu")
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
PARTS = ("text_encoder", "text_encoder_2", "transformer", "vae")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
STOCK = {part: load_file(next((DEMO_FLUX.path / part).glob("*.safetensors"))) for part in PARTS}
T5 = STOCK["text_encoder_2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_FLUX.path, tmp_path / "model"))


def load(name: str | Path, **how: Any) -> LoadedModel:
    return load_model(choose_model(str(name)), device=CPU, dtype=torch.float32, weights=Weights(**how))


def stored(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def assert_stock(pipe: Any) -> None:
    for part in PARTS:
        found = getattr(pipe, part).state_dict()
        for name, weight in STOCK[part].items():
            assert torch.equal(found[name], weight.float()), (part, name)


def write_shards(folder: Path, part: str, name: str, index: str) -> None:
    """The weights of a part in two files, with an index that says which is where."""
    stored(folder, part).unlink()
    stem, places = STEMS.get(part, "model"), {}
    for number in (1, 2):
        file = name.format(stem=stem, number=number)
        some = dict(list(STOCK[part].items())[number - 1 :: 2])
        save_file(some, folder / part / file, metadata={"format": "pt"})
        places |= dict.fromkeys(some, file)
    (folder / part / index.format(stem=stem)).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
def test_a_folder_of_one_variant_alone_is_read(folder: Path, variant: str) -> None:
    for part in PARTS:
        stored(folder, part).rename(folder / part / f"{STEMS.get(part, 'model')}.{variant}.safetensors")
    loaded = load(folder)
    assert_stock(loaded.pipe)
    assert [file.name.split(".")[1] for file in loaded.files] == [variant] * 4


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("{stem}-0000{number}-of-00002.safetensors", "{stem}.safetensors.index.json"),
        ("{stem}.fp16-0000{number}-of-00002.safetensors", "{stem}.safetensors.index.fp16.json"),
        ("{stem}-0000{number}-of-00002.fp16.safetensors", "{stem}.safetensors.index.fp16.json"),
        ("part_{number}.safetensors", "{stem}.safetensors.index.json"),
    ],
)
def test_shards_are_read_by_whichever_names_they_have(folder: Path, name: str, index: str) -> None:
    for part in ("transformer", "text_encoder_2"):
        write_shards(folder, part, name, index)
    loaded = load(folder)
    assert_stock(loaded.pipe)
    names = {file.name for file in loaded.files if file.part == "transformer"}
    assert names == {name.format(stem="diffusion_pytorch_model", number=number) for number in (1, 2)}


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_of_a_variant_lie_beside_their_index_too(folder: Path, variant: str) -> None:
    write_shards(
        folder, "transformer", "{stem}-{number}-of-2.safetensors", "{stem}.safetensors.index" + variant + ".json"
    )
    place = next((folder / "transformer").glob("*.index*"))
    place.write_text(json.dumps({"weight_map": dict.fromkeys(STOCK["transformer"], "../vae/away.safetensors")}))
    with pytest.raises(ModelUnavailable, match=r"index.*json asks for \.\./vae/away\.safetensors, no \.safe"):
        load(folder)


def test_the_plain_files_come_before_variants_and_safetensors_before_pickles(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"none")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"none")
    found = variant_of(folder / "transformer")
    assert (found.variant, found.is_pickle) == (None, False)
    assert [file.name for file in files_of_part(folder / "transformer")] == ["diffusion_pytorch_model.safetensors"]
    assert_stock(load(folder, allow_pickle=True).pipe)


def test_pickles_are_refused_with_how_to_convert_them_unless_they_are_asked_for(folder: Path) -> None:
    for part in PARTS:
        stored(folder, part).unlink()
        name = "diffusion_pytorch_model" if part in STEMS else "pytorch_model"
        torch.save(STOCK[part], folder / part / f"{name}.bin")
    with pytest.raises(
        ModelUnavailable, match=r"a \.bin file, is a pickle, which can run.*convert.*\n.*--allow-pickle"
    ):
        load(folder)
    loaded = load(folder, allow_pickle=True)
    assert_stock(loaded.pipe)
    assert [(file.types, file.fingerprint.whole) for file in loaded.files] == [({}, True)] * 4


@pytest.mark.parametrize(
    ("suffix", "inside"), [(".bin", None), (".pt", "state_dict"), (".pth", "model"), (".CKPT", None)]
)
def test_a_file_that_is_a_pickle_is_read_where_that_is_asked_for(
    tmp_path: Path, suffix: str, inside: str | None
) -> None:
    weights: Any = STOCK["transformer"]
    torch.save(weights if inside is None else {inside: weights, "epoch": 3}, tmp_path / f"tuned{suffix}")
    with pytest.raises(ModelUnavailable, match=f"tuned{suffix} is a pickle.*\n.*--allow-pickle"):
        load(tmp_path / f"tuned{suffix}", base="demo")
    assert_stock(load(tmp_path / f"tuned{suffix}", base="demo", allow_pickle=True).pipe)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "it holds no tensors by name"),
        ({}, "it holds no tensors by name"),
        ({"a": 3}, "a is no tensor"),
        ({1: torch.ones(1)}, "1 is no tensor"),
        ({"a": torch.eye(3).to_sparse()}, "a is no plain tensor"),
        ({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, "claims to hold more numbers than it does"),
        ({"a": Path("x")}, "is damaged, or holds more than tensors"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path: Path, content: Any, says: str) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ModelUnavailable, match=f"odd.pt is damaged, incomplete or not Flux's .*{says}"):
        load(tmp_path / "odd.pt", base="demo", allow_pickle=True)


@pytest.mark.parametrize(
    "place", ["transformer/{}", "vae/{}", "tokenizer_2/tokenizer.json", "text_encoder/config.json"]
)
def test_pointers_of_git_lfs_are_told(folder: Path, place: str) -> None:
    path = folder / place.format("diffusion_pytorch_model.safetensors")
    path.write_text(POINTER)
    with pytest.raises(ModelUnavailable, match=f"{path.name} is a pointer of Git LFS\nrun `git lfs pull`"):
        load(folder)


def test_a_file_that_is_a_pointer_is_told(tmp_path: Path) -> None:
    (tmp_path / "tuned.gguf").write_text(POINTER)
    with pytest.raises(ModelUnavailable, match="it is a pointer of Git LFS, not the weights: run `git lfs pull`"):
        load(tmp_path / "tuned.gguf", base="demo")


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_quantized_folders_need_the_package_that_quantized_them(folder: Path, package: str) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": package, "load_in_4bit": True}}
    path.write_text(json.dumps(config))
    said = refusal("image", "a fox", "--model", folder, "--res", "64", code=3)
    assert said == f"transformer of {folder} is quantized by {package}, which is not installed: pip install {package}"


def test_bitsandbytes_takes_a_cuda_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "transformer" / "config.json"
    quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantization))
    monkeypatch.setattr("grat_cli.models.parts.installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelUnavailable, match="which takes a CUDA device, and there is none here"):
        load(folder)


@pytest.mark.parametrize("channels", [96, 32], ids=["fill", "control"])
def test_a_folder_with_the_channels_of_another_pipeline_asks_for_its_pictures(folder: Path, channels: int) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": channels, "out_channels": 16}))
    weights = dict(STOCK["transformer"])
    weights["x_embedder.weight"] = torch.cat([weights["x_embedder.weight"]] * (channels // 16), 1)
    save_file(weights, stored(folder, "transformer"), metadata={"format": "pt"})
    said = refusal("image", "a fox", "--model", folder, "--res", "64")
    assert ("needs --init-image FILE and --mask FILE" if channels == 96 else "needs --control FILE") in said


def supported_transformers() -> set[str]:
    return {family.transformer for family in FAMILIES.values()}


def test_every_other_pipeline_of_a_supported_transformer_is_refused_with_its_reason(folder: Path) -> None:
    known = {name for family in FAMILIES.values() for name in (*family.pipelines, *family.refused, *family.not_driven)}
    index = folder / "model_index.json"
    for name in dir(diffusers):
        if not name.endswith("Pipeline") or "Modular" in name:
            continue
        kind = inspect.signature(getattr(diffusers, name).__init__).parameters.get("transformer")
        kinds = (
            {str(getattr(one, "__name__", one)) for one in (kind.annotation, *get_args(kind.annotation))}
            if kind
            else ()
        )
        if not supported_transformers().isdisjoint(kinds):
            assert name in known, name
    for family in FAMILIES.values():
        for name, reason in {**family.refused, **family.not_driven}.items():
            index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
            if family.medium == "image":
                said = refusal("image", "a fox", "--model", folder, code=3)
                assert f"is a {name}, which is not supported: {reason}" in said


def test_nothing_of_what_libraries_print_while_failing_is_shown(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stored(folder, "transformer").unlink()
    assert grat("image", "a fox", "--model", folder, "--res", "64").code == 3
    stored(folder, "text_encoder_2").write_bytes(b"\x10" + bytes(40))
    assert grat("image", "a fox", "--model", folder, "--res", "64").code == 3
    save_file({name: torch.zeros(3) for name in T5}, stored(folder, "text_encoder_2"), metadata={"format": "pt"})
    assert grat("image", "a fox", "--model", folder, "--res", "64").code == 3
    assert capfd.readouterr() == ("", "")


# ---- A text encoder of its own


NAMES_OF_GGUF = (
    ("encoder.block.", "enc.blk."),
    (".layer.0.SelfAttention.relative_attention_bias", ".attn_rel_b"),
    (".layer.0.SelfAttention.", ".attn_"),
    (".layer.0.layer_norm", ".attn_norm"),
    (".layer.1.DenseReluDense.wi_0", ".ffn_gate"),
    (".layer.1.DenseReluDense.wi_1", ".ffn_up"),
    (".layer.1.DenseReluDense.wo", ".ffn_down"),
    (".layer.1.layer_norm", ".ffn_norm"),
    ("encoder.final_layer_norm", "enc.output_norm"),
    ("shared.", "token_embd."),
)


def of_llama_cpp(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of T5 under the names of llama.cpp (gguf-py, `MODEL_ARCH.T5ENCODER`)."""
    found = {}
    for name, weight in weights.items():
        for theirs, ours in NAMES_OF_GGUF:
            name = name.replace(theirs, ours)
        found[name] = weight
    return found


def write_encoder(path: Path, form: str) -> None:
    if form == "plain":
        save_file(T5, path)
    elif form == "scaled fp8":
        save_file(other_layouts.scaled_fp8(T5), path)
    elif form == "pickle":
        torch.save(T5, path)
    else:
        other_layouts.write_gguf(path, of_llama_cpp(T5), form, architecture="t5encoder")


@pytest.mark.parametrize("form", ["plain", "scaled fp8", "pickle", "F32", "Q8_0"])
def test_a_file_takes_the_place_of_the_large_text_encoder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    file = tmp_path / ("t5.gguf" if form in ("F32", "Q8_0") else "t5.safetensors")
    write_encoder(file, form)
    loaded = load("demo", text_encoder=str(file), allow_pickle=form == "pickle")
    assert capfd.readouterr() == ("", "")
    assert [each.name for each in loaded.files if each.part == "text_encoder_2"] == [file.name]
    found = loaded.pipe.text_encoder_2.state_dict()
    for name, weight in T5.items():
        gap = float((found[name] - weight.float()).abs().max() / weight.float().abs().max())
        assert gap <= {"scaled fp8": 2**-4, "Q8_0": 1 / 127}.get(form, 0), name


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_one(path: Path) -> None:
    save_file({name: weight for name, weight in T5.items() if "block.1.layer.1.layer_norm" not in name}, path)


def of_other_shapes(path: Path) -> None:
    save_file({name: torch.ones(3) for name in T5}, path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (half, "t5.safetensors is damaged, incomplete"),
        (without_one, "it lacks 1 weights, such as encoder.block.1.layer.1.layer_norm.weight"),
        (of_other_shapes, "of its weights are of other shapes than its configuration says"),
    ],
)
def test_a_text_encoder_that_is_none_is_told(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    write_encoder(tmp_path / "t5.safetensors", "plain")
    damage(tmp_path / "t5.safetensors")
    with pytest.raises(ModelUnavailable, match=says):
        load("demo", text_encoder=str(tmp_path / "t5.safetensors"))


def test_gguf_files_of_other_encoders_are_refused(tmp_path: Path) -> None:
    other_layouts.write_gguf(tmp_path / "llama.gguf", {"a.weight": torch.ones(2, 32)}, "Q8_0", architecture="llama")
    with pytest.raises(ModelUnavailable, match="of text encoders only T5 is read from GGUF, and this one is a T5"):
        load("demo", text_encoder=str(tmp_path / "llama.gguf"))


def test_a_missing_text_encoder_is_told() -> None:
    said = refusal("image", "a fox", "--text-encoder", "nowhere.safetensors")
    assert said == "--text-encoder nowhere.safetensors: there is no such file"


def test_types_of_gguf_that_are_not_read_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "flux")
    writer.add_tensor("a.weight", torch.zeros(4, 66).byte().numpy(), raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelUnavailable, match=r"a\.weight is of type IQ2_XXS, and diffusers reads .*Q8_0"):
        load(tmp_path / "odd.gguf", base="demo")


def test_gguf_files_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_layouts.write_gguf(tmp_path / "tuned.gguf", STOCK["transformer"], "Q8_0")
    monkeypatch.setattr("grat_cli.models.single_file.installed", lambda package: False)
    with pytest.raises(ModelUnavailable, match=r"for which a package is missing: pip install grat-cli\[gguf\]"):
        load(tmp_path / "tuned.gguf", base="demo")
