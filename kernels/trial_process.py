"""The process in which a kernel is tried that has never passed: see `trials`."""

from __future__ import annotations

import sys

from grat_kernels import rope_norm, trials
from grat_kernels.backends import comparison_of


def main(kernel: str, forms: str) -> int:
    """Tries a kernel in forms; the exit code."""
    test = rope_norm.compare if kernel == rope_norm.NAME else comparison_of(kernel)
    return trials.try_forms(kernel, forms, test)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
