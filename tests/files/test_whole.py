"""Files take their place whole, and never that of something which this process has not made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grat_cli.errors import CannotWrite
from grat_cli.files import outputs, whole
from grat_cli.files.tensors import write_tensors
from grat_cli.files.videos import write_video
from grat_cli.files.whole import adopt, claimed, discard_leftovers, part_of, place, remove, write_whole

TOKEN = "0123456789abcdef"
FRAMES = [np.zeros((16, 16, 3), np.uint8)] * 2


def write(path: Path, content: bytes, **options: Any) -> None:
    write_whole(path, lambda file: file.write(content), **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.bin": lambda path: write(path, b"new"),
    "a.png": lambda path: outputs.write_png(Image.new("RGB", (8, 8)), path, None),
    "a.json": lambda path: outputs.write_json({}, path),
    "a.svg": lambda path: outputs.write_text("new", path),
    "a.latents.safetensors": lambda path: write_tensors(path, {}, {"schema": "grat.latents/1"}),
    "a.mp4": lambda path: write_video(FRAMES, path, fps=8),
    "a.webm": lambda path: write_video(FRAMES, path, fps=8, format="webm"),
    "a.gif": lambda path: write_video(FRAMES, path, fps=8, format="gif"),
    "a": lambda path: write_video(FRAMES, path, fps=8, format="frames"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("links", [True, False])
def test_no_writer_takes_the_place_of_what_came_meanwhile(
    name: str, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the name after it was found free, and before what was made is put there."""
    path = tmp_path / name
    real = whole.place

    def no_link(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def late(part: Path, target: Path, **options: Any) -> None:
        target.write_bytes(b"of another process")
        real(part, target, **options)

    if not links:
        monkeypatch.setattr(whole.os, "link", no_link)
    for module in (whole, sys.modules["grat_cli.files.videos"]):
        monkeypatch.setattr(module, "place", late)
    with pytest.raises(CannotWrite, match="it exists: use --overwrite, or another --out"):
        WRITERS[name](path)
    assert path.read_bytes() == b"of another process"
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("links", [True, False])
def test_its_own_file_a_process_may_replace_and_remove(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(whole.os, "link", no_link)
    path = tmp_path / "a.json"
    for content in (b"first", b"second"):
        write(path, content)
    assert path.read_bytes() == b"second"
    path.write_bytes(b"edited since")
    with pytest.raises(CannotWrite, match="it exists"):
        write(path, b"third")
    remove(path)
    assert path.read_bytes() == b"edited since"
    write(path, b"third", overwrite=True)
    remove(path)
    assert names(tmp_path) == []
    path.write_bytes(b"of an earlier process")
    adopt(path)
    remove(path)
    assert names(tmp_path) == []


def test_folders_take_the_place_of_nothing(tmp_path: Path) -> None:
    for make in (lambda path: path.mkdir(), lambda path: path.write_bytes(b"x"), lambda path: path.symlink_to("gone")):
        with part_of(tmp_path / "frames", folder=True) as part:
            (part / "frame").write_bytes(b"new")
            make(tmp_path / "frames")
            with pytest.raises(FileExistsError):
                place(part, tmp_path / "frames")
        assert names(tmp_path) == ["frames"]
        target = tmp_path / "frames"
        target.rmdir() if target.is_dir() else target.unlink()


# Many processes write the same name at the same moment; each says whether it got it.
_RACE = """
import sys
from pathlib import Path
from grat_cli.errors import CannotWrite
from grat_cli.files.whole import part_of, place, write_whole
folder, number = Path(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
sys.stdin.readline()
won = []
for turn in range(40):
    path = folder / f"file-{turn}"
    try:
        write_whole(path, lambda file: file.write(number))
        won.append(path.name)
    except CannotWrite:
        pass
    path = folder / f"folder-{turn}"
    try:
        with part_of(path, folder=True) as part:
            (part / "content").write_bytes(number)
            place(part, path)
        won.append(path.name)
    except FileExistsError:
        pass
print(*won)
"""


def test_of_processes_that_take_the_same_name_one_gets_it(tmp_path: Path) -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers: list[Any] = [subprocess.Popen([sys.executable, "-c", _RACE, tmp_path, str(n)], **pipes) for n in range(4)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = {number: racer.communicate()[0].split() for number, racer in enumerate(racers)}
    assert sorted(name for taken in won.values() for name in taken) == names(tmp_path)
    assert len(names(tmp_path)) == 80
    for number, taken in won.items():
        for name in taken:
            path = tmp_path / name
            content = path.read_bytes() if path.is_file() else (path / "content").read_bytes()
            assert content == str(number).encode()


def test_parts_have_names_that_nobody_foresees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for _ in range(20):
        with part_of(tmp_path / "a.png") as part:
            seen.add(part.name)
    assert len(seen) == 20
    # A link that lies there, by whatever chance, is not followed.
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    monkeypatch.setattr(whole.secrets, "token_hex", lambda _: TOKEN)
    (tmp_path / f".a.png.{TOKEN}.part").symlink_to(precious)
    with pytest.raises(CannotWrite):
        write(tmp_path / "a.png", b"new")
    assert precious.read_bytes() == b"precious"
    assert names(tmp_path) == [f".a.png.{TOKEN}.part", "precious"]


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(tmp_path: Path) -> None:
    """In containers the process is often number 1 every time."""
    for name in (f".a.png.{os.getpid()}.part", f".a.png.{TOKEN}.part"):
        (tmp_path / name).write_bytes(b"half")
    outputs.refuse_unwritable([tmp_path / "a.png"], overwrite=False)
    write(tmp_path / "a.png", b"new")
    assert (tmp_path / "a.png").read_bytes() == b"new"


_WRITER = """
import sys, time
from pathlib import Path
from grat_cli.files.whole import part_of
with part_of(Path(sys.argv[1])), part_of(Path(sys.argv[1]), folder=True) as part:
    (part / "frame").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_only_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    path, precious = tmp_path / "a.mp4", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"precious")
    others = [
        ".a.mp4.part",
        f".a.mp4.{TOKEN}",
        f".a.mp4.{TOKEN.upper()}.part",
        f".b.mp4.{TOKEN}.part",
        ".a.mp4.12.part",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"not of grat, or of another output")
    (tmp_path / f".a.mp4.{TOKEN}.part").symlink_to(precious)
    kept = [*others, f".a.mp4.{TOKEN}.part", "precious"]
    with subprocess.Popen([sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        written = set(names(tmp_path)) - set(kept)
        assert len(written) == 2
        discard_leftovers(path)
        assert set(names(tmp_path)) == {*kept, *written}
        writer.kill()
    discard_leftovers(path)
    assert names(tmp_path) == sorted(kept)
    assert names(precious) == ["file"]


_CLAIMER = """
import sys, time
from pathlib import Path
from grat_cli.files.whole import claimed
with claimed([Path(sys.argv[1])]):
    print("claimed", flush=True)
    time.sleep(600)
"""


def test_an_output_is_claimed_while_its_process_runs(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with subprocess.Popen([sys.executable, "-c", _CLAIMER, path], stdout=subprocess.PIPE, text=True) as claimer:
        assert claimer.stdout is not None
        assert claimer.stdout.readline() == "claimed\n"
        with claimed([tmp_path / "b.mp4"]), pytest.raises(CannotWrite, match=r"another grat is making .*a\.mp4"):
            claimed([path]).__enter__()
        claimer.kill()
    with claimed([path, path]):  # a killed process claims nothing
        pass
    assert names(tmp_path) == []
