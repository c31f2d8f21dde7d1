"""Guards of the GPU tests: a kernel that hangs ends its process, with the test's name, in place of hanging forever."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from typing import Any

import pytest

SECONDS_PER_TEST = 60.0


@pytest.fixture(autouse=True)
def tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are tried in the test's own process, which is there to be ended."""
    monkeypatch.setattr("grat_kernels.trials._is_safe", lambda *_: True)


@pytest.fixture(autouse=True)
def hang_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the process if a test takes too long: no exception reaches a thread that waits for the device."""
    marker = request.node.get_closest_marker("seconds")
    seconds = marker.args[0] if marker else SECONDS_PER_TEST
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    # Where pytest captures nothing: what it holds back is lost when the process ends.
    with capture.global_and_fixture_disabled():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)
