"""The `cache` section of presets and `--cache`: what may be said, and how mistakes are answered."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.errors import BadInput
from grat_cli.presets import CACHES, Preset, cache_from_text, load_preset, preset_yaml, resolve_preset

FAR = load_preset("demo-far")


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("first-block", "first-block"),
        ("first-block:threshold=0.1", "first-block, threshold 0.1"),
        ("mag:max_skip_steps=2,threshold=0.1", "mag, threshold 0.1, max_skip_steps 2"),
        ("taylor:cache_interval=3:max_order=2", "taylor, cache_interval 3, max_order 2"),
        ("taylor:disable_cache_after_step=null", "taylor"),
        ("taylor:use_lite_mode=true,taylor_factors_dtype=float32", "taylor, use_lite_mode true, taylor_factors_dtype "),
        ("pab:timesteps=100-700", "pab, timesteps 100-700"),
        ("faster:weight=0", "faster, weight 0"),
    ],
)
def test_a_typed_cache_is_resolved_into_the_preset_and_written_whole(text: str, summary: str, tmp_path: Path) -> None:
    preset = resolve_preset(FAR, cache=text)
    assert preset.cache is not None
    assert preset.cache.summary.startswith(summary)
    path = tmp_path / "own.yaml"
    path.write_text(preset_yaml(preset))
    assert load_preset(str(path)) == preset
    assert Preset.model_validate_json(preset.model_dump_json()) == preset
    assert resolve_preset(preset, cache="none") == FAR
    assert resolve_preset(preset, cache="pab").cache == cache_from_text("pab", "--cache")


def test_a_kind_alone_has_diffusers_defaults() -> None:
    from diffusers.hooks.faster_cache import FasterCacheConfig
    from diffusers.hooks.mag_cache import MagCacheConfig
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

    def own(kind: str) -> dict[str, Any]:
        cache = cache_from_text(kind, "--cache")
        assert cache is not None
        return cache.model_dump()

    taylor, mag = TaylorSeerCacheConfig(), MagCacheConfig(calibrate=True)
    same = ("cache_interval", "max_order", "disable_cache_before_step", "disable_cache_after_step", "use_lite_mode")
    assert {name: own("taylor")[name] for name in same} == {name: getattr(taylor, name) for name in same}
    same = ("threshold", "max_skip_steps", "retention_ratio")
    assert {name: own("mag")[name] for name in same} == {name: getattr(mag, name) for name in same}
    assert own("pab")["timesteps"] == PyramidAttentionBroadcastConfig().spatial_attention_timestep_skip_range
    assert own("faster")["skip_range"] == FasterCacheConfig().spatial_attention_block_skip_range


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        ("tailor", "3: cache.kind: unknown value 'tailor': did you mean 'taylor'?"),
        ("3", "expected first-block, mag, taylor, pab, faster, or a section with a kind, not 3"),
        ("{threshold: 0.1}", "cache.kind: is missing: choose from first-block"),
        ("{kind: taylor, interval: 3}", "cache.interval: unknown key: did you mean 'cache_interval'?"),
        ("{kind: taylor, cache_interval: 1}", "cache.cache_interval: expected 2 or more, not 1"),
        ("{kind: taylor, disable_cache_before_step: 0}", "disable_cache_before_step: expected 1 or more, not 0"),
        ("{kind: taylor, max_order: 9}", "cache.max_order: expected 4 or less, not 9"),
        ("{kind: first-block, threshold: '0.1'}", "cache.threshold: expected a number, not '0.1'"),
        ("{kind: first-block, threshold: .nan}", "cache.threshold: expected "),
        ("{kind: mag, ratios: [1]}", "cache.ratios: expected 2 or more of them"),
        ("{kind: mag, ratios: [1, a]}", "cache.ratios[1]: expected a number, not 'a'"),
        ("{kind: pab, timesteps: 800-100}", "expected timesteps from 0 to 1000, such as 100-800, not '800-100'"),
        ("{kind: [pab]}", "cache.kind: unknown value ['pab']"),
    ],
)
def test_mistakes_in_a_preset_are_told_with_file_line_and_key(cache: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"name: own\nmodel: demo\ncache: {cache}\nattention: {{variant: b, group: [4, 4]}}\n")
    with pytest.raises(BadInput) as caught:
        load_preset(str(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert says in str(caught.value)


def test_settings_of_a_cache_can_be_set_one_by_one() -> None:
    preset = resolve_preset(FAR, set_items=["cache.kind=taylor", "cache.max_order=2"])
    assert preset.cache == cache_from_text("taylor:max_order=2", "--cache")
    with pytest.raises(BadInput, match=r"cache\.kind: is missing"):
        resolve_preset(FAR, set_items=["cache.threshold=0.1"])


@pytest.mark.parametrize("kind", CACHES)
@given(rest=st.text(max_size=40))
def test_whatever_is_typed_is_a_cache_or_refused_in_a_line(kind: str, rest: str) -> None:
    with contextlib.suppress(BadInput):
        cache_from_text(f"{kind}:{rest}", "--cache")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["threshold", "ratios", "timesteps", "max_order", "use_lite_mode", "kind"]),
    st.sampled_from(CACHES),
)
def test_whatever_a_preset_says_is_a_cache_or_refused(value: Any, name: str, kind: str) -> None:
    from pydantic import ValidationError

    for cache in (value, {"kind": kind, name: value}):
        with contextlib.suppress(ValidationError):
            found = Preset.model_validate({**FAR.model_dump(), "cache": cache})
            assert Preset.model_validate(found.model_dump()) == found
