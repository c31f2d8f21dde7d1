"""Runs with a step cache: gone on with as if whole, stage by stage, seed by seed, and what is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import Small, goes_on_as_if_whole

from grat_cli.generation.request import Request

# Of runs of five steps, of which each leaves some of the attention out.
CACHES: dict[str, dict[str, Any]] = {
    "first-block": {"kind": "first-block", "threshold": 0.5},
    "mag": {"kind": "mag", "ratios": [1.0, 1.01], "max_skip_steps": 1},
    "taylor": {"kind": "taylor", "cache_interval": 2, "disable_cache_before_step": 2},
    "lite": {"kind": "taylor", "cache_interval": 3, "disable_cache_before_step": 2, "use_lite_mode": True},
    "pab": {"kind": "pab", "timesteps": [0, 1000]},
    "faster": {"kind": "faster", "timesteps": [0, 1000]},
}


def cached(small: Small, cache: dict[str, Any], *places: Path, **changes: Any) -> Request:
    return small.of(*places, **{"preset": small.preset(cache=cache, schedule={}), **changes})


@pytest.mark.parametrize(
    ("small", "cache"),
    [
        *(("picture", name) for name in CACHES),
        *(("video", name) for name in ("first-block", "taylor")),
        *(("cascade", name) for name in ("first-block", "mag")),
    ],
    indirect=["small"],
)
@pytest.mark.usefixtures("loaded")
def test_a_run_with_a_cache_goes_on_as_if_whole(
    small: Small, cache: str, written: dict[str, np.ndarray], tmp_path: Path
) -> None:
    asked = cached(small, CACHES[cache], tmp_path / "a-s7", tmp_path / "a-s8", checkpoint_every=1)
    made = goes_on_as_if_whole(asked, written, tmp_path)
    for one in made:
        assert one.report["cache"]["kind"] == CACHES[cache]["kind"]
        assert any("computed" in step for step in one.report["steps"]), "nothing was left out"
