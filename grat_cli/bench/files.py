"""The files that a benchmark leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from grat_cli.bench.results import WHOLE_RUNS, BenchResult
from grat_cli.files import outputs
from grat_cli.files.places import is_folder

if TYPE_CHECKING:
    from PIL import Image


def result_paths(out: Path | None, level: str) -> dict[str, Path]:
    """Where the results go, by kind: json, md, html and, of whole runs, png.

    Args:
        out: `--out`: a name with or without the suffix, an existing folder, which gets a telling name, or None.
        level: of the benchmark.
    """
    if out is None or is_folder(out):
        stem = Path(out or "") / f"grat-bench-{datetime.now():%Y%m%d-%H%M%S}-{level}"
    else:
        stem = out.with_suffix("") if out.suffix in (".json", ".md", ".html") else out
    kinds = ("json", "md", "html", "png") if level in WHOLE_RUNS else ("json", "md", "html")
    return {kind: stem.with_name(f"{stem.name}.{kind}") for kind in kinds}


def write_results(
    result: BenchResult, sheet: Image.Image | None, paths: Mapping[str, Path], *, overwrite: bool = False
) -> tuple[BenchResult, list[Path]]:
    """Writes everything; gives the result with the name of its contact sheet, and what was written.

    Args:
        result: what was measured.
        sheet: the contact sheet, None where there is none.
        paths: of `result_paths`.
        overwrite: whether files that are there may be replaced.
    """
    from grat_cli.bench.markdown import as_markdown
    from grat_cli.bench.page import as_html

    picture = None
    if sheet is not None:
        outputs.write_png(sheet, paths["png"], None, overwrite=overwrite)
        picture = paths["png"].read_bytes()
        result = replace(result, contact_sheet=paths["png"].name)
    outputs.write_json(result.as_dict(), paths["json"], overwrite=overwrite)
    outputs.write_text(as_markdown(result), paths["md"], overwrite=overwrite)
    outputs.write_text(as_html(result, picture), paths["html"], overwrite=overwrite)
    return result, [path for kind, path in paths.items() if kind != "png" or sheet is not None]
