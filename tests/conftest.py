"""Shared test set-up: without a CUDA device, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The interpreter is chosen when triton is first imported. Ahead-of-time compilation is tested in processes without it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests are small: a second thread costs more than it brings, on a busy machine ten times as much.
torch.set_num_threads(1)

settings.register_profile("grat", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("grat")


@pytest.fixture(autouse=True, scope="session")
def cache_of_all_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is read from the user's cache, nor written to it, by processes that tests start neither."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("cache")
    patch.setenv("GRAT_CACHE", str(folder / "of fixtures"))
    yield folder
    patch.undo()


@pytest.fixture(autouse=True)
def cache_of_a_test(cache_of_all_tests: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cache that begins empty with each test; the folder is made when something is kept there."""
    with pytest.MonkeyPatch.context() as patch:
        folder = cache_of_all_tests / sha256(request.node.nodeid.encode()).hexdigest()[:16]
        patch.setenv("GRAT_CACHE", str(folder))
        yield folder


# Files of few tests that take long begin first, so that no process is left with one of them at the end.
_LONG = (
    "test_combinations.py",
    "test_runs.py",
    "test_aot.py",
    "test_readme.py",
    "test_hunyuan_demo.py",
    "test_memory.py",
    "test_large_offsets.py",
    "test_keeping.py",
    "test_moving.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files, and skips tests marked `gpu` where there is no CUDA device."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
