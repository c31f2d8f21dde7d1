"""Processes that run command lines beside the tests, to be killed, stopped and interrupted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from command_line import Result, grat

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks, with what is imported here")


@dataclass
class Worker:
    """A process that runs a command line."""

    process: Any
    receiver: Any

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def result(self) -> Result:
        """Waits for it."""
        result = self.receiver.recv()
        self.process.join()
        return result

    def kill(self) -> None:
        """Kills it while it runs."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL


def begin(*arguments: object, at_first: Callable[[], object] = lambda: None) -> Worker:
    """Forks one, which calls `at_first` to begin with."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        # A shell's background jobs ignore Ctrl-C, and so would workers of tests that run there.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        at_first()
        sender.send(grat(*arguments))

    process = context.Process(target=run)
    process.start()
    sender.close()
    return Worker(process, receiver)


def wait_until(condition: Callable[[], object], worker: Worker) -> None:
    """Returns when it holds, while the worker runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert worker.process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
