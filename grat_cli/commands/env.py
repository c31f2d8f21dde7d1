"""`grat env`: what this machine offers."""

from __future__ import annotations

from grat_cli.commands import options
from grat_cli.console.output import bytes_text, fact_table


def env(terminal: options.TerminalOptions) -> None:
    """Show versions, devices, and what each attention backend can run here and why not."""
    from grat_cli.models import environment

    output = terminal.output()
    found = environment.describe()
    output.data(found)
    facts = {"system": found["system"]}
    facts |= {name: version or "not installed" for name, version in found["versions"].items()}
    facts["ffmpeg"] = found["ffmpeg"] or "not found"
    for device in found["devices"]:
        memory = f", {bytes_text(device['memory_bytes'])}" if device["memory_bytes"] else ""
        facts[device["name"]] = f"{device['model']}, {device['detail']}{memory}"
    output.show(fact_table(facts), "", f"Attention of Flux on {found['backends_on']} in {found['dtype']}:")
    answers = {
        backend["name"]: f"{'yes' if backend['able'] else 'no'}: {backend['reason']}" for backend in found["backends"]
    }
    # auto always runs; what it stands for here is the news.
    answers["auto"] = answers["auto"].removeprefix("yes: ")
    output.show(fact_table(answers))
    if terminal.quiet:
        for backend in found["backends"]:
            if backend["able"]:
                output.line(backend["name"])
