"""Previews: what they show, when, and that nothing else changes by them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from PIL import Image
from small_pictures import HEIGHT, WIDTH, generate, preset

from grat_cli.families.flux import Flux
from grat_cli.generation import preview
from grat_cli.generation.preview import LONGEST_SIDE, Preview, PreviewedSteps

FLUX: Any = Flux()
SIDE = 64  # pixels; 16 x 16 latents of a tiny pipeline


class Watch:
    """Another callback."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        self.steps.append(step)
        return {}


class Decoding(Flux):
    """Flux, but that it keeps what it is given to decode."""

    def __init__(self, watch: Watch, pixels: torch.Tensor) -> None:
        self.watch, self.pixels = watch, pixels
        self.decoded: list[tuple[int, torch.Tensor]] = []

    def decode(self, pipe: Any, latents: torch.Tensor, tile: int | None = None) -> torch.Tensor:
        self.decoded.append((self.watch.steps[-1] + 1, latents))
        return self.pixels


def run(
    path: Path, steps: int, every: int, trained_side: int = SIDE, pixels: torch.Tensor | None = None
) -> tuple[list[tuple[int, torch.Tensor]], list[torch.Tensor]]:
    """The clean latents that are decoded, with the step after which; and those that each step's prediction implies."""
    pipe, watch = tiny_flux.pipeline(), Watch()
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, steps), mu=1.0)
    pipe._num_timesteps = steps
    family = Decoding(watch, torch.linspace(-1, 1, 3 * 24 * 24).view(1, 3, 1, 24, 24) if pixels is None else pixels)
    callback = PreviewedSteps(Preview(path, every, trained_side, family), watch, SIDE, SIDE)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, (SIDE // 8) ** 2, 16, generator=generator)
    implied = []
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        velocity = torch.randn(latents.shape, generator=generator)
        implied.append(latents - pipe.scheduler.sigmas[step] * velocity)
        latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        assert callback(pipe, step, timestep, {"latents": latents}) == {}
    assert watch.steps == list(range(steps))
    return family.decoded, [pipe._unpack_latents(tokens, SIDE, SIDE, pipe.vae_scale_factor) for tokens in implied]


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(9, 3, [3, 6]), (8, 3, [3, 6]), (4, 1, [2, 3]), (4, 4, []), (4, 9, []), (1, 1, [])]
)
def test_a_preview_shows_what_the_model_expects_at_the_end(
    steps: int, every: int, expected: list[int], tmp_path: Path
) -> None:
    decoded, implied = run(tmp_path / "fox.preview.png", steps, every)
    assert [step for step, _ in decoded] == expected
    for step, clean in decoded:
        # A difference of numbers of size 4, divided by that of two noise levels, at least 0.05 apart.
        torch.testing.assert_close(clean, implied[step - 1], rtol=0, atol=4 * 4 / 0.05 * 2**-23)
    assert (tmp_path / "fox.preview.png").exists() == bool(expected)


def test_large_pictures_are_averaged_down_before_decoding(tmp_path: Path) -> None:
    decoded, implied = run(tmp_path / "fox.png", 4, 2, trained_side=SIDE // 4)
    ((step, clean),) = decoded
    assert clean.shape[2:] == (4, 4)
    blocks = implied[step - 1].unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))
    torch.testing.assert_close(clean, blocks, rtol=0, atol=4 * 4 / 0.05 * 2**-23)


def test_nothing_is_kept_but_for_the_step_before_a_preview(tmp_path: Path) -> None:
    callback = PreviewedSteps(Preview(tmp_path / "fox.png", 3, SIDE, FLUX), Watch(), SIDE, SIDE)
    pipe = SimpleNamespace(num_timesteps=3)
    kept = []
    for step in range(3):
        callback(pipe, step, None, {"latents": torch.zeros(1)})
        kept.append(callback._before is not None)
    assert kept == [False, True, False]


def test_a_run_makes_the_same_picture_with_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Image.Image] = []
    monkeypatch.setattr(preview, "write_picture", lambda picture, *_, **__: written.append(picture))
    four_steps = preset(sampling={"steps": 4, "guidance": 2.0})
    (without,) = generate(preset=four_steps)
    assert written == []
    (with_previews,) = generate(preset=four_steps, preview_every=2)
    assert [picture.size for picture in written] == [(WIDTH, HEIGHT)]
    assert without.bytes == with_previews.bytes


def test_previews_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fox.preview.png"
    run(path, 4, 2)
    with Image.open(path) as picture:
        assert picture.size == (24, 24)
    monkeypatch.setattr(preview, "LONGEST_SIDE", 12)
    run(path, 4, 2)
    with Image.open(path) as picture:
        assert picture.size == (12, 12)
    assert LONGEST_SIDE == 512
    Preview(path, 2, SIDE, FLUX).remove()
    Preview(path, 2, SIDE, FLUX).remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_estimate_that_is_no_picture_yet_ends_nothing(tmp_path: Path, value: float) -> None:
    decoded, _ = run(tmp_path / "fox.png", 4, 2, pixels=torch.full((1, 3, 1, 24, 24), value))
    assert len(decoded) == 1
    assert list(tmp_path.iterdir()) == []
