"""The one place that writes to the terminal: results to stdout, hints and progress to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from grat_cli.console.progress import ProgressDisplay


class Mode(Enum):
    """Who reads stdout."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Output:
    """Results, hints and progress of a command, for people, for machines (`--json`) or for scripts (`--quiet`).

    Raises:
        BadInput: if both machines and scripts are meant.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        if as_json and quiet:
            raise BadInput("--json and --quiet exclude each other: --json already prints nothing else on stdout")
        self.mode = Mode.JSON if as_json else Mode.QUIET if quiet else Mode.HUMAN
        self._display: ProgressDisplay | None = None

    @cached_property
    def console(self) -> Console:
        """The terminal on stdout; colours only there, and not with NO_COLOR."""
        return _console(sys.stdout)

    @cached_property
    def error_console(self) -> Console:
        """The terminal on stderr."""
        return _console(sys.stderr)

    def show(self, *renderables: RenderableType) -> None:
        """A result for people."""
        if self.mode is Mode.HUMAN:
            for renderable in renderables:
                self.console.print(renderable)

    def line(self, text: str) -> None:
        """A line of the result for people and scripts, never wrapped, so that it can be copied: a path, a name."""
        if self.mode is Mode.JSON:
            return
        with self._display.paused() if self._display else nullcontext():
            print(text, flush=True)

    def data(self, data: Mapping[str, Any] | Sequence[Any]) -> None:
        """The result for machines, whole."""
        if self.mode is Mode.JSON:
            print(json.dumps(data, ensure_ascii=False, indent=2), flush=True)

    def hint(self, *texts: str | None) -> None:
        """Things worth knowing that are not the result, a line each; None is left out."""
        for text in texts if self.mode is not Mode.QUIET else ():
            if text is not None:
                self.error_console.print(text, style="dim", markup=False, soft_wrap=not self.error_console.is_terminal)

    def progress(self) -> ProgressDisplay:
        """A progress display, live on a terminal, a line now and then elsewhere, silent with `--quiet`."""
        from grat_cli.console.progress import LiveProgress, LogProgress, ProgressDisplay

        if self.mode is Mode.QUIET:
            self._display = ProgressDisplay()
        else:
            self._display = LiveProgress(self) if self.error_console.is_terminal else LogProgress(self)
        return self._display


def print_error(message: str) -> None:
    """An error on stderr."""
    console = _console(sys.stderr)
    console.print("error:", style="bold red", end=" ")
    # Soft wrapping leaves the line whole where the terminal can break it, so that commands in it can be copied.
    console.print(message, markup=False, soft_wrap=True)


def fact_table(facts: Mapping[str, str]) -> RenderableType:
    """Names and values in two columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def bytes_text(count: float) -> str:
    """A number of bytes in binary units, such as `6.0 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _console(file: Any) -> Console:
    from rich.console import Console

    return Console(file=file, highlight=False, emoji=False)
