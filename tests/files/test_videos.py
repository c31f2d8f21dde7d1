from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from grat_cli.errors import BadInput, CannotWrite
from grat_cli.files import ffmpeg, outputs, videos
from grat_cli.files.videos import FORMATS, SUFFIXES, probe_video, write_video

PROMPT = 'waves = "at night"; # \\ 100% [STREAM]\nDuration: 9, Video: 🌊 狐\r\n'
PROVENANCE = {"schema": "grat.report/1", "prompt": PROMPT, "seed": 7, "long": "=;#\\\n" * 9_000}


def moving(frames: int = 9, height: int = 48, width: int = 64) -> Iterator[np.ndarray]:
    """A smooth picture that moves to the right."""
    rows, columns = np.mgrid[:height, :width]
    for index in range(frames):
        wave = np.sin((columns - 2 * index) / 9) * 90 + 128
        yield np.stack([wave, wave * 0.5 + rows, 255 - wave], axis=-1).clip(0, 255).astype(np.uint8)


def decoded(path: Path) -> np.ndarray:
    """The frames of a video file as a player shows them, `[T, H, W, 3]`."""
    facts = probe_video(path)
    raw = ffmpeg.run(["-loglevel", "error", "-i", str(path), "-fps_mode", "passthrough", "-f", "rawvideo",
                      "-pix_fmt", "rgb24", "-"])  # fmt: skip
    return np.frombuffer(raw.stdout, np.uint8).reshape(-1, facts.height, facts.width, 3)


def output(folder: Path, format: str) -> Path:
    return folder / f"waves{SUFFIXES[format]}"


@pytest.mark.parametrize(("format", "codec"), [("mp4", "h264"), ("webm", "vp9"), ("gif", "gif"), ("frames", "png")])
def test_videos_come_back_with_frames_and_provenance(format: str, codec: str, tmp_path: Path) -> None:
    path = output(tmp_path, format)
    assert write_video(moving(9), path, fps=24, format=format, provenance=PROVENANCE) == 9
    facts = probe_video(path)
    assert (facts.width, facts.height, facts.frames, facts.codec) == (64, 48, 9, codec)
    if format == "frames":
        assert facts.fps is facts.seconds is None
    else:
        assert facts.seconds == pytest.approx(9 / 24, abs=0.011)
        assert facts.fps == pytest.approx(24, rel=0.03 if format == "gif" else 1e-6)
    assert outputs.read_provenance(path) == PROVENANCE
    assert os.listdir(tmp_path) == [path.name]


def test_frames_look_as_they_did(tmp_path: Path) -> None:
    frames = np.stack(list(moving(9)))
    for format, limit in (("mp4", 4), ("webm", 4), ("gif", 12)):
        path = output(tmp_path, format)
        write_video(iter(frames), path, fps=24, format=format)
        shown = decoded(path)
        assert shown.shape == frames.shape
        assert np.abs(shown.astype(int) - frames).mean() < limit, format
    write_video(iter(frames), tmp_path / "waves", fps=24, format="frames")
    names = sorted(os.listdir(tmp_path / "waves"))
    assert names == [f"frame-{number:04d}.png" for number in range(1, 10)]
    for name, frame in zip(names, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "waves" / name)), frame)


@pytest.mark.parametrize("format", ["mp4", "webm"])
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (30, 144, 200)])
def test_colours_are_those_of_the_frames(colour: tuple[int, ...], format: str, tmp_path: Path) -> None:
    """Small videos and large ones alike: the matrix is said, not guessed."""
    path = output(tmp_path, format)
    write_video([np.full((32, 32, 3), colour, np.uint8)] * 2, path, fps=24, crf=10, format=format)
    assert np.abs(decoded(path).astype(int) - colour).max() <= 3


