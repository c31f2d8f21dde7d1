"""Benchmarks as one HTML file that opens anywhere: plots, tables, conditions; no scripts, nothing to load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from grat_cli.bench import figures
from grat_cli.bench.charts import Style, escaped
from grat_cli.bench.page_parts import document, embedded, fact_list, figure
from grat_cli.bench.plots import plot_across_cases, plots, styles, swatch
from grat_cli.bench.results import BenchResult, Case, Row
from grat_cli.bench.svg import element


def as_html(result: BenchResult, contact_sheet: bytes | None = None) -> str:
    """The page.

    Args:
        result: what was measured.
        contact_sheet: the pictures side by side, as PNG, JPEG or WebP, to embed. Without it, the page refers to
            `result.contact_sheet` beside it.

    Raises:
        ValueError: if the contact sheet is of another type.
    """
    looks = styles(result)
    title = figures.title(result)
    body = [
        _header(result),
        *_sizes(result, looks),
        *(_case(result, case, looks, number) for number, case in enumerate(result.cases, start=1)),
        *_pictures(result, contact_sheet),
        *_variants(result, looks),
        *_absent(result),
        *_notes(result),
        _conditions(result),
        *_meanings(result),
        element(
            "footer",
            f"Made by grat bench on {escaped(figures.plain(result.created)[:10])}. Schema {escaped(result.schema)}.",
        ),
    ]
    return document(title, body)


def _header(result: BenchResult) -> str:
    facts = [
        result.dtype,
        *(f"{result.settings[name]} {unit}" for name, unit in _COUNTS.items() if name in result.settings),
    ]
    findings = [escaped(figures.finding(result.level, case)) for case in result.cases]
    if len(findings) == 1:
        lead = element("p", findings[0], class_="lead")
    else:
        items = [
            element("li", element("a", escaped(case.title), href=f"#case-{number}"), f": {sentence}")
            for number, (case, sentence) in enumerate(zip(result.cases, findings, strict=True), start=1)
        ]
        lead = element("ul", *items, class_="lead") if items else element("p", "Nothing was measured.", class_="lead")
    return element(
        "header",
        element("p", f"grat bench · {result.level}", class_="product"),
        element("h1", escaped(figures.title(result))),
        element(
            "p", escaped(" · ".join(map(figures.plain, [*facts, figures.plain(result.created)[:10]]))), class_="soft"
        ),
        lead,
    )


_COUNTS = {
    "heads": "heads",
    "head_dim": "channels a head",
    "layers": "layers",
    "steps": "steps",
    "repetitions": "repetitions",
}


def _case(result: BenchResult, case: Case, looks: Mapping[str, Style], number: int) -> str:
    drawn = plots(result.level, case, looks, f"case-{number}")
    beside = len(drawn) > 2  # a square plot then stands beside two others
    plotted = [figure(plot, beside=beside and plot.square) for plot in drawn]
    return element(
        "section",
        element("h2", escaped(case.title)),
        *([element("p", escaped(tokens), class_="soft")] if (tokens := figures.tokens_text(case)) else []),
        *([element("div", *plotted, class_="plots")] if plotted else []),
        _table(result, case, looks) if case.rows else element("p", "No rows."),
        id=f"case-{number}",
    )


def _sizes(result: BenchResult, looks: Mapping[str, Style]) -> Iterator[str]:
    if plot := plot_across_cases(result, looks):
        yield element("section", element("h2", "All sizes"), element("div", figure(plot), class_="plots"))


def _table(result: BenchResult, case: Case, looks: Mapping[str, Style]) -> str:
    rows = figures.ordered(case)
    columns = figures.columns(result.level, case, rows)
    with_kernels = any(row.kernel for row in rows)
    headings = [element("th", "variant", scope="col")]
    for column in columns:
        unit = element("span", escaped(column.unit)) if column.unit else ""
        words = "<br>".join(map(escaped, column.title.split()))
        headings.append(element("th", words, unit, scope="col", title=column.meaning))
    if with_kernels:
        headings.append(element("th", "kernel", scope="col", class_="words", title="What computed it."))
    paddings = [column.padding() for column in columns]
    lines = []
    for index, row in enumerate(rows):
        cells = [_row_heading(row, looks)]
        if row.skipped is not None:
            reason = element("span", escaped(f"skipped: {row.skipped}"), class_="reason")
            cells.append(element("td", reason, class_="words", colspan=max(1, len(headings) - 1)))
        else:
            cells += [
                _cell(column.cells[index], padding[index]) for column, padding in zip(columns, paddings, strict=True)
            ]
            if with_kernels:
                cells.append(element("td", escaped(row.kernel or figures.NOTHING), class_="words"))
        lines.append(element("tr", *cells, class_="full" if row.role == "full" else None))
    longest = max(len(figures.label(row)) for row in rows)
    table = element(
        "table",
        element("caption", escaped(f"Figures of every variant, {case.title}"), class_="unseen"),
        element("thead", element("tr", *headings)),
        element("tbody", *(f"\n{line}" for line in lines)),
        style=f"--names: {min(17.0, 2.5 + 0.62 * longest):.1f}em",
    )
    # Focusable, so that the keyboard can scroll it.
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=f"Figures of {case.title}")


def _row_heading(row: Row, looks: Mapping[str, Style]) -> str:
    remark = figures.remark(row)
    small = element("small", escaped(remark)) if remark else ""
    named = element(
        "span", swatch(looks[row.name]), element("span", escaped(figures.label(row)), small), class_="variant"
    )
    return element("th", named, scope="row")


def _cell(cell: str | None, padding: int) -> str:
    if cell is None:
        return element("td", figures.NOTHING, class_="nothing")
    # Invisible figures behind the shorter ones put the decimal points below one another.
    hidden = "" if not padding else "0" * padding if "." in cell else "." + "0" * (padding - 1)
    return element("td", escaped(cell), data_pad=hidden or None)


def _pictures(result: BenchResult, contact_sheet: bytes | None) -> Iterator[str]:
    if contact_sheet is None and not result.contact_sheet:
        return
    source = quote(result.contact_sheet or "") if contact_sheet is None else embedded(contact_sheet)
    heading = "Frames" if result.level == "video" else "Pictures"
    image = element("img", src=source, alt=f"{heading} in columns, one row per variant, with the same seeds.")
    caption = "The same prompts and seeds, a row per variant."
    picture = element("figure", element("div", image, class_="sheet"), element("figcaption", caption))
    yield element("section", element("h2", heading), picture)


def _variants(result: BenchResult, looks: Mapping[str, Style]) -> Iterator[str]:
    by_shown_name = {figures.plain(name): look for name, look in looks.items()}
    pairs = [
        element("dt", swatch(by_shown_name[name]), escaped(name)) + element("dd", escaped(described))
        for name, described in figures.descriptions(result).items()
    ]
    if pairs:
        yield element("section", element("h2", "Variants"), element("dl", *pairs))


def _absent(result: BenchResult) -> Iterator[str]:
    if result.absent:
        facts = {absent.name: absent.reason for absent in result.absent}
        yield element("section", element("h2", "Not here, so not compared"), fact_list(facts))


def _notes(result: BenchResult) -> Iterator[str]:
    if result.notes:
        notes = element("ul", *(element("li", escaped(note)) for note in result.notes))
        yield element("section", element("h2", "Notes"), notes)


def _conditions(result: BenchResult) -> str:
    facts: dict[str, Any] = dict(figures.conditions(result))
    command = facts.pop("command", "")
    for name, value in result.settings.items():
        if isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(item, str) for item in value):
            facts[figures.plain(name).replace("_", " ")] = [figures.setting_text(item) for item in value]
    return element(
        "section",
        element("h2", "Conditions"),
        fact_list(facts),
        *([element("pre", element("code", escaped(command)))] if command else []),
    )


def _meanings(result: BenchResult) -> Iterator[str]:
    meanings = {
        column.title: column.meaning
        for case in result.cases
        for column in figures.columns(result.level, case, figures.ordered(case))
    }
    if meanings:
        yield element("section", element("h2", "What the columns mean"), fact_list(meanings))
