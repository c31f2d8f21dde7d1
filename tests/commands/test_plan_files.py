"""`grat plan` of files and of models on the hub: by their headers, before anything large is read or downloaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import other_layouts
import pytest
import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_qwen
import tiny_wan
import torch
from command_line import grat, refusal
from safetensors.torch import load_file, save_file

from grat_cli.demo import DEMO_FLUX
from grat_cli.estimates.components import components_of
from grat_cli.estimates.memory import Execution, component_weights
from grat_cli.families import FAMILIES, family_of
from grat_cli.files.weight_headers import read_header
from grat_cli.models import hub_metadata
from grat_cli.models.catalogue import choose_model

GIB = 1 << 30
WEIGHTS = load_file(DEMO_FLUX.path / "transformer" / "diffusion_pytorch_model.safetensors")
LAYERS = len({name.rsplit(".blocks.")[0].split(".")[0] + name.split(".")[1] for name in WEIGHTS if "blocks." in name})
ORIGINAL = other_layouts.of_black_forest_labs(WEIGHTS)
TINY = {"flux": tiny_flux, "flux2": tiny_flux2, "qwen": tiny_qwen, "hunyuan": tiny_hunyuan, "wan": tiny_wan}


@pytest.mark.parametrize("layout", [WEIGHTS, ORIGINAL], ids=["of diffusers", "of Black Forest Labs"])
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_is_planned_by_its_header(tmp_path: Path, layout: dict[str, torch.Tensor], kind: str) -> None:
    file = tmp_path / f"tuned.{kind}"
    if kind == "gguf":
        other_layouts.write_gguf(file, {f"model.diffusion_model.{name}": w for name, w in layout.items()}, "Q8_0")
    else:
        save_file(layout, file)
    result = grat("plan", "--model", file, "--res", "512", "--gpu", "4090", "--json")
    assert result.code == 0, result.err
    told = result.data
    assert (told["layers"], told["file"]["format"]) == (LAYERS, kind)
    assert told["file"]["weights"] == sum(weight.numel() for weight in WEIGHTS.values())
    assert next(iter(told["file"]["types"])) == ("Q8_0" if kind == "gguf" else "BF16")
    choice = choose_model(str(file))
    shape = components_of(choice).transformer
    assert (shape.heads, shape.head_dim, shape.parameters) == (3, 64, told["file"]["weights"])
    weights = component_weights(components_of(choice), Execution())["transformer"]
    assert weights == (sum(told["file"]["types"].values()) if kind == "gguf" else 2 * told["file"]["weights"])
    shown = grat("plan", "--model", file, "--res", "512", "--gpu", "4090").out
    assert f"in tuned.{kind}: {'Q8_0' if kind == 'gguf' else 'BF16'}" in shown


def test_planning_a_file_loads_no_torch(tmp_path: Path) -> None:
    other_layouts.write_gguf(tmp_path / "tuned.gguf", ORIGINAL, "Q8_0")
    code = (
        "import sys; from grat_cli.app import run; "
        f"assert run(['plan', '--model', {str(tmp_path / 'tuned.gguf')!r}, '--gpu', '4090', '--quiet']) == 0; "
        "assert not {'torch', 'gguf', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("family", TINY)
def test_a_file_tells_its_family_and_its_shape_by_its_tensors(tmp_path: Path, family: str) -> None:
    # The norms of Wan do not tell how wide a head is, which is 128 in all its models.
    stock = TINY[family].transformer(**({"attention_head_dim": 128} if family == "wan" else {}))
    save_file(stock.state_dict(), tmp_path / "unnamed.safetensors")
    medium: Any = FAMILIES[family].medium
    choice = choose_model(str(tmp_path / "unnamed.safetensors"), medium)
    assert choice.family == family
    config = family_of(choice).transformer_config(choice)
    told = {name: stock.config[name] for name in config if name in ("num_layers", "num_single_layers")}
    told |= {"width": stock.config["num_attention_heads"] * stock.config["attention_head_dim"]}
    found = {**config, "width": config["num_attention_heads"] * config["attention_head_dim"]}
    assert {name: found[name] for name in told} == told
    other = "image" if medium == "video" else "video"
    said = refusal(other, "a fox", "--model", tmp_path / "unnamed.safetensors", "--base", "demo")
    assert f"makes {medium}s: use it with grat {medium}" in said


@pytest.mark.parametrize("name", ["wan2.1-14b", "hunyuan", "qwen-image", "flux-dev", "flux-schnell", "flux2-dev"])
def test_headers_of_whole_models_give_their_published_shapes(tmp_path: Path, name: str) -> None:
    """A header as of the full model, with no numbers behind it but a hole in the file."""
    import diffusers
    from accelerate import init_empty_weights

    known = next(model for family in FAMILIES.values() for model in family.models if model.name == name)
    family = family_of(known)
    with init_empty_weights():
        whole = getattr(diffusers, family.transformer).from_config(family.transformer_config(known))
    header, place = {}, 0
    for key, weight in whole.state_dict().items():
        header[key] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [place, place + 2 * weight.numel()],
        }
        place += 2 * weight.numel()
    content = json.dumps(header).encode()
    file = tmp_path / "whole.safetensors"
    with open(file, "wb") as out:
        out.write(len(content).to_bytes(8, "little") + content)
        out.truncate(8 + len(content) + place)
    choice = choose_model(str(file), known.medium)
    assert components_of(choice).transformer.parameters == read_header(file).numbers == place // 2
    assert choice.default_guidance == known.default_guidance


def test_files_that_cannot_be_planned_say_why(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "tuned.pt")
    said = refusal("plan", "--model", tmp_path / "tuned.pt", code=3)
    assert "it is a pickle, of which nothing is known before all of it is read" in said
    save_file({"shared.weight": torch.ones(3)}, tmp_path / "t5.safetensors")
    assert "are not those of a transformer of Flux" in refusal("plan", "--model", tmp_path / "t5.safetensors", code=3)
    half = {name: weight for name, weight in WEIGHTS.items() if "single_transformer_blocks.1" not in name}
    save_file(half, tmp_path / "half.safetensors")
    said = refusal("plan", "--model", tmp_path / "half.safetensors", code=3)
    assert "weights, and a transformer of Flux of its shape has 3,795,088" in said
    other_layouts.write_gguf(tmp_path / "tuned.gguf", WEIGHTS, "Q8_0")
    for how in (("--cast", "fp8"), ("--quantize", "int8")):
        said = refusal("plan", "--model", tmp_path / "tuned.gguf", "--gpu", "4090", *how)
        assert "tuned.gguf is quantized already: leave out --quantize and --cast" in said


def test_a_cast_takes_a_byte_of_what_diffusers_casts() -> None:
    """That is all matrices but those of norms, which are a quarter of Flux; see the classes' own patterns."""
    shares = {"flux-dev": 0.7271, "hunyuan": 0.7093, "wan2.1-14b": 0.9835, "qwen-image": 0.9991, "flux2-dev": 0.9976}
    for name, share in shares.items():
        medium: Any = "video" if name in ("hunyuan", "wan2.1-14b") else "image"
        components = components_of(choose_model(name, medium))
        plain = component_weights(components, Execution())["transformer"]
        cast = component_weights(components, Execution(cast="fp8"))["transformer"]
        assert 1 - cast / plain == pytest.approx(share / 2, abs=0.012), name
    for how in ((), ("--cast", "fp8")):
        result = grat("plan", "--model", "flux-dev", "--gpu", "4090", "--json", *how)
        denoise = next(phase for phase in json.loads(result.out)["phases"] if phase["phase"] == "denoise")
        assert denoise["weights_bytes"] / GIB == pytest.approx(23.5 if how else 31.5, abs=0.6)


