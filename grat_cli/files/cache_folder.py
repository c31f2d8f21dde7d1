"""Where grat keeps what it could make again: the user's cache folder, or what GRAT_CACHE says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "GRAT_CACHE"


def cache_folder() -> Path:
    """The folder, which may not be there yet.

    It is GRAT_CACHE, else `grat` in the cache folder of the platform: XDG_CACHE_HOME or ~/.cache, on macOS
    ~/Library/Caches, on Windows LOCALAPPDATA. A variable that holds no absolute path says nothing, as the XDG Base
    Directory Specification has it, but for GRAT_CACHE.
    """
    if own := os.environ.get(VARIABLE):
        return Path(own).absolute()
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        return _absolute("LOCALAPPDATA", home / "AppData" / "Local") / "grat" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "grat"
    return _absolute("XDG_CACHE_HOME", home / ".cache") / "grat"


def _absolute(variable: str, otherwise: Path) -> Path:
    value = Path(os.environ.get(variable, ""))
    return value if value.is_absolute() else otherwise
