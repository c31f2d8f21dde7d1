"""Guards of the GPU tests: a kernel that hangs ends its process, with the test's name, in place of hanging forever."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest

SECONDS_PER_TEST = 240


@pytest.fixture(autouse=True)
def hang_guard() -> Iterator[None]:
    """Ends the process if a test takes too long: no exception reaches a thread that waits for the device."""
    faulthandler.dump_traceback_later(SECONDS_PER_TEST, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
