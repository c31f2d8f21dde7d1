"""`grat compare`: how alike pictures and videos are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, option

if TYPE_CHECKING:
    from rich.table import Table

    from grat_cli.bench.results import Quality
    from grat_cli.fidelity.comparison import Compared

SCHEMA = "grat.compare/1"
_LONGEST_SIDE = 512


def compare(
    first: Annotated[Path, argument("A", "A picture, a video, or a folder of them: the reference.")],
    second: Annotated[Path, argument("B", "What is compared with it; of a folder, equal names.")],
    *,
    sheet: Path | None = option("FILE.png", "Also draw A, B and their difference, four times as strong, side by side."),
    overwrite: bool = options.OVERWRITE,
    terminal: options.TerminalOptions,
) -> None:
    """Compare pictures or videos: SSIM, PSNR, LPIPS where its weights are; each, and the mean with its interval."""
    from grat_cli.errors import BadInput
    from grat_cli.fidelity import perceptual
    from grat_cli.fidelity.comparison import compare_pair, pairs_of
    from grat_cli.fidelity.quality import summary
    from grat_cli.files import outputs
    from grat_cli.files.places import renamed
    from grat_cli.pages import contact_sheet

    output = terminal.output()
    pairs, left_out = pairs_of(first, second)
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise BadInput(f"--sheet {sheet}: sheets are PNG files: use {renamed(sheet, '.png')}")
        outputs.refuse_unwritable([sheet], overwrite=overwrite)
    if left_out:
        output.hint(f"only in one of the folders, left out: {', '.join(left_out)}")
    if missing := perceptual.obstacle():
        output.hint(f"no LPIPS: {missing}")

    found: list[Compared] = []
    with output.progress() as progress:
        progress.phase("compare")
        for number, pair in enumerate(pairs, 1):
            found.append(compare_pair(pair))
            progress.step(number, len(pairs))
    mean = summary([one.likeness for one in found])

    if sheet is not None:

        def blanks(one: Compared) -> list[str]:
            """For all frames that are shown but the first."""
            return [""] * (len(one.shown[0]) - 1)

        rows = [
            (name, [picture for one in found for picture in one.shown[index]])
            for index, name in enumerate((first.name, second.name, "difference"))
        ]
        titles = [text for one in found for text in (one.pair.name, *blanks(one))]
        similarities = [f"SSIM {one.likeness.ssim:.3f}" for one in found]
        captions = [
            [],
            [text for one, said in zip(found, similarities, strict=True) for text in (said, *blanks(one))],
        ]
        drawn = contact_sheet.draw(rows, titles, captions, longest_side=_LONGEST_SIDE)
        outputs.write_png(drawn, sheet, None, overwrite=overwrite)
    output.data(_data(found, mean))
    output.show(_table(found, mean))
    if sheet is not None:
        output.file(sheet)
    elif terminal.quiet:
        output.line(f"{mean.ssim:.6f}")


def _data(found: list[Compared], mean: Quality) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "schema": SCHEMA,
        "pairs": [
            {
                "name": one.pair.name,
                "first": str(one.pair.first),
                "second": str(one.pair.second),
                "frames": one.frames,
                **asdict(one.likeness),
            }
            for one in found
        ],
        "mean": asdict(mean),
    }


def _table(found: list[Compared], mean: Quality) -> Table:
    from rich.table import Table

    columns: list[tuple[str, str, Any]] = [
        ("SSIM", "{:.3f}", "ssim"),
        ("PSNR, dB", "{:.1f}", "psnr_db"),
        ("LPIPS", "{:.3f}", "lpips"),
        ("motion", "{:.2f}x", "motion"),
    ]
    shown = [column for column in columns if getattr(mean, column[2]) is not None]
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for title, _, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)

    def cell(value: float | None, form: str, interval: float | None = None) -> str:
        return (
            "-" if value is None else form.format(value) + ("" if interval is None else f" ± {form.format(interval)}")
        )

    for one in found:
        table.add_row(one.pair.name, *(cell(getattr(one.likeness, name), form) for _, form, name in shown))
    if len(found) > 1:
        intervals = {"ssim": mean.ssim_interval, "psnr_db": mean.psnr_interval_db}
        cells = (cell(getattr(mean, name), form, intervals.get(name)) for _, form, name in shown)
        table.add_section()
        table.add_row(f"mean of {len(found)}, 95 % interval", *cells)
    return table
