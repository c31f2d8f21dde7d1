"""Entry point of the `grat` command and of `python -m grat_cli`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    # torch's own switch, read at its first allocation: large tensors on the CPU get huge pages. Decoding a video
    # allocates and frees gigabytes, and without them spends a third of its time in page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        from grat_cli.console.streams import open_closed_descriptors

        open_closed_descriptors()
        from grat_cli.app import interrupted_by_signals, run

        with interrupted_by_signals():
            code = run(sys.argv[1:])
        sys.exit(code)
    except KeyboardInterrupt:  # before the command line was read, or while its error was printed
        sys.exit(130)


if __name__ == "__main__":
    main()
