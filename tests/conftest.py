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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
