"""grat: large images from Flux and videos from HunyuanVideo by GRAT attention, without training."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grat_cli.installation import install

__all__ = ["__version__", "install"]

try:
    __version__ = version("grat-cli")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "install":
        from grat_cli.installation import install

        return install
    raise AttributeError(f"module 'grat_cli' has no attribute {name!r}")