def test_mp4_begins_with_its_index_and_is_yuv420p(tmp_path: Path) -> None:
    path = tmp_path / "waves.mp4"
    write_video(moving(), path, fps=24, provenance=PROVENANCE)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert b"yuv420p(tv, bt709" in ffmpeg.run(["-i", str(path)]).stderr
    tags = ffmpeg.read_tags(path)
    assert tags["title"] == tags["comment"] == PROMPT


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 65), (47, 65), (1, 1), (3, 2)])
@pytest.mark.parametrize("format", FORMATS)
def test_odd_sizes_are_kept_or_repeat_their_last_line(height: int, width: int, format: str, tmp_path: Path) -> None:
    path = output(tmp_path, format)
    frames = np.stack(list(moving(3, height, width)))
    write_video(iter(frames), path, fps=24, crf=None if format in ("gif", "frames") else 1, format=format)
    facts = probe_video(path)
    if format != "mp4":
        assert (facts.height, facts.width) == (height, width)
        return
    assert (facts.height, facts.width) == (height + height % 2, width + width % 2)
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert np.abs(decoded(path).astype(int) - padded).mean() < 4


def test_one_frame_is_a_video_too(tmp_path: Path) -> None:
    for format in FORMATS:
        write_video(moving(1), output(tmp_path, format), fps=24, format=format)
        assert probe_video(output(tmp_path, format)).frames == 1


@pytest.mark.parametrize("format", FORMATS)
def test_without_provenance_nothing_of_it_is_in_the_file(format: str, tmp_path: Path) -> None:
    path = output(tmp_path, format)
    write_video(moving(2), path, fps=24, format=format)
    for file in path.iterdir() if path.is_dir() else [path]:
        assert b"grat" not in file.read_bytes()
    with pytest.raises(BadInput, match=r"no waves\.json beside it"):
        outputs.read_provenance(path)
    outputs.write_json(PROVENANCE, outputs.report_path(path))
    assert outputs.read_provenance(path) == PROVENANCE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=40), extra=JSON)
