"""What many machines make of a run: outputs by the hour and by the kilowatt-hour, and what stops more of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from grat_cli.console.output import bytes_text

WORKERS = (10, 1_000, 100_000)
"""That are told of besides those asked for."""

# A shared file system: the most that the user guide of Amazon EFS states for a regional one with elastic throughput
# (Performance specifications): 20 GiB/s and, of data that is seldom read, 90,000 reads a second. Taken for any.
STORE_RATE, STORE_OPERATIONS = 20 * 2**30, 90_000
DISK_RATE = 2e9
"""Bytes per second that a machine takes from it, as from an NVMe disk."""

# Of `grat batch --shard`: each worker looks at every item when it begins, and again when its own are made, whoever
# makes it. For one look the output is looked up, and its report opened, read and closed.
LOOKS, OPERATIONS_OF_LOOK = 2, 4
# Whoever makes an item claims it, in so many operations (`files.claims`), and touches the claim every 10 seconds.
OPERATIONS_OF_CLAIM, BEAT_S = 18, 10.0
TOLERATED = 0.1
"""Share of its time that a fleet may well wait."""


@dataclass(frozen=True)
class Fleet:
    """Machines that make the outputs of one batch.

    Attributes:
        workers: how many machines.
        gpus: of each.
        seconds: that a machine takes for an output.
        weights: bytes that each loads.
        power: watts of each GPU at most; None where unknown.
    """

    workers: int
    gpus: int
    seconds: float
    weights: float
    power: float | None

    @property
    def outputs_per_hour(self) -> float:
        """Of all, while nothing stops them."""
        return self.workers * 3600 / self.seconds

    @property
    def outputs_per_kwh(self) -> float | None:
        """Of the GPUs alone, at the most that they take: hosts, network and cooling come on top."""
        return None if self.power is None else 3.6e6 / (self.gpus * self.power * self.seconds)

    @property
    def loading(self) -> float:
        """Seconds until all have the weights from a shared store."""
        return max(self.workers * self.weights / STORE_RATE, self.weights / DISK_RATE)

    @property
    def looking(self) -> float:
        """Seconds that a shared file system takes to tell what is made, by seconds of making, whatever the items: each
        of these is looked at by all workers, which make as many of them at once."""
        return self.workers**2 * LOOKS * OPERATIONS_OF_LOOK / STORE_OPERATIONS / self.seconds

    @property
    def claiming(self) -> float:
        """Operations per second of claims and their touches."""
        return self.workers * (OPERATIONS_OF_CLAIM / self.seconds + 1 / BEAT_S)

    @property
    def breaks(self) -> str:
        """What stops more of them first, and what to do."""
        found = []
        if self.workers > self.most_with_store:
            found.append("weights: keep a copy on each")
        if self.looking > TOLERATED or self.claiming > STORE_OPERATIONS:
            found.append("claims: use --ray")
        return ", ".join(found) or "nothing"

    @property
    def most_with_store(self) -> int:
        """Machines that a shared store serves as fast as their own disks would."""
        return int(STORE_RATE / DISK_RATE)

    @property
    def most_with_claims(self) -> int:
        """Machines that wait for claims no more than they may."""
        looking = math.isqrt(int(TOLERATED * STORE_OPERATIONS * self.seconds / (LOOKS * OPERATIONS_OF_LOOK)))
        return max(1, min(looking, int(self.workers * STORE_OPERATIONS / self.claiming)))

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "machines": self.workers,
            "outputs_per_hour": self.outputs_per_hour,
            "outputs_per_kwh": self.outputs_per_kwh,
            "loading_seconds": self.loading,
            "claims_share": self.looking,
            "claims_per_second": self.claiming,
            "breaks": self.breaks,
        }

    @property
    def lines(self) -> list[str]:
        """The arithmetic, for people."""
        operations = LOOKS * OPERATIONS_OF_LOOK
        lines = [
            f"Weights: {self.workers:,} x {bytes_text(self.weights)} / {bytes_text(STORE_RATE)}/s = "
            f"{self.workers * self.weights / STORE_RATE:,.0f} s; from {self.most_with_store + 1} machines on they wait "
            "for each other: keep a copy on each.",
            f"Claims of --shard: {self.workers:,} machines x {self.workers:,} items made at once x {operations} "
            f"operations / {STORE_OPERATIONS:,}/s = {self.looking * self.seconds:,.3g} s for {self.seconds:,.3g} s of "
            f"making; from {self.most_with_claims + 1:,} machines on use --ray.",
        ]
        if self.outputs_per_kwh is not None and self.power is not None:
            lines.append(
                f"Energy: {self.gpus} x {self.power:g} W x {self.seconds:,.3g} s = "
                f"{1 / self.outputs_per_kwh:.3g} kWh an output; hosts and cooling are not counted."
            )
        return lines
