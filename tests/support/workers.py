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
import torch
from command_line import Result, grat

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks, with what is imported here")


@dataclass
class Worker:
    """A process that runs a command line."""

    process: Any
    receiver: Any

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait_until_stopped(self) -> None:
        """Returns when it has come to where it stops."""
        wait_until(self._is_stopped, self)

    def _is_stopped(self) -> bool:
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOHANG) is not None
        except ChildProcessError:  # it has ended
            return False

    def go_on(self) -> None:
        """After it has stopped."""
        self.signal(signal.SIGCONT)

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
        # After a fork torch makes its pool of threads anew when it is first asked for, which two threads must not do at
        # a time: those that load a model would.
        torch.set_num_threads(1)
        at_first()
        sender.send(grat(*arguments))

    process = context.Process(target=run)
    process.start()
    sender.close()
    return Worker(process, receiver)


def stop() -> None:
    """Stops this process, until it is told to go on."""
    os.kill(os.getpid(), signal.SIGSTOP)


def instead(
    owner: Any, name: str, act: Callable[[], object] = stop, *, when: Callable[..., bool] = lambda *_: True
) -> Callable[[], None]:
    """What makes a worker do something, and then go on, as it first comes to a function.

    Args:
        owner: a module or class.
        name: of its function.
        act: what is done before it.
        when: whether it is, by the function's arguments.
    """

    def patch() -> None:
        real, met = getattr(owner, name), []

        def first_act(*arguments: Any, **options: Any) -> Any:
            if not met and when(*arguments):
                met.append(True)
                act()
            return real(*arguments, **options)

        setattr(owner, name, first_act)

    return patch


def wait_until(condition: Callable[[], object], worker: Worker) -> None:
    """Returns when it holds, while the worker runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert worker.process.is_alive(), worker.receiver.recv()
        assert time.monotonic() < deadline
        time.sleep(0.005)
