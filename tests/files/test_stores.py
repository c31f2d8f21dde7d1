"""Stores of outputs: whole files alone, and nothing replaced that may not be."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest

from grat_cli.errors import BadInput, CannotWrite
from grat_cli.files.stores import LOCAL, RemoteStore, Store, store_of

REPORT = json.dumps({"schema": "grat.report/1", "prompt": "a fox"})


@pytest.fixture(params=["memory", "local", "file", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Store, Path]]:
    """A store of each kind, and a folder in it: an object store, one where files are moved, and this machine's."""
    memory: Any = fsspec.filesystem("memory")
    memory.store.clear()
    address = {"memory": "memory://bucket/a", "local": f"local://{tmp_path}/a", "file": f"file://{tmp_path}/a"}
    yield store_of(address.get(request.param, str(tmp_path / "a")), "--out")
    memory.store.clear()


def test_what_is_written_is_there_for_others_too(place: tuple[Store, Path], tmp_path: Path) -> None:
    store, folder = place
    report, output = folder / "sub" / "grat-1.json", folder / "sub" / "grat-1.png"
    store.look(folder)
    for path in (report, output):
        store.require_room(path, overwrite=False)
        assert not store.exists(path)
    store.write(REPORT, report, overwrite=False)
    part = tmp_path / "part.png"
    part.write_bytes(b"a picture")
    store.place(part, output, overwrite=False)
    assert not part.exists()
    other: Store = pickle.loads(pickle.dumps(store))
    other.look(folder)
    for one in (store, other):
        assert one.exists(report)
        assert one.holds(b"a picture", output)
        assert not one.holds(b"another", output)
        assert not one.holds(b"a picture", folder / "none")
        assert one.matching(folder / "sub", "grat-*.json") == [report]
        assert one.matching(folder, "grat-*.json") == []
        missing = folder / "none.json"
        assert [(path, told["prompt"]) for path, told in one.reports([missing, report])] == [(report, "a fox")]


def test_nothing_is_replaced_but_what_is_one_s_own(place: tuple[Store, Path]) -> None:
    store, folder = place
    path = folder / "a.json"
    store.require_room(path, overwrite=False)
    store.write("1", path, overwrite=False)
    other: Store = pickle.loads(pickle.dumps(store))
    if store is not LOCAL:  # which this whole process shares
        with pytest.raises(BadInput, match="exists: use --overwrite, or another --out"):
            other.require_room(path, overwrite=False)
        with pytest.raises(CannotWrite, match="exists: use --overwrite, or another --out"):
            other.write("2", path, overwrite=False)
        other.remove(path)
    assert store.holds(b"1", path)
    store.write("3", path, overwrite=False)
    assert store.holds(b"3", path)
    other.adopt(path)
    other.write("4", path, overwrite=False)
    assert store.holds(b"4", path)
    other.write("5", path, overwrite=True)
    other.remove(path)
    fresh: Store = pickle.loads(pickle.dumps(store))
    assert not fresh.exists(path)


def test_an_upload_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = store_of(f"local://{tmp_path}/a", "--out")
    assert isinstance(store, RemoteStore)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the line is cut")

    monkeypatch.setattr(type(store._files), "mv", fail)
    with pytest.raises(CannotWrite, match=r"cannot write local:///.*/a/b.txt: the line is cut"):
        store.write("1", folder / "b.txt", overwrite=False)
    assert list((tmp_path / "a").iterdir()) == []


def test_addresses_are_shown_as_typed() -> None:
    store, folder = store_of("memory://bucket/a/", "--out")
    assert [store.shown(path) for path in (folder, folder / "b" / "c.png")] == [
        "memory://bucket/a",
        "memory://bucket/a/b/c.png",
    ]
    assert store_of("file:///tmp/a", "--out") == (LOCAL, Path("/tmp/a"))


def test_addresses_that_lead_nowhere_are_refused() -> None:
    for address, says in {
        "nowhere://a/b": r"--out nowhere://a/b: Protocol not known: nowhere: use s3://, gs:// or a folder",
        "memory://": "--out memory://: give a folder there too",
        "": "--out is empty",
    }.items():
        with pytest.raises(BadInput, match=says):
            store_of(address, "--out")


@pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(BadInput, match="--out s3://b/c: a package for s3:// is missing: pip install s3fs"):
        store_of("s3://b/c", "--out")
