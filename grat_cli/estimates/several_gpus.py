"""What several GPUs make of a run: how much faster its denoising is, what they send each other, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grat_cli.console.output import bytes_text
from grat_cli.estimates.hardware import LINK_SHARE, Device
from grat_cli.estimates.memory import Execution
from grat_cli.estimates.planning import Forecast
from grat_cli.estimates.ranks import bytes_of_step, exchange_of
from grat_cli.estimates.time import DenoiseSeconds, denoise_seconds, gathered_bytes
from grat_cli.families.shapes import Components
from grat_cli.models.parallel import ALONE, Parallel

MOST_OF_MACHINE = 8
"""GPUs that one machine has; between machines links are others."""


@dataclass(frozen=True)
class SeveralGpus:
    """Several GPUs that share the denoising of an output, of which all figures are arithmetic.

    Attributes:
        parallel: how.
        steps: of denoising, of all stages.
        of_call: bytes that each of the GPUs that share a call sends to others in one that computes all attention, in
            the last stage.
        of_steps: likewise in all steps.
        weights_of_call: bytes of weights that each gets from the others in a call.
        link: what carries them, and bytes per second one way; None where that is not known.
        one: what denoising takes on one such GPU; likewise.
        several: on these; likewise.
    """

    parallel: Parallel
    steps: int
    of_call: tuple[int, ...]
    of_steps: tuple[int, ...]
    weights_of_call: float
    link: tuple[str, float] | None
    one: DenoiseSeconds | None
    several: DenoiseSeconds | None

    @property
    def speedup(self) -> float | None:
        """How many times as fast denoising is as on one of them."""
        return self.one.total / self.several.total if self.one and self.several else None

    @property
    def ceiling(self) -> float | None:
        """The same if nothing had to be exchanged: text and weights are on all of them."""
        return self.one.total / (self.several.attention + self.several.rest) if self.one and self.several else None

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        several = None if self.several is None else self.several._asdict()
        return {
            "count": self.parallel.ranks,
            "cp": self.parallel.cp,
            "cfg": self.parallel.cfg,
            "reason": self.parallel.reason,
            "exchanged_bytes": {"call": self.of_call, "run": self.of_steps},
            "gathered_bytes": {"call": round(self.weights_of_call)},
            "link": None if self.link is None else {"kind": self.link[0], "bytes_per_second": self.link[1]},
            "link_share": LINK_SHARE,
            "denoise_seconds": None if several is None or self.one is None else {"one": self.one.total, **several},
            "speedup": self.speedup,
            "ceiling": self.ceiling,
        }

    @property
    def lines(self) -> list[str]:
        """For people."""
        sent = f"{bytes_text(max(self.of_steps) / self.steps)} sent by a card"
        lines = [f"{self.parallel.ranks} GPUs, {self.parallel}: {self.parallel.reason}"]
        if self.several is None or self.speedup is None or self.ceiling is None or self.link is None:
            return [*lines, f"A step: {sent}; of this device no rates are known, so add --gpu h200 or another."]
        attention, rest, exchange, weights = (_seconds(each / self.steps) for each in self.several)
        kind, rate = self.link
        gathered = f", weights {weights}" if self.weights_of_call else ""
        if self.weights_of_call:
            sent += f", {bytes_text(self.weights_of_call)} of weights in a call"
        return [
            *lines,
            f"A step: attention {attention}, the rest {rest}, exchange {exchange}{gathered} "
            f"({sent}, over {kind} of {rate / 1e9:g} GB/s, of which {LINK_SHARE:.0%} is left for it).",
            f"Denoising is {self.speedup:.1f}x as fast as on one; {self.ceiling:.1f}x if nothing had to be exchanged.",
        ]


def several_gpus(runs: Sequence[Forecast], components: Components, execution: Execution, device: Device) -> SeveralGpus:
    """What several GPUs make of a run in one stage or several.

    Args:
        runs: forecasts of its stages.
        components: parts of the pipeline.
        execution: how it uses the GPUs.
        device: each of them.

    Raises:
        BadInput: if there are fewer tokens than GPUs.
    """
    parallel, last = execution.parallel, runs[-1]
    sent = [bytes_of_step(stage, parallel, step) for stage in runs for step in range(stage.schedule.steps)]
    alone = replace(execution, parallel=ALONE, shards_weights=False)
    return SeveralGpus(
        parallel,
        len(sent),
        exchange_of(last, parallel).of_call(last.schedule.layers),
        tuple(map(sum, zip(*sent, strict=True))),
        gathered_bytes(components, execution),
        device.peers if device.kind == "cuda" else None,
        _all_stages(runs, components, alone, device),
        _all_stages(runs, components, execution, device),
    )


def _all_stages(
    runs: Sequence[Forecast], components: Components, execution: Execution, device: Device
) -> DenoiseSeconds | None:
    total = DenoiseSeconds()
    for stage in runs:
        if (found := denoise_seconds(stage, components, execution, device)) is None:
            return None
        total = total.plus(found)
    return total


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
