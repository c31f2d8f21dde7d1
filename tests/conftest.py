"""Shared test set-up: without a CUDA device, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os

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


# Files of few tests that take long begin first, so that no process is left with one of them at the end.
_LONG = ("test_readme.py", "test_hunyuan_demo.py", "test_keeping.py", "test_aot.py", "test_moving.py", "test_stages.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files, and skips tests marked `gpu` where there is no CUDA device."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
