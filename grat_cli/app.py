"""The command line: its commands, and what becomes of errors."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from grat_cli import __version__
from grat_cli.commands.attend import attend
from grat_cli.commands.batch import batch
from grat_cli.commands.bench import bench
from grat_cli.commands.compare import compare
from grat_cli.commands.decode import decode
from grat_cli.commands.env import env
from grat_cli.commands.image import image
from grat_cli.commands.info import info
from grat_cli.commands.parameters import with_options
from grat_cli.commands.plan import plan
from grat_cli.commands.presets import presets
from grat_cli.commands.rerun import rerun
from grat_cli.commands.resume import resume
from grat_cli.commands.tune import tune
from grat_cli.commands.video import video
from grat_cli.console.output import print_error, print_warning
from grat_cli.console.streams import SteadyStream, steady_streams
from grat_cli.errors import INTERRUPTED, BadInput, CannotWrite, GratError, first_line, nearest, printable

# As of every program that writes to one that has ended, such as head.
_READER_LEFT = 128 + 13

app = typer.Typer(
    name="grat",
    help="Large pictures from Flux and videos from HunyuanVideo, several times faster than with full attention, "
    "without training.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (image, video, batch, resume, rerun, decode, plan, attend, tune, bench, compare, presets, env, info):
    app.command()(with_options(command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"grat {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog="First picture, without download: grat image 'a red fox in the snow'")
def grat(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code; prints the error, if any, on stderr.

    Args:
        arguments: as typed, without the program's name.
    """
    with steady_streams() as out, warnings.catch_warnings():
        warnings.showwarning = print_warning
        code = _run(arguments)
        out.flush()
        return code or _code_of(out)


def _run(arguments: Sequence[str]) -> int:
    options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    try:
        # Outside its standalone mode Typer leaves errors to us, and turns Ctrl-C and typer.Exit into a return value.
        code = typer.main.get_command(app).main(
            list(arguments), prog_name="grat", standalone_mode=False, obj=tuple(arguments)
        )
    except SystemExit as ended:  # of a command that others have run: all is said
        code = ended.code
        return code if isinstance(code, int) else 0
    except Exception as error:
        if "--debug" in options:
            sys.stderr.write(printable(traceback.format_exc(), lines=True))
        print_error(_message(error, arguments))
        return error.exit_code if isinstance(error, GratError) else BadInput.exit_code if _is_usage_error(error) else 1
    if code == INTERRUPTED:
        print_error("interrupted")
    return code if isinstance(code, int) else 0


def _code_of(out: SteadyStream) -> int:
    """Of a run that is done, but could not say so."""
    if out.obstacle is not None:
        print_error(f"what was to be printed is lost: cannot write to stdout: {out.obstacle}")
        return CannotWrite.exit_code
    return _READER_LEFT if out.reader_left else 0


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """While it lasts, what schedulers and closed terminals send (SIGTERM, SIGHUP) does what Ctrl-C does.

    Terminals and shells may each send one, schedulers several: those after the first change nothing, so that what is
    done can be kept. What is to be ignored (nohup) stays ignored.
    """
    names = ("SIGTERM", "SIGHUP")  # Windows lacks one
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        numbers = []
    told = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise KeyboardInterrupt

    before: dict[Any, Any] = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _is_usage_error(error: Exception) -> bool:
    """Whether Typer complains about the command line; its exceptions for that have no public name."""
    return hasattr(error, "format_message") and hasattr(error, "ctx")


def _message(error: Exception, arguments: Sequence[str]) -> str:
    if isinstance(error, GratError):
        return str(error)
    if not _is_usage_error(error):
        return f"{type(error).__name__}: {first_line(error)}\nThis was not foreseen: --debug shows where it happened."
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "grat"
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):  # an unknown option
        option = str(getattr(error, "option_name", ""))
        known = [name for parameter in context.command.params for name in parameter.opts] if context else []
        closest = nearest(option, [name for name in known if name.startswith("-")])
        advice = f"did you mean {closest}?" if closest else f"see {path} --help"
        return f"{path} has no option {option}: {advice}{_after_dashes(context, option, arguments)}"
    text = str(getattr(error, "format_message")()).rstrip(".")  # noqa: B009
    text = f"{text[:1].lower()}{text[1:]}"
    return text if text.endswith("?") else f"{text}: see {path} --help"


def _after_dashes(context: Any, option: str, arguments: Sequence[str]) -> str:
    """A line for who meant a prompt: what begins with a dash and stands first, or holds a space."""
    parameters = context.command.params if context else ()
    wanted = next((one for one in parameters if one.param_type_name == "argument" and one.required), None)
    meant = next((number for number, one in enumerate(arguments) if one.startswith(option)), None)
    if wanted is None or meant is None or not (meant == 1 or " " in arguments[meant]):
        return ""
    others = "" if len(arguments) == 2 else " ..."
    typed = f"{context.command_path}{others} -- {shlex.quote(arguments[meant])}"
    return f"\na {wanted.metavar} that begins with a dash goes to the end, after --: {typed}"
