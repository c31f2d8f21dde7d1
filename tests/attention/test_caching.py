"""Step caches of diffusers inside `grat_cli.install`, against stock diffusers with the same caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_flux
import torch
from accelerate import cpu_offload
from cached_runs import CACHES, RATIOS, SIZE, STEPS, other_families, run, stock_config
from diffusers.hooks.group_offloading import apply_group_offloading
from flux_runs import GUIDED, HEIGHT, WIDTH, NoHostReads, call, preset, relative_difference

import grat_cli
from grat_cli.attention.layer import CallObserver
from grat_cli.attention.work import Work
from grat_cli.errors import BadInput
from grat_cli.estimates.memory import cached_bytes
from grat_cli.families import FAMILIES
from grat_cli.presets import Preset
from grat_cli.presets.caches import FirstBlock, Mag
from grat_kernels import Grid, Plan

RELATIVE = 5e-6  # two computations of one fp32 pass, as without a cache


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_flux.pipeline()


@contextmanager
def stock_cache(pipe: Any, name: str) -> Iterator[None]:
    pipe.transformer.enable_cache(stock_config(pipe, name))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def state_of(model: torch.nn.Module) -> list[Any]:
    """Everything that a cache may leave in a transformer."""
    return [
        (sorted(vars(module)), list(module._forward_pre_hooks), list(module._forward_hooks))
        for module in model.modules()
    ]


# ---- All kinds


@pytest.mark.parametrize("name", CACHES)
def test_full_attention_with_a_cache_equals_stock_with_it_and_leaving_leaves_nothing(name: str) -> None:
    pipe = tiny_flux.pipeline()
    stock = run(pipe)
    before = state_of(pipe.transformer)
    with grat_cli.install(pipe, preset(), **SIZE, cache=CACHES[name]) as installation:
        made = run(pipe)
        assert installation.work is not None
        works = [installation.work.of_step(step) for step in range(STEPS)]
        assert torch.equal(run(pipe), made), "a second run begins with what the first had kept"
    assert state_of(pipe.transformer) == before
    assert torch.equal(run(pipe), stock)
    assert any(work and work.computed for work in works), "nothing was left out"
    with stock_cache(pipe, name):
        assert relative_difference(made, run(pipe)) < RELATIVE


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("guard", [0.0, 0.9])
def test_patterns_run_with_a_cache_and_a_guard_and_twice_alike(pipe: Any, name: str, guard: float) -> None:
    with grat_cli.install(pipe, preset("b", radius=0), **SIZE, guard=guard) as installation:
        plain, density = run(pipe), installation.last_schedule.density
    with grat_cli.install(pipe, preset("b", radius=0), **SIZE, guard=guard, cache=CACHES[name]) as installation:
        made = run(pipe)
        assert torch.equal(run(pipe), made)
        assert installation.work is not None
        computed = [installation.work.of_step(step) for step in range(STEPS)]
        if guard and installation.guard:
            widened = [one["step"] for one in installation.guard.report()["widened"]]
            assert widened, "the guard saw nothing"
            # What a step measured counts two steps later, computed or not.
            assert all(step >= 2 for step in widened)
    assert not torch.equal(made, plain)
    assert relative_difference(made, plain) < 1
    assert guard or sum(work.density for work in computed if work) / STEPS < density


SERVED = {
    "qwen": tuple(CACHES),
    "flux2": ("mag", "taylor", "lite", "pab", "faster"),
    "hunyuan": tuple(CACHES),
    "hunyuan15": ("taylor", "lite", "pab", "faster"),
    "wan": tuple(CACHES),
}
# Stock takes both calls of true guidance for one, or counts a second transformer's steps from its first call.
_STOCK_DIFFERS = {"pab", "faster", "mag"}


@pytest.mark.parametrize("family", SERVED)
def test_every_family_runs_with_the_caches_that_diffusers_has_for_it_or_says_why_not(family: str) -> None:
    make, model, group, size, call_it = other_families()[family]
    pipe = make()

    def chosen(**attention: Any) -> Preset:
        data = {"name": "test", "model": model, "attention": {"group": group, **attention}}
        return Preset.model_validate({**data, "kernel": {"backend": "sdpa"}})

    with grat_cli.install(pipe, chosen(variant="full"), **size):
        plain = call_it(pipe)
    before = state_of(pipe.transformer)
    for name, cache in CACHES.items():
        if name not in SERVED[family]:
            with pytest.raises(BadInput, match=rf"^cache {cache.kind} cannot run in a \w+: .+; use \w+"):
                grat_cli.install(pipe, chosen(variant="full"), **size, cache=cache).__enter__()
            continue
        with grat_cli.install(pipe, chosen(variant="full"), **size, cache=cache) as installation:
            made = call_it(pipe)
            assert installation.work is not None
            assert any(work and work.computed for work in map(installation.work.of_step, range(STEPS))), name
        assert 0 < relative_difference(made, plain) < 1, name
        if name not in _STOCK_DIFFERS and family != "hunyuan15":
            with stock_caches(pipe, name):
                assert relative_difference(made, call_it(pipe)) < 10 * RELATIVE, name
    assert len(state_of(pipe.transformer)) == len(before)


@contextmanager
def stock_caches(pipe: Any, name: str) -> Iterator[None]:
    """Of all transformers of a pipeline; TaylorSeer is told the attentions that it does not look for itself."""
    models = [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]
    for model in models:
        config = stock_config(pipe, name)
        if name == "taylor":
            config.cache_identifiers = [r"(transformer_|single_transformer_)?blocks\.\d+\.attn\d?"]
        model.enable_cache(config)
    try:
        yield
    finally:
        for model in models:
            model.disable_cache()


# ---- Contexts, runs and calls


@pytest.mark.parametrize("name", ["first-block", "taylor", "mag"])
def test_a_pipeline_that_sets_no_context_is_given_one(name: str) -> None:
    pipe = tiny_flux.pipeline(tiny_flux.FluxImg2ImgPipeline)
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    cache = CACHES[name]
    if isinstance(cache, Mag):  # whose ratios are those of the last of ten steps
        cache = Mag(ratios=(9.0,) * 3 + RATIOS, threshold=0.05)
    arguments = {"image": image, "strength": 0.7, "num_inference_steps": 10}
    with grat_cli.install(pipe, preset(), **SIZE, cache=cache):
        made = call(pipe, **arguments)
    with stock_cache(pipe, name), pipe.transformer.cache_context("cond"):
        expected = call(pipe, **arguments)
    assert relative_difference(made, expected) < RELATIVE


@pytest.mark.parametrize("name", ["pab", "faster", "taylor", "first-block", "mag"])
def test_the_two_calls_of_true_guidance_are_kept_apart(pipe: Any, name: str) -> None:
    """Guidance away from the prompt itself changes nothing, and no call takes over what is the other's."""
    same = {f"negative_{key}": value for key, value in tiny_flux.prompt().items()}
    with grat_cli.install(pipe, preset("b", radius=1), **SIZE, cache=CACHES[name]):
        once = run(pipe)
        assert relative_difference(run(pipe, **same, true_cfg_scale=2.0), once) < RELATIVE
        other = run(pipe, **GUIDED)
    assert relative_difference(other, once) > 0.01


