"""What may change between an installation and a call: each such way is followed, or the call is refused.

An installation puts hooks on a transformer and reads the steps of a run off a pipeline's scheduler. A transformer that
takes the installed one's place has none of these hooks, and a scheduler that stands still says nothing of the step that
a call is at: without a word the call would run stock attention, or that of another step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from grat_cli.errors import BadInput

_OUTSIDE = "inside `with grat_cli.install(...)`: do that outside"
# Guidance calls a transformer two or three times at a step.
_MOST_CALLS_OF_A_STEP = 4


class Watched(Protocol):
    """What is asked of an adapter."""

    @property
    def called(self) -> Any:
        """The transformer, as it is called."""
        ...

    def whole_obstacle(self) -> str | None:
        """Why it cannot be compiled as a whole, or None."""
        ...


class CallWatch:
    """Watches over the calls of a pipeline that GRAT is installed on."""

    def __init__(
        self, pipe: Any, adapters: Sequence[Watched], require_able: Callable[[torch.device, torch.dtype], None]
    ) -> None:
        """Watches nothing yet.

        Args:
            pipe: the pipeline.
            adapters: of its transformers.
            require_able: raises BadInput where attention cannot be computed on a device and in a dtype.
        """
        self._pipe, self._adapters, self._require_able = pipe, adapters, require_able
        self._places = [
            (name, adapter) for name, part in vars(pipe).items() for adapter in adapters if part is adapter.called
        ]
        self._able: set[tuple[torch.device, torch.dtype]] = set()
        self._step: tuple[int, int | None, int] | None = None
        self._calls_of_step = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, calls of the pipeline and of its transformers are watched.

        Raises:
            BadInput: at the end, if a transformer was replaced meanwhile: calls from then on had no GRAT in them.
        """
        with ExitStack() as stack:
            for adapter in self._adapters:
                before = torch.compiler.disable(self._before_call)
                handle = adapter.called.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(self._at_the_beginning())
            yield
            self.refuse_replaced()

    @contextmanager
    def _at_the_beginning(self) -> Iterator[None]:
        """While inside, a call of the pipeline is refused where it begins; pipelines first check their inputs."""
        pipe, name = self._pipe, "check_inputs"
        stock = getattr(pipe, name, None)
        if stock is None:
            yield
            return
        before = vars(pipe).get(name)

        def check_inputs(*arguments: Any, **options: Any) -> Any:
            self.refuse_replaced()
            return stock(*arguments, **options)

        setattr(pipe, name, check_inputs)
        try:
            yield
        finally:
            if before is not None:
                setattr(pipe, name, before)
            elif vars(pipe).get(name) is check_inputs:
                delattr(pipe, name)

    def refuse_replaced(self) -> None:
        """Raises BadInput if a transformer of the pipeline is another than GRAT was installed on."""
        for name, adapter in self._places:
            part = getattr(self._pipe, name, None)
            if part is None or part is adapter.called:  # what is let go of is not run
                continue
            if getattr(part, "_orig_mod", None) is not adapter.called:
                raise BadInput(f"the pipeline's {name} was replaced {_OUTSIDE}")
            if (reason := adapter.whole_obstacle()) is not None:
                raise BadInput(reason)

    def _before_call(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(module is adapter.called for adapter in self._adapters):
            return  # a copy's, whose adapter refuses it
        self.refuse_replaced()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if torch.is_grad_enabled() and any(one.requires_grad for one in (*tensors, *module.parameters())):
            raise BadInput(
                "GRAT computes no gradients, and the call would record some: call under torch.no_grad(), as pipelines "
                "do, and train without GRAT"
            )
        self._refuse_moved([one for one in tensors if one.is_floating_point()])
        self._refuse_idle_scheduler(module)

    def _refuse_moved(self, tensors: Sequence[torch.Tensor]) -> None:
        if not tensors:
            return
        device, dtype = tensors[0].device, tensors[0].dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if (device, dtype) not in self._able:
            self._require_able(device, dtype)
            self._able.add((device, dtype))

    def _refuse_idle_scheduler(self, module: torch.nn.Module) -> None:
        """Raises BadInput unless the pipeline's scheduler may be at the step of the call."""
        scheduler = self._pipe.scheduler
        if not counts_steps(scheduler):
            raise BadInput(f"{type(scheduler).__name__}, which does not count its steps, was put in {_OUTSIDE}")
        index, steps = scheduler.step_index, getattr(scheduler, "num_inference_steps", None)
        if index is None and steps is None:
            raise BadInput(
                "the transformer is called, and the pipeline's scheduler has no steps: call the pipeline that GRAT was "
                "installed on, or begin with pipe.scheduler.set_timesteps(...)"
            )
        if index is not None and index >= len(scheduler.timesteps):
            raise BadInput(
                "the transformer is called, and the pipeline's scheduler has done all its steps: call the pipeline "
                "that GRAT was installed on, or begin anew with pipe.scheduler.set_timesteps(...)"
            )
        step = id(scheduler), index, id(module)
        self._calls_of_step = self._calls_of_step + 1 if step == self._step else 1
        self._step = step
        if self._calls_of_step > _MOST_CALLS_OF_A_STEP:
            raise BadInput(
                f"the transformer was called {self._calls_of_step} times, and the pipeline's scheduler stands still: "
                "call the pipeline that GRAT was installed on, or its scheduler's step() after each step"
            )


def counts_steps(scheduler: Any) -> bool:
    """Whether a scheduler tells which step it is at."""
    return hasattr(scheduler, "step_index") and hasattr(scheduler, "begin_index")
