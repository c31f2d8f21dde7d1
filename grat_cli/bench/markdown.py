"""Benchmarks as Markdown: a whole result, and the performance table of the README."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import quote

from grat_cli.bench import figures
from grat_cli.bench.results import BenchResult, Case, Row

# What the README has room for; everything else is in the result files.
_README_COLUMNS = (
    "density",
    "time",
    "step",
    "denoising",
    "speed-up",
    "sparse efficiency",
    "TFLOP/s",
    "recall",
    "output error",
    "SSIM",
)
# The conditions that it states, and what they count.
_README_FACTS = {
    "dtype": "",
    "heads": " heads",
    "head dim": " channels each",
    "layers": " layers",
    "model": "",
    "versions": "",
    "date": "",
}


def as_markdown(result: BenchResult) -> str:
    """A result as a Markdown document: tables with their units, conditions, and the command that printed them."""
    conditions = figures.conditions(result)
    command = conditions.pop("command", "")
    lines = [f"## {_escaped(figures.title(result))}", ""]
    for case in result.cases:
        lines += [*_case(result, case), ""]
    if described := figures.descriptions(result):
        lines += ["### Variants", "", *_list({_code(name): text for name, text in described.items()}), ""]
    if result.absent:
        lines += ["### Not here, so not compared", ""]
        lines += [*_list({_code(absent.name): absent.reason for absent in result.absent}), ""]
    if result.notes:
        lines += ["### Notes", "", *(f"- {_escaped(note)}" for note in result.notes), ""]
    if result.contact_sheet:
        lines += [f"![The same seeds by every variant]({quote(result.contact_sheet)})", ""]
    lines += ["### Conditions", "", *_list(conditions), ""]
    if command:
        lines += _fenced(command, "sh")
    return "\n".join(lines).rstrip() + "\n"


def readme_table(results: Sequence[BenchResult]) -> str:
    """The performance section of the README: the essential columns of each result, and what they depend on.

    Only figures that were measured: without a result it says so.
    """
    if not results:
        return "Not yet measured."
    return "\n\n".join("\n".join(_summary(result)) for result in results)


def _case(result: BenchResult, case: Case) -> Iterator[str]:
    yield from (f"### {_escaped(case.title)}", "")
    if tokens := figures.tokens_text(case):
        yield from (f"{tokens}.", "")
    if rows := figures.measured(case):
        columns = figures.columns(result.level, case, rows)
        cells = [[column.cells[index] or figures.NOTHING for column in columns] for index in range(len(rows))]
        headings = ["variant", *(column.heading for column in columns)]
        yield from (*_table(headings, [[_variant(row), *line] for row, line in zip(rows, cells, strict=True)]), "")
    if skipped := {row.name: row.skipped for row in case.rows if row.skipped is not None}:
        yield from ("Skipped:", "", *_list({_code(name): reason for name, reason in skipped.items()}), "")
    yield _escaped(figures.finding(result.level, case))


def _summary(result: BenchResult) -> Iterator[str]:
    known = figures.conditions(result)
    known["date"] = known["date"][:10]  # the day is enough
    facts = [f"{known[name]}{unit}" for name, unit in _README_FACTS.items() if name in known]
    yield from (f"**{_escaped(figures.title(result))}**: {_escaped(', '.join(facts))}.", "")
    lines: list[dict[str, str]] = []
    for case in result.cases:
        rows = figures.measured(case)
        columns = figures.columns(result.level, case, rows)
        for index, row in enumerate(rows):
            line = {"size": _escaped(case.title), "variant": _variant(row)}
            for column in columns:
                if column.cells[index] is not None:
                    line[column.title] = f"{column.cells[index]} {column.unit or ''}".rstrip()
            lines.append(line)
    headings = ["variant", *(name for name in _README_COLUMNS if any(name in line for line in lines))]
    if len(result.cases) > 1:
        headings.insert(0, "size")
    yield from _table(headings, [[line.get(name, figures.NOTHING) for name in headings] for line in lines])
    yield from ("", *_fenced(figures.plain(result.command), "text"))


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Names to the left, figures to the right."""
    yield _line(headings)
    yield _line("---" if name in ("size", "variant") else "---:" for name in headings)
    yield from map(_line, lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _variant(row: Row) -> str:
    name = _code(row.name)
    if row.role == "full" and row.kernel:
        name += f" ({_escaped(row.kernel)})"
    remark = figures.remark(row)
    return f"{name}, {remark}" if remark else name


def _list(facts: dict[str, str]) -> Iterator[str]:
    for name, text in facts.items():
        yield f"- {name}: {_escaped(text)}"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in tables too."""
    text = figures.plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _code(name: str) -> str:
    """A name as code; a bar is escaped because it may stand in a table."""
    text = figures.plain(name).replace("|", "\\|")
    if "`" not in text:
        return f"`{text}`"
    marks = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{marks} {text} {marks}"


def _fenced(text: str, language: str) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]
