"""GRAT with LoRA, step caches, compiled blocks, other forms of weights and offloading: no cell is silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from combinations import (
    ATTENTIONS,
    CARRIED,
    EQUAL,
    FEATURES,
    GUIDED,
    MODELS,
    Attention,
    cascade_cell,
    cell,
    distance,
    run,
)

from grat_cli.errors import BadInput


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("model", MODELS)
def test_each_combination_equals_stock_or_the_same_without(model: str, feature: str) -> None:
    for attention in ATTENTIONS:
        found = cell(model, feature, attention)
        assert found.outcome == ("near" if _is_cache(feature) and attention != "full" else "equal"), found


def _is_cache(feature: str) -> bool:
    return FEATURES[feature].plain is None


@pytest.mark.parametrize("model", MODELS)
def test_the_first_block_says_what_compiled_blocks_compute(model: str) -> None:
    made = []
    for compiled in (False, True):
        pipe = MODELS[model].make()
        if compiled:
            FEATURES["compiled blocks"].apply(pipe)
        made.append(run(pipe, model, "far", cache="first-block:threshold=1.0"))
    assert torch.equal(*made)
    with pytest.raises(BadInput, match="cache taylor inside a compiled transformer is not supported"):
        run(pipe, model, "far", cache="taylor")


@pytest.mark.parametrize("feature", FEATURES)
def test_each_runs_in_the_stages_of_large_pictures(feature: str) -> None:
    found = cascade_cell(feature)
    assert found.outcome == ("near" if _is_cache(feature) else "equal"), found


# ---- Attention that is carried over steps

# What is carried, and what they make of a call, take the same place.
_IN_ITS_PLACE = ("taylor", "pab", "faster")
_CARRIED_CELLS = [
    *(("Flux", feature) for feature in FEATURES if feature != "compiled blocks"),
    *((model, feature) for model in CARRIED if model != "Flux" for feature in ("LoRA", "offload group")),
    # Of the blocks of the others diffusers' caches know nothing.
    *((model, "first-block") for model in ("Qwen-Image", "HunyuanVideo", "Wan", "Wan A14B")),
]


@pytest.mark.parametrize(("model", "feature"), _CARRIED_CELLS)
def test_each_runs_with_attention_over_steps_or_is_refused(model: str, feature: str) -> None:
    found = cell(model, feature, "over steps")
    if feature in _IN_ITS_PLACE:
        assert found.outcome == "refused", found
        assert "take the same place: leave out one of the two" in found.text
    else:
        assert found.outcome == ("near" if _is_cache(feature) else "equal"), found


@pytest.mark.parametrize("model", GUIDED)
def test_guidance_carries_each_of_its_calls_by_itself(model: str) -> None:
    """With a scale of one the other call has no say, whatever is carried in it."""
    arguments = GUIDED[model]()
    carried, plain = (run(CARRIED[model].make(), model, over, **arguments) for over in _OVER_AND_NOT)
    assert distance(carried, plain) > EQUAL, "nothing was carried"
    (scale,) = (name for name in arguments if name.endswith("_scale"))
    alone, unguided = (
        run(CARRIED[model].make(), model, "over steps", **{**arguments, scale: one}) for one in (1.0 + 1e-6, 1.0)
    )
    assert distance(alone, unguided) < EQUAL


_OVER_AND_NOT: tuple[Attention, Attention] = ("over steps", "far")


@pytest.mark.parametrize("model", [name for name in CARRIED if name != "FLUX.2"])
def test_a_batch_is_what_its_samples_are_alone(model: str) -> None:
    name = "num_images_per_prompt" if len(CARRIED[model].group) == 2 else "num_videos_per_prompt"
    arguments: dict[str, Any] = {name: 2}
    both = run(CARRIED[model].make(), model, "over steps", **arguments, generator=_generators(5, 6))
    for sample, seed in zip(both, (5, 6), strict=True):
        alone = run(CARRIED[model].make(), model, "over steps", generator=_generators(seed))
        assert distance(sample, alone[0]) < EQUAL


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
