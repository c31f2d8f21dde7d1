from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grat_cli.errors import BadInput, CannotWrite
from grat_cli.files import ffmpeg

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60).filter(
    lambda text: not text.endswith("\\")
)
KEY = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a shell script the ffmpeg of a test."""

    def install(script: str) -> Path:
        path = tmp_path / "fake-ffmpeg"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
        return path

    return install


@given(st.dictionaries(KEY, TEXT, max_size=4))
@example({"a": "=;#\\\n", "b": "\\\n", "c": "\n", "d": "", "e": "\\ "})
@example({"a": "[CHAPTER]\n[STREAM]\n;x\n#y\nb=c"})
@example({"a": '{"prompt": "a \\"fox\\" \\n 🦊"}'})
def test_any_text_comes_back_from_metadata_syntax(tags: dict[str, str]) -> None:
    assert ffmpeg.tags_of(ffmpeg.metadata_text(tags)) == tags


def test_text_that_ffmpeg_cannot_read_back_is_refused() -> None:
    for text in ("ends with \\", "a\0b"):
        with pytest.raises(ValueError, match="cannot hold this title"):
            ffmpeg.metadata_text({"title": text})


def test_metadata_syntax_is_that_of_the_manual() -> None:
    assert ffmpeg.metadata_text({"title": "a=b;c#d\\e\nf"}) == ";FFMETADATA1\ntitle=a\\=b\\;c\\#d\\\\e\\\nf\n"
    written_by_ffmpeg = ";FFMETADATA1\nmajor_brand=isom\ntitle=x\\=y\n[STREAM]\ntitle=of the stream\n"
    assert ffmpeg.tags_of(written_by_ffmpeg) == {"major_brand": "isom", "title": "x=y"}


@pytest.mark.parametrize(
    "text", ["=;#\\\n", "\\\\\n\\\n", "two\nlines\n[STREAM]\n", "\r\n\t", "“狐” 🦊", "x" * 300_000, "a=b" * 9_000]
)
def test_ffmpeg_itself_understands_the_syntax(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tags.txt"
    path.write_text(ffmpeg.metadata_text({"title": text, "last": "one"}), encoding="utf-8", newline="\n")
    found = ffmpeg.run(["-loglevel", "error", *ffmpeg.source(path, "ffmetadata"), "-f", "ffmetadata", "pipe:1"])
    tags = ffmpeg.tags_of(found.stdout.decode())
    tags.pop("encoder", None)  # which ffmpeg adds of its own
    assert tags == {"title": text, "last": "one"}


def test_encoders_that_ffmpeg_lacks_are_refused_beforehand(program) -> None:
    ffmpeg.require_encoders(["libx264", "libvpx-vp9", "libx264rgb", "gif"])
    path = program("echo ' V....D libx264   H.264'; echo ' A....D aac   AAC'")
    ffmpeg.require_encoders(["libx264"])
    with pytest.raises(BadInput, match=rf"{path} cannot encode with aac: set IMAGEIO_FFMPEG_EXE"):
        ffmpeg.require_encoders(["libx264", "aac"])


def test_a_missing_ffmpeg_is_told_from_one_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import imageio_ffmpeg

    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    with monkeypatch.context() as patch:
        patch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
        with pytest.raises(BadInput, match="ffmpeg is missing: install it again"):
            ffmpeg.require_encoders(["libx264"])
    for content, reason in ((None, "no such file"), ("text", "permission denied")):
        path = tmp_path / "ffmpeg"
        if content:
            path.write_text(content)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
        with pytest.raises(BadInput, match=f"{path} does not start .{reason}"):
            ffmpeg.run([])
        with pytest.raises(BadInput, match=f"{path} does not start .{reason}"):
            ffmpeg.FrameSink([], Path("waves.mp4"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("head -c 9 >/dev/null; echo '[x @ 5] [y] bad: oh' >&2; echo 'Conversion failed!' >&2; exit 9", "bad: oh"),
        ("yes chatter | head -c 1000000 >&2; cat >/dev/null; echo 'the end' >&2; exit 1", "failed: the end"),
        ("exit 3", "ffmpeg failed: exit status 3"),
        ("head -c 100 >/dev/null; kill -9 $$", "ended by SIGKILL"),
        ("cat >/dev/null; kill -9 $$", "ended by SIGKILL"),
        ("cat >/dev/null; echo '[out#0] write: No space left on device' >&2; echo ugh >&2; exit 1", "no space left"),
    ],
)  # fmt: skip
def test_an_ffmpeg_that_ends_is_an_error_with_its_own_words(program, script: str, message: str) -> None:
    program(script)
    with pytest.raises(CannotWrite, match=f"cannot write waves.mp4: .*{message}"):
        _write([bytes(100_000)] * 50)


def test_what_goes_wrong_elsewhere_ends_ffmpeg_and_passes_unchanged(program, tmp_path: Path) -> None:
    program(f"echo $$ > {tmp_path}/pid; exec cat >/dev/null")

    def interrupted() -> Iterator[bytes]:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            yield bytes(100_000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(interrupted())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def _write(frames: Iterable[bytes]) -> None:
    with ffmpeg.FrameSink([], Path("waves.mp4")) as sink:
        for frame in frames:
            sink.write(frame)
