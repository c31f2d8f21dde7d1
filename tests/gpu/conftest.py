"""A kernel that hangs ends the run instead of holding the machine."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from typing import Any

import pytest

# The longest test compiles a few kernels and computes some seconds.
SECONDS_PER_TEST = 300


@pytest.fixture(autouse=True)
def hang_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the process where a test takes too long, and shows where it stands.

    A kernel that waits for ever cannot be interrupted: only the end of its process takes it off the device.
    """
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(SECONDS_PER_TEST, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)
