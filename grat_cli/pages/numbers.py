"""Numbers as people read them."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(value: float, digits: int = 3) -> str:
    """A number with so many significant digits: `0.0123`, `1.50`, `72.4`, `1,073`, `2.1·10⁻⁵`."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "not finite"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        exponent = math.floor(math.log10(abs(value)))
        return f"{value / 10**exponent:.{max(0, digits - 2)}f}·10{str(exponent).translate(_SUPERSCRIPT)}"
    return f"{value:,.{decimals(value, digits)}f}"


def decimals(value: float, digits: int = 3) -> int:
    """Digits after the decimal point that make so many significant ones."""
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}")))))


def density_text(density: float) -> str:
    """A density: three significant digits however small, and `1` for everything."""
    return "1" if density == 1 else f"{density:.{min(6, decimals(density))}f}"