# ---- The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one pipeline, `owner/name`; what was asked for."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 8)
    asked: list[str] = []
    files = [path for path in sorted(DEMO_FLUX.path.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(DEMO_FLUX.path)): path for path in files}

    def model_info(hub_id: str, **options: Any) -> Any:
        assert hub_id == "owner/name"
        listed = [SimpleNamespace(rfilename=name, size=path.stat().st_size) for name, path in names.items()]
        return SimpleNamespace(siblings=listed, sha="0" * 40)

    def download(hub_id: str, name: str, revision: str) -> str:
        asked.append(name)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(names[name], snapshot / name))

    def metadata(self: Any, hub_id: str, name: str, revision: str) -> Any:
        asked.append(name)
        return SimpleNamespace(parameter_count={"BF16": read_header(names[name]).numbers})

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", metadata)
    return asked


def test_a_model_on_the_hub_is_planned_by_what_the_hub_tells(hub: list[str]) -> None:
    result = grat("plan", "--model", "owner/name", "--gpu", "4090", "--res", "256", "--json")
    assert result.code == 0, result.err
    assert "shapes and weights of owner/name are those that the hub tells" in result.err
    there = grat("plan", "--model", DEMO_FLUX.path, "--gpu", "4090", "--res", "256", "--json")
    assert {**result.data, "model": ""} == {**there.data, "model": ""}
    assert {name.rpartition("/")[2] for name in hub} == {
        *("model_index.json", "config.json", "model.safetensors", "diffusion_pytorch_model.safetensors")
    }


def test_without_a_connection_it_is_planned_by_its_nearest_kin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    result = grat("plan", "--model", "owner/name", "--gpu", "h200", "--json")
    assert result.code == 0
    assert (
        "the hub tells nothing of owner/name (no route to the hub): shapes are those of its nearest kin" in result.err
    )
    kin = grat("plan", "--model", "flux-dev", "--gpu", "h200", "--json")
    for found, wanted in zip(result.data["phases"], kin.data["phases"], strict=True):
        assert found["peak_bytes"] == wanted["peak_bytes"]


def test_models_that_go_by_names_of_their_own_are_planned_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_metadata, "ask_hub", lambda *arguments: pytest.fail("asked"))
    assert grat("plan", "--model", "flux-dev", "--gpu", "h200", "--quiet").code == 0
