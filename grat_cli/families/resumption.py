"""Runs that go on: a scheduler that begins at a later step, with what it remembers of the steps before.

Solvers of several steps keep earlier predictions and samples. What a scheduler keeps is found by its shape, and where
it belongs by letting the scheduler take the steps that are done on placeholders: so nothing here knows any of them by
name, and their counters are right because they have counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput

if TYPE_CHECKING:
    import torch

_PLACEHOLDER = (1,) * 5  # latents of pictures and videos have fewer axes, or other lengths


def remembered(scheduler: Any, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a scheduler keeps of the samples and predictions of earlier steps, by the names of its attributes.

    Args:
        scheduler: of diffusers, or a `LaterSteps` of one.
        latents: after its last step.
    """
    if isinstance(scheduler, LaterSteps):
        scheduler = scheduler.whole
    return {name: tensor for name, _, _, tensor in _kept(scheduler, tuple(latents.shape))}


class LaterSteps:
    """A scheduler as a pipeline sees it that goes on with a run: its schedule begins at the first step to be done.

    Inside, the scheduler has the whole schedule, which solvers look back and ahead in.

    Attributes:
        whole: the scheduler.
    """

    def __init__(self, whole: Any, first_step: int, history: Mapping[str, torch.Tensor]) -> None:
        """Changes nothing yet.

        Args:
            whole: a scheduler of diffusers that counts its steps.
            first_step: the first step to be done.
            history: of `remembered`, after the step before.
        """
        self.whole, self._first, self._history = whole, first_step, history

        @functools.wraps(whole.set_timesteps)  # pipelines look at its signature
        def set_timesteps(*arguments: Any, **options: Any) -> None:
            self._lay_out(arguments, options)

        self.set_timesteps = set_timesteps

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    @property
    def timesteps(self) -> torch.Tensor:
        """Of the steps to be done."""
        return self.whole.timesteps[self._first :]

    @property
    def sigmas(self) -> torch.Tensor:
        """Likewise, and what the last one ends at."""
        return self.whole.sigmas[self._first :]

    @property
    def num_inference_steps(self) -> int:
        """How many there are."""
        return len(self.timesteps)

    @property
    def step_index(self) -> int | None:
        """Of the step under way, among those to be done."""
        return None if self.whole.step_index is None else self.whole.step_index - self._first

    @property
    def begin_index(self) -> int | None:
        """Of the first one, likewise."""
        return None if self.whole.begin_index is None else self.whole.begin_index - self._first

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets it."""
        self.whole.set_begin_index(begin_index + self._first)

    def _lay_out(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Lays out the whole schedule, and takes the scheduler to where the run was.

        Raises:
            BadInput: if it would remember something else there than was kept.
        """
        import torch

        whole = self.whole
        whole.set_timesteps(*arguments, **options)
        whole.set_begin_index(0)
        device = whole.timesteps.device
        nothing = torch.zeros(_PLACEHOLDER, device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for timestep in whole.timesteps[: self._first]:
                # The class's own: somebody may have replaced that of the instance, to see what a model says.
                type(whole).step(whole, nothing, timestep, nothing, return_dict=False)
        places = {name: (holder, key) for name, holder, key, _ in _kept(whole, _PLACEHOLDER)}
        if places.keys() != self._history.keys():
            raise BadInput(
                f"what the run has kept of its steps is not what a {type(whole).__name__} needs: start the run anew"
            )
        for name, (holder, key) in places.items():
            holder[key] = self._history[name].to(device)
        whole.set_begin_index(self._first)


def _kept(scheduler: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    """Tensors of a shape among a scheduler's attributes and in lists of them: name, what holds it, by which key."""
    import torch

    for attribute, value in list(vars(scheduler).items()):
        entries = enumerate(value) if isinstance(value, list) else [(attribute, value)]
        holder = value if isinstance(value, list) else vars(scheduler)
        for key, entry in entries:
            if isinstance(entry, torch.Tensor) and tuple(entry.shape) == shape:
                yield f"{attribute}.{key}" if isinstance(value, list) else attribute, holder, key, entry
