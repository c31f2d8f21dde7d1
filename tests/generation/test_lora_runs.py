"""Runs with LoRAs: what they leave out of their records and what these say, and how they are gone on with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from command_line import grat, refusal
from lora_files import diffusers_layout, layers_of, write
from PIL import Image
from small_runs import Small, broken_off, generate, tamper

from grat_cli.errors import BadInput
from grat_cli.generation.checkpoint import read_run
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import load_model
from grat_cli.models.weights import Lora, Weights

FOX = ("image", "a red fox", "--model", "demo", "--res", "64", "--steps", "2", "--seed", "3")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Of a LoRA of the demo."""
    demo = load_model(choose_model("demo"), device=torch.device("cpu"), dtype=torch.float32).pipe
    return diffusers_layout(layers_of(demo.transformer, "attn", "proj_mlp"), strength=0.2)


@pytest.fixture
def lora(tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a folder of its own, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    return write(tmp_path / "secret" / "style.safetensors", tensors)


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("small", ["picture", "cascade"], indirect=True)
def test_a_run_that_is_gone_on_with_equals_an_unbroken_one(
    small: Small, written: dict[str, np.ndarray], lora: Path, tmp_path: Path
) -> None:
    weights = Weights(loras=(Lora(source=str(lora), scale=0.5),))
    asked = replace(small, request=replace(small.request, weights=weights))
    generate(asked.of(tmp_path / "whole"))
    plain = replace(asked, request=replace(asked.request, weights=Weights()))
    generate(plain.of(tmp_path / "plain"))
    assert (written["whole"] != written["plain"]).any()
    kept = broken_off(asked.of(tmp_path / "a"), after=4)
    run, request = read_run(kept)
    assert request.weights == asked.request.weights
    (made,) = generate(request, begun=run)
    np.testing.assert_array_equal(written["a"], written["whole"])
    (told,) = made.report["model"]["loras"]
    content = lora.read_bytes()
    assert told == {
        "name": "style.safetensors",
        "scale": 0.5,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "fused": False,
        "noise": "all",
        "layers": 24,
        "left_out": 0,
    }


def test_a_run_is_not_gone_on_with_with_another_lora(
    tensors: dict[str, torch.Tensor], lora: Path, tmp_path: Path
) -> None:
    kind = small_runs.picture()
    weights = Weights(loras=(Lora(source=str(lora), scale=0.5),))
    kept = broken_off(kind.of(tmp_path / "a", weights=weights))
    run, request = read_run(kept)
    write(lora, {name: tensor * 2 for name, tensor in tensors.items()})
    with pytest.raises(BadInput, match=r"begun with another LoRA style\.safetensors than is here now"):
        generate(request, begun=run)
    lora.unlink()
    assert "style.safetensors is not there any more" in refusal("resume", kept, code=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "../x"}, "a file is given by no absolute path"),
        ({"scale": 1e9}, "weights.loras.0.scale"),
        ({"kind": "hub"}, "neither an absolute path nor a hub id"),
        ({"kind": "hub", "source": "owner/name", "weight_name": "../x"}, "neither an absolute path nor a hub id"),
        ({"noise": "loud"}, "weights.loras.0.noise"),
        ({"more": 1}, "weights.loras.0.more"),
    ],
)
def test_what_a_checkpoint_says_of_loras_is_held_to_what_may_be_typed(
    changes: dict[str, Any], words: str, lora: Path, tmp_path: Path
) -> None:
    kind = small_runs.picture()
    from grat_cli.generation.checkpoint import write_run

    request = kind.of(tmp_path / "a", weights=Weights(loras=(Lora(source=str(lora)),)))
    kept = write_run(small_runs.run_after(request, 2), request, request.outputs[0])
    told = {"source": str(lora), "kind": "file", "weight_name": None, "scale": 1.0, "noise": "all"}
    tamper(kept, request={"weights": {"loras": [told | changes]}})
    with pytest.raises(BadInput) as caught:
        read_run(kept)
    assert words in str(caught.value)


def test_pictures_and_reports_name_a_lora_and_no_folder(lora: Path) -> None:
    shown = grat(*FOX, "--lora", f"{lora}@0.5", "--out", "a.png")
    assert shown.code == 0, shown.err
    assert grat(*FOX, "--lora", f"{lora}@0.5", "--fuse-lora", "--out", "f.png").code == 0
    assert grat(*FOX, "--lora", f"{lora}@0", "--out", "z.png").code == 0
    assert grat(*FOX, "--out", "n.png").code == 0
    assert (pixels("a.png") != pixels("n.png")).any()
    np.testing.assert_array_equal(pixels("z.png"), pixels("n.png"))
    assert np.abs(pixels("f.png").astype(int) - pixels("a.png")).max() <= 1
    for name in ("a.json", "a.png", "f.json"):
        told = grat("info", name, "--json").data
        assert told["model"]["loras"][0]["name"] == "style.safetensors"
        assert told["model"]["loras"][0]["fused"] == (name == "f.json")
        told.pop("command")  # as typed
        assert "secret" not in json.dumps(told)
    assert grat("info", "n.json", "--json").data["model"]["loras"] == []
    assert "style.safetensors at 0.5 (sha256" in grat("info", "a.png").out


