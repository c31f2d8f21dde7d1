"""Headers of files of weights: what they tell, and that no file, however made, does more than end in words."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import gguf
import other_layouts
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from grat_cli.files.weight_headers import GGUF_TYPES, StoredTensor, format_of, is_pointer, read_header

WEIGHTS = {"a.weight": torch.arange(4 * 64.0).reshape(4, 64), "a.bias": torch.ones(4), "b.weight": torch.ones(2, 3, 4)}
OWN_TIME = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


def test_types_of_gguf_are_those_of_its_package() -> None:
    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number: theirs[number] for number in GGUF_TYPES} == dict(GGUF_TYPES)


def test_a_safetensors_file_tells_its_tensors(tmp_path: Path) -> None:
    stored = {**WEIGHTS, "half": torch.ones(3, dtype=torch.bfloat16), "small": torch.ones(5).to(torch.float8_e4m3fn)}
    save_file(stored, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.format == "safetensors"
    assert header.tensors["a.weight"] == StoredTensor((4, 64), "F32", 1024)
    assert header.tensors["small"] == StoredTensor((5,), "F8_E4M3", 5)
    assert header.numbers == 256 + 4 + 24 + 3 + 5
    assert header.types == {"F32": 4 * 284, "BF16": 6, "F8_E4M3": 5}


def test_a_gguf_file_tells_its_tensors_and_short_facts(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "flux")
    writer.add_array("comfy.gguf.orig_shape.b.weight", [2, 3, 4])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b" * 9000])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 100)
    writer.add_bool("is.so", True)
    for name, weight in WEIGHTS.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "a.gguf")
    assert header.tensors == {
        "a.weight": StoredTensor((4, 64), "Q8_0", 4 * 2 * 34),
        "a.bias": StoredTensor((4,), "F32", 16),
        "b.weight": StoredTensor((2, 3, 4), "F32", 96),
    }
    assert header.facts["general.architecture"] == "flux"
    assert header.facts["comfy.gguf.orig_shape.b.weight"] == [2, 3, 4]
    assert header.facts["is.so"] is True
    assert "tokenizer.ggml.tokens" not in header.facts
    assert "tokenizer.ggml.scores" not in header.facts


def test_what_a_file_is_its_first_bytes_say(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for content, kind in [
        (b"GGUF\3\0\0\0", "gguf"),
        (b"PK\3\4", "pickle"),
        (b"\x80\2}", "pickle"),
        (b"\x10", "safetensors"),
    ]:
        path.write_bytes(content)
        assert format_of(path) == kind
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        format_of(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert is_pointer(path)
    with pytest.raises(ValueError, match="git lfs pull"):
        read_header(path)


def words(path: Path) -> str | None:
    """What is wrong with a file; None if nothing is. Nothing else may come of it, and not late."""
    said, began = None, time.process_time()
    try:
        read_header(path)
    except ValueError as error:
        said = str(error)
    assert said is None or said.isprintable()
    assert time.process_time() - began < 5
    return said


@given(content=st.binary(max_size=300))
@OWN_TIME
def test_any_bytes_are_a_header_or_end_in_words(tmp_path: Path, content: bytes) -> None:
    for start in (b"", b"GGUF\3\0\0\0", b"GGUF\2\0\0\0"):
        (tmp_path / "any").write_bytes(start + content)
        words(tmp_path / "any")


def changed(content: bytes, place: int, new: bytes) -> bytes:
    place %= len(content)
    return content[:place] + new + content[place + len(new) :]


@given(place=st.integers(0, 400), new=st.binary(min_size=1, max_size=8), cut=st.integers(0, 3000))
@OWN_TIME
def test_a_header_that_lies_ends_in_words(tmp_path: Path, place: int, new: bytes, cut: int) -> None:
    for name in ("a.gguf", "a.safetensors"):
        path = tmp_path / name
        if name == "a.gguf":
            other_layouts.write_gguf(path, WEIGHTS, "Q8_0")
        else:
            save_file(WEIGHTS, path)
        content = path.read_bytes()
        path.write_bytes(changed(content, place, new))
        words(path)
        path.write_bytes(content[: cut % len(content)])
        assert words(path) is not None


def of_gguf(*parts: bytes) -> bytes:
    return b"GGUF" + b"".join(parts)


def number(value: int, code: str = "Q") -> bytes:
    return struct.pack(f"<{code}", value)


def text(value: bytes) -> bytes:
    return number(len(value)) + value


START = number(3, "I") + number(0) + number(1)
ONE = number(3, "I") + number(1) + number(0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (of_gguf(START, text(b"a"), number(9, "I"), number(4, "I"), number(1 << 60)), "cut off"),
        (of_gguf(START, text(b"a"), number(9, "I"), number(8, "I"), number(1 << 60)), "cut off"),
        (of_gguf(START, text(b"a"), number(9, "I"), number(9, "I"), number(1 << 60)), "list of values of type 9"),
        (of_gguf(START, text(b"a"), number(77, "I")), "value of type 77"),
        (of_gguf(START, number(1 << 63)), "cut off"),
        (of_gguf(number(3, "I"), number(1 << 62), number(0)), "claims to hold"),
        (of_gguf(number(9, "I"), number(0), number(0)), "of version 9"),
        (of_gguf(struct.pack(">I", 3), number(0), number(0)), "big-endian"),
        (of_gguf(START, text(b"general.alignment"), number(4, "I"), number(0, "I")), "alignment is no power of two"),
        (of_gguf(START, text(b"general.alignment"), number(8, "I"), text(b"x")), "alignment is no power of two"),
        (of_gguf(ONE, text(b"a" * 300), number(1, "I")), "name too long"),
        (of_gguf(ONE, text(b"a"), number(1 << 30, "I")), "too many dimensions"),
        (of_gguf(ONE, text(b"a"), number(1, "I"), number(4), number(99, "I"), number(0)), "of the type 99"),
        (of_gguf(ONE, text(b"a"), number(1, "I"), number(33), number(8, "I"), number(0)), "whole blocks of 32"),
        (of_gguf(ONE, text(b"a"), number(1, "I"), number(1 << 63), number(0, "I"), number(0)), "absurdly large"),
        (of_gguf(ONE, text(b"a"), number(1, "I"), number(4), number(0, "I"), number(0)), "not lie within the file"),
        (of_gguf(ONE, text(b"a"), number(1, "I"), number(4), number(0, "I"), number(7)), "not lie within the file"),
        (of_gguf(ONE, text(b"\xff"), number(1, "I")), "no UTF-8"),
    ],
)
def test_lies_of_gguf_headers(tmp_path: Path, content: bytes, says: str) -> None:
    """Some of these keep the gguf package's own reader busy for ever."""
    (tmp_path / "a.gguf").write_bytes(content)
    assert says in (words(tmp_path / "a.gguf") or "")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "holds no object"),
        ({"a": 3}, "describes no tensors"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "a does not lie within the file"),
        ({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, "a does not lie within the file"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "a in its header is no tensor"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "a in its header is no tensor"),
        ({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, "a is of the type F33"),
        ({"\x1b[2J": {"dtype": "\x07", "shape": [1], "data_offsets": [0, 4]}}, "is of the type"),
    ],
)
def test_lies_of_safetensors_headers(tmp_path: Path, header: object, says: str) -> None:
    content = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(number(len(content)) + content + bytes(8))
    assert says in (words(tmp_path / "a") or "")
