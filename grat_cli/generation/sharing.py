"""Workers that share a batch: with which part each begins (`--shard`), and how it goes on with those of the others."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from grat_cli.errors import BadInput, first_line, printable
from grat_cli.files.claims import Claim, ClaimLost, Claims
from grat_cli.files.outputs import write_text
from grat_cli.files.texts import read_bytes
from grat_cli.files.whole import discard

MOST_SHARDS = 100_000
POLL_S = 1.0
"""Between two looks at what others are making, when nothing else is left to do."""

_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})", re.ASCII)
_LARGEST_NUMBER = 2**31 - 1  # of what launchers set
_LONGEST_REASON_BYTES = 4096

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shard:
    """The part of a batch that a worker begins with.

    Attributes:
        rank: of the worker, from 1.
        count: of workers that the batch is dealt out to.
        local_rank: of the worker among those of its machine, from 0; None where nobody says.
    """

    rank: int
    count: int
    local_rank: int | None = None

    def ordered(self, items: Sequence[Item]) -> list[Item]:
        """Own items first, every `count`-th, then those of the next worker, and so on: helpers spread out."""
        numbers = sorted(range(len(items)), key=lambda number: ((number - self.rank + 1) % self.count, number))
        return [items[number] for number in numbers]


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """Which part a worker begins with.

    Args:
        text: `--shard` as typed: `2/8` for the second of eight, or `auto`.
        environment: that `auto` is read from: RANK and WORLD_SIZE of torchrun, else a Slurm array's variables.

    Raises:
        BadInput: if it is no part of a whole, or nothing says which.
    """
    if text == "auto":
        return of_torchrun(environment, "--shard auto") or _of_slurm(environment) or _refuse_auto()
    found = _SHARD.fullmatch(text)
    if found is None:
        raise BadInput(f"--shard {text}: expected a part such as 2/8 (the second of eight), or auto")
    return _shard(int(found[1]), int(found[2]), f"--shard {text}")


def of_torchrun(environment: Mapping[str, str], asked: str) -> Shard | None:
    """What torch's launcher tells a process, as the part of a whole that it is; None where it tells nothing.

    Args:
        environment: of the process.
        asked: for whom it is, to begin a complaint with.

    Raises:
        BadInput: if it is no part of a whole.
    """
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    numbers = _Numbers(environment, asked)
    rank, count, local = numbers["RANK"], numbers["WORLD_SIZE"], None
    if "LOCAL_RANK" in environment:
        local = numbers["LOCAL_RANK"]
    return _shard(rank + 1, count, f"{asked}: RANK={rank}, WORLD_SIZE={count}", local)


def of_launcher(environment: Mapping[str, str]) -> Shard | None:
    """This process among ranks that can talk, which torch's launcher has started; None where nothing has.

    Raises:
        BadInput: as `of_torchrun`.
    """
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return None
    return of_torchrun(environment, "torchrun")


def _of_slurm(environment: Mapping[str, str]) -> Shard | None:
    if not {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= environment.keys():
        return None
    numbers = _Numbers({"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "1", **environment})
    own, count, least, step = (numbers[f"SLURM_ARRAY_TASK_{name}"] for name in ("ID", "COUNT", "MIN", "STEP"))
    told = f"--shard auto: SLURM_ARRAY_TASK_ID={own}, _MIN={least}, _STEP={step}, _COUNT={count}"
    if own < least or not step or (own - least) % step:
        raise BadInput(f"{told} is no part of a whole: type which part this is, such as --shard 2/8")
    return _shard((own - least) // step + 1, count, told)


def _refuse_auto() -> Shard:
    raise BadInput(
        "--shard auto: neither torchrun (RANK, WORLD_SIZE) nor a Slurm array (SLURM_ARRAY_TASK_ID, "
        "SLURM_ARRAY_TASK_COUNT) says which part this is:\ntype it, such as --shard 2/8"
    )


def _shard(rank: int, count: int, told: str, local_rank: int | None = None) -> Shard:
    if not 1 <= rank <= count <= MOST_SHARDS:
        raise BadInput(
            f"{told}: expected a part from 1 to the number of parts, at most {MOST_SHARDS}, such as --shard 2/8"
        )
    return Shard(rank, count, local_rank)


class _Numbers:
    """Whole numbers that a launcher has set."""

    def __init__(self, environment: Mapping[str, str], asked: str = "--shard auto") -> None:
        self._environment, self._asked = environment, asked

    def __getitem__(self, name: str) -> int:
        text = self._environment[name]
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _LARGEST_NUMBER):
            shown = printable(text[:40])
            raise BadInput(
                f"{self._asked}: {name} is {shown!r}, no whole number: type which part this is, such as --shard 2/8"
            )
        return int(text)


def shared(
    items: Mapping[str, Item],
    claims: Claims,
    look: Callable[[str, Item], Result | None],
    make: Callable[[str, Item, Claim], Result],
    waiting: Callable[[int], object],
) -> Iterator[Result]:
    """Makes what no other worker makes, in order, until there is a result of everything.

    Args:
        items: by names that all workers know them by.
        claims: of all workers.
        look: what came of an item already; None where nothing is known.
        make: makes an item that is claimed, if it is not there by now; ClaimLost where another worker goes on with it.
        waiting: told how many others make, when nothing else is left.

    Yields:
        Of each item what came of it, whoever made it.

    Raises:
        CannotWrite: if claims cannot be written.
    """
    left = dict(items)
    while left:
        before = len(left)
        for name, item in tuple(left.items()):
            result = look(name, item)
            if result is None:
                if (claim := claims.take(name)) is None:
                    continue
                try:
                    with claim:
                        result = make(name, item, claim)
                except ClaimLost:
                    continue
            del left[name]
            yield result
        if len(left) == before:
            waiting(before)
            time.sleep(POLL_S)


class FailureNotes:
    """Why items cannot be made, for the other workers to read: a file for each, beside the claims.

    Notes that were there before this worker began are of earlier runs: it tries once more what they tell of.
    """

    ENDING = ".failed"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        there = {path.name: _identity(path) for path in folder.glob(f"*{self.ENDING}")}
        self._earlier = {name: found for name, found in there.items() if found is not None}

    def read(self, name: str) -> str | None:
        """Why an item failed, in one line; None where nobody says so."""
        path = self._path(name)
        found = _identity(path)
        if found is None or self._earlier.get(path.name) == found:
            return None
        with contextlib.suppress(BadInput):
            return first_line(ValueError(read_bytes(path, _LONGEST_REASON_BYTES).decode(errors="replace")))
        return None

    def write(self, name: str, reason: str) -> None:
        """Tells why an item failed.

        Raises:
            CannotWrite: if it cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(f"{reason}\n", self._path(name), overwrite=True)

    def remove(self, name: str) -> None:
        """The item is there."""
        discard(self._path(name))

    def remove_all(self) -> None:
        """Nobody else is at work."""
        for name in self._earlier:
            discard(self._folder / name)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{self.ENDING}"


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a note from one that has taken its place; None where there is no file."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns) if path.is_file() and not path.is_symlink() else None
