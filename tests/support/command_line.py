"""Runs command lines in this process, for tests."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from grat_cli.app import run


@dataclass(frozen=True)
class Result:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """stdout read as JSON."""
        return json.loads(self.out)


def grat(*arguments: object) -> Result:
    """Runs `grat` with the arguments; its output is not a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def refusal(*arguments: object, code: int = 2) -> str:
    """The error of a command line that must fail with `code`, one or two lines on stderr and nothing on stdout."""
    result = grat(*arguments)
    assert (result.code, result.out) == (code, ""), result
    *hints, _ = result.err.split("error: ")
    message = result.err.removeprefix("error: ".join(hints)).removeprefix("error: ").strip()
    assert len(message.splitlines()) <= 2, message
    assert "Traceback" not in result.err
    return message
