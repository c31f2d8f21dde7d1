"""Runs of a small FLUX.2 from a folder, from text and from pictures, against stock diffusers and broken off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import tiny_flux2
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from flux_runs import relative_difference
from PIL import Image
from small_runs import STEPS, Progress, Small, broken_off, generate, untimed

from grat_cli.errors import BadInput, ModelUnavailable
from grat_cli.families.base import Call, Pictures
from grat_cli.generation.checkpoint import read_run
from grat_cli.generation.request import check, note_expectations
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import load_autoencoder, load_model

HEIGHT, WIDTH = 144, 176  # 9 x 11 tokens: ragged groups of 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("flux2")
    return {
        "dev": tiny_flux2.save(place / "dev", Flux2Pipeline),
        "klein": tiny_flux2.save(place / "klein", is_distilled=True),
        "base": tiny_flux2.save(place / "base"),
    }


def small(folder: Path) -> Small:
    model = choose_model(str(folder))
    return Small(small_runs.request_of("flux2", [4, 4], "png", width=WIDTH, height=HEIGHT, model=model), ".png")


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def mask() -> Image.Image:
    of_pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    of_pixels[HEIGHT // 4 : -HEIGHT // 4, WIDTH // 3 :] = 255
    return Image.fromarray(of_pixels)


def test_folders_tell_which_model_they_are_kin_to(folders: dict[str, Path]) -> None:
    dev, klein, base = (choose_model(str(folders[name])) for name in ("dev", "klein", "base"))
    assert (dev.default_steps, dev.default_guidance, dev.true_guidance) == (50, 4.0, False)
    assert (klein.default_steps, klein.default_guidance, klein.true_guidance) == (4, None, False)
    assert (base.default_steps, base.default_guidance, base.true_guidance) == (50, 4.0, True)
    assert dev.takes == {"start", "reference"}
    assert klein.takes == base.takes == {"start", "mask", "reference"}
    config = folders["dev"] / "transformer" / "config.json"
    kept = config.read_text()
    config.write_text(kept.replace('"guidance_embeds": true,', ""))  # as of the first release
    assert choose_model(str(folders["dev"])) == dev
    config.write_text(kept)
    for model, is_negative in ((dev, False), (klein, False), (base, True)):
        request = replace(small(Path(model.source)).request, negative_prompt="blur")
        if is_negative:
            check(request)
            continue
        with pytest.raises(BadInput, match="takes no negative prompt: leave out --negative"):
            check(request)
    pipe = load_model(klein, device=CPU, dtype=torch.float32).pipe
    assert (type(pipe), pipe.config.is_distilled) == (Flux2KleinPipeline, True)
    assert type(load_model(dev, device=CPU, dtype=torch.float32).pipe) is Flux2Pipeline


def test_pictures_that_are_too_large_for_the_model_are_told() -> None:
    model = choose_model("flux2-klein-4b")
    for side, notes in ((2048, 0), (4096, 1)):
        progress = Progress()
        note_expectations(small_runs.request_of("flux2", [4, 4], "png", width=side, height=side, model=model), progress)
        assert len(progress.notes) == notes
        assert all("made for pictures of up to 2048x2048" in note for note in progress.notes)


def test_folders_of_other_pipelines_are_refused_with_the_reason(folders: dict[str, Path], tmp_path: Path) -> None:
    index = (folders["klein"] / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index.replace("Flux2KleinPipeline", "Flux2KleinKVPipeline"))
    with pytest.raises(ModelUnavailable, match="Flux2KleinKVPipeline, which is not supported: references come before"):
        choose_model(str(tmp_path))


@pytest.mark.parametrize("name", ["dev", "klein", "base"])
def test_a_picture_with_full_attention_is_that_of_the_stock_pipeline(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    kind = small(folders[name])
    asked = kind.of(tmp_path / "made", preset=kind.preset("full"))
    (made,) = generate(asked)
    pipe = load_model(asked.model, device=CPU, dtype=torch.float32).pipe
    stock = pipe(
        prompt=asked.prompt,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=2.0 if name != "klein" else 1.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    with Image.open(made.path) as image:
        assert np.abs(np.asarray(image) / 255 - stock).max() < 2 / 255
    assert made.report["sampling"]["guidance"] == (2.0 if name != "klein" else None)


@pytest.mark.parametrize("name", ["dev", "base"])
@pytest.mark.parametrize("start", [False, True])
def test_a_run_that_is_taken_up_again_ends_as_an_unbroken_one(
    folders: dict[str, Path], name: str, start: bool, tmp_path: Path
) -> None:
    kind = small(folders[name])
    more: dict[str, Any] = {}
    if start:
        picture().save(tmp_path / "start.png")
        more = {"init_image": tmp_path / "start.png", "strength": 0.8}
    (whole,) = generate(kind.of(tmp_path / "whole", **more))
    asked = kind.of(tmp_path / "broken", **more)
    run, request = read_run(broken_off(asked))
    (made,) = generate(request, begun=run)
    with Image.open(made.path) as one, Image.open(whole.path) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert untimed(made.report)["steps"] == untimed(whole.report)["steps"]
    assert len(made.report["steps"]) == (4 if start else STEPS)


def test_a_start_of_full_strength_is_none(folders: dict[str, Path], tmp_path: Path) -> None:
    kind = small(folders["base"])
    picture().save(tmp_path / "start.png")
    made = [
        generate(kind.of(tmp_path / f"{number}", init_image=tmp_path / "start.png", strength=strength))[0].path
        for number, strength in enumerate((1.0, 0.4))
    ]
    from_noise, from_start = made[0].read_bytes(), made[1].read_bytes()
    plain = generate(kind.of(tmp_path / "plain"))[0].path
    with Image.open(plain) as one, Image.open(made[0]) as other, Image.open(made[1]) as third:
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
        assert np.abs(np.asarray(one).astype(int) - np.asarray(third)).max() > 10
    assert from_noise != from_start


PICTURES = {
    "references": (Pictures(references=(picture(80, 112, 1), picture(64, 96, 2))), None),
    "mask": (Pictures(start=picture(), mask=mask()), 0.8),
    "mask and reference": (Pictures(start=picture(), mask=mask(), references=(picture(80, 112, 1),)), 0.8),
}


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("dev", "references"),
        ("base", "references"),
        ("klein", "mask"),
        ("base", "mask"),
        ("base", "mask and reference"),
    ],
)
def test_pictures_reach_the_pipeline_and_runs_of_them_go_on(
    folders: dict[str, Path], name: str, pictures: str, tmp_path: Path
) -> None:
    request = small(folders[name]).request
    family, model = request.family, request.model
    given, strength = PICTURES[pictures]
    loaded = load_model(model, device=CPU, dtype=torch.float32).pipe
    pipe = family.pipeline_for(loaded, given.kinds)
    assert pipe.config.get("is_distilled", False) == (name == "klein")
    guidance = {"dev": {"guidance_scale": 3.0}, "klein": {"guidance_scale": 0.0}, "base": {"true_cfg_scale": 3.0}}[name]
    text = family.encode_text(pipe, model, request.prompt, "" if name == "base" else None, given)

    def made(seed: int = 5, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        steps: list[torch.Tensor] = []

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            steps.append(tensors["latents"])
            return {}

        call = Call(
            WIDTH,
            HEIGHT,
            None,
            STEPS,
            text | guidance,
            torch.Generator().manual_seed(seed),
            callback,
            strength=strength,
            pictures=given,
            **more,
        )
        return family.denoise(pipe, call), steps

    latents, steps = made()
    inputs: dict[str, Any] = {"image": list(given.references)}
    if given.mask is not None:
        inputs = {"image": given.start, "mask_image": given.mask, "strength": strength}
        inputs |= {"image_reference": given.references[0]} if given.references else {}
    stock: list[torch.Tensor] = []
    pipe(
        **text,
        **inputs,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=1.0 if name == "klein" else 3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: stock.append(tensors["latents"]) or {},
    )
    assert len(steps) == len(stock) == (STEPS if strength is None else 4)
    assert relative_difference(steps[-1], stock[-1]) < 1e-5
    assert torch.equal(family.as_called(pipe, latents), steps[-1])
    assert torch.equal(family.spatial(pipe, steps[-1], WIDTH, HEIGHT), latents)
    assert tuple(latents.shape) == family.latents_shape(model, request.grid, called=False)
    assert tuple(steps[-1].shape) == family.latents_shape(model, request.grid, called=True)

    again, rest = made(begun=steps[1], first_step=2)
    assert len(rest) == len(steps) - 2
    assert torch.equal(again, latents)


def test_what_is_coded_is_scaled_as_by_the_pipeline(folders: dict[str, Path]) -> None:
    request = small(folders["klein"]).request
    family = request.family
    pipe = load_model(request.model, device=CPU, dtype=torch.float32).pipe
    pixels = pipe.image_processor.preprocess(picture())
    theirs = pipe._pack_latents(pipe._encode_vae_image(pixels, None))
    latents = family.encode(pipe, picture())
    assert relative_difference(family.as_called(pipe, latents), theirs) < 1e-6
    alone = load_autoencoder(request.model, device=CPU, dtype=torch.float32)
    for coder in (pipe, alone):
        decoded = family.decode(coder, latents)
        assert decoded.shape == (1, 3, 1, HEIGHT, WIDTH)
        mean, variance = (one.view(1, -1, 1, 1) for one in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
        raw = pipe._patchify_latents(latents) * torch.sqrt(variance + pipe.vae.config.batch_norm_eps) + mean
        expected = pipe.vae.decode(pipe._unpatchify_latents(raw)).sample
        assert relative_difference(decoded[:, :, 0], expected) < 1e-6
    # As previews have it: smaller, of an odd number of rows.
    assert family.decode(pipe, latents[:, :, :7, :9]).shape == (1, 3, 1, 56, 72)
