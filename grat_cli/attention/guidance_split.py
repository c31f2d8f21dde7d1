"""Classifier-free guidance split over ranks: of the two calls that it makes of a transformer at a step, each rank makes
one, and they exchange predictions.

A pipeline makes both calls, one after the other, on every rank. The one that is not a rank's own returns at once, with
a prediction that is filled in when the second call is over: pipelines only put the two together afterwards. Until then
it is NaN, so that one that is used before, or never filled in, cannot pass for a prediction.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from grat_cli.attention.clock import CallCounter, PipelineClock
from grat_cli.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from grat_cli.attention.layer import CallObserver

CALLS = 2
_LEAVE_OUT = "leave the split of guidance (cfg) out"


class GuidanceSplit:
    """Which calls of a run this rank makes, and what it is told of the others."""

    def __init__(self, group: ProcessGroup, clock: PipelineClock) -> None:
        """For the pipeline of a clock.

        Args:
            group: of two ranks, of which the first makes the first call of each step.
            clock: of its steps.
        """
        self._group, self._counter = group, CallCounter(clock)
        self._call = CALLS - 1
        self._first: torch.Tensor | None = None

    def takes(self) -> bool:
        """Counts one more call, and tells whether this rank makes it.

        Raises:
            BadInput: if guidance does not make two calls a step.
        """
        counted = self._counter.count()
        if counted.call >= CALLS:
            raise BadInput(f"guidance makes more than two calls of the transformer at a step: {_LEAVE_OUT}")
        if counted.call == 0 and self._call == 0 and not counted.begins_run:
            raise BadInput(f"without guidance a step makes one call of the transformer: {_LEAVE_OUT}")
        self._call = counted.call
        return self._call == self._group.rank()

    def exchanged(self, prediction: torch.Tensor, observer: CallObserver | None) -> None:
        """After a call: keeps the first prediction, and at the second fills in the one that this rank did not make.

        Args:
            prediction: of the call, made or not.
            observer: told of the exchange.
        """
        if self._call == 0:
            self._first = prediction
            return
        assert self._first is not None, "a second call follows a first one"
        from torch.distributed import broadcast

        from grat_cli.attention.context_parallel import peers

        both = self._first, prediction
        observed = observer.exchange if observer else nullcontext
        with observed(both[self._group.rank()].nbytes), peers():
            for rank, one in enumerate(both):
                broadcast(one.contiguous(), group=self._group, group_src=rank)
        self._first = None


def unmade(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A prediction that is still to be filled in.

    Args:
        model: the transformer.
        tokens: that it is called with, `[B, N, C]`, or latents `[B, C, T, H, W]`.

    Returns:
        The same with the channels of predictions.
    """
    import torch

    shape = list(tokens.shape)
    if tokens.ndim == 3:
        shape[2] = model.proj_out.out_features
    else:
        shape[1] = model.config.out_channels
    return torch.full(shape, torch.nan, dtype=tokens.dtype, device=tokens.device)
