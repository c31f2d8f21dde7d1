"""What `--lora` says, and what is refused before a model is loaded."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_flux
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import diffusers_layout, layers_of, write

from grat_cli.errors import BadInput, GratError, ModelUnavailable
from grat_cli.models import lora as module
from grat_cli.models.catalogue import choose_model
from grat_cli.models.lora import LARGEST_SCALE, files_of_loras, own_name, parse_lora, parse_loras, refuse_loras
from grat_cli.models.weights import Lora, Weights

# ---- What is typed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", Lora(source="a.safetensors")),
        ("a.safetensors@0.8", Lora(source="a.safetensors", scale=0.8)),
        ("a.safetensors@-1e-1", Lora(source="a.safetensors", scale=-0.1)),
        ("a.safetensors@.5", Lora(source="a.safetensors", scale=0.5)),
        ("a.safetensors@0", Lora(source="a.safetensors", scale=0.0)),
        ("odd@2", Lora(source="odd@2")),
        ("odd@2@0.5", Lora(source="odd@2", scale=0.5)),
        ("b:c@d.safetensors", Lora(source="b:c@d.safetensors")),
        ("high=a.safetensors@2", Lora(source="a.safetensors", scale=2.0, noise="high")),
        ("low=a.safetensors", Lora(source="a.safetensors", noise="low")),
        ("both=odd@2", Lora(source="odd@2", noise="both")),
        ("high=x", Lora(source="high=x")),
        ("high=high=x", Lora(source="high=x", noise="high")),
        ("owner/name", Lora(source="owner/name", kind="hub")),
        ("owner/name@0.5", Lora(source="owner/name", kind="hub", scale=0.5)),
        ("owner/name:sub/x@2", Lora(source="owner/name", kind="hub", weight_name="sub/x", scale=2.0)),
        ("low=owner/name:x", Lora(source="owner/name", kind="hub", weight_name="x", noise="low")),
        ("one", Lora(source="one/x.safetensors")),
        ("one@0.5", Lora(source="one/x.safetensors", scale=0.5)),
        ("two:b.safetensors@3", Lora(source="two/b.safetensors", scale=3.0)),
        ("t:w:b.safetensors", Lora(source="t:w/b.safetensors")),
    ],
)  # fmt: skip
def test_what_is_typed_is_read(text: str, expected: Lora, folder: Path) -> None:
    for name in ("a.safetensors", "odd@2", "b:c@d.safetensors", "high=x", "one/x.safetensors", "t:w/b.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    for name in ("a", "b"):
        (folder / "two").mkdir(exist_ok=True)
        (folder / "two" / f"{name}.safetensors").touch()
    assert parse_lora(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--lora is empty"),
        (" ", "--lora is empty"),
        ("a\0b", "--lora is empty"),
        ("high=", "--lora high=: expected a file or hub id behind it"),
        ("a.safetensors@nan", "a scale is a number from -100 to 100"),
        ("a.safetensors@-inf", "a scale is a number from -100 to 100"),
        ("a.safetensors@1e999", "a scale is a number from -100 to 100"),
        ("a.safetensors@101", "a scale is a number from -100 to 100"),
        ("a.safetensors@" + "9" * 120, "a scale is a number from -100 to 100"),
        ("a.safetensors@much", "'much' is no scale: expected a number such as 0.8"),
        ("a.safetensors@", "'' is no scale: expected a number such as 0.8"),
        ("b.safetensors", "there is no file b.safetensors"),
        ("b.safetensors@0.5", "there is no file b.safetensors"),
        ("b.ckpt", "there is no file b.ckpt"),
        ("x" * 5000, "there is no LoRA"),
        ("owner/name:", "expected the name of a file in the repository"),
        ("owner/name:../x", "expected the name of a file in the repository"),
        ("owner/name:/etc/x", "expected the name of a file in the repository"),
        ("two", "two holds a.safetensors, b.safetensors: name the one that is meant, such as two:NAME"),
        ("none", "none holds no .safetensors file"),
        ("two:", "there is no file '' in two"),
        ("two:c.safetensors", "there is no file 'c.safetensors' in two"),
        ("two:../a.safetensors", "there is no file"),
        ("~nobody-of-that-name/a", "there is no LoRA"),
        ("nothing", "there is no LoRA nothing: give a .safetensors file, or a hub id such as owner/name"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(text: str, words: str, folder: Path) -> None:
    for name in ("a.safetensors", "two/a.safetensors", "two/b.safetensors", "none/readme"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with pytest.raises((BadInput, ModelUnavailable)) as caught:
        parse_lora(text)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


_FRAGMENTS = st.sampled_from(
    ["@", ":", "=", "/", "a", "high=", "both=", "~", ".safetensors", "0.5", "-1", "owner/name"]
)


@given(st.one_of(st.text(max_size=40), st.lists(_FRAGMENTS, max_size=8).map("".join)))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_read_or_refused(folder: Path, text: str) -> None:
    with contextlib.suppress(GratError):
        lora = parse_lora(text)
        assert abs(lora.scale) <= LARGEST_SCALE
        assert lora.kind == "hub" or Path(lora.source).is_file()


@given(
    name=st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
        lambda name: name.strip() and name not in (".", "..") and name[0] != "~" and len(os.fsencode(name)) < 200
    ),
    scale=st.floats(-LARGEST_SCALE, LARGEST_SCALE),
    word=st.sampled_from(["", "high=", "low=", "both="]),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_of_any_name_that_is_there_is_that_file(folder: Path, name: str, scale: float, word: str) -> None:
    file = folder / name
    file.touch()
    try:
        assert parse_lora(str(file)) == Lora(source=str(file))
        read = parse_lora(f"{word}{file}@{scale!r}")
        assert (read.source, read.scale) == (str(file), scale)
        assert read.noise == (word.removesuffix("=") or "all")
    finally:
        file.unlink()


def test_loras_are_told_apart_by_their_names(folder: Path) -> None:
    for name in ("a/x.safetensors", "b/x.safetensors"):
        (folder / name).parent.mkdir()
        (folder / name).touch()
    with pytest.raises(BadInput, match=r"two LoRAs are called x\.safetensors, and reports could not tell"):
        parse_loras(["a/x.safetensors", "b/x.safetensors"])
    with pytest.raises(BadInput, match=r"x\.safetensors is given twice: give it once, with both scales added up"):
        parse_loras(["a/x.safetensors@0.5", "a/x.safetensors@0.2"])
    with pytest.raises(BadInput, match="is given twice"):
        parse_loras(["both=a/x.safetensors", "low=a/x.safetensors"])
    with pytest.raises(BadInput, match="33 LoRAs are more than the 32 that are taken"):
        parse_loras([f"owner/name{number}" for number in range(33)])
    assert len(parse_loras(["high=a/x.safetensors", "low=a/x.safetensors@0.5"])) == 2
    loras = parse_loras(["owner/one", "owner/two", "owner/two:a.safetensors"])
    assert [own_name(lora) for lora in loras] == ["owner/one", "owner/two", "owner/two:a.safetensors"]


# ---- Before a model is loaded


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return diffusers_layout(layers_of(tiny_flux.transformer(), "attn"))


def refused(model: str, *loras: Lora, **weights: Any) -> str:
    video = model.startswith(("wan", "hunyuan"))
    with pytest.raises((BadInput, ModelUnavailable)) as caught:
        refuse_loras(choose_model(model, "video" if video else "image"), Weights(loras=loras, **weights))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_files_are_is_seen_before_a_model_is_loaded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    whole = write(tmp_path / "whole.safetensors", tensors).read_bytes()
    contents = {
        "is damaged or no .safetensors file": whole[: len(whole) // 2],
        "(it is empty)": b"",
        "is a pointer of Git LFS and not the file itself": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "is a pickle, which may run code": pickle.dumps({"a": [1.0] * 100}),
        "is a pickle": b"PK\x03\x04" + bytes(200),
        "no .safetensors file": b"GGUF" + bytes(100),
    }
    for words, content in contents.items():
        file = tmp_path / "a.safetensors"
        file.write_bytes(content)
        assert words in refused("flux-dev", Lora(source=str(file)))
    file.unlink()
    assert f"a.safetensors is not there any more: {file} is no file" in refused("flux-dev", Lora(source=str(file)))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["transformer.x.weight"], "holds no LoRA: none of its 1 weights is one; a whole model is given with --model"),
        (["transformer.x.lora_A.weight", "transformer.x.dora_scale"], "is a DoRA"),
        (["transformer.x.lora_magnitude_vector"], "is a DoRA"),
        (["lora_unet_x.lokr_w1"], "is a LoKr, which is not supported"),
        (["lora_unet_x.hada_w1_a"], "is a LoHa, which is not supported"),
        (["diffusion_model.blocks.99999999999.self_attn.q.lora_A.weight"], "names a layer that no model has"),
        (["transformer.x.lora_A.weight\x1b[2J"], ""),
    ],
)
def test_what_is_no_lora_is_refused(names: list[str], words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", dict.fromkeys(names, torch.zeros(2, 2)))
    if words:
        assert words in refused("flux-dev", Lora(source=str(file)))


def test_models_options_and_loras_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Lora(source=str(write(tmp_path / "a.safetensors", tensors)))
    refuse_loras(choose_model("flux-dev"), Weights(loras=(lora,), fuse_loras=True))
    refuse_loras(choose_model("flux-dev"), Weights())
    assert "--fuse-lora says how LoRAs are added, and there is none" in refused("flux-dev", fuse_loras=True)
    assert "--fuse-lora with --quantize int8" in refused("flux-dev", lora, fuse_loras=True, quantize="int8")
    assert "diffusers reads no LoRAs for HunyuanVideo-1.5" in refused("hunyuan15-480p", lora)
    two = refused("wan2.2-14b", lora)
    assert "wan2.2-14b has two transformers: say which one the LoRA is for, --lora high=a.safetensors" in two
    high = Lora(source=lora.source, noise="high")
    assert "flux-dev has one transformer: leave high= out" in refused("flux-dev", high)
    of_text = write(tmp_path / "b.safetensors", tensors | {"lora_te1_x.lora_down.weight": torch.zeros(2, 2)})
    refuse_loras(choose_model("flux-dev"), Weights(loras=(Lora(source=str(of_text)),)))
    assert "b.safetensors is also for a text encoder (1 weights" in refused("hunyuan", Lora(source=str(of_text)))
    monkeypatch.setattr(module, "installed", lambda _: False)
    assert refused("flux-dev", lora) == "--lora needs peft, which is not installed: pip install 'grat-cli[lora]'"


# ---- From the hub


class Hub:
    """The hub as a LoRA's repository is seen in it: files in a folder, which may be out of reach."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.folder, self.online, self.cached = folder, True, True
        for name in ("model_info", "snapshot_download", "hf_hub_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def model_info(self, hub_id: str) -> Any:
        if not self.online:
            raise ConnectionError("Name or service not known")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names()])

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def snapshot_download(self, hub_id: str, *, local_files_only: bool, allow_patterns: list[str]) -> str:
        assert local_files_only
        if not self.cached:
            raise FileNotFoundError("no snapshot folder")
        return str(self.folder)

    def hf_hub_download(self, hub_id: str, name: str, *, local_files_only: bool) -> str:
        assert local_files_only != self.online
        if name not in self.names():
            from huggingface_hub.errors import RemoteEntryNotFoundError

            response: Any = SimpleNamespace(headers={}, status_code=404, request=None)
            raise RemoteEntryNotFoundError("404", response=response)
        return str(self.folder / name)


