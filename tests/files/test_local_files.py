"""Videos are local files, whatever they are called, and name no others, whatever is in them."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import grat

from grat_cli.errors import BadInput
from grat_cli.files import ffmpeg, outputs
from grat_cli.files.videos import FORMATS, SUFFIXES, probe_video, read_frames, write_video

FRAMES = np.stack([np.full((32, 48, 3), value, np.uint8) for value in (0, 90, 200)])
PROVENANCE = {"schema": "grat.report/1", "prompt": "a red fox"}
NAMES = [
    *("http:one", "https:one", "concat:a|b", "subfile,,start,0,end,64,,:one", "pipe:0", "fd:", "file:one", "data:,one"),
    *(
        "-one",
        "-i",
        "--",
        "%d",
        "one%03d",
        "%2e%2e",
        "a\nb",
        "a\\b",
        "a 'b' \"c\"",
        "a;b#c=d",
        "[in]",
        "*",
        "?",
        "狐 🦊",
    ),
    *("tee:a", "crypto:one", "async:one", "cache:one", "tcp:one", "unix:one", "http:/127.0.0.1:9/one", "~"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: names are given without one, as they are typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_written_and_read(name: str, format: str, folder: Path) -> None:
    path = Path(name + SUFFIXES[format])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(iter(FRAMES), path, fps=8, format=format, provenance=PROVENANCE)
    assert os.listdir(folder) == [path.parts[0]]
    assert os.listdir(path.parent) == [path.name]
    assert probe_video(path).frames == 3
    read = np.stack(list(read_frames(path)))
    assert np.abs(read.astype(int) - FRAMES).max() <= 12
    assert outputs.read_provenance(path) == PROVENANCE


@pytest.mark.parametrize("name", ["-one.mp4", "http:one.mp4", "concat:a|b.mp4"])
def test_commands_take_files_of_any_name(name: str) -> None:
    write_video(iter(FRAMES), Path(name), fps=8, provenance=PROVENANCE)
    shutil.copy(Path(name), "other.mp4")
    compared = grat("compare", "--json", "--", name, "other.mp4")
    assert compared.code == 0, compared
    assert grat("info", "--", name).code in (0, 2)  # so short a report is not shown whole


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and what it has been asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def hls(target: str) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"


def concat(target: str) -> str:
    return f"ffconcat version 1.0\nfile '{target}'\nduration 1\n"


def dash(target: str) -> str:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
        '<AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL><SegmentBase/></Representation>'
        "</AdaptationSet></Period></MPD>"
    )


def sdp(target: str) -> str:
    return "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"


def smooth_streaming(target: str) -> str:
    return f'<?xml version="1.0"?><SmoothStreamingMedia MajorVersion="2"><StreamIndex Url="{target}"/>'


@pytest.mark.parametrize("name", ["list.mp4", "list.webm", "list.gif", "list.m3u8", "list.mpd", "list.ffconcat"])
@pytest.mark.parametrize("playlist", [hls, concat, dash, sdp, smooth_streaming])
@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_names_another_is_no_video(
    name: str, playlist: Callable[[str], str], remote: bool, requests: tuple[str, list[str]]
) -> None:
    address, asked = requests
    write_video(iter(FRAMES), Path("secret.mp4"), fps=8, provenance=PROVENANCE)
    os.utime("secret.mp4", (1, 2))  # file systems note the first time that it is read since
    Path(name).write_text(playlist(f"{address}/secret.mp4" if remote else "secret.mp4"))
    for read in (probe_video, lambda path: list(read_frames(path))):
        with pytest.raises(BadInput, match="is not a video"):
            read(Path(name))
    assert ffmpeg.read_tags(Path(name)) == {}
    assert list(ffmpeg.read_raw(Path(name), FRAMES[0].nbytes)) == []
    assert asked == []
    assert os.stat("secret.mp4").st_atime == 1


def test_an_address_is_a_file_that_is_not_there(requests: tuple[str, list[str]]) -> None:
    address, asked = requests
    local = Path(address, "video.mp4")  # http:/127.0.0.1:…/video.mp4
    for read in (probe_video, lambda path: list(read_frames(path))):
        with pytest.raises(BadInput, match="no such file"):
            read(local)
    local.parent.mkdir(parents=True)
    write_video(iter(FRAMES), local, fps=8)
    assert len(list(read_frames(local))) == 3
    for command in (("compare", local, local, "--json"), ("info", local)):
        grat(*command)
    assert asked == []


@pytest.mark.parametrize("name", ["frame-%04d.mp4", "frame-*.mp4"])
def test_a_pattern_is_the_name_of_one_file(name: str, folder: Path) -> None:
    """Other pictures are not read through it."""
    write_video(iter(FRAMES), folder / "frames", fps=8, format="frames")
    for picture in (folder / "frames").iterdir():
        shutil.copy(picture, folder / picture.with_suffix(".mp4").name)
    with pytest.raises(BadInput, match="no such file"):
        probe_video(Path(name))
    assert list(ffmpeg.read_raw(Path(name), FRAMES[0].nbytes)) == []
    write_video(iter(FRAMES[:1]), Path(name), fps=8)
    assert len(list(read_frames(Path(name)))) == 1


def test_frames_are_png_whatever_is_in_a_folder_of_that_name(folder: Path) -> None:
    """Pillow would start another program for some formats."""
    (folder / "frames").mkdir()
    (folder / "frames" / "frame-0001.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    for read in (probe_video, lambda path: list(read_frames(path))):
        with pytest.raises(BadInput, match="cannot be read as a picture"):
            read(folder / "frames")
