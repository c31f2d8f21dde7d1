"""What stands on the HTML page of a benchmark: plots, tables, conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from grat_cli.bench import figures
from grat_cli.bench.plots import looks_of, plot_across_cases, plots
from grat_cli.bench.results import BenchResult, Case
from grat_cli.pages.html import embedded, render
from grat_cli.pages.plots import Look, settings

_COUNTS = {
    "heads": "heads",
    "head_dim": "channels a head",
    "layers": "layers",
    "steps": "steps",
    "repetitions": "repetitions",
}


@settings()
def as_html(result: BenchResult, contact_sheet: bytes | None = None) -> str:
    """The page.

    Args:
        result: what was measured.
        contact_sheet: the pictures side by side, as PNG, JPEG or WebP, to embed. Without it, the page refers to
            `result.contact_sheet` beside it.

    Raises:
        ValueError: if the contact sheet is of another type.
    """
    looks = looks_of(result)
    shown_looks = {figures.plain(name): look for name, look in looks.items()}
    counts = [f"{result.settings[name]} {unit}" for name, unit in _COUNTS.items() if name in result.settings]
    day = result.created[:10]
    return render(
        "bench.html",
        title=figures.title(result),
        result=result,
        nothing=figures.NOTHING,
        day=day,
        facts=[result.dtype, *counts, day],
        across_cases=plot_across_cases(result, looks),
        cases=[_case(result, case, looks, f"case-{number}") for number, case in enumerate(result.cases, start=1)],
        contact_sheet=quote(result.contact_sheet or "") if contact_sheet is None else embedded(contact_sheet),
        variants=[(shown_looks[name], name, text) for name, text in figures.descriptions(result).items()],
        absent={absent.name: absent.reason for absent in result.absent},
        conditions=_conditions(result),
        meanings={
            column.title: column.meaning
            for case in result.cases
            for column in figures.columns(result.level, case, figures.ordered(case))
        },
    )


def _case(result: BenchResult, case: Case, looks: Mapping[str, Look], identifier: str) -> dict[str, Any]:
    rows = figures.ordered(case)
    columns = figures.columns(result.level, case, rows)
    paddings = [column.padding() for column in columns]
    return {
        "id": identifier,
        "title": case.title,
        "finding": figures.finding(result.level, case),
        "tokens": figures.tokens_text(case),
        "plots": plots(result.level, case, looks, identifier),
        "columns": columns,
        "names_width": round(min(17.0, 2.5 + 0.62 * max((len(figures.label(row)) for row in rows), default=0)), 1),
        "with_kernels": any(row.kernel for row in rows),
        "rows": [
            {
                "role": row.role,
                "look": looks[row.name],
                "label": figures.label(row),
                "remark": figures.remark(row),
                "kernel": row.kernel,
                "skipped": row.skipped,
                "cells": [
                    _cell(column.cells[index], padding[index])
                    for column, padding in zip(columns, paddings, strict=True)
                ],
            }
            for index, row in enumerate(rows)
        ],
    }


def _cell(text: str | None, padding: int) -> tuple[str, str]:
    """The figure, and invisible ones behind it that put the decimal points of a column below one another."""
    if text is None:
        return figures.NOTHING, ""
    return text, "" if not padding else "0" * padding if "." in text else "." + "0" * (padding - 1)


def _conditions(result: BenchResult) -> dict[str, str | list[str]]:
    facts: dict[str, str | list[str]] = dict(figures.conditions(result))
    facts.pop("command", None)
    for name, value in result.settings.items():
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and len(value) > 1
            and any(isinstance(item, str) for item in value)
        ):
            facts[figures.plain(name).replace("_", " ")] = [figures.setting_text(item) for item in value]
    return facts