def test_latents_are_decoded_without_the_lora_that_made_them(lora: Path) -> None:
    assert grat(*FOX, "--lora", lora, "--save-latents", "--out", "a.png").code == 0
    lora.unlink()
    assert grat("decode", "a.latents.safetensors", "--out", "b.png").code == 0
    np.testing.assert_array_equal(pixels("a.png"), pixels("b.png"))
    assert grat("info", "b.json", "--json").data["model"]["loras"][0]["name"] == "style.safetensors"


def test_samples_of_a_batch_are_those_of_their_loras(lora: Path, tensors: dict[str, torch.Tensor]) -> None:
    Path("p.jsonl").write_text(json.dumps({"prompt": "a red fox", "tag": "colors", "include": []}))
    command = ("batch", "p.jsonl", "--layout", "geneval", "--n", "1", "--model", "demo", "--res", "64", "--steps", "2")
    plain, with_lora = ((*command, "--out", out, "--json") for out in "ab")
    with_lora = (*with_lora, "--lora", f"{lora}@0.5")
    assert [grat(*one).data["skipped"] for one in (plain, plain, with_lora, with_lora)] == [0, 1, 0, 1]
    assert "was made with other options (LoRAs)" in refusal(*plain, "--lora", lora)
    assert "was made with other options (LoRAs)" in refusal(*with_lora[:-1], f"{lora}@0.4")
    write(lora, {name: tensor * 2 for name, tensor in tensors.items()})
    assert "was made with other options (LoRAs)" in refusal(*with_lora)


class _Seen(Exception):
    """Ends a command where it loads its model."""


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("bench.whole_runs", ("bench", "--level", "image", "--model", "demo")),
        ("bench.highres_level", ("bench", "--level", "highres", "--model", "demo", "--res", "512")),
        ("fidelity.tuning", ("tune", "1", "--model", "demo", "--target-density", "0.5")),
        ("models.loading", ("attend", "a red fox", "--model", "demo")),
        ("generation.run", ("image", "a red fox", "--model", "demo")),
        ("generation.run", ("video", "waves at night", "--model", "demo")),
    ],
)
def test_every_command_that_runs_a_model_loads_it_with_its_loras(
    module: str, command: tuple[str, ...], lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def load(*_: Any, weights: Weights, **__: Any) -> Any:
        seen.append(weights)
        raise _Seen

    monkeypatch.setattr(f"grat_cli.{module}.load_model", load)
    monkeypatch.setattr("grat_cli.estimates.time.planned_seconds", lambda *_: 2.0)
    grat(*command, "--lora", f"{lora}@0.5", "--fuse-lora")
    assert seen == [Weights(loras=(Lora(source=str(lora), scale=0.5),), fuse_loras=True)]


def test_plans_count_the_weights_of_loras(lora: Path, tensors: dict[str, torch.Tensor]) -> None:
    def planned(*options: object) -> float:
        phases = grat("plan", "--model", "wan2.2-14b", "--gpu", "h200", "--json", *options).data["phases"]
        return next(phase["weights_bytes"] for phase in phases if phase["phase"] == "denoise")

    numbers = sum(tensor.numel() for tensor in tensors.values())
    plain = planned()
    assert planned("--lora", f"high={lora}") - plain == 2 * numbers
    assert planned("--lora", f"both={lora}") - plain == 4 * numbers
    assert planned("--lora", f"both={lora}", "--fuse-lora") == plain
    lora.write_bytes(lora.read_bytes()[:100])
    assert "style.safetensors is damaged" in refusal("plan", "demo-far", "--lora", lora, code=3)


def test_options_of_loras_are_refused_in_a_line(lora: Path) -> None:
    assert "there is no file none.safetensors" in refusal(*FOX, "--lora", "none.safetensors", code=3)
    assert "a scale is a number" in refusal(*FOX, "--lora", f"{lora}@nan")
    assert "--fuse-lora says how LoRAs are added" in refusal(*FOX, "--fuse-lora")
    assert "demo has one transformer" in refusal(*FOX, "--lora", f"low={lora}")
    assert "--lora says nothing to --level step" in refusal("bench", "--level", "step", "--lora", lora)
    assert not list(Path().glob("*.png"))


def test_a_lora_behind_a_link_keeps_its_name(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the hub's cache, where files lie by what they hold, without a suffix."""
    monkeypatch.chdir(tmp_path)
    Path("blob").write_bytes(lora.read_bytes())
    Path("cache").mkdir()
    Path("cache/style.safetensors").symlink_to(tmp_path / "blob")
    made = ("image", "a red fox", "--model", "demo", "--lora", "cache/style.safetensors", "--res", "64", "--steps", "2")
    assert grat(*made, "--seed", "3", "--save-latents", "--out", "a.png").code == 0
    _, request = read_run(Path("a.latents.safetensors"))
    assert request.weights.loras[0].source == str(tmp_path / "cache/style.safetensors")
    Path("style.safetensors").write_bytes(lora.read_bytes())
    again = grat("rerun", "a.png", "--out", "b.png")
    assert again.code == 0, again.err
    np.testing.assert_array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
