"""What a benchmark result looks like on the terminal, in Markdown, as a page and as a contact sheet."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from matplotlib.transforms import Bbox
from PIL import Image
from rich.console import Console
from sample_benchmarks import ALL, ATTENTION, EXTREME, IMAGE, NASTY, ONE_ROW, SKIPPED, STEP, VIDEO, attention_row

from grat_cli.bench import figures, readme
from grat_cli.bench.markdown import as_markdown, readme_table
from grat_cli.bench.page import as_html
from grat_cli.bench.plots import looks_of
from grat_cli.bench.results import Absent, BenchResult, Case, Level, Quality, Row
from grat_cli.bench.tables import bench_tables
from grat_cli.pages import html
from grat_cli.pages.contact_sheet import draw
from grat_cli.pages.plots import (
    COLOURS,
    WIDTH,
    Look,
    Mark,
    draw_named_marks,
    finished,
    new_axes,
    settings,
    shortened,
    spread,
    text_width,
)

EACH = pytest.mark.parametrize("result", ALL.values(), ids=list(ALL))
VOID = {"meta", "br", "img"}
PNG = b"\x89PNG\r\n\x1a\n and so on"


def names(result: BenchResult) -> Iterator[str]:
    """Every name that an output must show, as it shows it."""
    for case in result.cases:
        for row in case.rows:
            yield figures.plain(row.name)
    for absent in result.absent:
        yield figures.plain(absent.name)


# Terminal


def shown(result: BenchResult, columns: int) -> str:
    file = io.StringIO()
    console = Console(file=file, width=columns, highlight=False, emoji=False)
    for renderable in bench_tables(result):
        console.print(renderable)
    return file.getvalue()


@EACH
@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_tables_show_every_row_at_any_width(result: BenchResult, columns: int) -> None:
    text = shown(result, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "\x1b" not in text
    # Long names are folded, never cut: without white space they are all there.
    squeezed = re.sub(r"\s", "", text)
    first_lines = [line[:columns] for line in text.splitlines()]
    for name in names(result):
        if len(name) < 10:
            assert re.sub(r"\s", "", name) in squeezed
            assert any(line.startswith(name.strip()) or f" {name.strip()}" in line for line in first_lines)


def test_no_figure_is_cut_or_dropped_in_a_narrow_terminal() -> None:
    case = ATTENTION.cases[0]
    cells = {
        cell for column in figures.columns("attention", case, case.rows) for cell in column.cells if cell is not None
    }
    for columns in (40, 60, 100):
        words = set(shown(ATTENTION, columns).split())
        assert cells <= words, columns


def test_narrow_terminals_show_the_essential_figures_first() -> None:
    heading = next(line for line in shown(ATTENTION, 44).splitlines() if line.startswith("variant"))
    assert heading.split() == ["variant", "density", "ms", "speed-up"]
    assert shown(ATTENTION, 200).count("variant  ") == 1  # one table where there is room


def test_tables_name_what_is_missing_and_why() -> None:
    text = shown(ATTENTION, 100)
    assert text.index("\nfull (cuDNN)") < text.index("\ngrat-b ")
    assert re.search(r"sparge +not installed", text)
    assert "identical mask" in text
    assert "equal density" in text
    skipped = shown(SKIPPED, 100)
    assert re.search(r"na +out of memory", skipped)
    assert "no pattern was measured" in skipped


# Figures


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1, "1.00"),
        (0.0123456, "0.0123"),
        (72.44, "72.4"),
        (9.996, "10.0"),
        (1073.4, "1,073"),
        (2.14e-5, "2.1·10⁻⁵"),
        (float("inf"), "∞"),
        (float("nan"), "not finite"),
    ],
)
def test_figures_have_sensible_digits(value: float, expected: str) -> None:
    assert figures.figure(value) == expected


def test_times_of_a_case_share_a_unit() -> None:
    assert figures.time_unit(STEP.cases[0]).name == "ms"
    assert figures.time_unit(STEP.cases[1]).name == "s"
    assert figures.time_unit(EXTREME.cases[0]).text(0.02) == "0.0200 ms"
    assert figures.time_unit(EXTREME.cases[0]).text(95_000) == "95,000 ms"


def test_decimal_points_stand_below_one_another() -> None:
    column = figures.Column("time", "ms", ("1,073", "14.6", None, "0.0200"), True, "")
    padded = [cell + "_" * pad for cell, pad in zip(column.cells, column.padding(), strict=True) if cell]
    assert padded == ["1,073_____", "14.6___", "0.0200"]
    assert not any(figures.Column("range", "ms", ("1.0–2.0", "3–4"), True, "").padding())


def test_a_pattern_that_is_not_faster_is_not_praised() -> None:
    rows = (attention_row("full", 1, 10, 10, role="full"), attention_row("b", 0.5, 12.5, 10))
    assert "no pattern is faster" in figures.finding("attention", Case("small", (8, 8), 0, rows))


# JSON


@EACH
def test_json_holds_the_whole_result(result: BenchResult) -> None:
    text = json.dumps(result.as_dict())
    again = BenchResult.from_json(text)
    assert json.dumps(again.as_dict()) == text
    assert again.cases == result.cases or result is EXTREME  # a NaN in it equals nothing
    assert again.absent == result.absent
    assert again.notes == result.notes


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grat\.bench/1"):
        BenchResult.from_dict({"schema": "grat.report/1"})


# Markdown


@EACH
def test_markdown_tables_are_tables(result: BenchResult) -> None:
    text = as_markdown(result)
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) == sum(bool(figures.measured(case)) for case in result.cases)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
        assert re.fullmatch(r"\| --- (\| ---: )+\|", table[1])
    outside_code = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    assert not re.search(r"<(?!details)", outside_code)
    assert figures.plain(result.command) in text


def test_markdown_states_units_and_conditions() -> None:
    text = as_markdown(ATTENTION)
    assert "| time, ms |" in text
    assert "NVIDIA H200" in text
    assert "- dtype: bfloat16" in text
    assert "- `sparge`: not installed" in text
    assert "triton 3.7.1" in text


def test_recall_and_output_error_stand_in_every_output() -> None:
    assert "| 0.831 ± 0.012 | 0.412 | 0.736 ± 0.020 |" in as_markdown(IMAGE)
    assert "| 0.831 | 0.0921 | 0.897 ± 0.015 |" in as_markdown(IMAGE)
    assert "| 0.831 ± 0.012 | 0.412 | 0.736 ± 0.020 |" in readme_table([IMAGE])
    page = as_html(IMAGE)
    for words in ("0.831 ± 0.012", "0.0921", "Softmax mass of full attention on what the variant attends"):
        assert words in page
    for columns in (60, 120):
        assert "0.0921" in shown(IMAGE, columns)
    assert "recall" not in as_markdown(ATTENTION)


def test_time_for_a_pair_compares_rows_of_unequal_density() -> None:
    assert "| per pair, ns |" in as_markdown(ATTENTION)


def test_the_readme_table_says_when_nothing_was_measured() -> None:
    assert readme_table([]) == "Not yet measured."
    table = readme_table([ATTENTION, STEP])
    assert "| `grat-b` | 0.0123 | 14.6 ms | 73.5× | 0.90 | 713 |" in table
    assert "| 8192x8192 pixels | `grat-b` | 0.0123 | 5.90 s | 11.4× | 0.88 |" in table
    assert "2025-11-21" in table
    assert ATTENTION.command in table
    assert "```sh" not in table  # those are typed by the README's own tests


def test_the_readme_command_replaces_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, stored = tmp_path / "README.md", tmp_path / "h200.json"
    page.write_text("# x\n\n<!-- performance -->\nold \\1\n<!-- /performance -->\n\nend\n")
    stored.write_text(json.dumps(ATTENTION.as_dict()))
    arguments = [str(stored), "--readme", str(page)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert "old" not in text
    assert "73.5×" in text
    assert text.endswith("<!-- /performance -->\n\nend\n")
    assert readme.main(["--readme", str(page)]) == 0
    assert "Not yet measured." in page.read_text()

    stored.write_text('{"schema": "other"}')
    assert readme.main(arguments) == 2
    assert "h200.json holds no benchmark result" in capsys.readouterr().err
    page.write_text("no markers")
    assert readme.main(["--readme", str(page)]) == 2
    assert "README.md: needs one <!-- performance -->" in capsys.readouterr().err


# The page


class Reader(HTMLParser):
    """Checks nesting; collects tags, text and references."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def cells(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def drawings(page: str) -> list[ElementTree.Element]:
    """The plots, which must be well-formed XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)]


def of_class(drawing: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [node for node in drawing.iter() if node.attrib.get("class") == name]


@EACH
def test_the_page_shows_every_row(result: BenchResult) -> None:
    reader = Reader(as_html(result))
    text = "\n".join(reader.text)
    for name in names(result):
        assert name in text
    assert figures.plain(result.command) in text
    for case in result.cases:
        for row in case.rows:
            assert row.skipped is None or figures.plain(row.skipped) in text
    rows = sum(len(case.rows) for case in result.cases)
    assert sum(tag == "th" and values.get("scope") == "row" for tag, values in reader.tags) == rows
    assert all(values.get("scope") in ("row", "col") for tag, values in reader.tags if tag == "th")


@EACH
@pytest.mark.parametrize("sheet", [None, PNG], ids=["reference", "embedded"])
def test_the_page_needs_nothing_from_elsewhere(result: BenchResult, sheet: bytes | None) -> None:
    page = as_html(result, sheet)
    reader = Reader(page)
    identifiers = [values["id"] for _, values in reader.tags if "id" in values]
    assert len(identifiers) == len(set(identifiers))
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in reader.tags}
    for _, values in reader.tags:
        assert not any(name.startswith("on") for name in values)
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            if reference := values.get(name):
                own = reference.startswith("#") and reference[1:] in identifiers
                assert own or reference.startswith("data:image/png;base64,") or reference == result.contact_sheet
        for name in values.get("aria-labelledby", "").split():  # type: ignore[union-attr]
            assert name in identifiers
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    for reference in re.findall(r"url\((.*?)\)", page):
        assert reference[0] == "#"
        assert reference[1:] in identifiers


def test_what_people_typed_is_no_markup() -> None:
    page = as_html(replace(EXTREME, level="step"))
    assert NASTY not in page
    assert "<script" not in page
    text = "".join(Reader(page).text)
    assert text.count(NASTY) >= 6
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
    assert f"{NASTY}: 0.13" in [title.text for drawing in drawings(page) for title in drawing.iter("title")]


def test_mathematics_is_text_in_plots() -> None:
    rows = (
        attention_row("full", 1.0, 10.0, role="full"),
        attention_row(r"$\frac{", 0.2, 3.0),
        attention_row("狐", 0.5, 4.0),
    )
    texts = [
        node.text for node in drawings(as_html(replace(ATTENTION, cases=(Case("", (8, 8), 0, rows),))))[0].iter("text")
    ]
    assert {r"$\frac{", "狐"} <= set(texts)


def test_the_same_result_gives_the_same_bytes() -> None:
    import matplotlib

    page = as_html(STEP, None)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": None}):
        assert as_html(STEP, None) == page
        assert matplotlib.rcParams["font.size"] == 30


def test_templates_name_only_what_they_are_given() -> None:
    with pytest.raises(UndefinedError):
        html.render("base.html")


def test_the_contact_sheet_is_embedded_or_beside() -> None:
    assert 'src="bench-pictures.png"' in as_html(IMAGE)
    assert 'src="data:image/png;base64,' in as_html(IMAGE, PNG)
    assert 'src="javascript%3Ax/%22%3E.png"' in as_html(replace(IMAGE, contact_sheet='javascript:x/">.png'))
    with pytest.raises(ValueError, match="neither PNG"):
        as_html(IMAGE, b"<svg onload=...>")


def test_videos_are_called_videos() -> None:
    page = as_html(VIDEO, PNG)
    assert "<h2>Frames</h2>" in page
    assert "<h2>Pictures</h2>" in as_html(IMAGE, PNG)
    for words in ("Videos on NVIDIA H200", "Median time of all denoising steps of a video", "0.93×", "attention"):
        assert words in page
    assert "picture" not in re.sub(r"<style>.*?</style>|bench-pictures", "", page, flags=re.DOTALL)
    assert "1.25×" in as_markdown(VIDEO)
    assert "motion" not in as_markdown(IMAGE)


def test_every_level_has_its_plots() -> None:
    expected = {
        "attention": (ATTENTION, ["Speed-up against density", "Sparse efficiency", "Time of attention"]),
        "step": (
            STEP,
            ["Speed-up against size"]
            + ["Speed-up against density", "Time of a step", "Sparse efficiency of attention"] * 2,
        ),
        "image": (IMAGE, ["Similarity against speed-up", "Time of denoising", "Time of each denoising step"]),
        "video": (VIDEO, ["Similarity against speed-up", "Time of denoising", "Time of each denoising step"]),
        "nothing to compare": (ONE_ROW, []),
        "all skipped": (SKIPPED, []),
    }
    for result, headings in expected.values():
        assert re.findall(r"<h3>(.*?)</h3>", as_html(result)) == headings


@EACH
def test_plots_describe_themselves(result: BenchResult) -> None:
    for drawing in drawings(as_html(result)):
        assert drawing.attrib["role"] == "img"
        title, description = drawing.find("title"), drawing.find("desc")
        assert title is not None
        assert description is not None
        assert drawing.attrib["aria-labelledby"] == f"{title.attrib['id']} {description.attrib['id']}"
        assert len(description.text or "") > 10


@EACH
def test_points_lie_within_their_plot(result: BenchResult) -> None:
    for drawing in drawings(as_html(result)):
        _, _, width, height = map(float, drawing.attrib["viewBox"].split())
        for node in (found for point in of_class(drawing, "point") for found in point.iter("use")):
            assert 30 < float(node.attrib["x"]) < width
            assert 5 < float(node.attrib["y"]) < height - 35


def _box(node: ElementTree.Element) -> Bbox:
    """What a text takes in the font that plots are measured with."""
    width = text_width(node.text or "")
    x, y = float(node.attrib["x"]), float(node.attrib["y"])
    anchor = re.search(r"text-anchor: (\w+)", node.attrib["style"])
    left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor[1] if anchor else "start"]
    return Bbox.from_extents(left, y - 9, left + width, y + 2)


@EACH
def test_no_two_texts_of_a_plot_overlap(result: BenchResult) -> None:
    for drawing in drawings(as_html(result)):
        height = float(drawing.attrib["viewBox"].split()[3])
        boxes = [_box(node) for node in drawing.iter("text") if node.text]
        for index, box in enumerate(boxes):
            assert box.x0 >= -6 and box.x1 <= WIDTH + 6  # noqa: PT018
            assert box.y0 >= 0 and box.y1 <= height  # noqa: PT018
            assert not box.count_overlaps(boxes[index + 1 :])


def test_every_point_of_the_samples_has_its_label() -> None:
    for result in (ATTENTION, STEP, IMAGE):
        for drawing in drawings(as_html(result)):
            if re.search("density|quality", drawing.attrib["aria-labelledby"]):
                assert len(of_class(drawing, "point")) == len(of_class(drawing, "label")) > 1


@pytest.mark.parametrize("count", [2, 10, 40])
@settings()
def test_labels_keep_out_of_each_others_way(count: int) -> None:
    random = np.random.default_rng(count)
    marks = [
        Mark("m" * random.integers(1, 20), Look("neutral", "circle"), random.random(), random.random(), "")
        for _ in range(count)
    ]
    axes = new_axes("x", "y")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    draw_named_marks(axes, marks)
    drawing = ElementTree.fromstring(finished(axes, "x", "x", "", "").svg)
    labels = [_box(node) for label in of_class(drawing, "label") for node in label.iter("text")]
    points = [node for point in of_class(drawing, "point") for node in point.iter("use")]
    dots = [Bbox.from_bounds(float(dot.attrib["x"]) - 4, float(dot.attrib["y"]) - 4, 8, 8) for dot in points]
    assert len(dots) == count
    assert min(count, 10) <= len(labels) <= count
    for index, label in enumerate(labels):
        assert not label.count_overlaps([*dots, *labels[index + 1 :]])


@given(st.lists(st.floats(-50, 150), min_size=1, max_size=12))
def test_ends_of_lines_are_spread(positions: list[float]) -> None:
    moved = spread(positions, 10, 0, 100)
    ordered = sorted(moved)
    least = min(10, 100 / max(1, len(positions) - 1))
    assert ordered[0] >= -1e-9
    assert ordered[-1] <= 100 + 1e-9
    assert all(b - a >= least - 1e-6 for a, b in pairwise(ordered))


def test_a_variant_looks_the_same_everywhere() -> None:
    looks = looks_of(STEP)
    assert looks["full"].colour == "neutral"
    assert len({look.colour for look in looks.values()}) == len(looks) <= COLOURS + 1
    assert [looks_of(ATTENTION)[name].shape for name in ("grat-b", "na", "flex")] == ["circle", "square", "triangle"]
    many = tuple(Row(f"v{number}", "pattern", "") for number in range(30))
    assert len(looks_of(replace(ATTENTION, cases=(Case("many", (1, 1), 0, many),)))) == 30


def _luminance(colour: str) -> float:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_everything_written_stands_out() -> None:
    """WCAG 2 AA: a contrast of 4.5 for text, also for labels in the colours of their variants."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", rules))
        for rules in re.findall(r":root \{(.*?)\}", as_html(ONE_ROW), re.DOTALL)
    )
    assert set(light) == set(dark)
    for colours in (light, dark):
        for name, colour in colours.items():
            if name.startswith("colour") or name in ("ink", "soft", "accent", "neutral"):
                for ground in (colours["ground"], colours["raised"]):
                    low, high = sorted((_luminance(colour), _luminance(ground)))
                    assert (high + 0.05) / (low + 0.05) >= 4.5, name


