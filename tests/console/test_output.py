"""Text of others on screen: never markup, never what steers a terminal, in any encoding, on any stream."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grat_cli.console.output import Output, fact_table, print_error
from grat_cli.console.streams import SteadyStream, in_encoding, steady_streams
from grat_cli.errors import printable, shortened

EVIL = "[/] [red]x[/red] :fox: \x1b]0;title\x07 \x1b[31m\x9b5m \u202e\u2066 \udcff \r\b\x00\t\u2028 狐 👩‍🚀"
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
texts = st.one_of(st.text(max_size=40), st.text(alphabet=EVIL + BIDI + "[]/\\abc", max_size=40))


def steering(text: str) -> list[str]:
    """Characters that do something to a terminal but show themselves."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    return [one for one in text if one != "\n" and (unicodedata.category(one) in kinds or one in BIDI)]


class Terminal:
    """stdout and stderr of an encoding, as bytes."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.out, self.err = (io.TextIOWrapper(io.BytesIO(), encoding, newline="\n") for _ in range(2))

    @contextmanager
    def used(self) -> Iterator[None]:
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = self.out, self.err
        try:
            with steady_streams():
                yield
        finally:
            sys.stdout, sys.stderr = before

    def shown(self) -> tuple[str, str]:
        out, err = (stream.buffer.getvalue().decode(stream.encoding) for stream in (self.out, self.err))  # type: ignore
        return out, err


def show_everywhere(text: str, encoding: str = "utf-8") -> tuple[str, str]:
    """Text in every place that a command has for it."""
    from rich.table import Table
    from rich.text import Text

    terminal = Terminal(encoding)
    with terminal.used():
        output = Output()
        table = Table(title=text)
        table.add_column(text)
        table.add_row(text)
        table.add_row(Text(text))
        output.show(fact_table({"prompt": text, text: "x"}), table, text, Text(text, style="bold"))
        output.line(text)
        output.hint(text)
        print_error(text)
        with output.progress() as progress:
            progress.phase(text)
            progress.note(text)
    return terminal.shown()


@given(texts)
@example(EVIL)
@example("\x1b[2J")
def test_text_is_shown_and_steers_nothing(text: str) -> None:
    for shown in show_everywhere(text):
        assert steering(shown) == []
    out, err = show_everywhere(f"<{text.replace(chr(10), '')}>")
    expected = printable(f"<{text.replace(chr(10), '')}>")
    for shown in (out, err):  # tables break lines, but leave nothing out
        assert re.sub(r"\s", "", expected) in re.sub(r"\s", "", shown)


@given(texts, st.sampled_from(["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis", "utf-8", "utf-16"]))
@example("± × … “狐” ─", "ascii")
def test_no_encoding_is_too_small(text: str, encoding: str) -> None:
    for shown in show_everywhere(text, encoding):
        assert steering(shown) == []


def test_what_an_encoding_lacks_is_written_in_ascii() -> None:
    assert in_encoding("1.5 ± 0.2 × é “狐”", "ascii") == '1.5 +/- 0.2 x \\xe9 "\\u72d0"'
    assert in_encoding("1.5 ± 0.2 × é “狐”", "latin-1") == '1.5 ± 0.2 × é "\\u72d0"'
    assert in_encoding("狐", None) == in_encoding("狐", "utf-8") == "狐"
    assert in_encoding("狐", "no-such-encoding") == "\\u72d0"


@given(st.recursive(texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)))
@example(EVIL)
def test_machines_get_all_of_it_in_any_encoding(data: Any) -> None:
    for encoding in ("utf-8", "ascii", "latin-1"):
        terminal = Terminal(encoding)
        with terminal.used():
            Output(as_json=True).data({"data": data})
        out, _ = terminal.shown()
        assert steering(out) == []
        assert json.loads(out) == {"data": data}
    terminal = Terminal()
    with terminal.used():
        Output(as_json=True).data({"prompt": "ein Füchslein, 狐 🦊"})
    assert "Füchslein, 狐 🦊" in terminal.shown()[0]


def test_scripts_get_names_byte_by_byte_and_people_readable_ones(tmp_path: Path) -> None:
    name = os.fsdecode(b"fo\xff\x1b[2J x.png")
    terminal = Terminal()
    with terminal.used():
        Output(quiet=True).file(tmp_path / name)
    terminal.out.flush()
    assert terminal.out.buffer.getvalue() == os.fsencode(tmp_path / name) + b"\n"  # type: ignore
    terminal = Terminal()
    terminal.out.isatty = lambda: True  # type: ignore
    with terminal.used():
        Output().file(tmp_path / name)
    assert terminal.shown()[0] == f"{tmp_path}/fo\\udcff\\x1b[2J x.png\n"


class Failing(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "obstacle", "reader_left"),
    [
        (OSError(28, "No space left on device"), "no space left on device", False),
        (OSError(5, "Input/output error"), "input/output error", False),
        (BrokenPipeError(32, "Broken pipe"), None, True),
        (ValueError("I/O operation on closed file"), "i/o operation on closed file", False),
    ],
)
def test_streams_that_fail_fail_nobody(
    error: Exception, obstacle: str | None, reader_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(error))
    monkeypatch.setattr(sys, "stderr", Failing(error))
    with steady_streams() as out:
        output = Output()
        output.show("a")
        output.line("b")
        output.hint("c")
        print_error("d")
        with output.progress() as progress:
            progress.phase("load")
    assert (out.obstacle, out.reader_left) == (obstacle, reader_left)


def test_a_closed_stderr_leaves_stdout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    for wrapped in (False, True):
        out.seek(0)
        out.truncate()
        if wrapped:
            with steady_streams():
                _tell()
        else:
            _tell()
        assert json.loads(out.getvalue()) == {"a": 1}


def _tell() -> None:
    output = Output(as_json=True)
    output.hint("a hint")
    with output.progress() as progress:
        progress.phase("load")
        progress.note("a note")
    print_error("an error")
    output.data({"a": 1})


def test_a_stream_that_is_none_takes_everything() -> None:
    stream = SteadyStream(None)
    stream.write("a")
    stream.write_name("b")
    stream.flush()
    assert (stream.isatty(), stream.failure) == (False, None)


@given(st.text(max_size=400), st.integers(1, 100))
def test_causes_are_cut_between_words(text: str, longest: int) -> None:
    cut = shortened(text, longest)
    assert len(cut) <= longest + 255 + len(" ...")
    if cut != text:
        kept = cut.removesuffix(" ...")
        assert text.startswith(kept)
        assert text[len(kept)] == " " or len(text.split(" ")[-1]) > 255 or " " not in text[:longest].strip()


def test_a_path_in_a_cause_is_whole() -> None:
    path = "/home/somebody/models/a/long/way/down/to/the/folder/of/the/transformer/diffusion_pytorch_model.safetensors"
    cause = f"Error while deserializing header: the file {path} at {path} has a header that is too large for it"
    assert path in shortened(cause)
    assert shortened(cause).count(path) == 2
