"""What was chosen for a preset, and the evidence that it carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grat_cli.fidelity.knapsack import Choice, Floats
from grat_cli.fidelity.quality import Likeness, summary
from grat_cli.generation.request import Request
from grat_cli.presets import Attention, CheckEvidence, Evidence, OverStepsEvidence, PatternEvidence


@dataclass(frozen=True)
class Chosen:
    """A candidate for each stretch of steps, layer and head.

    Attributes:
        candidates: that were chosen from.
        densities: of each, `[C]`.
        choice: number of the candidate, `[T, L, H]`.
        weights: of each stretch in means over the steps that are computed, `[T]`; they add up to 1.
        values: a field of `Observations` in each stretch, `[T, L, H, C]`, by its name.
        stretches: of steps, as ranges of shares, `[T]`.
        computed: share of the steps that are.
        over_steps: the section of the schedule that says which; None where all are.
    """

    candidates: Sequence[Attention]
    densities: Floats
    choice: Choice
    weights: Floats
    values: Callable[[str], Floats]
    stretches: Sequence[str]
    computed: float = 1.0
    over_steps: Mapping[str, Any] | None = None

    @property
    def density(self) -> float:
        """Of the whole run."""
        return self.computed * float(self.weights @ self.densities[self.choice].mean((1, 2)))

    def of_choice(self, name: str) -> float:
        """Mean of a field of what was chosen."""
        values = np.take_along_axis(self.values(name), self.choice[..., None], axis=3)[..., 0]
        return float(self.weights @ values.mean((1, 2)))

    def of_candidates(self, name: str) -> Floats:
        """Mean of a field of each candidate, were it used throughout, `[C]`."""
        return self.weights @ self.values(name).mean((1, 2))


def evidence_of(
    asked: Request,
    chosen: Chosen,
    *,
    revision: str | None,
    target: str,
    prompts: tuple[str, ...],
    text_tokens: int,
    over_steps: OverStepsEvidence | None,
    checked: tuple[str, ...],
    checked_density: float | None,
    likenesses: Sequence[Likeness],
) -> Evidence:
    """What a preset rests on.

    Args:
        asked: model and size.
        chosen: what the preset says.
        revision: of the weights.
        target: that was wanted.
        prompts: that were observed.
        text_tokens: of the joint sequence.
        over_steps: how the steps that are computed were found.
        checked: prompts whose outputs were compared.
        checked_density: of these runs.
        likenesses: of these outputs.
    """
    recalls, errors, losses = (
        chosen.of_candidates("recall"),
        np.sqrt(chosen.of_candidates("error")),
        chosen.of_candidates("loss"),
    )
    used = sorted(set(chosen.choice.ravel().tolist()), key=lambda number: float(chosen.densities[number]))
    quality = summary(likenesses) if likenesses else None
    return Evidence(
        model=asked.model.name,
        revision=revision,
        size=asked.title,
        tokens=asked.grid.shape,
        text_tokens=text_tokens,
        steps=asked.preset.sampling.steps,
        prompts=prompts,
        target=target,
        density=figures(chosen.density),
        recall=figures(chosen.of_choice("recall")),
        output_error=figures(np.sqrt(chosen.of_choice("error"))),
        loss=figures(chosen.of_choice("loss")),
        patterns=tuple(
            PatternEvidence(
                attention=chosen.candidates[number].summary,
                share=figures((chosen.choice == number).mean()),
                density=figures(chosen.densities[number]),
                recall=figures(recalls[number]),
                output_error=figures(errors[number]),
                loss=figures(losses[number]),
            )
            for number in used
        ),
        over_steps=over_steps,
        check=None
        if quality is None
        else CheckEvidence(
            prompts=checked,
            density=figures(checked_density),
            ssim=figures(quality.ssim),
            ssim_interval=None if quality.ssim_interval is None else figures(quality.ssim_interval),
            psnr_db=figures(quality.psnr_db),
        ),
    )


def figures(value: Any) -> float:
    """Four significant figures: more would promise too much."""
    return float(f"{float(value):.4g}")
