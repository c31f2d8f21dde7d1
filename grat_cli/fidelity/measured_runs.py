"""Runs of presets on trial, measured by their latents, and kept in files: a search that was broken off goes on."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from grat_cli.errors import BadInput
from grat_cli.files.json_objects import read_json, validated
from grat_cli.files.whole import write_whole
from grat_cli.presets import Preset

if TYPE_CHECKING:
    import torch

_SCHEMA = "grat.tune-run/1"
_LARGEST = 1e12


class MeasuredRun(BaseModel):
    """How far the latents of a run end from those of full attention.

    Attributes:
        error: see `relative_error`.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    error: Annotated[float, Field(ge=0, le=_LARGEST, allow_inf_nan=False)]


class _File(BaseModel):
    """As it is on file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    schema_: Annotated[Literal["grat.tune-run/1"], Field(alias="schema")]
    about: dict[str, Any]
    measured: MeasuredRun


Run = Callable[[Preset, int], MeasuredRun]


@dataclass
class Measurements:
    """Measures presets on some prompts, as long as a budget of runs lasts.

    Runs that are on file count as others do, so that a search takes the same way whether it was broken off or not.

    Attributes:
        folder: of the files.
        about: what each run is of besides the preset, by prompt.
        run: makes the run of a preset with the n-th prompt.
        left: runs that may still be asked for.
    """

    folder: Path
    about: Sequence[Mapping[str, Any]]
    run: Run
    left: int
    _firsts: dict[int, float] = field(default_factory=dict)

    def ratio(self, preset: Preset, at_most: float = math.inf) -> float:
        """Errors over those of the preset that was measured first, mean over the prompts, which so count alike.

        Args:
            preset: on trial.
            at_most: a bound; infinite is returned once the mean is sure to be more.
        """
        total = 0.0
        for number in range(len(self.about)):
            self.left -= 1
            error = self._measured(preset, number).error
            total += error / (self._firsts.setdefault(number, error) or 1.0)
            if total / len(self.about) > at_most:
                return math.inf
        return total / len(self.about)

    def error(self, preset: Preset) -> float:
        """Mean over the prompts of the errors of a preset that was measured on all of them."""
        return statistics.fmean(self._measured(preset, number).error for number in range(len(self.about)))

    @property
    def lasts(self) -> bool:
        """Whether another preset can be measured on all prompts."""
        return self.left >= len(self.about)

    def _measured(self, preset: Preset, number: int) -> MeasuredRun:
        """Of a preset with one prompt, from its file where there is one.

        Raises:
            BadInput: if a file is damaged.
        """
        of_preset = preset.model_dump(mode="json", include={"attention", "schedule"})
        # Through JSON, as what is on file has been.
        about = json.loads(json.dumps({**self.about[number], **of_preset}))
        digest = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        path = self.folder / f"measured-{digest}.json"
        if path.exists():
            return _read(path, about)
        made = self.run(preset, number)
        content = {"schema": _SCHEMA, "about": about, "measured": made.model_dump()}
        write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()), durable=True)
        return made


def _read(path: Path, about: Mapping[str, Any]) -> MeasuredRun:
    try:
        found = validated(_File, read_json(path))
        if found.about != about:
            raise ValueError("it is of another run than its name says")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}): remove it") from error
    return found.measured


def relative_error(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean square of the difference of latents, over the variance of the reference."""
    reference = reference.double()
    return float((latents.cpu().double() - reference).square().mean() / reference.var(correction=0))
