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
from grat_cli.files import tensors as tensor_files
from grat_cli.files.latents import SCHEMA, load_latents, save_latents

ABOUT = {"schema": "grat.report/1", "prompt": 'waves "at night" 🌊\n', "seed": 7, "steps": [{"total_ms": 1.5}]}


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 3, 5, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "waves.latents.safetensors"


def test_latents_come_back_bit_for_bit(path: Path) -> None:
    special = latents()
    special.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38])
    save_latents(path, special, ABOUT)
    found = load_latents(path)
    assert torch.equal(found.latents.view(torch.int32), special.view(torch.int32))
    assert found.about == ABOUT | {"schema": SCHEMA}
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_exactly(dtype: torch.dtype, path: Path) -> None:
    half = latents().to(dtype)
    save_latents(path, half, ABOUT)
    found = load_latents(path).latents
    assert found.dtype == torch.float32
    assert torch.equal(found.to(dtype), half)


def test_views_are_saved_as_they_look(path: Path) -> None:
    view = torch.randn(1, 3, 4, 6, 5).transpose(3, 4)[:, :, ::2]
    save_latents(path, view, {})
    assert torch.equal(load_latents(path).latents, view)


def test_what_float32_cannot_hold_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="float64"):
        save_latents(path, latents().double(), ABOUT)
    with pytest.raises(ValueError, match=r"got \[4, 3, 5, 6\]"):
        save_latents(path, latents()[0], ABOUT)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_latents(path, latents(), {"time": float("nan")})
    assert os.listdir(path.parent) == []


def test_what_made_them_is_read_without_torch(path: Path) -> None:
    save_latents(path, latents(), ABOUT)
    assert outputs.read_provenance(path) == ABOUT | {"schema": SCHEMA}
    code = (
        "import sys\nfrom pathlib import Path\nfrom grat_cli.files import outputs\n"
        "print(outputs.read_provenance(Path(sys.argv[1]))['seed'], {'torch', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "7 set()\n"


def test_other_files_are_told_apart(path: Path) -> None:
    def about(**changes: str) -> dict[str, str]:
        return {"grat": json.dumps({"schema": SCHEMA} | changes)}

    for metadata, tensors, message in (
        (None, {"latents": latents()}, "is not a latents file of grat"),
        (about(schema="grat.latents/2"), {"latents": latents()}, r"format grat\.latents/2, .* reads grat\.latents/1"),
        (about(schema="grat.checkpoint/1"), {"latents": latents()}, "is not a latents file .* grat.checkpoint/1"),
        (about(), {"other": latents()}, "has no float32 latents"),
        (about(), {"latents": latents()[0]}, "has no float32 latents"),
        (about(), {"latents": latents().half()}, "has no float32 latents"),
        ({"grat": "{"}, {"latents": latents()}, "damaged"),
        ({"grat": "[]"}, {"latents": latents()}, "damaged"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(BadInput, match=message):
            load_latents(path)
    with pytest.raises(BadInput, match="no such file"):
        load_latents(path.with_name("missing.latents.safetensors"))
    with pytest.raises(BadInput, match="is a directory"):
        load_latents(path.parent)


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    save_latents(path, latents(), ABOUT)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 8, 9, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="damaged"):
            load_latents(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(BadInput, match="damaged"):
        load_latents(path)


@settings(deadline=None)
@given(content=st.binary(max_size=120))
def test_any_other_file_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.latents.safetensors"
    for start in (b"", struct.pack("<Q", len(content)), struct.pack("<Q", 2**63)):
        path.write_bytes(start + content)
        with pytest.raises(BadInput):
            load_latents(path)
        with pytest.raises(BadInput):
            outputs.read_provenance(path)


@pytest.mark.parametrize("header", ['{"__metadata__": 3}', "[]", '{"__metadata__": {"grat": 3}}', "null", "[" * 9000])
def test_headers_of_another_shape_are_refused(header: str, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(BadInput, match="not a safetensors file, or it is damaged"):
        tensor_files.read_about(path)


def test_files_of_others_say_nothing_about_themselves(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    assert tensor_files.read_about(path) is None
    with pytest.raises(BadInput, match="does not say how it was made"):
        outputs.read_provenance(path)


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", Path("/proc")):
        with pytest.raises(CannotWrite, match=f"cannot write {folder}/a.safetensors: no such file"):
            save_latents(folder / "a.safetensors", latents(), ABOUT)
