"""Parts of HTML pages that open anywhere: the document around them, figures, lists of facts; no scripts."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape

from grat_cli.bench.charts import Plot, escaped
from grat_cli.bench.page_style import style_sheet
from grat_cli.bench.svg import element

_IMAGE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
_NO_POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"


def document(title: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: of the page.
        body: markup, part by part.
    """
    return (
        "<!doctype html>\n"
        f'<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escaped(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_NO_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{style_sheet()}</style>\n</head>\n<body>\n"
        f"{element('main', *(chr(10) + part for part in body), chr(10))}\n</body>\n</html>\n"
    )


def embedded(picture: bytes) -> str:
    """A PNG, JPEG or WebP as an address that holds it whole.

    Raises:
        ValueError: if it is of another type.
    """
    kind = next((kind for start, kind in _IMAGE_TYPES.items() if picture.startswith(start)), None)
    if kind is None:
        raise ValueError("the picture is neither PNG nor JPEG nor WebP")
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def figure(plot: Plot, *, beside: bool = False) -> str:
    """A plot with heading and caption."""
    return element(
        "figure",
        element("h3", escaped(plot.heading)),
        plot.svg,
        element("figcaption", escaped(plot.caption)),
        class_="plot-of beside" if beside else "plot-of",
    )


def fact_list(facts: Mapping[str, str | list[str]]) -> str:
    """Names and values, or lists of values."""
    pairs = []
    for name, value in facts.items():
        if isinstance(value, list) and len(value) > 1:
            shown = element("ol", *(element("li", escaped(item)) for item in value))
        else:
            shown = escaped(value[0] if isinstance(value, list) and value else value)
        pairs.append(element("dt", escaped(name)) + element("dd", shown))
    return element("dl", *pairs)