@pytest.mark.parametrize("count", [0, 1, 40])
def test_a_page_of_any_number_of_rows(count: int) -> None:
    rows = [attention_row("full", 1.0, 1000.0, role="full")]
    rows += [attention_row(f"grat-{number}", 0.02, 30.0) for number in range(count)]
    result = replace(ATTENTION, cases=(Case("many", (64, 64), 0, tuple(rows)),), absent=(Absent("x", "y"),), notes=())
    reader = Reader(as_html(result))
    assert all(row.name in "".join(reader.text) for row in rows)
    assert Reader(as_html(replace(result, cases=(), absent=())))


@pytest.mark.parametrize("level", ["attention", "step", "image", "video"])
def test_figures_that_no_axis_can_hold_break_nothing(level: Level) -> None:
    infinite, unknown = float("inf"), float("nan")
    rows = (
        Row("full", "full", "", times_ms=(0.0, 0.0)),
        Row("a", "pattern", "", speedup=infinite, density=0.0, sparse_efficiency=0.0, times_ms=(unknown,)),
        Row("b", "noise floor", "", speedup=1.0, quality=Quality(1.0, unknown, infinite, unknown), attention_ms=0.0),
        Row("c", "pattern", "", speedup=-1.0, quality=Quality(-0.1, 0.0, 3.0, 0.1), tflops=0.0, error=0.0),
    )
    case = Case("", (), 0, rows)
    result = replace(ATTENTION, level=level, versions={}, settings={}, cases=(case,))
    for drawing in drawings(as_html(result)):
        assert "nan" not in ElementTree.tostring(drawing, "unicode")
    assert Reader(as_html(result))
    assert "`a`" in as_markdown(result)
    assert "`a`" in readme_table([result])
    assert "variant" in shown(result, 30)