@pytest.mark.parametrize("name", ["first-block", "taylor", "pab", "mag"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_run_after_one_that_was_broken_off_begins_anew(pipe: Any, name: str, inside: bool) -> None:
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * STEPS + 3:
            raise RuntimeError("broken off")

    with grat_cli.install(pipe, preset("b", radius=1), **SIZE, cache=CACHES[name]):
        expected = run(pipe, **GUIDED)
        # In the middle of the second call of a step, or at its end.
        place = pipe.transformer.norm_out if inside else pipe.transformer
        handle = place.register_forward_hook(fail)
        try:
            assert torch.equal(run(pipe, **GUIDED), expected)
            with pytest.raises(RuntimeError, match="broken off"):
                run(pipe, **GUIDED)
        finally:
            handle.remove()
        assert torch.equal(run(pipe, **GUIDED), expected)


def test_prompts_one_after_another_do_not_see_each_other(pipe: Any) -> None:
    other = tiny_flux.prompt(seed=3)
    with grat_cli.install(pipe, preset("b", radius=1), **SIZE, cache="taylor:cache_interval=3"):
        first = run(pipe)
        run(pipe, **other)
        assert torch.equal(run(pipe), first)


@pytest.mark.parametrize("name", ["taylor", "mag", "lite"])
def test_nothing_waits_for_the_device_while_it_runs(pipe: Any, name: str) -> None:
    """First Block Cache has to: it decides by what the device computes. The others are known beforehand."""
    inputs = tiny_flux.inputs(18, 26)
    with grat_cli.install(pipe, preset("b", radius=1), **SIZE, cache=CACHES[name]) as installation:
        run(pipe)
        pipe.scheduler.set_timesteps(STEPS, mu=1.0)
        with pipe.transformer.cache_context("cond"):
            pipe.transformer(**inputs)
            pipe.scheduler.set_begin_index(1)
            with NoHostReads():
                pipe.transformer(**inputs)
    assert installation.caches is not None


# ---- Caches of the caller's own


@pytest.mark.parametrize("name", ["first-block", "taylor", "pab"])
@pytest.mark.parametrize("chunk_tokens", [None, 256])
def test_a_cache_that_the_caller_enabled_before_or_inside_works(name: str, chunk_tokens: int | None) -> None:
    pipe = tiny_flux.pipeline()
    stock = run(pipe)
    with stock_cache(pipe, name):
        expected = run(pipe)
    pipe.transformer.enable_cache(stock_config(pipe, name))
    with grat_cli.install(pipe, preset(), **SIZE, chunk_tokens=chunk_tokens) as installation:
        assert installation.chunking[0] == chunk_tokens
        made = run(pipe)
        assert relative_difference(made, expected) < RELATIVE
        assert installation.work is not None
        assert any(work and work.computed for work in map(installation.work.of_step, range(STEPS)))
        pipe.transformer.disable_cache()
        assert relative_difference(run(pipe), stock) < RELATIVE
        pipe.transformer.enable_cache(stock_config(pipe, name))
        assert torch.equal(run(pipe), made)
    assert torch.equal(run(pipe), expected), "what the caller enabled stays"
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe), stock)
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        assert block.forward.__func__ is type(block).forward


