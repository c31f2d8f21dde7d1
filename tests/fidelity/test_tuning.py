"""Fitting a preset: the palette, what is chosen of it, how it is written, and the whole way on the demo model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hunyuan
import torch
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.bench.measure import Unwatched
from grat_cli.errors import BadInput
from grat_cli.fidelity import observations as observing
from grat_cli.fidelity import tuning
from grat_cli.fidelity.fitted_preset import LETTERS, schedule_of, stretches_of
from grat_cli.fidelity.observations import Facts, Observations, Observed
from grat_cli.fidelity.palette import palette
from grat_cli.fidelity.tuning import StepSearch, TuneRequest, choose, tune
from grat_cli.generation.request import request_for
from grat_cli.generation.selection import select_preset
from grat_cli.models.catalogue import choose_model
from grat_cli.presets import Preset, load_preset, preset_yaml, ranges
from grat_kernels import Full, Grid, HeadPlan, Plan
from grat_kernels.geometry import nests

SIDE, STEPS = 96, 4  # 12 x 12 tokens of the demo
CANDIDATES = palette((4, 4), (12, 12))[::3]  # full attention, choices by content and static patterns among them


@pytest.mark.parametrize("group", [(4, 4), (16, 16), (6, 5), (1, 1), (4, 8, 8), (3, 1, 7)])
def test_a_palette_has_one_token_order_and_letters_for_all(group: tuple[int, ...]) -> None:
    made = palette(group, (40,) * len(group))
    assert len(set(made)) == len(made) <= len(LETTERS)
    assert made[0].variant == "full"
    cells = sorted({cell for attention in made for cell in attention.cells}, key=np.prod, reverse=True)
    assert all(nests(inner, outer) for outer, inner in itertools.pairwise(cells))
    assert {bool(attention.far) for attention in made} == {True, False}


@given(st.integers(1, 40), st.integers(1, 200))
def test_stretches_hold_every_step_once(count: int, steps: int) -> None:
    of_stretches = [ranges.covered(text, steps) for text in stretches_of(count)]
    assert [step for stretch in of_stretches for step in stretch] == list(range(steps))
    lengths = [len(stretch) for stretch in of_stretches]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_schedule_says_what_was_chosen(stretches: int, layers: int, heads: int, data: st.DataObject) -> None:
    numbers = st.integers(0, len(CANDIDATES) - 1)
    count = stretches * layers * heads
    flat = data.draw(st.lists(numbers, min_size=count, max_size=count))
    choice = np.array(flat).reshape(stretches, layers, heads)
    own, schedule = schedule_of(CANDIDATES, choice, stretches_of(stretches))
    preset = Preset(name="chosen", model="demo", attention=own, schedule=schedule)
    laid_out = AttentionSchedule(preset, Grid((12, 12)), 5, True, 2 * stretches, layers, heads)
    for step in range(2 * stretches):
        for layer in range(layers):
            plan = laid_out.plan(step, layer)
            for head, number in enumerate(choice[step // 2, layer].tolist()):
                of_head = plan.classes[plan.class_of_head[head]] if isinstance(plan, HeadPlan) else plan
                assert isinstance(of_head, Plan)
                assert of_head.pattern == CANDIDATES[number].pattern()
                if not isinstance(of_head.pattern, Full):  # full attention takes whatever groups there are
                    assert of_head.grouping.group == CANDIDATES[number].group


def observations(seed: int = 0, steps: int = STEPS, layers: int = 2, heads: int = 3) -> Observations:
    """Random losses that fall with density; full attention loses nothing."""
    generator = np.random.default_rng(seed)
    densities = np.sort(generator.uniform(0.05, 0.9, len(CANDIDATES)))[::-1].copy()
    densities[0] = 1.0
    shape = (steps, layers, heads, len(CANDIDATES))
    loss = generator.uniform(0.5, 1.5, shape) * (1 - densities)
    recall = np.clip(densities * generator.uniform(0.9, 1.1, shape), 0, 1)
    recall[..., 0] = 1.0
    vectors = np.cumsum(generator.normal(size=(layers, heads, steps, 4)), 2)
    gram = vectors @ vectors.swapaxes(2, 3)
    return Observations(densities, np.full((steps, layers), 8), recall, loss / 2, loss, gram)


def observed(**changes: Any) -> Observed:
    """A run of random figures."""
    sigmas = np.linspace(1, 0, STEPS + 1).tolist()
    facts = {"text_tokens": 5, "calls": 1, "sigmas": sigmas} | changes
    return Observed(observations(), Facts.model_construct(**facts), torch.ones(1, 4))


def tune_request(folder: Path, **changes: Any) -> TuneRequest:
    model = choose_model("demo")
    preset = select_preset(model, steps=STEPS)
    given: dict[str, Any] = {
        "request": request_for(model, preset, "a red fox", width=SIDE, height=SIDE, device="cpu", dtype="float32"),
        "prompts": ("a red fox", "a blue boat"),
        "candidates": CANDIDATES,
        "density": 0.5,
        "stretches": 2,
        "observed": 1,
        "rows": 16,
        "folder": folder,
        "name": "fitted",
    }
    return TuneRequest(**(given | changes))


@pytest.mark.parametrize("density", [0.15, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("stretches", [1, 2, 3])
def test_a_density_wanted_is_kept_and_nothing_fixed_as_sparse_loses_less(
    tmp_path: Path, density: float, stretches: int
) -> None:
    found = observations()
    request = tune_request(tmp_path, density=density, stretches=stretches)
    choice = choose(request, found)
    lengths = np.array([len(steps) for steps in request.steps_of_stretches()]) / STEPS
    assert lengths @ found.densities[choice].mean((1, 2)) <= density + 1e-9
    losses = found.of_stretches(request.steps_of_stretches(), "loss")
    chosen = lengths @ np.take_along_axis(losses, choice[..., None], 3)[..., 0].mean((1, 2))
    fixed = (lengths @ losses.mean((1, 2)))[found.densities <= density]
    assert chosen <= fixed.min() + 1e-9


@pytest.mark.parametrize("recall", [0.2, 0.6, 0.9, 1.0])
def test_a_recall_wanted_is_reached_and_not_overshot(tmp_path: Path, recall: float) -> None:
    found = observations()
    request = tune_request(tmp_path, density=None, recall=recall, stretches=1)
    choice = choose(request, found)
    means = found.of_stretches(request.steps_of_stretches(), "recall")
    chosen = np.take_along_axis(means, choice[..., None], 3)[..., 0]
    # One unit's move reaches the target at last; the moves are no finer than that.
    assert recall - 1e-9 <= chosen.mean() <= recall + 1 / chosen.size


def test_what_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no choice of these patterns has a density of 0\.01"):
        choose(tune_request(tmp_path, density=0.01), observations())
    with pytest.raises(BadInput, match="a run of 4 steps has no 5 stretches"):
        tune_request(tmp_path, stretches=5).steps_observed()


def test_observations_of_several_runs_are_their_mean() -> None:
    parts = [observations(seed) for seed in (1, 2)]
    parts[1] = replace(parts[1], densities=parts[0].densities, queries=3 * parts[1].queries)
    merged = Observations.merged(parts)
    assert (merged.queries == 4 * parts[0].queries).all()
    np.testing.assert_allclose(merged.loss, (parts[0].loss + 3 * parts[1].loss) / 4)
    np.testing.assert_allclose(merged.gram, (parts[0].gram + parts[1].gram) / 2)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneRequest, Preset]:
    request = tune_request(tmp_path_factory.mktemp("fitted") / "kept", checked=("a green tree", "a white cat"))
    return request, tune(request, Unwatched())


def test_a_fitted_preset_runs_as_its_evidence_foretells(fitted: tuple[TuneRequest, Preset]) -> None:
    _, tuned = fitted
    evidence = tuned.evidence
    assert evidence is not None
    assert evidence.check is not None
    laid_out = AttentionSchedule(tuned, Grid((12, 12)), evidence.text_tokens, True, STEPS, 5, 3)
    # Evidence has four significant figures.
    assert laid_out.density == pytest.approx(evidence.density, rel=5e-4)
    assert evidence.check.density == pytest.approx(laid_out.density, rel=5e-4)
    assert evidence.density <= 0.5 * (1 + 5e-4)
    assert sum(pattern.share for pattern in evidence.patterns) == pytest.approx(1, rel=5e-3)
    assert 0 < evidence.check.ssim < 1
    assert len(evidence.check.prompts) == 2


def test_a_fitted_preset_is_read_back_as_it_was(fitted: tuple[TuneRequest, Preset], tmp_path: Path) -> None:
    path = tmp_path / "fitted.yaml"
    path.write_text(preset_yaml(fitted[1]), encoding="utf-8")
    assert load_preset(str(path)) == fitted[1]


def test_what_was_observed_is_not_observed_again(fitted: tuple[TuneRequest, Preset]) -> None:
    request, tuned = fitted
    first, second = sorted(request.folder.iterdir())
    second.unlink()
    before = first.stat().st_mtime_ns
    again = tune(tune_request(request.folder), Unwatched())
    assert first.stat().st_mtime_ns == before
    assert second.exists()
    assert again.schedule == tuned.schedule
    assert again.evidence is not None
    assert again.evidence.check is None


@pytest.fixture(scope="module")
def over_steps(fitted: tuple[TuneRequest, Preset]) -> tuple[TuneRequest, Preset]:
    """From the same observations."""
    search = StepSearch(references=(2, 3), runs=8)
    request = tune_request(fitted[0].folder, density=0.3, over_steps=search, checked=("a green tree", "a white cat"))
    return request, tune(request, Unwatched())


def test_a_preset_over_steps_runs_as_its_evidence_foretells(over_steps: tuple[TuneRequest, Preset]) -> None:
    _, tuned = over_steps
    evidence = tuned.evidence
    assert evidence is not None
    assert evidence.check is not None
    found = evidence.over_steps
    assert found is not None
    (section,) = tuned.schedule.over_steps
    assert section.reference_steps(STEPS) == found.references
    assert len(found.references) in (2, 3)
    for step in range(STEPS):
        after = max(number for number, reference in enumerate(found.references) if reference <= step)
        if step not in found.references and after:
            assert section.slope_at(step, STEPS) == found.slopes[after]
    laid_out = AttentionSchedule(tuned, Grid((12, 12)), evidence.text_tokens, True, STEPS, 5, 3)
    assert laid_out.density == pytest.approx(evidence.density, rel=5e-4)
    assert evidence.check.density == pytest.approx(laid_out.density, rel=5e-4)
    assert evidence.density <= 0.3 * (1 + 5e-4)
    assert {step for step in range(STEPS) if laid_out.density_of_step(step)} == set(found.references)
    # Two outputs of each of 5 layers in both calls of a step: 144 tokens and 24 of text, 192 channels in fp32.
    assert found.kept_bytes == 2 * 5 * 2 * (144 + 24) * 192 * 4
    assert found.runs <= 8
    assert found.error is not None
    assert 0 < found.error < 1


def test_references_are_at_the_same_share_of_other_runs(over_steps: tuple[TuneRequest, Preset]) -> None:
    _, tuned = over_steps
    (section,) = tuned.schedule.over_steps
    own = section.reference_steps(STEPS)
    assert section.reference_steps(5 * STEPS) == tuple(5 * step for step in own)
    for steps in (1, 2, 7):
        laid_out = AttentionSchedule(tuned, Grid((12, 12)), 24, True, steps, 5, 3)
        assert laid_out.density > 0


def test_a_search_that_was_broken_off_goes_on(over_steps: tuple[TuneRequest, Preset]) -> None:
    request, tuned = over_steps
    kept = {path: path.stat().st_mtime_ns for path in request.folder.glob("measured-*.json")}
    assert kept
    lost = sorted(kept)[0]
    lost.unlink()
    again = tune(replace(request, checked=()), Unwatched())
    assert again.schedule == tuned.schedule
    assert again.evidence is not None
    assert tuned.evidence is not None
    assert again.evidence.over_steps == tuned.evidence.over_steps
    assert {path: path.stat().st_mtime_ns for path in kept if path != lost} == {
        path: time for path, time in kept.items() if path != lost
    }
    assert lost.exists()


def test_a_preset_over_steps_is_read_back_as_it_was(over_steps: tuple[TuneRequest, Preset], tmp_path: Path) -> None:
    path = tmp_path / "fitted.yaml"
    path.write_text(preset_yaml(over_steps[1]), encoding="utf-8")
    assert load_preset(str(path)) == over_steps[1]


def test_a_guard_and_a_cache_are_left_out_of_what_is_fitted(over_steps: tuple[TuneRequest, Preset]) -> None:
    """The one would compute more than a setting says, the other less."""
    request, tuned = over_steps
    said: list[str] = []

    class Notes(Unwatched):
        def note(self, text: str) -> None:
            said.append(text)

    preset = Preset.model_validate(
        request.request.preset.model_dump() | {"name": "own", "guard": 0.99, "cache": {"kind": "taylor"}}
    )
    asked = replace(request, request=replace(request.request, preset=preset), checked=())
    again = tune(asked, Notes())
    assert (again.guard, again.cache) == (None, None)
    assert again.schedule == tuned.schedule
    assert said == ["the guard and cache of preset own would change what is measured: left out"]


def test_what_may_be_kept_is_a_limit(over_steps: tuple[TuneRequest, Preset]) -> None:
    request, tuned = over_steps
    assert tuned.evidence is not None
    assert tuned.evidence.over_steps is not None
    both = tuned.evidence.over_steps.kept_bytes / 2**30

    def limited(**changes: Any) -> Preset:
        search = StepSearch(references=(2, 3), runs=0, **changes)
        return tune(replace(request, over_steps=search, checked=()), Unwatched())

    assert limited(most_gib=both).schedule.over_steps[0].between == "extrapolate"
    reused = limited(most_gib=0.9 * both)
    assert reused.schedule.over_steps[0].between == "reuse"
    assert reused.evidence is not None
    assert reused.evidence.over_steps is not None
    assert reused.evidence.over_steps.kept_bytes == pytest.approx(both * 2**30 / 2)
    small = limited(most_gib=0.26 * both, keep="fp8")  # a quarter of fp32, and scales
    assert small.schedule.over_steps[0].between == "extrapolate"
    assert small.schedule.over_steps[0].keep == "fp8"
    with pytest.raises(BadInput, match=r"outputs of all layers are .* GiB, more than --max-kept"):
        limited(most_gib=0.4 * both)


def test_what_no_search_over_steps_can_do_is_refused(fitted: tuple[TuneRequest, Preset]) -> None:
    with pytest.raises(BadInput, match=r"no choice of these patterns has a density of 0\.01.* at 1 of 4 steps"):
        tune(tune_request(fitted[0].folder, density=0.01, over_steps=StepSearch()), Unwatched())
    steps = tuning.MOST_STEPS + 1
    long = tune_request(fitted[0].folder, over_steps=StepSearch())
    sampling = long.request.preset.sampling.model_copy(update={"steps": steps})
    asked = replace(long.request, preset=long.request.preset.model_copy(update={"sampling": sampling}))
    with pytest.raises(BadInput, match=f"a search over {steps} steps would take too long"):
        tune(replace(long, request=asked), Unwatched())


def test_observations_of_something_else_are_refused(fitted: tuple[TuneRequest, Preset]) -> None:
    with pytest.raises(BadInput, match=r"is of another model, size, prompt or palette: remove the folder"):
        tune(tune_request(fitted[0].folder, rows=8), Unwatched())


def test_a_damaged_observation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "observed-000.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(BadInput, match="observed-000"):
        tune(tune_request(tmp_path), Unwatched())


@pytest.mark.parametrize("name", [field.name for field in fields(Observations)])
@pytest.mark.parametrize(
    "change",
    [
        lambda values: values[:1],
        lambda values: values[:0],
        lambda values: values[None],
        lambda values: values.astype(bool),
        lambda values: -values - 1,
        lambda values: values * 1e30,
        lambda values: values * np.nan,
    ],
    ids=["short", "empty", "deeper", "bool", "negative", "huge", "nan"],
)
def test_observations_that_no_run_made_are_refused(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    found, path, about = observed(), tmp_path / "observed-000.safetensors", {"steps": list(range(STEPS))}
    shape = (STEPS, 2, 3, len(CANDIDATES))
    observing.write(path, found, about)
    assert observing.read(path, about, shape).facts == found.facts
    path.unlink()
    changed = replace(found.observations, **{name: change(getattr(found.observations, name))})
    observing.write(path, replace(found, observations=changed), about)
    with pytest.raises(BadInput, match=r"is damaged \(.*\): remove it"):
        observing.read(path, about, shape)


@pytest.mark.parametrize(
    "facts",
    [
        *({"text_tokens": tokens} for tokens in (-1, 10**400, "5", None)),
        *({"calls": calls} for calls in (0, 10**9, 1.5)),
        *({"sigmas": sigmas} for sigmas in ([1.0, 0.0], [-1.0] * 5, ["1"] * 5)),
    ],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_observations_of_absurd_facts_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    path, about = tmp_path / "observed-000.safetensors", {"steps": list(range(STEPS))}
    tensors = observed()
    observing.write(path, replace(tensors, facts=Facts.model_construct(**(tensors.facts.model_dump() | facts))), about)
    with pytest.raises(BadInput, match=next(iter(facts))):
        observing.read(path, about, (STEPS, 2, 3, len(CANDIDATES)))


def test_latents_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path, about = tmp_path / "observed-000.safetensors", {"steps": list(range(STEPS))}
    observing.write(path, replace(observed(), latents=torch.full((2,), torch.nan)), about)
    with pytest.raises(BadInput, match="latents"):
        observing.read(path, about, (STEPS, 2, 3, len(CANDIDATES)))


@pytest.mark.parametrize("folder", ["/proc/observations", "/dev/null", "/dev/null/x"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_a_model_is_loaded(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "load_model", None)
    with pytest.raises(BadInput, match=f"--observations {folder}: .*: give a folder that can be written to"):
        tune(tune_request(Path(folder)), Unwatched())


def test_full_attention_for_everything_is_full_attention(tmp_path: Path) -> None:
    tuned = tune(tune_request(tmp_path, density=1.0, prompts=("a red fox",), checked=("a red fox",)), Unwatched())
    assert tuned.evidence is not None
    assert tuned.evidence.check is not None
    assert tuned.evidence.loss < 1e-6
    assert tuned.evidence.check.ssim > 0.999


def test_a_video_model_is_fitted_too(tmp_path: Path) -> None:
    folder = tiny_hunyuan.save(tmp_path / "tiny", guidance_embeds=False)
    model = choose_model(str(folder), "video")
    preset = select_preset(model, variant="b", steps=2, group="1x1x2")
    request = tune_request(
        tmp_path / "kept",
        request=request_for(model, preset, "waves", width=48, height=32, frames=9, device="cpu", dtype="float32"),
        prompts=("waves", "a red boat sailing at sunset"),
        candidates=palette((1, 1, 2), (3, 2, 3)),
        checked=("snow",),
        stretches=1,
    )
    evidence = tune(request, Unwatched()).evidence
    assert evidence is not None
    assert evidence.check is not None
    assert evidence.tokens == (3, 2, 3)
    assert evidence.density <= 0.5
