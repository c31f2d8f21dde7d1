"""Which operators of torch ran, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def record_operators() -> Iterator[list[str]]:
    """Names of the operators that run inside."""
    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield names
