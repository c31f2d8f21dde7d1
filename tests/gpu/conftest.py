"""Guards of the GPU tests: a kernel that hangs ends its process, with the test's name, in place of hanging forever."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from typing import Any

import pytest

SECONDS_PER_TEST = 240


@pytest.fixture(autouse=True)
def hang_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the process if a test takes too long: no exception reaches a thread that waits for the device."""
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    # Where pytest captures nothing: what it holds back is lost when the process ends.
    with capture.global_and_fixture_disabled():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(SECONDS_PER_TEST, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)
