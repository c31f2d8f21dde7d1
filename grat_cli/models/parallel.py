"""How the ranks of one output share its work: some of the tokens each, or one of the two calls of guidance."""

from __future__ import annotations

import re
from dataclasses import dataclass

from grat_cli.errors import BadInput

MOST_RANKS = 1024
_PARTS = re.compile(r"(cp|cfg)=([0-9]{1,4})", re.ASCII)
_EXPECTED = "expected such as cp=2,cfg=2, or auto"


@dataclass(frozen=True)
class Parallel:
    """How so many ranks share one output.

    Attributes:
        cp: ranks that share the tokens of a call, and in attention its heads (context parallelism).
        cfg: 2 where each half of the ranks makes one of the two calls of classifier-free guidance, else 1.
        reason: why.
    """

    cp: int
    cfg: int = 1
    reason: str = "as typed"

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.cp * self.cfg

    def __str__(self) -> str:
        return f"cp={self.cp},cfg={self.cfg}"


ALONE = Parallel(1, reason="one GPU")


def parse_parallel(text: str) -> tuple[int | None, int | None]:
    """`cp` and `cfg` of `--parallel`, each None where it is left open; `auto` leaves both so.

    Raises:
        BadInput: if it is neither.
    """
    if text == "auto":
        return None, None
    found: dict[str, int] = {}
    for part in text.split(","):
        match = _PARTS.fullmatch(part.strip())
        if match is None or match[1] in found:
            raise BadInput(f"--parallel {text}: {_EXPECTED}")
        found[match[1]] = int(match[2])
    if not 1 <= found.get("cp", 1) <= MOST_RANKS or found.get("cfg", 1) not in (1, 2):
        raise BadInput(f"--parallel {text}: cp is 1 or more ranks, cfg 1 or 2: {_EXPECTED}")
    return found.get("cp"), found.get("cfg")


def choose_parallel(wanted: str, ranks: int, heads: int, calls: int, *, shards_weights: bool = False) -> Parallel:
    """How ranks share an output.

    Args:
        wanted: `--parallel`, or `auto`.
        ranks: how many there are.
        heads: of each layer, which ranks that share a call must divide.
        calls: of the transformer in a step: 2 with classifier-free guidance.
        shards_weights: whether weights are shared by the ranks of a call: the more these are, the less each holds.

    Raises:
        BadInput: if they cannot, with what can.
    """
    cp, cfg = parse_parallel(wanted)
    reason = "as typed"
    if cfg is None:
        cfg, reason = _choose_cfg(ranks if cp is None else ranks // cp, ranks, calls, cp, shards_weights)
    if cp is None:
        cp = max(1, ranks // cfg)
    chosen = Parallel(cp, cfg, reason)
    if cfg == 2 and calls != 2:
        raise BadInput(f"--parallel {wanted}: guidance makes no second call here: leave cfg=2 out")
    if chosen.ranks != ranks:
        raise BadInput(f"--parallel {wanted} is for {chosen.ranks} ranks, not {ranks}: use --gpus {chosen.ranks}")
    if shards_weights and cp == 1:
        raise BadInput(f"--shard-weights: with {chosen} no ranks share a call: leave it out, or share calls by more")
    if heads % cp:
        fitting = [count * cfg for count in range(1, heads + 1) if heads % count == 0]
        raise BadInput(f"{heads} heads cannot be shared by {cp} ranks: use --gpus {_listed(fitting)}")
    return chosen


def _choose_cfg(left: int, ranks: int, calls: int, cp: int | None, shards_weights: bool) -> tuple[int, str]:
    """`cfg` where it is left open, and why."""
    if calls != 2:
        return 1, "a step has one call, so all ranks share it"
    if cp is not None:
        return (2 if left == 2 else 1), "what --parallel leaves"
    if shards_weights:
        return 1, "weights are shared by the ranks of a call, so all share each"
    if ranks % 2:
        return 1, "guidance makes two calls a step, but the ranks are no even number"
    return 2, "guidance makes two calls a step, one for each half of the ranks, which exchange less"


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
