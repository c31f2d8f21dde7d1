"""What files of weights are known by."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from grat_cli.files import fingerprint as module
from grat_cli.files.fingerprint import Fingerprint, fingerprint


def test_small_files_are_known_by_all_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"weights")
    assert fingerprint(file) == Fingerprint(7, hashlib.sha256(b"weights").hexdigest(), whole=True)


def test_large_files_are_known_by_size_and_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", 3 * module.MIB)
    file = tmp_path / "a.gguf"
    ends = [b"a" * module.MIB, b"z" * module.MIB]
    file.write_bytes(ends[0] + b"?" * (2 * module.MIB) + ends[1])
    known = fingerprint(file)
    assert known == Fingerprint(4 * module.MIB, hashlib.sha256(b"".join(ends)).hexdigest(), whole=False)
    file.write_bytes(ends[0] + b"?" * (2 * module.MIB) + b"y" * module.MIB)
    assert fingerprint(file) != known
