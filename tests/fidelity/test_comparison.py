"""`grat compare`: files and folders of pictures and videos, against likeness computed directly."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import grat as run_grat
from PIL import Image

from grat_cli.errors import BadInput
from grat_cli.fidelity import perceptual
from grat_cli.fidelity.comparison import AMPLIFIED, FRAMES_SHOWN, compare_pair, pairs_of
from grat_cli.fidelity.quality import Likeness, likeness
from grat_cli.files.videos import read_frames, write_video

SIDE = 32


def of_pictures(reference: Image.Image, picture: Image.Image) -> Likeness:
    return likeness(*([np.asarray(one.convert("RGB"))] for one in (reference, picture)))


def pixels(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A smooth picture: noise would not survive a codec."""
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(rows / (5 + seed) + columns / (7 + channel)) for channel in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def save(path: Path, seed: int, **size: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels(seed, **size)).save(path)
    return path


def clip(*seeds: int) -> list[np.ndarray]:
    return [pixels(seed) for seed in seeds]


def test_two_pictures(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a.png", 1), save(tmp_path / "b.webp", 2)
    (pair,), left_out = pairs_of(first, second)
    assert (pair.first, pair.second, left_out) == (first, second, [])
    found = compare_pair(pair)
    expected = of_pictures(Image.open(first), Image.open(second))
    assert (found.likeness, found.frames) == (expected, 1)
    assert found.likeness.motion is None
    ((shown_first,), (_,), (difference,)) = found.shown
    np.testing.assert_array_equal(np.asarray(shown_first), pixels(1))
    gap = np.abs(np.asarray(Image.open(first)).astype(int) - np.asarray(Image.open(second).convert("RGB"))).max(2)
    np.testing.assert_array_equal(np.asarray(difference), np.minimum(gap, 255 // AMPLIFIED) * AMPLIFIED)


@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "frames"])
def test_frames_are_read_as_they_were_written(tmp_path: Path, format: str) -> None:
    frames = clip(1, 2, 3, 4, 5, 6, 7)
    path = tmp_path / {"frames": "clip"}.get(format, f"clip.{format}")
    write_video(iter(frames), path, fps=24, crf=None, format=format, provenance=None)
    read = list(read_frames(path))
    assert len(read) == len(frames)
    if format == "frames":
        np.testing.assert_array_equal(read, frames)
    for number, (got, meant) in enumerate(zip(read, frames, strict=True)):
        gaps = [np.abs(got.astype(int) - other).mean() for other in frames]
        assert int(np.argmin(gaps)) == number, gaps  # each in its place, none twice
        assert got.shape == meant.shape


def test_two_videos(tmp_path: Path) -> None:
    clips = clip(*range(1, 8)), clip(*range(2, 9))
    paths = [tmp_path / "first", tmp_path / "second"]
    for path, frames in zip(paths, clips, strict=True):
        write_video(iter(frames), path, fps=24, crf=None, format="frames", provenance=None)
    (pair,), _ = pairs_of(*paths)
    found = compare_pair(pair)
    assert found.likeness == likeness(*clips)
    assert found.frames == 7
    assert [len(row) for row in found.shown] == [FRAMES_SHOWN] * 3
    np.testing.assert_array_equal(np.asarray(found.shown[0][-1]), clips[0][-1])


def test_folders_are_paired_by_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for seed, name in enumerate(("fox.png", "owl.jpg", "only-here.png")):
        save(one / name, seed + 1)
    for seed, name in enumerate(("fox.png", "owl.jpg", "only-there.png")):
        save(two / name, seed + 3)
    (one / "fox.json").write_text("{}")  # a report is no picture
    pairs, left_out = pairs_of(one, two)
    assert [pair.name for pair in pairs] == ["fox.png", "owl.jpg"]
    assert left_out == ["only-here.png", "only-there.png"]

    done = run_grat("compare", str(one), str(two), "--sheet", str(tmp_path / "sheet.png"), "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    expected = [of_pictures(Image.open(pair.first), Image.open(pair.second)) for pair in pairs]
    assert [pair["ssim"] for pair in found["pairs"]] == [one.ssim for one in expected]
    assert found["mean"]["ssim"] == pytest.approx(np.mean([one.ssim for one in expected]))
    assert found["mean"]["ssim_interval"] > 0
    assert "only-here.png, only-there.png" in done.err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 3 * SIDE
        assert sheet.width > 2 * SIDE
    again = run_grat("compare", str(one), str(two), "--sheet", str(tmp_path / "sheet.png"))
    assert again.code == 2
    assert "--overwrite" in again.err


def test_the_table_and_the_bare_figure(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a.png", 1), save(tmp_path / "b.png", 2)
    done = run_grat("compare", str(first), str(first))
    assert "1.000" in done.out
    assert "motion" not in done.out  # nothing moves in a picture
    bare = run_grat("compare", str(first), str(second), "--quiet")
    assert float(bare.out) == pytest.approx(of_pictures(Image.open(first), Image.open(second)).ssim, abs=1e-6)
    assert bare.err == ""


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    small, wide = save(tmp_path / "small.png", 1), save(tmp_path / "wide.png", 1, width=40)
    with pytest.raises(BadInput, match=r"small.png is 32x32 and .*wide.png is 40x32: sizes must agree"):
        compare_pair(pairs_of(small, wide)[0][0])
    with pytest.raises(BadInput, match=r"missing.png: no such file"):
        pairs_of(small, tmp_path / "missing.png")
    with pytest.raises(BadInput, match="two files, or two folders"):
        pairs_of(small, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no picture or video of the same name"):
        pairs_of(tmp_path, tmp_path / "empty")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(small.read_bytes()[:60])
    with pytest.raises(BadInput, match=r"damaged.png cannot be read as a picture"):
        compare_pair(pairs_of(small, damaged)[0][0])
    for name, count in (("short", 2), ("long", 3)):
        write_video(iter(clip(*range(count))), tmp_path / name, fps=8, crf=None, format="frames", provenance=None)
    with pytest.raises(BadInput, match=r"short has 2 frames and .*long has 3"):
        compare_pair(pairs_of(tmp_path / "short", tmp_path / "long")[0][0])
    done = run_grat("compare", str(small), str(small), "--sheet", str(tmp_path / "sheet.jpg"))
    assert (done.code, "sheet.png" in done.err) == (2, True)


class Distance(torch.nn.Module):
    """A stand-in for the package's model: the mean difference of pictures in -1 to 1."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert (net, verbose) == ("alex", False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert first.shape == second.shape
        assert first.shape[:2] == (1, 3)
        assert first.abs().max() <= 1
        return (first - second).abs().mean().view(1, 1, 1, 1)


@pytest.fixture
def lpips_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    package: Any = types.ModuleType("lpips")
    package.__spec__ = types.SimpleNamespace(name="lpips")
    package.LPIPS = Distance
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    perceptual._distance.cache_clear()
    yield tmp_path / "hub" / "checkpoints"
    perceptual._distance.cache_clear()


def test_lpips_is_told_where_its_weights_are(lpips_installed: Path) -> None:
    assert "alexnet-owt-7be5be79.pth into" in str(perceptual.obstacle())
    large, other = (Image.fromarray(pixels(seed, 64, 80)) for seed in (1, 2))
    assert of_pictures(large, other).lpips is None
    perceptual._distance.cache_clear()
    lpips_installed.mkdir(parents=True)
    (lpips_installed / "alexnet-owt-7be5be79.pth").write_bytes(b"")
    assert perceptual.obstacle() is None
    gap = np.abs(pixels(1, 64, 80).astype(float) - pixels(2, 64, 80)).mean() / 127.5
    assert of_pictures(large, other).lpips == pytest.approx(gap, rel=1e-5)
    assert of_pictures(large, large).lpips == 0
    small = Image.fromarray(pixels(1))
    assert of_pictures(small, small).lpips is None
    frames = [np.asarray(large), np.asarray(other)]
    assert likeness(frames, [frames[0], frames[0]]).lpips == pytest.approx(gap / 2, rel=1e-5)


def test_without_the_package_there_is_no_lpips() -> None:
    perceptual._distance.cache_clear()
    if perceptual.obstacle() is None:
        return  # it is here, and the test above says how it is used
    assert of_pictures(Image.fromarray(pixels(1, 64, 64)), Image.fromarray(pixels(2, 64, 64))).lpips is None
