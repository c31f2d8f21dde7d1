"""The one place that writes to the terminal: results to stdout, hints and progress to stderr.

Whatever text is shown passes `Output` or `print_error`, whoever wrote it: it is never taken for markup, and what would
steer the terminal is written out.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from enum import Enum
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.console.streams import SteadyStream, in_encoding
from grat_cli.errors import BadInput, printable

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
        """A line of the result, or several, for people and scripts, never wrapped, so that it can be copied."""
        if self.mode is not Mode.JSON:
            with self._display.paused() if self._display else nullcontext():
                print(in_encoding(printable(text, lines=True), self.console.encoding), flush=True)

    def file(self, path: Path) -> None:
        """The name of a file that was written, a line; where no person reads, byte by byte, for scripts to open it."""
        stream = sys.stdout
        if not isinstance(stream, SteadyStream) or stream.isatty():
            self.line(str(path))
        elif self.mode is not Mode.JSON:
            stream.write_name(f"{path}\n")
            stream.flush()

    def data(self, data: Mapping[str, Any] | Sequence[Any]) -> None:
        """The result for machines, whole."""
        if self.mode is Mode.JSON:
            print(json_text(data, self.console.encoding), flush=True)

    def hint(self, *texts: str | None) -> None:
        """Things worth knowing that are not the result, a line each; None is left out."""
        for text in texts if self.mode is not Mode.QUIET else ():
            if text is not None:
                self.error_console.print(text, style="dim", soft_wrap=not self.error_console.is_terminal)

    def progress(self) -> ProgressDisplay:
        """A progress display, live on a terminal, a line now and then elsewhere, silent with `--quiet`."""
        from grat_cli.console.progress import LiveProgress, LogProgress, ProgressDisplay

        if self.mode is Mode.QUIET:
            self._display = ProgressDisplay()
        else:
            self._display = LiveProgress(self) if self.error_console.is_terminal else LogProgress(self)
        return self._display


def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning on stderr: what it says, and not where in the code it stands; as `warnings.showwarning`."""
    _console(sys.stderr).print(str(message), style="dim", soft_wrap=True)


def print_error(message: str) -> None:
    """An error on stderr."""
    console = _console(sys.stderr)
    console.print("error:", style="bold red", end=" ")
    # Soft wrapping leaves the line whole where the terminal can break it, so that commands in it can be copied.
    console.print(message, soft_wrap=True)


def json_text(data: Mapping[str, Any] | Sequence[Any], encoding: str = "utf-8") -> str:
    """JSON of the same data, whole, with escapes for what would steer a terminal, or an encoding lacks."""
    text = json.dumps(data, ensure_ascii=False, indent=2)
    return re.sub(r"[^\x20-\x7e\n]", lambda found: _json_character(found[0], encoding), text)


def _json_character(character: str, encoding: str) -> str:
    is_plain = printable(character) == character and in_encoding(character, encoding) == character
    return character if is_plain else json.dumps(character)[1:-1]


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
    # A closed stream is None, which rich takes for stdout.
    return _console_class()(file=io.StringIO() if file is None else file, markup=False, highlight=False, emoji=False)


@cache
def _console_class() -> type[Console]:
    """Made when it is needed: rich takes time to load."""
    from rich.console import Console
    from rich.segment import Segment

    class ShowingConsole(Console):
        """A console on which text is never markup and steers nothing, whatever renderable it is in."""

        def render_str(self, text: str, **options: Any) -> Any:
            """Cells of tables, hints, errors: before anything is laid out."""
            return super().render_str(in_encoding(printable(text, lines=True), self.encoding), **options)

        def render(self, renderable: Any, options: Any = None) -> Any:
            """All else, such as styled text."""
            for segment in super().render(renderable, options):
                shown = segment.text if segment.control else printable(segment.text, lines=True)
                yield segment if shown == segment.text else Segment(shown, segment.style)

    return ShowingConsole
