"""`grat env`: what this machine offers."""

from __future__ import annotations

from typing import Any

from grat_cli.commands import options
from grat_cli.commands.parameters import switch
from grat_cli.console.output import bytes_text, fact_table


def env(
    *,
    clear_text_cache: bool = switch("Remove the embeddings of prompts that are kept, and do nothing else."),
    terminal: options.TerminalOptions,
) -> None:
    """Show versions, devices, the cache of texts, and what each attention backend can run here and why not."""
    from grat_cli.models import environment
    from grat_cli.models.text_cache import text_cache

    output = terminal.output()
    cache = text_cache()
    if clear_text_cache:
        before, removed = cache.describe()["bytes"], cache.clear()
        output.data({"text_cache": {**cache.describe(), "removed": removed}})
        output.show(f"{removed} prompts removed from {cache.folder}, {bytes_text(before)}")
        return
    found: dict[str, Any] = environment.describe() | {"text_cache": cache.describe()}
    output.data(found)
    facts = {"system": found["system"]}
    facts |= {name: version or "not installed" for name, version in found["versions"].items()}
    facts["ffmpeg"] = found["ffmpeg"] or "not found"
    kept = found["text_cache"]
    facts["text cache"] = f"{kept['folder']}, {kept['entries']} prompts, {bytes_text(kept['bytes'])}"
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
