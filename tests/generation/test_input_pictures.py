"""Outputs that are made from pictures: against stock diffusers, gone on with, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import tiny_flux
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.flux.pipeline_flux_control import FluxControlPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_inpaint import FluxInpaintPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import STEPS, Progress, Small, broken_off, generate, goes_on_as_if_whole, tamper

from grat_cli.errors import BadInput
from grat_cli.families import flux
from grat_cli.files import tensors
from grat_cli.generation import finishing, inputs, stored
from grat_cli.generation.checkpoint import read_run
from grat_cli.models.catalogue import choose_model
from grat_cli.presets import Preset

KINDS = {
    "inpaint": (FluxInpaintPipeline, 16),
    "fill": (FluxFillPipeline, 96),
    "control": (FluxControlPipeline, 32),
    "kontext": (FluxKontextPipeline, 16),
}
# In place of those of about a megapixel.
SIZES = [(48, 64), (64, 48), (72, 56)]


@dataclass(frozen=True)
class Made:
    """A kind of pictures: what is asked for, and what the stock pipeline is given for it."""

    small: Small
    folder: Path
    files: tuple[Path, ...]
    given: dict[str, Path | tuple[Path, ...]]
    arguments: dict[str, Any]


def picture(path: Path, width: int = 96, height: int = 80, seed: int = 0) -> Path:
    drawn = np.random.default_rng(seed).integers(0, 255, (10, 12, 3), np.uint8)
    Image.fromarray(drawn).resize((width, height), Image.Resampling.NEAREST).save(path)
    return path


def mask(path: Path, width: int = 96, height: int = 80) -> Path:
    painted = np.zeros((height, width), np.uint8)
    painted[height // 4 : -height // 4, width // 3 :] = 255
    Image.fromarray(painted).save(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: tiny_flux.save(place / name, kind, channels) for name, (kind, channels) in KINDS.items()}


@pytest.fixture(params=KINDS)
def made(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Made:
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", SIZES)
    monkeypatch.setattr(flux, "KONTEXT_SIZES", tuple(SIZES))
    name = request.param
    start, white = picture(tmp_path / "start.png"), mask(tmp_path / "mask.png")
    other = picture(tmp_path / "other.png", 90, 70, 1)
    given, arguments = {
        "inpaint": (
            {"init_image": start, "mask": white, "strength": 0.7},
            {"image": Image.open(start), "mask_image": Image.open(white), "strength": 0.7},
        ),
        "fill": (
            {"init_image": start, "mask": white},
            {"image": Image.open(start), "mask_image": Image.open(white)},
        ),
        "control": ({"control": start}, {"control_image": Image.open(start)}),
        "kontext": ({"references": (other,)}, {"image": Image.open(other), "max_area": 96 * 80}),
    }[name]
    small = small_runs.picture()
    preset = Preset.model_validate(small.request.preset.model_dump() | {"sampling": {"steps": STEPS, "guidance": 4.0}})
    asked = replace(small.request, model=choose_model(str(folders[name])), preset=preset, **given)
    return Made(Small(asked, ".png"), folders[name], (start, white, other), given, arguments)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}

    def write_output(frames: Iterator[np.ndarray], path: Path, *_: Any, **__: Any) -> bool:
        outputs[path.stem] = np.stack(list(frames))
        path.write_bytes(b"an output")
        return True

    monkeypatch.setattr(finishing.formats, "write_output", write_output)
    return outputs


def test_full_attention_gives_the_stock_picture(made: Made, written: dict[str, np.ndarray], tmp_path: Path) -> None:
    (kind, _), model = KINDS[made.folder.name], made.small.request.model
    stock = kind.from_pretrained(made.folder)
    stock.set_progress_bar_config(disable=True)
    guidance = {"true_cfg_scale": 4.0, "negative_prompt": ""} if model.true_guidance else {"guidance_scale": 4.0}
    expected = stock(
        prompt=made.small.request.prompt,
        height=80,
        width=96,
        num_inference_steps=STEPS,
        max_sequence_length=model.text_tokens,
        generator=torch.Generator().manual_seed(7),
        **guidance,
        **made.arguments,
    ).images[0]
    for variant in ("full", "b"):
        (one,) = generate(made.small.of(tmp_path / variant, preset=made.small.preset(variant, schedule={})))
    assert np.abs(written["full"][0].astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert np.abs(written["b"][0].astype(int) - np.asarray(expected).astype(int)).max() > 1
    told = [
        (picture["kind"], picture["file"], picture["width"], picture["height"]) for picture in one.report["pictures"]
    ]
    assert (
        told
        == {
            "inpaint": [("start", "start.png", 96, 80), ("mask", "mask.png", 96, 80)],
            "fill": [("start", "start.png", 96, 80), ("mask", "mask.png", 96, 80)],
            "control": [("control", "start.png", 96, 80)],
            "kontext": [("reference", "other.png", 90, 70)],
        }[made.folder.name]
    )
    references = 6 * 8 if made.folder.name == "kontext" else 0  # 88x64 pixels are nearest in shape to 64x48
    assert references == inputs.reference_tokens(made.small.request)
    assert one.report["stages"][0]["tokens"] == one.report["tokens"]["total"] == 120 + model.text_tokens + references


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_from_pictures_goes_on_without_them(
    made: Made, written: dict[str, np.ndarray], tmp_path: Path, dtype: str
) -> None:
    outputs = tmp_path / "made"
    outputs.mkdir()
    asked = made.small.of(outputs / "a-s7", outputs / "a-s8", dtype=dtype, checkpoint_every=2)
    goes_on_as_if_whole(asked, written, outputs, starts=made.files)


def test_kept_pictures_are_held_to_what_was_asked(made: Made, tmp_path: Path) -> None:
    """Of their number, type and size; and all of a run that is to go on are there."""
    kept = broken_off(made.small.of(tmp_path / "a"))
    whole, names = kept.read_bytes(), [name for name in load_file(kept) if "_pixels" in name]
    assert names
    for name in names:
        pixels = load_file(kept)[name]
        for wrong in (None, pixels.float(), pixels[:8, :4], pixels[..., None], torch.zeros(0, 0, 3, dtype=torch.uint8)):
            tamper(kept, {name: wrong})
            with pytest.raises(BadInput, match="cannot be gone on with"):
                read_run(kept)
            kept.write_bytes(whole)
    tamper(kept, {"reference_pixels_1": torch.zeros(16, 16, 3, dtype=torch.uint8)})
    with pytest.raises(BadInput, match=r"it holds .*reference_pixels_1.*, and not"):
        read_run(kept)
    kept.write_bytes(whole)
    for strength in ({"strength": 0.5}, {"mask": None}, {"references": ["a"] * 200}, {"control": ""}):
        tamper(kept, request=strength)
        if strength == {"strength": 0.5} and made.folder.name == "inpaint":
            continue
        if made.small.request.mask is None and strength == {"mask": None}:
            continue
        with pytest.raises(BadInput, match="cannot be gone on with"):
            read_run(kept)
        kept.write_bytes(whole)


@pytest.mark.parametrize("made", ["kontext"], indirect=True)
def test_checkpoints_from_before_there_were_pictures_are_read(made: Made, tmp_path: Path) -> None:
    small = small_runs.picture()
    kept = broken_off(small.of(tmp_path / "a"))
    about = tensors.read_about(kept)
    assert about is not None
    for name in ("mask", "control", "references"):
        del about["request"][name]
    save_file(load_file(kept), kept, {"grat": json.dumps(about)})
    run, restored = read_run(kept)
    assert (run.done, restored.kinds) == (2, frozenset())


@pytest.mark.parametrize("made", ["fill", "kontext"], indirect=True)
def test_large_pictures_from_pictures_come_in_one_stage(
    made: Made, written: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(made.small.request.model, native_side=48)
    monkeypatch.setattr(stored, "choose_model", lambda *_, **__: model)
    progress = Progress()
    (one,) = generate(made.small.of(tmp_path / "a", model=model), progress)
    assert [(stage["width"], stage["height"], stage["strength"]) for stage in one.report["stages"]] == [(96, 80, None)]
    assert any("96x80 is made in one stage" in note for note in progress.notes)


@pytest.mark.parametrize("made", ["inpaint"], indirect=True)
def test_only_the_white_of_a_mask_is_made_anew(made: Made, written: dict[str, np.ndarray], tmp_path: Path) -> None:
    """By the demo, whose autoencoder gives the rest back nearly as it was."""
    model = choose_model("demo")
    plain = small_runs.picture().of(tmp_path / "a", width=128, height=128)
    generate(plain)
    start, white = tmp_path / "a.png", mask(tmp_path / "white.png", 128, 128)
    Image.fromarray(written["a"][0]).save(start)
    generate(
        replace(
            plain,
            model=model,
            prompt="a blue house at night",
            outputs=(tmp_path / "b.png",),
            init_image=start,
            mask=white,
        )
    )
    changed = np.abs(written["b"][0].astype(int) - written["a"][0].astype(int)).mean(-1)
    # Latents of a token are mixed by the mask as a whole, and convolutions see a few pixels beyond.
    inside = np.zeros((128, 128), bool)
    inside[128 // 4 - 16 : -128 // 4 + 16, 128 // 3 - 16 :] = True
    assert changed[~inside].mean() < 4
    assert changed[40:90, 50:120].mean() > 8


def test_pictures_that_do_not_fit_are_refused_before_anything_is_loaded(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grat_cli.generation import run

    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("loaded"))
    asked = made.small.of(tmp_path / "a")
    (first, *_) = made.files
    name = "other.png" if asked.references else "start.png"
    damaged = (tmp_path / name).read_bytes()[:200]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(BadInput, match=f"{name} cannot be read as a picture"):
        generate(asked)
    (tmp_path / name).unlink()
    with pytest.raises(BadInput, match=f"{name}: there is no such file"):
        generate(asked)
    picture(first)
    if asked.mask is not None:
        mask(asked.mask, 64, 80)
        with pytest.raises(BadInput, match=r"is 64x80, and --init-image .* 96x80: make the mask 96x80 too"):
            generate(asked)
        Image.new("L", (96, 80)).save(asked.mask)
        with pytest.raises(BadInput, match="has no white, which is where the picture is made anew"):
            generate(asked)
    if asked.references:
        picture(tmp_path / name, 8, 64)
        with pytest.raises(BadInput, match=r"is 8x64: .* takes pictures of 16 pixels a side and more"):
            generate(asked)


def test_tokens_of_references_are_those_of_the_stock_pipeline() -> None:
    sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    assert sorted(flux.KONTEXT_SIZES) == sorted(sizes)
    model, family = choose_model("flux-kontext"), flux.Flux()

    def tokens(*references: tuple[int, int]) -> int:
        return family.reference_tokens(model, (1024, 1024), frozenset({"reference"}), references)

    assert tokens() == 0
    assert tokens((1024, 1024)) == tokens((17, 20)) == 64 * 64
    assert tokens((1920, 1080), (1024, 1024)) == (1392 // 16) * (752 // 16) + 64 * 64


@pytest.mark.parametrize("made", ["fill", "control"], indirect=True)
def test_a_transformer_of_another_kind_than_its_name_told_is_refused(made: Made, tmp_path: Path) -> None:
    """As of a hub id, whose files are known only when they are here."""
    model = replace(made.small.request.model, takes=frozenset(["start", "mask"]), needs=frozenset())
    asked = replace(made.small.of(tmp_path / "a", model=model), init_image=None, mask=None, control=None)
    with pytest.raises(BadInput, match=r"transformer is one like that of flux-(fill|canny): give the pictures"):
        generate(asked)
