"""GRAT with LoRA, step caches, compiled blocks, other forms of weights and offloading: no cell is silently wrong."""

from __future__ import annotations

import pytest
import torch
from combinations import ATTENTIONS, FEATURES, MODELS, cascade_cell, cell, run

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
