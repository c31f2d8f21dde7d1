"""Picture files of every format: their provenance, their limits, and pictures that Pillow alone would refuse."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, WebPImagePlugin

from grat_cli.errors import BadInput, CannotWrite
from grat_cli.files import outputs, pictures
from grat_cli.files.pictures import FORMATS, choose_picture_format, read_picture, require_writable, write_picture

PROVENANCE = {"schema": "grat.report/1", "prompt": 'ein "Füchslein" 🦊 \udcfc', "seed": 7}
NAMES = pytest.mark.parametrize("name", FORMATS)
LOSSLESS = ("png", "tiff")


def picture(side: int = 64) -> Image.Image:
    """A smooth one, which lossy formats keep close to."""
    ramp = np.arange(side, dtype=np.float32) * (255 / side)
    pixels = np.stack([*np.meshgrid(ramp, ramp), np.full((side, side), 90.0)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@NAMES
def test_pictures_come_back_with_their_provenance(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"fox{FORMATS[name].suffixes[0]}"
    assert write_picture(picture(), path, FORMATS[name], PROVENANCE)
    assert os.listdir(tmp_path) == [path.name]
    assert outputs.read_provenance(path) == PROVENANCE
    with Image.open(path) as reloaded:
        assert reloaded.format == FORMATS[name].pillow_name
    difference = np.abs(np.asarray(read_picture(path), np.int16) - np.asarray(picture(), np.int16))
    assert difference.max() == 0 if name in LOSSLESS else difference.mean() < 4


@NAMES
def test_without_provenance_nothing_is_inside(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"fox{FORMATS[name].suffixes[0]}"
    assert not write_picture(picture(), path, FORMATS[name], None)
    assert b"grat" not in path.read_bytes()
    with pytest.raises(BadInput, match=r"no fox\.json beside it"):
        outputs.read_provenance(path)


@NAMES
def test_provenance_is_read_without_decoding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"fox{FORMATS[name].suffixes[0]}"
    write_picture(picture(), path, FORMATS[name], PROVENANCE)

    def decode(*_: object) -> None:
        raise AssertionError("pixels are decoded")

    for reader in (ImageFile.ImageFile, WebPImagePlugin.WebPImageFile):
        monkeypatch.setattr(reader, "load", decode)
    with pytest.raises(BadInput, match="pixels are decoded"):
        read_picture(path)
    assert outputs.read_provenance(path) == PROVENANCE


@NAMES
def test_provenance_of_any_length_is_inside_or_left_out_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"fox{FORMATS[name].suffixes[0]}"
    for length, fits in ((60_000, True), (70_000, name == "png")):
        long = {**PROVENANCE, "prompt": "x" * length}
        assert write_picture(picture(), path, FORMATS[name], long) == fits
        assert read_picture(path).size == (64, 64)
        if fits:
            assert outputs.read_provenance(path) == long
        else:
            assert b"xxxx" not in path.read_bytes()


@NAMES
def test_progress_is_told_piece_by_piece(name: str, tmp_path: Path) -> None:
    """So that no encoder that can do without holds the whole file."""
    path = tmp_path / "fox"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 2048, 3), np.uint8))
    told: list[int] = []
    write_picture(noise, path, FORMATS[name], PROVENANCE, written=told.append)
    if name == "tiff":
        assert told == []
        return
    assert told == sorted(told)
    assert told[-1] == path.stat().st_size
    if name != "webp":
        assert np.diff(told, prepend=0).max() < path.stat().st_size / 10


@NAMES
def test_a_full_disk_leaves_the_old_file_and_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fox"
    path.write_bytes(b"precious")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures._Counted, "write", full)
    if name == "tiff":
        monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CannotWrite, match="no space left"):
        write_picture(picture(), path, FORMATS[name], PROVENANCE, written=lambda count: None)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["fox"]


@pytest.mark.parametrize("name", ["jpg", "webp"])
def test_quality_trades_size_for_closeness(name: str, tmp_path: Path) -> None:
    sizes, differences = [], []
    for quality in (10, 50, 95):
        path = tmp_path / f"{quality}"
        write_picture(picture(), path, FORMATS[name], None, quality=quality)
        sizes.append(path.stat().st_size)
        differences.append(np.abs(np.asarray(read_picture(path), np.int16) - np.asarray(picture(), np.int16)).mean())
    assert sizes == sorted(sizes)
    assert differences == sorted(differences, reverse=True)


def test_the_format_is_the_named_one_or_that_of_the_suffix(tmp_path: Path) -> None:
    for out, named, chosen in (
        (None, None, "png"),
        (None, "webp", "webp"),
        (None, "JPEG", "jpg"),
        (tmp_path, "tif", "tiff"),
        (tmp_path, None, "png"),
        (Path("fox.jpeg"), None, "jpg"),
        (Path("fox.TIF"), None, "tiff"),
        (Path("fox.webp"), "webp", "webp"),
        (Path("new/"), "jpg", "jpg"),
    ):
        assert choose_picture_format(out, named).name == chosen
    assert FORMATS["jpg"].suffix_of(Path("fox.jpeg")) == ".jpeg"
    assert FORMATS["jpg"].suffix_of(None) == FORMATS["jpg"].suffix_of(tmp_path) == ".jpg"
    for out, named, advice in (
        (Path("fox.bmp"), None, r"use fox\.png"),
        (Path("fox.bmp"), "webp", r"use fox\.webp"),
        (Path("fox.png"), "jpg", r"no jpg file: use --out fox\.jpg, or leave out --format"),
        (None, "wepb", "did you mean 'webp'"),
    ):
        with pytest.raises(BadInput, match=advice):
            choose_picture_format(out, named)


def test_what_a_format_cannot_hold_is_refused_beforehand() -> None:
    require_writable(FORMATS["png"], 100_000, 100_000, None)
    require_writable(FORMATS["webp"], 16_383, 8, 100)
    require_writable(FORMATS["jpg"], 65_500, 8, 1)
    for name, side in (("webp", 16_384), ("jpg", 65_501)):
        with pytest.raises(BadInput, match="use --format png or tiff"):
            require_writable(FORMATS[name], 8, side, None)
    for name in LOSSLESS:
        with pytest.raises(BadInput, match="leave it out"):
            require_writable(FORMATS[name], 8, 8, 90)
    for quality in (0, 101):
        with pytest.raises(BadInput, match=r"1 .* to 100"):
            require_writable(FORMATS["jpg"], 8, 8, quality)


@NAMES
def test_large_pictures_pass_the_guard_up_to_a_limit_of_our_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"fox{FORMATS[name].suffixes[0]}"
    write_picture(picture(), path, FORMATS[name], PROVENANCE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(path).size == (64, 64)
        assert outputs.read_provenance(path) == PROVENANCE
    assert Image.MAX_IMAGE_PIXELS == 64 * 64 // 4
    monkeypatch.setattr(pictures, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(BadInput, match="64x64 pixels"):
        read_picture(path)


def test_a_picture_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture().crop((0, 0, 64, 32)).save(tmp_path / "fox.jpg", exif=exif)
    assert read_picture(tmp_path / "fox.jpg").size == (32, 64)


def test_descriptions_of_others_are_left_alone(tmp_path: Path) -> None:
    for number, description in enumerate(("a holiday", "gratitude", "grat", 7)):
        exif = Image.Exif()
        exif[0x010E] = description
        path = tmp_path / f"{number}.jpg"
        picture().save(path, exif=exif)
        with pytest.raises(BadInput, match="does not say how it was made"):
            outputs.read_provenance(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read", "ignore:Metadata Warning")
@given(
    start=st.sampled_from([b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP"]),
    content=st.binary(max_size=200),
)
def test_any_file_is_read_or_refused(start: bytes, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any file.jpg"
    path.write_bytes(start + content)
    with pytest.raises(BadInput):
        outputs.read_provenance(path)
    with pytest.raises(BadInput):
        read_picture(path)


def test_depth_maps_of_16_bits_are_read_in_eight(tmp_path: Path) -> None:
    path = tmp_path / "depth.png"
    Image.fromarray(np.array([[0, 255, 256], [0x7FFF, 0x8000, 0xFFFF]], np.uint16)).save(path)
    assert np.asarray(pictures.read_picture(path))[..., 0].tolist() == [[0, 0, 1], [127, 128, 255]]


def test_the_size_of_a_picture_is_that_of_the_upright_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert (
        pictures.picture_size(tmp_path / "turned.jpg")
        == pictures.read_picture(tmp_path / "turned.jpg").size
        == (20, 30)
    )
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(BadInput, match="cannot be read as a picture"):
        pictures.picture_size(tmp_path / "torn.png")


# ---- Modes: what a viewer shows


def read_back(made: Image.Image, path: Path, **options: Any) -> list[Any]:
    made.save(path, **options)
    read = read_picture(path)
    assert read.mode == "RGB"
    assert pictures.picture_size(path) == read.size == made.size
    return np.asarray(read)[0].tolist()


RED, WHITE, HALF = [255, 0, 0], [255, 255, 255], [255, 128, 128]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff"])
def test_transparent_parts_are_white(name: str, tmp_path: Path) -> None:
    made = Image.new("RGBA", (3, 1))
    made.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (255, 0, 0, 127)])
    options = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_allclose(read_back(made, tmp_path / name, **options), [RED, WHITE, HALF], atol=1)


def test_transparency_is_white_in_every_mode_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    grey = Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    assert read_back(grey, path) == [[10, 10, 10], WHITE]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert read_back(palette, path) == [RED, [0, 0, 255]]
    assert read_back(palette, path, transparency=1) == [RED, WHITE]
    assert read_back(palette, tmp_path / "a.gif", transparency=1) == [RED, WHITE]
    keyed = Image.new("RGB", (2, 1))
    keyed.putdata([(255, 0, 0), (0, 0, 255)])
    assert read_back(keyed, path, transparency=(0, 0, 255)) == [RED, WHITE]


def test_two_shades_grey_and_printers_colours_are_shown(tmp_path: Path) -> None:
    bits = Image.new("1", (2, 1))
    bits.putdata([0, 255])
    assert read_back(bits, tmp_path / "a.png") == [[0, 0, 0], WHITE]
    assert read_back(Image.new("L", (1, 1), 77), tmp_path / "a.jpg") == [[77, 77, 77]]
    for name in ("a.tiff", "a.jpg"):
        ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        np.testing.assert_allclose(read_back(ink, tmp_path / name)[0], RED, atol=6)


@pytest.mark.parametrize("name", ["a.png", "a.pgm", "a.tiff"])
def test_the_upper_of_16_bits_are_shown(name: str, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)).save(tmp_path / name)
    assert np.asarray(read_picture(tmp_path / name))[0, :, 0].tolist() == [0, 0, 1, 127, 128, 255]


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_numbers_without_a_white_are_refused(dtype: type, kind: str, tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tiff")
    for read in (read_picture, pictures.picture_size):
        with pytest.raises(BadInput, match=f"has {kind} numbers"):
            read(tmp_path / "a.tiff")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_pictures_that_move_are_refused(name: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    for read in (read_picture, pictures.picture_size):
        with pytest.raises(BadInput, match=r"moves, in 2 frames: save the one that is meant"):
            read(tmp_path / name)
    first.save(tmp_path / name)
    np.testing.assert_allclose(np.asarray(read_picture(tmp_path / name))[0, 0], RED, atol=2)


def test_of_several_pages_the_first_is_shown(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.tiff", save_all=True, append_images=[second])
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second])
    for name in ("a.tiff", "a.mpo"):
        np.testing.assert_allclose(np.asarray(read_picture(tmp_path / name))[0, 0], RED, atol=2)


def test_colours_are_those_of_the_profile_inside(tmp_path: Path) -> None:
    grey = Image.new("RGB", (1, 1), (128, 128, 128))
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert read_back(grey, tmp_path / "a.png", icc_profile=srgb) == [[128, 128, 128]]
    # With red and blue exchanged, and another name.
    other = srgb.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    other = other.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    np.testing.assert_allclose(read_back(red, tmp_path / "a.png", icc_profile=other), [[0, 0, 255]], atol=1)
    layered = Image.new("RGBA", (1, 1), (255, 0, 0, 255))
    np.testing.assert_allclose(read_back(layered, tmp_path / "a.png", icc_profile=other), [[0, 0, 255]], atol=1)
    # None of these is one for the pixels that there are.
    for profile in (lab, linear.tobytes()[:90], b"no profile"):
        assert read_back(grey, tmp_path / "a.png", icc_profile=profile) == [[128, 128, 128]]


def test_no_other_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    monkeypatch.setattr("subprocess.check_call", None)
    with pytest.raises(BadInput, match="cannot be read as a picture"):
        read_picture(path)
