"""Tensors in files: bit for bit, whole or not at all, and told apart from files of others and damaged ones."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from grat_cli.errors import BadInput, CannotWrite
from grat_cli.files import outputs
from grat_cli.files import whole as whole_files
from grat_cli.files.tensors import read_about, read_tensors, write_tensors

SCHEMA, WHAT = "grat.latents/2", "a latents file"
ABOUT = {"schema": SCHEMA, "prompt": 'waves "at night" 🌊\n', "seed": 7, "steps": [{"total_ms": 1.5}]}


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 3, 5, 6, generator=torch.Generator().manual_seed(seed))


def read(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, SCHEMA, WHAT)[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "waves.latents.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_come_back_bit_for_bit(path: Path, dtype: torch.dtype) -> None:
    special = latents().to(dtype)
    special.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38], dtype=dtype)
    state = torch.Generator().manual_seed(3).get_state()
    write_tensors(path, {"latents": special, "state": state}, ABOUT)
    held, about = read_tensors(path, SCHEMA, WHAT)
    assert held["latents"].dtype == dtype
    assert torch.equal(held["latents"].view(torch.uint8), special.view(torch.uint8))
    assert torch.equal(held["state"], state)
    assert about == ABOUT
    assert os.listdir(path.parent) == [path.name]


def test_views_are_saved_as_they_look(path: Path) -> None:
    view = torch.randn(1, 3, 4, 6, 5).transpose(3, 4)[:, :, ::2]
    write_tensors(path, {"latents": view}, ABOUT)
    assert torch.equal(read(path)["latents"], view)


def test_what_is_no_json_is_neither_written_nor_read(path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_tensors(path, {"latents": latents()}, {"time": float("nan")})
    assert os.listdir(path.parent) == []
    for number in ("NaN", "-Infinity", "1e999", "9" * 5000):
        save_file({"latents": latents()}, path, {"grat": f'{{"schema": "{SCHEMA}", "time": [{number}]}}'})
        with pytest.raises(BadInput, match="damaged"):
            read(path)


def test_what_made_them_is_read_without_torch(path: Path) -> None:
    write_tensors(path, {"latents": latents()}, ABOUT)
    assert outputs.read_provenance(path) == ABOUT
    code = (
        "import sys\nfrom pathlib import Path\nfrom grat_cli.files import outputs\n"
        "print(outputs.read_provenance(Path(sys.argv[1]))['seed'], {'torch', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "7 set()\n"


def test_other_files_are_told_apart(path: Path) -> None:
    def about(**changes: str) -> dict[str, str]:
        return {"grat": json.dumps({"schema": SCHEMA} | changes)}

    for metadata, message in (
        (None, "is not a latents file of grat"),
        (about(schema="grat.latents/3"), r"format grat\.latents/3, .* reads grat\.latents/2"),
        (about(schema="grat.checkpoint/2"), r"is not a latents file .* it says grat\.checkpoint/2"),
        (about(schema="other/1"), "is not a latents file of grat: it says other/1"),
        ({"grat": "{"}, "damaged"),
        ({"grat": "[]"}, "damaged"),
    ):
        save_file({"latents": latents()}, path, metadata)
        with pytest.raises(BadInput, match=message):
            read(path)
    path.write_text("text")
    with pytest.raises(BadInput, match="not a safetensors file, or it is damaged"):
        read(path)
    with pytest.raises(BadInput, match="no such file"):
        read(path.with_name("missing.latents.safetensors"))
    with pytest.raises(BadInput, match="is a directory"):
        read(path.parent)


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    write_tensors(path, {"latents": latents()}, ABOUT)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="damaged"):
            read(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(BadInput, match="damaged"):
        read(path)


@settings(deadline=None)
@given(content=st.binary(max_size=120))
def test_any_other_file_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.latents.safetensors"
    for start in (b"", struct.pack("<Q", len(content)), struct.pack("<Q", 2**63)):
        path.write_bytes(start + content)
        with pytest.raises(BadInput):
            read(path)
        with pytest.raises(BadInput):
            outputs.read_provenance(path)


@pytest.mark.parametrize("header", ['{"__metadata__": 3}', "[]", '{"__metadata__": {"grat": 3}}', "null", "[" * 9000])
def test_headers_of_another_shape_are_refused(header: str, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(BadInput, match="not a safetensors file, or it is damaged"):
        read_about(path)


def test_files_of_others_say_nothing_about_themselves(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    assert read_about(path) is None
    with pytest.raises(BadInput, match="does not say how it was made"):
        outputs.read_provenance(path)


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", Path("/proc")):
        with pytest.raises(CannotWrite, match=f"cannot write {folder}/a.safetensors: no such file"):
            write_tensors(folder / "a.safetensors", {"latents": latents()}, ABOUT)


def test_content_and_name_are_on_the_disk_before_it_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content first, then the name, then the folder that has it."""
    calls: list[str] = []
    sync, replace, link = os.fsync, os.replace, os.link

    def fsync(descriptor: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    def name(source: Path, target: Path) -> None:
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(whole_files.os, "fsync", fsync)
    monkeypatch.setattr(whole_files.os, "replace", rename)
    monkeypatch.setattr(whole_files.os, "link", name)
    for seed in (1, 2):
        write_tensors(path, {"latents": latents(seed)}, ABOUT)
    assert calls == ["sync file", "link", "sync folder", "sync file", "replace", "sync folder"]


def test_a_failing_disk_keeps_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(path, {"latents": latents(1)}, ABOUT)

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(whole_files.os, "fsync", fails)
    with pytest.raises(CannotWrite, match="input/output error"):
        write_tensors(path, {"latents": latents(2)}, ABOUT)
    assert torch.equal(read(path)["latents"], latents(1))
    assert os.listdir(path.parent) == [path.name]
