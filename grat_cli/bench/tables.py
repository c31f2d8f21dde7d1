"""Benchmarks in the terminal: tables that fold into several where it is narrow, conditions, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grat_cli.bench import figures

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

    from grat_cli.bench.results import BenchResult, Case, Row

_WIDEST_NAME = 24
_NARROW = 64  # columns below which one space between columns must do


def bench_tables(result: BenchResult) -> list[RenderableType]:
    """Everything that a result says, to print one after another: conditions, then each case, then what is missing."""
    from rich.text import Text

    shown: list[RenderableType] = [Text(figures.title(result), style="bold"), _facts(figures.conditions(result))]
    for case in result.cases:
        shown += ["", _case_title(case), *_case(result, case)]
    if result.cases:
        shown += ["", Text("variants", style="bold"), _facts(figures.descriptions(result))]
    if result.absent:
        shown += ["", Text("not here, so not compared", style="bold")]
        shown.append(_facts({absent.name: absent.reason for absent in result.absent}))
    if result.notes:
        shown += ["", Text("notes", style="bold"), *(_facts({"-": note}) for note in result.notes)]
    return shown


def _case_title(case: Case) -> Text:
    from rich.text import Text

    heading = Text(figures.plain(case.title), style="bold")
    if tokens := figures.tokens_text(case):
        heading.append(f"  {tokens}", style="not bold dim")
    return heading


def _case(result: BenchResult, case: Case) -> Iterator[RenderableType]:
    from rich.text import Text

    if rows := figures.measured(case):
        yield _FoldedTable(rows, figures.columns(result.level, case, rows))
    if skipped := {row.name: row.skipped for row in figures.ordered(case) if row.skipped is not None}:
        yield Text("\nskipped", style="bold")
        yield _facts(skipped)
    yield Text(f"\n{figures.finding(result.level, case)}", style="italic")


def _facts(facts: dict[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", overflow="fold", max_width=_WIDEST_NAME)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(figures.plain(name)), Text(figures.plain(value)))
    return table


@dataclass(frozen=True)
class _FoldedTable:
    """A table that goes on below, with the names again, where its columns do not fit side by side."""

    rows: Sequence[Row]
    columns: Sequence[figures.Column]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        gap = 1 if options.max_width < _NARROW else 2
        longest = max((len(figures.label(row)) for row in self.rows), default=0)
        names = min(longest, _WIDEST_NAME, max(10, options.max_width // 3))
        if any(figures.remark(row) for row in self.rows):
            names = max(names, min(15, options.max_width // 2))
        for number, part in enumerate(_parts(self.columns, options.max_width - names, gap)):
            if number:
                yield ""
            yield self._table(part, names, gap, with_remarks=number == 0)

    def _table(self, columns: Sequence[figures.Column], names: int, gap: int, *, with_remarks: bool) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, gap - 1, 0, 0), pad_edge=False)
        table.add_column("variant", width=names, overflow="fold")
        for column in columns:
            table.add_column(
                Text(_stacked(column)),
                justify="right",
                width=_width(column),
                overflow="fold",
            )
        paddings = [column.padding() for column in columns]
        for index, row in enumerate(self.rows):
            name = Text(figures.label(row))
            if with_remarks and (remark := figures.remark(row)):
                name.append(f"\n{remark}", style="dim")
            cells = [
                Text((column.cells[index] or figures.NOTHING) + " " * padding[index])
                for column, padding in zip(columns, paddings, strict=True)
            ]
            table.add_row(name, *cells, style="bold" if row.role == "full" else "")
        return table


def _parts(columns: Sequence[figures.Column], width: int, gap: int) -> list[list[figures.Column]]:
    """The columns in as many tables as the width asks for; the essential ones first if there are several."""
    if sum(gap + _width(column) for column in columns) <= width:
        return [list(columns)]
    # False sorts before True, and sorting keeps the order among equals.
    waiting = sorted(columns, key=lambda column: not column.essential)
    parts = []
    while waiting:
        part = _take(waiting, width, gap)
        waiting = waiting[len(part) :]
        parts.append([column for column in columns if column in part])
    return parts


def _take(waiting: Sequence[figures.Column], width: int, gap: int) -> list[figures.Column]:
    """As many columns from the front as fit, at least one."""
    used, count = 0, 0
    for column in waiting:
        used += gap + _width(column)
        if used > width and count:
            break
        count += 1
    return list(waiting[:count])


def _stacked(column: figures.Column) -> str:
    """A heading word by word, its unit in the last line."""
    words = column.title.split()
    return "\n".join([*words, column.unit] if column.unit else words)


def _width(column: figures.Column) -> int:
    cells = [
        len(cell or figures.NOTHING) + padding for cell, padding in zip(column.cells, column.padding(), strict=True)
    ]
    return max([*cells, *map(len, _stacked(column).split("\n"))])
