"""Runs with a step cache: gone on with as if whole, stage by stage, seed by seed, and what is told of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import STEPS, Progress, Small, broken_off, generate, goes_on_as_if_whole, tamper

from grat_cli.attention import caching
from grat_cli.console import run_tables
from grat_cli.errors import BadInput, Interrupted
from grat_cli.files import tensors
from grat_cli.generation.checkpoint import find_run, read_run
from grat_cli.generation.request import Request
from grat_cli.generation.selection import select_preset
from grat_cli.generation.stage import refuse_cache
from grat_cli.models.catalogue import choose_model, medium_of_name

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
    [("picture", "first-block"), ("picture", "faster"), ("video", "taylor"), ("cascade", "pab")],
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


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.parametrize("cache", CACHES)
def test_a_run_that_is_broken_off_within_a_step_goes_on_from_its_begin(
    loaded: Any, small: Small, cache: str, written: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """By then the cache keeps what the next step is not to know."""
    asked = cached(small, CACHES[cache], tmp_path / "a")
    generate(asked)
    whole = written.pop("a")
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png.json").unlink(missing_ok=True)
    calls = 0

    def break_off(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * 3 + 2:  # in the second call of the fourth step
            raise KeyboardInterrupt

    asked = replace(asked, overwrite=True)
    handle = loaded.transformer.norm_out.register_forward_hook(break_off)
    with pytest.raises(Interrupted, match="after step 3 of 5"):
        generate(asked)
    handle.remove()
    begun, restored = read_run(find_run(asked.outputs[0]))
    (made,) = generate(restored, begun=begun)
    np.testing.assert_array_equal(written["a"], whole)
    assert sum(group["count"] for group in made.report["cache"]["steps"]) == STEPS


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.usefixtures("loaded")
def test_a_guard_and_a_cache_go_on_together(small: Small, written: dict[str, np.ndarray], tmp_path: Path) -> None:
    chosen = small.guarded().model_copy(update={"cache": cached(small, CACHES["pab"], tmp_path / "a").preset.cache})
    asked = small.of(tmp_path / "a-s7", tmp_path / "a-s8", preset=chosen, checkpoint_every=0)
    (first, _) = goes_on_as_if_whole(asked, written, tmp_path)
    assert first.report["guard"]["widened"]
    assert any("computed" in step for step in first.report["steps"])


def gone_on_with(kept: Path) -> None:
    begun, restored = read_run(kept)
    generate(restored, begun=begun)


def _without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "cache": []}


def _other_holder(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "cache": [{**one, "holder": 99} for one in state["cache"]]}


def _other_transformer(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "cache": [{**one, "transformer": 7} for one in state["cache"]]}


def _other_attribute(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "cache": [{**one, "values": {"__class__": 3}} for one in state["cache"]]}


def _other_kind(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "cache": [{**one, "values": {"cache": {"code": "x"}}} for one in state["cache"]]}


def _huge(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "cache": [{**one, "values": {"iteration": 10**30}} for one in state["cache"]]}


def _deep(state: dict[str, Any]) -> dict[str, Any]:
    value: Any = 1
    for _ in range(50):
        value = {"list": [value]}
    return {**state, "cache": [{**one, "values": {"cache": value}} for one in state["cache"]]}


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.parametrize(
    "damage",
    [_without_tensors, _other_holder, _other_transformer, _other_attribute, _other_kind, _huge, _deep],
)
@pytest.mark.usefixtures("loaded", "written")
def test_what_a_cache_had_kept_is_held_to_what_it_keeps(small: Small, tmp_path: Path, damage: Any) -> None:
    kept = broken_off(cached(small, CACHES["pab"], tmp_path / "a", checkpoint_every=1), after=4)
    told = about(kept)
    tamper(kept, state={"cache": damage(told["state"])["cache"]})
    with pytest.raises(BadInput, match=r"damaged|start it anew"):
        gone_on_with(kept)


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.parametrize(
    "tensor", [torch.zeros(1, 3, 3), torch.full((1, 120, 64), torch.nan), torch.zeros(2, 2, dtype=torch.int64)]
)
@pytest.mark.usefixtures("loaded", "written")
def test_tensors_that_a_cache_cannot_have_kept_are_refused(small: Small, tmp_path: Path, tensor: torch.Tensor) -> None:
    kept = broken_off(cached(small, CACHES["pab"], tmp_path / "a", checkpoint_every=1), after=3)
    tamper(kept, {f"cache.{number}": tensor + number * 0 for number in range(4)})
    with pytest.raises(BadInput, match=r"damaged|start it anew"):
        gone_on_with(kept)


def about(kept: Path) -> dict[str, Any]:
    told = tensors.read_about(kept)
    assert told is not None
    return dict(told)


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.usefixtures("loaded", "written")
def test_what_is_too_much_for_a_checkpoint_is_said_and_not_kept(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "MOST_KEPT_BYTES", 1000)
    progress = Progress(after=3)
    with pytest.raises(KeyboardInterrupt):
        generate(cached(small, CACHES["taylor"], tmp_path / "a", checkpoint_every=1), progress)
    assert progress.notes[-1] == "a cache that keeps so much has no checkpoint within a stage: step 3 is not kept"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.usefixtures("loaded", "written")
def test_a_run_says_what_was_computed_and_what_was_not(small: Small, tmp_path: Path) -> None:
    progress = Progress()
    (made,) = generate(cached(small, CACHES["taylor"], tmp_path / "a"), progress)
    report = made.report
    assert progress.works == [
        *("all layers computed",) * 2,
        *("all layers forecast", "all layers computed", "all layers forecast"),
    ]
    groups = [(group["steps"], group["count"], group["computed"]) for group in report["cache"]["steps"]]
    assert groups == [("0-1, 3", 3, None), ("2, 4", 2, ["", ""])]
    planned = report["cache"]["planned_density"]
    assert report["density"] == pytest.approx(planned * 3 / 5)
    assert report["stages"][0]["density"] == report["density"]
    assert report["ideal_speedup"] == pytest.approx(1 / report["density"])
    assert [step["density"] for step in report["steps"]] == pytest.approx([planned, planned, 0, planned, 0])
    (line,) = run_tables.cache_lines([report])
    assert line == (
        "cache taylor: 3 of 5 steps computed whole; in steps 3, 5 all layers forecast; "
        f"density {planned:.3f} became {report['density']:.3f}"
    )
    assert report["preset"]["cache"]["cache_interval"] == 2


@pytest.mark.parametrize(
    ("computed", "text"),
    [
        ((), "all layers computed"),
        (("", ""), "all layers reused"),
        (("0", "0"), "layer 0 computed, the rest reused"),
        (("0", "0-11"), "layer 0 computed and all layers in another call, the rest reused"),
        (("0, 3-5",), "layers 0, 3-5 computed, the rest reused"),
    ],
)
def test_what_was_computed_reads_well(computed: tuple[str, ...], text: str) -> None:
    assert run_tables.computed_text(computed, "reused", 12) == text


@pytest.mark.parametrize("small", ["cascade"], indirect=True)
@pytest.mark.usefixtures("loaded", "written")
def test_stages_tell_of_their_caches_apart(small: Small, tmp_path: Path) -> None:
    (made,) = generate(cached(small, CACHES["pab"], tmp_path / "a"))
    (line,) = run_tables.cache_lines([made.report])
    assert line.startswith("cache pab: 64x64 ")
    assert "; 128x128 " in line


@pytest.mark.parametrize(
    ("model", "cache", "says"),
    [
        ("flux2-klein-4b", "first-block", "some of its blocks return text and image apart"),
        ("hunyuan15-480p", "mag", "diffusers does not know what its HunyuanVideo15TransformerBlock takes and returns"),
        ("wan2.2-14b", "mag", "run once with --cache mag:calibrate=true"),
    ],
)
def test_a_cache_that_a_model_cannot_have_is_refused_before_its_weights_are_there(
    model: str, cache: str, says: str, tmp_path: Path
) -> None:
    choice = choose_model(model, medium=medium_of_name(model) or "image")
    size: dict[str, Any] = {"width": 832, "height": 480, **({"frames": 17, "fps": 16} if choice.video else {})}
    preset = select_preset(choice, cache=cache)
    ending = ".mp4" if choice.video else ".png"
    format = ending[1:]
    asked = Request(
        prompt="a", preset=preset, model=choice, **size, seeds=(1,), outputs=(tmp_path / f"a{ending}",), format=format
    )
    with pytest.raises(BadInput, match=f"^cache {cache} .*{says}"):
        generate(asked)


@pytest.mark.parametrize("model", ["flux-dev", "qwen-image", "hunyuan", "wan2.1-14b"])
def test_caches_that_diffusers_has_for_a_model_are_not_refused(model: str) -> None:
    choice = choose_model(model, medium=medium_of_name(model) or "image")
    size: dict[str, Any] = {"width": 832, "height": 480, **({"frames": 17, "fps": 16} if choice.video else {})}
    for cache in ("first-block", "taylor", "taylor:use_lite_mode=true", "pab", "faster", "mag:calibrate=true"):
        refuse_cache(Request(prompt="a", preset=select_preset(choice, cache=cache), model=choice, **size))