def test_any_provenance_comes_back(
    format: str, prompt: str, extra: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = output(tmp_path_factory.mktemp("any"), format)
    provenance = {"schema": "grat.report/1", "prompt": prompt, "extra": extra}
    write_video(moving(1, 16, 16), path, fps=24, format=format, provenance=provenance)
    assert outputs.read_provenance(path) == provenance


@pytest.mark.parametrize("format", FORMATS)
def test_prompts_that_are_no_text_come_back_too(format: str, tmp_path: Path) -> None:
    provenance = {"schema": "grat.report/1", "prompt": "a\udcff\0b"}
    write_video(moving(1), output(tmp_path, format), fps=24, format=format, provenance=provenance)
    assert outputs.read_provenance(output(tmp_path, format)) == provenance


@pytest.mark.parametrize("name", ["-y.mp4", "a b.mp4", "http:x.mp4", "%03d.mp4", "ä'\".mp4", "x" * 240 + ".mp4"])
def test_any_file_name_will_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(moving(2), Path(name), fps=24, provenance=PROVENANCE)
    assert os.listdir(tmp_path) == [name]
    assert probe_video(Path(name)).frames == 2
    assert outputs.read_provenance(Path(name)) == PROVENANCE


@pytest.mark.parametrize("format", FORMATS)
def test_frames_pass_one_by_one(format: str, tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def frames() -> Iterator[np.ndarray]:
        for frame in moving(12):
            # The one just written, the first, which told the size, and the new one.
            assert sum(reference() is not None for reference in alive) <= 3
            alive.append(weakref.ref(frame))
            yield frame

    assert write_video(frames(), output(tmp_path, format), fps=24, format=format) == 12


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_frames_that_fail_leave_what_was_there(error: BaseException, format: str, tmp_path: Path) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield from moving(5)
        raise error

    path = output(tmp_path, format)
    if format != "frames":
        path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_video(failing(), path, fps=24, format=format, provenance=PROVENANCE)
    assert os.listdir(tmp_path) == ([] if format == "frames" else [path.name])
    assert format == "frames" or path.read_bytes() == b"old"


@pytest.mark.parametrize("format", FORMATS)
def test_frames_of_other_kinds_are_refused(format: str, tmp_path: Path) -> None:
    path = output(tmp_path, format)
    for frames, message in (
        ([], "at least one frame"),
        ([np.zeros((4, 4, 3))], "frame 1 is float64"),
        ([np.zeros((4, 4), np.uint8)], "frame 1 is uint8 .4, 4., expected"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], "frame 2 is .4, 6, 3., the first one was"),
    ):
        with pytest.raises(ValueError, match=message):
            write_video(frames, path, fps=24, format=format)
        assert os.listdir(tmp_path) == []


def test_folders_of_frames_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "waves").mkdir()
    (tmp_path / "waves" / "mine.txt").write_text("precious")
    with pytest.raises(CannotWrite, match="folders are not overwritten"):
        write_video(moving(), tmp_path / "waves", fps=24, format="frames")
    assert os.listdir(tmp_path / "waves") == ["mine.txt"]
    assert os.listdir(tmp_path) == ["waves"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("folder", ["missing", "a-file", "/proc"])
def test_folders_that_take_no_files_are_named(folder: str, format: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    path = output(tmp_path / folder, format)
    with pytest.raises(CannotWrite, match=f"cannot write {path}: (no such|not a)"):
        write_video(moving(), path, fps=24, format=format, provenance=PROVENANCE)
    assert os.listdir(tmp_path) == ["a-file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("format", FORMATS)
def test_folders_without_permission_are_named(format: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CannotWrite, match="permission denied"):
        write_video(moving(), output(tmp_path, format), fps=24, format=format)
    tmp_path.chmod(0o700)


_FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from grat_cli.errors import CannotWrite
from grat_cli.files.videos import write_video
path, format, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    write_video(noise, path, fps=24, format=format, provenance={"schema": "grat.report/1", "prompt": "x" * 900})
except CannotWrite as error:
    sys.exit(f"refused: {error}")
"""


# Each frame of a folder is a file of less than 50,000 bytes: that limit would stop nothing.
@pytest.mark.parametrize(
    ("limit", "format"),
    [(limit, name) for limit in (0, 500, 5_000, 50_000) for name in FORMATS if (limit, name) != (50_000, "frames")],
)
def test_a_full_disk_leaves_what_was_there(limit: int, format: str, tmp_path: Path) -> None:
    path = output(tmp_path, format)
    if format != "frames":
        path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, path, format, str(limit)], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == f"refused: cannot write {path}: file too large\n"
    assert os.listdir(tmp_path) == ([] if format == "frames" else [path.name])
    assert format == "frames" or path.read_bytes() == b"old"


def test_an_ffmpeg_that_dies_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text(
        '#!/bin/sh\nhead -c 50000 >/dev/null\nfor last; do :; done\necho half > "${last#file:}"\nkill -9 $$\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    (tmp_path / "out").mkdir()
    for format in ("mp4", "webm", "gif"):
        path = output(tmp_path / "out", format)
        with pytest.raises(CannotWrite, match=f"cannot write {path}: ffmpeg was ended by SIGKILL"):
            write_video(moving(200), path, fps=24, format=format)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("out", "format", "chosen"),
    [
        (None, None, "mp4"),
        ("a.webm", None, "webm"),
        ("a.GIF", None, "gif"),
        ("a.mp4", None, "mp4"),
        ("waves", None, "mp4"),
        ("a.gif", "gif", "gif"),
        ("waves", "frames", "frames"),
        ("waves.v2", "frames", "frames"),
        (None, "gif", "gif"),
        ("folder.mp4", "gif", "gif"),
    ],
)
def test_formats_follow_the_option_or_the_suffix(
    out: str | None, format: str | None, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    assert videos.choose_video_format(None if out is None else Path(out), format) == chosen


@pytest.mark.parametrize(
    ("out", "format", "message"),
    [
        ("x.mp4", "gif", r"--out x\.mp4 is no gif file: use --out x\.gif, or leave out --format"),
        ("x.mp4", "frames", r"--out x\.mp4 is no folder of frames: use --out x, or leave out --format"),
        ("x.avi", None, r"use x\.mp4"),
        (None, "mp5", "did you mean 'mp4'"),
    ],
)
def test_formats_that_contradict_the_suffix_are_refused(out: str | None, format: str | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        videos.choose_video_format(None if out is None else Path(out), format)


@pytest.mark.parametrize(
    ("format", "fps", "crf", "message"),
    [
        ("mp4", 0, None, "--fps 0"),
        ("mp4", float("nan"), None, "--fps nan"),
        ("gif", 60, None, "at most 50"),
        ("mp4", 24, 0, r"expected 1 .best. to 51"),
        ("webm", 24, 64, "to 63"),
        ("gif", 24, 20, "leave it out with --format gif"),
        ("frames", 24, 20, "leave it out with --format frames"),
    ],
)
def test_settings_that_do_not_suit_the_format_are_refused(
    format: str, fps: float, crf: int | None, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        videos.require_encodable(format, fps=fps, crf=crf)


def test_settings_that_suit_the_format_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for format in FORMATS:
        videos.require_encodable(format, fps=24, crf=None)
    videos.require_encodable("mp4", fps=23.976, crf=51)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/missing")
    videos.require_encodable("frames", fps=24, crf=None)  # needs no ffmpeg
    with pytest.raises(BadInput, match="or use --format frames"):
        videos.require_encodable("mp4", fps=24, crf=None)


def test_quality_and_rate_reach_the_file(tmp_path: Path) -> None:
    sizes = []
    for crf in (10, 30):
        path = tmp_path / f"{crf}.mp4"
        write_video(moving(), path, fps=23.976, crf=crf)
        sizes.append(path.stat().st_size)
        assert probe_video(path).fps == pytest.approx(23.976, abs=0.01)
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("format", ["mp4", "webm", "gif"])
def test_damaged_videos_are_told_from_whole_ones(format: str, tmp_path: Path) -> None:
    path = output(tmp_path, format)
    write_video(moving(9), path, fps=24, format=format, provenance=PROVENANCE)
    whole = path.read_bytes()
    if format != "webm":  # whose clusters say nothing of how many there are
        path.write_bytes(whole[: len(whole) * 9 // 10])
        with pytest.raises(BadInput, match="is not a whole video: it is damaged or cut off"):
            probe_video(path)
    for length in (0, 4, 12, 60):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"is not a video: [A-Z]"):
            probe_video(path)
        with pytest.raises(BadInput, match="does not say how it was made"):
            outputs.read_provenance(path)
    with pytest.raises(BadInput, match="no such file"):
        probe_video(tmp_path / "missing.mp4")
    with pytest.raises(BadInput, match=r"no frame-0001\.png"):
        probe_video(tmp_path)


@settings(max_examples=12, deadline=None)
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize(
    "signature", [b"GIF89a", b"\0\0\0\x18ftypisom", b"\x1aE\xdf\xa3", b"GIF89a\x04\0\x04\0\0\0\0!\xfe\x05grat="]
)
def test_any_file_after_a_signature_is_read_or_refused(
    signature: bytes, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(signature + content)
    with pytest.raises(BadInput):
        outputs.read_provenance(path)


def test_other_programs_see_the_comment_of_a_gif(tmp_path: Path) -> None:
    path = tmp_path / "waves.gif"
    write_video(moving(3), path, fps=10, format="gif", provenance={"schema": "grat.report/1", "prompt": "x" * 600})
    with Image.open(path) as picture:
        picture.seek(2)
        assert getattr(picture, "n_frames", 0) == 3
        assert picture.info["loop"] == 0
    content = path.read_bytes()
    assert content.endswith(b"\0;")
    assert json.loads(outputs._embedded(path) or b"")["prompt"] == "x" * 600


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path) -> None:
    """A minute of frames, 110 MB, passes through a process that may hold 60 MB more than it has."""
    code = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from grat_cli.files.videos import write_video\n"
        "frame = np.zeros((160, 160, 3), np.uint8)\n"
        "write_video([frame], Path(sys.argv[1]), fps=24)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count = write_video((frame.copy() for _ in range(1440)), Path(sys.argv[1]), fps=24)\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "long.mp4"], capture_output=True, text=True, check=True
    )
    count, grown_kib = map(int, done.stdout.split())
    assert count == 1440
    assert grown_kib < 60_000