# Contact sheet


def picture(width: int, height: int, colour: str = "red", mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (width, height), colour).convert(mode)


def test_pictures_stand_in_rows_and_columns() -> None:
    rows = [("full", [picture(64, 48, "red"), picture(64, 48, "lime")]), ("far", [picture(64, 48, "blue")])]
    sheet = draw(rows, ["a fox", "a boat"], [[None, None], ["SSIM 0.897"]], longest_side=64)
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert colours[colour] == 64 * 48  # whole, unscaled, nothing written over it

    def box(colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
        rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
        return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1

    red, green, blue = box((255, 0, 0)), box((0, 255, 0)), box((0, 0, 255))
    assert red[1] == green[1]
    assert red[0] == blue[0]
    assert green[0] >= red[2]
    assert blue[1] >= red[3]


def test_large_pictures_are_scaled_and_odd_ones_converted() -> None:
    pictures = [picture(4000, 1000), picture(10, 3000, mode="L"), picture(5, 5, mode="P"), picture(9, 9, mode="RGBA")]
    sheet = draw([(NASTY * 9, pictures), ("none", [])], ["word " * 200, "x" * 500, "", "\n\x1b"], longest_side=100)
    assert sheet.mode == "RGB"
    assert sheet.width < 900
    assert sheet.height < 400
    assert pictures[0].size == (4000, 1000)  # those given are left alone
    with pytest.raises(ValueError, match="at least one picture"):
        draw([("full", [])], [])


def test_levels_can_write_results_where_only_torch_is_installed() -> None:
    program = (
        "import sys, grat_cli.bench.figures, grat_cli.bench.markdown, grat_cli.bench.page, grat_cli.bench.readme\n"
        "import grat_cli.bench.tables, grat_cli.pages.contact_sheet\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & "
        "{'rich', 'PIL', 'typer', 'torch', 'pydantic', 'diffusers', 'yaml', 'jinja2', 'matplotlib'}))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


def test_long_names_in_plots_are_told_apart() -> None:
    names = ("demo-tuned+first-block", "demo-tuned+first-block:threshold=0.15", "demo-tuned+taylor:cache_interval=3")
    cut = [shortened(name) for name in (*names, "x" * 20)]
    assert cut == ["demo-tuned…rst-block", "demo-tuned…hold=0.15", "demo-tuned…nterval=3", "x" * 20]