def test_a_cache_that_the_caller_enables_anew_as_it_was_works() -> None:
    pipe = tiny_flux.pipeline(tiny_flux.FluxImg2ImgPipeline)
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    config = stock_config(pipe, "first-block")
    with grat_cli.install(pipe, preset(), **SIZE):
        pipe.transformer.enable_cache(config)
        made = run(pipe, image=image, strength=0.8)
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(config)
        assert torch.equal(run(pipe, image=image, strength=0.8), made)
    pipe.transformer.disable_cache()


def test_two_caches_at_once_are_refused() -> None:
    pipe = tiny_flux.pipeline()
    with stock_cache(pipe, "taylor"), pytest.raises(BadInput, match=r"enabled already.*disable_cache\(\)"):
        grat_cli.install(pipe, preset(), **SIZE, cache="pab").__enter__()


# ---- Together with what else stands around blocks


@pytest.mark.parametrize("name", ["first-block", "taylor"])
@pytest.mark.parametrize("offload", ["none", "group", "sequential"])
def test_chunks_and_offloading_change_nothing_with_a_cache(name: str, offload: str) -> None:
    pipe = tiny_flux.pipeline()
    with grat_cli.install(pipe, preset("b", radius=1), **SIZE, cache=CACHES[name]):
        expected = run(pipe)
    if offload == "group":
        cpu = torch.device("cpu")
        apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    if offload == "sequential":
        for part in (pipe.vae, pipe.transformer):
            cpu_offload(part, torch.device("cpu"))
    with grat_cli.install(pipe, preset("b", radius=1), **SIZE, cache=CACHES[name], chunk_tokens=256) as installation:
        assert installation.chunking[0] == 256
        assert torch.equal(run(pipe), expected)


# ---- What is counted


class Counting(CallObserver):
    """Counts by itself what attentions are computed."""

    def __init__(self) -> None:
        self.steps: dict[int, list[list[int]]] = {}

    def begin_call(self, step: int, density: float) -> None:
        self.steps.setdefault(step, []).append([])
        self.step = step

    def end_call(self) -> None:
        pass

    @contextmanager
    def attention(self, inputs: Any = None) -> Iterator[None]:
        self.steps[self.step][-1].append(inputs.layer)
        yield


@pytest.mark.parametrize("name", CACHES)
def test_densities_count_what_was_computed(pipe: Any, name: str) -> None:
    counting = Counting()
    chosen = preset("b", radius=0, schedule={"dense_steps": 1, "rules": [{"layers": "1", "variant": "full"}]})
    with grat_cli.install(pipe, chosen, **SIZE, cache=CACHES[name], observer=counting) as installation:
        run(pipe)
        assert installation.work is not None
        schedule = installation.last_schedule
        for step in range(STEPS):
            (layers,) = counting.steps[step]
            work = installation.work.of_step(step)
            assert work is not None
            attended = sum(schedule.plan(step, layer).density for layer in layers) / tiny_flux.LAYERS
            assert work.density == pytest.approx(attended)
            whole = len(layers) == tiny_flux.LAYERS
            assert (work.computed == ()) == whole


