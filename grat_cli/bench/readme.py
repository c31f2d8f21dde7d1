"""Writes measured figures into the README: `python -m grat_cli.bench.readme kernels/results/*.json`.

What stands between `<!-- performance -->` and `<!-- /performance -->` is replaced;
without files it says "Not yet measured."
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from grat_cli.bench.markdown import readme_table
from grat_cli.bench.results import BenchResult
from grat_cli.files import outputs

BEGIN, END = "<!-- performance -->", "<!-- /performance -->"


def with_performance(readme: str, table: str) -> str:
    """The README with this table between its markers.

    Raises:
        ValueError: if there is not one pair of markers.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"needs one {BEGIN} and one {END} behind it")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table}\n{END}", readme, flags=re.DOTALL)


def read_results(paths: list[Path]) -> list[BenchResult]:
    """The results in these files, in the order of their names.

    Raises:
        ValueError: if a file holds no benchmark result; the message names it.
    """
    results = []
    for path in sorted(paths):
        try:
            results.append(BenchResult.from_json(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no benchmark result: {error}") from error
    return results


def main(arguments: list[str] | None = None) -> int:
    """Replaces the table, or with --check says whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m grat_cli.bench.readme", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="files that grat bench --json wrote")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 where the table is out of date"
    )
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text(encoding="utf-8")
        after = with_performance(before, readme_table(read_results(options.results)))
    except (OSError, ValueError) as error:
        print(f"error: {options.readme}: {error}" if "<!--" in str(error) else f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        return int(before != after)
    outputs.write_text(after, options.readme, overwrite=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
