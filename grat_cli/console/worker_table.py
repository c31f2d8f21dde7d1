"""Workers of a batch, for people: who they are, what they have made, and what they are at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

GONE = "gone"
"""What a worker is at that has died."""

MOST_ROWS = 16
_NARROW = 60  # columns of a terminal in which a table of all that is known would be cut


@dataclass
class WorkerRow:
    """One worker.

    Attributes:
        number: from 1, in the order in which they were started.
        machine: its name; empty until it is known.
        device: likewise.
        process: its number on that machine; 0 until it is known.
        made: outputs.
        seconds: that these took together.
        doing: what it is at, in a few words.
    """

    number: int
    machine: str = ""
    device: str = ""
    process: int = 0
    made: int = 0
    seconds: float = 0.0
    doing: str = ""

    @property
    def seconds_each(self) -> str:
        """For people; empty before there is anything to tell."""
        return f"{self.seconds / self.made:.1f}" if self.made else ""


def worker_table(rows: Sequence[WorkerRow], width: int, most: int = MOST_ROWS, *, is_live: bool = True) -> Table:
    """A line for each worker; of many only those at work, and the others in a last line together.

    Args:
        rows: of all workers.
        width: of the terminal; in a narrow one machine and device are left out.
        most: lines.
        is_live: whether it says what workers are at.
    """
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    is_narrow = width < _NARROW
    for name in ("worker", *(() if is_narrow else ("machine", "device"))):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    table.add_column("made", justify="right", no_wrap=True)
    table.add_column("s each", justify="right", no_wrap=True)
    if is_live:
        table.add_column("at", no_wrap=True, overflow="ellipsis")
    shown = rows if len(rows) <= most else [row for row in rows if row.doing != GONE][: most - 1]
    for row in shown:
        where = () if is_narrow else (row.machine, row.device)
        doing = (row.doing,) if is_live else ()
        table.add_row(str(row.number), *where, str(row.made), row.seconds_each, *doing)
    if left := len(rows) - len(shown):
        numbers = {row.number for row in shown}
        made = sum(row.made for row in rows if row.number not in numbers)
        table.add_row(f"{left} more", *(() if is_narrow else ("", "")), str(made))
    return table