def test_a_lora_of_the_hub_is_the_named_one_or_the_only_one(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, flux = Hub(tmp_path, monkeypatch), choose_model("flux-dev")

    def file(text: str) -> Path:
        (found,) = files_of_loras(flux, Weights(loras=(parse_lora(text),)))
        return found

    one = write(tmp_path / "one.safetensors", tensors)
    (tmp_path / "README.md").touch()
    for hub.online in (True, False):
        assert file("owner/name@0.5") == file("owner/name:one.safetensors") == one
    hub.online = True
    with pytest.raises(ModelUnavailable, match=r"owner/name has no file two\.safetensors: check the name behind"):
        file("owner/name:two.safetensors")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "deep.safetensors", tensors)
    assert file("owner/name") == one
    write(tmp_path / "two.safetensors", tensors)
    with pytest.raises(
        ModelUnavailable, match=r"has 2 \.safetensors files \(one\.safetensors, two\.safetensors\): name"
    ):
        file("owner/name")
    usual = write(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    assert file("owner/name") == usual
    hub.online = hub.cached = False
    with pytest.raises(ModelUnavailable) as caught:
        file("owner/name")
    assert str(caught.value) == (
        "the LoRA owner/name is not in the local cache and cannot be downloaded (Name or service not known): "
        "go online, or give a local file"
    )
