"""The command line: its commands, and what becomes of errors."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Annotated

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
from grat_cli.console.output import print_error
from grat_cli.errors import INTERRUPTED, BadInput, GratError, nearest

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
    options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    try:
        # Outside its standalone mode Typer leaves errors to us, and turns Ctrl-C and typer.Exit into a return value.
        code = typer.main.get_command(app).main(
            list(arguments), prog_name="grat", standalone_mode=False, obj=tuple(arguments)
        )
    except Exception as error:
        if "--debug" in options:
            traceback.print_exc()
        print_error(_message(error))
        return error.exit_code if isinstance(error, GratError) else BadInput.exit_code if _is_usage_error(error) else 1
    if code == INTERRUPTED:
        print_error("interrupted")
    return code if isinstance(code, int) else 0


def _is_usage_error(error: Exception) -> bool:
    """Whether Typer complains about the command line; its exceptions for that have no public name."""
    return hasattr(error, "format_message") and hasattr(error, "ctx")


def _message(error: Exception) -> str:
    if isinstance(error, GratError):
        return str(error)
    if not _is_usage_error(error):
        what = str(error) or type(error).__name__
        return (
            f"{type(error).__name__}: {what.splitlines()[0]}\nThis was not foreseen: --debug shows where it happened."
        )
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "grat"
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):  # an unknown option
        option = str(getattr(error, "option_name", ""))
        known = [name for parameter in context.command.params for name in parameter.opts] if context else []
        closest = nearest(option, [name for name in known if name.startswith("-")])
        advice = f"did you mean {closest}?" if closest else f"see {path} --help"
        return f"{path} has no option {option}: {advice}"
    text = str(getattr(error, "format_message")()).rstrip(".")  # noqa: B009
    text = f"{text[:1].lower()}{text[1:]}"
    return text if text.endswith("?") else f"{text}: see {path} --help"
