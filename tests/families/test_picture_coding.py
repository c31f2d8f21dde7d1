"""Pictures in tiles: the same as whole ones, or with seams that cannot be told from the picture."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import tiny_flux
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from grat_cli.errors import BadInput, NumericalFailure
from grat_cli.families import picture_coding
from grat_cli.families.picture_coding import Tiling, decode, encode, pieces, receptive_field

WHOLE = 100_000  # a tile that holds any picture


def pipeline(vae: Any) -> Any:
    return tiny_flux.pipeline(vae=vae)


def group_normed() -> Any:
    """A random autoencoder built like that of Flux: 8 pixels per latent, group norms, attention in the middle."""
    torch.manual_seed(0)
    config: dict[str, Any] = dict(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return AutoencoderKL(**config).eval()


def noise(channels: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(1, channels, rows, columns, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("length", [1, 16, 17, 23, 39, 40, 41, 100, 1024])
@pytest.mark.parametrize("tiling", [Tiling(16, 6, 0), Tiling(16, 4, 4), Tiling(17, 5, 0), Tiling(8, 2, 2)])
def test_every_place_is_used_once_and_far_enough_from_the_border_of_its_tile(length: int, tiling: Tiling) -> None:
    axis, weights = pieces(length, tiling), torch.zeros(length)
    for piece in axis:
        weights[piece.first : piece.last] += picture_coding._weights(piece, 1, weights)
        assert piece.stop - piece.start == min(length, tiling.side)
        margin = (tiling.overlap - tiling.blend) // 2
        assert piece.first - piece.start >= (margin if piece.start else 0)
        assert piece.stop - piece.last >= (margin if piece.stop < length else 0)
    torch.testing.assert_close(weights, torch.ones(length))
    assert (axis[0].first, axis[-1].last) == (0, length)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_receptive_field_is_what_results_depend_on(part: Literal["encoder", "decoder"]) -> None:
    """One step within it something changes; beyond it nothing does."""
    vae = tiny_flux.autoencoder()
    field, scale, middle = receptive_field(vae, part), 4, 20
    with torch.no_grad():
        for parameter in vae.parameters():  # no ReLU hides a dependency
            parameter.abs_()
    places = 2 * middle + 1
    given = torch.rand(1, 4, places, places) if part == "decoder" else torch.rand(1, 3, places * scale, places * scale)
    given.requires_grad_()
    made = getattr(vae, part)(given)
    result = scale if part == "decoder" else 1  # places of the result per latent
    (gradient,) = torch.autograd.grad(made[:, :, middle * result : (middle + 1) * result].sum(), given)
    depends = gradient.abs().sum(dim=(0, 1, 3)).reshape(places, -1).sum(dim=1).nonzero().flatten()
    assert max(middle - depends.min(), depends.max() - middle) == field


def worst(made: torch.Tensor, exact: torch.Tensor) -> float:
    return (made.double() - exact).abs().max().item()


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (33, 57), (24, 100)])
def test_tiles_of_a_tiny_autoencoder_give_what_the_whole_gives(rows: int, columns: int) -> None:
    """Up to rounding: as near to double precision as the whole, twice over, as sums may run in another order."""
    pipe, double = pipeline(tiny_flux.autoencoder()), pipeline(tiny_flux.autoencoder().double())
    latents = noise(4, rows, columns)
    whole, tiled = decode(pipe, latents, WHOLE), decode(pipe, latents, 88)
    with torch.no_grad():
        exact = double.vae.decode(latents.double()).sample
    assert tiled.shape == (1, 3, rows * 4, columns * 4)
    ulp = torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert worst(tiled, exact) <= 2 * worst(whole, exact) + ulp

    pixels = exact.float().clamp(-1, 1)
    whole, tiled = encode(pipe, pixels, WHOLE), encode(pipe, pixels, 88)
    with torch.no_grad():
        exact = double.vae.encode(pixels.double()).latents
    assert tiled.shape == latents.shape
    ulp = torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert worst(tiled, exact) <= 2 * worst(whole, exact) + ulp


def test_a_picture_no_larger_than_a_tile_is_coded_as_the_pipeline_does(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = group_normed()
    pipe, latents = pipeline(vae), noise(16, 4, 6)
    with torch.no_grad():
        stock = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        moments = vae.encode(stock).latent_dist
    assert torch.equal(decode(pipe, latents), stock)
    monkeypatch.setattr(type(moments), "sample", lambda self, generator: self.mode())
    assert torch.equal(encode(pipe, stock), pipe_encoded(vae, stock))


def pipe_encoded(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    pipe = tiny_flux.pipeline(tiny_flux.FluxImg2ImgPipeline, vae=vae)
    with torch.no_grad():
        return pipe._encode_vae_image(pixels, torch.Generator())


def step_of_lines(pixels: torch.Tensor, axis: int) -> torch.Tensor:
    """How much pixels change across each line between two rows or columns, against the lines around it."""
    steps = pixels.diff(dim=axis).abs().mean(dim=(0, 1, 5 - axis))
    around = torch.nn.functional.pad(steps[None, None], (16, 16), mode="reflect")[0, 0].unfold(0, 33, 1)
    return steps / around.median(dim=1).values


def test_seams_of_a_group_normed_autoencoder_cannot_be_told_from_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Across no line do pixels change more than somewhere in the untiled picture; without fading they do."""
    pipe = pipeline(group_normed())
    # As pictures have it: shapes of all sizes.
    latents = sum(
        torch.nn.functional.interpolate(noise(16, 48 // size, 48 // size), size=(48, 48), mode="bicubic")
        for size in (1, 4, 16)
    )
    assert isinstance(latents, torch.Tensor)
    whole, tiled = decode(pipe, latents, WHOLE), decode(pipe, latents, 128)
    for axis in (2, 3):
        assert step_of_lines(tiled, axis).max() <= step_of_lines(whole, axis).max()
    assert not torch.allclose(tiled, whole)  # group norms see tiles
    monkeypatch.setattr(picture_coding, "_OVERLAP", 0)
    cut = decode(pipe, latents, 128)
    assert max(step_of_lines(cut, axis).max() for axis in (2, 3)) > max(
        step_of_lines(whole, axis).max() for axis in (2, 3)
    )


def test_the_memory_of_tiles_does_not_grow_with_the_picture() -> None:
    """No intermediate result is larger than that of a tile."""
    pipe = pipeline(tiny_flux.autoencoder())
    largest: list[int] = []
    for module in pipe.vae.decoder.modules():
        module.register_forward_hook(lambda module, given, made: largest.append(made.numel()))
    decode(pipe, noise(4, 200, 30), 88)
    assert max(largest) == 8 * 88 * 88


def test_a_picture_can_be_encoded() -> None:
    pipe = pipeline(tiny_flux.autoencoder())
    values = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    latents = encode(pipe, Image.fromarray(values))
    pixels = torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    assert latents.shape == (1, 4, 16, 24)
    torch.testing.assert_close(latents, encode(pipe, pixels))


def test_what_cannot_be_decoded_is_refused() -> None:
    pipe = pipeline(tiny_flux.autoencoder())
    # 8 latents of receptive field on either side, and one that is used.
    assert receptive_field(pipe.vae, "decoder") == 8
    with pytest.raises(BadInput, match="tiles of 64 pixels are too small for this autoencoder: use 80 or more"):
        decode(pipe, noise(4, 64, 64), 64)
    with pytest.raises(NumericalFailure, match="NaN after decoding"):
        decode(pipe, torch.full((1, 4, 8, 8), torch.nan))
