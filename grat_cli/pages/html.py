"""Pages from templates: everything that is inserted is escaped; nothing is loaded from elsewhere, no scripts."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

# With what turns text around (UAX #9, section 2).
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]+")
_IMAGE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


def plain(text: object) -> str:
    """Text in one line, without characters that steer terminals, turn text around, or that XML forbids."""
    return _CONTROL.sub(" ", str(text))


def render(template: str, **context: Any) -> str:
    """The text of a template in `templates/`.

    Args:
        template: name of its file.
        context: what it inserts: text is made plain and escaped, `markupsafe.Markup` stays as it is.

    Raises:
        jinja2.UndefinedError: if the template names what is not in the context.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if hasattr(value, "__html__") else plain(value),
    )
    return environment.get_template(template).render(context) + "\n"


def embedded(picture: bytes) -> str:
    """A PNG, JPEG or WebP as an address that holds it whole.

    Raises:
        ValueError: if it is of another type.
    """
    kind = next((kind for start, kind in _IMAGE_TYPES.items() if picture.startswith(start)), None)
    if kind is None:
        raise ValueError("the picture is neither PNG nor JPEG nor WebP")
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"
