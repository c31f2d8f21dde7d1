"""GRAT with LoRA, step caches, compiled blocks, other forms of weights and offloading: no cell is silently wrong."""

from __future__ import annotations

import pytest
from combinations import ATTENTIONS, FEATURES, MODELS, cascade_cell, cell

# What diffusers itself does not serve, and what is refused, by what is said of it.
REFUSED = {
    ("compiled blocks", "far with guard"): "cannot be observed",
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("model", MODELS)
def test_each_combination_equals_stock_or_the_same_without(model: str, feature: str) -> None:
    for attention in ATTENTIONS:
        found = cell(model, feature, attention)
        if (said := REFUSED.get((feature, attention))) is not None:
            assert found.outcome == "refused", found
            assert said in found.text
        else:
            assert found.outcome == ("near" if _is_cache(feature) and attention != "full" else "equal"), found


def _is_cache(feature: str) -> bool:
    return FEATURES[feature].plain is None


@pytest.mark.parametrize("feature", FEATURES)
def test_each_runs_in_the_stages_of_large_pictures(feature: str) -> None:
    found = cascade_cell(feature)
    assert found.outcome == ("near" if _is_cache(feature) else "equal"), found