def test_a_step_of_which_no_call_ended_has_no_work() -> None:
    work = Work(2)
    work.begin_call(0, 0.5)
    assert work.of_step(0) is None
    work.begin_call(0, 0.5)
    with work.attention():
        pass
    work.end_call()
    found = work.of_step(0)
    assert found is not None
    assert (found.density, found.computed) == (0.25, ("0",))


# ---- MagCache's ratios


def test_ratios_are_measured_and_then_used(pipe: Any) -> None:
    with grat_cli.install(pipe, preset(), **SIZE) as installation:
        plain = run(pipe)
    with grat_cli.install(pipe, preset(), **SIZE, cache="mag:calibrate=true") as installation:
        assert torch.equal(run(pipe), plain), "nothing is left out"
        assert installation.caches is not None
        ratios = installation.caches.ratios
    assert len(ratios) == STEPS
    assert ratios[0] == 1
    with grat_cli.install(pipe, preset(), **SIZE, cache=Mag(ratios=ratios, threshold=10.0)) as installation:
        run(pipe)
        assert installation.work is not None
        assert [bool(work and work.computed) for work in map(installation.work.of_step, range(STEPS))] == [
            *(False, True, True, True, False, True, True)
        ]


def test_calibration_prints_nothing(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with grat_cli.install(pipe, preset(), **SIZE, cache="mag:calibrate=true"):
        run(pipe)
    assert capsys.readouterr().out == ""


def test_a_model_without_known_ratios_is_told_how_to_measure_them(pipe: Any) -> None:
    with pytest.raises(BadInput, match=r"mag:calibrate=true.*ratios: \[\.\.\.\]"):
        grat_cli.install(pipe, preset(), **SIZE, cache="mag").__enter__()


def test_the_ratios_of_flux_are_known() -> None:
    flux = FAMILIES["flux"]
    config = {"num_layers": 19, "num_single_layers": 38, "in_channels": 64, "out_channels": None}
    ratios = flux.mag_ratios(config)
    assert ratios is not None
    assert len(ratios) == 28
    assert flux.mag_ratios({**config, "num_layers": 2}) is None
    assert flux.mag_ratios({**config, "in_channels": 384, "out_channels": 64}) is None


# ---- Refusals


def test_transformers_that_are_not_known_take_no_cache() -> None:
    other = SimpleNamespace(transformer=torch.nn.Linear(2, 2), scheduler=None)
    with pytest.raises(BadInput, match="a cache needs a transformer that GRAT knows"):
        grat_cli.install(other, preset(), tokens=Grid((18, 26)), text="first", cache="taylor").__enter__()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tailor", "cache tailor: did you mean 'taylor'"),
        ("taylor:interval=3", "cache taylor:interval=3: taylor has no 'interval': did you mean 'cache_interval'"),
        ("first-block:threshold=-1", "threshold: expected 0 or more, not -1"),
    ],
)
def test_caches_that_are_none_are_refused(pipe: Any, text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        grat_cli.install(pipe, preset(), **SIZE, cache=text).__enter__()


# ---- Memory


@pytest.mark.parametrize("name", CACHES)
def test_what_a_cache_keeps_was_foretold(pipe: Any, name: str) -> None:
    steps, sizes = [], []
    with grat_cli.install(pipe, preset("b", radius=0), **SIZE, cache=CACHES[name]) as installation:
        caches = installation.caches
        assert caches is not None

        def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            kept = caches.snapshot()
            assert kept is not None
            steps.append(step)
            sizes.append(kept.nbytes)
            return {}

        run(pipe, callback_on_step_end=look)
        plan = installation.last_schedule.plan(0, 0)
    assert isinstance(plan, Plan)
    shape = FAMILIES["flux"].transformer_shape(dict(pipe.transformer.config))
    foretold = cached_bytes(CACHES[name], shape, plan, 4)
    # Of blocks, what is alive within a call as well.
    within = 2 if isinstance(CACHES[name], FirstBlock | Mag) else 1
    assert foretold / within * 0.8 <= max(sizes) <= foretold * 1.01
