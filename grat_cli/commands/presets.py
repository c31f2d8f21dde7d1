"""`grat presets`: list, show and check presets."""

from __future__ import annotations

from typing import Annotated, Any

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, only
from grat_cli.console.output import Mode, Output


def presets(
    name: Annotated[
        str | None,
        argument(
            "NAME",
            "A preset to show, a YAML file to check, or flux, demo or hunyuan to list what there is for it.",
            options.complete_preset,
        ),
    ] = None,
    *,
    attention: Annotated[options.AttentionOptions, only("set_items")],
    terminal: options.TerminalOptions,
) -> None:
    """List the presets, show one resolved, or check a preset file."""
    from grat_cli.presets import load_preset, preset_names, preset_yaml, resolve_preset

    output = terminal.output()
    shipped = [load_preset(shipped_name) for shipped_name in preset_names()]
    if name is not None and name not in {preset.model for preset in shipped}:
        preset = resolve_preset(load_preset(name), set_items=attention.set_items or ())
        output.data(preset.model_dump(mode="json"))
        if output.mode is Mode.QUIET:
            output.line(preset.name)
        else:
            output.line(preset_yaml(preset).rstrip())
        return
    shown = [preset for preset in shipped if name in (None, preset.model)]
    output.data([preset.model_dump(mode="json") for preset in shown])
    output.show(_table(shown))
    if output.mode is Mode.QUIET:
        for preset in shown:
            output.line(preset.name)
    if name == "demo":
        _show_vocabulary(output)
    elif name is None:
        output.hint("grat presets NAME shows one whole; grat plan NAME shows what it attends.")


def _table(shown: list[Any]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("what it attends")
    for preset in shown:
        table.add_row(preset.name, preset.description.partition(". ")[0].rstrip("."))
    return table


def _show_vocabulary(output: Output) -> None:
    from grat_cli.console.output import fact_table
    from grat_cli.demo import video_vocabulary, vocabulary

    for medium, known in (("image", vocabulary()), ("video", video_vocabulary())):
        output.show(f"For grat {medium} the demo model knows these words; of others it makes nothing.", "")
        output.show(fact_table({kind: ", ".join(words) for kind, words in known.items()}), "")
