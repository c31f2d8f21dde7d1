"""Which of several workers makes which item: one at a time, the next in hand; what a dead one had goes back."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

MOST_DEATHS = 3
"""Of workers that make the same item, after which it is given up: it may be what kills them."""

IN_HAND = 2
"""Items that a worker has at most: the one that it makes, and the next, so that it never waits for the driver."""


class Deal:
    """Items by name, each waiting, in a worker's hands, or over."""

    def __init__(self, names: Iterable[str]) -> None:
        self._waiting, self._hands = deque(names), dict[int, list[str]]()
        self._deaths: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._waiting or any(self._hands.values()))

    @property
    def waiting(self) -> int:
        """Items that no worker has."""
        return len(self._waiting)

    def join(self, worker: int) -> None:
        """A worker is ready."""
        self._hands[worker] = []

    def hands(self, worker: int) -> tuple[str, ...]:
        """What a worker has, in the order in which it makes it."""
        return tuple(self._hands.get(worker, ()))

    def neediest(self) -> int | None:
        """The worker that gets the next item: first those that have none.

        Those that are at work get one more only while enough wait for all: at the end none lies with a worker that is
        busy while another is idle.
        """
        worker = min(self._hands, key=lambda each: len(self._hands[each]), default=None)
        if worker is None or not self._waiting:
            return None
        has = len(self._hands[worker])
        return worker if has == 0 or (has < IN_HAND and len(self._waiting) > len(self._hands)) else None

    def next(self) -> str:
        """Takes the next item that waits, to `give` it, to put it `back`, or because it is over.

        Raises:
            IndexError: if none waits.
        """
        return self._waiting.popleft()

    def give(self, worker: int, name: str) -> None:
        """A worker gets an item."""
        self._hands[worker].append(name)

    def over(self, worker: int, name: str) -> None:
        """There is a result of what a worker had."""
        self._hands[worker].remove(name)

    def back(self, name: str) -> None:
        """An item waits again, behind the others."""
        self._waiting.append(name)

    def died(self, worker: int) -> tuple[str, ...]:
        """A worker is gone: what it had waits again, before all else.

        Returns:
            What it had, in order.
        """
        had = self._hands.pop(worker, [])
        if had:
            self._deaths[had[0]] += 1
        self._waiting.extendleft(reversed(had))
        return tuple(had)

    def deaths(self, name: str) -> int:
        """How many workers died while they made an item."""
        return self._deaths[name]
