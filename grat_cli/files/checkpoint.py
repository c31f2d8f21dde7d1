"""The state of a run between two denoising steps, kept beside its output: `NAME.checkpoint.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput
from grat_cli.files.tensors import read_tensors, write_tensors
from grat_cli.files.whole import remove

if TYPE_CHECKING:
    import torch

SCHEMA = "grat.checkpoint/1"
_STEPS_DONE = "steps_done"
_STEP_TIMINGS = "step_timings"


@dataclass(frozen=True)
class RunCheckpoint:
    """Where a run stood.

    Attributes:
        step: denoising steps done.
        latents: after that step, on the CPU, in the dtype of the run.
        generator_state: of the random generator (`torch.Generator.get_state()`), None where it is not needed.
        about: the whole request as JSON data, with the timings of the steps done under `step_timings`; its `schema`
            is that of checkpoints.
    """

    step: int
    latents: torch.Tensor
    generator_state: torch.Tensor | None
    about: dict[str, Any]

    @property
    def step_timings(self) -> list[Any]:
        """What was kept of each step done."""
        return self.about[_STEP_TIMINGS]


class CheckpointStore:
    """Keeps the newest checkpoint of one run in one file.

    A process that is killed at any moment, or a disk that is full, leaves the last checkpoint whole.

    Args:
        path: the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(
        self,
        step: int,
        latents: torch.Tensor,
        generator_state: torch.Tensor | None,
        about: Mapping[str, Any],
        step_timings: Sequence[Any] = (),
        *,
        overwrite: bool = False,
    ) -> None:
        """Replaces the checkpoint; on return it is on the disk.

        Args:
            step: denoising steps done.
            latents: of any shape and dtype; kept bit for bit.
            generator_state: uint8 `[bytes]`, of `torch.Generator.get_state()`.
            about: JSON data: the whole request; `schema`, `steps_done` and `step_timings` are set here.
            step_timings: JSON data of each step done, so that the report at the end has them all.
            overwrite: whether a checkpoint of another process may be replaced.

        Raises:
            CannotWrite: if it cannot be written; the checkpoint before is still there.
        """
        tensors = {"latents": latents}
        if generator_state is not None:
            tensors["generator_state"] = generator_state
        state = {"schema": SCHEMA, _STEPS_DONE: step, _STEP_TIMINGS: list(step_timings)}
        write_tensors(self.path, tensors, {**about, **state}, overwrite=overwrite)

    def read(self, shape: Sequence[int] | None = None) -> RunCheckpoint:
        """The checkpoint.

        Args:
            shape: that the latents must have, where the run to be continued is known.

        Raises:
            BadInput: if there is none, or it is another kind of file, of another version, damaged, or of another shape.
        """
        import torch

        tensors, about = read_tensors(self.path, SCHEMA, "a checkpoint")
        latents, generator_state = tensors.get("latents"), tensors.get("generator_state")
        step, timings = about.get(_STEPS_DONE), about.get(_STEP_TIMINGS)
        if (
            latents is None
            or not isinstance(step, int)
            or step < 0
            or not isinstance(timings, list)
            or (generator_state is not None and (generator_state.dtype != torch.uint8 or generator_state.ndim != 1))
        ):
            raise BadInput(f"{self.path} is damaged: it is not a whole checkpoint")
        if shape is not None and tuple(latents.shape) != tuple(shape):
            raise BadInput(
                f"{self.path} is of another run: its latents are {list(latents.shape)}, this run's are {list(shape)}"
            )
        return RunCheckpoint(step, latents, generator_state, about)

    def remove(self) -> None:
        """Removes the checkpoint if it is this process's own, and what killed processes left of theirs."""
        remove(self.path)
